# SPDX-License-Identifier: Apache-2.0
"""Tests of inspect_checkpoint, whose numbers are compared with the definition in fp64, without our quantizer."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_hf

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, inspect_checkpoint, qat_convert
from bitcpm_megatron.checkpoint_tools.inspection import statistics
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_reader import TorchDistReader, read_common
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_writer import Chunk, TorchDistWriter
from bitcpm_megatron.quantization import quantize
from bitcpm_megatron.quantization.record import SCALE_SUFFIX, QuantizerRecord

LINEARS = 2 * len(tiny_hf.PROJECTIONS)


def definition(weight: torch.Tensor, groups: int) -> tuple[float, torch.Tensor]:
    """Returns the share of zeros and the scales of a weight, by definition."""
    rows = weight.double().reshape(weight.shape[0] * groups, -1)
    scales = rows.abs().mean(1).clamp(min=1e-5).to(torch.bfloat16).double()
    return (rows.abs() <= scales[:, None] / 2).double().mean().item(), scales


def inspected(capsys: pytest.CaptureFixture, path: Path, *flags: str, status: int = 0) -> dict:
    assert inspect_checkpoint.main([str(path), "--json", *flags]) == status
    found = json.loads(capsys.readouterr().out)
    assert bool(found["findings"]) == (status == 3)
    return {**found, "by_name": {module["name"]: module for module in found["modules"]}}


def agrees(module: dict, weight: torch.Tensor, groups: int) -> None:
    zeros, scales = definition(weight, groups)
    assert module["zeros"] == pytest.approx(zeros, abs=1e-12)
    numbers = [module[f"scale_{name}"] for name in ("min", "mean", "max")]
    assert numbers == pytest.approx([scales.min().item(), scales.mean().item(), scales.max().item()], rel=1e-12)


def to_megatron(source: Path, out: Path, *flags: object) -> Path:
    command = ["--load-dir", source, "--save-dir", out, "--make-vocab-size-divisible-by", 192, *flags]
    assert convert_hf_to_megatron.main([str(part) for part in command]) == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Makes a latent export, its fused form, and Megatron checkpoints of both."""
    root = tmp_path_factory.mktemp("inspect")
    tiny_hf.latent_export(root / "latent", tiny_hf.architecture(), tiny_hf.record())
    assert qat_convert.main(["--input_bin", str(root / "latent"), "--output", str(root / "fused")]) == 0
    to_megatron(root / "latent", root / "torch_dist", "--target-tensor-parallel-size", 2)
    to_megatron(
        root / "fused",
        root / "legacy",
        *"--format legacy --target-tensor-parallel-size 2".split(),
        *"--target-pipeline-parallel-size 2".split(),
    )
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path):
    # Digests are left out, so that changes by tests must be found without them.
    return lambda name: Path(
        shutil.copytree(made[name], tmp_path / name, ignore=shutil.ignore_patterns("DIGESTS.json"))
    )


def with_scales(directory: Path, change: float = 1.0, groups: int | None = None) -> Path:
    """Adds saved scales to a checkpoint, as training does; returns its directory."""
    release = directory / "release"
    reader, common = TorchDistReader(release), read_common(release)
    tensors = {name: reader.read(name).clone() for name in reader.tensors()}
    for name in [name for name in tensors if name.endswith((".linear_qkv.weight", "linear_proj.weight"))]:
        count = groups or (1 if "qkv" in name else tiny_hf.SHARDS)
        scales = torch.stack([definition(layer, count)[1].reshape(-1, count) for layer in tensors[name]])
        tensors[f"{name}{SCALE_SUFFIX}"] = (scales * change).bfloat16()
    for pattern in ("*.distcp", ".metadata", "common.pt"):
        for path in release.glob(pattern):
            path.unlink()
    TorchDistWriter(release, common).write(
        Chunk(n, tuple(t.shape), (0,) * t.ndim, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()
    )
    return directory


def test_a_latent_export(made, capsys):
    found = inspected(capsys, made["latent"])
    weights = load_file(made["latent"] / "model.safetensors")
    assert (found["format"], found["about_architecture"], found["tied"]) == ("huggingface", "bitcpm", True)
    assert found["parameters"] == sum(w.numel() for w in weights.values())
    assert found["bytes"] == sum(w.nbytes for w in weights.values()) == found["dtypes"]["float32"]
    assert found["quantizer"]["state"] == "latent" and found["quantizer"]["row_parallel_shards"] == 2
    assert set(found["by_name"]) == {name.removesuffix(".weight") for name in weights}
    assert sum(module["state"] == "latent" for module in found["modules"]) == LINEARS
    for layer in range(2):
        for name in tiny_hf.PROJECTIONS:
            path = f"model.layers.{layer}.{name}"
            module, weight = found["by_name"][path], weights[f"{path}.weight"]
            assert module["shape"] == list(weight.shape) and module["dtype"] == "float32"
            assert module["group_size"] == tiny_hf.ROW_PARALLEL.get(name, -1)
            agrees(module, weight, 2 if name in tiny_hf.ROW_PARALLEL else 1)
    assert found["by_name"]["model.norm"]["state"] == "" and found["by_name"]["model.norm"]["zeros"] is None


def test_wider_masters_are_quantized_in_the_recorded_dtype(copy, capsys):
    directory = copy("latent")
    record = replace(QuantizerRecord.read(directory), latent_dtype="bfloat16")
    record.write(directory)
    config = json.loads((directory / "config.json").read_text())
    config["ternary_quantizer"]["latent_dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config))
    module = inspected(capsys, directory)["by_name"]["model.layers.0.mlp.up_proj"]
    assert module["dtype"] == "float32"
    agrees(module, load_file(directory / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].bfloat16(), 1)


def test_a_fused_export(made, capsys):
    found = inspected(capsys, made["fused"])
    weights = load_file(made["fused"] / "model.safetensors")
    for name in tiny_hf.PROJECTIONS:
        module, weight = found["by_name"][f"model.layers.1.{name}"], weights[f"model.layers.1.{name}.weight"]
        assert module["state"] == "fused" and module["group_size"] == tiny_hf.ROW_PARALLEL.get(name, -1)
        assert module["zeros"] == pytest.approx((weight == 0).double().mean().item(), abs=1e-12)
        scales = weight[weight != 0].abs().double()
        assert (module["scale_min"], module["scale_max"]) == (scales.min().item(), scales.max().item())


def test_torch_dist(made, capsys):
    found = inspected(capsys, made["torch_dist"])
    assert found["path"].endswith("torch_dist/release") and found["format"] == "torch_dist"
    assert found["iteration"] == "release" and found["layout"] == {"tensor": 2}
    assert found["padded_vocabulary"] == 384 and found["architecture"]["vocab_size"] == 320
    assert found["optimizer_state"] is False and found["saved_scales"] == 0
    assert found == inspected(capsys, made["torch_dist"] / "release")
    module = found["by_name"]["decoder.layers.0.mlp.linear_fc2"]
    weight = load_file(made["latent"] / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert (module["state"], module["group_size"]) == ("latent", 96)
    agrees(module, weight, 2)


def test_legacy(made, capsys):
    found = inspected(capsys, made["legacy"])
    assert found["layout"] == {"tensor": 2, "pipeline": 2} and found["format"] == "legacy"
    assert found["quantizer"]["state"] == "fused"
    states = [module["state"] for module in found["modules"]]
    assert states.count("fused") == 8
    weight = load_file(made["fused"] / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    module = found["by_name"]["decoder.layers.1.mlp.linear_fc2"]
    assert module["group_size"] == 96 and module["zeros"] == pytest.approx((weight == 0).double().mean().item())


def test_ordinary_weights_and_single_files(made, tmp_path, capsys):
    weights = load_file(made["latent"] / "model.safetensors")
    for name, save in (("a.safetensors", save_file), ("a.bin", torch.save)):
        save(weights, tmp_path / name)
        found = inspected(capsys, tmp_path / name)
        assert found["format"] == name[2:] and found["quantizer"] is None
        module = found["by_name"]["model.layers.0.mlp.down_proj"]
        assert (module["state"], module["group_size"]) == ("ordinary", -1)
        agrees(module, weights["model.layers.0.mlp.down_proj.weight"], 1)


def test_the_table_has_one_line_for_layers_that_are_alike(made, capsys):
    assert inspect_checkpoint.main([str(made["torch_dist"])]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("decoder.layers.0-1.mlp.linear_fc2")]
    assert line.split()[1:5] == ["64x192", "float32", "latent", "96"]
    assert "320, padded to 384, tied" in text and "findings" not in text


def test_fast_reads_no_weights(made, copy, capsys):
    directory = copy("torch_dist")
    data = next((directory / "release").glob("*.distcp"))
    data.write_bytes(bytes(data.stat().st_size))
    found = inspected(capsys, directory, "--fast")
    assert found["by_name"]["decoder.layers.0.mlp.linear_fc2"]["state"] == "not read"
    found = inspected(capsys, directory, status=3)
    assert "damaged" in found["findings"][0]


def test_saved_scales(copy, capsys):
    found = inspected(capsys, with_scales(copy("torch_dist")))
    assert (
        found["saved_scales"] == 4 and found["by_name"]["decoder.layers.1.self_attention.linear_proj"]["saved_scales"]
    )


@pytest.mark.parametrize(("change", "groups", "words"), [(1.1, None, "bf16 steps away"), (1.0, 4, "need [64, 2]")])
def test_scales_that_do_not_fit(change, groups, words, copy, capsys):
    found = inspected(capsys, with_scales(copy("torch_dist"), change, groups), status=3)
    assert any(words in line and "linear_proj" in line for line in found["findings"])


def test_weights_are_quantized_once_and_on_one_thread(copy, monkeypatch):
    elements, threads = [], set()

    def counted(weight, *rest):
        elements.append(weight.numel())
        threads.add(torch.get_num_threads())
        return quantize(weight, *rest)

    monkeypatch.setattr(statistics, "quantize", counted)
    path, before = with_scales(copy("torch_dist")), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = inspect_checkpoint.inspect(path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    linears = [weight for weight in found.weights if weight.linear]
    assert any(weight.has_scales for weight in linears)
    assert sum(elements) == sum(math.prod(weight.info.shape) for weight in linears)
    assert threads == {1}


def planted(directory: Path, **changes) -> None:
    replace(QuantizerRecord.read(directory), **changes).write(directory)


def test_a_record_that_contradicts_the_weights(copy, capsys):
    directory = copy("fused")
    planted(directory, state="latent")
    found = inspected(capsys, directory, status=3)
    assert len(found["findings"]) == LINEARS and "says latent" in found["findings"][0]
    release = copy("torch_dist") / "release"
    planted(release, state="fused")
    assert "says fused" in inspected(capsys, release, status=3)["findings"][0]
    modules = {**QuantizerRecord.read(release).modules, "decoder.layers.7.mlp.linear_fc2": {"group_size": -1}}
    planted(release, state="latent", modules=modules, latent_dtype="bfloat16")
    findings = " ".join(inspected(capsys, release, "--fast", status=3)["findings"])
    assert "decoder.layers.7.mlp.linear_fc2" in findings and "bfloat16 weights were quantized" in findings


def test_groups_that_contradict_the_record(copy, capsys):
    directory = copy("fused")
    modules = {name: {"group_size": -1} for name in QuantizerRecord.read(directory).modules}
    planted(directory, modules=modules)
    findings = inspected(capsys, directory, status=3)["findings"]
    assert len(findings) == 4 and "ternary in groups of" in findings[0]


def test_tensors_that_are_missing_left_over_or_damaged(copy, capsys):
    directory = copy("latent")
    weights = load_file(directory / "model.safetensors")
    weights["more"] = weights.pop("model.norm.weight")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    weights["model.layers.0.input_layernorm.weight"] = torch.full((32,), float("inf"))
    save_file(weights, directory / "model.safetensors")
    findings = inspected(capsys, directory, status=3)["findings"]
    assert len(findings) == 5
    for words in ("model.norm.weight: missing", "more: not part", "shape [32]", "up_proj holds NaN", "norm holds NaN"):
        assert any(words in line for line in findings), words


def test_half_of_a_model_is_fused(made, copy, capsys):
    directory = copy("latent")
    fused = load_file(made["fused"] / "model.safetensors")
    weights = load_file(directory / "model.safetensors")
    weights.update({name: weight for name, weight in fused.items() if "q_proj" in name})
    alone = directory.parent / "alone" / "part.safetensors"
    alone.parent.mkdir()
    save_file(weights, alone)
    assert "2 of 14 linears are ternary already" in inspected(capsys, alone, status=3)["findings"][0]


@pytest.mark.parametrize("kind", ["latent", "fused"])
def test_weights_that_no_client_can_load(kind, copy, capsys):
    directory = copy(kind)
    (directory / "config.json").unlink()
    (finding,) = inspected(capsys, directory, status=3)["findings"]
    assert str(directory / "config.json") in finding


def test_bad_input(made, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.safetensors").write_bytes((made["latent"] / "model.safetensors").read_bytes()[:-7])
    (tmp_path / "notes.txt").write_text("?")
    for name in ("empty", "nowhere", "short.safetensors", "notes.txt"):
        assert inspect_checkpoint.main([str(tmp_path / name)]) == 2
        streams = capsys.readouterr()
        assert not streams.out and streams.err.startswith("error: ") and name in streams.err


@pytest.mark.slow
def test_it_needs_no_megatron(made):
    tool = Path(inspect_checkpoint.__file__)
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('megatron', 'transformers')]"
    )
    subprocess.run([sys.executable, "-c", code, str(tool), str(made["torch_dist"])], check=True, stdout=subprocess.PIPE)

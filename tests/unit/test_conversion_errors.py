# SPDX-License-Identifier: Apache-2.0
"""Tests of bad input and failures: a clear error, its exit status, and a target that is absent or complete."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_round_trip import tensors, write

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, convert_megatron_to_hf
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter
from bitcpm_megatron.checkpoint_tools.storage.staging import staged
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_reader import TorchDistReader, read_common
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_writer import Chunk, TorchDistWriter
from bitcpm_megatron.files import DIGESTS
from bitcpm_megatron.quantization import QuantizerConfig, quantize, quantize_dequantize
from bitcpm_megatron.quantization.record import QuantizerRecord

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 73, "max_position_embeddings": 512},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"},
}
Q = "model.layers.1.self_attn.q_proj.weight"
LEGACY = ["--format", "legacy"]
O_NAME = "model.layers.0.self_attn.o_proj"
O_PROJ = {O_NAME: {"group_size": -1}}
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Makes a model directory with two shards and an index."""
    directory = tmp_path / "source"
    weights = tensors(CONFIG, torch.bfloat16, 0)
    names = sorted(weights)
    write(directory, CONFIG, {})
    (directory / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, directory / file)
        index.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]


def change(directory: Path, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = shard_of(directory, name)
    content = load_file(file)
    content[name] = make(content[name])
    save_file(content, file)


def change_config(directory: Path, **values: object) -> None:
    (directory / "config.json").write_text(json.dumps({**CONFIG, **values}))


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = torch.nan
    return tensor


def rename_in_index(directory: Path) -> None:
    file = directory / "model.safetensors.index.json"
    file.write_text(file.read_text().replace(Q, Q.replace("layers.1", "layers.7")))


def add_tensor(directory: Path) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = shard_of(directory, Q)
    save_file({**load_file(shard), "surprise": torch.ones(1)}, shard)
    index["weight_map"]["surprise"] = shard.name
    file.write_text(json.dumps(index))


FROM_HF = {
    "truncated shard": (lambda d: truncate(shard_of(d, Q)), "model-0000.-of-00002.safetensors.*(truncated|ends)"),
    "missing shard": (lambda d: shard_of(d, Q).unlink(), "model-0000.-of-00002.safetensors"),
    "index names a missing tensor": (rename_in_index, "layers.7.self_attn.q_proj"),
    "extra tensor": (add_tensor, "surprise: not part of the model"),
    "wrong shape": (
        lambda d: change(d, Q, lambda t: t[:-1].clone()),
        r"q_proj.weight: shape \[63, 64\], .* \[64, 64\]",
    ),
    "NaN": (lambda d: change(d, Q, with_nan), "q_proj.weight holds NaN"),
    "infinity": (lambda d: change(d, Q, lambda t: t / 0), "q_proj.weight holds NaN or infinity"),
    "mixed dtypes": (lambda d: change(d, Q, lambda t: t.float()), "linear_qkv.weight come in several dtypes"),
    "unknown architecture": (
        lambda d: change_config(d, architectures=["MambaForCausalLM"]),
        r"MambaForCausalLM.* is unknown: LlamaForCausalLM, .* can be converted",
    ),
    "unknown rope": (
        lambda d: change_config(d, rope_scaling={"rope_type": "yarn", "factor": 4}),
        "RoPE scaling 'yarn' is not supported",
    ),
    "biases": (lambda d: change_config(d, attention_bias=True), "attention_bias True is not supported"),
    "sparse attention": (
        lambda d: change_config(
            d, architectures=["MiniCPMForCausalLM"], model_type="minicpm", sparse_config={"topk": 64, "dense_len": 8192}
        ),
        "InfLLM-v2.* is not supported.*take sparse_config out of config.json",
    ),
    "missing number": (
        lambda d: (d / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"})),
        "lacks 'hidden_size'",
    ),
    "a billion layers": (
        lambda d: change_config(d, num_hidden_layers=10**9),
        "num_hidden_layers 1000000000: must be 1",
    ),
    "no layers": (lambda d: change_config(d, num_hidden_layers=0), "num_hidden_layers 0: must be 1 to"),
    "negative size": (lambda d: change_config(d, hidden_size=-64), "hidden_size -64: must be 1 to"),
    "fractional size": (
        lambda d: change_config(d, intermediate_size=128.5),
        "intermediate_size 128.5: expected a whole",
    ),
    "boolean size": (lambda d: change_config(d, vocab_size=True), "vocab_size True: expected a whole number"),
    "size as text": (lambda d: change_config(d, num_attention_heads="4"), "num_attention_heads '4': expected a whole"),
    "no heads": (lambda d: change_config(d, num_attention_heads=0), "num_attention_heads 0: must be 1 to"),
    "rope of 0": (lambda d: change_config(d, rope_theta=0), "rope_theta 0: must be at least 1"),
    "epsilon as text": (lambda d: change_config(d, rms_norm_eps="small"), "rms_norm_eps 'small': expected a number"),
    "tied as text": (lambda d: change_config(d, tie_word_embeddings="false"), "tie_word_embeddings 'false': expected"),
    "classes of another kind": (lambda d: change_config(d, architectures=[["x"]]), "is unknown"),
    "division by zero": (
        lambda d: change_config(d, architectures=["MiniCPMForCausalLM"], model_type="minicpm", dim_model_base=0),
        "dim_model_base 0: must be above 0",
    ),
    "deep config": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json: nested too deeply"),
    "config twice": (
        lambda d: (d / "config.json").write_text('{"hidden_size": 64, "hidden_size": 32}'),
        "'hidden_size' stands there twice",
    ),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "shard outside": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        "a lies outside the model, in '../a.safetensors'",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is not there"),
    "another layer count": (lambda d: change_config(d, num_hidden_layers=3), "layers.2.*: missing"),
    "fewer layers": (lambda d: change_config(d, num_hidden_layers=1), "layers.1.*: not part of the model"),
    "head size": (lambda d: change_config(d, head_dim=32), "config.json says"),
    "half fused": (
        lambda d: change(d, Q, lambda w: quantize_dequantize(w, QuantizerConfig())[0]),
        "q_proj.weight is ternary already and the rest of decoder.layers.1.self_attention.linear_qkv is not",
    ),
    "tied and not equal": (
        lambda d: change_config(d, tie_word_embeddings=True),
        "ties the embeddings, and lm_head.weight differs",
    ),
    "recorded as fused": (
        lambda d: QuantizerRecord("fused", "ternary", 1e-5, "bfloat16", 1, 16, O_PROJ).write(d),
        "says fused, and decoder.layers.0.self_attention.linear_proj .* is not ternary",
    ),
    "fused, recorded as latent": (
        lambda d: (
            change(d, f"{O_NAME}.weight", lambda w: quantize_dequantize(w, QuantizerConfig())[0]),
            QuantizerRecord("latent", "ternary", 1e-5, "bfloat16", 1, 16, O_PROJ).write(d),
        ),
        "says latent, and decoder.layers.0.self_attention.linear_proj .* is ternary already",
    ),
    "latents of another dtype": (
        lambda d: QuantizerRecord("latent", "ternary", 1e-5, "float16", 1, 16, O_PROJ).write(d),
        "training quantized its weight as float16, .* give --dtype float16",
    ),
    "unknown state": (
        lambda d: QuantizerRecord("foo", "ternary", 1e-5, "bfloat16", 1, 16, O_PROJ).write(d),
        "state: expected 'latent', 'fused' or 'packed', got 'foo'",
    ),
    "integers": (lambda d: change(d, Q, lambda w: w.to(torch.int8)), "q_proj|several dtypes"),
}


def fails(capsys: pytest.CaptureFixture, tool, target: Path, message: str, *arguments: object, status: int = 2) -> None:
    import re

    found = tool.main([str(a) for a in arguments] + ["--save-dir", str(target)])
    error = capsys.readouterr().err
    assert found == status, error
    assert re.search(message, error, re.DOTALL), error
    assert error.splitlines()[-1].startswith(("error: ", " ")), error
    assert not target.exists() and not target.with_name(f".{target.name}.incomplete").exists()


@pytest.mark.parametrize("layout", ["torch_dist", "legacy"])
@pytest.mark.parametrize("case", FROM_HF)
def test_bad_models_are_refused(case: str, layout: str, source: Path, tmp_path: Path, capsys) -> None:
    damage, message = FROM_HF[case]
    damage(source)
    fails(capsys, convert_hf_to_megatron, tmp_path / "out", message, "--load-dir", source, "--format", layout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*LEGACY, "--target-tensor-parallel-size", 3], "2 key/value heads and 128 ffn channels; these sizes do: 1, 2"),
        (
            ["--target-tensor-parallel-size", 3],
            "64 query channels and 128 ffn channels; these sizes do: 1, 2, 4, 8, 16",
        ),
        ([*LEGACY, "--target-pipeline-parallel-size", 3], "2 layers cannot be split over 3"),
        (["--target-virtual-pipeline-parallel-size", 2], "concerns --format legacy"),
    ],
)
def test_impossible_layouts_are_refused(flags: list, message: str, source: Path, tmp_path: Path, capsys) -> None:
    fails(capsys, convert_hf_to_megatron, tmp_path / "out", message, "--load-dir", source, *flags)


def test_a_target_that_holds_something_is_left_alone(source: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert convert_hf_to_megatron.main(["--load-dir", str(source), "--save-dir", str(tmp_path / "out")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.fixture
def megatron(source: Path, tmp_path: Path) -> Path:
    """Makes a torch_dist checkpoint with a quantizer record and saved scales."""
    directory = tmp_path / "megatron"
    command = ["--load-dir", source, "--save-dir", directory, "--target-tensor-parallel-size", 2]
    assert convert_hf_to_megatron.main([str(c) for c in command]) == 0
    # There are no digests, so that changes by tests must be found without them.
    (directory / "release" / DIGESTS).unlink()
    modules = {f"decoder.layers.{n}.{m}": {"group_size": -1} for n in (0, 1) for m in LINEARS}
    for n in (0, 1):
        modules[f"decoder.layers.{n}.mlp.linear_fc2"] = {"group_size": 64}
        modules[f"decoder.layers.{n}.self_attention.linear_proj"] = {"group_size": 32}
    record = QuantizerRecord("latent", "ternary", 1e-5, "bfloat16", 2, 16, modules)
    rewrite(directory, lambda t: {**t, **scales_of(t, record)})
    record.write(directory / "release")
    return directory


def scales_of(weights: dict[str, torch.Tensor], record: QuantizerRecord) -> dict[str, torch.Tensor]:
    found = {}
    for module in LINEARS:
        group = record.modules[f"decoder.layers.0.{module}"]["group_size"]
        stack = weights[f"decoder.layers.{module}.weight"]
        scales = [quantize(w, QuantizerConfig(group_size=group))[1] for w in stack]
        found[f"decoder.layers.{module}.weight.ternary_scale"] = torch.stack(scales)
    return found


def rewrite(directory: Path, edit: Callable[[dict], dict]) -> None:
    """Replaces the tensors of a checkpoint by what ``edit`` makes of them."""
    release = directory / "release"
    reader, common = TorchDistReader(release), read_common(release)
    content = edit({name: reader.read(name).clone() for name in reader.tensors()})
    for file in (*release.glob("*.distcp"), *(release / n for n in (".metadata", "common.pt", "metadata.json"))):
        file.unlink()
    TorchDistWriter(release, common).write(
        Chunk(name, tuple(t.shape), (0,) * t.ndim, tuple(t.shape), t.dtype, lambda t=t: t)
        for name, t in content.items()
    )


def edit_record(directory: Path, **values: object) -> None:
    path = directory / "release" / "ternary_quantizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_arguments(directory: Path, **values: object) -> None:
    path = directory / "release" / "arguments.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edited(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda d: rewrite(d, lambda t: {**t, name: make(t[name])})


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 3, 5] = torch.nan
    return tensor


FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC1_IN_32 = {"decoder.layers.0.mlp.linear_fc1": {"group_size": 32}}


def record_of(directory: Path) -> QuantizerRecord:
    return QuantizerRecord.read(directory / "release")


FROM_MEGATRON = {
    "truncated file": (lambda d: truncate(next((d / "release").glob("*.distcp"))), ".distcp"),
    "missing file": (lambda d: next((d / "release").glob("*.distcp")).unlink(), ".distcp"),
    "corrupt metadata": (lambda d: (d / "release" / ".metadata").write_bytes(b"x"), ".metadata"),
    "missing tensor": (
        lambda d: rewrite(d, lambda t: {k: v for k, v in t.items() if k != FC1}),
        "layers.0.mlp.linear_fc1.weight: missing",
    ),
    "extra tensor": (
        lambda d: rewrite(d, lambda t: {**t, "decoder.surprise": torch.ones(2)}),
        "decoder.surprise: not part of the model",
    ),
    "wrong shape": (edited(FC1, lambda t: t[:, :-1].clone()), r"shape \[255, 64\], the model's arguments say"),
    "one layer less": (edited(FC1, lambda t: t[:1].clone()), "layers.1.mlp.linear_fc1.weight: missing"),
    "NaN": (edited(FC1, spoil), "gate_proj.weight.*NaN"),
    "another model": (lambda d: edit_arguments(d, ffn_hidden_size=64), "the model's arguments say"),
    "no family": (lambda d: edit_arguments(d, normalization="LayerNorm"), "normalization='LayerNorm'"),
    "no vocabulary": (
        lambda d: (edit_arguments(d, vocab_size=None), shutil.rmtree(d / "release" / "hf")),
        "give --vocab-size N",
    ),
    "tracker": (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("7"), "no complete checkpoint"),
    "tracker with a raised 2": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("\u00b2"),
        "and not an iteration number",
    ),
    "tracker that is no text": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_bytes(b"\xff"),
        "latest_checkpointed_iteration.txt: not UTF-8",
    ),
    "arguments that are a list": (lambda d: (d / "release" / "arguments.json").write_text("[]"), "arguments.json: exp"),
    "deep arguments": (
        lambda d: (d / "release" / "arguments.json").write_text("[" * 100_000),
        "arguments.json: nested too deeply",
    ),
    "a billion layers": (lambda d: edit_arguments(d, num_layers=10**9), "num_layers 1000000000: must be 1 to 10000"),
    "no metadata": (lambda d: (d / "release" / ".metadata").unlink(), "there is no .metadata"),
    "no common.pt": (
        lambda d: ((d / "release" / "arguments.json").unlink(), (d / "release" / "common.pt").unlink()),
        "common.pt: there is no such file",
    ),
    "common.pt with other arguments": (
        lambda d: (
            (d / "release" / "arguments.json").unlink(),
            torch.save({"args": "none"}, d / "release" / "common.pt"),
        ),
        "release: its args are a str",
    ),
    "no checkpoint": (lambda d: shutil.rmtree(d / "release"), "no complete checkpoint"),
    "unreadable record": (
        lambda d: (d / "release" / "ternary_quantizer.json").write_text("{"),
        "ternary_quantizer.json: not valid JSON",
    ),
    "record of another model": (
        lambda d: edit_record(d, modules={"decoder.layers.9.mlp.linear_fc1": {"group_size": -1}}),
        "names decoder.layers.9.mlp.linear_fc1, which the model does not have",
    ),
    "record with other groups": (
        lambda d: edit_record(d, modules={**record_of(d).modules, **FC1_IN_32}),
        r"has scales of shape \[256, 1\], its quantizer record says \[256, 2\]",
    ),
    "record that says fused": (lambda d: edit_record(d, state="fused"), "says fused, and .* is not ternary"),
    "record of another dtype": (
        lambda d: edit_record(d, latent_dtype="float32"),
        "says that training quantized float32",
    ),
    "scales of other weights": (edited(f"{FC1}.ternary_scale", lambda t: t * 1.05), "bf16 steps away"),
    "scales of an unrecorded module": (
        lambda d: edit_record(d, modules={"decoder.layers.0.mlp.linear_fc1": {"group_size": -1}}),
        "has saved scales, and its quantizer record does not name it",
    ),
    "on a ramp": (lambda d: edit_record(d, ramp=0.25), "middle of a ramp.*0.25 of the quantizer.*Train on until"),
    "record of nothing": (lambda d: edit_record(d, modules={}), "names no module"),
    "record of another eps": (lambda d: edit_record(d, eps=2.0), "bf16 steps away"),
    "record without groups": (
        lambda d: edit_record(d, modules={"a": {}}),
        "not a quantizer record: modules.a.group_size is missing",
    ),
    "arguments without layers": (lambda d: edit_arguments(d, num_layers=None), "do not say num_layers"),
    "fused, recorded as latent": (
        edited(FC1, lambda t: torch.stack([quantize_dequantize(w, QuantizerConfig())[0] for w in t])),
        "says latent, and decoder.layers.0.mlp.linear_fc1 .* is ternary already",
    ),
}


@pytest.mark.parametrize("case", FROM_MEGATRON)
def test_bad_checkpoints_are_refused(case: str, megatron: Path, tmp_path: Path, capsys) -> None:
    damage, message = FROM_MEGATRON[case]
    damage(megatron)
    arguments = ["--load-dir", megatron, "--weights", "fused"]
    fails(capsys, convert_megatron_to_hf, tmp_path / "out", message, *arguments)


def rank_file(directory: Path, rank: int) -> Path:
    return directory / "release" / f"mp_rank_0{rank}" / "model_optim_rng.pt"


def edit_rank(directory: Path, edit: Callable[[dict], object], rank: int = 1) -> None:
    content = torch.load(rank_file(directory, rank), weights_only=False)
    edit(content["model"])
    torch.save(content, rank_file(directory, rank))


LEGACY_FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
FROM_LEGACY = {
    "a shape on one rank": (
        lambda d: edit_rank(d, lambda t: t.update({LEGACY_FC1: t[LEGACY_FC1][:-1]})),
        "layers.0.mlp.linear_fc1.weight has other shapes or dtypes",
    ),
    "a scalar": (
        lambda d: [edit_rank(d, lambda t: t.update({LEGACY_FC1: torch.ones(())}), rank) for rank in (0, 1)],
        r"layers.0.mlp.linear_fc1.weight: shape \[\], the model's arguments say",
    ),
    "a layer without number": (
        lambda d: [edit_rank(d, lambda t: t.update({"decoder.layers.x": torch.ones(1)}), rank) for rank in (0, 1)],
        "decoder.layers.x: not part of the model",
    ),
    "a missing rank": (lambda d: rank_file(d, 1).unlink(), "mp_rank_01.*is missing"),
    "a cut rank": (lambda d: truncate(rank_file(d, 1)), "mp_rank_01.*truncated"),
}


@pytest.mark.parametrize("case", FROM_LEGACY)
def test_bad_legacy_checkpoints_are_refused(case: str, source: Path, tmp_path: Path, capsys) -> None:
    directory = tmp_path / "legacy"
    command = ["--load-dir", source, "--save-dir", directory, *LEGACY, "--target-tensor-parallel-size", 2]
    assert convert_hf_to_megatron.main([str(c) for c in command]) == 0
    (directory / "release" / DIGESTS).unlink()
    damage, message = FROM_LEGACY[case]
    damage(directory)
    fails(capsys, convert_megatron_to_hf, tmp_path / "out", message, "--load-dir", directory, "--weights", "latent")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "latent", "--hf-architecture", "llama"], "would load latent weights without quantizing them"),
        (["--weights", "latent", "--dtype", "fp16"], "would change the bfloat16 latent weights"),
        (["--weights", "fused", "--ternary-group-size", "32"], "contradicts the checkpoint"),
        (["--weights", "fused", "--ternary-group-size", "96"], "contradicts the checkpoint"),
        (["--weights", "fused", "--vocab-size", "80"], "--vocab-size 80 contradicts the checkpoint, which says 73"),
        (["--weights", "fused", "--tokenizer", "/nowhere"], "is no directory"),
        (["--weights", "fused", "--max-shard-size", "many"], "many"),
    ],
)
def test_contradictory_wishes_are_refused(flags: list[str], message: str, megatron: Path, tmp_path: Path, capsys):
    fails(capsys, convert_megatron_to_hf, tmp_path / "out", message, "--load-dir", megatron, *flags)


def test_a_checkpoint_without_quantizer_has_nothing_to_fuse(source: Path, tmp_path: Path, capsys) -> None:
    plain = tmp_path / "plain"
    assert convert_hf_to_megatron.main(["--load-dir", str(source), "--save-dir", str(plain)]) == 0
    fails(
        capsys, convert_megatron_to_hf, tmp_path / "out", "nothing to fuse", "--load-dir", plain, "--weights", "fused"
    )


@pytest.mark.parametrize("how", ["scales", "group size"])
def test_a_missing_record_is_inferred_with_a_warning(how: str, megatron: Path, tmp_path: Path, capsys) -> None:
    expected, found = tmp_path / "expected", tmp_path / "found"
    command = ["--load-dir", str(megatron), "--weights", "fused", "--save-dir"]
    assert convert_megatron_to_hf.main([*command, str(expected)]) == 0
    (megatron / "release" / "ternary_quantizer.json").unlink()
    extra = []
    if how == "group size":
        # The checkpoint is written at TP2, so that the chunks of row-parallel weights show two shards.
        release = megatron / "release"
        shutil.rmtree(megatron)
        command_back = ["--load-dir", str(tmp_path / "source"), "--save-dir", str(megatron)]
        assert convert_hf_to_megatron.main([*command_back, "--target-tensor-parallel-size", "2"]) == 0
        assert release.is_dir()
        extra = ["--ternary-group-size", "-1"]
    assert convert_megatron_to_hf.main([*command, str(found), *extra]) == 0
    assert "warning: " in capsys.readouterr().err
    theirs, mine = load_file(expected / "model.safetensors"), load_file(found / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert QuantizerRecord.read(found) == QuantizerRecord.read(expected)


def test_the_saved_scales_are_used_and_not_new_ones(megatron: Path, tmp_path: Path) -> None:
    def one_step(scales: torch.Tensor) -> torch.Tensor:
        return (scales.view(torch.int16) + 1).view(torch.bfloat16)

    edited(f"{FC1}.ternary_scale", one_step)(megatron)
    out = tmp_path / "out"
    assert convert_megatron_to_hf.main(["--load-dir", str(megatron), "--weights", "fused", "--save-dir", str(out)]) == 0
    gate = load_file(out / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    reader = TorchDistReader(megatron / "release")
    saved = reader.read(f"{FC1}.ternary_scale", (1, slice(0, 128)))
    assert torch.equal(gate.abs().amax(1, keepdim=True), saved)
    latent = reader.read(FC1, (1, slice(0, 128)))
    assert torch.equal(gate, quantize_dequantize(latent, QuantizerConfig(), saved)[0])


@pytest.mark.parametrize("direction", ["to megatron", "to hugging face"])
def test_a_full_disk(direction: str, source: Path, megatron: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if direction == "to megatron":
        monkeypatch.setattr(TorchDistWriter, "write", full)
        arguments = (convert_hf_to_megatron, tmp_path / "out", "the disk is full", "--load-dir", source)
    else:
        monkeypatch.setattr(SafetensorsWriter, "write", full)
        arguments = (convert_megatron_to_hf, tmp_path / "out", "the disk is full", "--load-dir", megatron)
        arguments += ("--weights", "fused")
    fails(capsys, *arguments, status=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("direction", ["to megatron", "to hugging face"])
def test_killed_half_way_and_started_again(
    direction: str, number: signal.Signals, source: Path, megatron: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if direction == "to megatron":
        tool, module = "convert_hf_to_megatron", "hf_model.model"
        function, flags = "join", ["--load-dir", str(source)]
    else:
        tool, module = "convert_megatron_to_hf", "megatron_model.export"
        function, flags = "split", ["--load-dir", str(megatron), "--weights", "fused"]
    script = f"""
import importlib, os, signal, sys
tools = "bitcpm_megatron.checkpoint_tools."
tool, module = importlib.import_module(tools + "{tool}"), importlib.import_module(tools + "{module}")
count = 0
original = module.{function}
def counted(*args):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), {int(number)})
    return original(*args)
module.{function} = counted
sys.exit(tool.main(sys.argv[1:]))
"""
    command = [*flags, "--save-dir", str(out)]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, check=False, text=True)
    assert not out.exists()
    if number == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL
        assert (tmp_path / ".out.incomplete").is_dir()
    else:
        assert done.returncode == 1 and done.stderr.endswith("error: interrupted\n"), done.stderr
        assert not (tmp_path / ".out.incomplete").exists()
    main = {"to megatron": convert_hf_to_megatron, "to hugging face": convert_megatron_to_hf}[direction].main
    assert main(command) == 0
    assert out.is_dir() and not (tmp_path / ".out.incomplete").exists()


@pytest.mark.parametrize("group", ["32", "96"])
def test_impossible_group_sizes_without_a_record(group: str, megatron: Path, tmp_path: Path, capsys) -> None:
    (megatron / "release" / "ternary_quantizer.json").unlink()
    arguments = ["--load-dir", megatron, "--weights", "fused", "--ternary-group-size", group]
    fails(capsys, convert_megatron_to_hf, tmp_path / "out", "contradicts the checkpoint", *arguments)


@pytest.mark.parametrize("direction", ["to megatron", "to hugging face"])
def test_a_dtype_that_cannot_hold_a_value(direction: str, source: Path, tmp_path: Path, capsys) -> None:
    def large(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = 1e6
        return tensor

    change(source, "model.embed_tokens.weight", large)
    message = "holds values that torch.float16 cannot"
    if direction == "to megatron":
        fails(capsys, convert_hf_to_megatron, tmp_path / "out", message, "--load-dir", source, "--dtype", "fp16")
        return
    assert convert_hf_to_megatron.main(["--load-dir", str(source), "--save-dir", str(tmp_path / "m")]) == 0
    arguments = ["--load-dir", tmp_path / "m", "--weights", "latent", "--dtype", "fp16"]
    fails(capsys, convert_megatron_to_hf, tmp_path / "out", message, *arguments)


def test_scales_are_cast_exactly_or_not_at_all(source: Path, tmp_path: Path, capsys) -> None:
    def ternary(tensor: torch.Tensor) -> torch.Tensor:
        return quantize_dequantize(tensor * 1e6, QuantizerConfig())[0]

    change(source, f"{O_NAME}.weight", ternary)
    message = "cannot hold its scales exactly"
    fails(capsys, convert_hf_to_megatron, tmp_path / "out", message, "--load-dir", source, "--dtype", "fp16")
    assert convert_hf_to_megatron.main(["--load-dir", str(source), "--save-dir", str(tmp_path / "m")]) == 0
    arguments = ["--load-dir", tmp_path / "m", "--weights", "fused", "--dtype", "fp16"]
    fails(capsys, convert_megatron_to_hf, tmp_path / "out", message, *arguments)


def test_partly_fused_models_are_recorded_so(source: Path, tmp_path: Path) -> None:
    change(source, f"{O_NAME}.weight", lambda w: quantize_dequantize(w, QuantizerConfig(group_size=32))[0])
    assert convert_hf_to_megatron.main(["--load-dir", str(source), "--save-dir", str(tmp_path / "m")]) == 0
    record = record_of(tmp_path / "m")
    assert record.state == "fused"
    assert record.modules == {"decoder.layers.0.self_attention.linear_proj": {"group_size": 32}}
    assert record.row_parallel_shards == 2


def test_of_two_commands_for_one_target_the_second_is_refused(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    with staged(out) as directory:
        (directory / "mine").write_text("x")
        assert convert_hf_to_megatron.main(["--load-dir", str(source), "--save-dir", str(out)]) == 2
        assert "another command is writing" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]

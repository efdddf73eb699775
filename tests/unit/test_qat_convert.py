# SPDX-License-Identifier: Apache-2.0
"""Tests of ``qat_convert.py``: which weights it fuses, in which groups, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import tiny_hf
from transformers import AutoModelForCausalLM

from bitcpm_megatron.checkpoint_tools import qat_convert
from bitcpm_megatron.checkpoint_tools.hf_model.config import GRANITE, LLAMA, MINICPM, config_for
from bitcpm_megatron.checkpoint_tools.quantizer import fuse as fuse_module
from bitcpm_megatron.checkpoint_tools.quantizer.fuse import fuse_blocks
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError, TensorInfo
from bitcpm_megatron.files import DIGESTS, check_digests, read_digests
from bitcpm_megatron.quantization import QuantizerConfig, dequantize, fused_group_size, quantize
from bitcpm_megatron.quantization.record import FILE_NAME, QuantizerRecord

PROJECTIONS = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in tiny_hf.PROJECTIONS]
O_PROJ, UP_PROJ = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"


def convert(source: Path, target: Path, *more: str) -> int:
    return qat_convert.main(["--input_bin", str(source), "--output", str(target), "--quant_type", "ternary", *more])


def reference(w: torch.Tensor, group: int, eps: float = 1e-5) -> torch.Tensor:
    config = QuantizerConfig(group_size=group, eps=eps)
    return dequantize(*quantize(w, config), config, w.dtype)


def expected(weights: dict[str, torch.Tensor], groups: Callable[[str], int] | dict) -> dict[str, torch.Tensor]:
    lookup = groups.get if isinstance(groups, dict) else groups
    return {n: w if lookup(n) is None else reference(w, lookup(n)) for n, w in weights.items()}


def trained_groups(name: str) -> int | None:
    """Returns the group size of a weight in :func:`tiny_hf.record`, or None if it is not quantized."""
    if name not in PROJECTIONS:
        return None
    return {"o_proj": 32, "down_proj": 96}.get(name.split(".")[-2], -1)


def whole_rows(name: str) -> int | None:
    return -1 if name in PROJECTIONS else None


def assert_same(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Asserts that a model has exactly these weights, bit for bit, including the signs of zeros."""
    found: dict[str, torch.Tensor] = {}
    for file in [directory] if directory.is_file() else directory.glob("*.safetensors"):
        found |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor) and torch.equal(found[name].signbit(), tensor.signbit()), name


@pytest.fixture
def latent(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Makes a latent export in bf16, and returns it with its weights."""
    return export(tmp_path / "latent")


def export(directory: Path, record: QuantizerRecord | None = None, **shape) -> tuple[Path, dict[str, torch.Tensor]]:
    record = record or tiny_hf.record(latent_dtype="bfloat16")
    tiny_hf.latent_export(directory, tiny_hf.architecture(**shape), record, bos_token_id=1, eos_token_id=2)
    tiny_hf.write_tokenizer(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "training_args.bin").write_bytes(b"no weights")
    return directory, load_file(directory / "model.safetensors")


# ------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("more", [(), ("--group_size", "-1")])
def test_a_latent_export_becomes_a_stock_model(latent, tmp_path: Path, more, capsys) -> None:
    source, weights = latent
    assert convert(source, tmp_path / "out", *more) == 0
    assert "fusing 14 of 20 tensors" in capsys.readouterr().out
    assert_same(tmp_path / "out", expected(weights, trained_groups))
    assert QuantizerRecord.read(tmp_path / "out") == tiny_hf.record(state="fused", latent_dtype="bfloat16")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} < names
    assert "modeling_bitcpm.py" not in names and "training_args.bin" not in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "granite" and config["torch_dtype"] == "bfloat16" and config["bos_token_id"] == 1
    assert not {"auto_map", "ternary_quantizer", "quantization_config"} & set(config)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_without_multipliers_it_is_a_llama(tmp_path: Path) -> None:
    tiny_hf.latent_export(tmp_path / "in", tiny_hf.llama(tied=False), tiny_hf.record())
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_modules_of_their_own_size_and_eps_and_modules_that_are_not_listed(tmp_path: Path) -> None:
    record = tiny_hf.record(latent_dtype="bfloat16")
    record.modules[UP_PROJ].update(group_size=32, eps=0.02)
    del record.modules[O_PROJ]
    source, weights = export(tmp_path / "in", record)
    assert convert(source, tmp_path / "out") == 0
    result = expected(weights, lambda n: None if n == f"{O_PROJ}.weight" else trained_groups(n))
    result[f"{UP_PROJ}.weight"] = reference(weights[f"{UP_PROJ}.weight"], 32, 0.02)
    assert_same(tmp_path / "out", result)


def test_shards_and_other_dtypes(latent, tmp_path: Path) -> None:
    source, weights = latent
    names = list(weights)
    extra = {"model.counter": torch.tensor(7), "model.table": torch.arange(6, dtype=torch.int64).reshape(2, 3)}
    halves = [dict.fromkeys(names[:9]), dict.fromkeys(names[9:])]
    for number, half in enumerate(halves):
        save_file({n: weights[n] for n in half} | (extra if number else {}), source / f"s{number}.safetensors")
    index = {n: "s0.safetensors" for n in halves[0]} | {n: "s1.safetensors" for n in [*halves[1], *extra]}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (source / "model.safetensors").unlink()
    assert convert(source, tmp_path / "out", "--max-shard-size", "40KB") == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_same(tmp_path / "out", expected(weights, trained_groups) | extra)


@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("suffixes", [("bin", "bin"), ("bin", "safetensors"), ("safetensors", "bin")])
def test_single_files_without_a_record(tmp_path: Path, group, suffixes) -> None:
    weights = tiny_hf.cast(tiny_hf.model(tiny_hf.architecture(), tiny_hf.record()), torch.float16).state_dict()
    weights = {n: w.clone() for n, w in weights.items()}
    source, target = tmp_path / f"in.{suffixes[0]}", tmp_path / f"out.{suffixes[1]}"
    if suffixes[0] == "bin":
        torch.save(weights, source)
    else:
        save_file(weights, source)
    assert convert(source, target, "--group_size", str(group)) == 0
    assert_same(target, expected(weights, lambda n: group if n in PROJECTIONS else None))
    assert {p.name for p in tmp_path.iterdir()} == {source.name, target.name, DIGESTS}
    assert check_digests(tmp_path) and set(read_digests(tmp_path)) == {target.name}


def test_a_file_beside_a_record_obeys_it(latent, tmp_path: Path) -> None:
    source, weights = latent
    assert convert(source / "model.safetensors", tmp_path / "out.safetensors", "--group_size", "-1") == 0
    assert_same(tmp_path / "out.safetensors", expected(weights, trained_groups))


def test_a_wider_master_is_fused_by_its_rounded_copy(tmp_path: Path) -> None:
    """The weights are fp32, and training quantized their bf16 copy."""
    directory, _ = export(tmp_path / "in", tiny_hf.record(latent_dtype="float32"))
    weights = load_file(directory / "model.safetensors")
    (directory / FILE_NAME).unlink()
    config = json.loads((directory / "config.json").read_text())
    config["ternary_quantizer"]["latent_dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config))
    assert convert(directory, tmp_path / "out") == 0
    rounded = {n: w.bfloat16() if n in PROJECTIONS else w for n, w in weights.items()}
    result = {n: w.float() for n, w in expected(rounded, trained_groups).items()}
    assert_same(tmp_path / "out", result)
    assert any(not torch.equal(w, result[n]) for n, w in expected(weights, trained_groups).items()), "no difference"


@pytest.mark.parametrize("kind", [LLAMA, GRANITE, MINICPM])
def test_other_models_keep_their_configuration(tmp_path: Path, kind) -> None:
    """The model has neither a record nor a modeling file."""
    source, weights = export(tmp_path / "in")
    (source / FILE_NAME).unlink()
    config = config_for(kind, tiny_hf.llama() if kind == LLAMA else tiny_hf.architecture(), {"mine": 1}, "bfloat16")
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out", "--group_size", "-1") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert_same(tmp_path / "out", expected(weights, whole_rows))
    record = QuantizerRecord.read(tmp_path / "out")
    assert (record.state, record.latent_dtype, len(record.modules)) == ("fused", "bfloat16", 14)


def test_a_foreign_modeling_file_does_not_come_along(tmp_path: Path) -> None:
    """The file may contain a fake quantizer, which would quantize the fused weights again."""
    source, weights = export(tmp_path / "in")
    (source / FILE_NAME).unlink()
    config = config_for(MINICPM, tiny_hf.architecture(), {}, "bfloat16")
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_x.py").write_text("raise AssertionError")
    assert convert(source, tmp_path / "out") == 0
    assert not list((tmp_path / "out").glob("*.py"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "granite"
    assert_same(tmp_path / "out", expected(weights, whole_rows))
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["XForCausalLM"]}))
    assert convert(source, tmp_path / "again") == 2


# --------------------------------------------------------------------------------------------------- already fused


def test_fusing_twice_is_fusing_once(latent, tmp_path: Path, capsys) -> None:
    source, weights = latent
    assert convert(source, tmp_path / "once", "--group_size", "-1") == 0
    capsys.readouterr()
    once = expected(weights, trained_groups)
    assert convert(tmp_path / "once", tmp_path / "twice", "--group_size", "-1") == 0
    assert "14 of 20 tensors are ternary x scale already" in capsys.readouterr().out
    assert_same(tmp_path / "twice", once)
    assert (tmp_path / "twice" / FILE_NAME).read_text() == (tmp_path / "once" / FILE_NAME).read_text()
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "once" / "config.json").read_text()

    # Without the record, the weights themselves show that they are fused, and in which groups.
    (tmp_path / "twice" / FILE_NAME).unlink()
    (tmp_path / "twice" / DIGESTS).unlink()
    for number in (1, 2):
        assert convert(tmp_path / "twice", tmp_path / f"more{number}", "--group_size", "-1") == 0
        assert_same(tmp_path / f"more{number}", once)
        record = QuantizerRecord.read(tmp_path / f"more{number}")
        assert record.modules == tiny_hf.record().modules and record.row_parallel_shards == 2
        shutil.copyfile(tmp_path / "more1" / FILE_NAME, tmp_path / "twice" / FILE_NAME)


def test_fused_weights_called_latent_are_left_alone(latent, tmp_path: Path) -> None:
    source, weights = latent
    once = expected(weights, trained_groups)
    save_file(once, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out") == 0
    assert_same(tmp_path / "out", once)
    assert QuantizerRecord.read(tmp_path / "out").state == "fused"


@pytest.mark.parametrize("where", ["file", "config"])
def test_weights_that_were_trained_on_a_ramp_are_refused(latent, tmp_path: Path, capsys, where: str) -> None:
    source, _ = latent
    config = json.loads((source / "config.json").read_text())
    if where == "file":
        tiny_hf.record(ramp=0.5).write(source)
    else:
        config["ternary_quantizer"] = tiny_hf.record(ramp=0.5).content()
        (source / "config.json").write_text(json.dumps(config))
        (source / FILE_NAME).unlink(missing_ok=True)
    (source / DIGESTS).unlink(missing_ok=True)
    assert convert(source, tmp_path / "out") == 2
    assert "middle of a ramp" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_weights_that_are_zero_are_of_either_kind(latent, tmp_path: Path) -> None:
    source, weights = latent
    weights[f"{UP_PROJ}.weight"] = torch.zeros(192, 64, dtype=torch.bfloat16)
    for number, state in enumerate((weights, expected(weights, trained_groups))):
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
        assert convert(source, tmp_path / f"out{number}") == 0
        assert_same(tmp_path / f"out{number}", expected(weights, trained_groups))


def test_adapters_are_refused(tmp_path: Path, capsys) -> None:
    model = get_peft_model(
        tiny_hf.model(tiny_hf.architecture(), tiny_hf.record()), LoraConfig(target_modules=["q_proj"])
    )
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    model.save_pretrained(alone)
    beside.mkdir()
    save_file({name: t.clone() for name, t in model.state_dict().items()}, beside / "model.safetensors")
    for source in (alone, beside, alone / "adapter_model.safetensors"):
        target = tmp_path / "out"
        assert convert(source, target if source.is_dir() else target.with_suffix(".safetensors")) == 2
        assert "adapters" in (said := capsys.readouterr().err)
        assert "load the adapter beside it" in said
        assert not list(tmp_path.glob("out*"))


def test_fused_and_latent_weights_together_are_refused(latent, tmp_path: Path, capsys) -> None:
    source, weights = latent
    weights[f"{O_PROJ}.weight"] = reference(weights[f"{O_PROJ}.weight"], 32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 1 projections are ternary already and 13 are not") and O_PROJ in error
    assert not (tmp_path / "out").exists()


def test_a_fused_model_that_was_trained_on_is_refused(latent, tmp_path: Path, capsys) -> None:
    source, weights = latent
    for path in (source / FILE_NAME, source / "config.json"):
        path.write_text(path.read_text().replace('"latent"', '"fused"'))
    assert convert(source, tmp_path / "out") == 2
    assert "says that the weights are fused" in capsys.readouterr().err
    save_file(expected(weights, whole_rows), source / "model.safetensors")
    assert convert(source, tmp_path / "out") == 0, "rows are fine: the groups of the record divide them"
    save_file(expected(weights, lambda n: 32 if n in PROJECTIONS else None), source / "model.safetensors")
    assert convert(source, tmp_path / "out2") == 2
    assert "is ternary in groups of 32, not 64" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("config", [{}, {"architectures": []}])
def test_a_config_that_names_no_model_is_refused(latent, tmp_path: Path, config, capsys) -> None:
    source = Path(shutil.copytree(latent[0], tmp_path / "in", ignore=shutil.ignore_patterns("DIGESTS.json")))
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "out") == 2
    assert "config.json names neither a model_type nor architectures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("group", [32, 64, 96])
def test_a_group_size_against_the_record_is_refused(latent, tmp_path: Path, group, capsys) -> None:
    assert convert(latent[0], tmp_path / "out", "--group_size", str(group)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --group_size {group} contradicts the quantizer record")
    assert error.count("\n") == 1


def test_minus_one_against_groups_of_32_is_refused(tmp_path: Path, capsys) -> None:
    record = tiny_hf.record(modules={m: {"group_size": 32} for m in tiny_hf.record().modules}, latent_dtype="bfloat16")
    source, weights = export(tmp_path / "in", record)
    assert convert(source, tmp_path / "out", "--group_size", "-1") == 2
    assert "was trained in groups of 32, not 64" in capsys.readouterr().err
    assert convert(source, tmp_path / "out", "--group_size", "32") == 0
    assert_same(tmp_path / "out", expected(weights, lambda n: 32 if n in PROJECTIONS else None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [f"{O_PROJ}.weight", "model.norm.weight"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_that_is_not_finite_is_named(latent, tmp_path: Path, bad, name, fused, capsys) -> None:
    source, weights = latent
    weights = expected(weights, trained_groups) if fused else weights
    weights[name].view(-1)[-1] = bad
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out") == 2
    assert f"{name} holds NaN or infinity" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_scale_that_fp16_does_not_hold_is_refused(tmp_path: Path, capsys) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for target, largest, status in (("fits", 65000.0, 0), ("not", 65504.0, 2)):
        w = torch.full((2, 64), largest, dtype=torch.float16)
        w[0, :2] = torch.tensor([1.0, 64992.0])
        save_file({name: w}, tmp_path / "in.safetensors")
        assert convert(tmp_path / "in.safetensors", tmp_path / f"{target}.safetensors") == status
    assert f"{name}: rows 0 to 1 have a scale beyond" in capsys.readouterr().err


def broken(change: str, source: Path, weights: dict[str, torch.Tensor]) -> list[str]:
    """Damages a model in one way, and returns the words that the error must contain."""
    if change == "missing":
        del weights[f"{O_PROJ}.weight"]
    elif change == "vector":
        weights[f"{O_PROJ}.weight"] = torch.ones(64)
    elif change == "integer":
        weights[f"{O_PROJ}.weight"] = torch.ones(64, 64, dtype=torch.int8)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if change == "empty":
        (source / FILE_NAME).unlink()
        config["ternary_quantizer"]["modules"] = {}
        (source / "config.json").write_text(json.dumps(config))
        return ["lists no modules"]
    if change == "no config":
        (source / "config.json").unlink()
        return ["config.json is not there"]
    if change == "quantized":
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
        return ["quantization_config"]
    if change == "space":
        (source / FILE_NAME).unlink()
        config["ternary_quantizer"]["space"] = "five"
        (source / "config.json").write_text(json.dumps(config))
        return ["quantization space 'five'"]
    if change == "group":
        (source / FILE_NAME).unlink()
        config["ternary_quantizer"]["modules"][O_PROJ] = {"group_size": 96}
        (source / "config.json").write_text(json.dumps(config))
        return [O_PROJ, "does not divide a row of 64"]
    return [O_PROJ]


@pytest.mark.parametrize(
    "change", ["missing", "vector", "integer", "no config", "quantized", "space", "group", "empty"]
)
def test_what_cannot_be_converted_is_refused(latent, tmp_path: Path, change, capsys) -> None:
    wanted = broken(change, *latent)
    assert convert(latent[0], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(text in error for text in wanted), error
    assert not list(tmp_path.glob("*out*"))


def test_paths_that_do_not_fit_are_refused(latent, tmp_path: Path, capsys) -> None:
    source = latent[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    save_file({"lm_head.weight": torch.ones(32, 32)}, tmp_path / "head.safetensors")
    for given, target, message in (
        (tmp_path / "none", tmp_path / "out", "no such directory"),
        (source / "config.json", tmp_path / "out.bin", "give a model directory, or a file"),
        (source, tmp_path / "out.bin", "is a directory, so the output"),
        (source / "model.safetensors", tmp_path / "out", "is a file, so name a file"),
        (source, tmp_path / "full", "is there already"),
        (source, source, "is there already"),
        (source / "model.safetensors", source / "model.safetensors", "is there already"),
        (tmp_path / "full", tmp_path / "out", "no weights"),
        (tmp_path / "head.safetensors", tmp_path / "out.bin", "to quantize"),
    ):
        assert convert(given, target) == 2, target
        assert message in capsys.readouterr().err
    assert convert(source, tmp_path / "out", "--max-shard-size", "many") == 2
    assert not (tmp_path / "out").exists()


def test_what_was_written_wrong_is_not_published(latent, tmp_path: Path, monkeypatch, capsys) -> None:
    def damage(tensor: torch.Tensor, **_: object) -> object:
        block = tensor.clone()
        block.view(-1)[0] += 1
        yield block

    monkeypatch.setattr(qat_convert, "fuse_blocks", lambda name, read, info, *a, **k: damage(read(slice(None))))
    assert convert(latent[0], tmp_path / "out") == 3
    assert "is not ternary in groups of" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


# ---------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("group", [-1, 96, 32])
def test_blocks_do_not_change_a_bit(monkeypatch, rows, group) -> None:
    """This holds also for rows whose scale depends on the order of the sum."""
    w = torch.randn(50, 960, generator=torch.Generator().manual_seed(9)).abs()
    s = w.double().mean(-1).to(torch.bfloat16)
    midpoint = (s.double() + (s.view(torch.int16) + 1).view(torch.bfloat16).double()) / 2
    w[:, 0] += ((midpoint - w.double().mean(-1)) * 960).float()
    monkeypatch.setattr(fuse_module, "_BLOCK_ELEMENTS", rows * 960)
    config = QuantizerConfig(group_size=group)
    blocks = list(fuse_blocks("w", lambda part: w[part], TensorInfo((50, 960), torch.float32), config))
    assert len(blocks) == -(-50 // rows)
    assert torch.equal(torch.cat(blocks), reference(w, group))


def test_given_scales_are_used_row_by_row(monkeypatch) -> None:
    w = torch.randn(10, 64).bfloat16()
    scales = torch.rand(10, 2).bfloat16() + 0.5
    monkeypatch.setattr(fuse_module, "_BLOCK_ELEMENTS", 3 * 64)
    config, info = QuantizerConfig(group_size=32), TensorInfo((10, 64), torch.bfloat16)
    found = torch.cat(list(fuse_blocks("w", lambda part: w[part], info, config, scales)))
    assert torch.equal(found, dequantize(*quantize(w, config, scales), config, torch.bfloat16))
    assert fused_group_size(found) == 32
    with pytest.raises(ConversionError, match="w: scales of shape"):
        list(fuse_blocks("w", lambda part: w[part], info, QuantizerConfig(), scales))


@pytest.mark.slow
def test_the_command_runs_from_a_checkout(latent, tmp_path: Path) -> None:
    """The command imports neither megatron-core nor Transformers."""
    import subprocess
    import sys

    script = Path(__file__).parents[2] / "checkpoint_tools" / "qat_convert.py"
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'megatron', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", probe, script, "--input_bin", latent[0], "--output", tmp_path / "out"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "config.json").is_file()

# SPDX-License-Identifier: Apache-2.0
"""Tests of packed exports: other readers decode the weights of the training forward bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="pip install 'bitcpm_megatron[export]'")

from safetensors.torch import load_file, save_file
from support.packed import architecture, decoded, latent_model, open_gguf, value, write_config, write_sentence_piece

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, export_packed, qat_convert
from bitcpm_megatron.checkpoint_tools.packed import gguf_file
from bitcpm_megatron.evaluation.retention import report
from bitcpm_megatron.evaluation.retention.comparing import table_of
from bitcpm_megatron.evaluation.retention.scores import ModelScores, TaskScores, model_digest
from bitcpm_megatron.files import check_digests
from bitcpm_megatron.models.architecture import LongRope
from bitcpm_megatron.quantization.record import QuantizerRecord

GROUPS = [(-1, 1), (-1, 2), (-1, 4), (-1, 8), (256, 1), (128, 2), (64, 4), (32, 8)]
Made = tuple[Path, dict[str, torch.Tensor]]
Models = Callable[..., Made]


def export(source: Path, target: Path, form: str = "gguf", *more: str) -> int:
    return export_packed.main(["--load-dir", str(source), "--save-dir", str(target), "--format", form, *more])


def refused(capsys: pytest.CaptureFixture[str], source: Path, *arguments: str) -> str:
    """Asserts that an export fails with exit status 2, one line and no output; returns the line."""
    target = source.parent / "refused"
    assert export(source, target, *arguments) == 2
    assert not target.exists() and not (source.parent / ".refused.incomplete").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Returns a function that makes, once per group size and shards, a latent model and its quantized weights."""
    made: dict[tuple[int, int], Made] = {}

    def model(group: int = -1, shards: int = 1) -> Made:
        if (group, shards) not in made:
            directory = tmp_path_factory.mktemp("models") / f"g{group}-s{shards}"
            made[group, shards] = directory, latent_model(directory, architecture(), group, shards)
            write_sentence_piece(directory)
        return made[group, shards]

    return model


@pytest.fixture
def copy(models: Models, tmp_path: Path) -> Path:
    """Makes a copy of a model that a test may damage."""
    return Path(shutil.copytree(models()[0], tmp_path / "model"))


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("group", "shards", "kinds"),
    [(*case, ["auto", "Q4_0"]) for case in GROUPS] + [(-1, 1, ["TQ1_0", "F32", "F16"]), (64, 4, ["Q2_0", "BF16"])],
)
@pytest.mark.verifies(
    "checkpoints",
    "packed exports, decoded by `gguf` and by compressed-tensors, equal the weights of the training forward pass bit"
    " for bit",
    cuda="-",
    npu="-",
)
def test_gguf_holds_the_weights_of_the_training_forward(
    group: int, shards: int, kinds: list[str], models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, forward = models(group, shards)
    for number, linear_type in enumerate(kinds):
        target = tmp_path / str(number)
        assert export(source, target, "gguf", "--linear-type", linear_type) == 0
        file = open_gguf(target / "model.gguf")
        found = decoded(file)
        assert found.keys() == forward.keys()
        for name, weight in forward.items():
            kind, values = found[name]
            assert torch.equal(values, weight.half().float() if kind == "F16" else weight.float()), name
            if linear_type != "auto" and "_proj" in name:
                assert kind == linear_type
        data = (target / "model.gguf").stat().st_size - file.data_offset
        assert f"\n{data:,} bytes, " in capsys.readouterr().out


@pytest.mark.parametrize(("group", "shards"), GROUPS)
def test_compressed_tensors_hold_the_weights_of_the_training_forward(
    group: int, shards: int, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    source, forward = models(group, shards)
    for bits in (2, 4):
        target = tmp_path / str(bits)
        assert export(source, target, "compressed-tensors", "--bits", str(bits)) == 0
        stored = load_file(target / "model.safetensors")
        assert f"\n{sum(t.nbytes for t in stored.values()):,} bytes, " in capsys.readouterr().out
        for name, weight in forward.items():
            if "_proj" not in name:
                assert torch.equal(stored.pop(name), weight)
                continue
            packed, scale, shape = (stored.pop(f"{name}_{part}") for part in ("packed", "scale", "shape"))
            codes = helpers.unpack_from_int32(packed, bits, torch.Size(shape.tolist()))
            values = codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)
            assert scale.dtype == torch.bfloat16 and torch.equal(values.flatten(1), weight), name
        assert not stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latent_weights_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    forward = latent_model(tmp_path / "model", architecture(), 64, 2, dtype)
    write_sentence_piece(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "gguf") == 0
    found = decoded(open_gguf(tmp_path / "gguf" / "model.gguf"))
    for name, weight in forward.items():
        assert torch.equal(found[name][1], (weight.half() if "F16" in found[name] else weight).float()), name
    assert export(tmp_path / "model", tmp_path / "ct", "compressed-tensors") == 0
    assert load_file(tmp_path / "ct" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype


@pytest.mark.slow
def test_the_same_file_of_every_kind_of_source(models: Models, tmp_path: Path) -> None:
    """A latent and a fused directory, a checkpoint, and a repetition give the same file, except for its name."""
    source, _ = models(-1, 2)
    latent = Path(shutil.copytree(source, tmp_path / "a" / "model"))
    assert qat_convert.main(["--input_bin", str(latent), "--output", str(tmp_path / "b" / "model")]) == 0
    argv = ["--load-dir", str(latent), "--save-dir", str(tmp_path / "c" / "model"), "--format", "legacy"]
    assert convert_hf_to_megatron.main([*argv, "--target-tensor-parallel-size", "2"]) == 0
    for form in ("gguf", "compressed-tensors"):
        outputs = []
        for number, place in enumerate("abca"):
            target = tmp_path / f"{form}{number}"
            assert export(tmp_path / place / "model", target, form) == 0
            assert check_digests(target) and QuantizerRecord.read(target).state == "packed"
            outputs.append({path.name: path.read_bytes() for path in target.iterdir()})
        assert outputs[0] == outputs[3]
        name = "model.gguf" if form == "gguf" else "model.safetensors"
        assert outputs[0][name] == outputs[1][name] == outputs[2][name]


def test_full_precision_linears_are_left_alone(copy: Path, tmp_path: Path) -> None:
    record = QuantizerRecord.read(copy)
    kept = "model.layers.1.mlp.down_proj"
    del record.modules[kept]
    record.write(copy)
    weight = load_file(copy / "model.safetensors")[f"{kept}.weight"]
    assert export(copy, tmp_path / "gguf") == 0
    kind, values = decoded(open_gguf(tmp_path / "gguf" / "model.gguf"))[f"{kept}.weight"]
    assert kind == "BF16" and torch.equal(values, weight.float())
    assert export(copy, tmp_path / "ct", "compressed-tensors") == 0
    assert torch.equal(load_file(tmp_path / "ct" / "model.safetensors")[f"{kept}.weight"], weight)
    ignored = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", r"re:.*layers\.(1)\.mlp\.down_proj$"]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "shards"), [(-1, 1), (-1, 8), (64, 1)])
@pytest.mark.parametrize("bits", ["2", "4"])
def test_stock_transformers_computes_the_same_logits(
    group: int, shards: int, bits: str, models: Models, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install 'bitcpm_megatron[export]'")
    transformers = pytest.importorskip("transformers")
    source, forward = models(group, shards)
    assert export(source, tmp_path / "packed", "compressed-tensors", "--bits", bits) == 0
    (tmp_path / "dense").mkdir()
    save_file(forward, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    write_config(tmp_path / "dense", architecture(), torch.bfloat16)
    tokens = torch.arange(0, 300, 7).unsqueeze(0)
    logits = []
    for name in ("dense", "packed"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert logits[0].dtype == torch.bfloat16 and bool(logits[0].std() > 0.1)
    assert torch.equal(*logits)


# --------------------------------------------------------------------------------------------- what the planner is told


def test_the_least_lossy_embeddings_and_what_they_lose(models: Models, tmp_path: Path) -> None:
    source, forward = models()
    assert export(source, tmp_path / "out", "gguf", "--target-ratio", "5.2") == 0
    kind, values = decoded(open_gguf(tmp_path / "out" / "model.gguf"))["model.embed_tokens.weight"]
    assert kind == "Q8_0"
    tables = [forward[name].double() for name in ("model.embed_tokens.weight", "lm_head.weight")]
    read = decoded(open_gguf(tmp_path / "out" / "model.gguf"))
    errors = [read[n][1].double() - forward[n].double() for n in ("model.embed_tokens.weight", "lm_head.weight")]
    # The bound is half a step of 1/127 of the largest of 32 values, plus the rounding of the step to fp16.
    largest = values.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).double()
    assert bool((errors[0].unflatten(1, (-1, 32)).abs() <= largest * (0.5 / 127 + 2**-10)).all())
    relative = (sum(float(e.square().sum()) for e in errors) / sum(float(t.square().sum()) for t in tables)) ** 0.5
    most = max(float(e.abs().max()) for e in errors)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| embeddings | Q8_0 | 2 | 174,080 | lossy: {relative:.2e} of their root mean square, {most:.2e}" in card
    assert "| ternary linears | TQ2_0 | 14 |" in card and "| exact |" in card


def test_a_card_has_the_scores_of_the_very_model(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {
        "metric": "acc",
        "versions": {"t": 1.0},
        "shots": 0,
        "data": "d",
        "tokens": "t",
        "skipped": [],
        "chance": None,
    }
    scored = {}
    for name, right in (("BF16", 80), ("ternary", 76)):
        items = {str(item): float(item < right) for item in range(100)}
        about = {"digest": model_digest(copy) if name == "ternary" else "other", "path": name}
        asked = {"piqa": TaskScores(**task, items=items, majority=None)}
        scored[name] = ModelScores(name=name, model=about, settings={"lm-eval": "0.4.13"}, tasks=asked, texts={})
        scored[name].write(tmp_path / "asked")
    report.write(table_of(list(scored.values())), tmp_path / "asked")
    # Rows of another model that previously had this name are ignored.
    data = tmp_path / "asked" / report.DATA
    data.write_text(data.read_text().replace("0.760000", "0.990000"))
    assert export(copy, tmp_path / "out", "gguf", "--evaluation", str(tmp_path / "asked")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| piqa | acc | 100 | 0 | 0.760000 | 0.800000 | 0.950000 |" in card and "lm-eval 0.4.13" in card
    assert "None yet" not in card
    # The model's card does not change its digest; its configuration does.
    (copy / "README.md").write_text("# A model\n")
    assert export(copy, tmp_path / "same", "gguf", "--evaluation", str(tmp_path / "asked")) == 0
    with (copy / "config.json").open("a") as file:
        file.write(" ")
    assert "is no evaluation of" in refused(capsys, copy, "gguf", "--evaluation", str(tmp_path / "asked"))


def test_a_card_names_the_quantizer_the_license_and_no_evaluation(copy: Path, tmp_path: Path) -> None:
    assert export(copy, tmp_path / "one") == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\n") and "## Evaluation\n\nNone yet." in card
    assert "14 linears were trained as codes -1, 0 and 1" in card and "llama-cli -m model.gguf" in card
    (copy / "LICENSE").write_text("as you like")
    (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert export(copy, tmp_path / "two", "compressed-tensors") == 0
    card = (tmp_path / "two" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "## License\n\napache-2.0; see `LICENSE`." in card
    assert (tmp_path / "two" / "LICENSE").read_text() == "as you like" and check_digests(tmp_path / "two")


def test_multipliers_and_longrope(tmp_path: Path) -> None:
    factors = [tuple(1 + n / 32 + k for n in range(32)) for k in (0, 1)]
    a = architecture(
        embedding_multiplier=12.0,
        residual_multiplier=0.5,
        logits_scaling=4.0,
        tied=True,
        longrope=LongRope(*factors, original_max_position_embeddings=32),
    )
    latent_model(tmp_path / "model", a)
    write_sentence_piece(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "out") == 0
    file = open_gguf(tmp_path / "out" / "model.gguf")
    assert value(file, "general.architecture") == "granite" and value(file, "rope.scaling.type") == "longrope"
    names = "embedding_scale residual_scale logit_scale attention.scale rope.scaling.original_context_length".split()
    assert [value(file, name) for name in names] == [12.0, 0.5, 4.0, 0.125, 32]
    expected = a.longrope.effective_attention_factor(128)
    assert value(file, "rope.scaling.attn_factor") == pytest.approx(expected, rel=1e-7) and expected > 1
    found = decoded(file)
    for name, wanted in zip(("rope_factors_short.weight", "rope_factors_long.weight"), factors, strict=True):
        assert found[name][0] == "F32" and found[name][1].tolist() == list(wanted)
    assert "lm_head.weight" not in found
    assert "for a context (`-c`) of more than 32 tokens" in (tmp_path / "out" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------- refusals


def test_types_that_do_not_hold_a_weight(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, models(-1, 2)[0], "gguf", "--linear-type", "TQ2_0")
    assert "model.layers.0.self_attn.o_proj" in said and "every 128 elements" in said and "block of 256" in said
    assert "--linear-type Q2_0" in said
    assert "cannot be reached" in refused(capsys, models()[0], "gguf", "--target-ratio", "12")
    assert "cannot be reached" in refused(capsys, models()[0], "compressed-tensors", "--target-ratio", "6")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gguf --bits 2", "--bits is of --format compressed-tensors"),
        ("gguf --max-shard-size 1GB", "--max-shard-size is of --format compressed-tensors"),
        ("compressed-tensors --linear-type Q4_0", "--linear-type is of --format gguf"),
        ("gguf --target-ratio 4 --embedding-type Q8_0", "give one of them"),
        ("gguf --vocab-size 7", "is for Megatron checkpoints"),
        ("gguf --ternary-group-size 64", "contradicts the quantizer record"),
        ("gguf --tokenizer nowhere", "is no directory"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: str, message: str, models: Models, capsys) -> None:
    assert message in refused(capsys, models()[0], *arguments.split())


def test_scales_that_fp16_does_not_hold(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][5] = 65536.0
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, copy)
    assert "model.layers.0.mlp.up_proj: row 5, group 0 has the scale 65536" in said and "--linear-type BF16" in said
    assert export(copy, tmp_path / "out", "gguf", "--linear-type", "BF16") == 0


def test_other_spaces_are_refused_by_name(copy: Path, capsys) -> None:
    record = QuantizerRecord.read(copy)
    record.modules["model.layers.1.mlp.up_proj"]["space"] = "five-value"
    record.write(copy)
    said = refused(capsys, copy)
    assert "model.layers.1.mlp.up_proj is quantized in the space 'five-value'" in said and "'ternary' alone" in said


def test_ordinary_weights_are_not_quantized(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "ternary_quantizer.json").unlink()
    assert "records no quantizer, and its weights are not ternary" in refused(capsys, copy)
    assert export(copy, copy.parent / "out", "gguf", "--ternary-group-size", "-1") == 0


def test_weights_that_are_not_what_the_record_says_are_refused(copy: Path, monkeypatch, capsys) -> None:
    """The reader returns other values than those that the plan was made from."""
    original = gguf_file._in_order

    def damaged(source):
        for weight, blocks in original(source):
            yield weight, (block + 0.01 * torch.rand(block.shape) if weight.group else block for block in blocks)

    monkeypatch.setattr(gguf_file, "_in_order", damaged)
    assert "model.layers.0.self_attn.q_proj.weight is not ternary in groups of 256" in refused(capsys, copy)


def test_embeddings_beyond_fp16(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 3] = 1e6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "model.embed_tokens holds values that F16 cannot" in refused(capsys, copy)
    assert export(copy, tmp_path / "out", "gguf", "--embedding-type", "BF16") == 0
    kind, values = decoded(open_gguf(tmp_path / "out" / "model.gguf"))["model.embed_tokens.weight"]
    assert kind == "BF16" and torch.equal(values, weights["model.embed_tokens.weight"].float())

# SPDX-License-Identifier: Apache-2.0
"""Tests of packed models: results equal the dense model's to within rounding, in the memory of the packed file."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="pip install 'bitcpm_megatron[export]'")
pytest.importorskip("transformers", reason="pip install 'bitcpm_megatron[hf]'")
pytest.importorskip("accelerate", reason="pip install 'bitcpm_megatron[hf]'")

import transformers
from safetensors.torch import load_file, save_file
from support.packed import Tensors, architecture, latent_model, write_config

from bitcpm_megatron.checkpoint_tools import export_packed
from bitcpm_megatron.files import FileError
from bitcpm_megatron.inference.kernels import cpu
from bitcpm_megatron.inference.packed_linear import PackedTernaryLinear
from bitcpm_megatron.inference.packed_model import load_packed_model
from bitcpm_megatron.models.architecture import Architecture, LongRope

TOKENS = torch.randint(0, 320, (1, 256), generator=torch.Generator().manual_seed(3))
WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj"
_LLAMA = architecture()
_MINICPM = architecture(
    embedding_multiplier=12.0,
    residual_multiplier=0.5,
    logits_scaling=4.0,
    tied=True,
    longrope=LongRope(
        tuple(1 + n / 32 for n in range(32)), tuple(2 + n / 32 for n in range(32)), original_max_position_embeddings=32
    ),
)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Returns a function that makes, once per setting, a packed export and the dense model of the same forward."""
    made: dict[tuple[Architecture, int, int], tuple[Path, Path]] = {}

    def export(a: Architecture = _LLAMA, group: int = -1, shards: int = 2) -> tuple[Path, Path]:
        if (a, group, shards) not in made:
            directory = tmp_path_factory.mktemp("models")
            forward = latent_model(directory / "latent", a, group, shards)
            pack(directory / "latent", directory / "packed")
            write_dense(directory / "dense", a, forward)
            made[a, group, shards] = directory / "packed", directory / "dense"
        return made[a, group, shards]

    return export


def pack(source: Path, target: Path, *more: str) -> None:
    argv = ["--load-dir", str(source), "--save-dir", str(target), "--format", "compressed-tensors", *more]
    assert export_packed.main(argv) == 0


def write_dense(directory: Path, a: Architecture, forward: Tensors) -> None:
    directory.mkdir()
    save_file(forward, directory / WEIGHTS, metadata={"format": "pt"})
    write_config(directory, a, torch.bfloat16)


def dense_model(directory: Path, dtype: torch.dtype) -> "transformers.PreTrainedModel":
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def by_single_tokens(model: "transformers.PreTrainedModel") -> torch.Tensor:
    """Returns logits ``[256, 320]`` (tokens, vocabulary), computed token by token with Transformers' own cache."""
    cache, logits = transformers.DynamicCache(), []
    with torch.inference_mode():
        for token in TOKENS[0]:
            logits.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    return torch.stack(logits)


# -------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("a", "group", "shards"), [(_LLAMA, -1, 2), (_LLAMA, 64, 1), (_MINICPM, -1, 8), (_MINICPM, 32, 1)]
)
def test_logits_of_many_tokens_are_those_of_the_dense_model(
    a: Architecture, group: int, shards: int, dtype: torch.dtype, exports
) -> None:
    """Both compute the same products; models have LongRoPE beyond its original length, multipliers, tied embeddings."""
    packed, dense = exports(a, group, shards)
    ours, theirs = load_packed_model(packed, dtype=dtype), dense_model(dense, dtype)
    assert type(ours) is type(theirs) and not ours.training and ours.dtype == dtype
    with torch.inference_mode():
        logits = ours(TOKENS).logits
        assert torch.equal(logits, theirs(TOKENS).logits) and bool(logits.std() > 0.05)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == a.tied
    assert not any(p.requires_grad or p.is_meta for p in ours.parameters())


def rounding(model: "transformers.PreTrainedModel", places: list[tuple[int, int]]) -> float:
    """Returns the largest standard deviation of logits, at places (position, token), from rounding in fp32 products.

    With n + 2 independent roundings of mean 0 in each of n terms, a product has a standard deviation of at most
    sqrt(n + 2) u sum |x| |w| (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). To first
    order, that of a logit is the root of the sum of the squares of these, each times the logit's derivative, which a
    model in fp64 computes.
    """
    moves, bounds = [], []

    def off(linear: torch.nn.Linear, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        bounds.append((linear.in_features + 2) ** 0.5 * 2.0**-24 * (inputs[0].abs() @ linear.weight.abs().t()))
        moves.append(torch.zeros_like(y, requires_grad=True))
        return y + moves[-1]

    for module in model.requires_grad_(False).modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(off)
    logits = model(TOKENS).logits[0]
    chosen = torch.stack([logits[place] for place in places])
    slopes = torch.autograd.grad(chosen, moves, torch.eye(len(places), dtype=chosen.dtype), is_grads_batched=True)
    moved = sum((slope * bound).square().flatten(1).sum(1) for slope, bound in zip(slopes, bounds, strict=True))
    return float(moved.detach().sqrt().max())


@pytest.mark.slow
@pytest.mark.verifies(
    "checkpoints",
    "a packed model in Transformers has the logits and greedy choices of the unpacked model, within a derived "
    "rounding bound",
)
def test_logits_of_single_tokens_and_greedy_choices(exports) -> None:
    packed, dense = exports()
    ours = by_single_tokens(load_packed_model(packed, dtype=torch.float32))
    theirs = by_single_tokens(dense_model(dense, torch.float32))
    largest = theirs.topk(2).values
    places = [(p, int(t)) for p in (255, 130, 31) for t in theirs[p].topk(2).indices]
    # Eight standard deviations, times 2 for two models, times 2 for other roundings, in sums of no more terms.
    bound = 8 * 4 * rounding(dense_model(dense, torch.float64), places)
    # Without a compiler, both compute the same product.
    assert cpu.load()[0] is None or not torch.equal(ours, theirs)
    assert float((ours - theirs).abs().max()) <= bound < 0.01 * float(theirs.std())
    certain = largest[:, 0] - largest[:, 1] > 2 * bound
    assert certain.float().mean() > 0.9
    assert torch.equal(ours.argmax(-1)[certain], theirs.argmax(-1)[certain])


def test_what_is_generated_is_what_its_logits_choose(exports) -> None:
    model = load_packed_model(exports(_MINICPM, 32, 1)[0], dtype=torch.float32)
    with torch.inference_mode():
        found = model.generate(TOKENS[:, :40], max_new_tokens=24, do_sample=False, eos_token_id=None)[0]
        logits = model(found[None]).logits[0, 39:-1]
    # The logits are computed with another order of sums, so that a choice between equal ones may differ.
    assert found.shape == (64,)
    assert torch.equal(found[:40], TOKENS[0, :40])
    assert bool((logits.gather(1, found[40:, None])[:, 0] >= logits.amax(-1) - 1e-4).all())


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("group", "shards"), [(-1, 2), (32, 1)])
def test_memory_is_that_of_the_packed_file(group: int, shards: int, exports) -> None:
    packed, _ = exports(_LLAMA, group, shards)
    model = load_packed_model(packed)
    stored = load_file(packed / WEIGHTS)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, PackedTernaryLinear)}
    assert len(linears) == 14
    for name, linear in linears.items():
        assert linear.packed.nbytes == stored[f"{name}.weight_packed"].nbytes
        assert linear.scales.nbytes == stored[f"{name}.weight_scale"].nbytes
        assert not list(linear.parameters())
    held = sum(t.nbytes for t in model.state_dict().values())
    assert held == sum(t.nbytes for name, t in stored.items() if not name.endswith("_shape"))
    # After loading, the model does not depend on the file.
    before = model(TOKENS[:, :8]).logits
    damaged = (packed / WEIGHTS).read_bytes()
    (packed / WEIGHTS).write_bytes(bytes(len(damaged)))
    after = model(TOKENS[:, :8]).logits
    (packed / WEIGHTS).write_bytes(damaged)
    assert torch.equal(before, after)


def test_shards_and_other_dtypes_of_latent_weights(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        name = str(dtype)
        forward = latent_model(tmp_path / name, architecture(), 64, 1, dtype)
        pack(tmp_path / name, tmp_path / f"{name}-packed", "--max-shard-size", "200KB")
        assert len(list((tmp_path / f"{name}-packed").glob("*.safetensors"))) > 2
        model = load_packed_model(tmp_path / f"{name}-packed", dtype=torch.float32)
        for weight, values in forward.items():
            module = model.get_submodule(weight.removesuffix(".weight"))
            found = module.weight(torch.float32) if isinstance(module, PackedTernaryLinear) else module.weight
            assert torch.equal(found, values.float()), weight


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def copy(exports, tmp_path: Path) -> Path:
    """Makes a copy of an export, without digests, that a test may change."""
    target = Path(shutil.copytree(exports()[0], tmp_path / "export"))
    (target / "DIGESTS.json").unlink()
    return target


def _change(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return changed


def _edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return changed


_configure = functools.partial(_edit, "config.json")
_record = functools.partial(_edit, "ternary_quantizer.json")


def _bits(config: dict) -> None:
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change(lambda t: t.pop(f"{UP}.weight_scale")), rf"no tensor {UP}.weight_scale: export the model again by"),
        (_change(lambda t: t.pop("lm_head.weight")), "no tensor lm_head.weight"),
        (_change(lambda t: t.pop("model.norm.weight")), "no tensor model.norm.weight"),
        (_change(lambda t: t.update(more=torch.ones(2))), "has no place for more: export it again"),
        (_change(lambda t: t.update({f"{UP}.weight": torch.ones(2)})), f"has no place for {UP}.weight"),
        (
            _change(lambda t: t[f"{UP}.weight_packed"].mul_(0)),
            f"{UP}.weight_packed holds what is not ternary: codes from",
        ),
        (_change(lambda t: t[f"{UP}.weight_shape"].add_(1)), f"{UP}.weight_shape is not 512 x 256"),
        (
            _change(lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].repeat(1, 2)})),
            r"scales of shape \(512, 2\), and the quantizer record groups of 256",
        ),
        (
            _change(lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].float() * 1.001})),
            "scale holds what bf16 does not",
        ),
        (_change(lambda t: t[f"{UP}.weight_scale"].mul_(float("inf"))), "scale holds what bf16 does not"),
        (_configure(lambda c: c.update(vocab_size=321)), r"model.embed_tokens.weight has the shape \(320, 256\)"),
        (_configure(lambda c: c.update(tie_word_embeddings=True)), "has no place for lm_head.weight"),
        (_configure(lambda c: c.update(num_hidden_layers=1)), "no linear model.layers.1"),
        (_configure(lambda c: c.update(attention_bias=True)), "no linear .* without a bias"),
        (_configure(lambda c: c.pop("quantization_config")), "is no packed export: make one by export_packed.py"),
        (_configure(_bits), "codes of 4 bits, and ternary ones of 2 are read: use export_packed.py .* --bits 2"),
        (_record(lambda r: r.update(state="fused")), "no record of a packed ternary model"),
        (_record(lambda r: r.update(space="quinary")), "space"),
        (_record(lambda r: r["modules"].pop(UP)), f"no tensor {UP}.weight"),
        (lambda d: (d / "ternary_quantizer.json").unlink(), "of another tool, or was copied in part"),
        (lambda d: (d / "config.json").unlink(), "holds no model"),
        (_configure(lambda c: c.update(hidden_size="wide")), "Transformers cannot make a causal language model"),
        (lambda d: (d / WEIGHTS).unlink(), "no weights"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-1]), "cannot be read .*: copy it again"),
    ],
)
def test_what_is_no_such_export(damage: Callable[[Path], object], message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(FileError, match=message):
        load_packed_model(copy)


def test_damage_shows_in_the_digests(exports, tmp_path: Path) -> None:
    target = Path(shutil.copytree(exports()[0], tmp_path / "export"))
    content = bytearray((target / WEIGHTS).read_bytes())
    content[-1] ^= 1
    # The model card may be edited.
    (target / "README.md").write_text("ours")
    load_packed_model(target)
    (target / WEIGHTS).write_bytes(content)
    with pytest.raises(FileError, match="does not match its digest"):
        load_packed_model(target)


def test_shards_that_are_not_those_of_the_index(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).rename(copy / "model-1.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "ghost"], "model-1.safetensors")}))
    with pytest.raises(FileError, match="index and shards are not of one model"):
        load_packed_model(copy)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../model-1.safetensors")}))
    with pytest.raises(FileError, match="lies outside the model"):
        load_packed_model(copy)
    index.write_text("[]")
    with pytest.raises(FileError, match="not an index of shards"):
        load_packed_model(copy)


def test_code_of_the_directory_is_not_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('run')\n")
    _configure(lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}))(copy)
    assert isinstance(load_packed_model(copy), transformers.LlamaForCausalLM)


def test_activations_that_training_quantized_are_told_of(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_packed_model(copy)
    assert "activations" not in caplog.text
    _record(lambda r: r.update(activation_bits=8))(copy)
    load_packed_model(copy)
    assert "training also quantized activations to 8 bits" in caplog.text


def test_dtypes_that_are_not_computed_in(exports) -> None:
    with pytest.raises(ValueError, match="float16: packed models compute in bfloat16 or float32"):
        load_packed_model(exports()[0], dtype=torch.float16)

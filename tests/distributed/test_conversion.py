# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model is converted to a Megatron checkpoint, trained ternary, and exported as the training used it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launcher import Ranks
from support.small_model import quantized_weights, succeeded
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, convert_megatron_to_hf, qat_convert
from bitcpm_megatron.checkpoint_tools.hf_model.config import architecture_of, read_config
from bitcpm_megatron.checkpoint_tools.tensor_map import join, megatron_tensors
from bitcpm_megatron.quantization import fused_group_size

ORIGINAL = 16  # tokens, LongRoPE's original length
LENGTHS = {"short": ORIGINAL, "long": 3 * ORIGINAL}
SHAPE = dict(
    vocab_size=301,
    hidden_size=192,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + 0.1 * i for i in range(16)],
    "long_factor": [1.5 + 0.3 * i for i in range(16)],
    "original_max_position_embeddings": ORIGINAL,
}
MULTIPLIERS = dict(
    embedding_multiplier=12.0, residual_multiplier=0.35, logits_scaling=3.0, attention_multiplier=32**-0.5
)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=dict(ROPE), tie_word_embeddings=False)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**SHAPE, **MULTIPLIERS, rope_parameters=dict(ROPE), tie_word_embeddings=True)
    ),
}
TRAIN = (
    "--micro-batch-size 1 --global-batch-size 2 --seq-length 48 --mock-data --vocab-size 301 --eval-iters 0 --lr 1e-2 "
    "--log-interval 1 --make-vocab-size-divisible-by 151"
).split()
TP2 = ["--tensor-model-parallel-size", "2"]
# name: (model, ranks of the training, its flags, tensor-parallel sizes that can load it)
TRAINED = {
    "one shard": ("granite", 1, ["--ternary"], (1,)),
    "two shards": ("llama", 2, [*TP2, "--ternary"], (1, 2)),
    "groups of 64": ("granite", 2, [*TP2, "--ternary", "--ternary-group-size", "64", "--bf16"], (1, 2)),
    "bf16 alone": ("llama", 2, [*TP2, "--bf16"], (1, 2)),
}
TERNARY = [name for name, (_, _, flags, _) in TRAINED.items() if "--ternary" in flags]


def tokens(length: int) -> list[list[int]]:
    return torch.randint(0, SHAPE["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1)).tolist()


def hf(directory: Path, **options) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the range of the expected logits."""
    return ((found - expected).abs().max() / (expected.max() - expected.min())).item()


def convert(tool, *arguments: object) -> None:
    assert tool.main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def where(launch_runs, shared_ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Runs everything that the tests of this file need, in as few batches as possible; returns the results."""
    root = tmp_path_factory.mktemp("conversion")
    torch.manual_seed(3)
    for name, build in MODELS.items():
        model = build()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(root / name)
        convert(convert_hf_to_megatron, "--load-dir", root / name, "--save-dir", root / f"{name} torch_dist")
        for stages, flags in {
            "legacy1": [],
            "legacy2": ["--target-tensor-parallel-size", 2],
            "stages2": ["--target-pipeline-parallel-size", 2],
        }.items():
            convert(
                convert_hf_to_megatron,
                *["--load-dir", root / name, "--save-dir", root / f"{name} {stages}", "--format", "legacy"],
                *[*flags, "--transformer-impl", "local"],
            )
    results: dict = {"root": root}
    for count in (1, 2):
        runs = {}
        for name, (model, size, flags, _) in TRAINED.items():
            if size == count:
                source = root / f"{model} torch_dist"
                command = ["--model", str(source / "model.yaml"), *TRAIN, *flags, "--train-iters", "3"]
                command += ["--save", str(root / f"trained {name}"), "--load", str(root / f"trained {name}")]
                runs[f"start {name}"] = [*command, "--pretrained-checkpoint", str(source), "--exit-interval", "2"]
                # Resumes from that checkpoint, and reports the weights of its first forward.
                runs[name] = [*command[:-4], "--load", str(root / f"trained {name}")]
        report, directory = launch_runs(runs, count)
        succeeded(report, *runs)
        results.update(dict.fromkeys(runs, directory))
    for name in TRAINED:
        for weights in ("latent", "fused") if name in TERNARY else ("latent",):
            convert(
                convert_megatron_to_hf,
                *["--load-dir", root / f"trained {name}", "--save-dir", root / f"{weights} {name}"],
                *["--weights", weights, "--verify"],
            )
    for count in (1, 2):
        cases = {}
        for length, size in LENGTHS.items():
            for model in MODELS:
                cases[f"{model} torch_dist {length}"] = {"load": str(root / f"{model} torch_dist")}
                cases[f"{model} legacy {length}"] = {"load": str(root / f"{model} legacy{count}"), "legacy": True}
                if count == 2:
                    cases[f"{model} stages {length}"] = {"load": str(root / f"{model} stages2"), "legacy": True}
            for name, (*_, sizes) in TRAINED.items():
                if count in sizes:
                    cases[f"{name} {length}"] = {"load": str(root / f"trained {name}")}
            for case in cases:
                if case.endswith(length):
                    cases[case]["tokens"] = tokens(size)
        directory = tmp_path_factory.mktemp("logits")
        (directory / "cases.json").write_text(json.dumps(cases))
        shared_ranks(count).run("logits", directory)
        results["logits", count] = torch.load(directory / "logits.pt", weights_only=True)
    return results


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("layout", "ranks"), [("torch_dist", 1), ("torch_dist", 2), ("legacy", 1), ("legacy", 2), ("stages", 2)]
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.verifies(
    "checkpoints",
    "logits of converted checkpoints equal those of Transformers (1e-5 of their range, fp32), for full-precision and"
    " ternary models, and with LongRoPE beyond the original context length",
    cpu="yes²",
)
def test_megatron_computes_what_hugging_face_does(
    model: str, layout: str, ranks: int, length: str, where: dict
) -> None:
    with torch.no_grad():
        expected = hf(where["root"] / model)(torch.tensor(tokens(LENGTHS[length]))).logits
    assert distance(where["logits", ranks][f"{model} {layout} {length}"], expected) < 1e-5


def test_longrope_and_its_two_lists_matter(where: dict) -> None:
    config = read_config(where["root"] / "llama")
    config["rope_parameters"]["long_factor"] = config["rope_parameters"]["short_factor"]
    changed = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    changed.load_state_dict(hf(where["root"] / "llama").state_dict())
    with torch.no_grad():
        for length, same in (("short", True), ("long", False)):
            logits = changed(torch.tensor(tokens(LENGTHS[length]))).logits
            assert (distance(where["logits", 1][f"llama torch_dist {length}"], logits) < 1e-5) == same


@pytest.mark.parametrize("name", TERNARY)
@pytest.mark.verifies(
    "checkpoints",
    "fused exports contain the weights of the training forward pass bit for bit, and load in stock Transformers",
    cpu="yes²",
)
def test_the_fused_export_is_what_the_training_forward_used(name: str, where: dict) -> None:
    model, ranks, *_ = TRAINED[name]
    exported = load_file(where["root"] / f"fused {name}" / "model.safetensors")
    used = quantized_weights(where[name], name, ranks)
    architecture = architecture_of(read_config(where["root"] / model))
    linears = [t for t in megatron_tensors(architecture) if t.quantizable]
    assert sorted(used) == sorted(t.module for t in linears) and len(linears) == 8
    for tensor in linears:
        whole = torch.cat(list(join(tensor, [exported[part] for part in tensor.parts], architecture.kv_channels)))
        assert torch.equal(whole, used[tensor.module]), tensor.module
        assert all(fused_group_size(exported[part]) is not None for part in tensor.parts)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TRAINED)
def test_exports_load_in_stock_transformers_and_compute_what_megatron_does(name: str, length: str, where: dict) -> None:
    stock = hf(where["root"] / (f"fused {name}" if name in TERNARY else f"latent {name}"))
    assert type(stock).__module__.startswith("transformers.models.")
    with torch.no_grad():
        found = stock(torch.tensor(tokens(LENGTHS[length]))).logits
    for ranks in TRAINED[name][3]:
        assert distance(found, where["logits", ranks][f"{name} {length}"]) < 1e-5


@pytest.mark.parametrize("name", TERNARY)
def test_the_latent_export_quantizes_in_its_forward(name: str, where: dict) -> None:
    batch = torch.tensor(tokens(LENGTHS["long"]))
    with pytest.raises(ValueError, match="trust_remote_code|custom code|does not recognize|bitcpm"):
        hf(where["root"] / f"latent {name}")
    latent = hf(where["root"] / f"latent {name}", trust_remote_code=True)
    with torch.no_grad():
        found, expected = latent(batch).logits, hf(where["root"] / f"fused {name}")(batch).logits
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("name", TERNARY)
def test_qat_convert_makes_the_fused_export_of_the_latent_one(name: str, where: dict, tmp_path: Path) -> None:
    convert(qat_convert, "--input_bin", where["root"] / f"latent {name}", "--output", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(where["root"] / f"fused {name}" / "model.safetensors")
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def test_exports_generate(where: dict) -> None:
    model = hf(where["root"] / "fused two shards")
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert 4 <= out.shape[1] <= 8

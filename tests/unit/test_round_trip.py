# SPDX-License-Identifier: Apache-2.0
"""Tests that Hugging Face -> Megatron -> Hugging Face restores every tensor and the configuration, at every layout."""

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import tiny_hf
from support.grouped import same_bits
from transformers import AutoConfig

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, convert_megatron_to_hf, qat_convert
from bitcpm_megatron.checkpoint_tools.hf_model.config import architecture_of
from bitcpm_megatron.files import DIGESTS
from bitcpm_megatron.quantization import SPACES, dequantize, fused_space, quantize
from bitcpm_megatron.quantization.record import FILE_NAME, QuantizerRecord

LAYOUTS = [(tp, pp) for tp in (1, 2) for pp in (1, 2)]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tensors(config: dict, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Returns tensors with the names and shapes of Transformers' Llama and Granite and MiniCPM's remote code."""
    hidden, head = config["hidden_size"], config["head_dim"]
    q, kv, ffn = config["num_attention_heads"] * head, config["num_key_value_heads"] * head, config["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("self_attn.q_proj", (q, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, q)),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
            ("mlp.down_proj", (hidden, ffn)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@st.composite
def configs(draw: st.DrawFn) -> dict:
    kind = draw(st.sampled_from(["llama", "granite", "minicpm"]))
    head = draw(st.sampled_from([8, 16, 32]))
    groups = draw(st.sampled_from([2, 4]))
    heads = groups * draw(st.integers(1, 3))
    config = {
        "model_type": kind,
        "architectures": [{"llama": "Llama", "granite": "Granite", "minicpm": "MiniCPM"}[kind] + "ForCausalLM"],
        "num_hidden_layers": draw(st.sampled_from([2, 4])),
        # Transformers requires a multiple of the number of heads; their size may be anything.
        "hidden_size": draw(st.integers(1, 12)) * heads,
        "intermediate_size": draw(st.integers(1, 8)) * 8,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "vocab_size": draw(st.integers(1, 300)),
        "max_position_embeddings": 2048,
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_theta": draw(st.sampled_from([10000.0, 500000.0])),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": "silu",
        "bos_token_id": draw(st.integers(0, 9)),
        "eos_token_id": [2, 9],
        "initializer_range": 0.1,
    }
    number = st.floats(0.1, 20, allow_nan=False)
    if kind == "granite":
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
            config[name] = draw(number)
    if kind == "minicpm":
        config.update(scale_emb=draw(st.integers(1, 20)), scale_depth=draw(number), dim_model_base=draw(number))
    if draw(st.booleans()):
        factors = st.lists(st.floats(0.5, 40, allow_nan=False), min_size=head // 2, max_size=head // 2)
        config["rope_scaling"] = {
            draw(st.sampled_from(["rope_type", "type"])): "longrope",
            "short_factor": draw(factors),
            "long_factor": draw(factors),
            "original_max_position_embeddings": draw(st.sampled_from([512, 2048])),
        }
        if draw(st.booleans()):
            config["rope_scaling"]["attention_factor"] = draw(st.floats(0.5, 2, allow_nan=False))
    if draw(st.booleans()):
        # Transformers 5 writes it in this form.
        rope = config.pop("rope_scaling", {"rope_type": "default"})
        config["rope_parameters"] = {**rope, "rope_theta": config.pop("rope_theta")}
    return config


def write(directory: Path, config: dict, weights: dict[str, torch.Tensor]) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def there_and_back(
    source: Path, work: Path, layout: str, tp: int, pp: int, *options: str, weights: str = "latent"
) -> Path:
    """Converts a model to Megatron and back, and returns the last directory."""
    megatron, back = work / f"{layout}{tp}{pp}", work / f"{layout}{tp}{pp} back"
    command = ["--load-dir", source, "--save-dir", megatron, "--format", layout, "--make-vocab-size-divisible-by", 16]
    command += ["--target-tensor-parallel-size", tp, "--target-pipeline-parallel-size", pp]
    assert convert_hf_to_megatron.main([str(c) for c in command]) == 0
    command = ["--load-dir", megatron, "--save-dir", back, "--weights", weights, "--verify", *options]
    assert convert_megatron_to_hf.main([str(c) for c in command]) == 0
    return back


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found.update(load_file(file))
    return found


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    config=configs(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    layout=st.sampled_from(["torch_dist", "legacy"]),
    parallel=st.sampled_from(LAYOUTS),
    shard=st.sampled_from(["5GB", "20KB"]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.verifies(
    "checkpoints",
    "a conversion from Hugging Face to Megatron and back returns every tensor unchanged, at TP1 and TP2, each with "
    "PP1 and PP2, in both Megatron checkpoint formats, with tied and untied embeddings",
    cpu="yes²",
)
def test_tensors_and_meaning_come_back(
    config: dict, dtype: torch.dtype, layout: str, parallel: tuple[int, int], shard: str, seed: int
) -> None:
    weights = tensors(config, dtype, seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write(work / "source", config, weights)
        kind = config["model_type"] if config["model_type"] != "minicpm" else "auto"
        back = there_and_back(work / "source", work, layout, *parallel, "--max-shard-size", shard)
        found = loaded(back)
        assert found.keys() == weights.keys()
        for key, weight in weights.items():
            assert found[key].dtype == dtype and torch.equal(found[key], weight), key
        new = json.loads((back / "config.json").read_text())
        assert new["model_type"] == (kind if kind != "auto" else "granite") or architecture_of(config).is_llama
        assert architecture_of(new).computes_like(architecture_of(config))
        for key in ("bos_token_id", "eos_token_id", "initializer_range", "rms_norm_eps", "max_position_embeddings"):
            assert new[key] == config[key], key
        if config["model_type"] != "minicpm":
            before, after = AutoConfig.from_pretrained(work / "source"), AutoConfig.from_pretrained(back)
            before.rope_parameters.pop("type", None)  # the old name is kept next to the new one
            assert before.rope_parameters == after.rope_parameters
            assert before.tie_word_embeddings == after.tie_word_embeddings and before.head_dim == after.head_dim


@pytest.mark.parametrize("layout", ["torch_dist", "legacy"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_minicpm_comes_back_as_minicpm(layout: str, tp: int, pp: int, tied: bool, tmp_path: Path) -> None:
    config = {
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        **{"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 6},
        **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 73, "max_position_embeddings": 512},
        **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied, "hidden_act": "silu"},
        **{"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16},
    }
    weights = tensors(config, torch.bfloat16, 0)
    write(tmp_path / "source", config, weights)
    back = there_and_back(tmp_path / "source", tmp_path, layout, tp, pp, "--hf-architecture", "minicpm")
    new = json.loads((back / "config.json").read_text())
    for key, value in config.items():
        assert new[key] == value, key
    assert math.isclose(architecture_of(new).residual_multiplier, 0.7)
    for key, weight in weights.items():
        assert torch.equal(loaded(back)[key], weight)


def test_what_a_config_leaves_out_is_what_its_class_takes() -> None:
    config = {
        **{"architectures": ["MiniCPMForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 73},
        **{"intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 512},
    }
    minicpm = architecture_of(config)
    assert (minicpm.embedding_multiplier, minicpm.residual_multiplier, minicpm.logits_scaling) == (1.0, 0.5, 64.0)
    assert minicpm.tied and minicpm.num_query_groups == 4 and minicpm.kv_channels == 16
    llama = architecture_of({**config, "architectures": ["LlamaForCausalLM"]})
    assert llama.is_llama and not llama.tied and llama.rotary_base == 10000.0


def test_virtual_stages_hold_the_layers_that_megatron_gives_them(tmp_path: Path) -> None:
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8, "hidden_size": 32},
        **{"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
        **{"vocab_size": 16, "max_position_embeddings": 64, "tie_word_embeddings": False},
    }
    weights = tensors(config, torch.float32, 0)
    write(tmp_path / "source", config, weights)
    command = ["--load-dir", tmp_path / "source", "--save-dir", tmp_path / "m", "--format", "legacy"]
    command += ["--target-pipeline-parallel-size", 2, "--target-virtual-pipeline-parallel-size", 2]
    assert convert_hf_to_megatron.main([str(c) for c in command]) == 0
    # In Megatron-LM, chunk v of rank p has the layers of stage v * ranks + p.
    layers = {(0, 0): (0, 1), (1, 0): (2, 3), (0, 1): (4, 5), (1, 1): (6, 7)}
    for (rank, chunk), numbers in layers.items():
        file = tmp_path / "m" / "release" / f"mp_rank_00_00{rank}" / "model_optim_rng.pt"
        # A context manager would remove what megatron-core itself has declared safe.
        torch.serialization.add_safe_globals([argparse.Namespace])
        part = torch.load(file, weights_only=True)[f"model{chunk}"]
        for local, number in enumerate(numbers):
            found = part[f"decoder.layers.{local}.mlp.linear_fc2.weight"]
            assert torch.equal(found, weights[f"model.layers.{number}.mlp.down_proj.weight"])
        assert ("embedding.word_embeddings.weight" in part) == (0 in numbers)
        assert ("output_layer.weight" in part) == (7 in numbers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistic", "multiplier", "layout"), [("absmean", 1.3, "torch_dist"), ("absmax", 0.3, "legacy")]
)
@pytest.mark.parametrize("space", SPACES)
def test_every_space_there_and_back(
    space: str, statistic: str, multiplier: float, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At TP2, latent and fused weights return unchanged, and all ways of fusing write the same bits."""
    record = tiny_hf.record(space=space, statistic=statistic, scale_multiplier=multiplier, latent_dtype="bfloat16")
    tiny_hf.latent_export(tmp_path / "latent", tiny_hf.architecture(), record)
    latent = loaded(tmp_path / "latent")
    configs = {f"{module}.weight": record.config_of(module) for module in record.modules}
    fused = {
        name: dequantize(*quantize(weight, config), config, weight.dtype) if (config := configs.get(name)) else weight
        for name, weight in latent.items()
    }
    assert {fused_space(fused[name]) for name in configs} == {space} and len(configs) == 14

    def assert_holds(back: Path, weights: dict[str, torch.Tensor], state: str) -> None:
        assert QuantizerRecord.read(back) == replace(record, state=state)
        found = loaded(back)
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            assert same_bits(found[name], weight), name

    two = (layout, 2, 1)
    assert_holds(there_and_back(tmp_path / "latent", tmp_path, *two), latent, "latent")
    of_training = tmp_path / "of training"
    command = ["--load-dir", tmp_path / f"{layout}21", "--save-dir", of_training, "--weights", "fused", "--verify"]
    assert convert_megatron_to_hf.main([str(c) for c in command]) == 0
    assert_holds(of_training, fused, "fused")
    qat = tmp_path / "qat"
    assert qat_convert.main(["--input_bin", str(tmp_path / "latent"), "--output", str(qat)]) == 0
    assert_holds(qat, fused, "fused")
    (tmp_path / "again").mkdir()
    assert_holds(there_and_back(qat, tmp_path / "again", *two, weights="fused"), fused, "fused")
    # Fusing again changes nothing if the record exists; without it, the weights themselves show that they are fused.
    assert qat_convert.main(["--input_bin", str(qat), "--output", str(tmp_path / "twice")]) == 0
    assert_holds(tmp_path / "twice", fused, "fused")
    for name in (FILE_NAME, DIGESTS):
        (qat / name).unlink()
    capsys.readouterr()
    status = qat_convert.main(["--input_bin", str(qat), "--output", str(tmp_path / "lost")])
    assert status == (0 if space == "ternary" else 2)
    assert space == "ternary" or f"of the space {space} already (fused)" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Tests of the modeling file in latent exports, which puts our quantizer, bit for bit, into Transformers' Granite."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from support import tiny_hf
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from bitcpm_megatron.checkpoint_tools.hf_model.config import GRANITE, MINICPM, config_for
from bitcpm_megatron.checkpoint_tools.hf_model.modeling_bitcpm import SPACES as TABLE
from bitcpm_megatron.checkpoint_tools.hf_model.modeling_bitcpm import (
    BitCPMForCausalLM,
    MiniCPMConfig,
    MiniCPMForCausalLM,
    TernaryLinear,
    quantize_activations,
    quantize_weight,
)
from bitcpm_megatron.checkpoint_tools.hf_model.remote_code import read_record, write_remote_code
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError
from bitcpm_megatron.quantization import SPACES, QuantizerConfig, dequantize, quantize
from bitcpm_megatron.quantization import quantize_activations as reference_activations
from bitcpm_megatron.quantization.record import FILE_NAME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
O_PROJ = "model.layers.0.self_attn.o_proj"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(seed))


def reference(w: torch.Tensor, group: int, eps: float = 1e-5) -> torch.Tensor:
    config = QuantizerConfig(group_size=group, eps=eps)
    return dequantize(*quantize(w, config), config, w.dtype)


ADAPTERS = {
    "LoRA": LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False),
    "DoRA": LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False, use_dora=True),
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "OFT": OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=32, init_weights=False),
}


# ------------------------------------------------------------------------------------------------------- quantizer


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 96, 256]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 10),
    eps=st.sampled_from([1e-5, 2.0**-100, 0.25]),
    seed=st.integers(0, 2**31),
)
def test_weights_are_quantized_as_in_training(rows, groups, group, dtype, exponent, eps, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    w = (torch.randn(rows, groups * group, generator=g) * 2.0**exponent).to(dtype)
    w[:, ::7] *= 0
    before = w.clone()
    assert same_bits(quantize_weight(w, group, eps, dtype), reference(w, group, eps))
    assert same_bits(quantize_weight(w.t().contiguous().t(), group, eps, dtype), reference(w, group, eps))
    assert same_bits(w, before)


def between_two_scales(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows whose mean is within an ulp of a midpoint of two bf16 values, and these midpoints.

    Another order of the sum would therefore be noticed.
    """
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)).abs()
    s = w.double().mean(-1).to(torch.bfloat16)
    midpoint = (s.double() + (s.view(torch.int16) + 1).view(torch.bfloat16).double()) / 2
    w[:, 0] += ((midpoint - w.double().mean(-1)) * columns).float()
    return w, midpoint.float()


def test_scales_between_two_bf16_values_fall_on_the_same_side() -> None:
    w, midpoint = between_two_scales(400, 4096)
    ours = quantize_weight(w, 4096, 1e-5, torch.float32)
    assert same_bits(ours, reference(w, -1))
    up = (ours.amax(-1) > midpoint).float().mean()
    assert 0.1 < up < 0.9, "the rows are not where they should be"


def test_a_row_alone_is_quantized_as_among_others() -> None:
    """With several threads, torch would divide a single long sum into pieces."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        w, _ = between_two_scales(16, 2**18)
        rows = torch.cat([quantize_weight(row, 2**18, 1e-5, torch.float32) for row in w.split(1)])
        assert same_bits(rows, reference(w, -1))
    finally:
        torch.set_num_threads(threads)


def test_wider_masters_are_quantized_by_their_rounded_copy() -> None:
    master = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    expected = reference(master.bfloat16(), -1).float()
    assert same_bits(quantize_weight(master, 1024, 1e-5, torch.bfloat16), expected)
    assert not torch.equal(expected, reference(master, -1)), "or the test says nothing"


def test_the_table_of_spaces_is_that_of_training() -> None:
    assert list(TABLE) == list(SPACES)
    for name, (levels, thresholds) in TABLE.items():
        space = SPACES[name]
        assert levels == space.levels
        assert thresholds == tuple(zip(space.thresholds, (tie == "upper" for tie in space.ties), strict=True))


@pytest.mark.parametrize("statistic", ["absmean", "absmax"])
@pytest.mark.parametrize("space", SPACES)
def test_every_space_is_quantized_as_in_training(space, statistic) -> None:
    config = QuantizerConfig(space, 64, 1e-5, statistic, 1 / 1.5)
    for dtype in DTYPES:
        w = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
        w[0], w[1, :64] = 0.0, 1e-6
        expected = dequantize(*quantize(w, config), config, dtype)
        assert same_bits(quantize_weight(w, 64, 1e-5, dtype, space, statistic, 1 / 1.5), expected)
        # A wider master weight is quantized from its rounded copy, to values of the narrow dtype.
        wide = quantize_weight(w.float(), 64, 1e-5, dtype, space, statistic, 1 / 1.5)
        assert same_bits(wide, expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_activations_are_quantized_as_in_training(dtype, groups) -> None:
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(groups)).to(dtype)
    x[0, 0] = 0
    assert same_bits(quantize_activations(x, groups), reference_activations(x, groups, 1e-5))


# ----------------------------------------------------------------------------------------------------------- model


def plain(built: BitCPMForCausalLM, weights: dict[str, torch.Tensor]) -> GraniteForCausalLM:
    """Returns Transformers' Granite with the same configuration and with these weights."""
    keys = ("ternary_quantizer", "auto_map", "model_type", "architectures", "transformers_version")
    config = GraniteConfig(**{k: v for k, v in built.config.to_dict().items() if k not in keys})
    granite = tiny_hf.cast(GraniteForCausalLM(config), built.dtype)
    granite.load_state_dict(weights)
    return granite


def quantized_state(built: BitCPMForCausalLM, record) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    for module in record.modules:
        config = record.config_of(module)
        state[f"{module}.weight"] = reference(state[f"{module}.weight"], config.group_size, config.eps)
    return state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forward_is_the_one_of_quantized_weights(dtype) -> None:
    record = tiny_hf.record(latent_dtype=dtype)
    record.modules["model.layers.1.mlp.up_proj"].update(group_size=32, eps=0.02)
    built = tiny_hf.model(tiny_hf.architecture(), record)
    ids = tokens(2, 24)
    with torch.no_grad():
        ours = built(ids).logits
        assert torch.equal(ours, plain(built, quantized_state(built, record))(ids).logits)
        latent = plain(built, built.state_dict())(ids).logits
    assert (ours - latent).abs().max() > 0.05 * ours.abs().max(), "quantizing changes too little to be seen"


def test_modules_that_are_not_listed_stay_in_full_precision() -> None:
    record = tiny_hf.record(modules={"model.layers.1.self_attn.o_proj": {"group_size": 32}})
    built = tiny_hf.model(tiny_hf.architecture(), record)
    assert [n for n, m in built.named_modules() if isinstance(m, TernaryLinear)] == list(record.modules)
    with torch.no_grad():
        assert torch.equal(
            built(tokens(1, 9)).logits, plain(built, quantized_state(built, record))(tokens(1, 9)).logits
        )


def test_fused_weights_are_not_quantized_again() -> None:
    built = tiny_hf.model(tiny_hf.architecture(), tiny_hf.record(state="fused"))
    assert not any(isinstance(m, TernaryLinear) for m in built.modules())
    with torch.no_grad():
        assert torch.equal(built(tokens(1, 9)).logits, plain(built, built.state_dict())(tokens(1, 9)).logits)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_pass_straight_through(checkpointing) -> None:
    """Latent weights get the gradients of the quantized ones bit for bit, with and without activation checkpointing."""
    record = tiny_hf.record()
    built = tiny_hf.model(tiny_hf.architecture(), record)
    granite = plain(built, quantized_state(built, record))
    if checkpointing is not None:
        built.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        built.train()
    ids = tokens(2, 16)
    for m in (built, granite):
        m(ids, labels=ids).loss.backward()
    theirs = dict(granite.named_parameters())
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name
    assert all(built.get_submodule(m).weight.grad.abs().max() > 0 for m in record.modules)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_attach_and_are_not_merged(kind) -> None:
    built, ids = tiny_hf.model(tiny_hf.architecture(), tiny_hf.record()), tokens(2, 16)
    with torch.no_grad():
        before = built(ids).logits
        adapted = get_peft_model(built, ADAPTERS[kind]).eval()
        with_adapter = adapted(ids).logits
        assert not torch.equal(with_adapter, before)
        for merge in (
            adapted.merge_and_unload,
            lambda: adapted.merge_and_unload(safe_merge=True),
            adapted.merge_adapter,
        ):
            with pytest.raises(ValueError, match="cannot be merged into a ternary layer"):
                merge()
        assert torch.equal(adapted(ids).logits, with_adapter)
        assert torch.equal(adapted.unload()(ids).logits, before)


def test_an_adapter_of_a_layer_in_full_precision_is_merged() -> None:
    record = tiny_hf.record(modules={"model.layers.1.self_attn.o_proj": {"group_size": 32}})
    built, ids = tiny_hf.model(tiny_hf.architecture(), record), tokens(2, 16)
    with torch.no_grad():
        adapted = get_peft_model(built, ADAPTERS["LoRA"]).eval()
        with_adapter = adapted(ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, with_adapter)


def test_eight_bit_activations_are_quantized_per_shard_in_row_parallel_layers() -> None:
    record = tiny_hf.record(activation_bits=8)
    built = tiny_hf.model(tiny_hf.architecture(), record)
    granite = plain(built, quantized_state(built, record))
    for module in record.modules:
        groups = 2 if module.endswith(("o_proj", "down_proj")) else 1
        granite.get_submodule(module).register_forward_pre_hook(
            lambda _, args, groups=groups: (reference_activations(args[0], groups, 1e-5),)
        )
    with torch.no_grad():
        assert torch.equal(built(tokens(2, 9)).logits, granite(tokens(2, 9)).logits)
    layer = built.model.layers[0].mlp.down_proj
    x = torch.randn(3, 192, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, quantize_weight(layer.weight, 96, 1e-5, torch.float32).sum(0).expand(3, -1))


def test_autocast_computes_with_the_same_codes() -> None:
    record = tiny_hf.record(activation_bits=8)
    built = tiny_hf.model(tiny_hf.architecture(), record)
    layer = built.model.layers[0].mlp.gate_proj
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    w = quantize_weight(layer.weight, 64, 1e-5, torch.float32).bfloat16()
    assert torch.equal(y, torch.nn.functional.linear(reference_activations(x.bfloat16(), 1, 1e-5), w))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version is 3"),
        ({"state": "other"}, "state is 'other'"),
        ({"space": "five"}, "space is 'five'"),
        ({"activation_bits": 4}, "activation_bits is 4"),
        ({"latent_dtype": "float8"}, "latent_dtype is 'float8'"),
        ({"modules": {}}, "nothing at all"),
        ({"modules": {"model.layers.7.mlp.up_proj": {"group_size": -1}}}, "model.layers.7.mlp.up_proj"),
        ({"modules": {"model.norm": {"group_size": -1}}}, "model.norm"),
        ({"modules": {"model.layers.1.mlp.up_proj": {"group_size": 48}}}, "cannot be quantized by"),
        ({"modules": {"model.layers.1.mlp.up_proj": {"group_size": -1, "space": "five"}}}, "cannot be quantized by"),
        ({"row_parallel_shards": 3}, "3 row-parallel shards"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message) -> None:
    config = tiny_hf.config(tiny_hf.architecture(), tiny_hf.record())
    config.ternary_quantizer = {**config.ternary_quantizer, **change}
    with pytest.raises(ValueError, match=message):
        BitCPMForCausalLM(config)


def test_no_record_is_refused() -> None:
    config = tiny_hf.config(tiny_hf.architecture(), tiny_hf.record())
    config.ternary_quantizer = None
    with pytest.raises(ValueError, match="no `ternary_quantizer`"):
        BitCPMForCausalLM(config)


def test_a_sharded_weight_is_refused() -> None:
    built = tiny_hf.model(tiny_hf.architecture(), tiny_hf.record())
    layer = built.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight[:, :96].detach())
    with pytest.raises(ValueError, match="groups cannot be sharded"):
        layer(torch.randn(1, 96))


# ------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_as_remote_code(tmp_path: Path, tied) -> None:
    record = tiny_hf.record(latent_dtype="bfloat16")
    built = tiny_hf.latent_export(tmp_path / "a", tiny_hf.architecture(tied=tied), record)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True, dtype=torch.bfloat16)
    assert type(loaded).__name__ == "BitCPMForCausalLM" and type(loaded) is not BitCPMForCausalLM
    assert loaded.dtype == torch.bfloat16
    ids = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, built(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied

    loaded.save_pretrained(tmp_path / "b")
    assert read_record(tmp_path / "b") == record
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["auto_map"] == {
        "AutoConfig": "modeling_bitcpm.BitCPMConfig",
        "AutoModelForCausalLM": "modeling_bitcpm.BitCPMForCausalLM",
    }
    assert "quantization_config" not in written and written["model_type"] == "bitcpm"
    original = (tmp_path / "a" / "modeling_bitcpm.py").read_text()
    assert (tmp_path / "b" / "modeling_bitcpm.py").read_text() == original
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", trust_remote_code=True, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(built.state_dict().items(), again.state_dict().items(), strict=True):
        assert same_bits(a, b), name

    out = again.generate(ids[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 8)


def test_stock_transformers_do_not_load_latents_silently(tmp_path: Path) -> None:
    tiny_hf.latent_export(tmp_path / "a", tiny_hf.architecture(), tiny_hf.record())
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=False)
    (tmp_path / "a" / "modeling_bitcpm.py").unlink()
    with pytest.raises(OSError, match="modeling_bitcpm.py"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)


def test_made_on_the_meta_device_and_copied() -> None:
    record = tiny_hf.record()
    with torch.device("meta"):
        built = BitCPMForCausalLM(tiny_hf.config(tiny_hf.architecture(), record))
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert sum(isinstance(m, TernaryLinear) for m in built.modules()) == 14
    real = tiny_hf.model(tiny_hf.architecture(), record)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(real)(tokens(1, 5)).logits, real(tokens(1, 5)).logits)


def test_record_and_config_must_agree(tmp_path: Path) -> None:
    tiny_hf.latent_export(tmp_path / "a", tiny_hf.architecture(), tiny_hf.record())
    assert read_record(tmp_path / "a") == tiny_hf.record()
    (tmp_path / "a" / FILE_NAME).unlink()
    assert read_record(tmp_path / "a") == tiny_hf.record()
    tiny_hf.record(row_parallel_shards=4).write(tmp_path / "a")
    with pytest.raises(ConversionError, match="contradict each other.*row_parallel_shards"):
        read_record(tmp_path / "a")
    (tmp_path / "a" / FILE_NAME).unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for change, message in (({"version": 9}, "version 9"), ({"surprise": 1}, "not a quantizer record")):
        changed = {**config, "ternary_quantizer": {**config["ternary_quantizer"], **change}}
        (tmp_path / "a" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConversionError, match=message):
            read_record(tmp_path / "a")
    damaged = {**config, "ternary_quantizer": {**config["ternary_quantizer"], "modules": {O_PROJ: "row"}}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(damaged))
    tiny_hf.record(modules={O_PROJ: {"group_size": -1}}).write(tmp_path / "a")
    with pytest.raises(ConversionError, match="not a quantizer record"):
        read_record(tmp_path / "a")
    (tmp_path / "a" / FILE_NAME).unlink()
    (tmp_path / "a" / "config.json").write_text("{}")
    assert read_record(tmp_path / "a") is None


@pytest.mark.parametrize(("kind", "state"), [("bitcpm", "fused"), ("minicpm", "latent"), ("granite", "fused")])
def test_latents_and_only_they_are_exported_as_bitcpm(tmp_path: Path, kind, state) -> None:
    with pytest.raises(ConversionError, match=kind):
        write_remote_code(
            tmp_path, config_for(kind, tiny_hf.architecture(), {}, "float32"), tiny_hf.record(state=state)
        )


# ------------------------------------------------------------------------------------------- MiniCPM and LongRoPE


def test_minicpm_is_granite_with_mapped_multipliers(tmp_path: Path) -> None:
    a = tiny_hf.architecture(longrope=tiny_hf.longrope())
    config = config_for(MINICPM, a, {"scale_depth": 1.4, "dim_model_base": 16}, "float32")
    write_remote_code(tmp_path, config, tiny_hf.record(state="fused"))
    loaded_config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    minicpm = AutoModelForCausalLM.from_config(loaded_config, trust_remote_code=True).float()
    c = minicpm.config
    assert (c.scale_emb, c.scale_depth, c.dim_model_base) == (12.0, 1.4, 16)
    assert (c.embedding_multiplier, c.logits_scaling, c.attention_multiplier) == (12.0, 4.0, 0.25)
    assert c.residual_multiplier == 1.4 / 2**0.5
    granite = GraniteForCausalLM(GraniteConfig.from_dict(config_for(GRANITE, a, {}, "float32"))).float()
    granite.load_state_dict(minicpm.state_dict())
    with torch.no_grad():
        for length in (16, 17, 60):
            ids = tokens(2, length)
            assert torch.equal(minicpm(ids).logits, granite(ids).logits)

    minicpm.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, minicpm(ids).logits)


def test_minicpm_defaults_are_those_of_its_own_class() -> None:
    c = MiniCPMConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=4, intermediate_size=96, vocab_size=32)
    assert (c.embedding_multiplier, c.residual_multiplier, c.logits_scaling) == (1.0, 0.5, 64.0)
    assert c.attention_multiplier == 0.25 and c.tie_word_embeddings
    assert MiniCPMForCausalLM(c).lm_head.weight.shape == (32, 64)


def test_longrope_switches_beyond_the_original_length() -> None:
    """The angles equal the formula, in a model that is configured like exports."""
    rope = tiny_hf.longrope(16)
    a = tiny_hf.architecture(longrope=rope)
    built = tiny_hf.model(a, tiny_hf.record())
    frequencies = 1 / 10000 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    factor = rope.effective_attention_factor(a.max_position_embeddings)
    assert factor > 1.2
    for length, divisors in ((16, rope.short_factor), (17, rope.long_factor), (100, rope.long_factor)):
        cos, sin = built.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        angle = torch.arange(length)[:, None] * (frequencies / torch.tensor(divisors, dtype=torch.float64))
        angle = torch.cat((angle, angle), -1)
        assert torch.allclose(cos[0].double(), angle.cos() * factor, atol=2e-5)
        assert torch.allclose(sin[0].double(), angle.sin() * factor, atol=2e-5)
    with torch.no_grad():
        ids = tokens(1, 40)
        record = tiny_hf.record()
        assert torch.equal(built(ids).logits, plain(built, quantized_state(built, record))(ids).logits)
        short = tiny_hf.model(tiny_hf.architecture(), record)
        assert not torch.allclose(built(ids).logits, short(ids).logits, atol=1e-3)

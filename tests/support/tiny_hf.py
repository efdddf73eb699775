# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face models with latent weights, and a tokenizer for them; nothing comes from the network."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bitcpm_megatron.checkpoint_tools.hf_model.config import BITCPM, config_for
from bitcpm_megatron.checkpoint_tools.hf_model.modeling_bitcpm import BitCPMConfig, BitCPMForCausalLM
from bitcpm_megatron.checkpoint_tools.hf_model.remote_code import write_remote_code
from bitcpm_megatron.models.architecture import Architecture, LongRope
from bitcpm_megatron.quantization.record import QuantizerRecord

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SHARDS = 2
ROW_PARALLEL = {"self_attn.o_proj": 64 // SHARDS, "mlp.down_proj": 192 // SHARDS}
"""The group sizes of a model that was trained with 2 row-parallel shards and ``--ternary-group-size -1``."""


def architecture(**changes: Any) -> Architecture:
    """Returns the architecture of two layers of MiniCPM, with multipliers."""
    numbers: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=192,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=320,
        max_position_embeddings=128,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
        tied=True,
        embedding_multiplier=12.0,
        residual_multiplier=1.4 / 2**0.5,
        logits_scaling=4.0,
    )
    return Architecture(**{**numbers, **changes})


def llama(**changes: Any) -> Architecture:
    """Returns the same architecture as :func:`architecture` without multipliers."""
    return architecture(embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0, **changes)


def longrope(original: int = 16) -> LongRope:
    """Returns LongRoPE factors that are different for all channels."""
    return LongRope(
        tuple(1 + 0.1 * i for i in range(8)),
        tuple(2 + 0.3 * i for i in range(8)),
        original_max_position_embeddings=original,
    )


def record(layers: int = 2, **changes: Any) -> QuantizerRecord:
    """Returns the quantizer record of a model trained with group size -1 and 2 row-parallel shards."""
    modules = {
        f"model.layers.{layer}.{name}": {"group_size": ROW_PARALLEL.get(name, -1)}
        for layer in range(layers)
        for name in PROJECTIONS
    }
    numbers: dict[str, Any] = dict(
        state="latent", space="ternary", eps=1e-5, latent_dtype="float32", row_parallel_shards=SHARDS, modules=modules
    )
    return QuantizerRecord(**{**numbers, **changes})


def config(a: Architecture, r: QuantizerRecord, **more: Any) -> BitCPMConfig:
    """Returns the configuration that Transformers reads from a latent export's ``config.json``."""
    return BitCPMConfig.from_dict({**config_for(BITCPM, a, more, r.latent_dtype), "ternary_quantizer": vars(r)})


def model(a: Architecture, r: QuantizerRecord, seed: int = 1) -> BitCPMForCausalLM:
    """Builds a model with random latent weights: rows of very different magnitude, and norms that are not 1."""
    built = BitCPMForCausalLM(config(a, r))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=g)
            else:
                rows = torch.empty(parameter.shape[0], 1).uniform_(-0.5, 0.5, generator=g)
                parameter.normal_(0, 0.05, generator=g).mul_(1 if "embed" in name else 10**rows)
    return cast(built, getattr(torch, r.latent_dtype))


def cast(built: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Casts parameters as ``from_pretrained`` does; ``.to(dtype)`` would also round the rotary frequencies."""
    for parameter in built.parameters():
        parameter.data = parameter.data.to(dtype)
    return built


def latent_export(directory: Path, a: Architecture, r: QuantizerRecord, **more: Any) -> BitCPMForCausalLM:
    """Writes a latent export as the converter does; returns its model."""
    directory.mkdir(parents=True)
    built = model(a, r)
    weights = {name: tensor for name, tensor in built.state_dict().items() if not (a.tied and name == "lm_head.weight")}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_remote_code(directory, config_for(BITCPM, a, more, r.latent_dtype), r)
    return built


def write_tokenizer(directory: Path, front: str | None = None) -> None:
    """Writes a byte tokenizer: ids 0 to 2 are <unk>, <s> and </s>, then come the 256 bytes.

    Args:
        directory: the directory to write to.
        front: a token that the tokenizer puts in front of every text, or None.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if front is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{front} $A", special_tokens=[(front, raw.token_to_id(front))]
        )
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(
        directory
    )

# SPDX-License-Identifier: Apache-2.0
"""Small ternary models to pack, and readers of the packed files that are independent of the writers."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file

from bitcpm_megatron import QuantizerConfig, fake_quantize
from bitcpm_megatron.checkpoint_tools.hf_model.config import GRANITE, LLAMA, config_for
from bitcpm_megatron.checkpoint_tools.tensor_map import megatron_tensors, part_shapes
from bitcpm_megatron.data.tokenizers import train_sentencepiece
from bitcpm_megatron.models.architecture import Architecture
from bitcpm_megatron.quantization.grouping import row_parallel_group
from bitcpm_megatron.quantization.record import QuantizerRecord
from support import tiny_hf

Tensors = dict[str, torch.Tensor]
_Q2_0 = 42
_IN_A_LAYER = dict(
    pair.split("=")
    for pair in (
        "attn_norm=input_layernorm attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj "
        "attn_output=self_attn.o_proj ffn_norm=post_attention_layernorm ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj "
        "ffn_down=mlp.down_proj"
    ).split()
)
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def architecture(**changes: Any) -> Architecture:
    """Returns an architecture of two layers whose rows consist of whole blocks of 256, and of eight equal shards."""
    plain = dict(embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0, tied=False)
    rows = dict(hidden_size=256, ffn_hidden_size=512, kv_channels=64)
    return tiny_hf.architecture(**{**plain, **rows, **changes})


def latent_model(
    directory: Path, a: Architecture, group_size: int = -1, shards: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """Writes a latent model with its record; returns the weights of its training forward."""
    g = torch.Generator().manual_seed(1)
    latent: Tensors = {}
    forward: Tensors = {}
    modules: dict[str, dict[str, int]] = {}
    for tensor in megatron_tensors(a):
        for name, shape in part_shapes([tensor]).items():
            rows = 10 ** torch.empty(shape[0], *[1] * (len(shape) - 1)).uniform_(-1.5, 0.5, generator=g)
            # Mean |w| is near 0.02, so that the network computes values of the order of 1.
            weight = torch.empty(shape).normal_(0, 0.05, generator=g) * rows
            latent[name] = forward[name] = (weight if len(shape) == 2 else rows.view(-1)).to(dtype)
            if not tensor.quantizable:
                continue
            size = group_size if tensor.kind != "row" else row_parallel_group(shape[1], group_size, 1, shards)
            latent[name][1, : shape[1] // 2] = 0  # groups of zeros if groups are smaller than the row
            forward[name] = fake_quantize(latent[name], QuantizerConfig(group_size=size))
            modules[name.removesuffix(".weight")] = {"group_size": size}
    directory.mkdir(parents=True)
    save_file(latent, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, a, dtype)
    QuantizerRecord("latent", "ternary", 1e-5, str(dtype).removeprefix("torch."), shards, 16, modules).write(directory)
    return forward


def write_config(directory: Path, a: Architecture, dtype: torch.dtype, **more: Any) -> None:
    """Writes the ``config.json`` of a stock model."""
    config = config_for(LLAMA if a.is_llama else GRANITE, a, more, str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(config))


def write_sentence_piece(directory: Path, vocab_size: int = 320) -> None:
    """Writes a SentencePiece model as ``preprocess_data.py`` trains it."""
    words = "the quick brown fox jumps over a lazy dog while seven wizards boil black quartz and mix pale ink".split()
    texts = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(40)) for i in range(60)]
    (directory / "tokenizer.model").write_bytes(train_sentencepiece(texts, vocab_size))


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Opens a GGUF file with the reader of the package ``gguf``, after registering the type Q2_0, which it lacks."""
    kinds = gguf.GGMLQuantizationType

    def missing(cls: type, value: int) -> Any:
        assert value == _Q2_0
        member = int.__new__(cls, value)
        member._name_, member._value_ = "Q2_0", value
        return member

    kinds._missing_ = classmethod(missing)
    gguf.constants.GGML_QUANT_SIZES[kinds(_Q2_0)] = (64, 18)
    return gguf.GGUFReader(path)


def decoded(file: gguf.GGUFReader) -> dict[str, tuple[str, torch.Tensor]]:
    """Returns type and fp32 values of every tensor by Hugging Face's names, with q and k in Hugging Face's order.

    ``gguf`` decodes all types except Q2_0, whose layout is implemented here independently; ``make test-clients`` proves
    that a client reads it in the same way.
    """
    found = {}
    for tensor in file.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        if tensor.tensor_type == _Q2_0:
            blocks = torch.from_numpy(tensor.data.copy()).reshape(-1, 18)
            scales = blocks[:, :2].clone().view(torch.float16).float()
            codes = torch.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1).float() - 1
            values = (codes * scales).reshape(shape)
        else:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shape)
        name = tensor.name.removesuffix(".weight")
        if name in _OUTSIDE:
            name = _OUTSIDE[name]
        elif name.startswith("blk."):
            _, layer, own = name.split(".")
            name = f"model.layers.{layer}.{_IN_A_LAYER[own]}"
            if own in ("attn_q", "attn_k"):
                key = "attention.head_count" + ("_kv" if own == "attn_k" else "")
                values = values.unflatten(0, (value(file, key), -1, 2)).transpose(1, 2).flatten(0, 2)
        found[f"{name}.weight"] = (tensor.tensor_type.name, values)
    return found


def value(file: gguf.GGUFReader, key: str) -> Any:
    """Returns a number, text or list of the metadata; keys of the architecture are given without its name in front."""
    names = (key, f"{file.fields['general.architecture'].contents()}.{key}")
    return next(file.fields[name].contents() for name in names if name in file.fields)

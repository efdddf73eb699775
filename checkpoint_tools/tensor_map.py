# SPDX-License-Identifier: Apache-2.0
"""Map between Hugging Face and Megatron tensors: names, row order, tensor-parallel shards, and quantizer records.

Llama, MiniCPM and Granite use the same tensor names, so that this one table serves all three. A Megatron tensor is
named with its global layer number. ``torch_dist`` checkpoints stack all layers of a name into one tensor; legacy files
count the layers of each pipeline stage from 0.

============================================  ==============================  ==================================
Megatron                                      Hugging Face                    rows of the Megatron tensor
============================================  ==============================  ==================================
``embedding.word_embeddings.weight``          ``model.embed_tokens.weight``   padded
``...self_attention.linear_qkv.weight``       q, k, v                         per key/value head [q..q, k, v]
``...self_attention.linear_proj.weight``      o                               unchanged
``...mlp.linear_fc1.weight``                  gate, up                        [gate; up], on rank r [gate_r; up_r]
``...mlp.linear_fc2.weight``                  down                            unchanged
``output_layer.weight``                       ``lm_head.weight``              padded; absent if embeddings are tied
============================================  ==============================  ==================================
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..models.architecture import Architecture
from ..quantization.record import QuantizerRecord
from .storage.reader import ConversionError

Kind = Literal["vocab", "qkv", "gated", "row", "replicated"]
"""Composition of a tensor, and its sharding over tensor-parallel ranks.

``vocab``: cut by rows, which are padded. ``qkv``: cut by rows, which alternate between q, k and v per key/value head.
``gated``: cut by rows within gate and within up. ``row``: cut by columns (row-parallel). ``replicated``: not cut.
"""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_weight"
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
OTHER_NAMES = {ATTENTION_NORM: "input_layernorm.weight", MLP_NORM: "pre_mlp_layernorm.weight"}
"""Norm names of the Transformer Engine specification, which fuses norms into linears -> those of the local one.

``torch_dist`` checkpoints use the Transformer Engine names under both specifications.
"""
PROJECTION = re.compile(r"(.+\.)?(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
"""Pattern of Hugging Face's names for the weights of a layer's linears."""


@dataclass(frozen=True)
class MegatronTensor:
    """A Megatron tensor, its place in the model, and the Hugging Face tensors that it is made of.

    Attributes:
        name: the tensor's name with the global layer number, such as ``decoder.layers.3.mlp.linear_fc1.weight``.
        kind: how the rows are composed and how tensor-parallel ranks share the tensor, see :data:`Kind`.
        shape: the shape over all tensor-parallel ranks, without padding.
        parts: the names of the Hugging Face tensors that it is made of.
        rows: the number of rows of each of these parts.
        layer: the global layer number; None for a tensor outside the layers.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    layer: int | None = None

    @property
    def module(self) -> str:
        """Name of the module that holds the tensor."""
        return self.name.removesuffix(".weight")

    @property
    def quantizable(self) -> bool:
        """True if the tensor is the weight of one of a layer's linears."""
        return self.layer is not None and self.kind != "replicated"

    @property
    def suffix(self) -> str:
        """Name within the layer; the full name for a tensor outside the layers."""
        return self.name if self.layer is None else self.name.split(".", 3)[3]

    @property
    def spellings(self) -> list[str]:
        """The tensor's name, followed by its name under the local specification if that differs."""
        other = OTHER_NAMES.get(self.suffix)
        return [self.name, *([] if other is None else [f"decoder.layers.{self.layer}.{other}"])]


def megatron_tensors(architecture: Architecture) -> list[MegatronTensor]:
    """Returns every tensor of a model, in the order of the forward pass."""
    a = architecture
    h, ffn = a.hidden_size, a.ffn_hidden_size
    q, kv = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    of_a_layer: list[tuple[str, Kind, tuple[int, ...], str, tuple[int, ...]]] = [
        (ATTENTION_NORM, "replicated", (h,), "input_layernorm", (h,)),
        (
            "self_attention.linear_qkv.weight",
            "qkv",
            (q + 2 * kv, h),
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            (q, kv, kv),
        ),
        ("self_attention.linear_proj.weight", "row", (h, q), "self_attn.o_proj", (h,)),
        (MLP_NORM, "replicated", (h,), "post_attention_layernorm", (h,)),
        ("mlp.linear_fc1.weight", "gated", (2 * ffn, h), "mlp.gate_proj mlp.up_proj", (ffn, ffn)),
        ("mlp.linear_fc2.weight", "row", (h, ffn), "mlp.down_proj", (h,)),
    ]
    vocab = (a.vocab_size, h)
    found = [MegatronTensor(EMBEDDING, "vocab", vocab, ("model.embed_tokens.weight",), (a.vocab_size,))]
    for layer in range(a.num_layers):
        for suffix, kind, shape, parts, rows in of_a_layer:
            names = tuple(f"model.layers.{layer}.{part}.weight" for part in parts.split())
            found.append(MegatronTensor(f"decoder.layers.{layer}.{suffix}", kind, shape, names, rows, layer))
    found.append(MegatronTensor(FINAL_NORM, "replicated", (h,), ("model.norm.weight",), (h,)))
    if not a.tied:
        found.append(MegatronTensor(OUTPUT, "vocab", vocab, ("lm_head.weight",), (a.vocab_size,)))
    return found


def part_shapes(tensors: Iterable[MegatronTensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every Hugging Face tensor that these Megatron tensors are made of, by name."""
    return {name: (rows, *t.shape[1:]) for t in tensors for name, rows in zip(t.parts, t.rows, strict=True)}


def join(tensor: MegatronTensor, parts: Sequence[torch.Tensor], channels: int) -> Iterator[torch.Tensor]:
    """Yields views of the Hugging Face parts whose concatenation along the rows is the Megatron tensor.

    Args:
        tensor: the Megatron tensor.
        parts: its Hugging Face parts, or tensors with the same rows, such as scales.
        channels: the size of one attention head.
    """
    if tensor.kind != "qkv":
        yield from parts
        return
    groups = parts[1].shape[0] // channels
    for group in range(groups):
        for part in parts:
            rows = len(part) // groups
            yield part[group * rows : (group + 1) * rows]


def split(tensor: MegatronTensor, whole: torch.Tensor, channels: int) -> list[list[torch.Tensor]]:
    """Returns the Hugging Face parts of a Megatron tensor or of its scales; the inverse of :func:`join`.

    Args:
        tensor: the Megatron tensor.
        whole: its values, or a tensor with the same rows, such as scales.
        channels: the size of one attention head.

    Returns:
        For every part a list of views of ``whole``, whose concatenation along the rows is the part.
    """
    groups = tensor.rows[1] // channels if tensor.kind == "qkv" else 1
    blocks = whole.split([rows // groups for rows in tensor.rows] * groups)
    return [list(blocks[part :: len(tensor.parts)]) for part in range(len(tensor.parts))]


def unshard(kind: Kind, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the whole tensor from the shards of all tensor-parallel ranks; for a replicated tensor, the first one."""
    if len(shards) == 1 or kind == "replicated":
        return shards[0]
    if kind == "row":
        return torch.cat(list(shards), 1)
    if kind == "gated":
        halves = [s.chunk(2) for s in shards]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return torch.cat(list(shards))


def to_hugging_face(record: QuantizerRecord, tensors: Sequence[MegatronTensor]) -> QuantizerRecord:
    """Returns the same quantizer record with Hugging Face's module names instead of Megatron's.

    Raises:
        ConversionError: if the record names a module that the model does not have.
    """
    modules = {
        part: dict(record.modules[t.module]) for t in tensors if t.module in record.modules for part in _parts(t)
    }
    _check_known(record, {t.module for t in tensors if t.quantizable})
    return replace(record, modules=modules)


def to_megatron(record: QuantizerRecord, tensors: Sequence[MegatronTensor]) -> QuantizerRecord:
    """Returns the same quantizer record with Megatron's module names instead of Hugging Face's.

    Raises:
        ConversionError: if modules that Megatron fuses into one are quantized differently, or the record names a module
            that the model does not have.
    """
    modules: dict[str, Mapping[str, Any]] = {}
    for tensor in tensors:
        entries = [record.modules.get(part) for part in _parts(tensor)]
        if any(entry != entries[0] for entry in entries):
            raise ConversionError(
                f"{', '.join(_parts(tensor))} are one matrix in Megatron and must be quantized alike: the quantizer "
                f"record says {entries}"
            )
        if entries[0] is not None:
            modules[tensor.module] = entries[0]
    _check_known(record, {part for t in tensors if t.quantizable for part in _parts(t)})
    return replace(record, modules=modules)


def _parts(tensor: MegatronTensor) -> list[str]:
    return [part.removesuffix(".weight") for part in tensor.parts]


def _check_known(record: QuantizerRecord, known: set[str]) -> None:
    unknown = sorted(set(record.modules) - known)
    if unknown:
        raise ConversionError(f"the quantizer record names modules that the model does not have: {', '.join(unknown)}")

# SPDX-License-Identifier: Apache-2.0
"""Writer of GGUF files: a header with all shapes and types, then the data in the same order, block by block."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...models.architecture import Architecture
from ..storage.reader import ConversionError, TensorInfo
from .block_types import BF16, F16, F32, GGUF_TYPES, Q2_0, Q4_0, TQ1_0, TQ2_0
from .encoding import Encoder
from .planner import ALIGNMENT, Plan, Weight
from .source import Blocks, Source
from .vocabulary import Vocabulary

FILE_NAME = "model.gguf"
_FACTORS = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
_OUTSIDE_OF_LAYERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{name: name for name in _FACTORS},
}
_IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Values of enum llama_ftype in llama.h, which name the type of most of the file.
_FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, BF16: 32, TQ1_0: 36, TQ2_0: 37, Q2_0: 41}


def gguf_name(name: str) -> str:
    """Returns llama.cpp's name of a tensor, given Hugging Face's."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{layer[1]}.{_IN_A_LAYER[layer[2]]}.weight" if layer else _OUTSIDE_OF_LAYERS[name]


def with_factors(source: Source) -> list[Weight]:
    """Returns the weights of a model that a GGUF file contains: first LongRoPE's factors, which are tensors there."""
    longrope = source.architecture.longrope
    factors = []
    if longrope is not None:
        info = TensorInfo((source.architecture.kv_channels // 2,), torch.float32)
        factors = [Weight(name, info) for name in _FACTORS]
    return [*factors, *source.weights]


def write_gguf(
    path: Path, source: Source, plan: Plan, vocabulary: Vocabulary, on_write: Callable[[int], object]
) -> Encoder:
    """Writes a GGUF file and returns the encoder, which has measured the loss of the embeddings.

    Args:
        path: the new file.
        source: the model.
        plan: the plan of the weights that :func:`with_factors` returns.
        vocabulary: the vocabulary of the model's tokenizer.
        on_write: a function that is called with the number of bytes that were written.

    Raises:
        ConversionError: if the planned type cannot hold a value.
    """
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer: Any = gguf.GGUFWriter(path, "llama" if source.architecture.is_llama else "granite")
    try:
        writer.add_name(source.name)
        _add_architecture(writer, source.architecture)
        linears = [c for c in plan.choices if c.weight.group is not None]
        most = max({c.kind for c in linears}, key=lambda kind: (sum(c.nbytes for c in linears if c.kind == kind), kind))
        writer.add_file_type(_FILE_TYPES[GGUF_TYPES[most]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.write(writer)
        for choice in plan.choices:
            shape, kind = choice.weight.info.shape, GGUF_TYPES[choice.kind]
            nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
            # The entry is added directly, because the package does not have the newest types.
            writer.tensors[-1][gguf_name(choice.weight.name)] = gguf.gguf_writer.TensorInfo(shape, kind.number, nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        return _write_data(file, source, plan, on_write)
    finally:
        writer.close()


def _write_data(file: Any, source: Source, plan: Plan, on_write: Callable[[int], object]) -> Encoder:
    encoder = Encoder()
    for choice, (weight, blocks) in zip(plan.choices, _in_order(source), strict=True):
        assert weight.name == choice.weight.name
        rows, begin = 0, file.tell()
        for block in blocks:
            for piece in encoder.encode(choice, block):
                file.write(piece.data)
            rows += block.shape[0]
        if rows != weight.info.shape[0]:
            raise ConversionError(f"{weight.name}: {rows} of {weight.info.shape[0]} rows")
        file.write(bytes(-file.tell() % ALIGNMENT))
        assert file.tell() - begin == choice.nbytes
        on_write(choice.nbytes)
    return encoder


def _in_order(source: Source) -> Iterator[tuple[Weight, Blocks]]:
    """Yields the weights of :func:`with_factors` with blocks of their rows, in llama.cpp's order of rows."""
    a = source.architecture
    for weight in with_factors(source):
        if weight.name in _FACTORS:
            factors = torch.tensor(getattr(a.longrope, _FACTORS[weight.name]), dtype=torch.float32)
            yield weight, iter([factors])
    heads = {"q_proj": a.num_attention_heads, "k_proj": a.num_query_groups}
    for weight, blocks in source.read():
        count = heads.get(weight.module.rpartition(".")[2])
        yield weight, blocks if count is None else iter([interleave(torch.cat(list(blocks)), count)])


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of q or k so that rotary pairs are adjacent.

    llama.cpp rotates the elements ``2 i`` and ``2 i + 1`` of a head, Hugging Face's models ``i`` and
    ``i + head_dim / 2`` (``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``).

    Args:
        rows: the rows, ``[heads * head_dim, in]`` with ``in`` input features.
        heads: the number of heads of q, or of key/value heads for k.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_architecture(writer: Any, a: Architecture) -> None:
    import gguf

    writer.add_vocab_size(a.vocab_size)
    writer.add_context_length(a.max_position_embeddings)
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_layers)
    writer.add_feed_forward_length(a.ffn_hidden_size)
    writer.add_head_count(a.num_attention_heads)
    writer.add_head_count_kv(a.num_query_groups)
    writer.add_key_length(a.kv_channels)
    writer.add_value_length(a.kv_channels)
    writer.add_layer_norm_rms_eps(a.norm_epsilon)
    writer.add_rope_dimension_count(a.kv_channels)
    writer.add_rope_freq_base(a.rotary_base)
    if not a.is_llama:
        writer.add_attention_scale(a.softmax_scale)
        writer.add_embedding_scale(a.embedding_multiplier)
        writer.add_residual_scale(a.residual_multiplier)
        writer.add_logit_scale(a.logits_scaling)
    if a.longrope is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(a.longrope.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(a.longrope.effective_attention_factor(a.max_position_embeddings))

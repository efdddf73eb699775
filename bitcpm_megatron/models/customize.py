# SPDX-License-Identifier: Apache-2.0
"""Multipliers and LongRoPE of the MiniCPM4 family on a built ``GPTModel``; megatron-core has neither.

Everything is set on the instances of one model after any builder has built it, so that megatron-core's own code stays
unchanged and Megatron-LM's model builder is served alike. The symbols that each item displaces:

- embedding multiplier: a forward hook on ``GPTModel.embedding``;
- residual multiplier: ``TransformerLayer.self_attn_bda`` and ``.mlp_bda`` (bias-dropout-add), which get the scaled
  branch;
- logits scaling: a forward pre-hook on ``GPTModel.output_layer`` divides the final hidden states, as MiniCPM does;
- LongRoPE: ``GPTModel.rotary_pos_emb``.

The attention multiplier is megatron-core's own ``TransformerConfig.softmax_scale``, which must be set before the model
is built, to the value of :func:`softmax_scale`. It includes LongRoPE's attention factor f: cos and sin times f in
queries and keys is ``f ** 2`` in their product, since every channel is rotated.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from .architecture import LongRope, Multipliers

_DONE = "_bitcpm_customized"


def softmax_scale(
    multipliers: Multipliers, longrope: LongRope | None, kv_channels: int, max_position_embeddings: int
) -> float | None:
    """Returns the value that ``TransformerConfig.softmax_scale`` must have; None for megatron-core's default.

    The default is ``kv_channels ** -0.5``.
    """
    factor = 1.0 if longrope is None else longrope.effective_attention_factor(max_position_embeddings)
    scale = multipliers.attention_multiplier
    if scale is None and factor == 1.0:
        return None
    return (kv_channels**-0.5 if scale is None else scale) * factor * factor


def customize(model: GPTModel, multipliers: Multipliers, longrope: LongRope | None) -> None:
    """Gives a model chunk its multipliers and LongRoPE (None keeps its RoPE); before DDP and :func:`apply_recipe`.

    Raises:
        ValueError: if the model was customized before, has no plain RoPE to replace, or was built with another softmax
            scale.
    """
    if getattr(model, _DONE, False):
        raise ValueError("the model has its multipliers already: customize() once per model")
    config = model.config
    wanted = softmax_scale(multipliers, longrope, config.kv_channels, model.max_sequence_length)
    if config.softmax_scale != wanted:
        raise ValueError(
            f"the model was built with softmax_scale {config.softmax_scale}, its attention multiplier and LongRoPE "
            f"need {wanted}: set TransformerConfig.softmax_scale before it is built"
        )
    if longrope is not None:
        _give_longrope(model, longrope)
    embedding, residual = multipliers.embedding_multiplier, multipliers.residual_multiplier
    if embedding != 1.0 and hasattr(model, "embedding"):
        model.embedding.register_forward_hook(functools.partial(_scale_output, embedding))
    if residual != 1.0:
        for layer in model.modules():
            if isinstance(layer, TransformerLayer):
                layer.self_attn_bda = functools.partial(_scaled_branch, layer.self_attn_bda, residual)
                layer.mlp_bda = functools.partial(_scaled_branch, layer.mlp_bda, residual)
    if multipliers.logits_scaling != 1.0 and model.post_process:
        model.output_layer.register_forward_pre_hook(functools.partial(_divide_input, multipliers.logits_scaling))
    setattr(model, _DONE, True)


class LongRotaryEmbedding(RotaryEmbedding):
    """megatron-core's rotary embedding with LongRoPE's frequencies, chosen by the length of the sequence.

    As in Transformers (``longrope_frequency_update``), all positions of a sequence beyond the original length take the
    long factors, including the early ones.
    """

    inv_freq: torch.Tensor
    short_inv_freq: torch.Tensor
    long_inv_freq: torch.Tensor
    original_length: int

    def forward(self, max_seq_len: int, offset: int = 0, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the fp32 angles ``[max_seq_len, 1, 1, kv_channels]``, without those of other context-parallel ranks.

        The frequencies are chosen by setting ``inv_freq``, because MindSpeed's forward, which replaces megatron-core's
        for packed samples, reads that attribute and calls no method.
        """
        self._choose(max_seq_len + offset)
        return super().forward(max_seq_len, offset, *args, **kwargs)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Returns the fp32 angles ``[max_seq_len, kv_channels / 2]``."""
        self._choose(max_seq_len + offset)
        return super().get_freqs_non_repeated(max_seq_len, offset)

    def _choose(self, length: int) -> None:
        frequencies = self.long_inv_freq if length > self.original_length else self.short_inv_freq
        self.inv_freq = frequencies.to(self.inv_freq.device)


def _give_longrope(model: GPTModel, longrope: LongRope) -> None:
    """Makes the model's plain rotary embedding, which keeps its device and context-parallel group, a LongRoPE."""
    rope: Any = getattr(model, "rotary_pos_emb", None)
    channels = model.config.kv_channels
    if type(rope) is not RotaryEmbedding:
        raise ValueError(f"LongRoPE takes the place of plain RoPE, the model has {type(rope).__name__}")
    if rope.seq_len_interpolation_factor is not None:
        raise ValueError("LongRoPE does not go with --rotary-seq-len-interpolation-factor")
    if rope.inv_freq.numel() * 2 != channels or rope.rotary_interleaved:
        raise ValueError("LongRoPE needs --rotary-percent 1.0 and no --rotary-interleaved")
    if model.config.multi_latent_attention:
        raise ValueError("LongRoPE does not go with multi-latent attention")
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    rope.__class__ = LongRotaryEmbedding
    rope.original_length = longrope.original_max_position_embeddings
    rope.short_inv_freq, rope.long_inv_freq = (
        1.0 / (torch.tensor(factors, dtype=torch.float32) * model.rotary_base**exponents)
        for factors in (longrope.short_factor, longrope.long_factor)
    )


def _scale_output(factor: float, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output * factor


def _divide_input(divisor: float, module: torch.nn.Module, inputs: tuple) -> tuple:
    return (inputs[0] / divisor, *inputs[1:])


def _scaled_branch(bias_dropout_add: Callable, factor: float, training: bool, fused: bool) -> Callable:
    add = bias_dropout_add(training, fused)

    def scale_and_add(branch_and_bias: tuple, residual: torch.Tensor, dropout: float) -> torch.Tensor:
        branch, bias = branch_and_bias
        return add((branch * factor, None if bias is None else bias * factor), residual, dropout)

    return scale_and_add

# SPDX-License-Identifier: Apache-2.0
"""Estimate of the device memory of a rank, in bytes, by formula; docs/cluster.md derives it and states its accuracy.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
arXiv 2205.05198), with the paper's terms split up by tensor, so that they also hold for grouped query attention, SwiGLU
and heads that together are wider than the model. For the paper's model (multi-head, GELU, ffn = 4 h, dropout) they give
its numbers in bytes: s b h (10 + 24/t + 5 a s / (h t)) per layer, and s b h / t (34 + 5 a s / h) with sequence
parallelism (s: sequence length, b: micro-batch size, h: hidden size, a: attention heads, t: tensor-parallel size).

The paper counts fused kernels. The built-in loop computes norms, SwiGLU and softmax step by step, which keeps more:
these terms are counted tensor by tensor from what it saves, and a test compares them with it.
"""

import argparse
import math
from dataclasses import dataclass, fields
from typing import Any

from ...data.vocabulary import padded_vocab_size
from ...quantization import SPACES
from ...quantization.recipe import Recipe
from .shapes import Layout, Linear
from .teacher import Teacher

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """The memory of one rank at its peak, in bytes, by purpose."""

    # Parameters in the dtype of the forward. Those of ternary layers are the latent weights, or nothing if packed.
    weights: float
    # The quantized weights and their scales, and the scratch space of quantization:
    # - The weights are cached, or in the graphs of all micro-batches in flight. They need nothing of their own if the
    #   parameters hold them. Packed ones are 2-bit codes (wider in wider spaces), and the largest one unpacked.
    # - The torch backend needs fp32 scratch of the size of the largest weight. If the parameters hold the quantized
    #   weights, it needs this after the optimizer, so that only the excess over the activations counts.
    # - int8 GEMMs need the codes of all weights, one byte each; only those of the largest weight if the weights are
    #   packed or not kept.
    quantized: float
    gradients: float  # fp32 buffer (main_grad), one element per parameter
    # fp32 master weights (bf16 only) and Adam's two moments; divided over the data-parallel ranks if distributed.
    optimizer: float
    activations: float  # what the backward needs, for all micro-batches in flight
    logits: float  # logits of one micro-batch in the training dtype and in fp32, with the last norm; last stage only
    # Peak of one layer's backward, if unfused: a weight's gradient before it is added to the fp32 buffer, and gradients
    # of activations. Only the excess over the logits counts, which have been freed by then.
    backward: float
    # Buffers of the communicators. With gloo also the copy of the gradients that it reduces and scatters, as far as it
    # exceeds the activations, which have been freed by then.
    communication: float
    runtime: float  # driver, context and allocator: the number of the profile
    # A teacher that runs along: its weights, its outputs for micro-batches, and the buffers of the divergence.
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """The sum over all purposes, in bytes."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / GIB:.1f}" for f in fields(self) if getattr(self, f.name))
        return f"{self.total / GIB:.1f} GiB ({parts})"


@dataclass(frozen=True)
class Options:
    """Everything besides the layout that determines the memory: flags of the job, and facts that no flag gives."""

    bf16: bool
    sequence_parallel: bool
    use_distributed_optimizer: bool
    make_vocab_size_divisible_by: int = 128
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    ternary_cache: str = "auto"
    ternary_backend: str = "auto"
    ternary_gemm: str = "bf16"
    ternary_ramp_iters: int = 0
    flash_attention: bool = False  # whether attention never writes its scores to memory
    cpu: bool = False  # whether ranks are processes on CPUs, which use gloo and quantize block by block
    fused: bool = False  # whether norms, SwiGLU and softmax are single kernels that save only their inputs
    recipe: Recipe | None = None  # the recipe of a ternary job
    communicator_mib: float = 0.0  # buffers of one communicator, both directions, in MiB
    runtime_gib: float = 0.0
    teacher: Teacher | None = None  # the teacher of a student that has one

    @property
    def size(self) -> int:
        """The size of an element in the dtype of the forward, in bytes."""
        return 2 if self.bf16 else 4

    @property
    def cache(self) -> str:
        """Where quantized weights are kept; ``auto`` means ``resident`` in bf16 without a ramp, else ``step``."""
        automatic = "resident" if self.bf16 and not self.ternary_ramp_iters else "step"
        return automatic if self.ternary_cache == "auto" else self.ternary_cache

    @property
    def dropout(self) -> bool:
        """Whether there is any dropout."""
        return self.hidden_dropout > 0 or self.attention_dropout > 0


def options_of(args: argparse.Namespace, **others: Any) -> Options:
    """Returns the options of a job: the fields of :class:`Options` that are flags from ``args``, the others as given.

    Unless given, ``flash_attention`` is that of the built-in loop: torch's attention writes no scores without dropout.
    """
    flags = {f.name: getattr(args, f.name) for f in fields(Options) if f.name in args}
    return Options(**{**flags, "flash_attention": args.attention_dropout == 0, **others})


def estimate(layout: Layout, options: Options) -> tuple[int, Estimate]:
    """Returns the pipeline stage that needs the most memory, and the estimate for its ranks."""
    stages = [_stage(layout, options, stage) for stage in range(layout.pp)]
    peak = max(range(layout.pp), key=lambda stage: stages[stage].total)
    return peak, stages[peak]


def layer_activations(layout: Layout, options: Options) -> float:
    """Returns the bytes that a layer keeps for the backward of a micro-batch, without recomputation of whole layers."""
    h, t, size = layout.hidden, layout.tp, options.size
    attention, groups = layout.heads * layout.head_dim, layout.groups * layout.head_dim
    dropped = size + 1 if options.dropout else 0
    rotary = 0.0
    if options.fused:
        # q, k, v and the input of proj; the inner tensors of the ffn; the inputs of both norms, of qkv and of fc1.
        split = size * (2 * attention + 2 * groups) + size * layout.ffn * layout.topk * (3 if layout.gated else 2)
        whole = 4 * size * h
        score = size + dropped
    else:
        # k and v are repeated for all heads, or else v keeps the whole output of qkv alive; it always does if no scores
        # are kept, and then there is one logarithm per head. SwiGLU keeps five tensors, a norm two in fp32. Softmax is
        # in fp32. q and k each have cosines and sines of the positions.
        attended = size * (4 if layout.groups < layout.heads else 6) * attention
        if options.flash_attention:
            attended = size * 3 * (attention + groups) + 4 * layout.heads
        split = attended + size * layout.ffn * layout.topk * (5 if layout.gated else 3)
        rotary = size * 4 * layout.sequence / layout.cp * layout.head_dim
        whole = 2 * 2 * 4 * h + 2 * size * h
        score = size + 4 + dropped
    whole += 2 * h if options.dropout else 0
    kept = not options.flash_attention and options.recompute_granularity is None
    scores = layout.heads * layout.sequence * score if kept else 0.0
    return layout.tokens * (split / t + whole / _sharded(layout, options) + scores / t) + rotary


def _stage(layout: Layout, options: Options, stage: int) -> Estimate:
    first, last = stage == 0, stage == layout.pp - 1
    tokens, multiple = layout.vocab_size, options.make_vocab_size_divisible_by
    vocab = padded_vocab_size(tokens, multiple, layout.tp) if tokens else 0
    mine = layout.share(stage)
    dense, expert = layout.parameters(stage, vocab)
    state = 12 if options.bf16 else 8
    replicas = layout.dp * layout.cp if options.use_distributed_optimizer else 1
    # The logits in the training dtype and, for the loss, in fp32 (the gradient takes their place); the last norm.
    norm = (options.size if options.fused else 8) + options.size
    logits = (options.size + 4) * vocab / layout.tp + norm * layout.hidden / _sharded(layout, options)
    # One group for the world, and one for each parallel dimension (three for the pipeline).
    groups = 1 + sum(n > 1 for n in (layout.tp, layout.dp, layout.cp, layout.ep)) + (3 if layout.pp > 1 else 0)
    activations, loss = _in_flight(layout, options, stage), layout.tokens * logits if last else 0.0
    # The gradient of an embedding that is also the output layer waits for the end of the backward.
    waits = layout.tied and first and last and not options.fused
    waiting = options.size * vocab * layout.hidden / layout.tp if waits else 0.0
    backward = max(0.0, waiting + _layer_backward(layout, options) - loss)
    passing = activations + loss + backward
    quantized = _quantized(mine, layout, options, stage, passing)
    # A group of a single rank makes this copy, too.
    copied = waiting + 4 * (dense + expert) if options.cpu and options.use_distributed_optimizer else 0.0
    free = passing + (quantized if options.cache == "none" else 0.0)
    kept = dense + expert - (_ternary(mine, layout, options)[0] if options.cache == "packed" else 0)
    return Estimate(
        weights=options.size * kept,
        quantized=quantized,
        gradients=4 * (dense + expert),
        optimizer=state * (dense / replicas + expert / max(1, replicas / layout.ep)),
        activations=activations,
        logits=loss,
        backward=backward,
        communication=options.communicator_mib * 2**20 * (groups if layout.world > 1 else 0) + max(0.0, copied - free),
        runtime=options.runtime_gib * GIB,
        teacher=0.0 if options.teacher is None else options.teacher.nbytes(stage, vocab, options.size),
    )


def _layer_backward(layout: Layout, options: Options) -> float:
    """Returns the bytes that an MLP's backward adds at its peak to the kept activations; 0 for fused kernels."""
    if options.fused:
        return 0.0
    inner, outer = layout.ffn * layout.topk / layout.tp, layout.hidden
    wide = inner * (2 if layout.gated else 1)
    weight = layout.ffn * layout.hidden / layout.tp
    # At fc2: the gradients of its output, its input and its weight. At fc1: the same, but without the tensors between
    # fc1 and fc2, which have been freed.
    down = layout.tokens * (outer + inner) + weight
    between = inner * (5 if layout.gated else 3)
    up = layout.tokens * (2 * outer + wide - between) + weight * (2 if layout.gated else 1)
    return options.size * max(down, up)


def _quantized(mine: list[Linear], layout: Layout, options: Options, stage: int, passing: float) -> float:
    """Returns the bytes of the quantized weights and, for int8 GEMMs, of their codes and sums."""
    weights, scales, largest = _ternary(mine, layout, options)
    kept = options.cache in ("resident", "step")
    codes = 0.0 if options.ternary_gemm == "bf16" else weights + scales if kept else largest
    if options.ternary_gemm == "int8" and not options.cpu:
        # The int32 sums of one layer exist before they are scaled.
        codes += 4 * layout.tokens * max((linear.out_features for linear in mine), default=0) / layout.tp
    return codes + _values(weights, scales, largest, layout, options, stage, passing)


def _values(
    weights: float, scales: float, largest: float, layout: Layout, options: Options, stage: int, passing: float
) -> float:
    """Returns the bytes of the quantized weights, their scales and the scratch space, by the kind of cache.

    ``resident``: no copy, since the parameters hold the weights. ``step``: one copy. ``none``: the graphs hold one copy
    per micro-batch in flight; under uniform full recomputation only the copies of the layers being recomputed.
    ``packed``: every rank holds the codes of all its weights, and unpacks one weight at a time through a byte per code.
    ``passing``: the bytes that are free while the optimizer steps.
    """
    total = weights * options.size + scales
    if options.cache == "packed":
        return weights * _code_bits(options) / 8 + scales + (options.size + 1) * largest
    scratch = 4 * largest if options.ternary_backend in ("auto", "torch") and not options.cpu else 0.0
    if options.cache == "resident":
        replicas = layout.dp * layout.cp if options.use_distributed_optimizer else 1
        return scales / replicas + max(0.0, scratch - passing)
    if options.cache == "none":
        uniform = options.recompute_granularity == "full" and options.recompute_method != "block"
        again = min(1.0, (options.recompute_num_layers or 1) / layout.stage_layers)
        total *= again if uniform else _batches_in_flight(layout, stage)
    return total + scratch


def _code_bits(options: Options) -> int:
    """Returns the bits of a packed code; a bucket uses those of its widest space."""
    configs = (matcher.config for matcher in (options.recipe.matchers if options.recipe is not None else ()))
    return max((SPACES[config.space].code_bits for config in configs if config is not None), default=2)


def _ternary(mine: list[Linear], layout: Layout, options: Options) -> tuple[float, float, float]:
    """Returns the elements of a rank's quantized weights, the bytes of their scales, and the largest one's elements."""
    count, scales, largest = 0.0, 0.0, 0.0
    for linear in mine:
        matcher = options.recipe.decide(linear.path) if options.recipe is not None else None
        if matcher is None or matcher.config is None:
            continue
        weights = linear.weights / layout.tp / (layout.ep if linear.of_expert else 1)
        group = matcher.config.group_size if matcher.config.group_size > 0 else linear.in_features
        count += weights
        scales += weights / group * 2
        largest = max(largest, weights)
    return count, scales, largest


def _in_flight(layout: Layout, options: Options, stage: int) -> float:
    """Returns the bytes of activations of all micro-batches in flight on a stage, with recomputation."""
    kept, layers, again = layer_activations(layout, options), layout.stage_layers, options.recompute_num_layers or 1
    checkpointed = options.size * layout.tokens * layout.hidden / _sharded(layout, options)
    per_layer, working = layers * kept, 0.0
    if options.recompute_granularity == "full" and options.recompute_method == "block":
        # recompute_num_layers layers of a stage keep only their input, the others everything.
        some = min(again, layers)
        per_layer, working = some * checkpointed + (layers - some) * kept, kept
    elif options.recompute_granularity == "full":
        per_layer, working = math.ceil(layers / again) * checkpointed, again * kept
    batches = _batches_in_flight(layout, stage)
    embedding = checkpointed * batches if stage == 0 and options.dropout else 0
    return per_layer * batches + working + embedding


def _batches_in_flight(layout: Layout, stage: int) -> float:
    # One-forward-one-backward keeps pp - stage micro-batches; interleaving keeps a few more.
    batches = layout.pp - stage
    return batches * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)) if layout.vpp > 1 else batches


def _sharded(layout: Layout, options: Options) -> int:
    """Returns the factor by which sequence parallelism divides the tensors that tensor parallelism leaves whole."""
    return layout.tp if options.sequence_parallel else 1

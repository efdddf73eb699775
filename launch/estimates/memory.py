# SPDX-License-Identifier: Apache-2.0
"""How much device memory a rank needs, in bytes, by formula; docs/cluster.md derives it and says how good it is.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
arXiv 2205.05198), with the paper's terms taken apart by tensor, so that they hold for grouped query attention, SwiGLU
and heads that are together wider than the model. For the paper's model (multi-head, GELU, ffn = 4 h, dropout) they give
its numbers: s b h (10 + 24/t + 5 a s / (h t)) per layer, and s b h / t (34 + 5 a s / h) with sequence parallelism.
The paper counts fused kernels. Our own loop computes norms, SwiGLU and softmax step by step, which keeps more:
those terms are counted by tensor from what it saves, and a test holds them against it.
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
    """Bytes of one rank at its peak."""

    # Parameters in the dtype of the forward; of ternary layers these are the latent weights, and none if packed.
    weights: float
    # The quantized weights (cached, or in the graphs of all micro-batches in flight; none where the parameters hold
    # them; 2-bit codes if packed) and their scales, and the fp32 scratch of the largest one, which the torch backend
    # needs: where the parameters hold them, what it exceeds the activations by, for it is needed behind the optimizer.
    # Of packed ones the largest while it is unpacked. For int8 GEMMs the codes of all of them, a byte each; of packed
    # ones, and those that nothing is kept of, the codes of the largest.
    quantized: float
    gradients: float  # fp32 buffer (main_grad), one element per parameter
    # fp32 master weights (bf16 only) and Adam's two moments; divided over the data-parallel ranks if distributed.
    optimizer: float
    activations: float  # what the backward needs, of all micro-batches in flight
    logits: float  # of one micro-batch, in the training dtype and in fp32, with the last norm; last stage only
    # Of one layer, unfused, beyond the logits, which are gone by then: a weight's gradient before it is added to the
    # fp32 buffer, and gradients of activations.
    backward: float
    # Buffers of the communicators; over gloo also the copy of the gradients that it reduces and scatters, as far as
    # the activations, which are gone by then, have left no room for it.
    communication: float
    runtime: float  # driver, context, allocator: the profile's number
    # Of a teacher that runs along: its weights, what it has said of micro-batches, and the buffers of the divergence.
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / GIB:.1f}" for f in fields(self) if getattr(self, f.name))
        return f"{self.total / GIB:.1f} GiB ({parts})"


@dataclass(frozen=True)
class Options:
    """What besides the layout decides: flags of the job by name, and what no flag of our loop says."""

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
    cpu: bool = False  # whether ranks are processes on CPUs: they talk over gloo, and quantize block by block
    fused: bool = False  # whether norms, SwiGLU and softmax are single kernels that save their inputs alone
    recipe: Recipe | None = None  # of a ternary job
    communicator_mib: float = 0.0  # buffer of one communicator, both directions
    runtime_gib: float = 0.0
    teacher: Teacher | None = None  # of a student that has one

    @property
    def size(self) -> int:
        """Bytes of an element in the dtype of the forward."""
        return 2 if self.bf16 else 4

    @property
    def cache(self) -> str:
        """Where quantized weights are; ``auto`` finds nothing against resident ones but another dtype, or a ramp."""
        automatic = "resident" if self.bf16 and not self.ternary_ramp_iters else "step"
        return automatic if self.ternary_cache == "auto" else self.ternary_cache

    @property
    def dropout(self) -> bool:
        """Whether anything is dropped."""
        return self.hidden_dropout > 0 or self.attention_dropout > 0


def options_of(args: argparse.Namespace, **others: Any) -> Options:
    """The options of a job: its flags as ``args`` has them, the others of :class:`Options` as given.

    Unless it is told, attention is that of our own loop: torch's, which writes no scores where it drops none.
    """
    flags = {f.name: getattr(args, f.name) for f in fields(Options) if f.name in args}
    return Options(**{**flags, "flash_attention": args.attention_dropout == 0, **others})


def estimate(layout: Layout, options: Options) -> tuple[int, Estimate]:
    """The pipeline stage that needs most, and what its ranks need."""
    stages = [_stage(layout, options, stage) for stage in range(layout.pp)]
    peak = max(range(layout.pp), key=lambda stage: stages[stage].total)
    return peak, stages[peak]


def layer_activations(layout: Layout, options: Options) -> float:
    """Bytes that one layer keeps for the backward of one micro-batch, without recomputation of whole layers."""
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
        # k and v are repeated for all heads, or v holds the whole output of qkv, and always where no scores are kept,
        # beside a logarithm per head; SwiGLU keeps five tensors; a norm keeps two in fp32; softmax is in fp32; q and k
        # each have cosines and sines of the positions.
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
    # The world's group, and each parallel dimension's.
    groups = 1 + sum(n > 1 for n in (layout.tp, layout.dp, layout.cp, layout.ep)) + (3 if layout.pp > 1 else 0)
    activations, loss = _in_flight(layout, options, stage), layout.tokens * logits if last else 0.0
    # The gradient of an embedding that is the output layer, too, waits for the end of the backward.
    waits = layout.tied and first and last and not options.fused
    waiting = options.size * vocab * layout.hidden / layout.tp if waits else 0.0
    backward = max(0.0, waiting + _layer_backward(layout, options) - loss)
    passing = activations + loss + backward
    quantized = _quantized(mine, layout, options, stage, passing)
    # A group of one is no exception.
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
    """What the backward of one layer's MLP adds at its peak to the activations that are kept; fused, nothing."""
    if options.fused:
        return 0.0
    inner, outer = layout.ffn * layout.topk / layout.tp, layout.hidden
    wide = inner * (2 if layout.gated else 1)
    weight = layout.ffn * layout.hidden / layout.tp
    # At fc2 the gradients of its output, its input and its weight; at fc1 the same, and what lies between is gone.
    down = layout.tokens * (outer + inner) + weight
    between = inner * (5 if layout.gated else 3)
    up = layout.tokens * (2 * outer + wide - between) + weight * (2 if layout.gated else 1)
    return options.size * max(down, up)


def _quantized(mine: list[Linear], layout: Layout, options: Options, stage: int, passing: float) -> float:
    """The quantized weights and, for int8 GEMMs, their codes and sums."""
    weights, scales, largest = _ternary(mine, layout, options)
    kept = options.cache in ("resident", "step")
    codes = 0.0 if options.ternary_gemm == "bf16" else weights + scales if kept else largest
    if options.ternary_gemm == "int8" and not options.cpu:
        # The int32 sums of one layer, before they are scaled.
        codes += 4 * layout.tokens * max((linear.out_features for linear in mine), default=0) / layout.tp
    return codes + _values(weights, scales, largest, layout, options, stage, passing)


def _values(
    weights: float, scales: float, largest: float, layout: Layout, options: Options, stage: int, passing: float
) -> float:
    """No copy of a weight that its parameter holds, one where it is cached; else the graphs hold one per micro-batch in
    flight, and under uniform full recomputation those of the layers that are being recomputed. Packed weights are all
    on every rank, and unpacked one at a time, by way of a byte each.

    ``passing`` are the bytes that are free while the optimizer steps.
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
    """Bits of a packed code: a bucket has those of its widest space."""
    configs = (matcher.config for matcher in (options.recipe.matchers if options.recipe is not None else ()))
    return max((SPACES[config.space].code_bits for config in configs if config is not None), default=2)


def _ternary(mine: list[Linear], layout: Layout, options: Options) -> tuple[float, float, float]:
    """Of the quantized weights of a rank: how many, the bytes of their scales, and how many the largest has."""
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
    """One-forward-one-backward keeps ``pp - stage`` micro-batches; interleaving a few more."""
    kept, layers, again = layer_activations(layout, options), layout.stage_layers, options.recompute_num_layers or 1
    checkpointed = options.size * layout.tokens * layout.hidden / _sharded(layout, options)
    per_layer, working = layers * kept, 0.0
    if options.recompute_granularity == "full" and options.recompute_method == "block":
        # That many layers of a stage keep only their input, the others everything.
        some = min(again, layers)
        per_layer, working = some * checkpointed + (layers - some) * kept, kept
    elif options.recompute_granularity == "full":
        per_layer, working = math.ceil(layers / again) * checkpointed, again * kept
    batches = _batches_in_flight(layout, stage)
    embedding = checkpointed * batches if stage == 0 and options.dropout else 0
    return per_layer * batches + working + embedding


def _batches_in_flight(layout: Layout, stage: int) -> float:
    batches = layout.pp - stage
    return batches * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)) if layout.vpp > 1 else batches


def _sharded(layout: Layout, options: Options) -> int:
    """By how much sequence parallelism divides what tensor parallelism leaves whole."""
    return layout.tp if options.sequence_parallel else 1

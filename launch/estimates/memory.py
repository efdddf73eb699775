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

from ...data.vocabulary import padded_vocab_size
from ...quantization.recipe import Recipe
from .shapes import Layout, Linear

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank at its peak.

    Attributes:
        weights: parameters in the dtype of the forward; of ternary layers these are the latent weights.
        quantized: the quantized weights (cached, or in the graphs of all micro-batches in flight) and their scales, and
            the fp32 scratch of the largest one, which the torch backend needs.
        gradients: fp32 buffer (``main_grad``), one element per parameter.
        optimizer: fp32 master weights (bf16 only) and Adam's two moments; divided by the data-parallel ranks with the
            distributed optimizer.
        activations: what the backward needs, of all micro-batches in flight.
        logits: of one micro-batch, in the training dtype and in fp32, with the last norm; last stage only.
        communication: buffers of the communicators.
        runtime: driver, context, allocator: the profile's number.
    """

    weights: float
    quantized: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    communication: float
    runtime: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name) / GIB:.1f}" for f in fields(self) if getattr(self, f.name))
        return f"{self.total / GIB:.1f} GiB ({parts})"


@dataclass(frozen=True)
class Options:
    """What besides the layout decides: switches of the job, in the words of its flags."""

    bf16: bool
    sequence_parallel: bool
    distributed_optimizer: bool
    flash_attention: bool
    fused: bool
    dropout: bool
    recompute: str | None
    recompute_method: str | None
    recompute_layers: int
    pad_to: int
    recipe: Recipe | None
    keep_quantized: bool
    communicator_mib: float
    runtime_gib: float


def options_of(
    args: argparse.Namespace,
    recipe: Recipe | None,
    flash: bool,
    fused: bool,
    communicator_mib: float,
    runtime_gib: float,
) -> Options:
    """The options of a job.

    Args:
        args: of the job.
        recipe: of a ternary job, else None.
        flash: whether attention never writes its scores to memory.
        fused: whether norms, SwiGLU and softmax are single kernels that save their inputs alone.
        communicator_mib: buffer of one communicator, both directions.
        runtime_gib: see :class:`Estimate`.
    """
    return Options(
        bf16=args.bf16,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        flash_attention=flash,
        fused=fused,
        dropout=args.hidden_dropout > 0 or args.attention_dropout > 0,
        recompute=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_layers=args.recompute_num_layers or 1,
        pad_to=args.make_vocab_size_divisible_by,
        recipe=recipe,
        keep_quantized=args.ternary_cache == "step",
        communicator_mib=communicator_mib,
        runtime_gib=runtime_gib,
    )


def estimate(layout: Layout, options: Options) -> tuple[int, Estimate]:
    """The pipeline stage that needs most, and what its ranks need."""
    stages = [_stage(layout, options, stage) for stage in range(layout.pp)]
    peak = max(range(layout.pp), key=lambda stage: stages[stage].total)
    return peak, stages[peak]


def layer_activations(layout: Layout, options: Options) -> float:
    """Bytes that one layer keeps for the backward of one micro-batch, without recomputation of whole layers."""
    s, b, h, t = layout.sequence / layout.cp, layout.micro_batch, layout.hidden, layout.tp
    size = 2 if options.bf16 else 4
    attention, groups = layout.heads * layout.head_dim, layout.groups * layout.head_dim
    dropped = size + 1 if options.dropout else 0
    if options.fused:
        # q, k, v and the input of proj; the inner tensors of the ffn; the inputs of both norms, of qkv and of fc1.
        split = size * (2 * attention + 2 * groups) + size * layout.ffn * layout.topk * (3 if layout.gated else 2)
        whole = 4 * size * h
        score = size + dropped
    else:
        # k and v are repeated for all heads; SwiGLU keeps five tensors; a norm keeps two in fp32; softmax is in fp32.
        split = size * 4 * attention + size * layout.ffn * layout.topk * (5 if layout.gated else 3)
        whole = 2 * 2 * 4 * h + 2 * size * h
        score = size + 4 + dropped
    whole += 2 * h if options.dropout else 0
    scores = 0.0
    if not options.flash_attention and options.recompute is None:
        scores = layout.heads * layout.sequence * score
    return s * b * (split / t + whole / (t if options.sequence_parallel else 1) + scores / t)


def _stage(layout: Layout, options: Options, stage: int) -> Estimate:
    size = 2 if options.bf16 else 4
    first, last = stage == 0, stage == layout.pp - 1
    layers = math.ceil(layout.layers / layout.pp)
    vocab = padded_vocab_size(layout.vocab_size, options.pad_to, layout.tp) if layout.vocab_size else 0
    # The layers of a stage are alike, up to the recipe: take the numbers that a contiguous share has.
    mine = [
        x for layer in range(stage * layers, min((stage + 1) * layers, layout.layers)) for x in layout.linears(layer)
    ]
    expert = sum(x.weights for x in mine if ".experts." in x.path) / layout.tp / layout.ep
    dense = sum(x.weights for x in mine if ".experts." not in x.path) / layout.tp
    dense += 2 * layout.hidden * layers + (layout.hidden if last else 0)
    embeddings = int(first) + int(last and (not layout.tied or layout.pp > 1))
    dense += embeddings * vocab * layout.hidden / layout.tp
    parameters = dense + expert

    state = 12 if options.bf16 else 8
    if options.distributed_optimizer:
        replicas = layout.dp * layout.cp
        optimizer = state * (dense / replicas + expert / max(1, replicas / layout.ep))
    else:
        optimizer = state * parameters
    return Estimate(
        weights=size * parameters,
        quantized=_quantized(mine, layout, options, size, stage),
        gradients=4 * parameters,
        optimizer=optimizer,
        activations=_in_flight(layout, options, stage, layers, size),
        logits=_head(layout, options, vocab, size) if last else 0,
        communication=options.communicator_mib * 2**20 * _communicators(layout),
        runtime=options.runtime_gib * GIB,
    )


def _head(layout: Layout, options: Options, vocab: int, size: int) -> float:
    """The logits in the training dtype and, for the loss, in fp32 (the gradient takes their place); the last norm."""
    norm = (size if options.fused else 8) + size
    sharded = layout.tp if options.sequence_parallel else 1
    tokens = layout.sequence / layout.cp * layout.micro_batch
    return tokens * ((size + 4) * vocab / layout.tp + norm * layout.hidden / sharded)


def _quantized(mine: list[Linear], layout: Layout, options: Options, size: int, stage: int) -> float:
    """One copy of each weight where it is cached; else the graphs hold one per micro-batch in flight, and under uniform
    full recomputation those of the layers that are being recomputed."""
    if options.recipe is None:
        return 0.0
    total, largest = 0.0, 0.0
    for linear in mine:
        matcher = options.recipe.decide(linear.path)
        if matcher is None or matcher.config is None:
            continue
        weights = linear.weights / layout.tp / (layout.ep if ".experts." in linear.path else 1)
        group = matcher.config.group_size if matcher.config.group_size > 0 else linear.in_features
        total += weights * size + weights / group * 2
        largest = max(largest, weights)
    if not options.keep_quantized:
        uniform = options.recompute == "full" and options.recompute_method != "block"
        layers = math.ceil(layout.layers / layout.pp)
        total *= min(1.0, options.recompute_layers / layers) if uniform else _batches_in_flight(layout, stage)
    return total + 4 * largest


def _in_flight(layout: Layout, options: Options, stage: int, layers: int, size: int) -> float:
    """One-forward-one-backward keeps ``pp - stage`` micro-batches; interleaving a few more."""
    kept = layer_activations(layout, options)
    sharded = layout.tp if options.sequence_parallel else 1
    checkpointed = size * layout.sequence / layout.cp * layout.micro_batch * layout.hidden / sharded
    per_layer = layers * kept
    working = 0.0
    if options.recompute == "full":
        if options.recompute_method == "block":
            # That many layers of a stage keep only their input, the others everything.
            some = min(options.recompute_layers, layers)
            per_layer = some * checkpointed + (layers - some) * kept
            working = kept
        else:
            chunks = math.ceil(layers / options.recompute_layers)
            per_layer = chunks * checkpointed
            working = options.recompute_layers * kept
    batches = _batches_in_flight(layout, stage)
    embedding = checkpointed * batches if stage == 0 and options.dropout else 0
    return per_layer * batches + working + embedding


def _batches_in_flight(layout: Layout, stage: int) -> float:
    batches = layout.pp - stage
    return batches * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)) if layout.vpp > 1 else batches


def _communicators(layout: Layout) -> int:
    """Groups that exchange tensors: the world's, and each parallel dimension's."""
    if layout.world <= 1:
        return 0
    return 1 + sum(n > 1 for n in (layout.tp, layout.dp, layout.cp, layout.ep)) + (3 if layout.pp > 1 else 0)

# SPDX-License-Identifier: Apache-2.0
"""What ternary pretraining should take beside BF16, by formula: time, memory and communication of a step.

The quantizer is bound by memory and the GEMMs by arithmetic. One quantization of `Q` weights moves `B Q` bytes (fused:
4 + 2 per scale), a micro-batch of `T` tokens takes `6 T Q` FLOP in the same linears, so that the quantizer takes
`B F / (6 T BW)` of their time: whatever the model's size, and whatever TP (but for the scales of rows that it cuts).
Quantized once per optimizer step, it is divided by the number of micro-batches. Around this a step has attention,
output layer, optimizer and communication.
Each rank takes the scales of its own shard: nothing is sent for them (docs/quantizer.md).

What is added up does not overlap in the model: the step is an upper bound of its time, and `overhead` (of the whole
step) a lower bound beside `of_gemms` (of the ternary linears alone), an upper one.
"""

from dataclasses import dataclass, replace

from bitcpm_megatron.launch.estimates.memory import Estimate, Options, estimate, layer_activations
from bitcpm_megatron.launch.estimates.shapes import Linear
from cost.workload import ADAM_BYTES, BYTES, PAD_TO, QUANTIZER_BYTES, Machine, Workload, flops_per_token


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind in a step of one rank.

    Attributes:
        purpose: in words.
        operation: ``all-reduce``, ``reduce-scatter``, ``all-gather`` or ``exchange`` (one send or one receive).
        ranks: of the group; a group of one is counted where Megatron hands its tensor over all the same.
        payload: bytes of the tensor, of a gather and of a scatter the whole one.
        count: per step.
    """

    purpose: str
    operation: str
    ranks: int
    payload: float
    count: int

    @property
    def bytes(self) -> float:
        """Payload per step."""
        return self.payload * self.count

    @property
    def wire_bytes(self) -> float:
        """What a rank sends over its link in a step: with a ring, (t - 1) / t of the payload, twice for all-reduce."""
        if self.operation == "exchange":
            return self.bytes / 2  # a receive goes the other way at the same time
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.operation == "all-reduce" else 1)


@dataclass(frozen=True)
class Prediction:
    """One step of the rank that has most to do.

    Attributes:
        gemm_seconds: of the ternary linears, forward and backward, all micro-batches, without the pipeline's bubble.
        compute_seconds: these, attention, output layer, recomputation and everything elementwise, with the bubble.
        optimizer_seconds: of one optimizer step.
        communication_seconds: as if nothing of it overlapped.
        quantizer_seconds: of all quantizations, without the bubble.
        quantizer_step_seconds: by which a step gets longer: stages quantize one after the other when they first run.
        quantizations: of each weight.
        memory: of the ternary run, formula parts only (no communicator buffers, no runtime); ``quantized`` is what
            stays: the quantized weights that are alive at once, and their scales.
        scale_bytes: of ``memory.quantized``, the scales.
        communication_bytes: payload handed to collectives per step, BF16 and ternary alike.
        wire_bytes: what of that a rank sends over its link; nothing in a group of one.
        model_flops: per rank (the mean of all) and step, as Megatron-LM counts them.
    """

    gemm_seconds: float
    compute_seconds: float
    optimizer_seconds: float
    communication_seconds: float
    quantizer_seconds: float
    quantizer_step_seconds: float
    quantizations: int
    memory: Estimate
    scale_bytes: float
    communication_bytes: float
    wire_bytes: float
    model_flops: float

    @property
    def bf16_seconds(self) -> float:
        """Of a BF16 step."""
        return self.compute_seconds + self.optimizer_seconds + self.communication_seconds

    @property
    def ternary_seconds(self) -> float:
        """Of a ternary step."""
        return self.bf16_seconds + self.quantizer_step_seconds

    @property
    def overhead(self) -> float:
        """Fraction by which a ternary step is longer than a BF16 step."""
        return self.quantizer_step_seconds / self.bf16_seconds

    @property
    def of_gemms(self) -> float:
        """Quantizer over the GEMMs of the linears that it quantizes: B F / (6 T BW), divided by n if cached."""
        return self.quantizer_seconds / self.gemm_seconds

    @property
    def extra_bytes(self) -> float:
        """Memory that a ternary run needs more than a BF16 run."""
        return self.memory.quantized


def predict(machine: Machine, workload: Workload) -> Prediction:
    """What a step of a workload should cost on a machine."""
    n, pp = workload.micro_batches, workload.layout.pp
    slots = (n + pp - 1) / n  # of one-forward-one-backward, fill and drain included
    exchanges = collectives(workload)
    wire = sum(c.wire_bytes for c in exchanges)
    once = _quantization_seconds(machine, workload)
    passes = workload.quantizations
    memory = _memory(workload)
    replicas = _replicas(workload)
    parameters = memory.gradients / 4
    linear, other = _flops(workload)
    optimizer = parameters / replicas * ADAM_BYTES
    elementwise = _saved_bytes(workload) / machine.saved_bandwidth if machine.saved_bandwidth else 0.0
    return Prediction(
        gemm_seconds=n * linear / machine.achieved_flops,
        compute_seconds=n * slots * ((linear + other) / machine.achieved_flops + elementwise),
        optimizer_seconds=optimizer / (machine.optimizer_bandwidth or machine.memory_bandwidth),
        communication_seconds=wire / machine.link_bandwidth,
        quantizer_seconds=passes * once,
        # Cached or not, a stage quantizes when its first micro-batch arrives, which waited for the stages before.
        # Resident weights are quantized behind the optimizer, by all stages at once.
        quantizer_step_seconds=(passes + (pp - 1) * {"step": passes, "none": passes / n}.get(workload.cache, 0)) * once,
        quantizations=passes,
        memory=memory,
        scale_bytes=_scale_bytes(workload),
        communication_bytes=sum(c.bytes for c in exchanges),
        wire_bytes=wire,
        model_flops=flops_per_token(workload.layout) * workload.tokens * n / (workload.layout.tp * pp),
    )


def _replicas(workload: Workload) -> int:
    """Ranks that share what belongs to the optimizer."""
    return workload.layout.dp if workload.distributed_optimizer else 1


def collectives(workload: Workload) -> list[Collective]:
    """What a rank of the last pipeline stage hands to collectives in a step; of more than two stages, an upper bound.

    Tensor parallelism, per layer and micro-batch: two all-reduces of the activations forward (after proj and fc2) and
    two backward (before qkv and fc1). With sequence parallelism each is a reduce-scatter and an all-gather instead, and
    the inputs of qkv and fc1 are gathered once more for their weight gradients. Full recomputation repeats the forward.
    """
    shape, n, t, pp = workload.layout, workload.micro_batches, workload.layout.tp, workload.layout.pp
    activation = workload.tokens * shape.hidden * BYTES
    # Megatron hands the loss's three reductions of fp32 numbers per token over in a group of one, too.
    found = [Collective("loss", "all-reduce", t, 4.0 * workload.tokens, 3 * n)]
    forward = 2 * workload.layers * (2 if workload.recompute == "full" else 1)
    backward = 2 * workload.layers
    embedding = 1 if pp == 1 else 0  # else it is on another stage than the output layer
    if t > 1 and workload.sequence_parallel:
        # Embedding: scattered forward, gathered backward. Output layer: gathered twice, scattered backward.
        scatters, gathers = n * (forward + backward + 1 + embedding), n * (forward + 2 * backward + 2 + embedding)
        found.append(Collective("tensor parallel", "reduce-scatter", t, activation, scatters))
        found.append(Collective("tensor parallel", "all-gather", t, activation, gathers))
        norms = 4.0 * shape.hidden * (2 * workload.layers + 1)
        found.append(Collective("gradients of norms", "all-reduce", t, norms, 1))
    elif t > 1:
        found.append(
            Collective("tensor parallel", "all-reduce", t, activation, n * (forward + backward + 1 + embedding))
        )
    if pp > 1:
        sharded = t if workload.sequence_parallel else 1
        # An activation and a gradient per boundary, sent here and received there.
        boundaries = 1 if pp == 2 else 2
        found.append(Collective("pipeline", "exchange", 2, activation / sharded, 2 * boundaries * n))
        if shape.tied:
            tied = 4.0 * workload.vocabulary * shape.hidden / t
            found.append(Collective("gradient of the tied embedding", "all-reduce", 2, tied, 1))
    return found + _data_parallel(workload)


def _data_parallel(workload: Workload) -> list[Collective]:
    """Gradients are reduced in fp32, and with the distributed optimizer parameters gathered in their own dtype."""
    parameters = _memory(workload).gradients / 4
    dp = workload.layout.dp
    if not workload.distributed_optimizer:
        return [Collective("gradients", "all-reduce", dp, 4 * parameters, 1)]
    return [
        Collective("gradients", "reduce-scatter", dp, 4 * parameters, 1),
        Collective("parameters", "all-gather", dp, BYTES * parameters, 1),
    ]


def _flops(workload: Workload) -> tuple[float, float]:
    """FLOP of a micro-batch on a rank of the largest stage: ternary linears; all else, and what is recomputed.

    Causal attention is half of the square of scores, but kernels that are not fused compute the whole square.
    """
    shape, tokens = workload.layout, workload.tokens
    linear = 6.0 * tokens * workload.quantized_weights
    scores = tokens * shape.sequence * shape.heads * shape.head_dim * workload.layers / shape.tp
    attention = (6.0 if workload.fused_kernels else 12.0) * scores
    head = 6.0 * tokens * workload.vocabulary * shape.hidden / shape.tp
    again = attention / 3 if workload.recompute else 0.0
    again += linear / 3 if workload.recompute == "full" else 0.0
    return linear, attention + head + again


def _quantization_seconds(machine: Machine, workload: Workload) -> float:
    """One quantization of all weights of a rank, or of its shard; a small weight takes as long as its launch."""
    total = 0.0
    # Layers are alike: one of them, as often as there are.
    for linear in workload.layout.linears(0):
        moved = linear.weights / workload.layout.tp * QUANTIZER_BYTES[workload.quantizer]
        moved += BYTES * _scales(workload, linear)
        seconds = moved / machine.memory_bandwidth * (machine.quantizer_copies if workload.quantizer == "fused" else 1)
        if workload.cache == "resident":
            seconds /= _replicas(workload)
        total += max(seconds, machine.launch_us * 1e-6)
    return total * workload.layers


def _scales(workload: Workload, linear: Linear) -> float:
    """Of a rank's shard. A whole row is a group; tensor parallelism cuts the rows of row-parallel weights."""
    tp = workload.layout.tp
    row = linear.in_features / (tp if linear.row_parallel else 1)
    return linear.weights / tp / (workload.group_size if workload.group_size > 0 else row)


def _scale_bytes(workload: Workload) -> float:
    found = BYTES * sum(_scales(workload, linear) for linear in workload.layout.linears(0)) * workload.layers
    return found / _replicas(workload) if workload.cache == "resident" else found


def _memory(workload: Workload) -> Estimate:
    """The launcher's estimate, with the quantized weights that are alive at once in place of its own.

    That one counts the scratch of the torch backend, and one weight only where nothing is cached. But autograd keeps
    what a linear multiplied with until its backward: uncached, one copy of every weight per micro-batch in flight.
    """
    _, found = estimate(workload.layout, _options(workload))
    copies = 0.0 if workload.cache == "resident" else 1.0
    if workload.cache == "none" and workload.recompute == "full":
        copies = 1 / workload.layers
    elif workload.cache == "none":
        copies = min(workload.micro_batches, workload.layout.pp)
    quantized = copies * BYTES * workload.quantized_weights
    return replace(found, quantized=quantized + _scale_bytes(workload))


def _options(workload: Workload) -> Options:
    return Options(
        bf16=True,
        sequence_parallel=workload.sequence_parallel and workload.layout.tp > 1,
        use_distributed_optimizer=workload.distributed_optimizer,
        make_vocab_size_divisible_by=PAD_TO,
        recompute_granularity=workload.recompute,
        recompute_method="uniform" if workload.recompute == "full" else None,
        flash_attention=workload.fused_kernels,
        fused=workload.fused_kernels,
    )


def _saved_bytes(workload: Workload) -> float:
    """Bytes that a micro-batch saves for its backward, which is what elementwise work is measured by."""
    options = replace(_options(workload), recompute_granularity=None)
    _, found = estimate(workload.layout, options)
    return workload.layers * layer_activations(workload.layout, options) + found.logits

# SPDX-License-Identifier: Apache-2.0
"""Cost model of ternary pretraining compared with BF16: time, memory and communication of a step by formula.

The quantizer is bound by memory, the GEMMs by arithmetic. One quantization of `Q` weights moves `B Q` bytes, where `B`
is the number of bytes per weight (fused: 4, plus 2 per scale). A micro-batch of `T` tokens takes `6 T Q` FLOP in the
same linears. With `F` FLOP/s and a memory bandwidth of `BW` bytes/s, the quantizer takes the fraction `B F / (6 T BW)`
of their time. It does not depend on the size of the model, nor on the tensor-parallel size (except for the scales of
rows that tensor parallelism cuts). If weights are quantized once per optimizer step, the fraction is divided by the
number `n` of micro-batches. In addition, a step has attention, output layer, optimizer and communication.
Each rank computes the scales of its own shard, so that nothing is sent for them (docs/quantizer.md).

The model adds up times as if nothing overlapped: the predicted step time is an upper bound. `overhead`, relative to the
whole step, is thus a lower bound; `of_gemms`, relative to only the ternary linears, is an upper bound.
"""

from dataclasses import dataclass, replace

from bitcpm_megatron.launch.estimates.memory import Estimate, Options, estimate, layer_activations
from bitcpm_megatron.launch.estimates.shapes import Linear
from cost.workload import ADAM_BYTES, BYTES, PAD_TO, QUANTIZER_BYTES, Machine, Workload, flops_per_token


@dataclass(frozen=True)
class Collective:
    """Communication of one kind in a step of one rank.

    Attributes:
        purpose: a description of the purpose.
        operation: ``all-reduce``, ``reduce-scatter``, ``all-gather`` or ``exchange`` (one send or one receive).
        ranks: the size of the group; groups of one are counted if Megatron calls the collective for them, too.
        payload: the bytes of the tensor; for a gather and a scatter those of the whole tensor.
        count: the number of operations per step.
    """

    purpose: str
    operation: str
    ranks: int
    payload: float
    count: int

    @property
    def bytes(self) -> float:
        """Payload per step in bytes."""
        return self.payload * self.count

    @property
    def wire_bytes(self) -> float:
        """Bytes that a rank sends over its link in a step, with ring algorithms in groups of t ranks.

        They are (t - 1) / t of the payload, twice that for an all-reduce, and half of the payload for an exchange.
        """
        if self.operation == "exchange":
            return self.bytes / 2  # half of the exchanges are receives, which use the other direction at the same time
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.operation == "all-reduce" else 1)


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one step of the rank that has the most work.

    Attributes:
        gemm_seconds: the time of the ternary linears, forward and backward, for all micro-batches, without the pipeline
            bubble.
        compute_seconds: the time of these, attention, output layer, recomputation and elementwise operations, with the
            pipeline bubble.
        optimizer_seconds: the time of one optimizer step.
        communication_seconds: the time of the communication if nothing overlaps it.
        quantizer_seconds: the time of all quantizations, without the pipeline bubble.
        quantizer_step_seconds: the time that quantization adds to a step: pipeline stages quantize one after another,
            when they first run.
        quantizations: the number of quantizations of each weight.
        memory: the memory of the ternary run by formula (without communicator buffers and runtime); its ``quantized``
            counts the quantized weights that are alive at once, and their scales.
        scale_bytes: the bytes of the scales within ``memory.quantized``.
        communication_bytes: the payload handed to collectives per step, the same for BF16 and ternary.
        wire_bytes: the bytes of it that a rank sends over its link; none for a group of one.
        model_flops: the FLOP per rank (mean over all ranks) and step, as Megatron-LM counts them.
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
        """Time of a BF16 step."""
        return self.compute_seconds + self.optimizer_seconds + self.communication_seconds

    @property
    def ternary_seconds(self) -> float:
        """Time of a ternary step."""
        return self.bf16_seconds + self.quantizer_step_seconds

    @property
    def overhead(self) -> float:
        """Fraction by which a ternary step is longer than a BF16 step."""
        return self.quantizer_step_seconds / self.bf16_seconds

    @property
    def of_gemms(self) -> float:
        """Time of the quantizer divided by that of the quantized linears' GEMMs: B F / (6 T BW), over n if cached."""
        return self.quantizer_seconds / self.gemm_seconds

    @property
    def extra_bytes(self) -> float:
        """Bytes of memory that a ternary run needs in addition to those of a BF16 run."""
        return self.memory.quantized


def predict(machine: Machine, workload: Workload) -> Prediction:
    """Predicts the cost of a step of a workload on a machine."""
    n, pp = workload.micro_batches, workload.layout.pp
    slots = (n + pp - 1) / n  # slots of the one-forward-one-backward schedule per micro-batch, with fill and drain
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
        # With cache step or none, a stage quantizes when its first micro-batch arrives, which has waited for the
        # quantization of the stages before. Resident weights are quantized after the optimizer, by all stages at once.
        quantizer_step_seconds=(passes + (pp - 1) * {"step": passes, "none": passes / n}.get(workload.cache, 0)) * once,
        quantizations=passes,
        memory=memory,
        scale_bytes=_scale_bytes(workload),
        communication_bytes=sum(c.bytes for c in exchanges),
        wire_bytes=wire,
        model_flops=flops_per_token(workload.layout) * workload.tokens * n / (workload.layout.tp * pp),
    )


def _replicas(workload: Workload) -> int:
    """Returns the number of ranks over which the optimizer's state is divided."""
    return workload.layout.dp if workload.distributed_optimizer else 1


def collectives(workload: Workload) -> list[Collective]:
    """Returns the communication in a step of a rank of the last pipeline stage.

    For more than two stages it is an upper bound. Tensor parallelism has, per layer and micro-batch, two all-reduces of
    the activations in the forward pass (after proj and fc2) and two in the backward pass (before qkv and fc1). With
    sequence parallelism each is a reduce-scatter and an all-gather instead, and the inputs of qkv and fc1 are gathered
    once more for their weight gradients. Full recomputation repeats the forward pass.
    """
    shape, n, t, pp = workload.layout, workload.micro_batches, workload.layout.tp, workload.layout.pp
    activation = workload.tokens * shape.hidden * BYTES
    # The loss has three reductions of one fp32 number per token, which Megatron also calls in a group of one.
    found = [Collective("loss", "all-reduce", t, 4.0 * workload.tokens, 3 * n)]
    forward = 2 * workload.layers * (2 if workload.recompute == "full" else 1)
    backward = 2 * workload.layers
    embedding = 1 if pp == 1 else 0  # with more stages, it is on another stage than the output layer
    if t > 1 and workload.sequence_parallel:
        # The embedding is scattered forward and gathered backward; the output layer's input is gathered twice, and its
        # gradient is scattered.
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
        # Each boundary between stages has an activation and a gradient; a rank sends one and receives the other.
        boundaries = 1 if pp == 2 else 2
        found.append(Collective("pipeline", "exchange", 2, activation / sharded, 2 * boundaries * n))
        if shape.tied:
            tied = 4.0 * workload.vocabulary * shape.hidden / t
            found.append(Collective("gradient of the tied embedding", "all-reduce", 2, tied, 1))
    return found + _data_parallel(workload)


def _data_parallel(workload: Workload) -> list[Collective]:
    """Returns the data-parallel communication of a step.

    Gradients are reduced in fp32, and with the distributed optimizer parameters are gathered in bf16.
    """
    parameters = _memory(workload).gradients / 4
    dp = workload.layout.dp
    if not workload.distributed_optimizer:
        return [Collective("gradients", "all-reduce", dp, 4 * parameters, 1)]
    return [
        Collective("gradients", "reduce-scatter", dp, 4 * parameters, 1),
        Collective("parameters", "all-gather", dp, BYTES * parameters, 1),
    ]


def _flops(workload: Workload) -> tuple[float, float]:
    """Returns the FLOP of a micro-batch on a rank of the largest stage: ternary linears, and everything else.

    The latter includes recomputation. Causal attention needs half of the square of scores, but kernels that are not
    fused compute the whole square.
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
    """Returns the seconds of one quantization of a rank's weights (resident: of its data-parallel shard of them).

    A small weight takes as long as its launch.
    """
    total = 0.0
    # All layers have the same shapes, so one of them is computed and multiplied.
    for linear in workload.layout.linears(0):
        moved = linear.weights / workload.layout.tp * QUANTIZER_BYTES[workload.quantizer]
        moved += BYTES * _scales(workload, linear)
        seconds = moved / machine.memory_bandwidth * (machine.quantizer_copies if workload.quantizer == "fused" else 1)
        if workload.cache == "resident":
            seconds /= _replicas(workload)
        total += max(seconds, machine.launch_us * 1e-6)
    return total * workload.layers


def _scales(workload: Workload, linear: Linear) -> float:
    """Returns the number of scales of a rank's shard; without a group size, one for each row of the shard.

    Tensor parallelism cuts the rows of row-parallel weights.
    """
    tp = workload.layout.tp
    row = linear.in_features / (tp if linear.row_parallel else 1)
    return linear.weights / tp / (workload.group_size if workload.group_size > 0 else row)


def _scale_bytes(workload: Workload) -> float:
    found = BYTES * sum(_scales(workload, linear) for linear in workload.layout.linears(0)) * workload.layers
    return found / _replicas(workload) if workload.cache == "resident" else found


def _memory(workload: Workload) -> Estimate:
    """Returns the launcher's memory estimate, with the quantized weights that are alive at once instead of its own.

    The launcher counts the scratch memory of the torch backend, and only one weight if nothing is cached. But autograd
    keeps the weight of a linear until its backward pass: without a cache, these are one copy of every weight per
    micro-batch in flight.
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
    """Returns the bytes that a micro-batch saves for its backward pass, to which elementwise work is proportional."""
    options = replace(_options(workload), recompute_granularity=None)
    _, found = estimate(workload.layout, options)
    return workload.layers * layer_activations(workload.layout, options) + found.logits

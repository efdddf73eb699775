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

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bitcpm_megatron.data.vocabulary import padded_vocab_size
from bitcpm_megatron.launch.estimates.memory import Estimate, Options, estimate, layer_activations
from bitcpm_megatron.launch.estimates.shapes import Layout, Linear
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.models.architecture import divisors

PRESETS = ("minicpm4-0.5b", "bitcpm-cann-1b", "bitcpm-cann-3b", "minicpm4-8b")
# Megatron's default: the vocabulary is padded to a multiple of this times TP.
PAD_TO = 128
BYTES = 2  # of bf16: weights, activations, scales
# Per weight and quantization, without the scales. "fused" reads a weight once and writes it once. "torch" is the
# fallback backend on a device (docs/kernels.md). "residual" is W + stopgrad(Wq - W) operation by operation: 28 to 68
# bytes counted by hand, depending on what a compiler fuses and in which dtype; the worst is taken.
QUANTIZER_BYTES = {"fused": 4.0, "torch": 70.0, "residual": 68.0}
# Adam on fp32 master weights, per parameter: gradient read for the norm (4), read again (4) and cleared (4), master
# weight and both moments read and written (24), bf16 parameter written (2).
ADAM_BYTES = 38.0


class BadInput(ValueError):
    """A file or an argument that cannot be used, and why."""


@dataclass(frozen=True)
class Machine:
    """What a device does per second.

    Attributes:
        name: in tables.
        peak_flops: bf16, dense, FLOP/s, for the utilization alone. Of a calibrated machine its GEMM rate.
        achieved_flops: FLOP/s that training reaches; of a calibrated machine, its GEMMs at these shapes.
        memory_bandwidth: bytes/s, reads and writes together.
        link_bandwidth: bytes/s that a rank sends, and at the same time receives.
        launch_us: least microseconds from one quantization to the next.
        quantizer_copies: time of a fused quantization in units of a copy of the same bytes.
        optimizer_bandwidth: bytes/s of the optimizer at :data:`ADAM_BYTES` per parameter; None: the memory's.
        saved_bandwidth: bytes/s at which all that is neither GEMM nor quantizer (norms, SwiGLU, softmax, loss) makes,
            by the bytes that it saves for the backward, forward and backward together. None where ``achieved_flops``
            is of whole steps and has it in it.
    """

    name: str
    peak_flops: float
    achieved_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    launch_us: float = 0.0
    quantizer_copies: float = 1.0
    optimizer_bandwidth: float | None = None
    saved_bandwidth: float | None = None

    def __str__(self) -> str:
        parts = [
            f"{self.achieved_flops / 1e12:.3g} TFLOP/s",
            f"memory {self.memory_bandwidth / 1e9:.4g} GB/s",
            f"links {self.link_bandwidth / 1e9:.4g} GB/s",
            f"quantizer {self.quantizer_copies:.2f} copies, at least {self.launch_us:.3g} us",
        ]
        if self.optimizer_bandwidth:
            parts.append(f"optimizer {self.optimizer_bandwidth / 1e9:.4g} GB/s")
        if self.saved_bandwidth:
            parts.append(f"elementwise {self.saved_bandwidth / 1e9:.4g} GB/s of what is saved")
        return f"{self.name}: {', '.join(parts)}"


# The achieved rates are taken to count FLOPs as Megatron-LM does; the BitCPM-CANN report's count is an assumption.
MACHINES = {
    # Measured by others: achieved, the BitCPM-CANN report's BF16 baseline, 155 TFLOP/s per NPU (148 with its
    # quantization). Assumptions, for no data sheet was at hand: the peak (313 TFLOP/s, said of a 910B3), HBM
    # (1.6 TB/s), HCCS (392 GB/s, taken as both directions together) and the launch.
    "910B": Machine("910B", 313e12, 155e12, 1.6e12, 196e9, launch_us=10),
    # NVIDIA's data sheet of the SXM module: 989 TFLOP/s dense bf16, 3.35 TB/s, NVLink 900 GB/s for both directions.
    # Measured by others: achieved, 41 % of the peak, the smallest model of the scaling study in Megatron-LM's README.
    # Assumption: the launch.
    "H100": Machine("H100", 989e12, 0.41 * 989e12, 3.35e12, 450e9, launch_us=4),
}


@dataclass(frozen=True)
class Workload:
    """A training job.

    Attributes:
        model: name, in tables.
        layout: shapes and parallel sizes; a micro-batch has ``layout.sequence * layout.micro_batch`` tokens on each
            data-parallel rank.
        micro_batches: per optimizer step.
        cache: ``step`` quantizes once per optimizer step, ``none`` in every forward.
        group_size: weights per scale, -1 for a row.
        quantizer: of :data:`QUANTIZER_BYTES`.
        sequence_parallel: only with TP.
        recompute: None, ``selective`` or ``full``.
        distributed_optimizer: optimizer states divided over the data-parallel ranks.
        fused_kernels: flash attention, norms and SwiGLU as single kernels; our own loop on a CPU has none of them.

    Raises:
        BadInput: a size that is not positive, or a word that is none of the above.
    """

    model: str
    layout: Layout
    micro_batches: int = 1
    cache: str = "step"
    group_size: int = -1
    quantizer: str = "fused"
    sequence_parallel: bool = True
    recompute: str | None = None
    distributed_optimizer: bool = True
    fused_kernels: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "groups", "head_dim", "vocab_size", "sequence", "micro_batch"):
            if not (getattr(self.layout, name) or 0) > 0:
                raise BadInput(f"{self.model}: {name} has to be positive, not {getattr(self.layout, name)}")
        if min(self.micro_batches, self.layout.tp, self.layout.pp, self.layout.dp) < 1:
            raise BadInput(f"{self.model}: micro-batches, TP, PP and DP have to be 1 or more")
        known = {"cache": ("step", "none"), "quantizer": QUANTIZER_BYTES, "recompute": (None, "selective", "full")}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise BadInput(f"{name} {getattr(self, name)!r} is none of {', '.join(map(str, words))}")

    @property
    def tokens(self) -> int:
        """T: per micro-batch and data-parallel rank."""
        return self.layout.sequence * self.layout.micro_batch

    @property
    def layers(self) -> int:
        """Of the largest pipeline stage."""
        return -(-self.layout.layers // self.layout.pp)

    @property
    def linears(self) -> list[Linear]:
        """Ternary linears of the largest stage, over all tensor-parallel shards."""
        return [linear for layer in range(self.layers) for linear in self.layout.linears(layer)]

    @property
    def quantized_weights(self) -> float:
        """Elements that a rank of the largest stage holds."""
        return sum(linear.weights for linear in self.linears) / self.layout.tp

    @property
    def vocabulary(self) -> int:
        """Padded, all shards."""
        return padded_vocab_size(self.layout.vocab_size, PAD_TO, self.layout.tp)

    @property
    def quantizations(self) -> int:
        """How often a rank quantizes each of its weights in a step. Full recomputation runs every forward twice."""
        if self.cache == "step":
            return 1
        return self.micro_batches * (2 if self.recompute == "full" else 1)


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
    replicas = workload.layout.dp if workload.distributed_optimizer else 1
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
        quantizer_step_seconds=(passes + (pp - 1) * (passes if workload.cache == "step" else passes / n)) * once,
        quantizations=passes,
        memory=memory,
        scale_bytes=_scale_bytes(workload),
        communication_bytes=sum(c.bytes for c in exchanges),
        wire_bytes=wire,
        model_flops=_model_flops(workload),
    )


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


def _model_flops(workload: Workload) -> float:
    """As ``throughput_report.flops_per_token``: causal attention counts half, padding and recomputation do not."""
    shape = workload.layout
    layer = sum(x.weights for x in shape.linears(0)) + shape.heads * shape.head_dim * shape.sequence
    per_token = 6.0 * (shape.layers * layer + shape.hidden * shape.vocab_size)
    return per_token * workload.tokens * workload.micro_batches / (shape.tp * shape.pp)


def _quantization_seconds(machine: Machine, workload: Workload) -> float:
    """One quantization of all weights of a rank; a small weight takes as long as its launch."""
    total = 0.0
    # Layers are alike: one of them, as often as there are.
    for linear in workload.layout.linears(0):
        moved = linear.weights / workload.layout.tp * QUANTIZER_BYTES[workload.quantizer]
        moved += BYTES * _scales(workload, linear)
        seconds = moved / machine.memory_bandwidth * (machine.quantizer_copies if workload.quantizer == "fused" else 1)
        total += max(seconds, machine.launch_us * 1e-6)
    return total * workload.layers


def _scales(workload: Workload, linear: Linear) -> float:
    """Of a rank's shard. A whole row is a group; tensor parallelism cuts the rows of row-parallel weights."""
    tp = workload.layout.tp
    row = linear.in_features / (tp if linear.row_parallel else 1)
    return linear.weights / tp / (workload.group_size if workload.group_size > 0 else row)


def _scale_bytes(workload: Workload) -> float:
    return BYTES * sum(_scales(workload, linear) for linear in workload.layout.linears(0)) * workload.layers


def _memory(workload: Workload) -> Estimate:
    """The launcher's estimate, with the quantized weights that are alive at once in place of its own.

    That one counts the scratch of the torch backend, and one weight only where nothing is cached. But autograd keeps
    what a linear multiplied with until its backward: uncached, one copy of every weight per micro-batch in flight.
    """
    _, found = estimate(workload.layout, _options(workload))
    copies = 1.0
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
        distributed_optimizer=workload.distributed_optimizer,
        flash_attention=workload.fused_kernels,
        fused=workload.fused_kernels,
        dropout=False,
        recompute=workload.recompute,
        recompute_method="uniform" if workload.recompute == "full" else None,
        recompute_layers=1,
        pad_to=PAD_TO,
        recipe=None,
        keep_quantized=True,
        communicator_mib=0,
        runtime_gib=0,
    )


def _saved_bytes(workload: Workload) -> float:
    """Bytes that a micro-batch saves for its backward, which is what elementwise work is measured by."""
    options = replace(_options(workload), recompute=None)
    _, found = estimate(workload.layout, options)
    return workload.layers * layer_activations(workload.layout, options) + found.logits


def preset(
    model: str, tokens: int, micro_batches: int, tp: int = 1, pp: int = 1, dp: int = 1, sequence: int = 4096
) -> Workload:
    """A workload from a preset of ``launch/models``, fused and cached.

    Args:
        model: the preset's name.
        tokens: of a micro-batch on one data-parallel rank.
        micro_batches: per optimizer step.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        dp: data-parallel ranks.
        sequence: tokens of a sequence; where a micro-batch has fewer, all of them are one.

    Raises:
        BadInput: sizes that the model cannot be cut into.
    """
    presets.architecture(model)  # refuses flags that are none
    flags, sequence = presets.read(model).flags, min(tokens, sequence)
    if sequence < 1 or tokens % sequence:
        raise BadInput(f"{tokens} tokens are no whole number of sequences of {sequence}")
    sizes = {name.replace("-", "_"): value for name, value in flags.items()}
    sizes |= {"vocab_size": presets.vocab_size(model), "seq_length": sequence, "micro_batch_size": tokens // sequence}
    tied = not flags.get("untie-embeddings-and-output-weights", False)
    layout = layout_of({**sizes, "tp": tp, "pp": pp, "dp": dp}, tied)
    if layout.groups % tp:
        fitting = ", ".join(map(str, divisors(layout.groups)))
        raise BadInput(f"{model}: TP {tp} does not divide {layout.groups} query groups: use one of {fitting}")
    if pp > layout.layers:
        raise BadInput(f"{model}: {layout.layers} layers do not make up {pp} pipeline stages")
    return Workload(model, layout, micro_batches)


def layout_of(sizes: Mapping[str, int], tied: bool) -> Layout:
    """A dense model with SwiGLU, neither virtual stages nor context parallelism; sizes in the words of Megatron-LM."""
    return Layout(
        layers=sizes["num_layers"],
        hidden=sizes["hidden_size"],
        ffn=sizes["ffn_hidden_size"],
        heads=sizes["num_attention_heads"],
        groups=sizes["num_query_groups"],
        head_dim=sizes["kv_channels"],
        vocab_size=sizes["vocab_size"],
        sequence=sizes["seq_length"],
        micro_batch=sizes["micro_batch_size"],
        tied=tied,
        gated=True,
        **{"tp": sizes["tp"], "pp": sizes["pp"], "world": sizes["tp"] * sizes["pp"] * sizes["dp"]},
        **{"vpp": 1, "cp": 1, "ep": 1, "experts": 0, "topk": 1},
    )

# SPDX-License-Identifier: Apache-2.0
"""Inputs of the cost model: the rates of a machine, and the shapes of a training job."""

from collections.abc import Mapping
from dataclasses import dataclass

from bitcpm_megatron.data.vocabulary import padded_vocab_size
from bitcpm_megatron.launch.estimates.shapes import Layout, Linear
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.models.architecture import divisors

PRESETS = ("minicpm4-0.5b", "bitcpm-cann-1b", "bitcpm-cann-3b", "minicpm4-8b")


# Megatron's default: the vocabulary is padded to a multiple of this number times the tensor-parallel size.
PAD_TO = 128


BYTES = 2  # bytes of a bf16 value: of a weight, an activation or a scale


# Bytes moved per weight and quantization, without the scales. "fused" reads a weight once and writes it once. "torch"
# is the fallback backend on an accelerator (docs/kernels.md). "residual" computes W + stopgrad(Wq - W) operation by
# operation: 28 to 68 bytes, counted by hand, depending on the dtype and on the operations that a compiler fuses; the
# largest number is used.
QUANTIZER_BYTES = {"fused": 4.0, "torch": 70.0, "residual": 68.0}


# Bytes per parameter moved by Adam on fp32 master weights: gradient read for the norm (4), read again (4) and cleared
# (4), master weight and both moments read and written (24), bf16 parameter written (2).
ADAM_BYTES = 38.0


class BadInput(ValueError):
    """Error of a file or an argument that cannot be used; the message says why."""


@dataclass(frozen=True)
class Machine:
    """Rates of a device.

    Attributes:
        name: the name of the machine in tables.
        peak_flops: the FLOP/s of dense bf16, used only for the utilization; for a calibrated machine its GEMM rate.
        achieved_flops: the FLOP/s that training reaches; for a calibrated machine those of its GEMMs at the given
            shapes.
        memory_bandwidth: the bytes/s of reads and writes together.
        link_bandwidth: the bytes/s that a rank sends, and at the same time receives.
        launch_us: the least time from one quantization to the next, in microseconds.
        quantizer_copies: the time of a fused quantization in units of a copy of the same bytes.
        optimizer_bandwidth: the bytes/s of the optimizer at :data:`ADAM_BYTES` per parameter; None to use the memory
            bandwidth.
        saved_bandwidth: the rate of everything that is neither GEMM nor quantizer (norms, SwiGLU, softmax, loss): the
            bytes saved for the backward pass per second of forward and backward together. None if
            ``achieved_flops`` is for whole steps and so includes it.
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


# The achieved rates are assumed to count FLOPs as Megatron-LM does; for the BitCPM-CANN report this is not confirmed.
MACHINES = {
    # The achieved rate was measured by others: the BitCPM-CANN report's BF16 baseline has 155 TFLOP/s per NPU (148 with
    # its quantization). Without a data sheet, these are assumptions: the peak (313 TFLOP/s, reported for a 910B3), HBM
    # (1.6 TB/s), HCCS (392 GB/s, taken as the sum of both directions) and the launch.
    "910B": Machine("910B", 313e12, 155e12, 1.6e12, 196e9, launch_us=10),
    # NVIDIA's data sheet of the SXM module: 989 TFLOP/s dense bf16, 3.35 TB/s, NVLink 900 GB/s for both directions.
    # The achieved rate was measured by others: 41 % of the peak, for the smallest model of the scaling study in
    # Megatron-LM's README. The launch is an assumption.
    "H100": Machine("H100", 989e12, 0.41 * 989e12, 3.35e12, 450e9, launch_us=4),
}


@dataclass(frozen=True)
class Workload:
    """A training job whose cost is predicted.

    Attributes:
        model: the name of the model in tables.
        layout: the shapes and parallel sizes; a micro-batch has ``layout.sequence * layout.micro_batch`` tokens on each
            data-parallel rank.
        micro_batches: the number of micro-batches per optimizer step.
        cache: the time and place of quantization: ``step`` quantizes once per optimizer step; ``resident`` does the
            same in the parameters themselves, where each data-parallel rank quantizes its shard; ``none`` quantizes in
            every forward pass.
        group_size: the number of weights per scale, -1 for a whole row.
        quantizer: the implementation of the quantizer, a key of :data:`QUANTIZER_BYTES`.
        sequence_parallel: whether activations are split along the sequence, which only applies to tensor parallelism.
        recompute: the recomputation of activations: None, ``selective`` or ``full``.
        distributed_optimizer: whether the optimizer state is divided over the data-parallel ranks.
        fused_kernels: whether flash attention, norms and SwiGLU are single kernels; our own loop on a CPU has none of
            them.

    Raises:
        BadInput: if a size is not positive, or a setting is none of the values above.
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
        known = {
            "cache": ("resident", "step", "none"),
            "quantizer": QUANTIZER_BYTES,
            "recompute": (None, "selective", "full"),
        }
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise BadInput(f"{name} {getattr(self, name)!r} is none of {', '.join(map(str, words))}")

    @property
    def tokens(self) -> int:
        """Number T of tokens per micro-batch and data-parallel rank."""
        return self.layout.sequence * self.layout.micro_batch

    @property
    def layers(self) -> int:
        """Number of layers of the largest pipeline stage."""
        return -(-self.layout.layers // self.layout.pp)

    @property
    def linears(self) -> list[Linear]:
        """Ternary linears of the largest pipeline stage, with the shapes over all tensor-parallel shards."""
        return [linear for layer in range(self.layers) for linear in self.layout.linears(layer)]

    @property
    def quantized_weights(self) -> float:
        """Number of quantized weights that a rank of the largest pipeline stage holds."""
        return sum(linear.weights for linear in self.linears) / self.layout.tp

    @property
    def vocabulary(self) -> int:
        """Size of the padded vocabulary over all tensor-parallel shards."""
        return padded_vocab_size(self.layout.vocab_size, PAD_TO, self.layout.tp)

    @property
    def quantizations(self) -> int:
        """Number of times a rank quantizes each of its weights in a step; full recomputation runs forwards twice."""
        if self.cache != "none":
            return 1
        return self.micro_batches * (2 if self.recompute == "full" else 1)


def preset(
    model: str, tokens: int, micro_batches: int, tp: int = 1, pp: int = 1, dp: int = 1, sequence: int = 4096
) -> Workload:
    """Returns the workload of a preset of ``launch/models``, with a fused quantizer and the cache ``step``.

    Args:
        model: the name of the preset.
        tokens: the number of tokens of a micro-batch on one data-parallel rank.
        micro_batches: the number of micro-batches per optimizer step.
        tp: the tensor-parallel size.
        pp: the number of pipeline stages.
        dp: the data-parallel size.
        sequence: the tokens per sequence; a micro-batch with fewer tokens is one sequence.

    Raises:
        BadInput: if the model cannot be divided by the sizes.
    """
    presets.architecture(model)  # refuses unknown flags
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
    """Returns the layout of a dense SwiGLU model without virtual stages and context parallelism.

    ``sizes`` has Megatron-LM's names.
    """
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


def flops_per_token(layout: Layout) -> float:
    """Returns the FLOP per token of a whole SwiGLU model, forward and backward, as Megatron-LM counts them.

    The formula is that of ``num_floating_point_operations`` (core_v0.16.1): every GEMM is counted three times (forward,
    dgrad, wgrad), with two operations per multiply-add; causal attention counts half, and the vocabulary is not padded.
    """
    layer = sum(x.weights for x in layout.linears(0)) + layout.heads * layout.head_dim * layout.sequence
    return 6.0 * (layout.layers * layer + layout.hidden * layout.vocab_size)

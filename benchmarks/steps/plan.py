# SPDX-License-Identifier: Apache-2.0
"""What the throughput benchmark runs: models, layouts, and which steps are interleaved."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

from hardware import best_device

from bitcpm_megatron.launch.launcher import presets
from steps.layouts import Layout
from steps.variants import A8, CACHES, INT8, INT8_BACKWARD, PACKED, PACKED_GATHER, PEERS, VARIANTS

BASELINE, OURS = "bf16", "ternary"
RESIDENT, STEP = "resident", "step"
MODES = (BASELINE, *CACHES)
"""BF16 and ternary training, its quantized weights in each of the places that there are."""
WARM_UP = 3
"""Steps of each variant before those that are timed."""
COST_STEPS = 3
"""Steps in which the memory of a variant is measured."""
PROGRESS = "micro-batches done: "
"""Begins the line with which rank 0 tells, outside of what is timed, that a step is over."""

# Layers of MiniCPM4-0.5B in a model without its multipliers, which need hooks: BF16 is to be megatron-core's own. The
# vocabulary is small, for the output layer is not quantized and would hide what the layers cost.
LAYERS_05B = {
    "num-layers": 2,
    "hidden-size": 1024,
    "ffn-hidden-size": 4096,
    "num-attention-heads": 16,
    "group-query-attention": True,
    "num-query-groups": 2,
    "kv-channels": 64,
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable-bias-linear": True,
    "position-embedding-type": "rope",
    "attention-dropout": 0,
    "hidden-dropout": 0,
}
DOCUMENTS = (1 / 2, 1 / 4, 1 / 8, 1 / 8)
"""Of a packed sequence, the shares that its documents have."""
RECOMPUTE = {
    "none": (),
    "selective": ("--recompute-granularity", "selective"),
    "full": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
}


@dataclass(frozen=True)
class Session:
    """Steps that are interleaved.

    Attributes:
        variants: BF16 first.
        micro_batches: per step and data-parallel rank.
        rounds: steps of each.
    """

    variants: tuple[str, ...]
    micro_batches: int
    rounds: int


@dataclass(frozen=True)
class Job:
    """One layout of one model.

    Attributes:
        model: name in the table.
        flags: of the model, for our training loop.
        layout: parallel sizes.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        recompute: a key of :data:`RECOMPUTE`.
        sessions: what is timed, one after the other.
        costs: variants whose memory is measured.
        ternary: flags of the ternary variants alone, beside ``--ternary``.
        packed: whether sequences are documents one behind the other, of the shares of it in :data:`DOCUMENTS`.
    """

    model: str
    flags: tuple[str, ...]
    layout: Layout
    seq_length: int
    micro_batch_size: int
    recompute: str
    sessions: tuple[Session, ...]
    costs: tuple[str, ...]
    ternary: tuple[str, ...] = ()
    packed: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """All that it runs."""
        return tuple(dict.fromkeys([*self.costs, *(name for session in self.sessions for name in session.variants)]))

    def flags_of(self, variant: str) -> list[str]:
        """Flags of our training loop that a variant has beside those of :meth:`arguments`."""
        chosen = VARIANTS[variant]
        return [*chosen.flags, *(self.ternary if chosen.ternary else ())]

    @property
    def cost_micro_batches(self) -> int:
        """Micro-batches of a step whose memory is measured."""
        return max(2, self.layout.pipeline)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of all steps: every variant's, timed or not."""
        found = self.cost_micro_batches * len(self.costs) * (1 + COST_STEPS)
        for session in self.sessions:
            # One more of each, of which everything but the time is counted.
            found += session.micro_batches * len(session.variants) * (WARM_UP + session.rounds + 1)
        return found

    @property
    def tokens(self) -> int:
        """Of a micro-batch, over all data-parallel ranks."""
        return self.seq_length * self.micro_batch_size * self.layout.data

    def _fusion(self) -> list[str]:
        # Peers return their gradients; with the fused weight-gradient GEMM the others would have an advantage.
        peers = any(VARIANTS[name].make_quantizer for name in self.variants)
        return ["--no-gradient-accumulation-fusion"] if peers else []

    def arguments(self) -> list[str]:
        """All flags of our training loop that the variants share."""
        return [
            *self.flags,
            *self.layout.flags(),
            *RECOMPUTE[self.recompute],
            *("--seq-length", str(self.seq_length), "--max-position-embeddings", str(self.seq_length)),
            *("--micro-batch-size", str(self.micro_batch_size), "--train-iters", "1000000"),
            *self._fusion(),
            *(("--reset-position-ids", "--reset-attention-mask") if self.packed else ()),
            *("--lr", "1e-4", "--lr-decay-style", "constant", "--bf16", "--mock-data"),
        ]


def standard(peers: tuple[str, ...]) -> list[Job]:
    """What ``make bench`` runs on a CPU.

    Args:
        peers: those that are installed.
    """
    flags, pair = model_flags("0.5b-layers", None, None), (BASELINE, RESIDENT)
    job = Job("0.5b-layers", flags, Layout(), 256, 1, "none", (), MODES)
    integers = (INT8, INT8_BACKWARD)
    beside_peers, shared = (*pair, A8, *integers, *peers), Layout(data=2, distributed_optimizer=True)
    gathered = (BASELINE, STEP, RESIDENT, PACKED_GATHER, PACKED)
    return [
        replace(job, sessions=(Session(MODES, 8, 32), Session(MODES, 1, 32))),
        replace(job, layout=Layout(tensor=2), sessions=(Session(MODES, 8, 32), Session(MODES, 1, 32))),
        replace(job, sessions=(Session(beside_peers, 8, 7), Session(beside_peers, 1, 7)), costs=()),
        replace(job, seq_length=1024, sessions=(Session((*pair, *integers), 8, 10),), costs=()),
        replace(job, recompute="full", sessions=(Session(pair, 8, 6),)),
        replace(job, layout=Layout(pipeline=2), sessions=(Session(pair, 8, 6),)),
        replace(job, layout=shared, sessions=(Session(gathered, 8, 6), Session(gathered, 1, 24)), costs=gathered),
        # Only for what is alive at once; four processes share two cores.
        replace(job, flags=model_flags("0.5b-layers", 4, None), layout=Layout(pipeline=4), seq_length=32),
    ]


def asked(
    args: argparse.Namespace, flags: tuple[str, ...], variants: Callable[[Layout], tuple[str, ...]], rounds: int
) -> list[Job]:
    """A job for every layout, micro-batch size and recomputation of the command line of ``throughput.py``.

    Args:
        args: of it, with a model.
        flags: of the model.
        variants: of a layout, BF16 first.
        rounds: unless the command line says how many.

    Raises:
        ValueError: no layout, or two sizes of its context parallelism.
    """
    jobs = []
    for layout in map(Layout.parse, args.layouts or ["TP1"]):
        context = args.context_parallel_size or layout.context
        if layout.context not in (1, context):
            raise ValueError(f"--layouts {layout} and --context-parallel-size {context}: leave one of the two out")
        layout = replace(layout, context=context)
        chosen = variants(layout)
        sessions = tuple(Session(chosen, n, args.pairs or rounds) for n in args.micro_batches or (1, 8))
        costs = tuple(name for name in chosen if name not in PEERS)
        length = args.seq_length or (256 if best_device() == "cpu" else 4096)
        for size in args.micro_batch_size or [1]:
            for recompute in args.recompute or ["none"]:
                shape = (length, size, recompute)
                jobs.append(Job(args.model, flags, layout, *shape, sessions, costs, ternary_flags(args), args.packed))
    return jobs


def ternary_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """What the command line says of the quantizer."""
    return ("--ternary-group-size", str(args.group_size), "--ternary-backend", args.backend)


def model_flags(model: str, num_layers: int | None, vocab_size: int | None) -> tuple[str, ...]:
    """The model's flags for our training loop."""
    if model == "0.5b-layers":
        flags, vocabulary = LAYERS_05B, 2048
    else:
        presets.architecture(model)  # refuses flags that are none, and what is no Llama
        flags, vocabulary = presets.read(model).flags, presets.vocab_size(model)
    if not flags.get("swiglu"):
        raise ValueError(f"--model {model}: FLOPs are counted for SwiGLU models only")
    if num_layers is not None:
        flags = {**flags, "num-layers": num_layers}
    # The sequence's own length follows in Job.arguments(), and counts.
    return ("--vocab-size", str(vocab_size or vocabulary), *presets.arguments(flags))

# SPDX-License-Identifier: Apache-2.0
"""Plan of the throughput benchmark: its models, its layouts, and the steps that are interleaved."""

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
"""Variants that compare BF16 with ternary training, for each place of its quantized weights."""
WARM_UP = 3
"""Number of steps of each variant before the timed ones."""
COST_STEPS = 3
"""Number of steps that measure a variant's memory: peak and resident bytes, and in the last one live copies."""
PROGRESS = "micro-batches done: "
"""Beginning of the line with which rank 0 reports, outside of the timed code, that a step is over."""

# Layers of MiniCPM4-0.5B in a model without MiniCPM's multipliers, which need hooks: the BF16 variant has to be
# megatron-core's own model. The vocabulary is small, because the output layer is not quantized and would hide the cost
# of the layers.
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
"""Lengths of the documents in a packed sequence, as fractions of the sequence."""
RECOMPUTE = {
    "none": (),
    "selective": ("--recompute-granularity", "selective"),
    "full": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
}


@dataclass(frozen=True)
class Session:
    """Variants whose steps are interleaved.

    Attributes:
        variants: the names of the variants, BF16 first.
        micro_batches: the number of micro-batches per step and data-parallel rank.
        rounds: the number of timed steps of each variant.
    """

    variants: tuple[str, ...]
    micro_batches: int
    rounds: int


@dataclass(frozen=True)
class Job:
    """A job that measures one model at one layout.

    Attributes:
        model: the name of the model in the table.
        flags: the model's flags of our training loop.
        layout: the parallel layout.
        seq_length: the tokens per sequence.
        micro_batch_size: the sequences per micro-batch.
        recompute: the recomputation, a key of :data:`RECOMPUTE`.
        sessions: the sessions to time, one after another.
        costs: the variants whose memory is measured.
        ternary: the flags of only the ternary variants, in addition to ``--ternary``.
        packed: whether sequences consist of consecutive documents, with the lengths in :data:`DOCUMENTS`.
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
        """Names of all variants that the job runs."""
        return tuple(dict.fromkeys([*self.costs, *(name for session in self.sessions for name in session.variants)]))

    def flags_of(self, variant: str) -> list[str]:
        """Returns the flags of our training loop that a variant has in addition to those of :meth:`arguments`."""
        chosen = VARIANTS[variant]
        return [*chosen.flags, *(self.ternary if chosen.ternary else ())]

    @property
    def cost_micro_batches(self) -> int:
        """Number of micro-batches in a step whose memory is measured."""
        return max(2, self.layout.pipeline)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in all steps of all variants, timed or not."""
        found = self.cost_micro_batches * len(self.costs) * (1 + COST_STEPS)
        for session in self.sessions:
            # Each variant runs one more step, in which everything except for the time is counted.
            found += session.micro_batches * len(session.variants) * (WARM_UP + session.rounds + 1)
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens in a micro-batch, over all data-parallel ranks."""
        return self.seq_length * self.micro_batch_size * self.layout.data

    def _fusion(self) -> list[str]:
        # Peers return their gradients to autograd; with the fused weight-gradient GEMM, others would have an advantage.
        peers = any(VARIANTS[name].make_quantizer for name in self.variants)
        return ["--no-gradient-accumulation-fusion"] if peers else []

    def arguments(self) -> list[str]:
        """Returns the flags of our training loop that all variants share."""
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
    """Returns the jobs of the standard comparison, which ``make bench`` runs on a CPU.

    Args:
        peers: the names of the peers that are installed.
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
        # This job only measures what is alive at once; its times mean nothing, as four processes share two cores.
        replace(job, flags=model_flags("0.5b-layers", 4, None), layout=Layout(pipeline=4), seq_length=32),
    ]


def asked(
    args: argparse.Namespace, flags: tuple[str, ...], variants: Callable[[Layout], tuple[str, ...]], rounds: int
) -> list[Job]:
    """Returns a job for every layout, micro-batch size and recomputation on the command line of ``throughput.py``.

    Args:
        args: the parsed arguments, in which a model is set.
        flags: the flags of the model.
        variants: a function that returns the variants of a layout, BF16 first.
        rounds: the number of rounds if the command line does not set it.

    Raises:
        ValueError: if a text is not a layout, or two context-parallel sizes are given.
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
    """Returns the flags of the quantizer that the command line sets."""
    return ("--ternary-group-size", str(args.group_size), "--ternary-backend", args.backend)


def model_flags(model: str, num_layers: int | None, vocab_size: int | None) -> tuple[str, ...]:
    """Returns a model's flags for our training loop.

    Raises:
        ValueError: if the model is not a valid preset, or has no SwiGLU; FLOPs are counted only for SwiGLU models.
    """
    if model == "0.5b-layers":
        flags, vocabulary = LAYERS_05B, 2048
    else:
        presets.architecture(model)  # refuses unknown flags and unsupported architectures
        flags, vocabulary = presets.read(model).flags, presets.vocab_size(model)
    if not flags.get("swiglu"):
        raise ValueError(f"--model {model}: FLOPs are counted for SwiGLU models only")
    if num_layers is not None:
        flags = {**flags, "num-layers": num_layers}
    # Job.arguments() appends the length of the sequences, which overrides the preset's.
    return ("--vocab-size", str(vocab_size or vocabulary), *presets.arguments(flags))

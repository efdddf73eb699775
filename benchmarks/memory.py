# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank for every place where ternary training keeps quantized weights, in units of BF16's memory.

    python benchmarks/memory.py                                   # by formula: an 8B model at DP8 and DP64
    python benchmarks/memory.py --model minicpm4-0.5b --tp 2 --dp 16
    python benchmarks/memory.py --measure                         # small models on this machine, beside the formula

The formula is that of the preflight check (``launch/estimates/memory.py``). With --measure, the peak of allocated bytes
is measured from building a model to the end of its second step, as ``throughput.py`` measures it.

Exit status: 0 done, 1 a job failed, 2 bad arguments, 3 a measurement is not what the formula says.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import throughput
from cost.workload import PAD_TO, preset
from report.tables import markdown, number
from steps.layouts import Layout
from steps.plan import BASELINE, MODES, Job
from steps.variants import PACKED

from bitcpm_megatron import cli
from bitcpm_megatron.launch.estimates import shapes
from bitcpm_megatron.launch.estimates.memory import GIB, Estimate, Options, estimate, options_of
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.quantization import QuantizerConfig
from bitcpm_megatron.quantization.recipe import Recipe
from bitcpm_megatron.training.flags import parse_args

MIB = 2**20
TOLERANCE = 0.02
"""Allowed difference of a measured peak from the formula's, as a fraction of the latter."""
RESIDENT_TOLERANCE = 0.01
"""Allowed excess of the peak with resident weights over BF16's, without the scales, as a fraction of BF16's."""
_LAYOUTS = ("TP1", "TP1+DO", "DP2+DO", "DP4+DO")


@dataclass(frozen=True)
class Peak:
    """A measured peak of memory and the formula's, in bytes of one rank.

    Attributes:
        layout: the layout of the job.
        mode: ``bf16``, or the place of the quantized weights.
        measured: the largest measured peak of any rank.
        expected: the peak by the formula.
        baseline: the measured peak of BF16.
        scales: the formula's bytes for quantized weights; with resident weights, these are only their scales.
    """

    layout: str
    mode: str
    measured: int
    expected: float
    baseline: int
    scales: float

    def mistake(self) -> str | None:
        """Returns a description of what is wrong with the peak, or None."""
        off = self.measured / self.expected - 1
        if abs(off) > TOLERANCE:
            return f"{self.layout} {self.mode}: the peak is {off:+.1%} off the formula, {TOLERANCE:.0%} are allowed"
        more = self.measured - self.baseline - self.scales
        if self.mode == "resident" and more > RESIDENT_TOLERANCE * self.baseline:
            beyond = more / self.baseline
            return (
                f"{self.layout} resident: {beyond:.1%} more than BF16 and the scales, {RESIDENT_TOLERANCE:.0%} allowed"
            )
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table that the command line asks for, and returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ranks = cli.Whole(1, 2**16)
    parser.add_argument("--model", choices=presets.names(), default="minicpm4-8b")
    parser.add_argument("--tp", type=ranks, default=1)
    parser.add_argument("--dp", type=ranks, nargs="+", default=[8, 64], help="with the distributed optimizer")
    parser.add_argument("--tokens", type=cli.Whole(1, 2**24), default=4096, help="of a micro-batch: one sequence")
    parser.add_argument("--measure", action="store_true", help="small models here, not --model")
    parser.add_argument("--layouts", nargs="+", default=_LAYOUTS, metavar="DP2+DO", help="with --measure")
    args = parser.parse_args(argv)
    return cli.run(lambda: _measure(args) if args.measure else _estimate(args))


def _estimate(args: argparse.Namespace) -> None:
    lines = []
    for dp in args.dp:
        baseline = needed(args.model, args.tokens, args.tp, dp, BASELINE)
        for mode in (*MODES, PACKED):
            need = needed(args.model, args.tokens, args.tp, dp, mode)
            state = state_of(need)
            parts = (need.weights, need.quantized, need.gradients, need.optimizer, need.activations + need.logits)
            lines.append(
                f"DP{dp} | {mode} | {' | '.join(number(part, 2, scale=1 / GIB) for part in parts)} | "
                f"{number(state, 2, scale=1 / GIB)} | {number(state / state_of(baseline), 1, ' %', 100)} | "
                f"{number(need.total, 2, scale=1 / GIB)} | {number(need.total / baseline.total, 1, ' %', 100)}"
            )
    head = (
        "ranks | quantized weights | GiB: weights | quantized | gradients | optimizer | activations, logits | "
        "all but activations | of BF16's | all | of BF16's"
    )
    print(markdown(head, lines))
    print(
        f"\nBy formula: {args.model}, TP{args.tp}, distributed optimizer, one sequence of {args.tokens} tokens, fused "
        "kernels, full recomputation, a scale per row."
    )


def state_of(need: Estimate) -> float:
    """Returns the bytes that stay allocated from step to step."""
    return need.weights + need.quantized + need.gradients + need.optimizer


def needed(model: str, tokens: int, tp: int, dp: int, mode: str) -> Estimate:
    """Returns the formula's memory of one rank of a preset, with fused kernels and full recomputation.

    Args:
        model: the name of the preset.
        tokens: the tokens of a micro-batch on one data-parallel rank.
        tp: the tensor-parallel size.
        dp: the data-parallel size.
        mode: ``bf16``, or the place of the quantized weights.

    Raises:
        ValueError: if the model cannot be divided by the sizes.
    """
    options = Options(
        bf16=True,
        sequence_parallel=tp > 1,
        use_distributed_optimizer=True,
        make_vocab_size_divisible_by=PAD_TO,
        recompute_granularity="full",
        recompute_method="uniform",
        flash_attention=True,
        fused=True,
        # ascendc stands for all backends that quantize in one pass; like triton, it needs no scratch memory.
        ternary_backend="ascendc",
    )
    if mode != BASELINE:
        options = replace(options, ternary_cache=mode, recipe=Recipe.all_linears(QuantizerConfig()))
    return estimate(preset(model, tokens, 1, tp=tp, dp=dp).layout, options)[1]


def _measure(args: argparse.Namespace) -> None:
    peaks = [peak for layout in args.layouts for peak in measured(measured_job(Layout.parse(layout)))]
    lines = (
        f"{p.layout} | {p.mode} | {number(p.measured, 2, scale=1 / MIB)} | {number(p.expected, 2, scale=1 / MIB)} | "
        f"{number(p.measured / p.expected, 3)} | {number(p.measured / p.baseline, 3)}"
        for p in peaks
    )
    head = "layout | quantized weights | peak, MiB | by formula | measured / formula | of BF16's peak"
    print(markdown(head, lines))
    if wrong := [mistake for peak in peaks if (mistake := peak.mistake())]:
        raise cli.MismatchError("\n".join(wrong))


def measured_job(layout: Layout) -> Job:
    """Returns a job that measures the memory of every mode, but no times, for a model of 11 million parameters."""
    flags = {"num-layers": 4, "hidden-size": 512, "ffn-hidden-size": 1024, "num-attention-heads": 8}
    line = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    line += "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope".split()
    line += "--attention-dropout 0 --hidden-dropout 0 --vocab-size 1024".split()
    modes = (*MODES, PACKED) if layout.distributed_optimizer else MODES
    return Job("small", tuple(line), layout, 128, 2, "none", (), modes)


def measured(job: Job) -> Iterator[Peak]:
    """Runs a job and yields the peaks of its variants, BF16's first.

    Raises:
        FailedError: if the job fails.
    """
    costs = throughput.run(job)["costs"]
    for mode, found in costs.items():
        need = expected(job, mode)
        yield Peak(
            str(job.layout), mode, found["peak_bytes"], need.total, costs[BASELINE]["peak_bytes"], need.quantized
        )


def expected(job: Job, variant: str) -> Estimate:
    """Returns the formula's memory of one rank of a job of our own training loop on a CPU."""
    args = parse_args([*job.arguments(), *job.flags_of(variant)], job.layout.processes)
    layout = shapes.layout_of(args, job.layout.processes, args.vocab_size)
    recipe = shapes.recipe_of(args) if args.ternary else None
    return estimate(layout, options_of(args, recipe=recipe, cpu=True))[1]


if __name__ == "__main__":
    sys.exit(main())

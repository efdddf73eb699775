# SPDX-License-Identifier: Apache-2.0
"""Predicts time, memory and communication of ternary pretraining compared with BF16; nothing of it is measured.

    python benchmarks/roofline.py                              # models x machines: table, roofline.csv, roofline.png
    python benchmarks/roofline.py --machines 910B H100         # without calibrating the CPU that this runs on
    python benchmarks/roofline.py --validate throughput.csv    # predicted next to measured

The formulas are in ``cost/model.py``. With --validate, predictions are for the machine at hand: its rates are measured
in a few seconds at the shapes of the measured runs. For a device that is not present, published numbers are used.
`ratio` in the file is the step time divided by that of BF16.

Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cost.calibration import calibrate
from cost.model import predict
from cost.validation import Calibrate, validate, validation_table
from cost.workload import MACHINES, PRESETS, QUANTIZER_BYTES, Machine, Workload, preset
from hardware import check_outputs
from report.pictures import picture
from report.tables import markdown, write_csv

from bitcpm_megatron import cli
from bitcpm_megatron.launch.estimates.memory import GIB
from bitcpm_megatron.launch.launcher import presets

MIB = 2**20
Line = dict[str, str | int | float]


def line(machine: Machine, workload: Workload) -> Line:
    """Returns a prediction in the table's units; ``once_per_micro_batch_percent`` is the overhead without a cache."""
    p, shape = predict(machine, workload), workload.layout
    uncached = predict(machine, replace(workload, cache="none"))
    return {
        "model": workload.model,
        "machine": machine.name,
        "tokens": workload.tokens,
        "micro_batches": workload.micro_batches,
        "tp": shape.tp,
        "pp": shape.pp,
        "dp": shape.dp,
        "bf16_ms": 1e3 * p.bf16_seconds,
        "ternary_ms": 1e3 * p.ternary_seconds,
        "overhead_percent": 1e2 * p.overhead,
        "of_gemms_percent": 1e2 * p.of_gemms,
        "once_per_micro_batch_percent": 1e2 * uncached.overhead,
        "quantizer_ms": 1e3 * p.quantizer_seconds,
        "utilization_percent": 1e2 * p.model_flops / p.ternary_seconds / machine.peak_flops,
        "weights_gib": p.memory.weights / GIB,
        "quantized_gib": (p.memory.quantized - p.scale_bytes) / GIB,
        "scales_mib": p.scale_bytes / MIB,
        "gradients_gib": p.memory.gradients / GIB,
        "optimizer_gib": p.memory.optimizer / GIB,
        "activations_gib": (p.memory.activations + p.memory.logits) / GIB,
        "handed_to_collectives_mib": p.communication_bytes / MIB,
        "sent_mib": p.wire_bytes / MIB,
    }


_HEAD = (
    "model | machine | T | n | BF16 step, ms | ternary step, ms | overhead, % | of the GEMMs, % | uncached, % | MFU, % "
    "| GiB: weights | Wq | gradients | optimizer | scales, MiB | sent, MiB"
)
_ROW = (
    "{model} | {machine} | {tokens} | {micro_batches} | {bf16_ms:.1f} | {ternary_ms:.1f} | {overhead_percent:.2f} | "
    "{of_gemms_percent:.2f} | {once_per_micro_batch_percent:.2f} | {utilization_percent:.1f} | {weights_gib:.2f} | "
    "{quantized_gib:.2f} | {gradients_gib:.2f} | {optimizer_gib:.2f} | {scales_mib:.1f} | {sent_mib:.0f}"
)
_DRAWN_TOKENS = tuple(2**i for i in range(9, 17))


def draw(
    machines: Sequence[Machine], make: Callable[[int, int], Workload], micro_batches: Sequence[int], path: Path
) -> None:
    """Draws the overhead over the tokens per micro-batch, one line per machine and number of micro-batches.

    Args:
        machines: the machines, which have one color each.
        make: a function that returns the workload, given the tokens per micro-batch and the number of micro-batches.
        micro_batches: the numbers of micro-batches, which have one line style each.
        path: the path of the PNG.
    """
    with picture(path, 7, 4.5) as (axes,):
        for i, machine in enumerate(machines):
            for n, style in zip(micro_batches, ("-", "--", ":", "-.") * len(micro_batches), strict=False):
                overheads = [1e2 * predict(machine, make(tokens, n)).overhead for tokens in _DRAWN_TOKENS]
                axes.plot(_DRAWN_TOKENS, overheads, style, color=f"C{i}", marker=".", label=f"{machine.name}, n = {n}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens per micro-batch and data-parallel rank")
        axes.set_ylabel("overhead of ternary over BF16, % of a step")
        drawn = make(_DRAWN_TOKENS[0], 1)
        often = "once per optimizer step of n micro-batches"
        axes.set_title(f"predicted: {drawn.model}, {drawn.quantizer} quantizer, {often}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None, calibrator: Calibrate = calibrate) -> int:
    """Runs the prediction or validation that the command line describes, and returns the exit status."""
    args = _parse(argv)
    return cli.run(lambda: _validate(args.validate, calibrator) if args.validate else _predict(args, calibrator))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, count = presets.names(), cli.Whole(1, 2**24)
    parser.add_argument("--models", nargs="+", choices=models, default=PRESETS, metavar="MODEL")
    parser.add_argument("--machines", nargs="+", choices=(*MACHINES, "cpu"), default=["910B", "H100", "cpu"])
    parser.add_argument("--tokens", nargs="+", type=count, default=[4096, 8192], metavar="T", help="per micro-batch")
    parser.add_argument(
        "--micro-batches", nargs="+", type=count, default=[1, 8], metavar="N", help="per optimizer step"
    )
    for name in ("tp", "pp", "dp"):
        parser.add_argument(f"--{name}", type=cli.Whole(1, 2**16), default=1)
    parser.add_argument("--quantizer", choices=tuple(QUANTIZER_BYTES), default="fused")
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--validate", type=Path, metavar="CSV", help="predicted next to measured, nothing else")
    return parser.parse_args(argv)


def _predict(args: argparse.Namespace, calibrator: Calibrate) -> int:
    check_outputs(args.output_dir)

    def make(model: str, tokens: int, n: int) -> Workload:
        chosen = preset(model, tokens, n, args.tp, args.pp, args.dp)
        return replace(chosen, quantizer=args.quantizer)

    # On a CPU, the rates hardly depend on the shapes of models of this size, so those of the first one are measured.
    machines = [
        calibrator(make(args.models[0], 512, 1), "cpu") if name == "cpu" else MACHINES[name] for name in args.machines
    ]
    lines = [
        line(machine, make(model, tokens, n))
        for model in args.models
        for machine in machines
        for tokens in args.tokens
        for n in args.micro_batches
    ]
    write_csv(lines, args.output_dir / "roofline.csv", ".4f")
    smallest = args.models[0]
    draw(machines, lambda tokens, n: make(smallest, tokens, n), args.micro_batches, args.output_dir / "roofline.png")
    print(markdown(_HEAD, (_ROW.format(**x) for x in lines)))
    print(
        f"\nPredicted, not measured: {args.quantizer} quantizer, a scale per row, once per optimizer step; "
        f"TP {args.tp}, PP {args.pp}, DP {args.dp}, sequences of up to 4096 tokens. Ternary sends no more than BF16."
    )
    print("\n".join(f"- {machine}" for machine in machines))
    return 0


def _validate(path: Path, calibrator: Calibrate) -> int:
    comparisons, notes, machines = validate(path, calibrator)
    print(validation_table(comparisons))
    print("\n" + "\n".join(f"- {text}" for text in dict.fromkeys([*map(str, machines), *notes])))
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Says what a checkpoint holds, how it was quantized, and whether it contradicts itself.

    inspect_checkpoint.py PATH [--json] [--fast]

PATH is a Megatron --save directory or one iteration of it (torch_dist or legacy), a Hugging Face model directory, or
one .safetensors / .bin file. The table has a line for all layers that are alike: shape, dtype, whether the weights are
latent or fused (ternary x scale already), scales per row, the share of zeros in the ternary weight, and the smallest,
mean and largest scale. --fast reads no weights, so none of the values; --json has a line for every module.

Where there is a DIGESTS.json, every file is compared with it (with --fast its size alone).

Exit status: 0 done, 1 failed, 2 bad input or arguments, 3 the checkpoint contradicts itself or its digests.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # From a bare checkout the package stands one level up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from bitcpm_megatron.checkpoint_tools.command import add_pickle_argument, progress_of_reading, run
from bitcpm_megatron.checkpoint_tools.inspection.inspection import Inspection, Statistics, Weight, check_record
from bitcpm_megatron.checkpoint_tools.inspection.opening import files_of, open_inspection
from bitcpm_megatron.checkpoint_tools.inspection.statistics import not_read, one_thread, statistics_of
from bitcpm_megatron.checkpoint_tools.storage.reader import VerificationError
from bitcpm_megatron.cli import Parser, ranges
from bitcpm_megatron.files import find_damage, read_digests

_SHOWN = 20
_HEADER = ("module", "shape", "dtype", "state", "g", "zeros", "scale min", "mean", "max")


def inspect(path: Path, allow_pickle: bool = False, fast: bool = False) -> tuple[Inspection, list[Statistics]]:
    """Looks at a checkpoint.

    Args:
        path: see :func:`~.inspection.open_inspection`.
        allow_pickle: see there.
        fast: read no weights.

    Returns:
        What it is, with its findings, and the statistics of each of its weights.

    Raises:
        FileError: see :func:`~.inspection.open_inspection`.
        VerificationError: the same, and the files do not match their digests.
    """
    directory, names = files_of(path)
    damage = _damage(directory, names, fast)
    try:
        found = open_inspection(path, allow_pickle)
    except ValueError as error:
        if damage:
            raise VerificationError(f"{path} is damaged: {'; '.join(damage)}") from error
        raise
    found.digests = None if damage is None else len(damage) == 0
    found.findings += damage or []
    check_record(found)
    if fast:
        return found, [not_read(weight, found.record) for weight in found.weights]
    statistics = []
    bar = tqdm(total=found.nbytes, unit="B", unit_scale=True, desc="reading", disable=None)
    with bar, one_thread():
        for weight in found.weights:
            statistics.append(statistics_of(weight, found.record, found.findings))
            bar.update(weight.info.nbytes)
    states = [s.state for s, w in zip(statistics, found.weights, strict=True) if w.linear and s.zeros != 1.0]
    if found.record is None and "fused" in states and set(states) != {"fused"}:
        count = states.count("fused")
        found.findings.append(f"{count} of {len(states)} linears are ternary already, the others are not")
    return found, statistics


def _damage(directory: Path, names: Sequence[str] | None, fast: bool) -> list[str] | None:
    recorded = read_digests(directory)
    if recorded is None or fast:
        return find_damage(directory, names, contents=False)
    names = list(recorded) if names is None else names
    with progress_of_reading(directory, names) as bar:
        return find_damage(directory, names, on_read=bar.update)


def as_json(found: Inspection, statistics: Sequence[Statistics]) -> dict[str, Any]:
    """One object with everything, module by module."""
    modules = [
        {"name": w.name, "shape": list(w.info.shape), "dtype": _dtype(w), **asdict(s), "saved_scales": w.has_scales}
        for w, s in zip(found.weights, statistics, strict=True)
    ]
    return {**found.facts(), "modules": modules, "findings": found.findings}


def as_text(found: Inspection, statistics: Sequence[Statistics], fast: bool = False) -> str:
    """For people; arguments as :func:`inspect` takes and gives them."""
    a, record = found.architecture, found.record
    facts = {"checkpoint": f"{found.path} ({found.format})"}
    if found.format in ("torch_dist", "legacy"):
        facts["iteration"] = "unknown" if found.iteration is None else str(found.iteration)
        sizes = ", ".join(f"{name} {size}" for name, size in found.layout.items())
        how = "by its chunks; it loads at every layout" if found.format == "torch_dist" else "it loads at this one"
        facts["parallel"] = f"{sizes} ({how})"
        facts["optimizer"] = "its state is there" if found.optimizer_state else "no state"
    facts["model"] = found.about_architecture
    if a is not None:
        facts["shape"] = (
            f"{a.num_layers} layers, hidden {a.hidden_size}, ffn {a.ffn_hidden_size}, {a.num_attention_heads} heads of "
            f"{a.kv_channels} ({a.num_query_groups} key/value), up to {a.max_position_embeddings} tokens"
            + (", LongRoPE" if a.longrope else "")
        )
        padded = found.padded_vocabulary
        facts["vocabulary"] = (
            f"{a.vocab_size}"
            + (f", padded to {padded}" if padded not in (None, a.vocab_size) else "")
            + (", tied" if a.tied else ", not tied")
        )
    facts["parameters"] = f"{found.parameters:,}"
    dtypes = ", ".join(f"{name} {nbytes:,}" for name, nbytes in found.dtypes().items())
    facts["bytes"] = f"{found.nbytes:,}" + (f" ({dtypes})" if dtypes else "")
    facts["quantizer"] = "no record"
    if record is not None:
        groups = sorted({str(entry.get("group_size")) for entry in record.modules.values()}, key=int)
        facts["quantizer"] = (
            f"{record.state}, {record.space}, {len(record.modules)} modules with g {', '.join(groups)}, row-parallel "
            f"shards {record.row_parallel_shards}, eps {record.eps:g}, activations {record.activation_bits} bits, "
            f"of {record.latent_dtype} weights"
        )
    facts["digests"] = {None: "none", True: "every file matches", False: "files are damaged"}[found.digests]
    if fast and found.digests:
        facts["digests"] = "every size matches (--fast reads no contents)"
    count = sum(w.has_scales for w in found.weights)
    facts["saved scales"] = f"of {count} modules" if count else "none"
    lines = [f"{name + ':':14}{value}" for name, value in facts.items()]
    if found.weights:
        lines += ["", *_table(found.weights, statistics)]
    if found.findings:
        shown = found.findings[:_SHOWN]
        lines += ["", f"findings ({len(found.findings)}):", *(f"  {line}" for line in shown)]
        if len(shown) < len(found.findings):
            lines.append(f"  and {len(found.findings) - len(shown)} more (--json has them all)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects what the command line names; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every module")
    parser.add_argument("--fast", action="store_true", help="read no weights")
    add_pickle_argument(parser)
    args = parser.parse_args(argv)

    def work() -> None:
        found, statistics = inspect(args.path, args.allow_pickle, args.fast)
        if args.json:
            print(json.dumps(as_json(found, statistics), indent=1))
        else:
            print(as_text(found, statistics, args.fast))
        sys.stdout.flush()
        if found.findings:
            raise VerificationError(f"{found.path} contradicts itself: {len(found.findings)} findings")

    return run(work)


def _table(weights: Sequence[Weight], statistics: Sequence[Statistics]) -> list[str]:
    """One line for all layers that are alike."""
    alike: dict[tuple[Any, ...], list[tuple[str, Statistics]]] = {}
    for weight, s in zip(weights, statistics, strict=True):
        key = (_any_layer(weight.name), weight.info.shape, _dtype(weight), s.state, s.group_size)
        alike.setdefault(key, []).append((weight.name, s))
    rows = [_HEADER]
    for (name, shape, dtype, state, group), members in alike.items():
        values = [s for _, s in members]
        zeros = [s.zeros for s in values if s.zeros is not None]
        least = [s.scale_min for s in values if s.scale_min is not None]
        means = [s.scale_mean for s in values if s.scale_mean is not None]
        largest = [s.scale_max for s in values if s.scale_max is not None]
        rows.append(
            (
                _span(name, [n for n, _ in members]),
                "x".join(map(str, shape)),
                dtype,
                state,
                "" if group is None else str(group),
                f"{100 * sum(zeros) / len(zeros):.2f} %" if zeros else "",
                f"{min(least):.3g}" if least else "",
                f"{sum(means) / len(means):.3g}" if means else "",
                f"{max(largest):.3g}" if largest else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _any_layer(name: str) -> str:
    return re.sub(r"(^|\.)layers\.\d+\.", r"\1layers.*.", name)


def _span(alike: str, names: Sequence[str]) -> str:
    """``layers.*.`` with the numbers of all that are alike."""
    if "layers.*." not in alike:
        return alike
    numbers = (int(n) for name in names for n in re.findall(r"(?:^|\.)layers\.(\d+)\.", name)[:1])
    return alike.replace("layers.*.", f"layers.{ranges(numbers)}.")


def _dtype(weight: Weight) -> str:
    return str(weight.info.dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Reports what a checkpoint contains, how it was quantized, and whether it contradicts itself.

    inspect_checkpoint.py PATH [--json] [--fast]

PATH is a Megatron --save directory or one iteration of it (torch_dist or legacy), a Hugging Face model directory, one
.safetensors / .bin file, or a store of a teacher's targets. The table summarizes layers that are alike on one line: the
shape, the dtype, whether the weights are latent or fused (already codes times scales), the group size g in elements,
the share of zeros in the ternary weight, and the smallest, mean and largest scale. --fast reads no weights, and so
reports no values; --json has an entry for every module.

If there is a DIGESTS.json, every file is compared with it (with --fast, only the size of every file).

Exit status: 0 done, 1 failed, 2 bad input or arguments, 3 the checkpoint contradicts itself or its digests.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

if __package__ in (None, ""):
    # In a bare checkout, the package is found from the folder above this one.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron.checkpoint_tools.command import Parser, one_thread, progress, progress_of_reading, run
from bitcpm_megatron.checkpoint_tools.inspection import targets
from bitcpm_megatron.checkpoint_tools.inspection.inspection import Inspection, Statistics, Weight
from bitcpm_megatron.checkpoint_tools.inspection.opening import open_inspection
from bitcpm_megatron.checkpoint_tools.inspection.statistics import statistics_of
from bitcpm_megatron.checkpoint_tools.megatron_model.checkpoint import locate
from bitcpm_megatron.checkpoint_tools.storage.reader import VerificationError, dtype_name
from bitcpm_megatron.checkpoints.directory import TRACKER
from bitcpm_megatron.cli import ranges
from bitcpm_megatron.files import find_damage, read_digests
from bitcpm_megatron.quantization.record import FILE_NAME

_SHOWN = 20
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_HEADER = ("module", "shape", "dtype", "state", "g", "zeros", "scale min", "mean", "max")
# The last columns: the field of Statistics, the function that combines the values of layers that are alike, the format.
_COLUMNS: tuple[tuple[str, Callable[[list[float]], float], str], ...] = (
    ("zeros", lambda shares: 100 * fmean(shares), "{:.2f} %"),
    ("scale_min", min, "{:.3g}"),
    ("scale_mean", fmean, "{:.3g}"),
    ("scale_max", max, "{:.3g}"),
)


def inspect(path: Path, allow_pickle: bool = False, fast: bool = False) -> Inspection:
    """Inspects a checkpoint: returns its facts, its findings, and the statistics of each of its weights.

    Args:
        path: a checkpoint or model directory, or one weight file.
        allow_pickle: whether files that PyTorch's safe loader refuses may be unpickled, which can run code.
        fast: whether to read no weights and to compare only the sizes of the files with their digests.

    Raises:
        FileError: if there is no checkpoint at ``path``, or it cannot be opened.
        VerificationError: if it cannot be opened, and its files do not match their digests.
    """
    # The directory whose digests apply, and the files to check: for a directory all of its files.
    directory, names = (path.parent, [path.name, FILE_NAME]) if path.is_file() else (path, None)
    if (path / TRACKER).is_file():
        directory = locate(path)
    recorded = read_digests(directory)
    if recorded is None or fast:
        damage = find_damage(directory, names, contents=False)
    else:
        with progress_of_reading(directory, recorded if names is None else names) as bar:
            damage = find_damage(directory, names, on_read=bar.update)
    try:
        found = open_inspection(path, allow_pickle)
    except ValueError as error:
        if damage:
            raise VerificationError(f"{path} is damaged: {'; '.join(damage)}") from error
        raise
    found.digests = None if damage is None else len(damage) == 0
    found.findings += damage or []
    found.check_record()
    if fast:
        recorded_modules = {} if found.record is None else found.record.modules
        for weight in found.weights:
            if weight.linear:
                weight.statistics = Statistics("not read", recorded_modules.get(weight.name, {}).get("group_size"))
        return found
    with progress(found.nbytes, "reading") as bar, one_thread():
        for weight in found.weights:
            weight.statistics = statistics_of(weight, found.record, found.findings)
            bar.update(weight.info.nbytes)
    states = [w.statistics.state for w in found.weights if w.linear and w.statistics.zeros != 1.0]
    if found.record is None and "fused" in states and set(states) != {"fused"}:
        count = states.count("fused")
        found.findings.append(f"{count} of {len(states)} linears are ternary already, the others are not")
    return found


def as_json(found: Inspection) -> dict[str, Any]:
    """Returns everything that was found as one JSON object, with an entry for every module."""
    a = found.architecture
    modules = []
    for w in found.weights:
        about = {"name": w.name, "shape": list(w.info.shape), "dtype": dtype_name(w.info.dtype)}
        modules.append({**about, **asdict(w.statistics), "saved_scales": w.has_scales})
    return {
        "path": str(found.path),
        "format": found.format,
        "iteration": found.iteration,
        "layout": found.layout or None,
        "architecture": None if a is None else asdict(a),
        "about_architecture": found.about_architecture,
        "parameters": found.parameters,
        "dtypes": found.dtypes(),
        "bytes": found.nbytes,
        "tied": None if a is None else a.tied,
        "padded_vocabulary": found.padded_vocabulary,
        "optimizer_state": found.optimizer_state,
        "quantizer": None if found.record is None else found.record.content(),
        "digests": found.digests,
        "saved_scales": sum(w.has_scales for w in found.weights),
        "modules": modules,
        "findings": found.findings,
    }


def as_text(found: Inspection, fast: bool = False) -> str:
    """Returns what was found as text for people: facts, the table of weights, and the first findings."""
    a, record = found.architecture, found.record
    facts = {"checkpoint": f"{found.path} ({found.format})"}
    if found.of_megatron:
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
            f"{record.state}, {record.space}, scales of {record.scale_multiplier:g} {record.statistic}, "
            f"{len(record.modules)} modules with g {', '.join(groups)}, row-parallel "
            f"shards {record.row_parallel_shards}, eps {record.eps:g}, activations {record.activation_bits} bits, "
            f"of {record.latent_dtype} weights"
            + (f", saved on a ramp with {record.ramp:.3g} of the quantizer" if record.ramp < 1.0 else "")
        )
    facts["digests"] = {None: "none", True: "every file matches", False: "files are damaged"}[found.digests]
    if fast and found.digests:
        facts["digests"] = "every size matches (--fast reads no contents)"
    count = sum(w.has_scales for w in found.weights)
    facts["saved scales"] = f"of {count} modules" if count else "none"
    lines = [f"{name + ':':14}{value}" for name, value in facts.items()]
    if found.weights:
        lines += ["", *_table(found.weights)]
    if found.findings:
        shown = found.findings[:_SHOWN]
        lines += ["", f"findings ({len(found.findings)}):", *(f"  {line}" for line in shown)]
        if len(shown) < len(found.findings):
            lines.append(f"  and {len(found.findings) - len(shown)} more (--json has them all)")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects the checkpoint that the command line names, and returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every module")
    parser.add_argument("--fast", action="store_true", help="read no weights")
    args = parser.parse_args(argv)

    def work() -> None:
        if targets.is_store(args.path):
            facts, findings = targets.inspect_store(args.path, args.fast)
            print(json.dumps(facts, indent=1) if args.json else targets.as_text(facts), flush=True)
            if findings:
                raise VerificationError(f"{args.path} is damaged: {len(findings)} findings")
            return
        found = inspect(args.path, args.allow_pickle, args.fast)
        print(json.dumps(as_json(found), indent=1) if args.json else as_text(found, args.fast), flush=True)
        if found.findings:
            raise VerificationError(f"{found.path} contradicts itself: {len(found.findings)} findings")

    return run(work)


def _table(weights: Sequence[Weight]) -> list[str]:
    """Returns the lines of the table of weights, with one line for all layers that are alike."""
    alike: dict[tuple[Any, ...], list[Weight]] = {}
    for weight in weights:
        s, name = weight.statistics, _LAYER.sub(r"\1layers.*.", weight.name)
        key = (name, "x".join(map(str, weight.info.shape)), dtype_name(weight.info.dtype), s.state, s.group_size)
        alike.setdefault(key, []).append(weight)
    rows = [_HEADER]
    for (name, shape, dtype, state, group), members in alike.items():
        numbers = ranges(int(n[2]) for member in members if (n := _LAYER.search(member.name)))
        cells = [
            name.replace("layers.*.", f"layers.{numbers}."),
            shape,
            dtype,
            state,
            "" if group is None else str(group),
        ]
        for column, how, form in _COLUMNS:
            values = [value for m in members if (value := getattr(m.statistics, column)) is not None]
            cells.append(form.format(how(values)) if values else "")
        rows.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())

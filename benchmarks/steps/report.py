# SPDX-License-Identifier: Apache-2.0
"""Report of measured steps: rows of results, written as a CSV file, a picture and Markdown tables."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import megatron.core
from cost.workload import flops_per_token, layout_of
from hardware import machine, versions
from report.intervals import median_interval
from report.pictures import picture
from report.tables import markdown, number, write_csv

from bitcpm_megatron.training.flags import parse_args
from steps.plan import BASELINE, DOCUMENTS, RESIDENT, STEP, Job
from steps.variants import INT8, PEERS, VARIANTS

MIB = 2**20
# Peak of dense bf16 in TFLOP/s by device name, from NVIDIA's data sheets.
PEAK_TFLOPS = {"A100": 312.0, "H100 80GB HBM3": 989.0, "H200": 989.0}


@dataclass
class Row:
    """Results of one variant at one layout, number of tokens and number of micro-batches; None if not measured.

    Attributes that are not listed are sizes and settings of the job.

    Attributes:
        tokens: the tokens per micro-batch and data-parallel rank, over all its context-parallel ranks.
        packed: whether a sequence consists of several documents.
        micro_batches: the number of micro-batches per step.
        pairs: the number of timed steps.
        ratio: the median ratio of this variant's step time to BF16's over pairs of steps, with a 95 % interval.
        of_step: the same ratio to the step time of the cache ``step``, if both were interleaved.
        tflops_per_device: by Megatron-LM's formula for the model, without the additional work of a variant.
        mfu: ``tflops_per_device`` as a fraction of the device's peak.
        peak_bytes: the peak of tensors on one rank, from building the model to the end of the steps.
        resident_bytes: the bytes of tensors on one rank after a step.
        quantized_weights: the number of elements of quantized weights on one rank.
        quantizer_ms: the milliseconds of the quantizer per step on one rank, measured separately.
        quantizations: the number of quantizations of weights, or of a rank's shards of them, per step on one rank.
        launches: the number of launches of the quantizer's kernels per step on one rank.
        collective_bytes: the payload that one rank hands to collectives in a step.
        live_copies: the largest number of copies of one quantized weight in addition to its parameter, in cache and
            autograd together.
        peak_ratio: ``peak_bytes`` in units of BF16's.
        gathered_per_weight: the bytes per quantized weight that the distributed optimizer gathers, including everything
            else that ternary training sends in addition to BF16.
        gemm_ms: the milliseconds of only the GEMMs of one forward pass through all quantized linears of a rank, with
            weights in their stored dtype.
        int8_gemm_ms: the same for int8 GEMMs, including the scaling of the sums.
        int8_forward_ms: the same for int8 GEMMs, including the quantization of the activations, too.
    """

    layout: str
    tp: int
    pp: int
    cp: int
    dp: int
    device: str
    model: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    packed: bool
    tokens: int
    micro_batches: int
    recompute: str
    variant: str
    backend: str
    pairs: int
    step_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    of_step: float | None = None
    of_step_low: float | None = None
    of_step_high: float | None = None
    tokens_per_second_per_device: float | None = None
    tflops_per_device: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    quantized_weights: int | None = None
    quantizer_ms: float | None = None
    quantizations: int | None = None
    launches: int | None = None
    collective_bytes: int | None = None
    live_copies: int | None = None
    peak_ratio: float | None = None
    gathered_per_weight: float | None = None
    gemm_ms: float | None = None
    int8_gemm_ms: float | None = None
    int8_forward_ms: float | None = None


def rows_of(job: Job, results: dict, peak_tflops: float | None = None) -> list[Row]:
    """Returns the rows of one job.

    Args:
        job: the job.
        results: the results that ``throughput_job.py`` wrote.
        peak_tflops: the peak of one device in TFLOP/s, or None to take it from the device's name.
    """
    rows = []
    for session in results["sessions"]:
        taken = dict(zip(session["variants"], session["seconds"], strict=True))
        for name, seconds in taken.items():
            row = _row(job, results, name, session["micro_batches"], len(seconds))
            _timed(row, taken, peak_tflops)
            for key, value in session["counted"].get(name, {}).items():
                setattr(row, key, value)
            rows.append(row)
            _gathered(row, job, session["counted"].get(BASELINE, {}).get("collective_bytes"))
    timed = {row.variant for row in rows}
    alone = [name for name in results["costs"] if name not in timed]
    return rows + [_row(job, results, name, results["cost_micro_batches"], 0) for name in alone]


def _row(job: Job, results: dict, name: str, micro_batches: int, pairs: int) -> Row:
    args = parse_args(job.arguments(), job.layout.processes)
    backend = next((n.split(":")[1].split()[0] for n in results["notes"].get(name, []) if "quantizer backend" in n), "")
    same = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    row = Row(
        layout=str(job.layout),
        tp=job.layout.tensor,
        pp=job.layout.pipeline,
        cp=job.layout.context,
        dp=job.layout.data,
        device=results["device"],
        model=job.model,
        **{key: getattr(args, key) for key in same},
        vocab_size=args.vocab_size,
        seq_length=job.seq_length,
        micro_batch_size=job.micro_batch_size,
        packed=job.packed,
        tokens=job.seq_length * job.micro_batch_size,
        micro_batches=micro_batches,
        recompute=job.recompute,
        variant=name,
        backend=backend,
        pairs=pairs,
    )
    for key, value in results["costs"].get(name, {}).items():
        setattr(row, key, value)
    baseline = results["costs"].get(BASELINE, {}).get("peak_bytes")
    if row.peak_bytes is not None and baseline:
        row.peak_ratio = row.peak_bytes / baseline
    return row


def _gathered(row: Row, job: Job, baseline: int | None) -> None:
    """Fills in the gathered bytes per weight: BF16's 2 bytes plus the difference of payloads over the weights."""
    weights = row.quantized_weights
    if job.layout.distributed_optimizer and job.layout.data > 1 and weights and None not in (row.launches, baseline):
        row.gathered_per_weight = 2 + (row.collective_bytes - baseline) / weights


def _timed(row: Row, taken: Mapping[str, Sequence[float]], peak_tflops: float | None) -> None:
    """Fills in the values of a row that follow from the seconds of a session's steps, ``taken``, by variant."""
    seconds = taken[row.variant]
    row.step_ms = 1e3 * statistics.median(seconds)
    if row.variant != BASELINE:
        row.ratio, row.ratio_low, row.ratio_high = _of_pairs(seconds, taken[BASELINE])
    if STEP in taken and row.variant not in (BASELINE, STEP):
        row.of_step, row.of_step_low, row.of_step_high = _of_pairs(seconds, taken[STEP])
    devices = row.tp * row.pp * row.cp * row.dp
    row.tokens_per_second_per_device = row.tokens * row.micro_batches * row.dp / (row.step_ms / 1e3) / devices
    # Tokens attend only within their document.
    attended = int(row.seq_length * sum(share**2 for share in DOCUMENTS)) if row.packed else row.seq_length
    flops = flops_per_token(layout_of({**vars(row), "seq_length": attended}, tied=True))
    row.tflops_per_device = row.tokens_per_second_per_device * flops / 1e12
    peak = peak_tflops or next((peak for name, peak in PEAK_TFLOPS.items() if name in row.device), None)
    row.mfu = None if peak is None else row.tflops_per_device / peak


def _of_pairs(seconds: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    return median_interval([s / o for s, o in zip(seconds, others, strict=True)])


def last_line(rows: Sequence[Row]) -> str | None:
    """Returns the line that ``make bench`` prints at the end, or None if its numbers were not measured."""
    resident = [row for row in rows if row.variant == RESIDENT and row.recompute == "none"]
    times = (row.ratio for row in resident if (row.layout, row.micro_batches) == ("TP2", 8))
    peaks = (row.peak_ratio for row in resident if row.layout == "TP1")
    time, peak = (next((ratio for ratio in ratios if ratio is not None), None) for ratios in (times, peaks))
    if time is None or peak is None:
        return None
    line = f"bench: ternary/bf16 step time {time:.3f} (8 micro-batches, TP2), peak memory {peak:.3f} ({RESIDENT}, TP1)"
    long = (r for r in rows if (r.variant, r.layout, r.micro_batches, r.tokens) == (INT8, "TP1", 8, 1024))
    int8 = next((row.ratio for row in long), None)
    return line if int8 is None else f"{line}, int8 {int8:.3f} (8 x 1,024 tokens, TP1)"


def write(rows: Sequence[Row], directory: Path, name: str, command: str) -> None:
    """Writes ``name.csv``, ``name.png`` and ``name.md``, and prints the content of the last."""
    write_csv([asdict(row) for row in rows], directory / f"{name}.csv", ".6g")
    draw(rows, directory / f"{name}.png")
    text = tables(rows, command)
    (directory / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def tables(rows: Sequence[Row], command: str) -> str:
    """Returns tables of steps, peers and memory in Markdown, with a description of the machine and the versions."""
    parts = [_step_table([r for r in rows if r.step_ms is not None and r.variant not in PEERS])]
    beside_step = [r for r in rows if r.of_step is not None and r.variant not in PEERS]
    if beside_step:
        parts += ["Against the cache `step`, in pairs of the same rounds:", _of_step_table(beside_step)]
    peers = _sessions_with_peers(rows)
    if peers:
        parts += ["Peers, quantizing inside the same linear layers, all interleaved in one job:", _peer_table(peers)]
    integers = [r for r in rows if r.int8_gemm_ms is not None]
    if integers:
        parts += ["One forward through all quantized linears, their GEMMs alone:", _gemm_table(integers)]
    if any(r.peak_bytes for r in rows):
        parts += ["Memory of one rank, of a model that is alone in the job:", _memory_table(rows)]
    return "\n\n".join([*parts, _provenance(rows, command)]) + "\n"


def _step_table(rows: Sequence[Row]) -> str:
    head = (
        "layout | tokens per micro-batch | micro-batches | variant | step, ms | of BF16's (95 %) | pairs | "
        "peak memory of BF16's | quantizer launches per step | quantizer, ms per step | tokens/s per device | "
        "TFLOP/s per device | MFU | collectives, MiB per step | gathered, bytes per quantized weight"
    )
    lines = (
        f"{_place(r)} | {r.tokens} | {r.micro_batches} | {r.variant} | {r.step_ms:.1f} | {_ratio(r, '**')} | "
        f"{r.pairs} | {number(r.peak_ratio, 3)} | {number(r.launches, 0)} | {number(r.quantizer_ms)} | "
        f"{r.tokens_per_second_per_device:.0f} | {r.tflops_per_device:.3g} | {number(r.mfu, unit=' %', scale=100)} | "
        f"{number(r.collective_bytes, scale=1 / MIB)} | {number(r.gathered_per_weight, 3)}"
        for r in rows
    )
    return markdown(head, lines)


def _of_step_table(rows: Sequence[Row]) -> str:
    lines = (
        f"{_place(r)} | {r.tokens} | {r.micro_batches} | {r.variant} | "
        f"{_with_interval(r.of_step, r.of_step_low, r.of_step_high, '**')} | {r.pairs}"
        for r in rows
    )
    return markdown("layout | tokens per micro-batch | micro-batches | variant | of step's (95 %) | pairs", lines)


def _gemm_table(rows: Sequence[Row]) -> str:
    lines = (
        f"{_place(r)} | {r.tokens} | {r.gemm_ms:.2f} | {r.int8_gemm_ms:.2f} | {r.gemm_ms / r.int8_gemm_ms:.2f} | "
        f"{r.int8_forward_ms:.2f} | {r.gemm_ms / r.int8_forward_ms:.2f}"
        for r in {(r.layout, r.tokens): r for r in rows}.values()
    )
    head = "layout | tokens | bf16, ms | int8, ms | times as fast | int8 with quantization, ms | times as fast"
    return markdown(head, lines)


def _place(row: Row) -> str:
    packed = ", packed" if row.packed else ""
    return row.layout + packed + ("" if row.recompute == "none" else f", {row.recompute} recompute")


def _ratio(row: Row, emphasis: str = "") -> str:
    return "1" if row.ratio is None else _with_interval(row.ratio, row.ratio_low, row.ratio_high, emphasis)


def _with_interval(ratio: float, low: float, high: float, emphasis: str) -> str:
    return f"{emphasis}{ratio:.3f}{emphasis} ({low:.3f} - {high:.3f})"


def _sessions_with_peers(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns the rows of the sessions that contain peers, by session name; the rows of a session are consecutive."""
    sessions: list[list[Row]] = []
    for row in (r for r in rows if r.step_ms is not None):
        if row.variant == BASELINE or not sessions:
            sessions.append([])
        sessions[-1].append(row)
    return {_session_name(s[0]): s for s in sessions if any(r.variant in PEERS for r in s)}


def _session_name(row: Row) -> str:
    return f"{_place(row)}, {row.micro_batches} x {row.tokens} tokens"


def _peer_table(sessions: dict[str, list[Row]]) -> str:
    ratios = [{r.variant: _ratio(r) for r in session} for session in sessions.values()]
    lines = (
        " | ".join([variant, *(found.get(variant, "") for found in ratios), VARIANTS[variant].note])
        for variant in {variant: None for found in ratios for variant in found}
    )
    return markdown(" | ".join(["variant", *sessions]) + " |", lines)


def _memory_table(rows: Sequence[Row]) -> str:
    head = (
        "layout | tokens per micro-batch | variant | peak, MiB | of BF16's | more than BF16 | in copies of the "
        "quantized weights (bf16) | copies of a quantized weight beside its parameter"
    )
    lines, baseline = [], None
    for r in {(r.layout, r.tokens, r.seq_length, r.recompute, r.variant): r for r in rows if r.peak_bytes}.values():
        if r.variant == BASELINE:
            baseline = r
        more = None if baseline is None or r is baseline else r.peak_bytes - baseline.peak_bytes
        copies = None if more is None or not r.quantized_weights else more / (2 * r.quantized_weights)
        lines.append(
            f"{_place(r)} | {r.tokens} | {r.variant} | {r.peak_bytes / MIB:.1f} | {number(r.peak_ratio, 3)} | "
            f"{number(more, unit=' MiB', scale=1 / MIB)} | {number(copies, 2)} | {number(r.live_copies, 0)}"
        )
    return markdown(head, lines)


def _provenance(rows: Sequence[Row], command: str) -> str:
    shapes = {
        f"{r.model}: {r.num_layers} layers, hidden {r.hidden_size}, ffn {r.ffn_hidden_size}, {r.num_attention_heads} "
        f"heads in {r.num_query_groups} groups of {r.kv_channels}, vocabulary {r.vocab_size}"
        for r in rows
    }
    backends = ", ".join(sorted({r.backend for r in rows if r.backend}))
    lines = [
        f"Hardware: {_device(rows[0])}. Versions: {versions(megatron.core)}."
        + (f" Quantizer backend: {backends}." if backends else ""),
        *sorted(shapes),
        "Collectives: what a rank hands to them, in groups of one rank, too. Gathered: 2 bytes, and per weight what "
        "ternary's collectives have beyond BF16's.",
        f"Command: `{command}`",
    ]
    return "\n".join(lines)


def _device(row: Row) -> str:
    return machine("cpu") if row.device == "cpu" else row.device


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws step times in units of BF16's: our variants by layout and micro-batches, and the peers with ours."""
    peers = _sessions_with_peers(rows)
    beside = {id(r) for session in peers.values() for r in session}
    ours = [r for r in rows if r.ratio is not None and id(r) not in beside]
    labels = [f"{r.variant}\n{_session_name(r)}" for r in ours]
    panels = [("median and 95 % interval", labels, ours)] if ours else []
    for name, session in peers.items():
        compared = [r for r in session if r.ratio is not None]
        panels.append((f"beside its peers: {name}", [r.variant for r in compared], compared))
    title = f"{rows[0].model}, {_device(rows[0])}"
    height = max(5, 0.3 * max((len(shown) for _, _, shown in panels), default=0))
    with picture(path, 5.5 * len(panels), height, len(panels), title) as all_axes:
        for axes, (heading, labels, shown) in zip(all_axes, panels, strict=True):
            # With too few pairs, the interval is infinite and no error bar is drawn.
            finite = [r.ratio_high < float("inf") for r in shown]
            low = [r.ratio - r.ratio_low if ok else 0.0 for r, ok in zip(shown, finite, strict=True)]
            high = [r.ratio_high - r.ratio if ok else 0.0 for r, ok in zip(shown, finite, strict=True)]
            drawn = axes.barh(range(len(shown)), [r.ratio - 1 for r in shown], left=1, xerr=[low, high], capsize=2)
            axes.bar_label(drawn, [f" {r.ratio:.3f}" for r in shown], fontsize=7, padding=8)
            axes.axvline(1, color="black", linewidth=1)
            axes.set_yticks(range(len(labels)), labels, fontsize=7)
            axes.invert_yaxis()
            axes.margins(x=0.2)
            axes.set_xlabel("step time, in units of BF16's")
            axes.set_title(heading, fontsize=9)

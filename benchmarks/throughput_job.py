# SPDX-License-Identifier: Apache-2.0
"""One job of the throughput benchmark: all variants at one layout, with their steps interleaved.

``throughput.py`` starts it under torchrun, with a plan (JSON) and a path for the results. Every variant has its own
model and optimizer, and its own copy of the same data. A round runs one step of each variant, in an order that changes,
so that a slowdown of the machine affects all of them.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from steps.meters import CollectiveBytes, live_copies, memory, quantizer_work
from steps.plan import COST_STEPS, DOCUMENTS, PROGRESS, WARM_UP
from steps.variants import VARIANTS, Variant, check_peers_use_their_weight, install_peer

from bitcpm_megatron import cli
from bitcpm_megatron.attention.documents import STARTS
from bitcpm_megatron.files import read_json
from bitcpm_megatron.ops.int8.timing import time_gemms
from bitcpm_megatron.parallel import ternary_modules
from bitcpm_megatron.parallel.resident import latents
from bitcpm_megatron.training.data import Batch, build_tokenizer, of_this_rank
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.initialize import device, initialize, shutdown, world_size
from bitcpm_megatron.training.loop import train_step
from bitcpm_megatron.training.model import build_model
from bitcpm_megatron.training.run import Run, build_run

_QUANTIZER_ROUNDS = 7


@dataclass
class Subject:
    """A variant with its own model, optimizer and data.

    Attributes:
        variant: the variant.
        args: the arguments of our training loop.
        run: the model and the optimizer.
        data: an endless iterator of micro-batches.
    """

    variant: Variant
    args: argparse.Namespace
    run: Run
    data: Iterator[Batch]

    def step(self, micro_batches: int) -> None:
        """Runs one optimizer step, and reports it as progress."""
        self.silent_step(micro_batches)
        tell(micro_batches)

    def silent_step(self, micro_batches: int) -> None:
        """Runs one optimizer step without reporting it."""
        self.args.num_microbatches = micro_batches
        self.args.global_batch_size = micro_batches * self.args.micro_batch_size * self.args.data_parallel_size
        train_step(self.run, self.data)


def build(name: str, flags: Sequence[str]) -> Subject:
    """Builds the model, optimizer and data of a variant with the given flags.

    Raises:
        RuntimeError: if a peer's quantizer is not used in the forward pass, or a forward of the BF16 model is wrapped.
    """
    variant = VARIANTS[name]
    args = parse_args(flags, world_size())
    _, vocabulary = build_tokenizer(args)
    model = build_model(args, vocabulary)
    if variant.make_quantizer is not None:
        for chunk in model.bare:
            install_peer(variant, chunk)
            check_peers_use_their_weight(chunk)
    elif not variant.ternary and any("forward" in m.__dict__ for c in model.bare for m in c.modules()):
        raise RuntimeError("the BF16 model has a wrapped forward: it would be no baseline")
    return Subject(variant, args, build_run(args, model), _batches(args, vocabulary))


def _batches(args: argparse.Namespace, vocabulary: int) -> Iterator[Batch]:
    """Returns an endless iterator over four micro-batches of random tokens, which are created in advance."""
    g = torch.Generator().manual_seed(args.seed)
    shape = (args.micro_batch_size, args.seq_length)
    position = torch.arange(args.seq_length).expand(shape).contiguous()
    made = []
    for _ in range(4):
        tokens = torch.randint(0, min(args.vocab_size, vocabulary), shape, generator=g)
        batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "position_ids": position}
        batch["loss_mask"] = torch.ones(shape)
        if args.reset_attention_mask:
            _divide(batch)
        made.append(of_this_rank(args, batch))
    return itertools.cycle(made)


def _divide(batch: dict[str, torch.Tensor]) -> None:
    """Divides the sequences of a batch into consecutive documents, with the shares in :data:`DOCUMENTS`."""
    length = batch["tokens"].shape[1]
    ends = torch.tensor(DOCUMENTS).cumsum(0).mul(length).long()
    batch[STARTS] = torch.zeros_like(batch["tokens"], dtype=torch.bool)
    batch[STARTS][:, ends[:-1]] = True
    lengths = ends.diff(prepend=ends.new_zeros(1))
    batch["position_ids"] = batch["position_ids"] - (ends - lengths).repeat_interleave(lengths)


def costs(name: str, flags: Sequence[str], micro_batches: int) -> dict:
    """Measures the memory of a variant, whose model is the only one in the job; the largest value of any rank."""
    with memory(device()) as found:
        subject = build(name, flags)
        for _ in range(COST_STEPS - 1):
            subject.step(micro_batches)
    # Copies are not watched with int8 input gradients, which do not work under saved-tensor hooks.
    watched = subject.run.model.states and subject.args.ternary_gemm_backward == "bf16"
    with live_copies() if watched else contextlib.nullcontext() as copies:
        subject.step(micro_batches)
    result = {
        "peak_bytes": _most(found.peak),
        "resident_bytes": _most(found.resident),
        "live_copies": _most(copies.most) if watched else None,
        "quantized_weights": _most(_quantized_weights(subject)),
    }
    del subject, watched
    gc.collect()
    return result


def _quantized_weights(subject: Subject) -> int:
    return sum(module.weight.numel() for _, module in ternary_modules(subject.run.model.bare))


def _most(value: int | None) -> int | None:
    if value is None:
        return None
    number = torch.tensor([value], dtype=torch.int64, device=device())
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number.item())


def interleave(subjects: list[Subject], micro_batches: int, rounds: int) -> list[list[float]]:
    """Times interleaved steps, and returns the seconds of the slowest rank for each step, ``[subjects][rounds]``."""
    taken = torch.zeros(len(subjects), rounds, dtype=torch.float64)
    for subject in subjects:
        for _ in range(WARM_UP):
            subject.step(micro_batches)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for i in order(len(subjects), turn):
                taken[i, turn] = _timed(lambda subject=subjects[i]: subject.silent_step(micro_batches))
                tell(micro_batches)
    finally:
        gc.enable()
    taken = taken.to(device())
    torch.distributed.all_reduce(taken, op=torch.distributed.ReduceOp.MAX)
    return taken.tolist()


def order(count: int, turn: int) -> list[int]:
    """Returns the order in which ``count`` subjects step in round ``turn``, a row of a Williams square.

    Over ``count`` rounds each subject takes every place once, and, if ``count`` is even, follows every other subject
    equally often.
    """
    first = [0, *(x for i in range(1, count) for x in (i, count - i))][:count]
    return [(place + turn) % count for place in first]


def _timed(function) -> float:  # noqa: ANN001 - any callable
    torch.cuda.synchronize()  # on a machine without CUDA this does nothing
    torch.distributed.barrier()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def counted(subject: Subject, micro_batches: int) -> dict:
    """Counts the work of a step: the payload of its collectives, and the quantizer's work; the most of any rank."""
    modules = ternary_modules(subject.run.model.bare)
    before = sum(state.count for state, _ in modules)
    with CollectiveBytes() as collectives, quantizer_work() as work:
        subject.step(micro_batches)
    found = {"collective_bytes": _most(collectives.total)}
    if subject.variant.ternary:
        found["quantizations"] = _most(sum(state.count for state, _ in modules) - before)
        found["launches"] = _most(work.launches)
        share = _most(work.elements) / max(1, sum(module.weight.numel() for _, module in modules))
        found["quantizer_ms"] = 1e3 * quantizer_seconds(subject) * share
    return found


def quantizer_seconds(subject: Subject) -> float:
    """Returns the median seconds to quantize every weight of this rank once, one after another, into new tensors."""
    modules = ternary_modules(subject.run.model.bare)

    def once() -> None:
        for state, module in modules:
            state.quantize(module.weight)

    with latents(subject.run.model.chunks):
        return statistics.median(_timed(once) for _ in range(_QUANTIZER_ROUNDS))


def gemms(subject: Subject) -> dict:
    """Returns the milliseconds of a forward pass through only this rank's quantized linears, as stored and in int8."""
    tokens = subject.args.seq_length * subject.args.micro_batch_size
    weights = [module.weight for _, module in ternary_modules(subject.run.model.bare)]
    times = {weight.shape: time_gemms(weight, tokens) for weight in weights}
    found = [times[weight.shape] for weight in weights]
    return {
        "gemm_ms": sum(each.plain for each in found),
        "int8_gemm_ms": sum(each.integers for each in found),
        "int8_forward_ms": sum(each.int8 for each in found),
    }


def work(plan: dict) -> dict:
    """Carries out a plan and returns the results.

    Args:
        plan: ``flags``, the flags of our training loop by variant; ``costs``, the variants whose memory is measured, in
            steps of ``cost_micro_batches``; and ``sessions``, each with ``variants``, ``micro_batches`` and ``rounds``.

    Returns:
        ``costs`` by variant; ``sessions``, each with ``seconds`` ``[variants][rounds]`` and ``counted`` by variant;
        ``cost_micro_batches``; ``notes`` of the models by variant; ``device``; and ``threads``.
    """
    flags = plan["flags"]
    for name in plan["costs"]:
        # A first step is not measured, because one-time allocations (imports, kernels) do not belong to a variant.
        build(name, flags[name]).step(plan["cost_micro_batches"])
    results = {"costs": {name: costs(name, flags[name], plan["cost_micro_batches"]) for name in plan["costs"]}}
    names = dict.fromkeys(name for session in plan["sessions"] for name in session["variants"])
    subjects = {name: build(name, flags[name]) for name in names}
    results["sessions"] = []
    for session in plan["sessions"]:
        chosen = [subjects[name] for name in session["variants"]]
        seconds = interleave(chosen, session["micro_batches"], session["rounds"])
        results["sessions"].append({**session, "seconds": seconds})
        _say(f"{session['micro_batches']} micro-batches, {session['rounds']} rounds: done")
    # Counting follows all timing: after its first call under a dispatch mode, code of torch.compile is interpreted.
    for session in results["sessions"]:
        session["counted"] = {n: counted(subjects[n], session["micro_batches"]) for n in session["variants"]}
    # Times of the linears alone are the same for all int8 variants and in all sessions, so they are measured once.
    integers = [n for n, s in subjects.items() if s.variant.ternary and s.args.ternary_gemm == "int8"]
    alone = gemms(subjects[integers[0]]) if integers else {}
    for session in results["sessions"]:
        for name in set(integers) & set(session["variants"]):
            session["counted"][name] |= alone
    notes = {name: subject.run.model.notes for name, subject in subjects.items()}
    results["cost_micro_batches"] = plan["cost_micro_batches"]
    return {**results, "notes": notes, "device": _device_name(), "threads": torch.get_num_threads()}


def _device_name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else "cpu"


def tell(micro_batches: int) -> None:
    """Reports on rank 0 that a step of so many micro-batches is over."""
    _say(f"{PROGRESS}{micro_batches}")


def _say(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


def _keep_to_own_cores(rank: int, ranks: int) -> None:
    """Binds a rank to its own cores: on two cores, the step times of two ranks then vary only a third as much."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    first = rank * share % len(cores)
    os.sched_setaffinity(0, cores[first : first + share])


def main() -> int:
    """Reads the plan, carries it out, writes the results, and returns the exit status."""
    if len(sys.argv) != 3:
        cli.complain("throughput_job.py is started by throughput.py, with a plan and a place for the results")
        return cli.BAD_INPUT
    return cli.run(lambda: _carry_out(read_json(Path(sys.argv[1])), Path(sys.argv[2])))


def _carry_out(plan: dict, output: Path) -> None:
    ranks = cli.from_environment("LOCAL_WORLD_SIZE", cli.Whole(), 1)
    if world_size() > 1 and not torch.cuda.is_available():
        _keep_to_own_cores(cli.from_environment("LOCAL_RANK", cli.Whole(0), 0), ranks)
    initialize(parse_args(next(iter(plan["flags"].values())), world_size()))
    results = work(plan)
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(results), encoding="utf-8")
    shutdown()


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Calibration of the cost model: the rates of the device at hand, measured in a few seconds."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from hardware import machine

from bitcpm_megatron.cli import FailedError
from bitcpm_megatron.launch.estimates.shapes import Linear
from bitcpm_megatron.ops import active_backend
from bitcpm_megatron.quantization import QuantizerConfig, effective_group
from cost.model import Collective
from cost.workload import ADAM_BYTES, BYTES, Machine, Workload

# Largest FLOP of a linear's GEMMs, which are measured with fewer tokens beyond it: a layer of a large model would take
# seconds on a CPU.
_FLOP_LIMIT = 1.5e11
_ELEMENTS_LIMIT = 2**22
_RING_BYTES = 2**28


def calibrate(workload: Workload, device: str = "cpu") -> Machine:
    """Measures the rates of the device at hand, in a few seconds, at the shapes of a workload.

    On a CPU, it uses as many threads as each of the workload's ranks would have. It runs alone, so that effects of
    ranks on each other, such as sharing the memory bandwidth, are not included.

    Raises:
        FailedError: if gloo cannot connect two ranks on this machine.
    """
    ranks = workload.layout.world
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    try:
        gemm = _gemm_rate(workload, device)
        copy, quantizer, launch_seconds = _copy_and_quantizer(workload, device)
        return Machine(
            "this CPU" if device == "cpu" else machine(device),
            peak_flops=gemm,
            achieved_flops=gemm,
            memory_bandwidth=copy,
            link_bandwidth=_link_rate() if ranks > 1 and device == "cpu" else copy,
            launch_us=launch_seconds * 1e6,
            quantizer_copies=quantizer,
            optimizer_bandwidth=_optimizer_rate(device),
            saved_bandwidth=_saved_rate(workload, device),
        )
    finally:
        torch.set_num_threads(before)


def _gemm_rate(workload: Workload, device: str) -> float:
    """Returns the FLOP/s of all GEMMs of a step.

    These are forward, input gradient and weight gradient with its addition to the fp32 buffer.
    """
    seconds = flops = 0.0
    head = Linear("output_layer", workload.vocabulary, workload.layout.hidden, False)
    for linear, count in [*((x, workload.layers) for x in workload.layout.linears(0)), (head, 1)]:
        tp = workload.layout.tp
        rows = linear.out_features // (1 if linear.row_parallel else tp)
        columns = linear.in_features // (tp if linear.row_parallel else 1)
        work = 6.0 * workload.tokens * rows * columns
        tokens = max(16, int(workload.tokens * min(1.0, _FLOP_LIMIT / 4 / work)))
        gemms, addition = _linear_seconds(tokens, rows, columns, device)
        seconds += count * (gemms * workload.tokens / tokens + addition)
        flops += count * work
    return flops / seconds


def _linear_seconds(tokens: int, rows: int, columns: int, device: str) -> tuple[float, float]:
    weight, x = _random(rows, columns, device=device), _random(tokens, columns, device=device)
    gradient, total = _random(tokens, rows, device=device), torch.zeros(rows, columns, device=device)

    def gemms() -> torch.Tensor:
        torch.matmul(x, weight.t())
        torch.matmul(gradient, weight)
        return torch.matmul(gradient.t(), x)

    made = gemms()
    return _seconds(gemms, device), _seconds(lambda: total.add_(made), device)


def _copy_and_quantizer(workload: Workload, device: str) -> tuple[float, float, float]:
    """Measures the copy and the quantizer.

    Each processes a ring of weights that is larger than the caches, and allocates memory for its results, which stay.

    Returns:
        The bytes/s of a copy, read and written; the quantizer's time in units of that of a copy of the same bytes; and
        the quantizer's seconds for a tiny weight.
    """
    kernel = active_backend(device).backend.kernel
    config = QuantizerConfig(group_size=workload.group_size)
    columns = workload.layout.hidden
    rows = max(16, min(_ELEMENTS_LIMIT // columns, max(x.out_features for x in workload.layout.linears(0))))
    first = _random(rows, columns, device=device)
    ring = [first.clone() for _ in range(max(2, _RING_BYTES // 2 // first.nbytes))]
    kept: list[object] = [None] * len(ring)

    def over(function: Callable[[torch.Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for i, weight in enumerate(ring):
                kept[i] = function(weight)

        return run

    copy, quantizer = _medians([over(torch.clone), over(lambda weight: kernel(weight, config, None))], device, 4)
    moved = 2.0 * first.nbytes * len(ring)
    scales = BYTES * first.numel() / effective_group(columns, config.group_size) * len(ring)
    small = first[:1].clone()
    launch_seconds = _seconds(lambda: kernel(small, config, None), device)
    return moved / copy, quantizer / (copy * (moved + scales) / moved), launch_seconds


def _optimizer_rate(device: str) -> float:
    """Returns the bytes/s, at :data:`ADAM_BYTES` per parameter, of megatron-core's AdamW if it has no fused one."""
    master = torch.nn.Parameter(torch.randn(_ELEMENTS_LIMIT, device=device))
    master.grad = torch.randn_like(master)
    parameter = torch.empty(_ELEMENTS_LIMIT, dtype=torch.bfloat16, device=device)
    adam = torch.optim.AdamW([master])
    adam.step()

    def step() -> None:
        torch.linalg.vector_norm(master.grad)
        adam.step()
        parameter.copy_(master.detach())
        master.grad.zero_()

    return ADAM_BYTES * _ELEMENTS_LIMIT / _seconds(step, device)


def _saved_rate(workload: Workload, device: str) -> float:
    """Returns the saved bytes per second of unfused norm, SwiGLU and softmax, forward and backward together."""
    shape = workload.layout
    tokens = max(16, min(workload.tokens, _ELEMENTS_LIMIT // (2 * shape.ffn)))
    sequence = min(shape.sequence, 1024)
    heads = max(1, min(shape.heads // shape.tp, _ELEMENTS_LIMIT // sequence**2))
    x = _random(tokens, shape.hidden, device=device).requires_grad_()
    up = _random(tokens, 2 * max(1, shape.ffn // shape.tp), device=device).requires_grad_()
    scores = _random(heads, sequence, sequence, device=device).requires_grad_()

    def forward() -> torch.Tensor:
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
        gate, linear = up.chunk(2, -1)
        swiglu = torch.nn.functional.silu(gate) * linear
        return normed.sum() + swiglu.sum() + torch.softmax(scores.float(), -1).bfloat16().sum()

    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(saved.values()) / _seconds(lambda: forward().backward(), device)


def _link_rate() -> float:
    """Returns the bytes/s of gloo between two ranks, which are threads here, in an all-reduce.

    Between two ranks, an all-reduce sends its payload once.

    Raises:
        FailedError: if gloo cannot connect them.
    """
    import torch.distributed as dist

    store, seconds = dist.HashStore(), [0.0, 0.0]
    tensors = [torch.ones(2**20, dtype=torch.bfloat16) for _ in seconds]

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, len(seconds), timedelta(seconds=60))
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            group.allreduce([tensors[rank].clone()]).wait()
            taken.append(time.perf_counter() - started)
        seconds[rank] = statistics.median(taken)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(seconds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if min(seconds) == 0:
        raise FailedError("gloo does not connect two ranks on this machine: its rate cannot be measured")
    return Collective("", "all-reduce", 2, tensors[0].nbytes, 1).wire_bytes / max(seconds)


def _random(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device).mul_(0.02).to(torch.bfloat16)


def _seconds(function: Callable[[], object], device: str) -> float:
    return _medians([function], device, rounds=3)[0]


def _medians(functions: Sequence[Callable[[], object]], device: str, rounds: int) -> list[float]:
    """Returns the median seconds of each function; all run in turn, and the first round is not counted.

    In turn, a busy machine slows all of them.
    """
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, times in zip(functions, taken, strict=True):
            _wait(device)
            started = time.perf_counter()
            function()
            _wait(device)
            times.append(time.perf_counter() - started)
    return [statistics.median(times[1:]) for times in taken]


def _wait(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()

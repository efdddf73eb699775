# SPDX-License-Identifier: Apache-2.0
"""Meters of what a step costs besides time: peak memory, payload of collectives, live copies of quantized weights."""

import contextlib
import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitcpm_megatron.nn.linear import TernaryState
from bitcpm_megatron.ops import Counts, counts

_NO_DATA = ("barrier", "monitored_barrier_")


@dataclass
class Memory:
    """Allocated bytes beyond those at the start of a measurement; None if this machine cannot measure them.

    Attributes:
        peak: the largest number of bytes at any moment.
        resident: the number of bytes at the end.
    """

    peak: int | None = None
    resident: int | None = None


@contextlib.contextmanager
def memory(device: torch.device) -> Iterator[Memory]:
    """Measures the memory that the block allocates: on a device by its allocator, on the CPU by the C library's.

    On the CPU, memory is read after every operation of torch, so that temporary memory within an operation is not seen.
    The yielded object is filled in when the block ends.
    """
    found = Memory()
    gc.collect()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        yield found
        module.synchronize()
        found.peak = module.max_memory_allocated() - before
        found.resident = module.memory_allocated() - before
        return
    heap = _heap()
    if heap is None:
        yield found
        return
    before = heap()
    with _Watch(heap) as watch:
        yield found
    gc.collect()
    found.peak, found.resident = watch.peak - before, heap() - before


class _Watch(TorchDispatchMode):
    def __init__(self, heap: Callable[[], int]) -> None:
        super().__init__()
        self.heap, self.peak = heap, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        result = function(*args, **(kwargs or {}))
        self.peak = max(self.peak, self.heap())
        return result


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _heap() -> Callable[[], int] | None:
    """Returns a function that reads the bytes which all threads have from ``malloc``; None without glibc 2.33."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo.restype = _Mallinfo

    def allocated() -> int:
        now = mallinfo()
        return now.uordblks + now.hblkhd

    return allocated


class CollectiveBytes(TorchDispatchMode):
    """Counter of the payload of all collective and point-to-point operations within a ``with`` block.

    The payload is the larger of a rank's input and output, not the bytes that an algorithm sends over links for it; for
    a gather and for a reduce-scatter this is the whole tensor. Groups of one rank are counted, too, although nothing is
    sent in them.

    Attributes:
        total: the payload of all operations in bytes.
        by_operation: the payload in bytes by name of the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_operation.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        if function.namespace == "c10d":
            name = function._schema.name.partition("::")[2]
            if name not in _NO_DATA:
                self.by_operation[name] += max((_bytes(argument) for argument in args), default=0)
        return function(*args, **(kwargs or {}))


def _bytes(argument: object) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    if isinstance(argument, list | tuple):
        return sum(map(_bytes, argument))
    return 0


@contextlib.contextmanager
def quantizer_work() -> Iterator[Counts]:
    """Counts the quantizer's work in the block, for single weights and for many weights together.

    The yielded counts are filled in when the block ends.
    """
    before, found = replace(counts), Counts()
    try:
        yield found
    finally:
        for name, number in vars(before).items():
            setattr(found, name, getattr(counts, name) - number)


@dataclass
class LiveCopies:
    """Number of quantized copies of one weight that a rank holds in addition to its parameter, in cache and autograd.

    Attributes:
        most: the largest number over all weights and moments.
    """

    most: int = 0
    _owners: dict[int, str] = field(default_factory=dict)
    _saved: Counter[int] = field(default_factory=Counter)

    def _made(self, state: TernaryState, quantized: torch.Tensor) -> None:
        self._owners[_address(quantized)] = state.name
        self._count(state.name, cached=state.cache == "step", newest=_address(quantized))

    def _count(self, name: str, cached: bool, newest: int) -> None:
        alive = {address for address, owner in self._owners.items() if owner == name and self._saved[address] > 0}
        if cached:
            alive.add(newest)
        self.most = max(self.most, len(alive))

    def _released(self, address: int) -> None:
        self._saved[address] -= 1
        if not self._saved[address]:
            # The memory at this address may be reused for another tensor.
            self._owners.pop(address, None)

    def _pack(self, tensor: torch.Tensor) -> "_Saved":
        address = _address(tensor)
        saved = _Saved(self, tensor, address if address in self._owners else None)
        if saved.address is not None:
            self._count(self._owners[address], cached=False, newest=address)
        return saved


class _Saved:
    """A tensor that autograd saved, which is counted as long as the graph holds it."""

    def __init__(self, copies: LiveCopies, tensor: torch.Tensor, address: int | None) -> None:
        self.copies, self.tensor, self.address = copies, tensor, address
        if address is not None:
            copies._saved[address] += 1

    def __del__(self) -> None:
        if self.address is not None:
            self.copies._released(self.address)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def live_copies() -> Iterator[LiveCopies]:
    """Counts, with saved-tensor hooks, the quantized weights that the graphs of a step keep alive in the block."""
    copies = LiveCopies()
    original = TernaryState.weight

    def weight(state: TernaryState, latent: torch.Tensor, training: bool) -> torch.Tensor:
        quantized = original(state, latent, training)
        copies._made(state, quantized)
        return quantized

    TernaryState.weight = weight
    try:
        with torch.autograd.graph.saved_tensors_hooks(copies._pack, lambda saved: saved.tensor):
            yield copies
    finally:
        TernaryState.weight = original

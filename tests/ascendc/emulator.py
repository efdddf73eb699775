# SPDX-License-Identifier: Apache-2.0
"""Emulation of the AscendC kernels on a CPU: compiles csrc/ascendc against the emulation's header, and calls it."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bitcpm_megatron.quantization import SPACES, QuantizerConfig, packed_size

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "ascendc"
EMULATION = Path(__file__).parent / "emulation"
CACHE = Path(sys.prefix) / "ascendc-emulation"
FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -Wall -Wextra".split()
UNITS = {"machine.cpp": ["-O3"], "tile_entries.cpp": [], "rows_entries.cpp": [], "library.cpp": []}
"""The sources of the emulation that are compiled, with their own flags; the kernels' tiling is compiled, too."""
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
LANES = 64
"""The number of int32 partial counts per core and kind: ``kStatisticsLanes`` in op_host/table.h."""


class EmulationError(RuntimeError):
    """Raised if the kernel misuses the chip or the tiling refuses; begins with the name of the check in brackets."""


class _Spec(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in "input output scales packed previous statistics".split()),
        *((name, ctypes.c_uint32) for name in "rows columns group".split()),
        ("epsilon", ctypes.c_float),
        ("multiplier", ctypes.c_float),
        *((name, ctypes.c_uint32) for name in "absmax given_scales unpack".split()),
    ]


THRESHOLDS = 4


class Space(ctypes.Structure):
    """A quantization space as the kernels take it: ``ternary::Space`` in op_host/tiling.h."""

    _fields_ = [
        ("thresholds", ctypes.c_uint32),
        ("upper_ties", ctypes.c_uint32),
        ("threshold", ctypes.c_float * THRESHOLDS),
        ("level", ctypes.c_float * (THRESHOLDS + 1)),
    ]

    @classmethod
    def of(cls, name: str) -> "Space":
        """Returns the space that has this name in quantization/spaces.py."""
        made = cls()
        if name != "ternary":
            space = SPACES[name]
            made.thresholds = len(space.thresholds)
            made.upper_ties = sum(1 << k for k, tie in enumerate(space.ties) if tie == "upper")
            made.threshold[: made.thresholds] = space.thresholds
            made.level[: len(space.levels)] = space.levels
        return made


class Counters(ctypes.Structure):
    """Totals over all emulated cores; ``ub_bytes`` is the most Unified Buffer memory that one core allocated."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in "read_bytes written_bytes table_bytes dmas instructions repeats barriers ub_bytes launches".split()
    ]


@dataclass
class Weight:
    """One weight of a launch: its tensors as the kernel gets them; results hold a pattern before the run.

    Attributes:
        latent: the latent weight, ``[rows, columns]``, or None to unpack codes.
        group: the number of elements per scale.
        scales: the scales, bf16 ``[rows, columns / group]``: given ones, or a result if None is passed.
        config: the quantizer, except for the group size. All weights of a launch have the same space.
        pack: whether packed codes are written, too.
        count: whether nonzero codes are counted, too.
        previous: the packed codes to compare with, or to unpack.
        shape: the rows and columns of the weight; must be passed if there is no latent weight.
        dtype: the dtype of the weight; must be passed if there is no latent weight.
        quantized: the quantized weight that the kernel writes, ``[rows, columns]``.
        packed: the packed codes that the kernel writes, uint8 ``[rows, bytes of a packed row]``, or None.
        statistics: the partial counts that the kernel writes, int32 ``[cores, 2 * LANES]``, or None.
    """

    latent: torch.Tensor | None
    group: int
    scales: torch.Tensor | None = None
    config: QuantizerConfig = QuantizerConfig()
    pack: bool = False
    count: bool = False
    previous: torch.Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.bfloat16
    quantized: torch.Tensor = field(init=False)
    packed: torch.Tensor | None = field(init=False, default=None)
    statistics: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.latent is not None:
            self.shape, self.dtype = tuple(self.latent.shape), self.latent.dtype
        self.given = self.scales is not None
        rows, columns = self.shape
        self.quantized = torch.full(self.shape, float("nan"), dtype=self.dtype)
        if self.scales is None:
            self.scales = torch.full((rows, columns // self.group), float("nan"), dtype=torch.bfloat16)
        if self.pack:
            self.packed = torch.full((rows, packed_size(columns)), 0xEE, dtype=torch.uint8)

    @property
    def nonzeros(self) -> int:
        """The number of codes that are not zero."""
        return int(self.statistics[:, :LANES].sum())

    @property
    def changes(self) -> int:
        """The number of codes that differ from ``previous``."""
        return int(self.statistics[:, LANES:].sum())


def library_name(sources: Path, flags: list[str]) -> str:
    """Returns a file name that changes with every change of what is compiled."""
    digest = hashlib.sha256(f"{flags} {UNITS}".encode())
    for folder in (sources, EMULATION):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp") and "binding" not in p.parts):
            digest.update(path.read_bytes())
    return f"libternary-{digest.hexdigest()[:16]}.so"


def build(sources: Path = SOURCES, flags: list[str] | None = None, cache: Path = CACHE) -> Path:
    """Compiles the kernels for the CPU, once per content of the sources.

    Raises:
        subprocess.CalledProcessError: if the compiler fails; ``stderr`` has its message.
    """
    flags = FLAGS if flags is None else flags
    library = cache / library_name(sources, flags)
    if library.exists():
        return library
    work = cache / f"build-{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)

    def compile_unit(unit: Path) -> Path:
        result = work / f"{unit.stem}.o"
        command = ["g++", *flags, *UNITS.get(unit.name, []), "-I", str(EMULATION), "-I", str(sources)]
        command += ["-c", str(unit), "-o", str(result)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return result

    with ThreadPoolExecutor(max_workers=4) as pool:
        objects = list(pool.map(compile_unit, [*(EMULATION / unit for unit in UNITS), sources / "op_host/tiling.cpp"]))
    made = work / "libternary.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(made)], check=True, capture_output=True, text=True)
    made.replace(library)
    shutil.rmtree(work)
    return library


class Emulator:
    """The compiled kernels; :meth:`run` fills the results of the weights that it is given."""

    def __init__(self, library: Path | None = None) -> None:
        self._library = ctypes.CDLL(str(library or build()))
        self._library.ternary_plan.restype = ctypes.c_int64

    def run(self, weights: list[Weight], cores: int = 4, late: bool = False) -> Counters:
        """Runs one grouped launch over weights of one dtype and space.

        Raises:
            EmulationError: if the kernel misuses the chip, or the tiling refuses the weights.
        """
        specs = self._specs(weights, cores)
        counters, error = Counters(), ctypes.create_string_buffer(400)
        dtype = DTYPES[weights[0].dtype]
        failed = self._library.ternary_emulate(
            specs,
            len(weights),
            ctypes.byref(_space(weights)),
            dtype,
            cores,
            int(late),
            ctypes.byref(counters),
            error,
            len(error),
        )
        if failed:
            raise EmulationError(error.value.decode())
        return counters

    def plan(self, weights: list[Weight], cores: int = 4) -> list[tuple[str, int, int, list[int]]]:
        """Returns the launches that the tiling plans, each as (kernel, cores, bytes of Unified Buffer, table).

        Raises:
            EmulationError: if the tiling refuses the weights.
        """
        specs = self._specs(weights, cores)
        numbers, error = (ctypes.c_int64 * 100_000)(), ctypes.create_string_buffer(400)
        space, dtype = ctypes.byref(_space(weights)), DTYPES[weights[0].dtype]
        count = self._library.ternary_plan(
            specs, len(weights), space, dtype, cores, numbers, len(numbers), error, len(error)
        )
        if count < 0:
            raise EmulationError("[plan] " + error.value.decode())
        launches, at = [], 1
        for _ in range(numbers[0]):
            kernel, blocks, ub_bytes, words = numbers[at : at + 4]
            launches.append((("tile", "rows")[kernel], blocks, ub_bytes, list(numbers[at + 4 : at + 4 + words])))
            at += 4 + words
        assert at == count
        return launches

    @staticmethod
    def _specs(weights: list[Weight], cores: int) -> ctypes.Array:
        specs = (_Spec * len(weights))()
        for spec, w in zip(specs, weights, strict=True):
            if w.count or (w.previous is not None and w.latent is not None):
                w.statistics = torch.zeros(cores, 2 * LANES, dtype=torch.int32)
            for name, tensor in (
                ("input", w.latent),
                ("output", w.quantized),
                ("scales", w.scales),
                ("packed", w.packed),
                ("previous", w.previous),
                ("statistics", w.statistics),
            ):
                assert tensor is None or tensor.is_contiguous(), name
                setattr(spec, name, 0 if tensor is None else tensor.data_ptr())
            spec.rows, spec.columns = w.shape
            spec.group, spec.epsilon = w.group, w.config.eps
            spec.multiplier, spec.absmax = w.config.scale_multiplier, int(w.config.statistic == "absmax")
            spec.given_scales, spec.unpack = int(w.given), int(w.latent is None)
        return specs


def _space(weights: list[Weight]) -> Space:
    (name,) = {w.config.space for w in weights}
    return Space.of(name)

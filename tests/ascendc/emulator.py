# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernels on a CPU: builds csrc/ascendc against the header of the emulation, and calls it."""

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
"""What is compiled of the emulation, with flags of its own; and the tiling of the sources."""
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
LANES = 64
"""int32 partial counts per core and kind, as kStatisticsLanes in op_host/table.h."""


class EmulationError(RuntimeError):
    """The kernel misused the chip, or the tiling refused; starts with the name of the check in brackets."""


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
    """A quantization space as ``ternary::Space`` in op_host/tiling.h."""

    _fields_ = [
        ("thresholds", ctypes.c_uint32),
        ("upper_ties", ctypes.c_uint32),
        ("threshold", ctypes.c_float * THRESHOLDS),
        ("level", ctypes.c_float * (THRESHOLDS + 1)),
    ]

    @classmethod
    def of(cls, name: str) -> "Space":
        """By the name of quantization/spaces.py."""
        made = cls()
        if name != "ternary":
            space = SPACES[name]
            made.thresholds = len(space.thresholds)
            made.upper_ties = sum(1 << k for k, tie in enumerate(space.ties) if tie == "upper")
            made.threshold[: made.thresholds] = space.thresholds
            made.level[: len(space.levels)] = space.levels
        return made


class Counters(ctypes.Structure):
    """What the emulated cores did, all of them together; ``ub_bytes`` is the most that one of them allocated."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in "read_bytes written_bytes table_bytes dmas instructions repeats barriers ub_bytes launches".split()
    ]


@dataclass
class Weight:
    """One weight of a launch: tensors as the kernel sees them. Results are filled with a pattern before the run.

    Attributes:
        latent: ``[rows, columns]``, or None to unpack.
        group: elements per scale.
        scales: given scales, bf16 ``[rows, groups]``.
        config: how it is quantized, but for the group size. All weights of a launch have one space.
        pack: also write packed codes.
        count: also count codes that are not zero.
        previous: packed codes to compare with, or to unpack.
        shape: of the weight, where there is no latent one.
        dtype: of the weight, where there is no latent one.
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
        """Codes that are not zero."""
        return int(self.statistics[:, :LANES].sum())

    @property
    def changes(self) -> int:
        """Codes that differ from ``previous``."""
        return int(self.statistics[:, LANES:].sum())


def library_name(sources: Path, flags: list[str]) -> str:
    """Changes with every change of what is compiled."""
    digest = hashlib.sha256(f"{flags} {UNITS}".encode())
    for folder in (sources, EMULATION):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp") and "binding" not in p.parts):
            digest.update(path.read_bytes())
    return f"libternary-{digest.hexdigest()[:16]}.so"


def build(sources: Path = SOURCES, flags: list[str] | None = None, cache: Path = CACHE) -> Path:
    """Compiles the kernels for the CPU, once per content of the sources.

    Raises:
        subprocess.CalledProcessError: a compiler error; ``stderr`` says which.
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
    """The compiled kernels. ``run`` fills the results of the weights it is given."""

    def __init__(self, library: Path | None = None) -> None:
        self._library = ctypes.CDLL(str(library or build()))
        self._library.ternary_plan.restype = ctypes.c_int64

    def run(self, weights: list[Weight], cores: int = 4, late: bool = False) -> Counters:
        """One grouped launch over weights of one dtype.

        Raises:
            EmulationError: see there.
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
        """The launches that the tiling makes: kernel, cores, bytes of UB, table.

        Raises:
            EmulationError: the tiling refused.
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

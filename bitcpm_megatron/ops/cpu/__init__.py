# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: one pass over the weight in C, bit for bit the reference. Importing this registers it.

``fake_quantize.c`` is compiled for the machine at hand when it is first needed, and kept in the user's cache. Where
there is no C compiler the torch backend serves, several times slower and with the same bits.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from ...quantization import QuantizerConfig, check_weight, effective_group
from ..registry import Backend, register_backend

CACHE_VARIABLE = "BITCPM_CACHE_DIR"
"""Names another folder than ``$XDG_CACHE_HOME/bitcpm_megatron`` for the compiled library."""
MARCH_VARIABLE = "BITCPM_MARCH"
"""Names another value of the compiler's ``-march`` than ``native``, such as ``x86-64-v2``; the bits are the same."""
SOURCE = Path(__file__).with_name("fake_quantize.c")
# Bits must not depend on the compiler: no contraction into fused multiply-adds, no reordering.
_FLAGS: tuple[str, ...] = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS += ("-mprefer-vector-width=512",)
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_COMPILERS = ("cc", "gcc", "clang")
# Below this a thread costs more than it brings.
_ELEMENTS_PER_THREAD = 1 << 15


def unavailable(device_type: str) -> str | None:
    """Why the kernel cannot run on a device type, or None. Compiles it, the first time."""
    if device_type != "cpu":
        return "runs on a CPU only"
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        return None, f"no C compiler: CC={compiler[0]} is not there" if named else "no C compiler (cc) on the PATH"
    try:
        library = _open(compiler)
    # pathlib has a RuntimeError for a user without a home.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error).strip() or repr(error)
        return None, f"{shlex.join(compiler)} could not build it: {said.splitlines()[-1]}"
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    how = (integer, integer, ctypes.c_float, integer)
    library.bitcpm_fake_quantize.argtypes = [pointer, pointer, pointer, long, long, pointer, *how]
    library.bitcpm_fake_quantize_all.argtypes = [pointer, long, pointer, long, *how]
    library.bitcpm_fake_quantize.restype = library.bitcpm_fake_quantize_all.restype = None
    return library, None


def _open(compiler: list[str]) -> ctypes.CDLL:
    path = _compiled(compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # cut short by a power failure, for instance
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(compiler)))


def _compiled(compiler: list[str]) -> Path:
    """The library for this source, compiler, flags and machine; compiled where the cache has none.

    Raises:
        OSError, subprocess.SubprocessError: the compiler fails, or the cache cannot be written.
    """
    version = _run([*compiler, "--version"]).encode()
    command = [*compiler, *_FLAGS, f"-march={os.environ.get(MARCH_VARIABLE) or 'native'}"]
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, shlex.join(command).encode(), _machine()]))
    library = _cache() / f"fake_quantize-{key.hexdigest()[:32]}.so"
    if not library.is_file():
        # Processes of one job compile at the same time: each to a name of its own, and the last rename stays.
        handle, temporary = tempfile.mkstemp(dir=library.parent, suffix=".so")
        os.close(handle)
        try:
            _run([*command, "-o", temporary, str(SOURCE), "-lm"])
            os.replace(temporary, library)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=300)
    return done.stdout


def _cache() -> Path:
    """The user's own folder for compiled code; nobody else may write there.

    Raises:
        OSError: it cannot be made, or others may write to it.
    """
    named = os.environ.get(CACHE_VARIABLE)
    general = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(named) if named else Path(general) / "bitcpm_megatron"
    mask = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(mask)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others: name another folder by {CACHE_VARIABLE}")
    return folder


def _machine() -> bytes:
    """What ``-march=native`` depends on: a cache may be shared by machines with different CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def _kernel(
    weight: torch.Tensor, config: QuantizerConfig, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    group = check_weight(weight, config.group_size, scales)
    library = _library_for(weight)
    w = weight.detach().contiguous()
    quantized = torch.empty_like(w)
    own = torch.empty(w.shape[0], w.shape[1] // group, dtype=torch.bfloat16, device="cpu")
    if scales is not None:
        own.copy_(scales)
    groups = w.numel() // group
    threads, scratch = _threads(groups, w.numel(), group)
    library.bitcpm_fake_quantize(
        w.data_ptr(),
        quantized.data_ptr(),
        own.data_ptr(),
        groups,
        group,
        scratch.data_ptr(),
        _DTYPES[w.dtype],
        scales is not None,
        config.eps,
        threads,
    )
    return quantized, own


def _grouped(
    weights: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_sizes: Sequence[int],
    config: QuantizerConfig,
) -> int:
    library = _library_for(weights[0])
    latent = [w.detach().contiguous() for w in weights]
    table = array("q")  # the C source's struct Weight
    groups = elements = longest = 0
    for weight, result, scale, group_size in zip(latent, quantized, scales, group_sizes, strict=True):
        group = effective_group(weight.shape[1], group_size)
        count = weight.numel() // group
        table.extend((weight.data_ptr(), result.data_ptr(), scale.data_ptr(), count, group))
        groups, elements, longest = groups + count, elements + weight.numel(), max(longest, group)
    threads, scratch = _threads(groups, elements, longest)
    how = (_DTYPES[latent[0].dtype], False, config.eps, threads)
    library.bitcpm_fake_quantize_all(table.buffer_info()[0], len(latent), scratch.data_ptr(), longest + 2, *how)
    return 1


def _library_for(weight: torch.Tensor) -> ctypes.CDLL:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"the CPU kernel cannot run: {why}")
    if not weight.is_cpu:
        raise RuntimeError(f"the CPU kernel cannot run on a weight on {weight.device}")
    return library


def _threads(groups: int, elements: int, longest: int) -> tuple[int, torch.Tensor]:
    """How many threads are worth their while, and their scratch: 2 elements more than the longest group for each."""
    threads = max(1, min(torch.get_num_threads(), groups, elements // _ELEMENTS_PER_THREAD))
    return threads, torch.empty(threads * (longest + 2), dtype=torch.float32, device="cpu")


register_backend(Backend("cpu", _kernel, unavailable, priority=5, grouped=_grouped))

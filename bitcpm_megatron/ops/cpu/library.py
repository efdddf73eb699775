# SPDX-License-Identifier: Apache-2.0
"""Compilation of C sources, such as those of this folder, into a library for this machine, kept in the user's cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

CACHE_VARIABLE = "BITCPM_CACHE_DIR"
"""The environment variable that names a folder for compiled code instead of ``$XDG_CACHE_HOME/bitcpm_megatron``."""
MARCH_VARIABLE = "BITCPM_MARCH"
"""The environment variable that replaces ``-march=native``, by ``x86-64-v2`` for instance; the bits are the same."""
SOURCES = tuple(sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".c", ".h")))
# Flags such as -ffast-math are left out, because they would reorder sums.
_FLAGS: tuple[str, ...] = ("-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS += ("-mprefer-vector-width=512",)
_COMPILERS = ("cc", "gcc", "clang")
# With fewer elements, a thread costs more time than it saves.
_ELEMENTS_PER_THREAD = 1 << 15


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """Returns the library of this folder, or the reason why there is none."""
    pointer, long, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    how = (integer, integer, pointer, integer)
    signatures: dict[str, tuple[Any, ...]] = {
        "bitcpm_fake_quantize": (pointer, pointer, pointer, long, long, pointer, *how),
        "bitcpm_fake_quantize_all": (pointer, long, pointer, long, *how),
        "bitcpm_quantize_rows": (*[pointer] * 5, long, long, number, integer),
        "bitcpm_scale_sums": (*[pointer] * 4, long, long, integer),
        "bitcpm_codes": (*[pointer] * 3, long, long, integer),
    }
    # Results must not depend on the compiler: no contraction into fused multiply-adds.
    return build("fake_quantize", SOURCES, signatures, ("-ffp-contract=off",))


def build(
    name: str, sources: Sequence[Path], signatures: Mapping[str, tuple[Any, ...]], flags: Sequence[str]
) -> tuple[ctypes.CDLL | None, str | None]:
    """Returns a library, from the cache or newly compiled, or the reason why there is none.

    Args:
        name: the name of its file in the cache.
        sources: the C files and the headers that they include.
        signatures: the argument types of its functions, which return nothing.
        flags: the compiler flags in addition to those of every library.
    """
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        return None, f"no C compiler: CC={compiler[0]} is not there" if named else "no C compiler (cc) on the PATH"
    command = [*compiler, *_FLAGS, *flags, f"-march={os.environ.get(MARCH_VARIABLE) or 'native'}"]
    try:
        library = _open(name, sources, compiler, command)
    # pathlib raises RuntimeError for a user without a home.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error).strip() or repr(error)
        return None, f"{shlex.join(compiler)} could not build it: {said.splitlines()[-1]}"
    for function_name, arguments in signatures.items():
        function = library[function_name]
        function.argtypes, function.restype = arguments, None
        setattr(library, function_name, function)
    return library, None


def _open(name: str, sources: Sequence[Path], compiler: list[str], command: list[str]) -> ctypes.CDLL:
    path = _compiled(name, sources, compiler, command)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # the file may have been truncated by a power failure
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(name, sources, compiler, command)))


def _compiled(name: str, sources: Sequence[Path], compiler: list[str], command: list[str]) -> Path:
    """Returns the path of the library for these sources, compiler, flags and machine; compiles it if it is not cached.

    Raises:
        OSError, subprocess.SubprocessError: if the compiler fails, or the cache cannot be written.
    """
    version = _run([*compiler, "--version"]).encode()
    texts = [path.read_bytes() for path in sources]
    key = hashlib.sha256(b"\0".join([*texts, version, shlex.join(command).encode(), _machine()]))
    library = _cache() / f"{name}-{key.hexdigest()[:32]}.so"
    if not library.is_file():
        # Processes of one job compile at the same time: each to a file name of its own; the last rename wins.
        handle, temporary = tempfile.mkstemp(dir=library.parent, suffix=".so")
        os.close(handle)
        try:
            _run([*command, "-o", temporary, *(str(path) for path in sources if path.suffix == ".c"), "-lm"])
            os.replace(temporary, library)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=300)
    return done.stdout


def _cache() -> Path:
    """Returns the user's own folder for compiled code, which only the user may write to.

    Raises:
        OSError: if it cannot be created, or others may write to it.
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
    """Returns what ``-march=native`` depends on, because machines with different CPUs may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def threads_for(rows: int, elements: int) -> int:
    """Returns how many threads pay off for rows that are processed by one thread each."""
    return max(1, min(torch.get_num_threads(), rows, elements // _ELEMENTS_PER_THREAD))

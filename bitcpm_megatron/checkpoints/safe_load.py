# SPDX-License-Identifier: Apache-2.0
"""Reader of ``torch.save`` files that does not run the code that they name.

Training checkpoints hold more than tensors: argparse.Namespace, enums of megatron, random states of numpy. PyTorch's
``weights_only`` loader refuses a file for any of these. Here each such name becomes an inert stand-in, which keeps its
arguments and does nothing; nothing is imported.
"""

import argparse
import contextlib
import functools
import io
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files import FileError, require_file

_TRUST = ". If you trust its author, add --allow-pickle: the file can then run any code, with your rights"


class StandIn:
    """An inert object in place of one whose class is not run; it keeps the name, constructor arguments and state."""

    path = ""
    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> "StandIn":
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.path}{self.arguments}>"


@functools.cache
def stand_in(path: str) -> type[StandIn]:
    """Returns a class of stand-ins for ``path``, the full name of a class or function."""
    return type(path.rpartition(".")[2], (StandIn,), {"path": path})


def load_without_code(
    path: Path,
    mmap: bool = False,
    allow_pickle: bool = False,
    stand_ins: bool = True,
    entry: tuple[int, int] | None = None,
) -> Any:
    """Loads a file that ``torch.save`` wrote; tensors come to the CPU, whatever device they were saved from.

    Args:
        path: the file.
        mmap: whether to map the tensors instead of reading them; a file older than PyTorch 1.6 is always read.
        allow_pickle: whether to unpickle for real, after a warning on stderr, if the safe way fails.
        stand_ins: whether a :class:`StandIn` replaces an object that ``weights_only`` does not know; else it is an
            error.
        entry: the first byte and the length of the saved data, if the file holds more than that.

    Raises:
        FileError: if the file is missing or damaged, or cannot be read without running code.
    """
    require_file(path)
    with open(path, "rb") as file:
        source: BinaryIO = file
        if entry is not None:
            file.seek(entry[0])
            source = io.BytesIO(file.read(entry[1]))
        is_zip = _screened(source, path)
        # Only a file name can be mapped, not a stream.
        load = functools.partial(
            torch.load, path if entry is None else source, map_location="cpu", mmap=mmap and is_zip
        )
        try:
            with _no_other_globals():
                if stand_ins and is_zip:
                    torch.serialization.add_safe_globals(_replacements(source))
                source.seek(0)
                return load(weights_only=True)
        except OSError:
            raise
        except pickle.UnpicklingError as error:
            if not allow_pickle:
                raise FileError(f"{path}: {refusal(error, _TRUST)}") from None
        except Exception as error:  # a damaged pickle can raise anything: KeyError, struct.error, EOFError, ...
            raise FileError(f"{path}: {refusal(error)}") from error
        print(
            f"warning: {path} is unpickled with weights_only=False (--allow-pickle): it can run any code, with your "
            "rights",
            file=sys.stderr,
            flush=True,
        )
        source.seek(0)
        try:
            return load(weights_only=False)
        except OSError:
            raise
        except Exception as error:
            raise FileError(f"{path}: cannot be unpickled either ({_first_line(error)})") from error


def _screened(source: BinaryIO, path: Path) -> bool:
    """Returns whether this is an archive, after :func:`screen` accepted it; a file older than PyTorch 1.6 is none."""
    is_zip = zipfile.is_zipfile(source)
    source.seek(0)
    if not is_zip and source.read(4) == b"PK\x03\x04":
        raise FileError(f"{path}: the file is truncated or damaged (its end is missing): copy it again")
    try:
        screen(source)
    except ValueError as error:
        raise FileError(f"{path}: the file is damaged or made to harm ({error}): copy it again") from None
    return is_zip


def screen(source: Any) -> None:
    """Refuses a path or stream that ``torch.load`` would expand to more than is on the disk, before it does.

    Raises:
        ValueError: if an entry is compressed, or the archive is damaged.
    """
    with contextlib.ExitStack() as stack:
        stream = source if hasattr(source, "read") else stack.enter_context(open(source, "rb"))
        position = stream.tell()
        try:
            if zipfile.is_zipfile(stream):
                with zipfile.ZipFile(stream) as archive:
                    refuse_compressed(archive)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(str(error)) from None
        finally:
            stream.seek(position)


def refusal(error: BaseException, cure: str = ": copy it again, or ask its author for one without them") -> str:
    """Words an error of ``torch.load(weights_only=True)``, to follow the name of the file or entry in a message."""
    if not isinstance(error, pickle.UnpicklingError):
        return f"the file is damaged ({_first_line(error)}): copy it again"
    # Take the essential part of the long message of weights_only.
    found = re.search(r"(?:WeightsUnpickler error:|unsupported GLOBAL)\s*(.+?)(?:\. |\n|$)", str(error))
    reason = found[1].strip(" .") if found else str(error).split("\n")[0]
    said = "the file is damaged, or holds objects that cannot be read without running code that it names"
    return f"{said} ({reason}){cure}"


def refuse_compressed(archive: zipfile.ZipFile) -> None:
    """Raises if an archive has compressed entries: PyTorch stores entries uncompressed.

    A compressed archive is made to expand to more than is on the disk.

    Raises:
        ValueError: if an entry is compressed, or its declared size is not the size that is stored.
    """
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {entry.filename} is compressed, and torch.save never does that")


def plain(value: Any) -> Any:
    """Converts a value of a loaded file to plain data: namespaces become dicts, and stand-ins their text."""
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, StandIn):
        return repr(value)
    if isinstance(value, type) and issubclass(value, StandIn):
        return value.path
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(plain(item) for item in value)
    return value


@contextlib.contextmanager
def _no_other_globals() -> Iterator[None]:
    """Disables the globals that other libraries of this process declared safe, as megatron does on import."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _replacements(source: BinaryIO) -> list[Any]:
    source.seek(0)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:  # a damaged file, or not a plain pickle: torch.load reports more
        return []
    return [(_KNOWN.get(name) or stand_in(name), name) for name in names]


def _rebuild_npu_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


# The substitutes for names that do not become stand-ins.
_KNOWN: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": argparse.Namespace,
    # The weights_only loader can fill only plain dicts and lists.
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda *_: [],
    # Tensors saved by older versions of torch_npu; the last argument is the format in the NPU's memory.
    "torch_npu.utils.storage._rebuild_npu_tensor": _rebuild_npu_tensor,
}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

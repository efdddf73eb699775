# SPDX-License-Identifier: Apache-2.0
"""Writer of model directories of safetensors files, which writes block by block."""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...files import Digester
from .reader import CACHED_BYTES, ConversionError, TensorInfo, checked_blocks, files_of, listed

SAFETENSORS = "model.safetensors"
# The format's names of dtypes -> PyTorch's dtypes, as far as this version of PyTorch has them.
DTYPES = {
    name: getattr(torch, attribute)
    for name, attribute in (
        pair.split("=")
        for pair in (
            "F64=float64 F32=float32 F16=float16 BF16=bfloat16 C64=complex64 BOOL=bool I64=int64 I32=int32 I16=int16 "
            "I8=int8 U64=uint64 U32=uint32 U16=uint16 U8=uint8 F8_E4M3=float8_e4m3fn F8_E4M3FNUZ=float8_e4m3fnuz "
            "F8_E5M2=float8_e5m2 F8_E5M2FNUZ=float8_e5m2fnuz F8_E8M0=float8_e8m0fnu"
        ).split()
    )
    if hasattr(torch, attribute)
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B)?", re.IGNORECASE)


class SafetensorsWriter:
    """Writer of a model directory of safetensors files that holds only one block of rows in memory.

    The safetensors library writes a file only from tensors that are all in memory. This writer knows all shapes and
    dtypes in advance, and so needs only the current block. Tensors may be written in any order. A ``with`` statement
    closes it.

    Args:
        directory: an existing directory without weights.
        plan: the shape and dtype of every tensor, in the order in which tensors are assigned to shards.
        max_shard_size: the bytes of tensor data per file; a larger tensor gets a file of its own.

    Raises:
        ConversionError: if the format does not have the dtype of a tensor.
    """

    def __init__(self, directory: Path, plan: Mapping[str, TensorInfo], max_shard_size: int = 5 * 10**9) -> None:
        self._directory = Path(directory)
        self._plan = dict(plan)
        self._missing = dict.fromkeys(self._plan)
        for name, info in self._plan.items():
            if info.dtype not in _DTYPE_NAMES:
                raise ConversionError(f"{name}: safetensors has no dtype {info.dtype}")
        sizes = [info.nbytes for info in self._plan.values()]
        shards = [list(self._plan)[part] for part in files_of(sizes, max_shard_size)]
        self._places: dict[str, tuple[Path, int]] = {}
        self._digesters: dict[Path, Digester] = {}
        self._sharded = len(shards) > 1
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if self._sharded else SAFETENSORS
            self._start_file(self._directory / file, names)

    def write(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Writes a tensor of the plan from contiguous blocks of its rows, first to last, or from one scalar.

        Raises:
            ConversionError: if the blocks do not make up the planned tensor, or it is not planned or already written.
        """
        if name not in self._missing:
            raise ConversionError(f"{name}: {'was written already' if name in self._plan else 'is not in the plan'}")
        path, offset = self._places[name]
        digester = self._digesters[path]
        if digester.size != offset:
            # The file is not written front to back, so it must be read to be digested. The new digester's size never
            # reaches that of the file, and `digests` leaves the file out.
            digester = self._digesters[path] = Digester()
        with open(path, "r+b") as file:
            file.seek(offset)
            for _, block in checked_blocks(name, self._plan[name], blocks):
                if not block.is_contiguous():
                    raise ConversionError(f"{name}: a block of {tuple(block.shape)} is not contiguous")
                if block.numel():
                    digester.write(file, block.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        del self._missing[name]

    @property
    def digests(self) -> dict[str, dict[str, Any]]:
        """Entries of ``DIGESTS.json`` by file name, for the files that were written front to back.

        Other files have to be read to be digested.
        """
        return {path.name: d.entry() for path, d in self._digesters.items() if d.size == path.stat().st_size}

    def close(self) -> None:
        """Completes the directory: writes the index if there is more than one shard.

        Raises:
            ConversionError: if planned tensors were not written.
        """
        if self._missing:
            raise ConversionError(f"planned but not written: {listed(self._missing)}")
        if self._sharded:
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in self._plan.values())},
                "weight_map": {name: self._places[name][0].name for name in sorted(self._plan)},
            }
            text = json.dumps(index, indent=2) + "\n"
            (self._directory / f"{SAFETENSORS}.index.json").write_text(text, encoding="utf-8")

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _start_file(self, path: Path, names: list[str]) -> None:
        # The format allows no gaps. Tensors with wider elements come first, which keeps every tensor aligned.
        ordered = sorted(names, key=lambda name: -self._plan[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in ordered:
            info = self._plan[name]
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [end, end + info.nbytes],
            }
            end += info.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name in ordered:
            self._places[name] = path, start + header[name]["data_offsets"][0]
        with open(path, "xb") as file:
            digester = self._digesters[path] = Digester()
            digester.write(file, struct.pack("<Q", len(text)) + text)
            file.truncate(start + end)


def parse_size(text: str) -> int:
    """Returns the bytes of a size in Hugging Face's notation: "5GB", "500MB" (powers of 1000), "2GiB" (1024), "1000".

    Raises:
        ConversionError: if the text is not a size of at least one byte.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) < 40 else None
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
    if size < 1:
        raise ConversionError(f"{text!r} is no size: write for example 5GB, 500MB, 2GiB or a number of bytes")
    return size


def row_blocks(tensor: torch.Tensor, nbytes: int = CACHED_BYTES) -> Iterator[torch.Tensor]:
    """Yields a tensor as contiguous blocks of rows of about ``nbytes`` each, for :meth:`SafetensorsWriter.write`."""
    if tensor.numel() == 0 or tensor.ndim == 0:
        yield tensor.contiguous()
        return
    for rows in TensorInfo(tuple(tensor.shape), tensor.dtype).row_slices(nbytes):
        yield tensor[rows].contiguous()

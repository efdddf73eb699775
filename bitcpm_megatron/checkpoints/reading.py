# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints in megatron-core's ``torch_dist`` format, without running code that they name."""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..files import FileError, read_json
from ..patches.megatron_core import checkpointing
from .directory import CheckpointError
from .safe_load import load_declared, refusal, screen
from .torch_dist import COMMON, COMMON_ENTRY, Contents, Place, read_contents

# What the random states and Megatron-LM's arguments are made of. megatron-core declares it, too, but not every version.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    io.BytesIO,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    # The two names that numpy 1 and 2 write.
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]


def read(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Fills a sharded state from a checkpoint; collective over all ranks.

    Raises:
        FileError: a file is missing or damaged, or names code that would have to run.
        CheckpointError: the checkpoint lacks what the state asks for.
    """
    _check_format(checkpoint)
    # Not as a context manager, which would take away what megatron-core has declared safe itself.
    torch.serialization.add_safe_globals(_HARMLESS)
    contents = read_contents(checkpoint)
    if COMMON_ENTRY not in contents.objects:
        load_declared(checkpoint / COMMON)
    try:
        with checkpointing.load_without_code(_as_torch(contents), screen, _refused):
            return dist_checkpointing.load(state, str(checkpoint))
    except CheckpointException as error:
        # Every rank gets what each of them met; a BaseException, which would pass by every handler.
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{checkpoint}: {_words(cause)}") from cause
    except CheckpointingException as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error


def _check_format(checkpoint: Path) -> None:
    path = checkpoint / "metadata.json"
    found = read_json(path)
    # megatron-core 0.17 and later do not write the second.
    backends = (found.get("sharded_backend"), found.get("common_backend", "torch")) if isinstance(found, dict) else None
    if backends != ("torch_dist", "torch"):
        raise CheckpointError(f"{path}: this loop reads torch_dist with a torch common.pt, and no other format")


def _as_torch(contents: Contents) -> Metadata:
    """The contents as torch's own reader would have unpickled them."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in contents.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks)
        places.update({MetadataIndex(name, c.offsets): _storage(c.place) for c in tensor.chunks})
    for name, place in contents.objects.items():
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _storage(place)
    metadata: Any = Metadata(entries, storage_data=places, storage_meta=StorageMeta())
    metadata.mcore_data = contents.megatron  # as megatron-core sets it
    return metadata


def _storage(place: Place) -> _StorageInfo:
    return _StorageInfo(place.file, place.start, place.length)


def _refused(name: str, error: Exception) -> FileError:
    return FileError(f"{name}: {refusal(error)}")


def _words(cause: BaseException) -> str:
    if isinstance(cause, KeyError | RuntimeError | AssertionError | ValueError):
        return str(cause).splitlines()[0]
    return refusal(cause)

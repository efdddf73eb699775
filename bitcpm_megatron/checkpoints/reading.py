# SPDX-License-Identifier: Apache-2.0
"""Loader of checkpoints in megatron-core's ``torch_dist`` format that does not run the code that they name."""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Size
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from ..files import FileError, read_json, require_file
from ..patches.megatron_core import checkpointing
from .directory import CheckpointError
from .safe_load import refusal, screen
from .torch_dist import COMMON, COMMON_ENTRY, Contents, read_contents

# The types in random states and in Megatron-LM's arguments. Only some versions of megatron-core declare them safe, too.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    io.BytesIO,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    # The two names that numpy 1 and 2 give to this function.
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]


def read(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Fills a sharded state from a checkpoint; collective over all ranks.

    Raises:
        FileError: if a file is missing or damaged, or names code that would have to run.
        CheckpointError: if the checkpoint lacks what the state asks for.
    """
    description = checkpoint / "metadata.json"
    found = read_json(description)
    # megatron-core 0.17 and later do not write common_backend.
    backends = (found.get("sharded_backend"), found.get("common_backend", "torch")) if isinstance(found, dict) else None
    if backends != ("torch_dist", "torch"):
        raise CheckpointError(f"{description}: this loop reads torch_dist with a torch common.pt, and no other format")
    # Not as a context manager, which would remove what megatron-core itself has declared safe.
    torch.serialization.add_safe_globals(_HARMLESS)
    contents = read_contents(checkpoint)
    if COMMON_ENTRY not in contents.objects:
        _check_common(checkpoint / COMMON)
    try:
        with checkpointing.load_without_code(_as_torch(contents), screen, _refused):
            return dist_checkpointing.load(state, str(checkpoint))
    except CheckpointException as error:
        # Every rank gets the errors of all ranks in this exception, a BaseException, which other handlers do not catch.
        cause = next(iter(error.failures.values()))[0]
        known = isinstance(cause, KeyError | RuntimeError | AssertionError | ValueError)
        raise CheckpointError(f"{checkpoint}: {str(cause).splitlines()[0] if known else refusal(cause)}") from cause
    except CheckpointingException as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error


def _check_common(path: Path) -> None:
    """Loads a file before megatron-core does, whose error would not name a file that is damaged or names code."""
    require_file(path)
    try:
        screen(path)
        torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _refused(str(path), error) from error


def _as_torch(contents: Contents) -> torch_metadata.Metadata:
    """Returns the contents in the form in which torch's own reader would have unpickled them."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in contents.tensors.items():
        chunks = [torch_metadata.ChunkStorageMetadata(Size(c.offsets), Size(c.sizes)) for c in tensor.chunks]
        properties = torch_metadata.TensorProperties(dtype=tensor.dtype)
        entries[name] = torch_metadata.TensorStorageMetadata(properties, Size(tensor.shape), chunks)
        places.update({MetadataIndex(name, c.offsets): _StorageInfo(*c.place) for c in tensor.chunks})
    for name, place in contents.objects.items():
        entries[name] = torch_metadata.BytesStorageMetadata()
        places[MetadataIndex(name)] = _StorageInfo(*place)
    metadata: Any = torch_metadata.Metadata(entries, storage_data=places, storage_meta=torch_metadata.StorageMeta())
    metadata.mcore_data = contents.megatron  # as megatron-core sets it
    return metadata


def _refused(name: str, error: Exception) -> FileError:
    return FileError(f"{name}: {refusal(error)}")

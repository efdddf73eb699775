# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's legacy checkpoints: ``mp_rank_XX[_YYY]/model_optim_rng.pt``, one file per model-parallel rank."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.safe_load import load_without_code, plain
from ..storage.reader import ConversionError, TensorInfo
from ..storage.torch_file import Names, save_in_turn

_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_EXPERT_RANK = re.compile(r"mp_rank_\d{2,}_\d{3,}_\d{3,}")
_MODEL = re.compile(r"model\d*")


class LegacyReader:
    """Reader of a legacy iteration directory (``iter_0000100`` or ``release``) with its ``mp_rank_*`` directories.

    Args:
        iteration_directory: the directory.
        allow_pickle: whether unsafe pickles are loaded, as in
            :func:`~bitcpm_megatron.checkpoints.safe_load.load_without_code`.

    Attributes:
        tensor_parallel_size: the number of tensor-parallel ranks.
        pipeline_parallel_size: the number of pipeline ranks.
        optimizer_state: whether the checkpoint contains the optimizer's state.
        args: the arguments of the run that saved it, as plain values; empty if there are none.
        ranks: for each (tensor rank, pipeline rank) the model parts: "model", or "model0", "model1", ... under virtual
            pipeline parallelism. Each part is a dict of names and tensors, which are views of the file, without
            ``_extra_state``.

    Raises:
        FileError: if a rank is missing, damaged or does not fit the others, or the layout is not supported.
    """

    def __init__(self, iteration_directory: Path, allow_pickle: bool = False) -> None:
        directory = Path(iteration_directory)
        paths = _rank_files(directory)
        self.tensor_parallel_size = 1 + max(tp for tp, _ in paths)
        self.pipeline_parallel_size = 1 + max(pp for _, pp in paths)
        self.args: dict[str, Any] = {}
        self.optimizer_state = any(directory.glob("mp_rank_*/distrib_optim.pt"))
        self.ranks: dict[tuple[int, int], dict[str, dict[str, torch.Tensor]]] = {}
        for rank, path in sorted(paths.items()):
            loaded = load_without_code(path, mmap=True, allow_pickle=allow_pickle)
            if not isinstance(loaded, dict):
                raise ConversionError(f"{path}: holds a {type(loaded).__name__} and no dict")
            if not self.ranks and isinstance(loaded.get("args"), argparse.Namespace):
                self.args = plain(loaded["args"])
                self._check_args(directory)
            self.ranks[rank] = _model_parts(loaded, path)
            self.optimizer_state |= "optimizer" in loaded
        names = {rank: {(key, name) for key in parts for name in parts[key]} for rank, parts in self.ranks.items()}
        for (tp, pp), here in names.items():
            if first := names[0, pp] - here or here - names[0, pp]:
                lacks, other = (paths[tp, pp], paths[0, pp]) if names[0, pp] - here else (paths[0, pp], paths[tp, pp])
                key, name = min(first)
                raise ConversionError(f"{lacks}: lacks {name} of {key}, which {other} has: they are not of one save")

    def _check_args(self, directory: Path) -> None:
        experts = self.args.get("expert_model_parallel_size") or 1
        if experts > 1:
            raise ConversionError(
                f"{directory}: expert parallelism ({experts}) is not supported in the legacy format: save with "
                "--ckpt-format torch_dist"
            )
        for name in ("tensor", "pipeline"):
            saved, found = self.args.get(f"{name}_model_parallel_size"), getattr(self, f"{name}_parallel_size")
            if saved is not None and saved != found:
                raise ConversionError(
                    f"{directory}: saved with --{name}-model-parallel-size {saved}, but {found} "
                    f"{name}-parallel rank{'s are' if found > 1 else ' is'} here: copy the others, too"
                )


def write_rank(
    path: Path,
    plan: Mapping[str, Mapping[str, TensorInfo]],
    fill: Callable[[str, str], torch.Tensor | Iterable[torch.Tensor]],
    other: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes one rank's file with one tensor in memory at a time, by :func:`~..storage.torch_file.save_in_turn`.

    Args:
        path: the new file, ``.../mp_rank_00/model_optim_rng.pt``; its directory is created.
        plan: for each model part ("model", or "model0", "model1", ...) the shape and dtype of every tensor, by name.
        fill: a function that returns a tensor of the plan, given its part and name: the whole tensor, or its rows in
            blocks; called once for each tensor, in the order of the plan.
        other: the other values of the file: ``args``, ``checkpoint_version``, ``iteration`` and so on.

    Returns:
        The file's entry of ``DIGESTS.json``.

    Raises:
        ConversionError: if the result of ``fill`` is not as planned.
        OSError: if the file cannot be written, for example because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[Names, TensorInfo] = {(key, name): info for key, part in plan.items() for name, info in part.items()}
    return save_in_turn(path, tensors, fill, other).entry()


def rank_directory(tp: int, pp: int, pipeline_parallel_size: int) -> str:
    """Returns Megatron-LM's name of a rank's directory, without the pipeline rank if there is only one stage."""
    return f"mp_rank_{tp:02d}" if pipeline_parallel_size == 1 else f"mp_rank_{tp:02d}_{pp:03d}"


def _rank_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Returns the file of each (tensor rank, pipeline rank), which must form a complete grid.

    Raises:
        ConversionError: if there are no ranks, a rank is missing, or ranks of several layouts or of experts are found.
    """
    paths: dict[tuple[int, int], Path] = {}
    flat = False
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        if _EXPERT_RANK.fullmatch(entry.name):
            raise ConversionError(
                f"{entry}: expert parallelism is not supported in the legacy format: save with --ckpt-format torch_dist"
            )
        match = _RANK.fullmatch(entry.name)
        if match and entry.is_dir():
            flat = flat or match[2] is None
            paths[int(match[1]), int(match[2] or 0)] = entry / _FILE
    if not paths:
        raise ConversionError(f"{directory}: no legacy checkpoint, there is no mp_rank_00 or mp_rank_00_000")
    tensor_size, pipeline_size = (1 + max(rank[i] for rank in paths) for i in (0, 1))
    for tp in range(tensor_size):
        for pp in range(pipeline_size):
            name = f"mp_rank_{tp:02d}" if flat else f"mp_rank_{tp:02d}_{pp:03d}"
            if not (directory / name / _FILE).is_file():
                raise ConversionError(f"{directory / name / _FILE} is missing: copy every rank's directory")
    if flat and len(paths) != sum(1 for entry in directory.iterdir() if _RANK.fullmatch(entry.name)):
        raise ConversionError(f"{directory}: holds ranks with and without a pipeline rank: of two runs? Keep one")
    return paths


def _model_parts(loaded: Mapping[str, Any], path: Path) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted((k for k in loaded if isinstance(k, str) and _MODEL.fullmatch(k)), key=lambda k: (len(k), k)):
        if not isinstance(loaded[key], dict):
            raise ConversionError(f"{path}: {key} is a {type(loaded[key]).__name__} and no dict of tensors")
        parts[key] = {}
        for name, tensor in loaded[key].items():
            if name.endswith("_extra_state"):
                continue
            if not isinstance(tensor, torch.Tensor):
                raise ConversionError(
                    f"{path}: {key}: {name} is a {type(tensor).__name__} and no tensor: a checkpoint of Megatron-LM "
                    "before megatron-core's models? Load and save it with --use-mcore-models"
                )
            parts[key][name] = tensor.detach()
    if not parts:
        raise ConversionError(f"{path}: holds no model, only {', '.join(map(str, loaded)) or 'nothing'}")
    return parts

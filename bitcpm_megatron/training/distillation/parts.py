# SPDX-License-Identifier: Apache-2.0
"""Numbering of training samples in a target store, independent of the layout of the run.

Every dataset of a blend is a part of its own, so that a student may weight a blend as it likes. The number of a sample
of plain text is its index in the dataset: within one pass over the data, megatron-core's order depends on the files,
``--split``, ``--seq-length`` and ``--seed``, and neither on the layout nor on ``--train-iters``. Beyond one pass, the
whole order depends on how many samples a run requests. The number of a sample of conversations is its number in the
file, which is the same in every epoch and with every seed.

The digest of a part covers everything that decides the tokens and what each attends to: the content of the files, and
the indices that megatron-core built.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from ...data.target_store import Part
from ..data import ConversationDataset

_INDICES = ("document_index", "sample_index", "shuffle_index")
_SHAPING = "seq_length split seed sft reset_position_ids reset_attention_mask".split()


@dataclass(frozen=True)
class Samples:
    """The numbered samples of one part.

    Attributes:
        dataset: the dataset as megatron-core built it.
        part: the description of the part that a store records.
    """

    dataset: MegatronDataset
    part: Part

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Returns a sample by its number."""
        of_file = isinstance(self.dataset, ConversationDataset)
        return self.dataset.sample(number) if of_file else self.dataset[number]

    def number(self, index: int) -> int:
        """Returns the number of the sample at an index of the dataset."""
        return self.dataset.number(index) if isinstance(self.dataset, ConversationDataset) else index


def parts_of(args: argparse.Namespace, dataset: Any, wanted: int | None) -> dict[int, Samples]:
    """Returns the parts of the training data, by their positions in the blend.

    Args:
        args: the arguments of the run that built the dataset, with the digests of its data files.
        dataset: the dataset of training samples.
        wanted: the number of samples that a run takes, from the first on; None for all.
    """
    wanted = len(dataset) if wanted is None else min(wanted, len(dataset))
    blended = isinstance(dataset, BlendedDataset)
    datasets = dataset.datasets if blended else [dataset]
    counts = np.bincount(dataset.dataset_index[:wanted], minlength=len(datasets)) if blended else [wanted]
    found = {}
    for place, (one, count, of_files) in enumerate(zip(datasets, counts, args.data_digests, strict=True)):
        # Any sample of a file of conversations may come at any index, so that all of them are needed.
        samples = len(one.indices) if isinstance(one, ConversationDataset) else int(count)
        if samples:
            name = "mock data" if one.dataset_path is None else Path(one.dataset_path).name
            part = Part(name=name, digest=_digest(args, one, of_files), samples=samples)
            found[place] = Samples(one, part)
    return found


def shaping(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that determine the samples, by name."""
    found = {name: getattr(args, name) for name in _SHAPING}
    if args.data_path is None:
        del found["split"]
    if args.sft:
        del found["seed"]
    return found


def _digest(args: argparse.Namespace, dataset: Any, of_files: str) -> str:
    """Returns the digest of everything that decides the samples of a dataset, and what their tokens attend to."""
    said = {name: getattr(args, name) for name in ("seq_length", "reset_position_ids", "reset_attention_mask")}
    said |= {"kind": type(dataset).__name__, "files": of_files}
    state = xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode())
    indices = ("indices",) if isinstance(dataset, ConversationDataset) else _INDICES
    for name in indices:
        state.update(np.ascontiguousarray(getattr(dataset, name)).tobytes())
    return state.hexdigest()

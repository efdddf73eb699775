# SPDX-License-Identifier: Apache-2.0
"""Which sample is which: the number of a training sample in a target store, whatever the layout of the run.

Every dataset of a blend is a part of its own, so that the weights of a blend are the student's affair. A sample of
plain text has the number at which the dataset has it: within one pass over the data, megatron-core's order depends on
the files, ``--split``, ``--seq-length`` and ``--seed``, and neither on the layout nor on ``--train-iters``. Beyond one
pass all of that order depends on how many samples a run asks for. A sample of conversations has its number in the
file, and keeps it in every epoch and under every seed.

What decides the tokens and what each attends to is in the digest of a part: the content of the files, and the indices
that megatron-core built.
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
    """The samples of one part, numbered.

    Attributes:
        dataset: as megatron-core built it.
        part: what a store records of it.
    """

    dataset: MegatronDataset
    part: Part

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """A sample by its number."""
        of_file = isinstance(self.dataset, ConversationDataset)
        return self.dataset.sample(number) if of_file else self.dataset[number]

    def number(self, index: int) -> int:
        """The number of the sample that the dataset has at an index."""
        return self.dataset.number(index) if isinstance(self.dataset, ConversationDataset) else index


def parts_of(args: argparse.Namespace, dataset: Any, wanted: int | None) -> dict[int, Samples]:
    """The parts of training data, by their places in the blend.

    Args:
        args: of the run that built it, with what tells its data files from others.
        dataset: of training samples.
        wanted: how many samples a run takes from the first on; None for all that there are.
    """
    wanted = len(dataset) if wanted is None else min(wanted, len(dataset))
    blended = isinstance(dataset, BlendedDataset)
    datasets = dataset.datasets if blended else [dataset]
    counts = np.bincount(dataset.dataset_index[:wanted], minlength=len(datasets)) if blended else [wanted]
    found = {}
    for place, (one, count, of_files) in enumerate(zip(datasets, counts, args.data_digests, strict=True)):
        # Of a file any sample may come at any index.
        samples = len(one.indices) if isinstance(one, ConversationDataset) else int(count)
        if samples:
            name = "mock data" if one.dataset_path is None else Path(one.dataset_path).name
            part = Part(name=name, digest=_digest(args, one, of_files), samples=samples)
            found[place] = Samples(one, part)
    return found


def shaping(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that shape samples, by name."""
    found = {name: getattr(args, name) for name in _SHAPING}
    if args.data_path is None:
        del found["split"]
    if args.sft:
        del found["seed"]
    return found


def _digest(args: argparse.Namespace, dataset: Any, of_files: str) -> str:
    """Of everything that decides what the samples of a dataset are, and what their tokens attend to."""
    said = {name: getattr(args, name) for name in ("seq_length", "reset_position_ids", "reset_attention_mask")}
    said |= {"kind": type(dataset).__name__, "files": of_files}
    state = xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode())
    indices = ("indices",) if isinstance(dataset, ConversationDataset) else _INDICES
    for name in indices:
        state.update(np.ascontiguousarray(getattr(dataset, name)).tobytes())
    return state.hexdigest()

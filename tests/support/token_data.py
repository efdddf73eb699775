# SPDX-License-Identifier: Apache-2.0
"""Token files, with documents of lengths that a test chooses, and a tokenizer for whole training runs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

EOD = 299


def write_tokenizer(directory: Path) -> Path:
    """Writes a tokenizer of 300 words, the last of which ends documents; returns the directory."""
    directory.mkdir()
    words = {f"w{i}": i for i in range(EOD)} | {"<eod>": EOD}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.add_special_tokens(["<eod>"])
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eod>"}))
    return directory


def write_documents(prefix: Path, lengths: Sequence[int], seed: int = 0) -> Path:
    """Writes documents of random tokens with these lengths, each ended by the token :data:`EOD`; returns the prefix."""
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        tokens = [*random.integers(0, EOD, length - 1).tolist(), EOD]
        builder.add_document(torch.tensor(tokens), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_samples(prefix: Path, samples: Iterable[Mapping[str, Sequence[int]]]) -> Path:
    """Writes packed samples of conversations with given ``tokens``, ``answers`` and ``ends``; returns the prefix."""
    dtypes = {"tokens": np.uint16, "answers": np.uint8, "ends": np.int32}
    builders = {part: IndexedDatasetBuilder(f"{prefix}_{part}.bin", dtype=dtype) for part, dtype in dtypes.items()}
    for sample in samples:
        for part, builder in builders.items():
            builder.add_document(torch.tensor(sample[part]), [len(sample[part])])
    for part, builder in builders.items():
        builder.finalize(f"{prefix}_{part}.idx")
    return prefix


def write_conversations(
    prefix: Path, samples: Sequence[Sequence[int]], seed: int = 0, answers: Sequence[float] = (0.4,)
) -> Path:
    """Writes packed samples of conversations with these lengths; returns the prefix.

    ``answers`` has the approximate share of learned tokens for each sample in turn. Every conversation ends with the
    token that ends documents, which is learned if the sample learns anything.
    """
    random, made = np.random.default_rng(seed), []
    for number, lengths in enumerate(samples):
        share = answers[number % len(answers)]
        tokens, learned = [], []
        for length in lengths:
            tokens += [*random.integers(0, EOD, length - 1).tolist(), EOD]
            learned += [0, *(random.random(max(0, length - 2)) < share).astype(int).tolist(), int(share > 0)][-length:]
        learned[0] = 0
        made.append({"tokens": tokens, "answers": learned, "ends": np.cumsum(lengths).tolist()})
    return write_samples(prefix, made)

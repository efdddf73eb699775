# SPDX-License-Identifier: Apache-2.0
"""From arguments to micro-batches: megatron-core's GPTDataset, and an order that resumes at the very next sample."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list

from .tokenizer import NullTokenizer, SentencePieceTokenizer, padded_vocab_size

Batch = dict[str, torch.Tensor]
Tokenizer = SentencePieceTokenizer | NullTokenizer


@dataclass
class Data:
    """Training and validation samples; ``valid`` is None where none were asked for."""

    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset | None


def build_tokenizer(args: argparse.Namespace) -> tuple[Tokenizer, int]:
    """The tokenizer and the padded size of the vocabulary; fills in ``vocab_size`` where it was not given.

    Raises:
        ValueError: ``--vocab-size`` is less than the tokenizer needs.
    """
    # The last token of mock data ends documents.
    tokenizer = NullTokenizer(args.vocab_size - 1) if args.mock_data else SentencePieceTokenizer(args.tokenizer_model)
    if args.vocab_size is None:
        args.vocab_size = tokenizer.vocab_size
    if args.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size {args.vocab_size} is less than the {tokenizer.vocab_size} tokens of {args.tokenizer_model}"
        )
    return tokenizer, padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )


def build_data(args: argparse.Namespace, tokenizer: Tokenizer) -> Data:
    """Builds (or finds in the cache) the sample indices, for as many samples as the run will ask for.

    megatron-core shuffles exactly so many: the order of the training samples depends on ``--train-iters``.

    Raises:
        ValueError: no training samples, or too few for evaluation.
    """
    # Every evaluation reads the same validation samples, from the first.
    sizes = [args.train_iters * args.global_batch_size, args.eval_iters * args.global_batch_size, 0]
    blends = None
    if args.train_data_path is not None:
        blends = [get_blend_from_list(args.train_data_path), get_blend_from_list(args.valid_data_path), None]
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=get_blend_from_list(args.data_path),
        blend_per_split=blends,
        split=args.split if blends is None else None,
        path_to_cache=args.data_cache_path,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    train, valid, _ = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()
    if train is None or len(train) == 0:
        raise ValueError("the data holds no training sample: give more text, or a shorter --seq-length")
    if args.eval_iters and valid is None:
        raise ValueError(
            "the data holds no validation sample: change --split, give --valid-data-path or --eval-iters 0"
        )
    return Data(train, valid if args.eval_iters else None)


def batches(args: argparse.Namespace, dataset: torch.utils.data.Dataset, consumed: int) -> Iterator[Batch]:
    """Micro-batches of this data-parallel rank, from sample number ``consumed`` on, around for ever.

    Every global batch is the next ``global_batch_size`` samples of the dataset, so that the order depends neither on
    where a run was stopped nor on the number of ranks.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_indices(args, len(dataset), consumed),
        num_workers=args.num_workers,
        # Of its own: from the global one each loader would draw, and a resumed run go on with other random numbers.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _indices(args: argparse.Namespace, length: int, consumed: int) -> Iterator[list[int]]:
    rank, ranks = parallel_state.get_data_parallel_rank(), args.data_parallel_size
    per_rank = args.micro_batch_size
    while True:
        start = consumed + rank * per_rank
        yield [i % length for i in range(start, start + per_rank)]
        consumed += per_rank * ranks

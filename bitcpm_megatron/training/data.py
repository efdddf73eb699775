# SPDX-License-Identifier: Apache-2.0
"""From arguments to micro-batches: megatron-core's GPTDataset, or conversations; resumes at the very next sample."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from ..agreement import together
from ..attention.documents import CUMULATIVE, STARTS, pack, starts_after
from ..data.blends import blend_of
from ..data.sample_cache import key_of, sample_cache
from ..data.sft_files import ANSWERS, ENDS, TOKENS, read_samples, sft_prefixes
from ..data.token_headers import TokenFile, TokenFileError, read_token_file, split_mistake
from ..data.tokenizers import NullTokenizer, Tokenizer, open_tokenizer
from ..data.vocabulary import padded_vocab_size
from .initialize import device
from .mistakes import AT_ENDS

Batch = dict[str, torch.Tensor]
STORED = "stored"
"""In a batch: what a target store says of its samples; see :class:`~.distillation.store.StoredTargets`."""
_SOURCES = ("data_path", "train_data_path", "valid_data_path")
# Another number for indices of the same data that are not what they were.
_INDICES = 1


class DataError(ValueError):
    """The data hold what the model cannot read; raised on every rank alike."""


@dataclass
class Data:
    """Training and validation samples; ``valid`` is None where none were asked for, ``note`` a line for the log."""

    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset | None
    note: str | None = None


def build_tokenizer(args: argparse.Namespace) -> tuple[Tokenizer, int]:
    """The tokenizer and the padded size of the vocabulary; fills in ``vocab_size`` where it was not given.

    Fills in ``tokenizer_identity`` of the arguments, too: what tells the tokenizer from others, wherever it stands.

    Raises:
        ValueError: none is named, or ``--vocab-size`` is less than the tokenizer needs.
    """
    tokenizer: Tokenizer
    if args.mock_data:
        # The last token of mock data ends documents.
        tokenizer = NullTokenizer(args.vocab_size - 1)
    elif args.tokenizer_model is None:
        raise ValueError("no checkpoint says which tokenizer the data were written with: give --tokenizer-model")
    else:
        tokenizer = open_tokenizer(args.tokenizer_model, args.tokenizer_type)
    args.tokenizer_identity = dict(tokenizer.unique_identifiers)
    if args.vocab_size is None:
        args.vocab_size = tokenizer.vocab_size
    if args.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size {args.vocab_size} is less than the {tokenizer.vocab_size} tokens of {args.tokenizer_model}"
        )
    return tokenizer, padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )


def find_files(args: argparse.Namespace, end_of_document: int) -> dict[str, list[TokenFile]]:
    """Reads what the token files say about themselves, on rank 0 for all ranks; collective.

    Fills in ``data_digests`` of the arguments: what tells the training data from others.

    Returns:
        The files of ``--data-path``, ``--train-data-path`` and ``--valid-data-path``, by the names of the arguments.

    Raises:
        ValueError: on every rank alike, naming the file: it is missing or damaged, holds tokens that the vocabulary
            lacks, ``--split`` leaves nothing of it, or it has no ends of documents that a flag asks for.
    """
    told: list[dict[str, list[TokenFile]]] = [{}]
    with together():
        if torch.distributed.get_rank() == 0:
            told = [_read_files(args, end_of_document)]
    torch.distributed.broadcast_object_list(told)
    files = told[0]
    training = files.get("data_path") or files.get("train_data_path") or []
    args.data_digests = [file.digest for file in training] or ["mock"]
    return files


def _read_files(args: argparse.Namespace, end_of_document: int) -> dict[str, list[TokenFile]]:
    blends = {name: blend_of(getattr(args, name)) for name in _SOURCES if getattr(args, name) is not None}
    read = functools.partial(read_samples, args.seq_length) if args.sft else read_token_file
    files = {name: [read(prefix) for prefix in prefixes] for name, (prefixes, _) in blends.items()}
    found = [file.mistake(args.vocab_size) for some in files.values() for file in some]
    if args.data_path is not None:
        needed = ("training", "validation") if args.eval_iters else ("training",)
        weighted = blends["data_path"][1] is not None
        # Samples of conversations are whole ones, however short.
        length = 0 if args.sft else args.seq_length
        found.append(split_mistake(files["data_path"], args.split, needed, length, weighted))
    asked = [f"--{name.replace('_', '-')}" for name in AT_ENDS if getattr(args, name)]
    for file in itertools.chain(*files.values()):
        if asked and not file.ends_with(end_of_document):
            found.append(
                f"{file.prefix}: its documents do not end with token {end_of_document}, for {asked[0]}: tokenize the "
                "text with --append-eod, and with this tokenizer"
            )
    for mistake in filter(None, found):
        raise TokenFileError(mistake)
    return files


def build_data(args: argparse.Namespace, tokenizer: Tokenizer, files: Mapping[str, Sequence[TokenFile]]) -> Data:
    """Builds (or finds in the cache) the sample indices, for as many samples as the run will ask for; collective.

    megatron-core shuffles exactly so many: beyond one pass over the data the order of the training samples depends on
    ``--train-iters``, which may be None for one pass. The files are those that :func:`find_files` found.

    Raises:
        ValueError: no training samples, or too few for evaluation; on every rank alike.
    """
    # Every evaluation reads the same validation samples, from the first.
    wanted = None if args.train_iters is None else args.train_iters * args.global_batch_size
    sizes = [wanted, args.eval_iters * args.global_batch_size, 0]
    kind = ConversationDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset

    def build(directory: Path | None) -> Any:
        return _Builder(kind, sizes, lambda: True, _config(args, tokenizer, directory)).build()

    paths, root, note = args.data_path or args.train_data_path, None, None
    if args.sft:
        pass  # the order of conversations is not kept: it takes no time
    elif args.data_cache_path is not None:
        root = Path(args.data_cache_path)
    elif paths is not None:
        # Where megatron-core keeps them, too. The indices of synthetic data need not be kept.
        root = Path(blend_of(paths)[0][0]) / "cache" / "GPTDataset_indices"
    if root is not None:
        parts = {
            "versions": [_INDICES, megatron.core.__version__],
            "files": {name: [[file.prefix, file.digest] for file in found] for name, found in files.items()},
            "arguments": {
                name: getattr(args, name) for name in (*_SOURCES, "split", "seq_length", "seed", "vocab_size")
            },
            "sizes": sizes,
            "tokenizer": tokenizer.unique_identifiers,
        }
        root, note = sample_cache(root, key_of(parts), build)
    with together():
        train, valid, _ = build(root)
        if train is None or len(train) == 0:
            raise ValueError("the data holds no training sample: give more text, or a shorter --seq-length")
        if args.eval_iters and (valid is None or len(valid) == 0):
            raise ValueError(
                "the data holds no validation sample: change --split, give --valid-data-path or --eval-iters 0"
            )
    return Data(train, valid, note)


def _config(args: argparse.Namespace, tokenizer: Tokenizer, directory: Path | None) -> GPTDatasetConfig:
    blend = blends = None
    if args.train_data_path is not None:
        valid = args.valid_data_path if args.eval_iters else None
        blends = [blend_of(args.train_data_path), None if valid is None else blend_of(valid), None]
    elif args.data_path is not None:
        blend = blend_of(args.data_path)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blends,
        split=args.split if blends is None else None,
        path_to_cache=None if directory is None else str(directory),
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        # For masks, which nothing here makes: see batches().
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    if config.split_matrix is not None:
        # For a part without documents upstream counts epochs for ever, also where no sample of it is wanted. The bounds
        # of the others stay where --split puts them.
        wanted = (True, args.eval_iters > 0, False)
        config.split_matrix = [part if want else None for part, want in zip(config.split_matrix, wanted, strict=True)]
    return config


class _Builder(BlendedMegatronDatasetBuilder):
    """Builds the datasets of one rank. The original lets rank 0 go first, and where that one fails the others hang."""

    @staticmethod
    def build_generic_dataset(cls: Callable, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
        """Builds one."""
        return cls(*args)

    def _build_megatron_datasets_parallel(self, prefixes: list[str], split: Any, sizes_per_dataset: Any) -> list[list]:
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes, False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(part) for part in zip(*built, strict=True)]


class ConversationDataset(MegatronDataset):
    """Samples of supervised fine-tuning, of which answers count; each epoch has an order of its own.

    Sample i is the same however many are asked for. Its tensors are ``[sequence_length]``: ``tokens`` and ``labels``
    (int64), ``loss_mask`` (float; 1 where the next token belongs to an answer), ``position_ids`` (int64, from 0 in each
    conversation), and where conversations start (bool). The padding behind the last conversation counts as one more:
    it is told by its place, for many models end texts with the token that they pad with.

    Args:
        dataset: of :meth:`build_low_level_dataset`.
        dataset_path: the prefix.
        indices: of the samples that belong to this split.
        num_samples: the least that there have to be, over epochs; None for one epoch.
        index_split: train, validation or test.
        config: its ``random_seed``, ``sequence_length`` and ``tokenizer`` are used.
    """

    def __init__(
        self,
        dataset: dict[str, IndexedDataset],
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        epochs = 1 if not num_samples or not len(indices) else -(-num_samples // len(indices))
        self._length = epochs * len(indices)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> dict[str, IndexedDataset]:
        """The three token files of a prefix."""
        return {part: IndexedDataset(path, mmap=True) for part, path in sft_prefixes(dataset_path).items()}

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: dict[str, IndexedDataset]) -> int:
        """The number of samples, which ``--split`` divides."""
        return len(low_level_dataset[TOKENS])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.sample(self.number(index))

    def number(self, index: int) -> int:
        """Which of the samples of this split, in the order of the files, comes at an index."""
        epoch, place = divmod(index, len(self.indices))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.config.random_seed, epoch]).permutation(len(self.indices))
            self._epoch = epoch
        return int(self._order[place])

    def sample(self, number: int) -> dict[str, torch.Tensor]:
        """One of the samples of this split, by its number in the order of the files."""
        at = int(self.indices[number])
        found = {part: torch.from_numpy(file[at].astype(np.int64)) for part, file in self.dataset.items()}
        used, ends = len(found[TOKENS]), found[ENDS]
        length, tokenizer = self.config.sequence_length, self.config.tokenizer
        tokens = torch.full((length,), tokenizer.eod if tokenizer.pad < 0 else tokenizer.pad)
        tokens[:used] = found[TOKENS]
        # A token counts where the next one belongs to an answer; behind the last one of a conversation is none.
        counted = torch.zeros(length)
        counted[: used - 1] = found[ANSWERS][1:].float()
        counted[ends - 1] = 0.0
        starts = torch.zeros(length, dtype=torch.bool)
        begins = torch.cat((ends.new_zeros(1), ends if used < length else ends[:-1]))
        starts[begins] = True
        lengths = torch.cat((begins, begins.new_tensor([length]))).diff()
        return {
            "tokens": tokens,
            "labels": tokens.roll(-1),
            "loss_mask": counted,
            "position_ids": torch.arange(length) - begins.repeat_interleave(lengths),
            STARTS: starts,
        }


def batches(args: argparse.Namespace, dataset: Any, consumed: int) -> Iterator[Batch]:
    """Micro-batches of this data- and context-parallel rank, from sample number ``consumed`` on, around for ever.

    Every global batch is the next ``global_batch_size`` samples of the dataset, so that the order depends neither on
    where a run was stopped nor on the number of ranks.
    """
    size = args.micro_batch_size
    starts = itertools.count(consumed + parallel_state.get_data_parallel_rank() * size, size * args.data_parallel_size)
    return read_batches(args, dataset, ([i % len(dataset) for i in range(start, start + size)] for start in starts))


def read_batches(args: argparse.Namespace, dataset: Any, indices: Iterable[list[int]]) -> Iterator[Batch]:
    """The micro-batches with the samples at these indices, as this context-parallel rank takes them."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=indices,
        num_workers=args.num_workers,
        # Of its own: from the global one each loader would draw, and a resumed run go on with other random numbers.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if args.reset_attention_mask:
            batch[STARTS] = starts_after(batch["tokens"], dataset.config.tokenizer.eod)
        # Of whole samples, whichever part of them is this rank's.
        stored = {STORED: batch.pop(STORED)} if STORED in batch else {}
        yield {**of_this_rank(args, batch), **stored}


def of_this_rank(args: argparse.Namespace, batch: Batch) -> Batch:
    """A micro-batch as the model takes it: as it is, or this context-parallel rank's part of one packed row."""
    if not packs(args):
        return batch
    return pack(batch, parallel_state.get_context_parallel_rank(), args.context_parallel_size)


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch on this process's device, but for the lengths of documents, over which loops run on the CPU."""
    return {
        name: value if name == CUMULATIVE else value.to(device(), non_blocking=True) for name, value in batch.items()
    }


def schedule_shape(args: argparse.Namespace) -> dict[str, int]:
    """What megatron-core's schedules are told of a micro-batch: a packed row holds the tokens of all of its rows."""
    rows = args.micro_batch_size
    if packs(args):
        return {"seq_length": args.seq_length * rows, "micro_batch_size": 1}
    return {"seq_length": args.seq_length, "micro_batch_size": rows}


def packs(args: argparse.Namespace) -> bool:
    """Whether micro-batches are one packed row each, of documents or, over context-parallel ranks, of samples."""
    return args.sft or args.reset_attention_mask or args.context_parallel_size > 1


def withdraw_unknown_tokens(batches: Sequence[Batch], vocab_size: int) -> list[str]:
    """Replaces token ids that the vocabulary lacks by 0, until every rank can be told; says which were found."""
    found = []
    for batch in batches:
        for name in ("tokens", "labels"):
            ids = batch[name]
            low, high = (int(bound) for bound in torch.aminmax(ids))
            if low < 0 or high >= vocab_size:
                found.append(f"token {high if high >= vocab_size else low}")
                batch[name] = ids.where((ids >= 0) & (ids < vocab_size), 0)
    return found


def refuse_unknown_tokens(args: argparse.Namespace, found: Sequence[str], training: bool) -> None:
    """Raises a DataError on every rank for what :func:`withdraw_unknown_tokens` has found on some; collective."""
    paths = (args.data_path or args.train_data_path) if training else (args.data_path or args.valid_data_path)
    with together():
        if found:
            raise DataError(
                f"the data ({' '.join(paths or ['--mock-data'])}) hold {found[0]}, and the vocabulary ends at "
                f"{args.vocab_size - 1}: another tokenizer wrote them; give that one, or tokenize the text again"
            )

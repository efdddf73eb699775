# SPDX-License-Identifier: Apache-2.0
"""Training data: micro-batches of megatron-core's GPTDataset or of conversations; a run resumes at the next sample."""

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
"""Key of a batch: the records of its samples in a target store (:class:`~.distillation.store.StoredTargets`)."""
_SOURCES = ("data_path", "train_data_path", "valid_data_path")
# The version of the sample indices in the cache: increase it when the same data are to have other indices.
_INDICES = 1


class DataError(ValueError):
    """Data that the model cannot be trained on; raised on every rank alike."""


@dataclass
class Data:
    """Training and validation samples; ``valid`` is None if none were requested, ``note`` is a line for the log."""

    train: torch.utils.data.Dataset
    valid: torch.utils.data.Dataset | None
    note: str | None = None


def build_tokenizer(args: argparse.Namespace) -> tuple[Tokenizer, int]:
    """Returns the tokenizer and the padded size of the vocabulary; fills in ``vocab_size`` if it was not given.

    Also fills in ``tokenizer_identity`` of the arguments, which distinguishes the tokenizer from others independently
    of its path.

    Raises:
        ValueError: if no tokenizer is named, or ``--vocab-size`` is less than the tokenizer needs.
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
    """Reads and checks the headers of the token files, on rank 0 for all ranks; collective.

    Fills in ``data_digests`` of the arguments, which distinguish the training data from others.

    Returns:
        The files of ``--data-path``, ``--train-data-path`` and ``--valid-data-path``, by the names of the arguments.

    Raises:
        ValueError: if a file is missing or damaged, holds tokens that the vocabulary lacks, is left empty by
            ``--split``, or lacks the end-of-document tokens that a flag requires. The message names the file; raised
            on every rank alike.
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
        # A sample of conversations is usable however short it is.
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
    """Builds the sample indices, or finds them in the cache, for as many samples as the run will use; collective.

    megatron-core shuffles exactly this number of samples: beyond one pass over the data the order of the training
    samples depends on ``--train-iters``, which may be None for one pass. The files are those of :func:`find_files`.

    Raises:
        ValueError: if there are no training samples, or none for evaluation; on every rank alike.
    """
    # Every evaluation reads the same validation samples, from the first.
    wanted = None if args.train_iters is None else args.train_iters * args.global_batch_size
    sizes = [wanted, args.eval_iters * args.global_batch_size, 0]
    kind = ConversationDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset

    def build(directory: Path | None) -> Any:
        return _Builder(kind, sizes, lambda: True, _config(args, tokenizer, directory)).build()

    paths, root, note = args.data_path or args.train_data_path, None, None
    if args.sft:
        pass  # The order of conversations is not cached, because computing it takes no time.
    elif args.data_cache_path is not None:
        root = Path(args.data_cache_path)
    elif paths is not None:
        # megatron-core has its cache here, too. The indices of synthetic data need no cache.
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
        # This concerns attention masks, which the dataset does not make: read_batches() marks the documents instead.
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    if config.split_matrix is not None:
        # Upstream counts epochs forever for a part without documents, even if no sample of it is wanted. Unwanted parts
        # are therefore removed; the bounds of the others remain those of --split.
        wanted = (True, args.eval_iters > 0, False)
        config.split_matrix = [part if want else None for part, want in zip(config.split_matrix, wanted, strict=True)]
    return config


class _Builder(BlendedMegatronDatasetBuilder):
    """Builder of the datasets of one rank; upstream's lets rank 0 go first, and if that fails, the others hang."""

    @staticmethod
    def build_generic_dataset(cls: Callable, is_built_on_rank: Any, synchronize_ranks: bool, *args: Any) -> Any:
        """Builds one dataset."""
        return cls(*args)

    def _build_megatron_datasets_parallel(self, prefixes: list[str], split: Any, sizes_per_dataset: Any) -> list[list]:
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes, False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(part) for part in zip(*built, strict=True)]


class ConversationDataset(MegatronDataset):
    """Samples for supervised fine-tuning, with a loss on answers only; each epoch has an order of its own.

    Sample i does not depend on the number of samples requested. Its tensors are ``[sequence_length]``: ``tokens`` and
    ``labels`` (int64), ``loss_mask`` (fp32; 1 if the next token belongs to an answer), ``position_ids`` (int64, from 0
    in each conversation), and under :data:`STARTS` the first tokens of conversations (bool). The padding after the last
    conversation counts as one more conversation. It is recognized by its position, because many models end texts with
    the token that they pad with.

    Args:
        dataset: the token files from :meth:`build_low_level_dataset`.
        dataset_path: the prefix of the token files.
        indices: the indices of the samples that belong to this split.
        num_samples: the least number of samples over all epochs; None for one epoch.
        index_split: the split: train, validation or test.
        config: the configuration; its ``random_seed``, ``sequence_length`` and ``tokenizer`` are used.
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
        """Opens the three token files of a prefix."""
        return {part: IndexedDataset(path, mmap=True) for part, path in sft_prefixes(dataset_path).items()}

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: dict[str, IndexedDataset]) -> int:
        """Returns the number of samples, which ``--split`` divides."""
        return len(low_level_dataset[TOKENS])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.sample(self.number(index))

    def number(self, index: int) -> int:
        """Returns the number, in the order of the files, of this split's sample that comes at an index."""
        epoch, place = divmod(index, len(self.indices))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.config.random_seed, epoch]).permutation(len(self.indices))
            self._epoch = epoch
        return int(self._order[place])

    def sample(self, number: int) -> dict[str, torch.Tensor]:
        """Returns one of this split's samples, by its number in the order of the files."""
        at = int(self.indices[number])
        found = {part: torch.from_numpy(file[at].astype(np.int64)) for part, file in self.dataset.items()}
        used, ends = len(found[TOKENS]), found[ENDS]
        length, tokenizer = self.config.sequence_length, self.config.tokenizer
        tokens = torch.full((length,), tokenizer.eod if tokenizer.pad < 0 else tokenizer.pad)
        tokens[:used] = found[TOKENS]
        # A token counts if the next one belongs to an answer; the last token of a conversation has no next one.
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
    """Yields the micro-batches of this data- and context-parallel rank from sample ``consumed`` on, cycling forever.

    Every global batch consists of the next ``global_batch_size`` samples of the dataset, so that the order depends
    neither on where a run was stopped nor on the number of ranks.
    """
    size = args.micro_batch_size
    starts = itertools.count(consumed + parallel_state.get_data_parallel_rank() * size, size * args.data_parallel_size)
    return read_batches(args, dataset, ([i % len(dataset) for i in range(start, start + size)] for start in starts))


def read_batches(args: argparse.Namespace, dataset: Any, indices: Iterable[list[int]]) -> Iterator[Batch]:
    """Yields the micro-batches of the samples at the given indices, each as this context-parallel rank takes it."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=indices,
        num_workers=args.num_workers,
        # Each loader would draw from the global generator, and a resumed run would go on with other random numbers.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if args.reset_attention_mask:
            batch[STARTS] = starts_after(batch["tokens"], dataset.config.tokenizer.eod)
        # Stored targets stay whole here; StoredTargets.attach() takes this rank's part of them.
        stored = {STORED: batch.pop(STORED)} if STORED in batch else {}
        yield {**of_this_rank(args, batch), **stored}


def of_this_rank(args: argparse.Namespace, batch: Batch) -> Batch:
    """Returns a micro-batch as the model takes it: unchanged, or this context-parallel rank's part of a packed row."""
    if not packs(args):
        return batch
    return pack(batch, parallel_state.get_context_parallel_rank(), args.context_parallel_size)


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Moves a micro-batch to this process's device, except for the document lengths, which the CPU loops over."""
    return {
        name: value if name == CUMULATIVE else value.to(device(), non_blocking=True) for name, value in batch.items()
    }


def schedule_shape(args: argparse.Namespace) -> dict[str, int]:
    """Returns a micro-batch's shape for megatron-core's schedules; a packed row holds the tokens of all its rows."""
    rows = args.micro_batch_size
    if packs(args):
        return {"seq_length": args.seq_length * rows, "micro_batch_size": 1}
    return {"seq_length": args.seq_length, "micro_batch_size": rows}


def packs(args: argparse.Namespace) -> bool:
    """Returns whether a micro-batch is one packed row, of documents or, with context parallelism, of samples."""
    return args.sft or args.reset_attention_mask or args.context_parallel_size > 1


def withdraw_unknown_tokens(batches: Sequence[Batch], vocab_size: int) -> list[str]:
    """Replaces token ids outside the vocabulary by 0 until all ranks can raise together; returns which were found."""
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
    """Raises a DataError on every rank if :func:`withdraw_unknown_tokens` found any token on some rank; collective."""
    paths = (args.data_path or args.train_data_path) if training else (args.data_path or args.valid_data_path)
    with together():
        if found:
            raise DataError(
                f"the data ({' '.join(paths or ['--mock-data'])}) hold {found[0]}, and the vocabulary ends at "
                f"{args.vocab_size - 1}: another tokenizer wrote them; give that one, or tokenize the text again"
            )

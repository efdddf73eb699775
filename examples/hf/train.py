# SPDX-License-Identifier: Apache-2.0
"""Continued pretraining of a latent export with the Hugging Face Trainer.

    python examples/hf/train.py --model_name_or_path LATENT --trust_remote_code --train_files a.txt b.jsonl \\
        --output_dir OUT --bf16 --max_steps 1000 --learning_rate 1e-4

A ``.jsonl`` file holds one document per line under ``text``; any other file is one document. Documents are joined with
the end-of-text token and cut into blocks; every block is used once per epoch. All other flags are those of
``transformers.TrainingArguments``. Exit status: 0 done, 2 bad input or arguments.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from distilling import DistillationArguments, DistillingTrainer, load_teacher
from latent_model import ModelArguments, Parser, load, records_of, text_of, train_and_save
from transformers import PreTrainedTokenizerBase, TrainingArguments, default_data_collator

from bitcpm_megatron import cli


@dataclass
class DataArguments:
    """The data to train on."""

    train_files: list[str] = field(metadata={"help": "text files, or .jsonl files with a field `text`"})
    block_size: int = field(default=2048, metadata={"help": "tokens per sequence"})


class Blocks(torch.utils.data.Dataset):
    """A stream of tokens in blocks of equal length; tokens at the end that do not fill a block are left out."""

    def __init__(self, tokens: torch.Tensor, size: int) -> None:
        if tokens.numel() < size:
            raise ValueError(
                f"{tokens.numel()} tokens do not fill one block of {size}: give more text, or --block_size"
            )
        self._blocks = tokens[: tokens.numel() // size * size].view(-1, size)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self._blocks[index].long()
        # The model shifts the labels itself.
        return {"input_ids": block, "labels": block, "attention_mask": torch.ones_like(block)}


def documents(file: str | Path) -> Iterator[str]:
    """Yields the documents of a file.

    Raises:
        ValueError: if a line of a ``.jsonl`` file is not a JSON object with ``text``.
    """
    if Path(file).suffix != ".jsonl":
        yield text_of(file)
        return
    for place, record in records_of(file):
        if not isinstance(record.get("text"), str):
            raise ValueError(f'{place}: expected {{"text": ...}}')
        yield record["text"]


def tokenize(files: list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns all documents as one stream of token ids (int32), each document ended by the end-of-text token."""
    ids: list[int] = []
    for file in files:
        for text in documents(file):
            ids += tokenizer(text, add_special_tokens=False).input_ids
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def main(argv: list[str] | None = None) -> int:
    """Trains the model; returns the exit status."""
    return cli.run(lambda: _train(argv))


def _train(argv: list[str] | None) -> None:
    parser = Parser(ModelArguments, DataArguments, DistillationArguments, TrainingArguments, description=__doc__)
    model_arguments, data, distillation, training = parser.parse(argv)
    model, tokenizer = load(model_arguments)
    teacher = load_teacher(distillation, tokenizer)
    trainer = DistillingTrainer(
        teacher,
        distillation,
        len(tokenizer),
        model=model,
        args=training,
        train_dataset=Blocks(tokenize(data.train_files, tokenizer), data.block_size),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    train_and_save(trainer, training)


if __name__ == "__main__":
    sys.exit(main())

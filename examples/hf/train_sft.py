# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of a latent export with the Hugging Face Trainer; only the answers count in the loss.

    python examples/hf/train_sft.py --model_name_or_path LATENT --trust_remote_code --train_files chats.jsonl \\
        --output_dir OUT --bf16 --num_train_epochs 3 --learning_rate 2e-5

Each line is ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}`` or
``{"instruction": ..., "input": ..., "output": ...}``. The tokenizer's chat template renders it as text; a tokenizer
without one gets :data:`PLAIN_TEMPLATE`, which LLaMA-Factory calls ``default``. All other flags are those of
``transformers.TrainingArguments``. Exit status: 0 done, 2 bad input or arguments.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from distilling import DistillationArguments, DistillingTrainer, load_teacher
from latent_model import ModelArguments, Parser, load, records_of, train_and_save
from transformers import PreTrainedTokenizerBase, TrainingArguments

from bitcpm_megatron import cli

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content + '\n' }}"
    "{% elif m.role == 'user' %}{{ ('' if loop.first or messages[loop.index0 - 1].role == 'system' else '\n')"
    " + 'Human: ' + m.content + '\nAssistant:' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
IGNORED = -100


@dataclass
class DataArguments:
    """The data to train on."""

    train_files: list[str] = field(metadata={"help": ".jsonl files"})
    max_length: int = field(default=2048, metadata={"help": "tokens of a conversation; what is longer is cut off"})


class Conversations(torch.utils.data.Dataset):
    """A dataset of conversations: their token ids and labels."""

    def __init__(self, examples: list[tuple[list[int], list[int]]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self._examples[index]
        return {"input_ids": ids, "labels": labels}


def messages_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the messages of the conversation in a line of data.

    Raises:
        ValueError: if the line has neither of the two formats.
    """
    if "messages" in record:
        messages = record["messages"]
        if not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
            raise ValueError("every message needs a role and a content")
        return messages
    if "instruction" in record and "output" in record:
        question = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
        system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    raise ValueError("expected `messages`, or `instruction` and `output`")


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns token ids and labels: a token of an answer is its own label, all others have the label :data:`IGNORED`.

    Raises:
        ValueError: if there is no answer, or the chat template rewrites earlier turns, so that the answers in its text
            cannot be told from the rest.
    """
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise ValueError(
                "the chat template rewrites earlier turns: split the conversation into one line per answer"
            )
        for text, answer in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
            piece = tokenizer(text, add_special_tokens=False).input_ids
            ids += piece
            labels += piece if answer else [IGNORED] * len(piece)
        done = whole
    if not done:
        raise ValueError("there is no message of the role `assistant` to learn from")
    return ids, labels


def read(files: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Conversations:
    """Reads all conversations of the files; leaves out those without an answer in the first ``max_length`` tokens.

    Raises:
        ValueError: if a line is bad (the message names file and line), or no conversation is left.
    """
    examples = []
    too_long = 0
    for file in files:
        for place, record in records_of(file):
            try:
                ids, labels = encode(messages_of(record), tokenizer)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{place}: {error}") from None
            ids, labels = ids[:max_length], labels[:max_length]
            if any(label != IGNORED for label in labels):
                examples.append((ids, labels))
            else:
                too_long += 1
    if too_long:
        print(f"left out: {too_long} conversations whose first {max_length} tokens hold no answer", flush=True)
    if not examples:
        raise ValueError(f"no conversation in {', '.join(files)} can be trained on")
    return Conversations(examples)


def pad(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collates conversations into a batch [batch, length], padded to the length of its longest conversation."""
    length = max(len(example["input_ids"]) for example in batch)

    def filled(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    ids = [example["input_ids"] for example in batch]
    return {
        "input_ids": filled(ids, 0),  # any token may serve as padding: it is masked
        "attention_mask": filled([[1] * len(row) for row in ids], 0),
        "labels": filled([example["labels"] for example in batch], IGNORED),
    }


def main(argv: list[str] | None = None) -> int:
    """Trains the model; returns the exit status."""
    return cli.run(lambda: _train(argv))


def _train(argv: list[str] | None) -> None:
    parser = Parser(ModelArguments, DataArguments, DistillationArguments, TrainingArguments, description=__doc__)
    model_arguments, data, distillation, training = parser.parse(argv)
    model, tokenizer = load(model_arguments)
    teacher = load_teacher(distillation, tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE  # saved with the model: users prompt it as it was trained
    conversations = read(data.train_files, tokenizer, data.max_length)
    trainer = DistillingTrainer(
        teacher,
        distillation,
        len(tokenizer),
        model=model,
        args=training,
        train_dataset=conversations,
        data_collator=pad,
        processing_class=tokenizer,
    )
    train_and_save(trainer, training)


if __name__ == "__main__":
    sys.exit(main())

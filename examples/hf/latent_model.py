# SPDX-License-Identifier: Apache-2.0
"""The command line of the training scripts, and the loading of latent exports; fused weights are refused."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import bitcpm_megatron  # noqa: F401
except ImportError:
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from bitcpm_megatron import cli
from bitcpm_megatron.checkpoint_tools.hf_model.config import BITCPM, read_config
from bitcpm_megatron.checkpoint_tools.hf_model.remote_code import read_record
from bitcpm_megatron.files import check_digests, parse_json
from bitcpm_megatron.quantization import fused_space

_COUNT = cli.Whole(1, 2**24)
_PROBABILITY = cli.Number(0, 1, open_maximum=True)
# Bounds of our flags, and of flags of ``transformers.TrainingArguments`` that would otherwise fail late or lead to NaN.
_BOUNDS = {
    "block_size": _COUNT,
    "max_length": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "num_train_epochs": cli.Number(0, 1e9, open_minimum=True),
    "max_steps": cli.Whole(-1),
    "learning_rate": cli.Number(0, 100, open_minimum=True),
    "weight_decay": cli.Number(0, 100),
    "adam_beta1": _PROBABILITY,
    "adam_beta2": _PROBABILITY,
    "adam_epsilon": cli.Number(1e-30, 1),
    "max_grad_norm": cli.Number(0),
    "distill_alpha": cli.Number(0, 1),
    "distill_temperature": cli.Number(0, 1000, open_minimum=True),
    "seed": cli.Whole(0, 2**32 - 1),
}


class Parser(cli.Parser, HfArgumentParser):
    """A parser for flags of dataclasses, as strict as our other commands: bounded, unabbreviated, one-line errors."""

    def __init__(self, *kinds: type, **options: Any) -> None:
        super().__init__(dataclass_types=kinds, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        for action in self._actions:
            if action.type in (int, float):
                finite = cli.Whole(-(2**31)) if action.type is int else cli.Number()
                action.type = _BOUNDS.get(action.dest, finite)

    def parse(self, argv: Sequence[str] | None) -> tuple[Any, ...]:
        """Parses a command line and returns one filled dataclass of each kind.

        Raises:
            ValueError: if flags contradict each other, or need a package that is not installed, such as DeepSpeed.
        """
        found = vars(self.parse_args(argv))
        try:
            return self.parse_dict(found)
        except ImportError as error:
            raise ValueError(f"a flag needs a package that is not installed: {error}") from None
        except RuntimeError as error:
            raise ValueError(str(error)) from None


@dataclass
class ModelArguments:
    """The model that is trained."""

    model_name_or_path: str = field(metadata={"help": "directory of a latent export"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the export's modeling_bitcpm.py: read it first, or compare it with ours"}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "of the weights in memory. float32 with --bf16 keeps full-precision masters; bfloat16 is for "
            "DeepSpeed, which keeps them itself"
        },
    )


def load(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model, with its quantizer in the forward, and the tokenizer.

    Raises:
        ValueError: if the directory is not a latent export, its weights are fused, or it cannot be loaded.
    """
    directory = Path(arguments.model_name_or_path)
    record = read_record(directory)
    if record is not None and record.state == "fused":
        raise ValueError(
            f"{directory} holds fused weights (ternary x scale): trained further they would be neither ternary nor "
            "latent. Train the latent export that it was made of"
        )
    if record is None or read_config(directory).get("model_type") != BITCPM:
        raise ValueError(
            f"{directory} is no latent export (model type {BITCPM!r} and a quantizer record): nothing in it would be "
            "quantized. convert_megatron_to_hf.py --weights latent makes one"
        )
    if not arguments.trust_remote_code:
        raise ValueError(
            f"{directory} is quantized by its own modeling_bitcpm.py: read that file, then pass --trust_remote_code"
        )
    check_digests(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=arguments.dtype)
        # The configuration is passed on: Transformers 5 cannot read one with LongRoPE of a model type that it does not
        # know.
        tokenizer = AutoTokenizer.from_pretrained(directory, config=model.config)
    except Exception as error:  # a damaged file can make the many readers inside raise anything
        raise ValueError(f"{directory}: Transformers cannot load it ({type(error).__name__}: {error})") from error
    for name in record.modules:
        weight = model.get_submodule(name).weight
        if weight.numel() and fused_space(weight) is not None and weight.any():
            raise ValueError(f"{directory}: {name} is quantized already, though the record calls it latent")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows or tokenizer.eos_token_id is None:
        has = f"{len(tokenizer):,} tokens for {rows:,} rows" if len(tokenizer) > rows else "no end-of-text token"
        raise ValueError(f"{directory}: the tokenizer has {has}: it is not this model's")
    return model, tokenizer


def text_of(file: str | Path) -> str:
    """Returns the text of a file.

    Raises:
        ValueError: if the path is not a regular file, or its content is not UTF-8.
    """
    path = Path(file)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: this is no regular file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start:,})") from None


def records_of(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a ``.jsonl`` file, each after its place (file and line) for messages.

    Raises:
        ValueError: if a line is not a JSON object.
    """
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if line.strip():
            place = f"{file}, line {number}"
            record = parse_json(line, place)
            if not isinstance(record, dict):
                raise ValueError(f"{place}: expected a JSON object")
            yield place, record


def train_and_save(trainer: Trainer, arguments: TrainingArguments) -> None:
    """Trains, and then saves the model, its tokenizer, and the losses (``trainer_state.json``)."""
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

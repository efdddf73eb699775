# SPDX-License-Identifier: Apache-2.0
"""Loads a latent export for training, and nothing else: weights that are fused already must not be trained."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

try:
    import bitcpm_megatron  # noqa: F401
except ImportError:
    # From a bare checkout the package stands three levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from bitcpm_megatron.checkpoint_tools.hf_config import BITCPM, read_config
from bitcpm_megatron.checkpoint_tools.latent_export import read_record
from bitcpm_megatron.quantization import fused_group_size


@dataclass
class ModelArguments:
    """Which model is trained."""

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
    """The model with its quantizer in the forward, and the tokenizer.

    Raises:
        ValueError: it is no latent export, or its weights are fused.
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
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=arguments.dtype)
    for name in record.modules:
        weight = model.get_submodule(name).weight
        if weight.numel() and fused_group_size(weight) is not None and weight.any():
            raise ValueError(f"{directory}: {name} is ternary already, though the record calls it latent")
    # With its configuration: Transformers 5 cannot read one with LongRoPE whose model type it does not know.
    return model, AutoTokenizer.from_pretrained(directory, config=model.config)


def train_and_save(trainer: Trainer, arguments: TrainingArguments) -> None:
    """Trains, and saves the model, its tokenizer, and the losses (``trainer_state.json``)."""
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

# SPDX-License-Identifier: Apache-2.0
"""Opening of models for text generation: training runs, Hugging Face directories and packed exports."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.directory import HF_DIRECTORY, RELEASE, TRACKER, latest
from ..cli import late_imports
from ..data.sft.chat_template import open_chat_template, require_chat_tokenizer
from ..data.sft.questions import Questioner
from ..data.tokenizers import Tokenizer, open_tokenizer
from ..files import read_json
from .generate import NextToken


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer.

    Attributes:
        path: the path that was opened: the checkpoint of a run, or a Hugging Face directory.
        tokens: the model as a predictor of the next token.
        tokenizer: the tokenizer of the model.
        context: the model's longest input, in tokens.
        ends: the ids of the tokens that end its texts.
        close: a function that leaves the process groups that were joined to open the model.
    """

    path: Path
    tokens: NextToken
    tokenizer: Tokenizer
    context: int
    ends: frozenset[int]
    close: Callable[[], None] = lambda: None


def is_first_rank() -> bool:
    """Returns whether this process is the one of its job that prints."""
    return os.environ.get("RANK", "0") == "0"


def open_text_model(
    path: Path, *, fp32: bool = False, tokenizer: str | None = None, tokenizer_type: str | None = None
) -> TextModel:
    """Opens a model for text generation.

    Args:
        path: the ``--save`` directory of a run or one checkpoint in it, which opens over all processes of the job as
            tensor-parallel ranks; or a Hugging Face directory of dense weights (fused or latent) or of a
            compressed-tensors export.
        fp32: whether to compute in fp32, with the same weights.
        tokenizer: the file or directory of a tokenizer to use instead of the model's own.
        tokenizer_type: the type of that tokenizer, one of :data:`~..data.vocabulary.TOKENIZER_TYPES`; None to detect
            it.

    Raises:
        ValueError: if there is no such model, it is damaged, or it is of a kind that other software opens; the message
            then has the command.
    """
    if path.suffix == ".gguf":
        raise ValueError(_in_llama_cpp(path))
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name the directory of a run or of a Hugging Face model")
    if _is_checkpoint(path):
        return _of_run(path, fp32, tokenizer, tokenizer_type)
    is_run = (path / TRACKER).exists() or any(path.glob("iter_*")) or (path / RELEASE).exists()
    if is_run and (newest := latest(path)) is not None:
        return _of_run(newest, fp32, tokenizer, tokenizer_type)
    if (path / "config.json").is_file():
        return _of_hugging_face(path, fp32, tokenizer, tokenizer_type)
    if files := sorted(path.glob("*.gguf")):
        raise ValueError(_in_llama_cpp(files[0]))
    if any(path.glob("mp_rank_*")):
        raise ValueError(
            f"{path} is in Megatron-LM's legacy format: checkpoint_tools/convert_megatron_to_hf.py writes a directory "
            "that opens here"
        )
    raise ValueError(
        f"{path}: there is no checkpoint, neither a run's ({TRACKER}, metadata.json) nor Hugging Face's (config.json)"
    )


def open_questioner(model: TextModel, template: Path | None = None) -> Questioner:
    """Returns a formatter of conversations for a model, with its tokenizer's chat template or the one in a file.

    Raises:
        ValueError: if there is no template, or it does not show where answers end; the message names the cure.
    """
    chats = require_chat_tokenizer(model.tokenizer, f"the tokenizer of {model.path}")
    return Questioner(chats, open_chat_template(chats, template))


def _in_llama_cpp(file: Path) -> str:
    return (
        f"{file} is a GGUF file, which runs in llama.cpp: llama-cli -m {file} (-p TEXT goes on with a text, without it "
        "the model chats). Here open what it was packed from"
    )


def _is_checkpoint(path: Path) -> bool:
    return (path / "metadata.json").is_file() or (path / ".metadata").is_file()


def _of_run(checkpoint: Path, fp32: bool, tokenizer: str | None, kind: str | None) -> TextModel:
    # These are imported only when needed, because exports open without megatron-core.
    with late_imports():
        from ..training.initialize import shutdown
        from .megatron_run import MegatronNextToken, context_of, load_for_inference, tokenizer_of

    run, model = load_for_inference(checkpoint, fp32)
    own = tokenizer_of(run, checkpoint, tokenizer, kind)
    context = context_of(run)
    ends = frozenset({own.eod, *_ends(checkpoint / HF_DIRECTORY)})
    return TextModel(checkpoint, MegatronNextToken(model, context), own, context, ends, shutdown)


def _of_hugging_face(path: Path, fp32: bool, tokenizer: str | None, kind: str | None) -> TextModel:
    from .transformers_model import TransformersNextToken, open_transformers_model

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"{path}: a Hugging Face directory opens in one process: start the command without torchrun")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = open_tokenizer(tokenizer or path, kind)
    model = open_transformers_model(path, device, fp32)
    rows = model.get_output_embeddings().weight.shape[0]
    if own.vocab_size > rows:
        raise ValueError(
            f"the tokenizer {tokenizer or path} has {own.vocab_size:,} pieces, and {path} has rows for {rows:,}: give "
            "the model's own --tokenizer-model"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(context, int):
        raise ValueError(f"{path}/config.json says no max_position_embeddings, the longest text that its model takes")
    return TextModel(path, TransformersNextToken(model), own, context, frozenset({own.eod, *_ends(path)}))


def _ends(directory: Path) -> set[int]:
    """Returns the tokens that end texts according to ``config.json`` and ``generation_config.json``."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        content: Any = read_json(directory / name) if (directory / name).is_file() else {}
        ends = content.get("eos_token_id") if isinstance(content, dict) else None
        found.update(end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int))
    return found

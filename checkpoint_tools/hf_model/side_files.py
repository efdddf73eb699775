# SPDX-License-Identifier: Apache-2.0
"""Side files of a model directory, which do not describe its weights: tokenizer, chat template, generation settings."""

import shutil
from pathlib import Path

TOKENIZER = "tokenizer.json"
_NAMES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt chat_template.jinja chat_template.json generation_config.json tokenization_*.py "
    "additional_chat_templates/*"
).split()


def side_files(source: Path) -> list[str]:
    """Returns the names of the side files that a directory contains."""
    found = (path for pattern in _NAMES for path in sorted(source.glob(pattern)) if path.is_file())
    return [path.relative_to(source).as_posix() for path in found]


def copy_side_files(source: Path, target: Path) -> None:
    """Copies the side files of a directory to another one."""
    for name in side_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def special_ids(source: Path) -> dict[str, int | None]:
    """Returns the ids of special tokens for a ``config.json``, from a ``tokenizer.json``; empty if there is none.

    Without these keys, stock clients use the ids of Llama's first tokenizer, and do not stop at the end of a text.

    Raises:
        ValueError: if the file is not a tokenizer, or names no ``eos_token``.
    """
    if not (source / TOKENIZER).is_file():
        return {}
    from ...data.tokenizers.hugging_face import HuggingFaceTokenizer

    tokenizer, ids = HuggingFaceTokenizer(source), {}
    for name in ("bos_token", "eos_token", "pad_token"):
        found = tokenizer.tokenize(tokenizer.special_tokens.get(name, ""))
        ids[f"{name}_id"] = found[0] if len(found) == 1 else None
    return ids

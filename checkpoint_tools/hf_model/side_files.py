# SPDX-License-Identifier: Apache-2.0
"""The small files of a model directory that say nothing about its weights: tokenizer, chat template, generation."""

import shutil
from pathlib import Path

TOKENIZER = "tokenizer.json"
_NAMES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt chat_template.jinja chat_template.json generation_config.json tokenization_*.py "
    "additional_chat_templates/*"
).split()


def side_files(source: Path) -> list[str]:
    """The names of whichever of these files a directory has."""
    found = (path for pattern in _NAMES for path in sorted(source.glob(pattern)) if path.is_file())
    return [path.relative_to(source).as_posix() for path in found]


def copy_side_files(source: Path, target: Path) -> None:
    """Copies these files."""
    for name in side_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def special_ids(source: Path) -> dict[str, int | None]:
    """What a ``config.json`` says of a directory's ``tokenizer.json``; empty where there is none.

    Where it says nothing, stock clients take the ids of Llama's first tokenizer, and do not stop where texts end.

    Raises:
        ValueError: it is no tokenizer, or names no ``eos_token``.
    """
    if not (source / TOKENIZER).is_file():
        return {}
    from ...data.tokenizers.hugging_face import HuggingFaceTokenizer

    tokenizer, ids = HuggingFaceTokenizer(source), {}
    for name in ("bos_token", "eos_token", "pad_token"):
        found = tokenizer.tokenize(tokenizer.special_tokens.get(name, ""))
        ids[f"{name}_id"] = found[0] if len(found) == 1 else None
    return ids

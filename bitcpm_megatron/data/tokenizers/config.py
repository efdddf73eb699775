# SPDX-License-Identifier: Apache-2.0
"""The configuration files beside a ``tokenizer.json``, checked against the types that Transformers writes."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...files import read_json, validated

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def content_of(token: Any) -> Any:
    """Returns the text of a special token, which is stored either as text or as a mapping with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Returns the text of the special tokens that have names of their own, such as ``eos_token``, by name."""
    named = {name: content_of(token) for name, token in config.items() if name.endswith("_token")}
    return {name: content for name, content in named.items() if isinstance(content, str)}


def _listed(tokens: Any) -> Any:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens


def _by_name(template: Any) -> Any:
    return [{"name": "default", "template": template}] if isinstance(template, str) else template


_Named = Annotated[str, BeforeValidator(content_of)]
_Listed = Annotated[list[_Named] | None, BeforeValidator(_listed)]


class _Lenient(BaseModel):
    model_config = ConfigDict(strict=True)


class _Added(_Lenient):
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class _Template(_Lenient):
    name: str
    template: str


class _Config(_Lenient):
    """The model of both files, with the keys that are read here and those that change the ids; others are ignored."""

    bos_token: _Named | None = None
    eos_token: _Named | None = None
    unk_token: _Named | None = None
    sep_token: _Named | None = None
    pad_token: _Named | None = None
    cls_token: _Named | None = None
    mask_token: _Named | None = None
    additional_special_tokens: _Listed = None
    extra_special_tokens: _Listed = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern="^[0-9]+$")], _Added] | None = None
    chat_template: Annotated[list[_Template] | None, BeforeValidator(_by_name)] = None
    tokenizer_class: str | None = None
    add_prefix_space: bool | None = None
    split_special_tokens: bool | None = None


def all_special_tokens(config: dict[str, Any]) -> list[str]:
    """Returns all tokens that Transformers makes special, including those without names of their own."""
    lists = [_listed(config.get(name)) or [] for name in ("additional_special_tokens", "extra_special_tokens")]
    return [*special_tokens(config).values(), *(content_of(token) for tokens in lists for token in tokens)]


def read_config(directory: Path) -> dict[str, Any]:
    """Reads ``special_tokens_map.json`` and ``tokenizer_config.json`` of a directory; the second overrides the first.

    Raises:
        FileError: if a file is damaged, or a value has another type than Transformers writes.
    """
    found: dict[str, Any] = {}
    for name in (SPECIAL, CONFIG):
        path = directory / name
        if path.is_file():
            content = read_json(path)
            validated(_Config, content, str(path))
            found |= content
    return found

# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's fast tokenizers: a directory with a ``tokenizer.json``, by the library ``tokenizers``."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, processors

from ...files import parse_json
from .common import identifiers, outside_of_vocabulary, require_utf8

FILE, CONFIG, _SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# The library looks at it whenever it encodes.
_PARALLEL = "TOKENIZERS_PARALLELISM"
# What an added token says of itself.
_HOW = ("single_word", "lstrip", "rstrip", "normalized", "special")


class HuggingFaceTokenizer:
    """A fast tokenizer as Transformers would use it, with the same ids.

    Documents end with the tokenizer's ``eos_token``, as in Megatron-LM's ``HuggingFaceTokenizer``; nothing is put in
    front. Special tokens that are written out in a text are special: chat templates write them so.

    Args:
        path: the directory, or the ``tokenizer.json`` in it.

    Attributes:
        directory: where its files are.
        config: what ``tokenizer_config.json`` and ``special_tokens_map.json`` hold, empty without them.
        vocab_size: one more than the largest id, added tokens included.
        eod: id of ``eos_token``, the same as ``eos``.
        pad: id of ``pad_token``, -1 without one.
        unique_identifiers: the content of ``tokenizer.json`` and the special tokens.

    Raises:
        ValueError: a file is missing or damaged, or there is no ``eos_token``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        directory = self.directory = given.parent if given.name == FILE else given
        content = _read(directory / FILE)
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{directory / FILE}: not a tokenizer of the library tokenizers: {error}") from None
        # What a file may ask for is for batches of tensors.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # It adds the special tokens, which we never ask for, and may cut spaces off the offsets of tokens.
        self._tokenizer.post_processor = processors.Sequence([])
        self.config = _read_config(directory)
        self._add_tokens()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        eos = self._special("eos_token")
        if eos is None:
            raise ValueError(
                f"{directory}: no eos_token to end documents with: name one in {CONFIG}, as the model's authors do"
            )
        self.eod = self.eos = eos
        self.pad = -1 if (pad := self._special("pad_token")) is None else pad
        ends = {"eod": str(self.eod), "pad": str(self.pad), "added": str(self._added())}
        self.unique_identifiers = identifiers(self, sha256=hashlib.sha256(content).hexdigest(), **ends)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`, without ``eod``.

        Raises:
            ValueError: see :meth:`tokenize_batch`.
        """
        return self.tokenize_batch([text])[0]

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text, in order, computed by one native thread, or by all cores for more.

        Raises:
            ValueError: a text holds lone surrogates, which have no UTF-8 form.
        """
        return [found.ids for found in self._encode(texts, threads)]

    def tokenize_with_offsets(
        self, texts: Sequence[str], threads: int = 1
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the ids of :meth:`tokenize_batch`, and for each the (start, end) of its characters in the text.

        Tokens that are parts of one character all have that character.

        Raises:
            ValueError: see :meth:`tokenize_batch`.
        """
        return [(found.ids, found.offsets) for found in self._encode(texts, threads)]

    @property
    def added_tokens(self) -> list[str]:
        """What is one token wherever it is written: special tokens, and what else was added to the vocabulary."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that the files name, such as ``bos_token`` and ``eos_token``, as they are written."""
        named = {name: self._content(name) for name in self.config if name.endswith("_token")}
        return {name: content for name, content in named.items() if isinstance(content, str)}

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` (a list, an array or a 1-D tensor); special tokens vanish.

        Raises:
            ValueError: an id is outside of the vocabulary.
        """
        values = [int(token) for token in ids]
        outside_of_vocabulary(values, self.vocab_size)
        return self._tokenizer.decode(values, skip_special_tokens=True)

    def _added(self) -> dict[int, dict[str, Any]]:
        """Tokens that stand in the configuration alone, as Transformers writes them, by id."""
        listed = self.config.get("added_tokens_decoder")
        return {int(number): dict(token) for number, token in (listed or {}).items()}

    def _add_tokens(self) -> None:
        for _, token in sorted(self._added().items()):
            if self._tokenizer.token_to_id(token["content"]) is None:
                how = {key: token[key] for key in _HOW if key in token}
                self._tokenizer.add_tokens([AddedToken(token["content"], **how)])

    def _encode(self, texts: Sequence[str], threads: int) -> list[Encoding]:
        for text in texts:
            require_utf8(text)
        os.environ[_PARALLEL] = "true" if threads > 1 else "false"
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def _content(self, name: str) -> Any:
        token = self.config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _special(self, name: str) -> int | None:
        content = self._content(name)
        return None if content is None else self._tokenizer.token_to_id(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; give the directory of a fast tokenizer (AutoTokenizer ... save_pretrained "
            "writes one), on this machine: nothing is downloaded"
        ) from None


def _read_config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (_SPECIAL, CONFIG):
        path = directory / name
        if path.is_file():
            content = parse_json(path.read_text(encoding="utf-8"), str(path))
            if not isinstance(content, dict):
                raise ValueError(f"{path}: not a JSON object")
            found |= content
    return found

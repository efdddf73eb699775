# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's fast tokenizers: a directory with a ``tokenizer.json``, read by the library ``tokenizers``."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, processors

from .common import identifiers, outside_of_vocabulary, require_utf8
from .config import CONFIG, SPECIAL, all_special_tokens, content_of, read_config, special_tokens

FILE = "tokenizer.json"
# The library reads this variable whenever it encodes.
_PARALLEL = "TOKENIZERS_PARALLELISM"
_SAVED = "write both files with save_pretrained of the tokenizer that the model was trained with"
# Classes of Transformers that use tokenizer.json unchanged; the others rebuild the tokenizer from its vocabulary.
_GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
# The properties with which an added token is declared.
_HOW = ("single_word", "lstrip", "rstrip", "normalized", "special")


class HuggingFaceTokenizer:
    """A fast tokenizer with the same ids as in Transformers.

    Documents end with the tokenizer's ``eos_token``, as in Megatron-LM's ``HuggingFaceTokenizer``; only
    :meth:`tokenize_with_front` puts anything in front of a text. Special tokens that are written out in a text are
    special, because chat templates write them that way.

    Args:
        path: the directory, or the ``tokenizer.json`` in it.

    Attributes:
        directory: the directory of the tokenizer's files.
        config: the content of ``tokenizer_config.json`` and ``special_tokens_map.json``, empty without them.
        vocab_size: one more than the largest id, added tokens included.
        eod: the id of ``eos_token``, the same as ``eos``.
        pad: the id of ``pad_token``, -1 without one.
        unique_identifiers: what megatron-core hashes into the name of its index cache: the digest of
            ``tokenizer.json``, ``eod``, ``pad`` and the tokens that the configuration adds.

    Raises:
        ValueError: if a file is missing or damaged, there is no ``eos_token``, or the configuration asks for other ids
            than ``tokenizer.json`` gives; the message begins with the path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        directory = self.directory = given.parent if given.name == FILE else given
        content = _read(directory / FILE)
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{directory / FILE}: not a tokenizer of the library tokenizers: {error}") from None
        # A file may request padding and truncation, which are for batches of tensors.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # The post-processor adds special tokens, which training never wants, and may cut spaces off token offsets.
        self._post_processor = self._tokenizer.post_processor
        self._tokenizer.post_processor = processors.Sequence([])
        self.config = read_config(directory)
        self._add_tokens()
        self._require_ids_of_transformers()
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
        """Returns the ids of `text`, without ``eod``.

        Raises:
            ValueError: if the text cannot be encoded, as for :meth:`tokenize_batch`.
        """
        return self.tokenize_batch([text])[0]

    def tokenize_with_front(self, text: str) -> list[int]:
        """Returns the ids of `text` after those that the post-processor of ``tokenizer.json`` puts in front of a text.

        These are the ids that Transformers gives by default, except for those that the post-processor appends.

        Raises:
            ValueError: if the text cannot be encoded, as for :meth:`tokenize_batch`.
        """
        [found] = self._encode([text], 1)
        if self._post_processor is None:
            return found.ids
        whole = self._post_processor.process(found)
        # Tokens that belong to no sequence were added by the post-processor.
        front = itertools.takewhile(lambda pair: pair[1] is None, zip(whole.ids, whole.sequence_ids, strict=True))
        return [token for token, _ in front] + found.ids

    def tokenize_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Returns the ids of each text, in order; computed by one native thread if `threads` is 1, else by all cores.

        Raises:
            ValueError: if a text has lone surrogates, which have no UTF-8 form, or the vocabulary cannot express it.
        """
        return [found.ids for found in self._encode(texts, threads)]

    def tokenize_with_offsets(
        self, texts: Sequence[str], threads: int = 1
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns the ids of :meth:`tokenize_batch`, and for each id the (start, end) of its characters in the text.

        If several tokens are parts of one character, each of them has the span of that character.

        Raises:
            ValueError: if a text cannot be encoded, as for :meth:`tokenize_batch`.
        """
        return [(found.ids, found.offsets) for found in self._encode(texts, threads)]

    @property
    def added_tokens(self) -> list[str]:
        """The texts that are one token wherever they occur: special tokens, and others added to the vocabulary."""
        return [token.content for token in self.added.values()]

    @property
    def added(self) -> dict[int, AddedToken]:
        """The added tokens by id: those of ``tokenizer.json``, and those that the configuration beside it adds."""
        return dict(self._tokenizer.get_added_tokens_decoder())

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the special tokens that the files name, such as ``bos_token`` and ``eos_token``, by name."""
        return special_tokens(self.config)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` (a list, an array or a 1-D tensor); special tokens are left out.

        Raises:
            ValueError: if an id is outside of the vocabulary.
        """
        values = [int(token) for token in ids]
        outside_of_vocabulary(values, self.vocab_size)
        return self._tokenizer.decode(values, skip_special_tokens=True)

    def _added(self) -> dict[int, dict[str, Any]]:
        """Returns the added tokens that the configuration lists, in the form that Transformers writes, by id."""
        listed = self.config.get("added_tokens_decoder")
        return {int(number): dict(token) for number, token in (listed or {}).items()}

    def _add_tokens(self) -> None:
        for _, token in sorted(self._added().items()):
            if self._tokenizer.token_to_id(token["content"]) is None:
                how = {key: token[key] for key in _HOW if key in token}
                self._tokenizer.add_tokens([AddedToken(token["content"], **how)])

    def _require_ids_of_transformers(self) -> None:
        """Refuses settings that Transformers would apply and ``tokenizer.json`` does not contain."""
        added, where = set(self.added_tokens), self.directory / CONFIG
        if absent := [token for token in all_special_tokens(self.config) if token and token not in added]:
            raise ValueError(
                f"{self.directory / FILE}: no added token {absent[0]!r}, which is special by {CONFIG} or {SPECIAL}, so "
                f"that Transformers would add it: {_SAVED}"
            )
        if self.config.get("split_special_tokens"):
            raise ValueError(f"{where}: with split_special_tokens no text could hold an end-of-turn: set it to false")
        wanted = self.config.get("add_prefix_space")
        if wanted is not None and self.config.get("tokenizer_class") not in _GENERIC and wanted != self._adds_space():
            raise ValueError(f"{where}: add_prefix_space is {wanted}, {FILE} does the opposite: {_SAVED}")

    def _adds_space(self) -> bool:
        """Returns whether the tokenizer puts something, such as a space, in front of a text."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = "a" if normalizer is None else normalizer.normalize_str("a")
        parts = [(text, None)] if splitter is None else splitter.pre_tokenize_str(text)
        return not "".join(part for part, _ in parts).startswith("a")

    def _encode(self, texts: Sequence[str], threads: int) -> list[Encoding]:
        for text in texts:
            require_utf8(text)
        os.environ[_PARALLEL] = "true" if threads > 1 else "false"
        try:
            return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{self.directory / FILE} cannot write this text as tokens: {error}") from None

    def _special(self, name: str) -> int | None:
        content = content_of(self.config.get(name))
        return None if content is None else self._tokenizer.token_to_id(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; give the directory of a fast tokenizer (AutoTokenizer ... save_pretrained "
            "writes one), on this machine: nothing is downloaded"
        ) from None

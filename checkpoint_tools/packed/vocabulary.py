# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as metadata of a GGUF file: SentencePiece's BPE, or the byte-level BPE of a ``tokenizer.json``.

llama.cpp splits and merges texts with its own code, so a tokenizer for which it would return other ids is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...data.sft.chat_template import FILE as CHAT_TEMPLATE
from ...data.tokenizers.config import read_config as read_tokenizer_config
from ...data.tokenizers.hugging_face import FILE as TOKENIZER_JSON
from ...data.tokenizers.hugging_face import HuggingFaceTokenizer
from ...files import read_json, read_text
from ..storage.reader import ConversionError
from .known_vocabularies import KNOWN, TEXT
from .source import Source

SENTENCE_PIECE = "tokenizer.model"
# Values of llama.cpp's llama_token_type, which are the same as SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
_SPACE = "\u2581"
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
# Settings of a tokenizer equal to GPT-2's: ByteLevel's own regex is GPT-2's, and any other setting changes the ids.
_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PLAIN_BPE = {
    **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"), (None, "")),
    **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), (None, False)),
}


@dataclass
class Vocabulary:
    """Vocabulary of a GGUF file: the tokens, and how texts are split into them.

    Attributes:
        model: the algorithm: ``llama`` for SentencePiece's BPE, ``gpt2`` for byte-level BPE.
        pre: llama.cpp's name for the way in which a text is split before tokens are merged.
        tokens: the tokens, by id.
        types: llama.cpp's type of each token.
        scores: the score of each token of a SentencePiece model; empty for byte-level BPE.
        merges: the merges of byte-level BPE; empty for a SentencePiece model.
        flags: other metadata, by the part of their names that follows ``tokenizer.ggml.``.
        templates: the chat templates, by name.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    flags: dict[str, int | bool] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)

    def write(self, writer: Any) -> None:
        """Adds the vocabulary to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, value in self.flags.items():
            add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
            add(f"tokenizer.ggml.{name}", value)
        if others := sorted(set(self.templates) - {"default"}):
            # The writer's own method is not used, because the order of its list changes from run to run.
            writer.add_array("tokenizer.chat_templates", others)
        for name, template in sorted(self.templates.items()):
            writer.add_string("tokenizer.chat_template" + ("" if name == "default" else f".{name}"), template)


def open_vocabulary(source: Source) -> Vocabulary:
    """Returns the vocabulary of a model's tokenizer, with a token for every row of the model's embedding.

    Raises:
        ConversionError: if there is no tokenizer, it belongs to another model, or llama.cpp would tokenize differently.
    """
    directory, rows = source.files, source.architecture.vocab_size
    has = [name for name in (TOKENIZER_JSON, SENTENCE_PIECE) if directory is not None and (directory / name).is_file()]
    if directory is None or not has:
        where = "" if directory is None else f" in {directory}"
        raise ConversionError(
            f"there is no {TOKENIZER_JSON} and no {SENTENCE_PIECE}{where}, and a GGUF file holds its tokenizer: give "
            "--tokenizer DIR"
        )
    tokenizer, content = None, None
    if TOKENIZER_JSON in has:
        # The tokenizer's own library validates the file before its content is used.
        tokenizer, content = HuggingFaceTokenizer(directory), read_json(directory / TOKENIZER_JSON)
    config = read_tokenizer_config(directory)
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise ConversionError(
            f"{directory} has ids up to {tokenizer.vocab_size - 1}, and the model {rows} rows: it is another model's"
        )
    made = (_sentence_piece if SENTENCE_PIECE in has else _byte_level)(directory, rows, content, _added(tokenizer))
    made.flags |= _special(directory, config, tokenizer, made.tokens, source.config)
    made.templates = _templates(directory, config)
    return made


def _added(tokenizer: HuggingFaceTokenizer | None) -> dict[int, tuple[str, bool]]:
    """Returns the added tokens by id: the content of each, and whether it is special.

    Raises:
        ConversionError: if llama.cpp would find one of them at other places of a text.
    """
    if tokenizer is None:
        return {}
    for number, token in tokenizer.added.items():
        if token.lstrip or token.rstrip or token.single_word:
            raise ConversionError(
                f"{tokenizer.directory}: the added token {token.content!r} ({number}) takes spaces with it or stands "
                "for whole words alone (lstrip, rstrip, single_word), which a GGUF file cannot say"
            )
    return {number: (token.content, token.special) for number, token in tokenizer.added.items()}


def _sentence_piece(
    directory: Path, rows: int, content: Mapping[str, Any] | None, added: Mapping[int, tuple[str, bool]]
) -> Vocabulary:
    path = directory / SENTENCE_PIECE
    model = _parsed(path)
    kind, normalizer = model.trainer_spec, model.normalizer_spec
    wrong = {
        "is no BPE model, which llama.cpp's SentencePiece tokenizer is": kind.model_type != kind.BPE,
        "has no bytes to spell what it lacks with": not kind.byte_fallback,
        "changes texts before it cuts them (a normalization rule)": bool(normalizer.precompiled_charsmap),
        "removes spaces": normalizer.remove_extra_whitespaces,
        "writes spaces as they are": not normalizer.escape_whitespaces,
        "puts spaces behind words": kind.treat_whitespace_as_suffix,
    }
    if mistakes := [words for words, applies in wrong.items() if applies]:
        raise ConversionError(f"{path} {mistakes[0]}: llama.cpp would make other ids of a text, so that it is refused")
    if len(model.pieces) > rows:
        raise ConversionError(f"{path} has {len(model.pieces)} pieces, the model {rows} rows: it is another model's")
    tokens, types, scores = _filled(rows)
    for number, piece in enumerate(model.pieces):
        tokens[number], types[number], scores[number] = piece.piece, piece.type, piece.score
    space = bool(normalizer.add_dummy_prefix)
    if content is not None:
        vocab = content["model"]["vocab"]
        if not isinstance(vocab, dict):
            raise ConversionError(f"{directory / TOKENIZER_JSON} is no BPE tokenizer as {SENTENCE_PIECE} is")
        different = [token for token, number in vocab.items() if number < rows and tokens[number] != token]
        different = [token for token in different if vocab[token] not in added]
        if different:
            raise ConversionError(
                f"{directory}: {different[0]!r} has the id {vocab[different[0]]} in {TOKENIZER_JSON}, and "
                f"{SENTENCE_PIECE} another piece there: the two are not of one model"
            )
        for number, (token, is_special) in added.items():
            tokens[number] = token
            if types[number] not in (UNKNOWN, CONTROL):
                scores[number] = _ADDED_SCORE
                types[number] = CONTROL if is_special else USER_DEFINED
            if types[number] == USER_DEFINED:
                tokens[number] = tokens[number].replace(_SPACE, " ")
        space = _adds_space(content)
    return Vocabulary("llama", "default", tokens, types, scores, flags={"add_space_prefix": space})


def _parsed(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ConversionError(f"{path} needs the package protobuf: pip install 'bitcpm_megatron[export]'") from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's error class, which its versions define in different places
        raise ConversionError(f"{path}: not a SentencePiece model: {error}") from None
    if not model.pieces:
        raise ConversionError(f"{path}: not a SentencePiece model: it has no pieces")
    return model


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Returns whether a ``tokenizer.json`` of Llama's kind adds a space at the beginning of a text."""
    text = json.dumps({name: content.get(name) for name in ("normalizer", "pre_tokenizer")})
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _byte_level(
    directory: Path, rows: int, content: Mapping[str, Any] | None, added: Mapping[int, tuple[str, bool]]
) -> Vocabulary:
    assert content is not None
    path, model = directory / TOKENIZER_JSON, content.get("model") or {}
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(content.get("pre_tokenizer")):
        raise ConversionError(
            f"{path} is no byte-level BPE tokenizer; of other kinds llama.cpp reads SentencePiece's {SENTENCE_PIECE}, "
            "which is not there"
        )
    tokens, types, _ = _filled(rows)
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for number, (token, is_special) in added.items():
        tokens[number], types[number] = token, CONTROL if is_special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", _pre(path, content), tokens, types, merges=merges)


def _pre(path: Path, content: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the way in which a tokenizer splits texts before it merges.

    It is found by the hash of the ids of llama.cpp's test text, or recognized as GPT-2's by the tokenizer's settings.

    Raises:
        ConversionError: if llama.cpp has no name for it.
    """
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(json.dumps(content)).encode(TEXT).ids
    known = KNOWN.get(sha256(str(ids).encode()).hexdigest())
    if known is not None:
        return known
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    plain = all(model.get(name) in values for name, values in _PLAIN_BPE.items())
    plain = plain and all(splitter.get(name, True) == value for name, value in _GPT_2.items())
    if plain and content.get("normalizer") is None:
        return "gpt-2"
    raise ConversionError(
        f"{path}: llama.cpp has no name for how this vocabulary cuts texts (its hash is unknown, and it is not GPT-2's "
        "plain ByteLevel), and would cut them differently. --format compressed-tensors keeps the tokenizer's own files"
    )


def _filled(rows: int) -> tuple[list[str], list[int], list[float]]:
    """Returns tokens, types and scores of unused tokens for every row, as defaults."""
    return [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows, [_UNUSED_SCORE] * rows


def _special(
    directory: Path,
    config: Mapping[str, Any],
    tokenizer: HuggingFaceTokenizer | None,
    tokens: Sequence[str],
    of_model: Mapping[str, Any],
) -> dict[str, int | bool]:
    """Returns the ids of special tokens, and whether they are added to a text, as flags of a :class:`Vocabulary`.

    Raises:
        ConversionError: if no end token is known, more than three are, or an id exceeds the model's rows.
    """
    found: dict[str, int | bool] = {}
    named = {} if tokenizer is None else tokenizer.special_tokens
    ends = of_model.get("eos_token_id")
    all_ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    for name, key in _IDS.items():
        content, number = named.get(f"{name}_token"), of_model.get(f"{name}_token_id")
        if content is not None:
            found[key] = tokens.index(content)
        elif name == "eos" and all_ends:
            found[key] = all_ends[0]
        elif isinstance(number, int):
            found[key] = number
    if tokenizer is None:
        found = {**_of_sentence_piece(directory), **found}
    others = [end for end in all_ends if end != found.get("eos_token_id")]
    if len(others) > 2:
        raise ConversionError(f"{len(all_ends)} ids end a text, {all_ends}: a GGUF file names three at most")
    found |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    wrong = [name for name, number in found.items() if not 0 <= number < len(tokens)]
    if wrong:
        raise ConversionError(f"{wrong[0]} {found[wrong[0]]}: the model has {len(tokens)} rows")
    if "eos_token_id" not in found:
        raise ConversionError(f"{directory} does not say which token ends a text: name an eos_token in its files")
    for name in ("bos", "eos"):
        found[f"add_{name}_token"] = _adds(directory, config, tokenizer, name, found.get(f"{name}_token_id"))
    return found


def _of_sentence_piece(directory: Path) -> dict[str, int | bool]:
    spec = _parsed(directory / SENTENCE_PIECE).trainer_spec
    ids = {key: getattr(spec, f"{name}_id") for name, key in _IDS.items()}
    return {key: number for key, number in ids.items() if number >= 0}


def _adds(
    directory: Path, config: Mapping[str, Any], tokenizer: HuggingFaceTokenizer | None, name: str, number: int | None
) -> bool:
    """Returns whether Transformers adds a special token, "bos" or "eos", at the beginning or end of a text."""
    said = config.get(f"add_{name}_token")
    if isinstance(said, bool):
        return said
    if tokenizer is None or number is None:
        # By default nothing is added, as in training; only Transformers' Llama class adds a bos token.
        return name == "bos" and str(config.get("tokenizer_class", "")).startswith("Llama")
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(directory / TOKENIZER_JSON)).encode("a").ids
    return bool(ids) and ids[0 if name == "bos" else -1] == number


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    beside = directory / CHAT_TEMPLATE
    if beside.is_file():
        return {"default": read_text(beside)}
    source = config.get("chat_template")
    if source is None:
        return {}
    return {"default": source} if isinstance(source, str) else {one["name"]: one["template"] for one in source}

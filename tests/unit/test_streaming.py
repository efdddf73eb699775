# SPDX-License-Identifier: Apache-2.0
"""Tests of streaming text token by token: completely, and never with half a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat import chat_tokenizer

from bitcpm_megatron.data.tokenizers import SentencePieceTokenizer, Tokenizer, open_tokenizer, train_sentencepiece
from bitcpm_megatron.inference.streaming import TextStream

TEXTS = ["Hi there! What is the answer? There is none.", "déjà vu, 你好, naïve 🙂 fox"]
# Characters of one to four bytes, and characters that join others.
CHARACTERS = st.sampled_from("ab é你🙂\u200d\u0301\n\ufffd")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Makes tokenizers of both libraries, with pieces of single bytes and of whole words."""
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "t.model").write_bytes(train_sentencepiece(TEXTS * 50, 320))
    return {
        "bytes": open_tokenizer(chat_tokenizer(root / "bytes")),
        "words": open_tokenizer(chat_tokenizer(root / "words", vocab_size=330)),
        "sentencepiece": SentencePieceTokenizer(root / "t.model"),
    }


def parts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*map(stream.put, ids), stream.end()]


@pytest.mark.parametrize("kind", ["bytes", "words", "sentencepiece"])
@given(text=st.text(CHARACTERS, max_size=20))
def test_the_parts_are_the_text(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    ids = tokenizers[kind].tokenize(text)
    assert "".join(parts(tokenizers[kind], ids)) == tokenizers[kind].detokenize(ids) == text
    for end in range(len(ids)):
        said = "".join(parts(tokenizers[kind], ids[:end])[:-1])
        assert text.startswith(said), "nothing is said that another token changes"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_character_is_held_back_until_it_is_whole(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    before, emoji = (tokenizers[kind].tokenize(text) for text in ("a", "🦊"))
    assert len(emoji) == 4, "in bytes, for neither has seen one"
    assert parts(tokenizers[kind], before + emoji) == ["a", "", "", "", "🦊", ""]
    *said, end = parts(tokenizers[kind], before + emoji[:2])
    assert said == ["a", "", ""]
    assert set(end) == {"\ufffd"}


def test_special_tokens_are_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    words = tokenizers["words"]
    ids = [*words.tokenize("Hi"), words.eod, *words.tokenize(" there"), words.eod]
    assert "".join(parts(words, ids)) == words.detokenize(ids) == "Hi there"


def test_a_stream_that_ended_starts_anew(tokenizers: dict[str, Tokenizer]) -> None:
    stream = TextStream(tokenizers["bytes"])
    (first, *_) = tokenizers["bytes"].tokenize("🦊")
    assert stream.put(first) == "" and stream.end() == "\ufffd"
    assert [stream.put(token) for token in tokenizers["bytes"].tokenize("ab")] == ["a", "b"]

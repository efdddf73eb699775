# SPDX-License-Identifier: Apache-2.0
"""Tests of the SentencePiece and null tokenizers, the training of a model, and the padded vocabulary."""

import argparse
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from bitcpm_megatron.data.tokenizers import NullTokenizer, SentencePieceTokenizer, train_sentencepiece
from bitcpm_megatron.data.vocabulary import padded_vocab_size

TEXTS = [
    f"Section {n}.\n\n    The weights of layer {n} take the values -1, 0 and 1.  Done in 2024.\n" for n in range(200)
]
VOCAB = 340
UNKNOWN, BEGIN = 0, 1


def trained(texts: list[str], vocab_size: int) -> SentencePieceTokenizer:
    return SentencePieceTokenizer("a.model", train_sentencepiece(texts, vocab_size))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(TEXTS, VOCAB))
    return path


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model_path)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@example("")
@example("  two  leading, trailing \t\n\r\n\n ")
@example("\x00 \ufeff \u2047 \U0001f600 三值 </s><s><unk><0x0A>")
def test_every_text_survives_the_round_trip(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert not {UNKNOWN, BEGIN, tokenizer.eod} & set(ids), "text must not produce special or unknown pieces"


def test_the_trained_vocabulary_compresses(tokenizer: SentencePieceTokenizer) -> None:
    """Words of the corpus must have become pieces; byte fallback alone would also pass the round trip."""
    assert tokenizer.vocab_size == VOCAB
    assert len(tokenizer.tokenize("The weights of layer")) <= 5


def test_numbers_stay_single_digits(tokenizer: SentencePieceTokenizer) -> None:
    assert len(tokenizer.tokenize("2024")) == 4, "though the corpus repeats it"


def test_pieces_can_be_written_one_by_one(tokenizer: SentencePieceTokenizer) -> None:
    """Generation prints pieces as they come; with a dummy prefix, the first space of each part would be lost."""
    assert "".join(tokenizer.detokenize([token]) for token in tokenizer.tokenize(TEXTS[0])) == TEXTS[0]


def test_special_pieces_vanish_in_text(tokenizer: SentencePieceTokenizer) -> None:
    ids = [BEGIN, *tokenizer.tokenize("weights"), tokenizer.eod]
    assert tokenizer.detokenize(ids) == "weights"
    assert (tokenizer.eod, tokenizer.eos, tokenizer.pad) == (2, 2, -1)


def test_a_batch_equals_single_calls_for_any_number_of_threads(tokenizer: SentencePieceTokenizer) -> None:
    expected = [tokenizer.tokenize(text) for text in TEXTS]
    assert tokenizer.tokenize_batch(TEXTS, threads=2) == expected
    assert tokenizer.tokenize_batch(TEXTS) == expected
    assert tokenizer.tokenize_batch([]) == []


def test_ids_outside_of_the_vocabulary_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    for outside in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=f"token id {outside} is outside"):
            tokenizer.detokenize([5, outside])


def test_lone_surrogates_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate at character 2"):
        tokenizer.tokenize("ab\ud800")


def test_a_tokenizer_travels_to_data_loader_processes(tokenizer: SentencePieceTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.tokenize(TEXTS[3]) == tokenizer.tokenize(TEXTS[3])
    assert copy.unique_identifiers == tokenizer.unique_identifiers


def test_identity_is_the_content_of_the_model(
    tokenizer: SentencePieceTokenizer, model_path: Path, tmp_path: Path
) -> None:
    """megatron-core caches sample indices by this identity: a moved model keeps them, a retrained one must not."""
    moved = tmp_path / "moved.model"
    moved.write_bytes(model_path.read_bytes())
    assert SentencePieceTokenizer(moved).unique_identifiers == tokenizer.unique_identifiers
    moved.write_bytes(train_sentencepiece(TEXTS, VOCAB - 10))
    assert SentencePieceTokenizer(moved).unique_identifiers != tokenizer.unique_identifiers


def test_training_is_deterministic_also_when_it_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampled lines must not depend on a global seed that a caller may have changed."""
    monkeypatch.setattr("bitcpm_megatron.data.tokenizers.sentence_piece._MAX_LINES", 101)
    generator = random.Random(0)
    texts = [" ".join(generator.choices("abcdefgh", k=30)).replace(" ", "", 20) for _ in range(1000)]
    models = []
    for seed in (1, 2):
        sentencepiece.set_random_generator_seed(seed)
        models.append(train_sentencepiece(texts, VOCAB))
    assert models[0] == models[1]


def test_long_lines_are_used_not_dropped() -> None:
    """The trainer silently skips sentences above a length limit; the end of such a line must still be used."""
    text = "- " * 5000 + "".join(f"layer{chr(97 + n % 26)} " for n in range(5000))
    tokenizer = trained([text], 300)
    assert len(tokenizer.tokenize("layera")) <= 3


def test_a_small_corpus_is_an_error_whose_cure_works() -> None:
    with pytest.raises(ValueError, match=r"too small for a vocabulary of 9999 pieces.*--vocab-size (\d+)") as caught:
        train_sentencepiece(TEXTS, 9999)
    supported = int(str(caught.value).split("--vocab-size ")[1].split(")")[0])
    assert trained(TEXTS, supported).vocab_size == supported


def test_a_vocabulary_below_the_bytes_is_an_error_whose_cure_works() -> None:
    with pytest.raises(ValueError, match=r"give at least (\d+)") as caught:
        train_sentencepiece(TEXTS, 100)
    needed = int(str(caught.value).split("at least ")[1].split(" ")[0])
    assert trained(TEXTS, needed).vocab_size == needed


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], VOCAB, "no text"),
        (["\n"], VOCAB, "no text"),
        (TEXTS, 0, "from 1 to 1000000"),
        (TEXTS, 1, "cannot hold 256 bytes.*give more than 259"),
        (TEXTS, 3, "cannot hold 256 bytes"),
        (TEXTS, 2 * 10**9, "from 1 to 1000000"),
    ],
)
def test_training_refuses(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(texts, vocab_size)


def test_an_error_of_the_reader_comes_through() -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS
        raise ValueError("corpus.jsonl:7: not valid JSON")

    with pytest.raises(ValueError, match="^corpus.jsonl:7: not valid JSON$"):
        train_sentencepiece(texts(), VOCAB)


@pytest.mark.slow
def test_a_request_to_stop_does_not_wait_for_the_end_of_training() -> None:
    words = random.Random(0)
    texts = [" ".join("".join(words.choices("abcdefghij", k=8)) for _ in range(100)) for _ in range(2000)]
    script = f"""
import signal, threading
from bitcpm_megatron.data.tokenizers import train_sentencepiece
def request(number, frame): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, request)
def texts():
    yield from {texts!r}
    signal.setitimer(signal.ITIMER_REAL, 0.1)  # all are read: what follows is native code
try:
    train_sentencepiece(texts(), 20000)
except KeyboardInterrupt:
    print("training goes on" if threading.active_count() > 1 else "training is over")
"""
    result = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=True)
    assert result.stdout == "training goes on\n"


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such tokenizer model"):
        SentencePieceTokenizer(tmp_path / "absent.model")
    for content in (b"", b"plain text"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match="bad.model: not a SentencePiece model"):
            SentencePieceTokenizer(tmp_path / "bad.model")


def test_a_model_without_an_end_piece_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "bare.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=writer, vocab_size=60, eos_id=-1, minloglevel=2
        )
    with pytest.raises(ValueError, match="no end-of-sentence piece"):
        SentencePieceTokenizer(tmp_path / "bare.model")


def test_null_tokenizer_counts_like_megatron_lm() -> None:
    tokenizer = NullTokenizer(127)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.eos, tokenizer.pad) == (128, 127, 127, -1)
    assert tokenizer.tokenize("3 127 0") == [3, 127, 0]
    assert tokenizer.detokenize([3, 127, 0]) == "3 127 0"
    assert tokenizer.unique_identifiers != NullTokenizer(128).unique_identifiers


def test_null_tokenizer_refuses_words_and_ids_outside() -> None:
    for text in ("3 four", "3 128", "-1"):
        with pytest.raises(ValueError, match="is no id below 128"):
            NullTokenizer(127).tokenize(text)
    with pytest.raises(ValueError, match="--vocab-size"):
        NullTokenizer(0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((73448,), 73472),
        ((73472,), 73472),
        ((1, 128, 8), 1024),
        ((1025, 128, 8), 2048),
        ((320, 1, 1), 320),
        ((320, 64, 2), 384),
    ],
)
def test_padded_vocab_size(arguments: tuple[int, ...], expected: int) -> None:
    assert padded_vocab_size(*arguments) == expected


def test_padded_vocab_size_refuses_zero() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        padded_vocab_size(320, 0)


@pytest.mark.parametrize(
    ("trained", "recorded", "fits"),
    [
        (VOCAB, "lost.model", True),
        (VOCAB + 1, "lost.model", False),
        (VOCAB - 1, "lost.model", False),
        # A published model's rows are already padded, here to 384.
        (384, None, True),
        (385, None, False),
        (49_152, None, False),
        (VOCAB - 1, None, False),
    ],
)
def test_generation_takes_a_tokenizer_of_the_model_alone(model_path, trained, recorded, fits) -> None:
    """With another tokenizer, generation would print noise."""
    from bitcpm_megatron.inference.megatron_run import tokenizer_of

    run = argparse.Namespace(
        tokenizer_model=recorded,
        tokenizer_type=None,
        vocab_size=trained,
        mock_data=False,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=1,
    )
    if fits:
        assert tokenizer_of(run, Path("run"), str(model_path)).vocab_size == VOCAB
        return
    with pytest.raises(ValueError, match=f"{model_path} has 340 pieces, and run was trained for {trained:,}"):
        tokenizer_of(run, Path("run"), str(model_path))

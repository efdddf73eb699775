# SPDX-License-Identifier: Apache-2.0
"""Hugging Face tokenizers: the ids of Transformers, documents' ends, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support.texts import SPECIAL, strings
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bitcpm_megatron.data.tokenizers import SentencePieceTokenizer, open_tokenizer, train_sentencepiece
from bitcpm_megatron.data.tokenizers.hugging_face import HuggingFaceTokenizer
from bitcpm_megatron.launch import preprocess_data

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n",
    "你好，世界",
    "naïve café",
] * 20


def byte_level(directory: Path) -> Path:
    """As GPT-2's and Qwen's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(SPECIAL[:2]), initial_alphabet=alphabet)
    return saved(made, trainer, directory)


def byte_fallback(directory: Path) -> Path:
    """As Llama's: spaces are a letter, and what the vocabulary lacks is spelled in bytes."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = ["<unk>", *SPECIAL[:2], *(f"<0x{byte:02X}>" for byte in range(256))]
    return saved(made, trainers.BpeTrainer(vocab_size=600, special_tokens=known), directory)


def saved(made: tokenizers.Tokenizer, trainer: trainers.BpeTrainer, directory: Path) -> Path:
    """What Transformers writes, with tokens that were added later, one of them in the configuration alone."""
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens([SPECIAL[2]])
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    directory.mkdir()
    made.save(str(directory / "tokenizer.json"))
    late = {str(made.get_vocab_size()): {"content": SPECIAL[3], "special": True, "normalized": False}}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": {"__type": "AddedToken", "content": SPECIAL[3]},
    }
    text = json.dumps({**config, "added_tokens_decoder": late})
    (directory / "tokenizer_config.json").write_text(text)
    return directory


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("tokenizer") / "hf")


def test_ids_and_texts_are_those_of_transformers(directory: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers, then make test")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours, texts = open_tokenizer(directory), strings(10_000)
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    found = ours.tokenize_batch(texts)
    assert found == expected and ours.tokenize_batch(texts, threads=2) == expected
    assert (ours.eod, ours.pad, ours.vocab_size) == (theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    assert len({token for ids in found for token in ids}) > 150, "strings that use the vocabulary"
    for ids in found[:500]:
        assert ours.detokenize(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_special_tokens_in_a_text_are_special(directory: Path) -> None:
    tokenizer = open_tokenizer(directory / "tokenizer.json")
    assert tokenizer.tokenize(SPECIAL[0]) == [tokenizer.eod] and tokenizer.tokenize(SPECIAL[3]) == [tokenizer.pad]
    assert tokenizer.detokenize(np.array([tokenizer.eod, *tokenizer.tokenize("fox")])).strip() == "fox"


def test_what_a_path_holds_decides_and_a_type_may_say_it(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(TEXTS, 320))
    assert isinstance(open_tokenizer(tmp_path), SentencePieceTokenizer)
    assert isinstance(open_tokenizer(tmp_path / "tokenizer.model"), SentencePieceTokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    both = open_tokenizer(tmp_path)
    assert isinstance(both, HuggingFaceTokenizer)
    assert isinstance(open_tokenizer(tmp_path, "GPTSentencePieceTokenizer"), SentencePieceTokenizer)
    assert both.unique_identifiers == open_tokenizer(directory).unique_identifiers
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": SPECIAL[1]}))
    assert open_tokenizer(tmp_path).unique_identifiers != both.unique_identifiers


def test_what_is_no_tokenizer_is_refused_with_the_cure(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/tokenizer.json: No such file .* nothing is downloaded"):
        open_tokenizer("Qwen/nowhere", "HuggingFaceTokenizer")
    with pytest.raises(ValueError, match="TikTokenizer is not known here: use GPTSentencePieceTokenizer or Hugging"):
        open_tokenizer(directory, "TikTokenizer")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer of the library tokenizers"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="no eos_token to end documents with"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="tokenizer_config.json: not a JSON object"):
        open_tokenizer(tmp_path)


def test_text_and_ids_that_cannot_be_are_refused(directory: Path) -> None:
    tokenizer = open_tokenizer(directory)
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.tokenize("a\ud800")
    with pytest.raises(ValueError, match=f"outside of the vocabulary of {tokenizer.vocab_size} pieces"):
        tokenizer.detokenize([tokenizer.vocab_size])


def test_preprocessing_takes_one(directory: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    arguments = ["--input", str(tmp_path / "corpus.jsonl"), "--append-eod", "--output-prefix", str(tmp_path / "out")]
    assert preprocess_data.main([*arguments, "--tokenizer-model", str(directory)]) == 0
    tokenizer, written = open_tokenizer(directory), IndexedDataset(str(tmp_path / "out_text_document"))
    assert [written[i].tolist() for i in range(4)] == [[*tokenizer.tokenize(text), tokenizer.eod] for text in TEXTS[:4]]

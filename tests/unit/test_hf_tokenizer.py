# SPDX-License-Identifier: Apache-2.0
"""Tests of Hugging Face tokenizers: ids equal to Transformers', ends of documents, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support.chat import STYLES, chat_tokenizer
from support.texts import SPECIAL, strings
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitcpm_megatron.data.tokenizers import SentencePieceTokenizer, open_tokenizer, train_sentencepiece
from bitcpm_megatron.data.tokenizers.hugging_face import HuggingFaceTokenizer
from bitcpm_megatron.launch import preprocess_data, preprocess_sft

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n",
    "你好，世界",
    "naïve café",
] * 20


def byte_level(directory: Path) -> Path:
    """Makes a byte-level BPE tokenizer like those of GPT-2 and Qwen."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(SPECIAL[:2]), initial_alphabet=alphabet)
    return saved(made, trainer, directory)


def byte_fallback(directory: Path) -> Path:
    """Makes a BPE tokenizer like Llama's: spaces are a letter, and unknown characters are spelled in bytes."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = ["<unk>", *SPECIAL[:2], *(f"<0x{byte:02X}>" for byte in range(256))]
    return saved(made, trainers.BpeTrainer(vocab_size=600, special_tokens=known), directory)


def saved(made: tokenizers.Tokenizer, trainer: trainers.BpeTrainer, directory: Path) -> Path:
    """Trains and saves a tokenizer like Transformers, with added tokens, one of them only in the configuration."""
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


def test_what_stands_in_front_is_that_of_transformers(directory: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers, then make test")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    name, number = SPECIAL[0], theirs.convert_tokens_to_ids(SPECIAL[0])
    texts = ["", "fox", f"{name} fox", *TEXTS[:4]]
    for template, behind in ((f"{name} $A", 0), (f"{name} {name} $A {name}", 1)):
        theirs.backend_tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(), processors.TemplateProcessing(single=template, special_tokens=[(name, number)])]
        )
        theirs.save_pretrained(tmp_path)
        ours = open_tokenizer(tmp_path)
        for text in texts[bool(behind) :]:
            ids = theirs(text)["input_ids"]
            assert ours.tokenize_with_front(text) == ids[: len(ids) - behind] != ours.tokenize(text)
    plain = open_tokenizer(directory)
    assert [plain.tokenize_with_front(text) for text in texts] == [plain.tokenize(text) for text in texts]


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
    # Padding is not learned, so that the padding token matters, too.
    for name in ("eos_token", "pad_token"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, name: SPECIAL[1]}))
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
    with pytest.raises(ValueError, match="tokenizer_config.json: the whole: expected a mapping"):
        open_tokenizer(tmp_path)


def configure(directory: Path, **changed: object) -> Path:
    """Changes the configuration of a tokenizer, and returns its directory."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return directory


THINK = {"__type": "AddedToken", "content": "<think>", "lstrip": True, "special": True}
NEW = {"__type": "AddedToken", "content": "<new>", "special": True}
CONFIGURED = [
    ({"add_prefix_space": True, "legacy": False, "clean_up_tokenization_spaces": True}, None),
    ({"add_bos_token": True, "add_eos_token": True, "bos_token": SPECIAL[1], "mask_token": None}, None),
    ({"pad_token": SPECIAL[1], "image_token": THINK, "extra_special_tokens": [SPECIAL[2]]}, None),
    (
        {"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer"},
        {"byte_fallback": "json: add_prefix_space is F"},
    ),
    ({"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}, {"byte_level": "json: add_prefix_space is True"}),
    ({"split_special_tokens": True}, "tokenizer_config.json: with split_special_tokens"),
    ({"pad_token": "<new>"}, "tokenizer.json: no added token '<new>'"),
    ({"bos_token": "o"}, "tokenizer.json: no added token 'o'"),
    ({"image_token": NEW}, "tokenizer.json: no added token '<new>'"),
    ({"additional_special_tokens": [SPECIAL[1], NEW]}, "tokenizer.json: no added token '<new>'"),
    ({"extra_special_tokens": {"image_token": "fox"}}, "tokenizer.json: no added token 'fox'"),
]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize(("changed", "refused"), CONFIGURED)
def test_a_configuration_is_followed_as_by_transformers_or_refused(tmp_path: Path, make, changed, refused) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers, then make test")
    directory = make(tmp_path / "hf")
    texts = ["fox <new>", " a <think> b", *("".join(SPECIAL), "a b, c ."), *strings(100)]
    ordinary = open_tokenizer(directory).tokenize_batch(texts)
    configure(directory, **changed)
    if isinstance(refused, dict):  # only one of the two tokenizers is refused
        refused = refused.get(make.__name__)
        if refused is None:
            assert open_tokenizer(directory).tokenize_batch(texts) == ordinary
            return
    expected = transformers.AutoTokenizer.from_pretrained(directory)(texts, add_special_tokens=False)["input_ids"]
    if refused is None:
        assert open_tokenizer(directory).tokenize_batch(texts) == expected
    else:
        assert expected != ordinary, "nothing to refuse"
        with pytest.raises(ValueError, match=refused):
            open_tokenizer(directory)


HOW = ("single_word", "lstrip", "rstrip", "normalized", "special")
ADDED = {"content": "<late>", "special": True}
DAMAGED = [
    *(
        (name, value)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        for value in (5, ["</s>"], {}, {"content": None})
    ),
    *((name, value) for name in ("chat_template", "added_tokens_decoder") for value in (5, [None], [5], [[]])),
    *(("chat_template", value) for value in ([{"name": "default"}], [{"name": "default", "template": None}], {})),
    *(("added_tokens_decoder", {key: ADDED}) for key in ("", "a", "-1", "1.5")),
    *(("added_tokens_decoder", {"300": value}) for value in (None, "<late>", [], {}, {"content": None})),
    *(("added_tokens_decoder", {"300": {**ADDED, key: None}}) for key in ADDED),
    *(("added_tokens_decoder", {"300": {**ADDED, key: "no"}}) for key in ("lstrip", "rstrip", "single_word")),
    *(("extra_special_tokens", value) for value in (5, [None], {"one": 5})),
    *(("additional_special_tokens", value) for value in ("</s>", [["</s>"]])),
    *((name, "yes") for name in ("add_prefix_space", "split_special_tokens")),
    ("tokenizer_class", ["LlamaTokenizer"]),
]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """Makes a tokenizer, and functions that run the commands that prepare data with it."""
    root = tmp_path_factory.mktemp("damaged")
    messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    (root / "in.jsonl").write_text(json.dumps({"text": "Hi", "messages": messages}))
    model = chat_tokenizer(root / "hf", STYLES["chatml"][0])
    line = f"--input {root}/in.jsonl --tokenizer-model {model} --overwrite --output-prefix".split()
    return model, [
        lambda: preprocess_data.main([*line, f"{root}/data", "--append-eod"]),
        lambda: preprocess_sft.main([*line, f"{root}/sft", "--seq-length", "64"]),
    ]


@pytest.mark.parametrize(("name", "value"), DAMAGED)
def test_a_damaged_configuration_is_one_message_with_its_file(commands, capsys, name: str, value: object) -> None:
    model, mains = commands
    path = model / "tokenizer_config.json"
    sound = path.read_text()
    try:
        configure(model, **{name: value})
        for main in mains:
            assert main() == 2
            [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
            assert f"{path}: {name}" in said
    finally:
        path.write_text(sound)
    assert [main() for main in mains] == [0, 0]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_file_that_is_no_text_is_named(commands, capsys, name: str) -> None:
    model, (_, preprocess) = commands
    sound = (model / name).read_bytes() if (model / name).exists() else None
    (model / name).write_bytes(b"\xff")
    assert preprocess() == 2
    assert f"{model / name}: not UTF-8" in capsys.readouterr().err
    (model / name).unlink() if sound is None else (model / name).write_bytes(sound)


def parts(value: object, *path: object) -> Iterator[tuple[object, ...]]:
    """Yields the paths of the first parts of a JSON value."""
    yield path
    for key in (
        [*value][:9] if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else []
    ):
        yield from parts(value[key], *path, key)


@pytest.mark.parametrize("damage", [None, -1, 2**40, 1.5, True, "x", [None], {"x": 1}], ids=repr)
def test_a_damaged_tokenizer_is_an_error_with_its_file_or_still_one(tmp_path: Path, damage: object) -> None:
    path = chat_tokenizer(tmp_path) / "tokenizer.json"
    sound, refused = path.read_text(), 0
    described = json.loads(sound)
    for part in parts({**described, "added_tokens": described["added_tokens"][:2]}):
        damaged = at = json.loads(sound)
        for key in part[:-1]:
            at = at[key]
        if part:
            at[part[-1]] = damage
        path.write_text(json.dumps(damaged if part else damage))
        try:
            open_tokenizer(tmp_path).tokenize("Hi <end>\u00e4")
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 5


def test_a_text_that_the_vocabulary_cannot_express_is_an_error_with_the_file(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.BPE({"a": 0, "</s>": 1}, [], unk_token="gone")).save(str(tmp_path / "tokenizer.json"))
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["added_tokens"] = [{"id": 1, "content": "</s>", **dict.fromkeys(HOW, False), "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.tokenize("a</s>") == [0, 1]
    with pytest.raises(
        ValueError, match=r"tokenizer.json cannot write this text as tokens: Unk token `gone` not found"
    ):
        tokenizer.tokenize("b")


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

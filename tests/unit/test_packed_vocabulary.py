# SPDX-License-Identifier: Apache-2.0
"""Tests of tokenizers in GGUF files: what is written, and what is refused because llama.cpp reads it differently."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="pip install 'bitcpm_megatron[export]'")

import sentencepiece
import tokenizers
from support.chat import CHATML, SPECIAL, chat_tokenizer
from support.packed import architecture, latent_model, open_gguf, value, write_config, write_sentence_piece

from bitcpm_megatron.checkpoint_tools import export_packed
from bitcpm_megatron.checkpoint_tools.packed import vocabulary as module
from bitcpm_megatron.data.tokenizers.hugging_face import HuggingFaceTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights") / "model"
    latent_model(directory, architecture(num_layers=1, vocab_size=400))
    return directory


@pytest.fixture
def model(weights: Path, tmp_path: Path) -> Path:
    """Makes a model without a tokenizer; files may be added to it."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in weights.iterdir():
        (directory / path.name).hardlink_to(path)
    return directory


def export(model: Path, *more: str) -> int:
    return export_packed.main(
        ["--load-dir", str(model), "--save-dir", str(model.parent / "out"), "--format", "gguf", *more]
    )


def written(model: Path, *more: str) -> dict[str, object]:
    """Exports a model, and returns the metadata of its tokenizer."""
    assert export(model, *more) == 0
    file = open_gguf(model.parent / "out" / "model.gguf")
    return {key.removeprefix("tokenizer."): value(file, key) for key in file.fields if key.startswith("tokenizer.")}


def refused(model: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert export(model, *more) == 2 and not (model.parent / "out").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_sentencepiece_model(model: Path) -> None:
    write_sentence_piece(model)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    found = written(model)
    count = theirs.get_piece_size()
    tokens, types, scores = found["ggml.tokens"], found["ggml.token_type"], found["ggml.scores"]
    assert tokens[:count] == [theirs.id_to_piece(n) for n in range(count)] and len(tokens) == 400
    assert scores[:count] == pytest.approx([theirs.get_score(n) for n in range(count)], rel=1e-6)
    expected = [
        UNKNOWN if theirs.is_unknown(n) else CONTROL if theirs.is_control(n) else BYTE if theirs.is_byte(n) else NORMAL
        for n in range(count)
    ]
    assert types == [*expected, *[UNUSED] * (400 - count)] and {UNKNOWN, CONTROL, BYTE, NORMAL} <= set(types)
    assert tokens[count:] == [f"[PAD{n}]" for n in range(count, 400)]
    assert found["ggml.model"] == "llama" and found["ggml.add_space_prefix"] is False
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"], found["ggml.unknown_token_id"]) == (1, 2, 0)
    assert found["ggml.add_bos_token"] is False and "ggml.padding_token_id" not in found


def write_both(model: Path) -> None:
    """Writes a SentencePiece model, and the ``tokenizer.json`` that Llama's class makes of it, with two more tokens."""
    write_sentence_piece(model)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    vocab = {theirs.id_to_piece(n): n for n in range(theirs.get_piece_size())}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    made.add_tokens(["a\u2581b"])
    made.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))


def test_a_sentencepiece_model_with_a_tokenizer_json(model: Path, capsys) -> None:
    """The JSON file says which tokens were added and whether texts begin with a space; ids must agree in both files."""
    write_both(model)
    changed = json.loads((model / "tokenizer.json").read_text())
    found = written(model, "--tokenizer", str(model))
    assert found["ggml.tokens"][320:322] == ["<|im_end|>", "a b"] and found["ggml.tokens"][322] == "[PAD322]"
    assert found["ggml.token_type"][:3] == [UNKNOWN, CONTROL, CONTROL]
    assert found["ggml.token_type"][320:323] == [CONTROL, USER_DEFINED, UNUSED]
    assert found["ggml.add_space_prefix"] is True and found["ggml.eos_token_id"] == 320
    shutil.rmtree(model.parent / "out")
    vocab = changed["model"]["vocab"]
    one, other = (next(token for token, number in vocab.items() if number == n) for n in (300, 310))
    vocab[one], vocab[other] = 310, 300
    (model / "tokenizer.json").write_text(json.dumps(changed))
    assert "the two are not of one model" in refused(model, capsys)


def test_byte_level_bpe_with_a_chat_template(model: Path) -> None:
    chat_tokenizer(model, CHATML, vocab_size=300)
    content = json.loads((model / "tokenizer.json").read_text())
    found = written(model)
    vocab = content["model"]["vocab"]
    tokens = found["ggml.tokens"]
    assert {token: tokens.index(token) for token in vocab} == vocab and len(tokens) == 400
    assert [found["ggml.token_type"][tokens.index(token)] for token in SPECIAL] == [CONTROL] * len(SPECIAL)
    assert found["ggml.token_type"][tokens.index("a")] == NORMAL and found["ggml.token_type"][-1] == UNUSED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    assert found["ggml.merges"] == merges and len(merges) > 5
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "gpt-2")
    ids = {name: vocab[token] for name, token in (("bos", "<s>"), ("eos", "</s>"), ("padding", "</s>"))}
    assert {name: found[f"ggml.{name}_token_id"] for name in ids} == ids
    assert found["chat_template"] == CHATML


@pytest.mark.parametrize("taking", [None, "lstrip", "rstrip", "single_word"])
def test_a_token_that_the_configuration_alone_adds(taking: str | None, model: Path, capsys) -> None:
    """Transformers adds such a token, and so does training."""
    chat_tokenizer(model, CHATML, vocab_size=300)
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    late = {"content": "<tool>", "special": False, "normalized": False}
    late |= {how: how == taking for how in ("lstrip", "rstrip", "single_word")}
    number = HuggingFaceTokenizer(model).vocab_size
    path.write_text(json.dumps({**config, "added_tokens_decoder": {str(number): late}}))
    if taking is not None:
        assert f"the added token '<tool>' ({number}) takes spaces with it" in refused(model, capsys)
        return
    found = written(model)
    assert found["ggml.tokens"][number] == "<tool>" and found["ggml.token_type"][number] == USER_DEFINED
    assert HuggingFaceTokenizer(model).tokenize("a<tool>b")[1] == number


def test_several_templates_and_ends(model: Path) -> None:
    chat_tokenizer(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    named = {"zebra": "{{ 'z' }}", "default": "{{ 'd' }}", "ant": "{{ 'a' }}"}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "config.json").unlink()
    write_config(model, architecture(num_layers=1, vocab_size=400), torch.bfloat16, eos_token_id=[1, 4, 8])
    found = written(model)
    assert found["chat_template"] == named["default"] and found["chat_template.ant"] == named["ant"]
    assert found["chat_templates"] == ["ant", "zebra"] and found["chat_template.zebra"] == named["zebra"]
    assert [found[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 4, 8]


def test_known_hashes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary is identified by the SHA-256 of the ids of one text, whatever its files say."""
    from hashlib import sha256

    from tokenizers import Tokenizer

    chat_tokenizer(model)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(module.TEXT).ids
    monkeypatch.setitem(module.KNOWN, sha256(str(ids).encode()).hexdigest(), "qwen2")
    assert written(model)["ggml.pre"] == "qwen2"


def changed_json(model: Path, change) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    change(content)
    (model / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("what", ["regex", "normalizer", "ignore_merges", "prefix"])
def test_byte_level_bpe_that_cuts_texts_in_a_way_without_name(what: str, model: Path, capsys) -> None:
    def change(content: dict) -> None:
        if what == "regex":
            content["pre_tokenizer"]["use_regex"] = False
        elif what == "normalizer":
            content["normalizer"] = {"type": "NFC"}
        elif what == "ignore_merges":
            content["model"]["ignore_merges"] = True
        else:
            content["pre_tokenizer"]["add_prefix_space"] = True

    chat_tokenizer(model)
    changed_json(model, change)
    said = refused(model, capsys)
    assert "llama.cpp has no name for how this vocabulary cuts texts" in said and "compressed-tensors" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is no BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes texts before it cuts them"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"byte_fallback": False}, "has no bytes to spell what it lacks with"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_would_read_differently(options: dict, message: str, model, capsys) -> None:
    stream = io.BytesIO()
    given = dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    texts = iter(["the quick brown fox jumps over the lazy dog"] * 9)
    size = 40 if "byte_fallback" in options else 287 if "model_type" in options else 290
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=stream, vocab_size=size, minloglevel=2, **{**given, **options}
    )
    (model / "tokenizer.model").write_bytes(stream.getvalue())
    assert message in refused(model, capsys)


def test_tokenizers_that_are_not_there_or_not_the_models(model: Path, capsys) -> None:
    assert "no tokenizer.json and no tokenizer.model" in refused(model, capsys)
    (model / "tokenizer.model").write_bytes(b"\xff\xffnothing")
    assert "not a SentencePiece model" in refused(model, capsys)
    write_sentence_piece(model, 420)
    assert "420 pieces, the model 400 rows" in refused(model, capsys)
    (model / "tokenizer.model").unlink()
    chat_tokenizer(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "config.json").unlink()
    write_config(model, architecture(num_layers=1, vocab_size=400), torch.bfloat16, eos_token_id=[1, 2, 3, 4])
    assert "4 ids end a text" in refused(model, capsys)
    write_config(model, architecture(num_layers=1, vocab_size=400), torch.bfloat16, bos_token_id=400)
    del config["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert "bos_token_id 400: the model has 400 rows" in refused(model, capsys)

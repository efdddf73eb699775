# SPDX-License-Identifier: Apache-2.0
"""Tests that an export contains the tokenizer of the run, and names the tokens that end texts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.chat import chat_tokenizer
from test_conversion_errors import CONFIG
from test_round_trip import tensors, write

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, convert_megatron_to_hf
from bitcpm_megatron.checkpoint_tools.megatron_model import export as megatron_export
from bitcpm_megatron.checkpoint_tools.megatron_model.checkpoint import MegatronCheckpoint, open_checkpoint
from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.files import DIGESTS


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that exports a checkpoint with given arguments of its run, and returns the exit status."""
    recorded: dict[str, object] = {}
    write(tmp_path / "source", CONFIG, tensors(CONFIG, torch.bfloat16, 0))
    argv = ["--load-dir", str(tmp_path / "source"), "--save-dir", str(tmp_path / "run")]
    assert convert_hf_to_megatron.main(argv) == 0
    shutil.rmtree(tmp_path / "run" / "release" / "hf")
    (tmp_path / "run" / "release" / DIGESTS).unlink()

    def opened(*given: object) -> MegatronCheckpoint:
        checkpoint = open_checkpoint(*given)
        checkpoint.arguments |= recorded
        return checkpoint

    monkeypatch.setattr(megatron_export, "open_checkpoint", opened)

    def export(target: Path, *flags: str, **arguments: object) -> int:
        recorded.clear()
        recorded.update(arguments)
        command = ["--load-dir", str(tmp_path / "run"), "--weights", "latent", "--save-dir", str(target)]
        return convert_megatron_to_hf.main([*command, *flags])

    return export


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return chat_tokenizer(tmp_path / "tokenizer", "{{ messages }}")


def of_run(directory: Path) -> dict[str, object]:
    """Returns what a run records about its tokenizer."""
    identity = dict(open_tokenizer(directory).unique_identifiers)
    return {"tokenizer_model": str(directory), "tokenizer_type": None, "tokenizer_identity": identity}


@pytest.mark.parametrize("how", ["of the run", "of the run, by its file", "named"])
def test_the_files_and_the_ends_of_texts(how: str, exported, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags, recorded = (["--tokenizer-model", str(tokenizer)], {}) if how == "named" else ([], of_run(tokenizer))
    if "file" in how:
        recorded["tokenizer_model"] = str(tokenizer / "tokenizer.json")
    assert exported(out, *flags, **recorded) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tokenizer / name).read_bytes()
    added = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    config = json.loads((out / "config.json").read_text())
    found = {name: config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert found == {"bos": ids["<s>"], "eos": ids["</s>"], "pad": ids["</s>"]}


def test_a_config_beside_the_tokenizer_has_the_say(exported, tokenizer: Path, tmp_path: Path) -> None:
    (tokenizer / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": [7, 8]}))
    assert exported(tmp_path / "out", **of_run(tokenizer)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [7, 8] and "bos_token_id" not in config


def test_another_tokenizer_in_its_place_is_refused(exported, tokenizer: Path, tmp_path: Path, capsys) -> None:
    recorded = of_run(tokenizer)
    chat_tokenizer(tokenizer, vocab_size=300)
    assert exported(tmp_path / "out", **recorded) == 2
    said = capsys.readouterr().err
    assert f"{tokenizer} holds another tokenizer than when" in said and "--tokenizer DIR" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["identity", "place"])
def test_what_is_not_known_to_be_of_the_run_is_left(missing: str, exported, tokenizer: Path, tmp_path, capsys) -> None:
    recorded = of_run(tokenizer)
    if missing == "identity":
        del recorded["tokenizer_identity"]
    else:
        shutil.rmtree(tokenizer)
    assert exported(tmp_path / "out", **recorded) == 0
    assert "no tokenizer files were copied" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("tokenizer*"))

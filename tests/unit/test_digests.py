# SPDX-License-Identifier: Apache-2.0
"""Tests that readers detect a flipped bit in any file of a checkpoint or export, and name the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_hf

from bitcpm_megatron.checkpoint_tools import (
    convert_hf_to_megatron,
    convert_megatron_to_hf,
    inspect_checkpoint,
    qat_convert,
)
from bitcpm_megatron.files import DIGESTS, check_digests, read_digests


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the output of each converter: megatron, legacy, latent, fused, and a single file."""
    root = tmp_path_factory.mktemp("digests")
    tiny_hf.latent_export(root / "source", tiny_hf.architecture(), tiny_hf.record())

    def run(tool, *arguments: object) -> None:
        assert tool.main([str(a) for a in arguments]) == 0

    for name, flags in (("megatron", []), ("legacy", ["--format", "legacy", "--target-tensor-parallel-size", 2])):
        run(convert_hf_to_megatron, "--load-dir", root / "source", "--save-dir", root / name, *flags)
    run(convert_megatron_to_hf, "--load-dir", root / "megatron", "--save-dir", root / "latent", "--weights", "latent")
    run(qat_convert, "--input_bin", root / "latent", "--output", root / "fused")
    (root / "file").mkdir()
    run(qat_convert, "--input_bin", root / "source" / "model.safetensors", "--output", root / "file" / "a.safetensors")
    return root


WHERE = {
    "megatron": "megatron/release",
    "legacy": "legacy/release",
    "latent": "latent",
    "fused": "fused",
    "file": "file",
}


@pytest.mark.parametrize("kind", WHERE)
def test_every_file_that_is_written_is_recorded(kind: str, written: Path) -> None:
    directory = written / WHERE[kind]
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert set(read_digests(directory)) == files - {DIGESTS} and len(files) > 1
    assert check_digests(directory)


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file, which keeps its size and usually a valid format."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


KINDS = {
    ".distcp": ("megatron", "__0_0.distcp"),
    ".metadata": ("megatron", ".metadata"),
    "common.pt": ("megatron", "common.pt"),
    "arguments": ("megatron", "arguments.json"),
    "record": ("megatron", "ternary_quantizer.json"),
    "config": ("megatron", "hf/config.json"),
    "legacy": ("legacy", "mp_rank_01/model_optim_rng.pt"),
    "safetensors": ("latent", "model.safetensors"),
    "modeling file": ("latent", "modeling_bitcpm.py"),
    "fused": ("fused", "model.safetensors"),
    "file": ("file", "a.safetensors"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found(kind: str, written: Path, tmp_path: Path, capsys) -> None:
    which, name = KINDS[kind]
    shutil.copytree(written / which, tmp_path / which)
    damaged = tmp_path / WHERE[which] / name
    flip(damaged)
    source = damaged if which == "file" else tmp_path / which
    target = tmp_path / ("out.safetensors" if which == "file" else "out")
    if which in ("megatron", "legacy"):
        commands = [(convert_megatron_to_hf, "--load-dir", source, "--save-dir", target, "--weights", "latent")]
    else:
        commands = [(qat_convert, "--input_bin", source, "--output", target)]
    if which in ("latent", "fused"):
        commands.append((convert_hf_to_megatron, "--load-dir", source, "--save-dir", target))
    for tool, *arguments in commands:
        assert tool.main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert f"error: {damaged} does not match its digest" in error, error
        assert not target.exists()
    assert inspect_checkpoint.main([str(source), "--json"]) == 3
    found = capsys.readouterr()
    assert f"{damaged} does not match its digest" in found.out + found.err


@pytest.mark.parametrize("which", ["megatron", "fused", "file"])
def test_inspection_says_whether_there_were_digests(which: str, written: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(written / which, tmp_path / which)
    source = tmp_path / which / ("a.safetensors" if which == "file" else "")

    def inspected(*flags: str) -> dict:
        assert inspect_checkpoint.main([str(source), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    assert inspected()["digests"] is True and inspected("--fast")["digests"] is True
    assert inspect_checkpoint.main([str(source)]) == 0
    assert "every file matches" in capsys.readouterr().out
    (tmp_path / WHERE[which] / DIGESTS).unlink()
    assert inspected()["digests"] is None


def test_a_cut_and_a_missing_file_are_found_without_reading(written: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(written / "fused", tmp_path / "fused")
    (tmp_path / "fused" / "config.json").unlink()
    with open(tmp_path / "fused" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert inspect_checkpoint.main([str(tmp_path / "fused"), "--fast"]) == 3
    error = capsys.readouterr().err
    assert "model.safetensors has 1,000 bytes" in error and "config.json is missing" in error


def test_a_single_file_joins_the_digests_that_stand_there(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "file", tmp_path / "file")
    weights = load_file(written / "source" / "model.safetensors")
    torch.save(weights, tmp_path / "in.bin")
    assert (
        qat_convert.main(["--input_bin", str(tmp_path / "in.bin"), "--output", str(tmp_path / "file" / "b.bin")]) == 0
    )
    assert set(read_digests(tmp_path / "file")) == {"a.safetensors", "b.bin"} and check_digests(tmp_path / "file")


def test_damaged_digests_are_no_reason_to_go_on(written: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(written / "fused", tmp_path / "fused")
    (tmp_path / "fused" / DIGESTS).write_text("{")
    assert qat_convert.main(["--input_bin", str(tmp_path / "fused"), "--output", str(tmp_path / "out")]) == 2
    assert f"{DIGESTS}: not valid JSON" in capsys.readouterr().err

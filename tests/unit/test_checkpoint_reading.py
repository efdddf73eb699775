# SPDX-License-Identifier: Apache-2.0
"""Tests that training reads checkpoints completely, and never runs code that a checkpoint names."""

import argparse
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.enums import ModelType
from test_torch_dist import Payload

from bitcpm_megatron.checkpoints.reading import read
from bitcpm_megatron.checkpoints.torch_dist import read_contents

# megatron-core writes checkpoints in separate processes.
pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]
WEIGHT = torch.arange(48.0).reshape(6, 8)


def state(weight: torch.Tensor, extra: object) -> dict:
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", weight),
        "extra": ShardedObject("extra", extra, (1,), (0,)),
    }


def save(directory: Path, extra: object, common: object = None) -> Path:
    directory.mkdir()
    dist_checkpointing.save({**state(WEIGHT, extra), "common": common}, str(directory))
    return directory


def load(directory: Path) -> dict:
    return read(state(torch.zeros(6, 8), None), directory)


def test_honest_objects_come_back(single_rank: None, tmp_path: Path) -> None:
    random.seed(3)
    extra = [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
    common = argparse.Namespace(hidden_size=64, model_type=ModelType.encoder_or_decoder, dtype=torch.bfloat16)
    found = load(save(tmp_path / "saved", extra, {"args": common, "iteration": 7}))
    assert torch.equal(found["weight"], WEIGHT)
    assert found["common"] == {"args": common, "iteration": 7}
    assert found["extra"][0]["python"] == random.getstate()
    assert np.array_equal(found["extra"][0]["numpy"][1], np.random.get_state()[1])


def test_nobody_unpickles_the_metadata(single_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the safe reader has accepted a file, no unsafe reader may read it again."""
    directory = save(tmp_path / "saved", None)
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("pickle.load"))
    assert torch.equal(load(directory)["weight"], WEIGHT)


def craft(part: str, directory: Path, marker: Path, function: Callable) -> Path:
    payload = Payload(function, marker)
    if part == "object entry":
        return save(directory, [payload])
    if part == "common":
        return save(directory, None, payload)
    save(directory, None)
    (directory / ".metadata").write_bytes(pickle.dumps(payload))
    return directory


@pytest.mark.parametrize("function", [exec, os.system])
@pytest.mark.parametrize("part", ["object entry", "common", ".metadata"])
def test_code_is_refused_and_not_run(part: str, function: Callable, single_rank: None, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    directory = craft(part, tmp_path / "crafted", marker, function)
    with pytest.raises(Exception, match="extra" if part == "object entry" else part) as error:
        load(directory)
    assert not marker.exists()
    assert "running code" in str(error.value) or "made to harm" in str(error.value)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["common.pt", "extra", "weight"])
def test_what_would_unfold_beyond_its_size_is_refused_unread(part: str, single_rank: None, tmp_path: Path) -> None:
    """PyTorch saves uncompressed archives; a compressed pickle of a megabyte could fill the memory."""
    directory = save(tmp_path / "saved", None)
    if part == "common.pt":
        path = directory / part
        path.write_bytes(deflated(path.read_bytes()))
    else:
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        (place,) = [place for index, place in metadata.storage_data.items() if index.fqn.startswith(part)]
        file = directory / place.relative_path
        entry = deflated(file.read_bytes()[place.offset : place.offset + place.length])
        object.__setattr__(place, "offset", file.stat().st_size)
        object.__setattr__(place, "length", len(entry))
        file.write_bytes(file.read_bytes() + entry)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        Exception, match=rf"{'saved' if part == 'weight' else part}.*is compressed, and torch.save never does that"
    ):
        load(directory)


def deflated(archive: bytes) -> bytes:
    """Returns the same archive in compressed form."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return target.getvalue()


def test_nothing_is_left_displaced(single_rank: None, tmp_path: Path) -> None:
    before = torch.load, dist_checkpointing.load
    marker = tmp_path / "ran"
    with pytest.raises(Exception, match="running code"):
        load(craft("object entry", tmp_path / "crafted", marker, exec))
    assert before == (torch.load, dist_checkpointing.load)


def test_another_format_is_refused(single_rank: None, tmp_path: Path) -> None:
    directory = save(tmp_path / "saved", None)
    content = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps({**content, "sharded_backend": "zarr"}))
    with pytest.raises(Exception, match="metadata.json: this loop reads torch_dist"):
        load(directory)


def test_damaged_parts_are_named(single_rank: None, tmp_path: Path) -> None:
    directory = save(tmp_path / "saved", None)
    place = read_contents(directory).tensors["weight"].chunks[0].place
    file = directory / place.file
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(Exception, match=rf"{place.file}: truncated"):
        load(directory)
    file.write_bytes(content[: place.start] + bytes(place.length) + content[place.start + place.length :])
    with pytest.raises(Exception, match="saved: .*damaged"):
        load(directory)
    file.unlink()
    with pytest.raises(Exception, match=rf"{place.file} is missing, with "):
        load(directory)


def test_a_state_that_the_checkpoint_lacks(single_rank: None, tmp_path: Path) -> None:
    directory = save(tmp_path / "saved", None)
    with pytest.raises(Exception, match="saved: .*other"):
        read({"other": ShardedTensor.from_rank_offsets("other", torch.zeros(2))}, directory)


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint", "generate"])
def test_the_commands_refuse_with_one_line(flag: str, tmp_path: Path) -> None:
    # These imports need Transformers; the other tests must run without it.
    from test_conversion_errors import CONFIG
    from test_round_trip import tensors, write

    from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron

    write(tmp_path / "hf", CONFIG, tensors(CONFIG, torch.bfloat16, 0))
    marker, directory = tmp_path / "ran", tmp_path / "converted"
    assert convert_hf_to_megatron.main(["--load-dir", str(tmp_path / "hf"), "--save-dir", str(directory)]) == 0
    (directory / "release" / ".metadata").write_bytes(pickle.dumps(Payload(exec, marker)))
    if flag == "generate":
        command = ["launch/generate.py", str(directory), "--prompt", "a"]
    else:
        flags = "--mock-data --vocab-size 73 --seq-length 32 --micro-batch-size 1 --global-batch-size 1 --bf16"
        flags += " --train-iters 1 --lr 1e-3"
        command = ["launch/pretrain.py", "--model", str(directory / "model.yaml"), *flags.split(), flag, str(directory)]
    done = subprocess.run([sys.executable, *command], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert ".metadata" in lines[0] and "made to harm" in lines[0] and "Traceback" not in done.stderr
    assert not marker.exists()

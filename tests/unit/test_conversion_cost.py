# SPDX-License-Identifier: Apache-2.0
"""Tests of the countable costs of conversions: the modules that they import, and the bytes that they read and write."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import tiny_hf

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, convert_megatron_to_hf, qat_convert
from bitcpm_megatron.checkpoint_tools.storage import torch_file
from bitcpm_megatron.checkpoint_tools.storage.reader import TensorInfo
from bitcpm_megatron.checkpoint_tools.storage.torch_file import save_in_turn
from bitcpm_megatron.checkpoint_tools.tensor_map import join, megatron_tensors, split
from bitcpm_megatron.files import digest, write_digests

LAYERS = 3
SMALL = 2**20
"""The most bytes of everything except weights: configurations, headers, records, digests, zip directories of chunks."""
CASES = {
    "legacy": (convert_hf_to_megatron, "source", ["--format", "legacy", "--target-tensor-parallel-size", "2"]),
    "latent": (convert_megatron_to_hf, "dist", ["--weights", "latent"]),
    "fused": (convert_megatron_to_hf, "dist", ["--weights", "fused", "--max-shard-size", "4MB"]),
    "from-legacy": (convert_megatron_to_hf, "legacy", ["--weights", "latent"]),
    "qat": (qat_convert, "source", []),
    "qat-bin": (qat_convert, "source/model.safetensors", []),
    "torch_dist": (convert_hf_to_megatron, "source", []),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes models of 6 MB in each format that is converted, with digests."""
    root = tmp_path_factory.mktemp("models")
    a = tiny_hf.llama(num_layers=LAYERS, hidden_size=256, ffn_hidden_size=512, vocab_size=1000)
    r = tiny_hf.record(LAYERS, modules={f"model.layers.0.{name}": {"group_size": -1} for name in tiny_hf.PROJECTIONS})
    tiny_hf.latent_export(root / "source", a, r)
    write_digests(root / "source")
    for name, flags in (("dist", []), ("legacy", ["--format", "legacy"])):
        command = ["--load-dir", str(root / "source"), "--save-dir", str(root / name), *flags]
        assert convert_hf_to_megatron.main(command) == 0
    return root


def command_of(case: str, root: Path, out: Path) -> list[str]:
    tool, source, flags = CASES[case]
    to, name = ("--output", "x.bin" if case == "qat-bin" else "x") if tool is qat_convert else ("--save-dir", "x")
    return ["--input_bin" if tool is qat_convert else "--load-dir", str(root / source), to, str(out / name), *flags]


@pytest.mark.slow
def test_modules_that_commands_import(models: Path, tmp_path: Path) -> None:
    """PyTorch's checkpoint package takes half as long to import as PyTorch; only it can write ``.metadata``."""
    commands = []
    for case, (tool, *_) in CASES.items():
        (tmp_path / case).mkdir()
        commands.append((tool.__name__, command_of(case, models, tmp_path / case)))
    code = """
import importlib, json, sys
costly = "megatron", "transformers", "matplotlib", "scipy", "sympy", "torch.distributed.checkpoint", "torch._dynamo"
for name, command in json.loads(sys.argv[1]):
    assert importlib.import_module(name).main(command) == 0
    print("imported", *(module for module in costly if module in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("imported")]
    assert found[:-1] == [[]] * (len(CASES) - 1)
    assert "torch.distributed.checkpoint" in found[-1] and not {"megatron", "transformers", "matplotlib"} & {*found[-1]}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count what a process reads")
@pytest.mark.parametrize("case", CASES)
def test_every_byte_is_read_for_its_digest_and_written_once(case: str, models: Path, tmp_path: Path) -> None:
    """Weights are read from memory maps, which are not counted, so that the count is the input for its digest only.

    The output is not read.
    """
    tool, source, _ = CASES[case]
    counts: Sequence[int] = (0, 0)
    for number in range(2):  # the first time also reads modules
        out = tmp_path / str(number)
        out.mkdir()
        before = _transferred()
        assert tool.main(command_of(case, models, out)) == 0
        counts = [after - earlier for after, earlier in zip(_transferred(), before, strict=True)]
    read, written = counts
    size = _size(models / source)
    assert size > 6 * SMALL
    assert size <= read <= size + SMALL
    assert _size(out) <= written <= _size(out) + SMALL


def _transferred() -> list[int]:
    """Returns the bytes that this process has read from and written to files so far, including the page cache."""
    return [int(n) for n in re.findall(r"^[rw]char: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)]


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.parametrize("largest", [0, 1000, 2**28])
def test_tensors_saved_in_turn_are_the_file_that_torch_saves(largest: int, tmp_path: Path, monkeypatch) -> None:
    """Every byte is equal, including checksums, for data in memory or on disk, and for all dtypes."""
    monkeypatch.setattr(torch_file, "_MAX_IN_MEMORY", largest)
    tensors = {
        f"{dtype}.{number}".removeprefix("torch."): torch.arange(number * 7 % 300 + 1).to(dtype).reshape(1, -1)
        for number, dtype in enumerate([torch.bfloat16, torch.float32, torch.bfloat16, torch.int8] * 20)
    }
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0), "last": torch.zeros(4, 0)}
    value = {"step": 3, "a": dict(tensors), "b": {"one": torch.ones(3)}}
    plan = {("a", n): TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    plan["b", "one"] = TensorInfo((3,), torch.float32)
    digester = save_in_turn(tmp_path / "ours", plan, lambda part, name: value[part][name], {"step": 3})
    with open(tmp_path / "theirs", "wb") as stream:  # given a path, torch would write its name into the file
        torch.save(value, stream)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digester.entry() == digest(tmp_path / "theirs")


def test_a_torch_save_of_another_order_is_refused(tmp_path: Path, monkeypatch) -> None:
    """Tensors share memory, one after another, so that another order of writing would write wrong values."""

    def save_backwards(value, stream) -> None:
        for tensor in reversed(value.values()):
            stream.write(tensor.numpy().reshape(-1).view("uint8").data)

    monkeypatch.setattr(torch_file.torch, "save", save_backwards)
    plan = {(name,): TensorInfo((n,), torch.float32) for n, name in enumerate("abc", 1)}
    with pytest.raises(RuntimeError, match="one after another"):
        save_in_turn(tmp_path / "file", plan, lambda name: torch.ones(plan[name,].shape))
    assert not list(tmp_path.iterdir())


def test_joining_and_splitting_copy_nothing() -> None:
    a = tiny_hf.llama()
    for tensor in megatron_tensors(a):
        whole = torch.arange(tensor.shape[0]).unsqueeze(1).expand(-1, 3).contiguous()
        parts = split(tensor, whole, a.kv_channels)
        pieces = [piece for part in parts for piece in part]
        assert {piece.untyped_storage().data_ptr() for piece in pieces} == {whole.untyped_storage().data_ptr()}
        assert all(piece.is_contiguous() for piece in pieces)
        together = [torch.cat(part) for part in parts]
        assert [len(part) for part in together] == list(tensor.rows)
        joined = list(join(tensor, together, a.kv_channels))
        assert torch.equal(torch.cat(joined), whole)
        memory = {part.untyped_storage().data_ptr() for part in together}
        assert {piece.untyped_storage().data_ptr() for piece in joined} == memory

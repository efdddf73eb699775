# SPDX-License-Identifier: Apache-2.0
import argparse
import errno
import io
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from support.peak_memory import MB, is_view_of, peak_growth
from test_torch_dist import Color, FullDisk, Payload

from bitcpm_megatron.checkpoint_tools.megatron_model.legacy import LegacyReader, rank_directory, write_rank
from bitcpm_megatron.checkpoint_tools.storage import torch_file
from bitcpm_megatron.checkpoint_tools.storage.reader import TensorInfo
from bitcpm_megatron.checkpoint_tools.storage.torch_file import save_file
from bitcpm_megatron.files import FileError

TENSORS = {
    "embedding.weight": torch.arange(12.0).reshape(4, 3),
    "empty": torch.zeros(0, 3),
    "norm.weight": torch.arange(5).bfloat16(),
    "scalar": torch.tensor(2.0),
}
PLAN = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def rank_file(directory: Path, tp: int, pp: int, pipeline: int) -> Path:
    return directory / rank_directory(tp, pp, pipeline) / "model_optim_rng.pt"


def save(directory: Path, tensor: int = 2, pipeline: int = 2, parts: tuple[str, ...] = ("model",), **arguments) -> Path:
    """Writes a checkpoint like Megatron-LM; the tensors of different ranks have different values."""
    for tp in range(tensor):
        for pp in range(pipeline):
            path = rank_file(directory, tp, pp, pipeline)
            path.parent.mkdir(parents=True)
            namespace = argparse.Namespace(
                tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, color=Color.RED, **arguments
            )
            state = {"args": namespace, "checkpoint_version": 3.0, "iteration": 100, "optimizer": {"step": Color.RED}}
            for part in parts:
                state[part] = {f"{part}.weight": torch.full((2, 2), 10.0 * tp + pp), "x._extra_state": io.BytesIO(b"x")}
            torch.save(state, path)
    return directory


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(FileError) as error:
        LegacyReader(directory)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 3), (11, 1)])
def test_every_grid(tmp_path, tensor, pipeline):
    reader = LegacyReader(save(tmp_path, tensor, pipeline, seed=3, sizes=[1, 2]))
    assert (reader.tensor_parallel_size, reader.pipeline_parallel_size) == (tensor, pipeline)
    assert reader.args["seed"] == 3 and reader.args["sizes"] == [1, 2] and "Color" in reader.args["color"]
    assert set(reader.ranks) == {(tp, pp) for tp in range(tensor) for pp in range(pipeline)}
    for (tp, pp), parts in reader.ranks.items():
        assert parts.keys() == {"model"} and parts["model"].keys() == {"model.weight"}
        weight = parts["model"]["model.weight"]
        assert torch.equal(weight, torch.full((2, 2), 10.0 * tp + pp))
        assert is_view_of(weight, rank_file(tmp_path, tp, pp, pipeline))


def test_virtual_pipeline(tmp_path):
    names = [f"model{i}" for i in range(11)]
    reader = LegacyReader(save(tmp_path, parts=tuple(reversed(names))))
    assert list(reader.ranks[1, 1]) == names


def test_no_checkpoint(tmp_path):
    refused(tmp_path, "mp_rank_00")
    refused(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize("rank", [(0, 0), (0, 1), (1, 0)])
def test_missing_rank(tmp_path, rank):
    shutil.rmtree(rank_file(save(tmp_path), *rank, 2).parent)
    refused(tmp_path, rank_directory(*rank, 2), "missing")


def test_missing_last_rank(tmp_path):
    """Only the arguments show that there was another rank."""
    for tp in (0, 1):
        shutil.rmtree(rank_file(save(tmp_path) if tp == 0 else tmp_path, tp, 1, 2).parent)
    refused(tmp_path, "--pipeline-model-parallel-size 2")


def test_missing_file(tmp_path):
    rank_file(save(tmp_path), 1, 1, 2).unlink()
    refused(tmp_path, "mp_rank_01_001", "missing")


def test_truncated_file(tmp_path):
    path = rank_file(save(tmp_path), 1, 0, 2)
    path.write_bytes(path.read_bytes()[:-50])
    refused(tmp_path, "mp_rank_01_000", "truncated")


def test_ranks_with_different_names(tmp_path):
    save(tmp_path)
    path = rank_file(tmp_path, 1, 1, 2)
    torch.save({"model": {"other": torch.ones(1)}}, path)
    refused(tmp_path, "mp_rank_01_001", "lacks model.weight")
    torch.save({"model": {"model.weight": torch.ones(1), "more": torch.ones(1)}}, path)
    refused(tmp_path, "mp_rank_00_001/model_optim_rng.pt: lacks more", "mp_rank_01_001")


def test_expert_parallelism(tmp_path):
    (tmp_path / "mp_rank_00_000_000").mkdir()
    refused(tmp_path, "mp_rank_00_000_000", "expert")


def test_expert_parallelism_without_pipeline(tmp_path):
    """In this case, mp_rank_00_001 is expert rank 1."""
    save(tmp_path, 1, 2, expert_model_parallel_size=2)
    refused(tmp_path, "expert parallelism (2)")


def test_two_layouts_in_one_directory(tmp_path):
    save(tmp_path, 2, 1)
    save(tmp_path, 2, 2)
    refused(tmp_path, "with and without a pipeline rank")


def test_older_models(tmp_path):
    path = rank_file(tmp_path, 0, 0, 1)
    path.parent.mkdir()
    torch.save({"model": {"language_model": {"embedding": torch.ones(1)}}}, path)
    refused(tmp_path, "mp_rank_00", "language_model", "--use-mcore-models")
    torch.save({"optimizer": {}}, path)
    refused(tmp_path, "mp_rank_00", "no model", "optimizer")
    torch.save([1], path)
    refused(tmp_path, "mp_rank_00", "list")


@pytest.mark.slow
def test_code_is_not_run(tmp_path, capsys):
    marker, path = tmp_path / "ran", rank_file(tmp_path, 0, 0, 1)
    path.parent.mkdir()
    torch.save({"model": TENSORS, "rng": Payload(exec, marker)}, path)
    assert LegacyReader(tmp_path).ranks[0, 0]["model"].keys() == TENSORS.keys()
    torch.save({"model": TENSORS, "rng": Payload(os.system, marker)}, path)
    refused(tmp_path, "model_optim_rng.pt", "--allow-pickle")
    assert not marker.exists() and capsys.readouterr().err == ""
    LegacyReader(tmp_path, allow_pickle=True)
    assert marker.exists() and "can run any code" in capsys.readouterr().err


def test_files_of_older_torch_npu(tmp_path, monkeypatch):
    """These files refer to a function of torch_npu for every tensor."""

    def _rebuild_npu_tensor(storage, offset, size, stride, requires_grad, hooks, npu_format):
        raise AssertionError

    module = types.ModuleType("torch_npu.utils.storage")
    module._rebuild_npu_tensor = _rebuild_npu_tensor
    _rebuild_npu_tensor.__module__ = module.__name__
    _rebuild_npu_tensor.__qualname__ = "_rebuild_npu_tensor"
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils.storage"):
        monkeypatch.setitem(sys.modules, name, module)
    tensor = torch.arange(6.0).reshape(2, 3)

    class Saved:
        def __reduce__(self):
            # torch._utils does the same; the public accessor would warn.
            storage = torch.storage.TypedStorage(
                wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
            )
            return _rebuild_npu_tensor, (storage, 0, (2, 3), (3, 1), False, {}, True)

    path = rank_file(tmp_path, 0, 0, 1)
    path.parent.mkdir()
    torch.save({"model": {"w": Saved()}}, path)
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils.storage"):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(LegacyReader(tmp_path).ranks[0, 0]["model"]["w"], tensor)


def fill(key: str, name: str) -> torch.Tensor | list[torch.Tensor]:
    tensor = TENSORS[name]
    return [tensor[:1], tensor[1:]] if name == "embedding.weight" else tensor


def test_what_was_written_is_read_back(tmp_path):
    path = rank_file(tmp_path, 0, 0, 1)
    other = {"args": argparse.Namespace(tensor_model_parallel_size=1), "checkpoint_version": 3.0, "iteration": 7}
    write_rank(path, {"model0": PLAN, "model1": PLAN}, fill, other)
    assert [p.name for p in path.parent.iterdir()] == ["model_optim_rng.pt"]
    # A context manager would remove what megatron-core itself has declared safe.
    torch.serialization.add_safe_globals([argparse.Namespace])
    loaded = torch.load(path, weights_only=True)
    assert loaded["args"] == other["args"] and loaded["iteration"] == 7
    reader = LegacyReader(tmp_path)
    for part in ("model0", "model1"):
        for name, tensor in TENSORS.items():
            for read in (loaded[part][name], reader.ranks[0, 0][part][name]):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape) and torch.equal(read, tensor)
            assert loaded[part][name].untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(4, 2),
        torch.ones(4, 3).half(),
        torch.ones(3, 3),
        torch.ones(5, 3),
        [torch.ones(4, 3), torch.ones(1, 3)],
        [torch.ones(2, 3)],
        [],
        torch.ones(12),
    ],
)
def test_content_that_is_not_what_was_planned(tmp_path, content):
    path = rank_file(tmp_path, 0, 0, 1)
    plan = {"first": TensorInfo((2, 3), torch.float32), "w": TensorInfo((4, 3), torch.float32)}
    with pytest.raises(FileError, match="^w: "):
        write_rank(path, {"model": plan}, lambda key, name: torch.ones(2, 3) if name == "first" else content, {})
    assert not path.exists()


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "open", lambda *_: FullDisk(), raising=False)
    plan = {name: TensorInfo((9999,), torch.float32) for name in ("one", "other")}
    with pytest.raises(OSError) as error:
        write_rank(rank_file(tmp_path, 0, 0, 1), {"model": plan}, lambda key, name: torch.ones(9999), {})
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    with pytest.raises(OSError) as error:
        save_file({"x": torch.ones(9999)}, FullDisk())
    assert error.value.errno == errno.ENOSPC


@pytest.mark.slow
def test_memory(tmp_path):
    """160 MB in eight tensors are written and read."""
    code = """
plan = {f"t{i}": TensorInfo((5, 2**20), torch.float32) for i in range(8)}
begin()
file = path / "mp_rank_00" / "model_optim_rng.pt"
legacy.write_rank(file, {"model": plan}, lambda key, name: torch.full((5, 2**20), float(name[1])), {})
read = legacy.LegacyReader(path).ranks[0, 0]["model"]
assert [tensor.sum().item() for tensor in read.values()] == [i * 5 * 2.0**20 for i in range(8)]
"""
    assert peak_growth(code, tmp_path) < 2 * 20 * MB + 8 * MB
    shutil.rmtree(tmp_path)

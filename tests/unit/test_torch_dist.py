# SPDX-License-Identifier: Apache-2.0
import argparse
import collections
import enum
import errno
import io
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peak_memory import MB, is_view_of, peak_growth

from bitcpm_megatron.checkpoint_tools.storage import torch_dist_writer
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError, TensorInfo
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_reader import TorchDistReader, read_common
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_writer import Chunk, TorchDistWriter
from bitcpm_megatron.checkpoints.safe_load import StandIn, plain
from bitcpm_megatron.files import FileError

LAYERS = torch.arange(3 * 8 * 5).reshape(3, 8, 5).to(torch.bfloat16)


class Color(enum.Enum):
    """An enum like those in the arguments of Megatron runs."""

    RED = 1


def pieces(key: str, tensor: torch.Tensor, grid: tuple[int, ...]) -> list[Chunk]:
    """Returns a tensor as a grid of chunks."""
    sizes = tuple(n // parts for n, parts in zip(tensor.shape, grid, strict=True))
    chunks = []
    for place in np.ndindex(*grid):
        offsets = tuple(i * n for i, n in zip(place, sizes, strict=True))
        index = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
        chunks.append(Chunk(key, tuple(tensor.shape), offsets, sizes, tensor.dtype, lambda index=index: tensor[index]))
    return chunks


def write(directory: Path, chunks: list[Chunk], common: dict | None = None, **options) -> Path:
    directory.mkdir(exist_ok=True)
    TorchDistWriter(directory, common or {}, **options).write(chunks)
    return directory


def stacked(directory: Path) -> Path:
    """Writes three layers of two tensor-parallel ranks, one layer per file, and a vector."""
    vector = Chunk("vector", (7,), (0,), (7,), torch.float32, lambda: torch.arange(7.0))
    return write(directory, [*pieces("layers", LAYERS, (3, 2, 1)), vector], max_file_size=80)


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(FileError) as error:
        TorchDistReader(directory)
    for word in words:
        assert word in str(error.value)


def test_what_was_written_is_read_back(tmp_path):
    seen = []
    chunks = pieces("layers", LAYERS, (3, 2, 1))
    write(tmp_path, chunks, {"iteration": 3}, max_file_size=160, on_bytes=seen.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__0_1.distcp",
        "common.pt",
        "metadata.json",
    ]
    assert seen == [40] * 6 == [chunk.nbytes for chunk in chunks]
    reader = TorchDistReader(tmp_path)
    assert reader.tensors() == {"layers": TensorInfo((3, 8, 5), torch.bfloat16)}
    assert reader.objects == []
    assert reader.chunks("layers") == [((i, j, 0), (1, 4, 5)) for i in range(3) for j in (0, 4)]
    assert torch.equal(reader.read("layers"), LAYERS)
    assert read_common(tmp_path) == {"iteration": 3}


def test_the_same_checkpoint_is_the_same_bytes_wherever_it_is_written(tmp_path):
    one, other = (stacked(tmp_path / name) for name in ("one", "other"))
    names = [path.name for path in one.iterdir()]
    assert ".metadata" in names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


slices = st.builds(slice, *[st.one_of(st.none(), st.integers(-7, 7))] * 2)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 6])),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn]),
    data=st.data(),
)
def test_any_piece_of_any_grid(tmp_path_factory, grid, dtype, data):
    directory = tmp_path_factory.mktemp("iter")
    tensor = torch.randint(-100, 100, (3, 4, 6)).to(dtype)
    write(directory, pieces("t", tensor, grid), max_file_size=data.draw(st.sampled_from([1, 30, 10**9])))
    reader = TorchDistReader(directory)
    for _ in range(4):
        index = tuple(
            data.draw(st.one_of(slices, st.integers(-size, size - 1)))
            for size in tensor.shape[: data.draw(st.integers(0, 3))]
        )
        read, expected = reader.read("t", index), tensor[index]
        assert read.shape == expected.shape and read.dtype == dtype
        assert torch.equal(read.float(), expected.float())
    shutil.rmtree(directory)


def test_indices_that_a_tensor_does_not_have(tmp_path):
    reader = TorchDistReader(stacked(tmp_path))
    for index in ((3,), (-4,), (0, 0, 0, 0), (slice(None, None, 2),)):
        with pytest.raises(IndexError):
            reader.read("layers", index)
    with pytest.raises(FileError, match="no tensor other"):
        reader.read("other")


def test_a_piece_of_one_chunk_is_a_view(tmp_path):
    """This holds also if a whole stack of layers is one chunk, as some tools save it."""
    write(tmp_path, [Chunk("small", (1,), (0,), (1,), torch.int8, lambda: torch.ones(1, dtype=torch.int8))])
    write(tmp_path / "a", [*pieces("odd", torch.ones(3, dtype=torch.int8), (1,)), *pieces("t", LAYERS, (1, 1, 1))])
    reader = TorchDistReader(tmp_path / "a")
    piece = reader.read("t", (2, slice(3, 5)))
    assert torch.equal(piece, LAYERS[2, 3:5])
    assert is_view_of(piece, tmp_path / "a" / "__0_0.distcp")


@pytest.mark.slow
def test_what_megatron_core_saves(tmp_path, single_rank):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    layers = [torch.randn(6, 5).bfloat16() for _ in range(3)]
    state = {
        f"layer{i}": ShardedTensor.from_rank_offsets("decoder.layers.weight", layer, (0, i, 3), prepend_axis_num=1)
        for i, layer in enumerate(layers)
    }
    tensors = {
        "embedding": torch.randn(7, 3),
        "odd": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "wide": torch.arange(4, dtype=torch.int64),
        "eight": torch.ones(2, 2).to(torch.float8_e4m3fn),
    }
    state.update({name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()})
    state["rng"] = ShardedObject("rng_state", [np.random.get_state()], (1, 1), (0, 0))
    state["args"] = argparse.Namespace(color=Color.RED, lr=np.float64(1), seed=3, path=Path("/x"), dtype=torch.bfloat16)
    state["iteration"] = 7
    dist_checkpointing.save(state, str(tmp_path))

    reader = TorchDistReader(tmp_path)
    assert reader.objects == ["rng_state/shard_0.0_1.1"]
    assert reader.tensors()["decoder.layers.weight"] == TensorInfo((3, 6, 5), torch.bfloat16)
    assert reader.chunks("decoder.layers.weight") == [((i, 0, 0), (1, 6, 5)) for i in range(3)]
    assert torch.equal(reader.read("decoder.layers.weight"), torch.stack(layers))
    assert torch.equal(reader.read("decoder.layers.weight", (1, slice(2, 4))), layers[1][2:4])
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(read.double(), tensor.double())
    common = read_common(tmp_path)
    assert common["iteration"] == 7
    assert common["args"].seed == 3 and common["args"].dtype is torch.bfloat16
    assert isinstance(common["args"].color, StandIn)
    assert plain(common["args"])["color"] == f"<{__name__}.Color(1,)>"


@pytest.mark.slow
def test_megatron_core_loads_it(tmp_path, single_rank):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    vector = torch.arange(7.0)
    arguments = argparse.Namespace(hidden_size=5, name="x", sizes=[1, 2])
    chunks = [*pieces("layers", LAYERS, (3, 2, 1)), *pieces("vector", vector, (1,))]
    write(tmp_path, chunks, {"args": arguments, "iteration": 5, "checkpoint_version": 3.0}, max_file_size=100)
    assert dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path))
    state = {
        f"layer{i}": ShardedTensor.from_rank_offsets(
            "layers", torch.zeros(8, 5).bfloat16(), (0, i, 3), prepend_axis_num=1
        )
        for i in range(3)
    }
    state["vector"] = ShardedTensor.from_rank_offsets("vector", torch.zeros(7))
    loaded = dist_checkpointing.load(state, str(tmp_path), strict="raise_all")
    for i, layer in enumerate(LAYERS):
        assert torch.equal(loaded[f"layer{i}"], layer)
    assert torch.equal(loaded["vector"], vector)
    assert loaded["args"] == arguments and loaded["iteration"] == 5
    # The description equals megatron-core's own byte for byte.
    dist_checkpointing.save({"vector": state["vector"]}, str(_made(tmp_path / "theirs")))
    assert (tmp_path / "metadata.json").read_text() == (tmp_path / "theirs" / "metadata.json").read_text()


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_pytorch_loads_it_and_what_it_saves_is_read(tmp_path):
    state = {"layers": torch.zeros_like(LAYERS), "vector": torch.zeros(7)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=stacked(tmp_path), no_dist=True)
        assert torch.equal(state["layers"], LAYERS) and torch.equal(state["vector"], torch.arange(7.0))
        state = {"model": {"w": LAYERS, "strided": torch.arange(12.0).reshape(3, 4).t()}, "step": 3}
        dcp.save(state, checkpoint_id=tmp_path / "theirs", no_dist=True)
    reader = TorchDistReader(tmp_path / "theirs")
    assert torch.equal(reader.read("model.w", (1,)), LAYERS[1])
    assert torch.equal(reader.read("model.strided", (slice(1, 3),)), state["model"]["strided"][1:3])
    assert reader.objects == ["step"]


def test_tensors_that_cannot_be_mapped_are_loaded(tmp_path, monkeypatch):
    save = torch.save

    def save_odd(value, file):
        save(torch.nn.Parameter(value) if isinstance(value, torch.Tensor) else value, file)

    monkeypatch.setattr(torch, "save", save_odd)
    reader = TorchDistReader(write(tmp_path, pieces("t", LAYERS.float(), (3, 1, 1))))
    assert torch.equal(reader.read("t", (slice(1, 3), 2)), LAYERS.float()[1:3, 2])


def test_no_checkpoint(tmp_path):
    refused(tmp_path, str(tmp_path), ".metadata")


def test_missing_file(tmp_path):
    (stacked(tmp_path) / "__0_1.distcp").unlink()
    refused(tmp_path, "__0_1.distcp", "layers")


def test_truncated_file(tmp_path):
    file = stacked(tmp_path) / "__0_2.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, "__0_2.distcp", "layers", "truncated")


def test_damaged_chunk(tmp_path):
    file = stacked(tmp_path) / "__0_0.distcp"
    content = file.read_bytes()
    for damaged in (bytes(len(content)), content[:-22] + bytes(22), content.replace(b"BFloat16", b"CFloat16")):
        file.write_bytes(damaged)
        with pytest.raises(FileError, match=r"__0_0.distcp: layers: .* damaged"):
            TorchDistReader(tmp_path).read("layers", (0,))


def change_metadata(directory: Path, change) -> None:
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_chunk_of_another_tensor(tmp_path):
    def swap(metadata):
        places = {(index.fqn, index.offset): index for index in metadata.storage_data}
        stolen = metadata.storage_data[places["vector", (0,)]]
        metadata.storage_data[places["layers", (1, 4, 0)]] = stolen

    change_metadata(stacked(tmp_path), swap)
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("layers", (1, slice(4))), LAYERS[1, :4])
    with pytest.raises(FileError, match=r"layers: .*\(7,\), torch.float32 in place of \(1, 4, 5\)"):
        reader.read("layers")


def test_chunk_that_was_not_saved(tmp_path):
    change_metadata(stacked(tmp_path), lambda metadata: metadata.state_dict_metadata["layers"].chunks.pop(3))
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("layers", (0,)), LAYERS[0])
    with pytest.raises(FileError, match="layers: its chunks do not make up the tensor"):
        reader.read("layers")


def test_compressed_chunk(tmp_path):
    file = write(tmp_path, pieces("t", LAYERS, (1, 1, 1))) / "__0_0.distcp"
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    change_metadata(
        tmp_path, lambda metadata: next(iter(metadata.storage_data.values())).__setattr__("length", file.stat().st_size)
    )
    with pytest.raises(FileError, match=r"__0_0.distcp: t: .* is compressed, and torch.save never does that"):
        TorchDistReader(tmp_path).read("t", (1,))


def test_chunks_that_overlap(tmp_path):
    """One chunk replaces another: the number of elements is right, but some were never written."""

    def twice(metadata):
        chunks = metadata.state_dict_metadata["layers"].chunks
        chunks[1] = chunks[0]

    change_metadata(stacked(tmp_path), twice)
    with pytest.raises(FileError, match="layers: its chunks do not make up the tensor"):
        TorchDistReader(tmp_path).read("layers")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_metadata_is_never_a_crash(tmp_path_factory, data):
    directory = tmp_path_factory.getbasetemp() / "damaged"
    if not directory.exists():
        stacked(directory)
        shutil.copy(directory / ".metadata", directory / "good")
    content = bytearray((directory / "good").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (directory / ".metadata").write_bytes(content)
    try:
        reader = TorchDistReader(directory)
        for name in reader.tensors():
            reader.read(name)
    except FileError as error:
        assert str(directory) in str(error)


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, function, marker: Path) -> None:
        self.function, self.marker = function, marker

    def __reduce__(self):
        argument = f"open({str(self.marker)!r}, 'w')" if self.function is exec else f"touch {self.marker}"
        return self.function, (argument,)


@pytest.mark.parametrize("function", [exec, os.system])
def test_metadata_with_code(tmp_path, function):
    marker = tmp_path / "ran"
    (stacked(tmp_path) / ".metadata").write_bytes(pickle.dumps(Payload(function, marker)))
    refused(tmp_path, ".metadata", "made to harm")
    assert not marker.exists()


@pytest.mark.slow
def test_common_with_code(tmp_path, capsys):
    marker, path = tmp_path / "ran", tmp_path / "common.pt"
    torch.save({"args": Payload(exec, marker)}, path)
    assert isinstance(read_common(tmp_path)["args"], StandIn)  # an inert object
    torch.save({"args": Payload(os.system, marker)}, path)
    with pytest.raises(FileError, match="common.pt.*--allow-pickle"):
        read_common(tmp_path)  # PyTorch refuses this module under any name
    assert not marker.exists() and capsys.readouterr().err == ""
    read_common(tmp_path, allow_pickle=True)
    assert marker.exists() and "common.pt" in capsys.readouterr().err


def test_chunk_with_code(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, file: save(Payload(exec, marker), file))
    reader = TorchDistReader(write(tmp_path, pieces("t", LAYERS, (1, 1, 1))))
    with pytest.raises(FileError, match="damaged"):
        reader.read("t")
    assert not marker.exists()


def test_chunks_outside_the_checkpoint(tmp_path):
    directory = stacked(tmp_path / "iter")
    shutil.copy(directory / "__0_0.distcp", tmp_path / "__0_x.distcp")
    content = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(content.replace(b"\x0c__0_0.distcp", b"\x0f../__0_x.distcp"))
    with pytest.raises(FileError, match="outside"):
        TorchDistReader(directory)


def test_containers_of_other_kinds(tmp_path):
    state = {"a": collections.defaultdict(list, {1: [2]}), "b": collections.deque([3]), "c": {4}, "d": complex(5)}
    torch.save(state, tmp_path / "common.pt")
    assert read_common(tmp_path) == {"a": {1: [2]}, "b": [3], "c": {4}, "d": 5}


def test_what_other_libraries_declared_safe_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"args": Payload(exec, marker)}, tmp_path / "common.pt")
    with torch.serialization.safe_globals([exec]):
        assert isinstance(read_common(tmp_path)["args"], StandIn)
        assert exec in torch.serialization.get_safe_globals()
    assert not marker.exists()


def test_common_as_an_entry(tmp_path):
    """megatron-core 0.19 writes no common.pt."""
    args = argparse.Namespace(hidden_size=8, color=Color.RED)
    writer = TorchDistWriter(tmp_path, {})
    writer.write(pieces("t", LAYERS, (1, 1, 1)), {"common_state/shard_0_1": {"args": args, "iteration": 7}})
    (tmp_path / "common.pt").unlink()
    found = read_common(tmp_path)
    assert found["iteration"] == 7 and found["args"].hidden_size == 8 and isinstance(found["args"].color, StandIn)
    marker = tmp_path / "ran"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    objects = {"common_state/shard_0_1": {"args": Payload(os.system, marker)}}
    TorchDistWriter(tmp_path, {}).write(pieces("t", LAYERS, (1, 1, 1)), objects)
    (tmp_path / "common.pt").unlink()
    with pytest.raises(FileError, match="__0_0.distcp.*--allow-pickle"):
        read_common(tmp_path)
    assert not marker.exists()


def test_common_of_another_kind(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        read_common(tmp_path)
    torch.save([1], tmp_path / "common.pt")
    with pytest.raises(FileError, match="common.pt.*list"):
        read_common(tmp_path)
    content = (tmp_path / "common.pt").read_bytes()
    (tmp_path / "common.pt").write_bytes(content[:-100])
    with pytest.raises(FileError, match="common.pt.*truncated"):
        read_common(tmp_path)


def test_plans_that_are_wrong(tmp_path):
    chunks = pieces("t", LAYERS, (3, 1, 1))
    other = pieces("t", LAYERS.float(), (3, 1, 1))
    for number, wrong in enumerate(
        (
            chunks[:2],
            [*chunks, chunks[0]],
            [chunks[0], chunks[0], chunks[2]],
            [*chunks, *pieces("t", LAYERS, (1, 1, 1))],
            [*chunks[:2], other[2]],
            [*chunks[:2], Chunk("t", (3, 8, 5), (2, 0), (1, 8), torch.bfloat16, lambda: LAYERS[2:])],
            [*chunks[:2], Chunk("t", (3, 8, 5), (2, 0, 0), (1, 8, 5), torch.bfloat16, lambda: LAYERS[2])],
            [*chunks[:2], Chunk("t", (3, 8, 5), (2, 0, 0), (1, 8, 5), torch.bfloat16, lambda: LAYERS[2:].half())],
        )
    ):
        with pytest.raises(FileError):
            write(tmp_path / str(number), wrong)
        assert not (tmp_path / str(number) / "metadata.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ConversionError("why")])
def test_errors_of_producers_come_through(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        write(tmp_path, [Chunk("t", (1,), (0,), (1,), torch.int8, fail)])
    assert raised.value is error


class FullDisk(io.BytesIO):
    """A file that has room only for small records."""

    def write(self, data):
        if len(data) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    """PyTorch itself raises a RuntimeError."""
    monkeypatch.setattr(torch_dist_writer, "open", lambda *_: FullDisk(), raising=False)
    with pytest.raises(OSError) as error:
        write(tmp_path, [Chunk("t", (9999,), (0,), (9999,), torch.float32, lambda: torch.ones(9999))])
    assert error.value.errno == errno.ENOSPC


def test_views_are_saved_without_the_rest_of_their_storage(tmp_path):
    rows = torch.arange(2**20, dtype=torch.float32).reshape(2**10, 2**10)
    file = write(tmp_path, pieces("t", rows[8:16], (4, 1))) / "__0_0.distcp"
    assert file.stat().st_size < rows[8:16].nbytes + 4 * 4096
    assert torch.equal(TorchDistReader(tmp_path).read("t"), rows[8:16])


def test_files_are_plain_zips(tmp_path):
    """Memory maps of chunks require that elements are stored uncompressed, at multiples of 64 bytes."""
    file = write(tmp_path, pieces("t", LAYERS, (1, 1, 1))) / "__0_0.distcp"
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    assert TorchDistReader(tmp_path).read("t").data_ptr() % 64 == 0


@pytest.mark.slow
def test_memory(tmp_path):
    """160 MB, four tensors in chunks of 10 MB, are written and read by rows of chunks."""
    code = """
begin()
def chunks():
    for i in range(4):
        for j in range(4):
            yield torch_dist_writer.Chunk(f"t{i}", (4, 10, 2**18), (j, 0, 0), (1, 10, 2**18), torch.float32,
                                   lambda j=j: torch.full((1, 10, 2**18), float(j)))
torch_dist_writer.TorchDistWriter(path, {}, max_file_size=10**8).write(chunks())
reader = torch_dist_reader.TorchDistReader(path)
kept = [reader.read(f"t{i}", (j,)) for i in range(4) for j in range(4)]
assert [t.sum().item() for t in kept] == [j * 10 * 2.0**18 for i in range(4) for j in range(4)]
"""
    assert peak_growth(code, tmp_path) < 2 * 10 * MB + 8 * MB
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_memory_of_a_stack_that_is_one_chunk(tmp_path):
    code = """
torch_dist_writer.TorchDistWriter(path, {}).write(
    [torch_dist_writer.Chunk("t", (16, 10, 2**17), (0, 0, 0), (16, 10, 2**17), torch.float32,
                      lambda: torch.ones(16, 10, 2**17))])
begin()
reader = torch_dist_reader.TorchDistReader(path)
assert all(reader.read("t", (i,)).sum() == 10 * 2.0**17 for i in range(16))
"""
    assert peak_growth(code, tmp_path) < 5 * MB + 8 * MB
    shutil.rmtree(tmp_path)

# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peak_memory import MB, is_view_of, peak_growth

from bitcpm_megatron.checkpoint_tools.storage.hf_reader import HfReader
from bitcpm_megatron.checkpoint_tools.storage.reader import TensorInfo
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter, parse_size, row_blocks
from bitcpm_megatron.files import FileError, digest

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b": torch.arange(5, dtype=torch.uint8),
    "c": torch.arange(6).reshape(3, 2).to(torch.bfloat16),
}
INDEX = "model.safetensors.index.json"


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(directory: Path, tensors: dict[str, torch.Tensor] = TENSORS, max_shard_size: int = 10**9) -> Path:
    directory.mkdir(exist_ok=True)
    with SafetensorsWriter(directory, plan_of(tensors), max_shard_size) as writer:
        for name, tensor in tensors.items():
            writer.write(name, row_blocks(tensor, 7))
    return directory


def sharded(directory: Path) -> Path:
    """Writes a model with one tensor per shard."""
    return write(directory, max_shard_size=1)


def refused(path: Path, *words: str) -> str:
    with pytest.raises(FileError) as error:
        HfReader(path)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


dtypes = st.sampled_from(
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]
    + [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]
)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), dtypes), min_size=1, max_size=6),
    limit=st.integers(1, 300),
    block=st.integers(1, 50),
    backwards=st.booleans(),
)
def test_what_was_written_is_read_back(tmp_path_factory, tensors, limit, block, backwards):
    directory = tmp_path_factory.mktemp("model")
    content = {}
    for number, (shape, dtype) in enumerate(tensors):
        raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
        content[f"layer.{number}"] = raw.view(dtype).squeeze(-1)
    with SafetensorsWriter(directory, plan_of(content), limit) as writer:
        for name in reversed(content) if backwards else content:
            writer.write(name, row_blocks(content[name], block))
    files = sorted(directory.glob("*.safetensors"))
    assert all(entry == digest(directory / file) for file, entry in writer.digests.items())
    if not backwards and len({dtype for _, dtype in tensors}) == 1:
        assert writer.digests.keys() == {file.name for file in files}
    loaded = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    reader = HfReader(directory)
    assert loaded.keys() == content.keys() == reader.tensors().keys()
    for name, tensor in content.items():
        for other in (loaded[name], reader.read(name)):
            assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
            # Bits are compared, because some values are NaN.
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    for file in files:
        (length,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert length % 8 == 0
        assert json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"] == {"format": "pt"}
        held = [content[name].nbytes for name in safetensors.torch.load_file(file)]
        assert sum(held) <= limit or len(held) == 1 or sum(sorted(held)[:-1]) == 0
    if len(files) > 1:
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in content.values())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    else:
        assert [path.name for path in directory.iterdir()] == ["model.safetensors"]


def test_transformers_loads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    write(tmp_path, {name: tensor.detach() for name, tensor in model.state_dict().items()}, parse_size("4KB"))
    config.save_pretrained(tmp_path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_pieces_are_views_of_the_files(tmp_path):
    reader = HfReader(sharded(tmp_path))
    assert torch.equal(reader.read("a", (slice(1, 3),)), TENSORS["a"][1:3])
    assert torch.equal(reader.read("c", (1,)), TENSORS["c"][1])
    assert is_view_of(reader.read("a", (slice(2, 3),)), tmp_path / "model-00001-of-00003.safetensors")


def test_unaligned_tensors_are_copied_right(tmp_path):
    # The format permits tensors at any offset; here they begin after 3 bytes.
    data = [torch.arange(3, dtype=torch.uint8), TENSORS["a"], TENSORS["c"]]
    header, end, blob = {}, 0, b""
    for name, dtype, tensor in zip("xac", ("U8", "F32", "BF16"), data, strict=True):
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        blob += tensor.view(torch.uint8).numpy().tobytes()
        end += tensor.nbytes
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)
    reader = HfReader(path)
    for index in ((), (1,), (slice(1, 3), 2), (slice(None), slice(0, 2)), (3, 1)):
        piece = reader.read("a", index)
        assert torch.equal(piece, TENSORS["a"][index]) and piece.data_ptr() % 4 == 0
    assert torch.equal(reader.read("c", (slice(2),)), TENSORS["c"][:2])


def test_a_file_larger_than_memory(tmp_path):
    """The file is sparse, and only one row is stored on the disk."""
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    header = {"a": {"dtype": "BF16", "shape": [rows, 2**19], "data_offsets": [0, rows * 2**20]}}
    path = tmp_path / "x.safetensors"
    write_header(path, header, 0)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + rows * 2**20)
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")
    piece = HfReader(path).read("a", (slice(rows - 1, rows),))
    assert piece.shape == (1, 2**19) and piece[0, -2:].tolist() == [0.0, 1.0]


def test_the_file_that_transformers_would_choose(tmp_path):
    sharded(tmp_path)
    torch.save({"bin": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert HfReader(tmp_path).tensors().keys() == TENSORS.keys()
    safetensors.torch.save_file({"single": torch.ones(1)}, tmp_path / "model.safetensors")
    assert HfReader(tmp_path).tensors().keys() == {"single"}


def test_no_weights(tmp_path):
    refused(tmp_path, str(tmp_path), "model.safetensors")
    refused(tmp_path / "nowhere", "nowhere")


def test_missing_shard(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors", "with b")


@pytest.mark.parametrize("lost", [1, 20, 45, 10**9])
def test_truncated_shard(tmp_path, lost):
    file = sharded(tmp_path) / "model-00001-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: max(0, len(content) - lost)])
    message = refused(tmp_path, "model-00001-of-00003.safetensors", "copy")
    assert "truncated" in message


def test_shard_that_becomes_shorter(tmp_path):
    reader = HfReader(write(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileError, match="model.safetensors: b: .*shorter"):
        reader.read("b")


def test_trailing_bytes(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    refused(tmp_path, "model.safetensors", "longer")


def test_damaged_header(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[12:16] = b"\xff" * 4
    file.write_bytes(content)
    refused(tmp_path, "model.safetensors", "header")
    file.write_bytes(file.read_bytes()[:8] + content[8:].replace(b"[4,3]", b"[4,4]"))
    refused(tmp_path, "model.safetensors")


def change_index(directory: Path, **changes: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"].update(changes)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file}
    (directory / INDEX).write_text(json.dumps(index))


def test_index_names_what_the_shard_does_not_hold(tmp_path):
    change_index(sharded(tmp_path), ghost="model-00002-of-00003.safetensors")
    refused(tmp_path, "model-00002-of-00003.safetensors", "does not hold ghost")


def test_shard_holds_what_the_index_does_not_name(tmp_path):
    safetensors.torch.save_file(
        {"b": TENSORS["b"], "extra": torch.ones(1)}, sharded(tmp_path) / "model-00002-of-00003.safetensors"
    )
    refused(tmp_path, "model-00002-of-00003.safetensors", "holds extra", "stale")


def test_tensor_in_two_shards(tmp_path):
    safetensors.torch.save_file(
        {"b": TENSORS["b"], "a": torch.ones(1)}, sharded(tmp_path) / "model-00002-of-00003.safetensors"
    )
    refused(tmp_path, "model-00002-of-00003.safetensors", "holds a,", "model-00001-of-00003.safetensors")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": []}}']
)
def test_index_that_is_none(tmp_path, text):
    (sharded(tmp_path) / INDEX).write_text(text)
    refused(tmp_path, INDEX)


@pytest.mark.parametrize("where", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors", ""])
def test_index_that_names_files_outside(tmp_path, where):
    """A downloaded directory must not make a command read files outside it."""
    directory = tmp_path / "model"
    directory.mkdir()
    safetensors.torch.save_file(TENSORS, tmp_path / "outside.safetensors")
    name = where.replace("/outside", f"{tmp_path}/outside") if where.startswith("/") else where
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, name)}))
    refused(directory, INDEX, "lies outside the model")


def write_header(path: Path, header: object, nbytes: int = 64) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))


def entry(shape: object, first: object, behind: object) -> dict:
    return {"dtype": "U8", "shape": shape, "data_offsets": [first, behind]}


ONE = json.dumps(entry([64], 0, 64))
DAMAGED = "header is damaged ("
BAD_HEADERS = {
    "overlap": ({"a": entry([40], 0, 40), "b": entry([40], 24, 64)}, DAMAGED),
    "the same bytes": ({"a": entry([64], 0, 64), "b": entry([64], 0, 64)}, DAMAGED),
    "hole": ({"a": entry([30], 0, 30), "b": entry([30], 34, 64)}, DAMAGED),
    "negative": ({"a": entry([-64], 0, 64)}, DAMAGED),
    "two negative": ({"a": entry([-8, -8], 0, 64)}, DAMAGED),
    "fraction": ({"a": entry([64.0], 0, 64)}, DAMAGED),
    "text": ({"a": entry(["64"], 0, 64)}, DAMAGED),
    "boolean": ({"a": entry([True, 64], 0, 64)}, DAMAGED),
    "huge": ({"a": entry([2**70], 0, 64)}, DAMAGED),
    "huge product": ({"a": entry([2**62] * 64, 0, 64)}, DAMAGED),
    "many dimensions": ({"a": entry([1] * 100_000, 0, 64)}, DAMAGED),
    "another shape": ({"a": entry([63], 0, 64)}, DAMAGED),
    "offsets below 0": ({"a": entry([64], -64, 0)}, DAMAGED),
    "offsets backwards": ({"a": entry([64], 64, 0)}, DAMAGED),
    "fractional offsets": ({"a": entry([64], 0.0, 64.0)}, DAMAGED),
    "one offset": ({"a": {"dtype": "U8", "shape": [64], "data_offsets": [64]}}, DAMAGED),
    "no offsets": ({"a": {"dtype": "U8", "shape": [64]}}, DAMAGED),
    "dtype": ({"a": {"dtype": ["U8"], "shape": [64], "data_offsets": [0, 64]}}, DAMAGED),
    "dtype of nobody": ({"a": {"dtype": "Q7", "shape": [64], "data_offsets": [0, 64]}}, DAMAGED),
    "dtype of others": ({"a": {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}}, "F4"),
    "no object": ([1], DAMAGED),
    "entry that is none": ({"a": 1}, DAMAGED),
    "nested": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", DAMAGED),
    "twice": (f'{{"a":{ONE},"a":{ONE}}}'.encode(), "'a' stands there twice"),
    "no text": (b"\xff\xfe", DAMAGED),
    "none": (b"", DAMAGED),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_headers_that_lie(case, tmp_path):
    header, words = BAD_HEADERS[case]
    write_header(tmp_path / "model.safetensors", header)
    refused(tmp_path, "model.safetensors", words)


@pytest.mark.slow
def test_what_unfolds_is_refused_before_it_does(tmp_path):
    """The file has 500 MB of zeros in 500 KB; PyTorch itself never compresses files."""
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as pickled:
        for _ in range(500):
            pickled.write(bytes(2**20))
    code = f"""
begin()
from bitcpm_megatron.files import FileError
try:
    hf_reader.HfReader(Path({str(file)!r}))
except FileError as error:
    assert "data.pkl is compressed" in str(error)
else:
    raise AssertionError
"""
    assert peak_growth(code, tmp_path) < 50 * MB


@pytest.mark.parametrize("new_format", [True, False])
def test_bin(tmp_path, new_format):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    for reader in (HfReader(tmp_path), HfReader(tmp_path / "pytorch_model.bin")):
        assert reader.tensors() == plan_of(TENSORS)
        assert torch.equal(reader.read("a", (slice(1, 3), 0)), TENSORS["a"][1:3, 0])
    assert is_view_of(reader.read("a"), tmp_path / "pytorch_model.bin") == new_format


def test_sharded_bin(tmp_path):
    files = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(TENSORS)}
    for name, file in files.items():
        torch.save({name: TENSORS[name]}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert torch.equal(HfReader(tmp_path).read("c"), TENSORS["c"])
    (tmp_path / files["b"]).write_bytes((tmp_path / files["b"]).read_bytes()[:-30])
    refused(tmp_path, files["b"], "truncated")


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize("new_format", [True, False])
def test_bin_with_code_is_refused(tmp_path, capsys, new_format):
    file, marker = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"a": Payload(marker)}, file, _use_new_zipfile_serialization=new_format)
    refused(tmp_path, "pytorch_model.bin", "--allow-pickle")
    assert not marker.exists()
    with pytest.raises(FileError, match="not a dict of names and tensors"):
        HfReader(tmp_path, allow_pickle=True)
    assert marker.exists()
    assert "can run any code" in capsys.readouterr().err


def test_bin_that_is_something_else(tmp_path):
    torch.save({"model": TENSORS, "epoch": 1}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "model, epoch")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin")


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [torch.ones(3, 3)],
        [torch.ones(4, 3), torch.ones(1, 3)],
        [torch.ones(5, 3)],
        [torch.ones(4, 3).half()],
        [torch.ones(4, 2)],
        [torch.ones(12)],
        [torch.ones(3, 4).t()],
    ],
)
def test_blocks_that_do_not_make_up_the_tensor(tmp_path, blocks):
    writer = SafetensorsWriter(tmp_path, plan_of(TENSORS))
    writer.write("c", [TENSORS["c"]])
    with pytest.raises(FileError, match="^a: "):
        writer.write("a", blocks)
    writer.write("b", [TENSORS["b"]])
    with pytest.raises(FileError, match="not written: a$"):
        writer.close()
    writer.write("a", [TENSORS["a"]])
    writer.close()
    assert all(torch.equal(HfReader(tmp_path).read(name), tensor) for name, tensor in TENSORS.items())


def test_plan_and_tensors_must_agree(tmp_path):
    writer = SafetensorsWriter(tmp_path, plan_of(TENSORS))
    with pytest.raises(FileError, match="not in the plan"):
        writer.write("x", [])
    writer.write("a", [TENSORS["a"]])
    with pytest.raises(FileError, match="written already"):
        writer.write("a", [TENSORS["a"]])
    with pytest.raises(FileError, match="not written: b, c"):
        writer.close()
    with pytest.raises(FileError, match="complex128"):
        SafetensorsWriter(tmp_path, {"z": TensorInfo((1,), torch.complex128)})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        (" 1.5 kb ", 1500),
        ("1KiB", 1024),
        ("12", 12),
        ("7B", 7),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 G B", "5XB", "1e9", "5iB", "0.0001KB"])
def test_no_sizes(text):
    with pytest.raises(FileError, match="no size"):
        parse_size(text)


@pytest.mark.slow
def test_memory(tmp_path):
    """160 MB in four tensors are written in blocks of 4 MB, and read as whole tensors."""
    code = """
plan = {f"t{i}": TensorInfo((10, 2**20), torch.float32) for i in range(4)}
begin()
with safetensors_writer.SafetensorsWriter(path, plan, 10**8) as writer:
    for name, info in plan.items():
        writer.write(name, (torch.full((1, 2**20), float(row)) for row in range(10)))
reader = hf_reader.HfReader(path)
kept = [reader.read(name) for name in plan]
assert [tensor.sum(1).tolist() for tensor in kept] == [[row * 2.0**20 for row in range(10)]] * 4
"""
    assert peak_growth(code, tmp_path) < 2 * 4 * MB + 8 * MB
    shutil.rmtree(tmp_path)

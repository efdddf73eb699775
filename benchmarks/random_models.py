# SPDX-License-Identifier: Apache-2.0
"""Llamas of any size with random weights, and the ternary checkpoints that a run would save of them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bitcpm_megatron import QuantizerConfig, quantize
from bitcpm_megatron.checkpoint_tools.hf_model.config import LLAMA, config_for
from bitcpm_megatron.checkpoint_tools.storage.reader import ConversionError, TensorInfo
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_reader import TorchDistReader, read_common
from bitcpm_megatron.checkpoint_tools.storage.torch_dist_writer import Chunk, TorchDistWriter
from bitcpm_megatron.checkpoint_tools.tensor_map import MegatronTensor, megatron_tensors
from bitcpm_megatron.checkpoints.directory import RELEASE, TRACKER
from bitcpm_megatron.files import DIGESTS, fsync, write_digests, write_text
from bitcpm_megatron.models.architecture import Architecture
from bitcpm_megatron.quantization.record import SCALE_SUFFIX, QuantizerRecord

CONFIG = QuantizerConfig()
HEAD = 128
_BLOCK = 2**24
_OVERHEAD = 2**30


@dataclass(frozen=True)
class Model:
    """A synthetic model with random weights.

    Attributes:
        architecture: the architecture of the model.
        dtype: the dtype of its weights.
        directory: the directory in which it is stored.
    """

    architecture: Architecture
    dtype: torch.dtype
    directory: Path

    @property
    def tensors(self) -> list[MegatronTensor]:
        """The Megatron tensors of the model."""
        return megatron_tensors(self.architecture)

    @property
    def plan(self) -> dict[str, TensorInfo]:
        """The shape and dtype of every Hugging Face tensor, by name."""
        return {
            name: TensorInfo((rows, *t.shape[1:]), self.dtype)
            for t in self.tensors
            for name, rows in zip(t.parts, t.rows, strict=True)
        }

    @property
    def memory_bound(self) -> int:
        """The bytes of anonymous memory that a conversion may use: twice the largest tensor of a layer plus 1 GiB."""
        largest = max(info.nbytes for name, info in self.plan.items() if ".layers." in name)
        return 2 * largest + _OVERHEAD


def shape(nbytes: int, layers: int, vocab_size: int, itemsize: int) -> Architecture:
    """Returns a Llama of about ``nbytes``: heads of 128, about four query heads per key/value head, ffn 2.75 x hidden.

    Raises:
        ConversionError: if ``nbytes`` is too small for the layers and the vocabulary.
    """

    def of(hidden: int, ffn: int) -> Architecture:
        heads = hidden // HEAD
        groups = next(n for n in range(max(1, heads // 4), 0, -1) if heads % n == 0)
        return Architecture(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=HEAD,
            vocab_size=vocab_size,
            max_position_embeddings=4096,
            norm_epsilon=1e-5,
            rotary_base=10000.0,
            tied=False,
        )

    wanted = nbytes // itemsize
    hidden = HEAD
    while of(hidden + HEAD, (hidden + HEAD) * 11 // 4).parameter_count() <= wanted:
        hidden += HEAD
    ffn = hidden * 11 // 4
    spare = wanted - of(hidden, ffn).parameter_count()
    ffn += max(0, spare // (3 * hidden * layers)) // HEAD * HEAD
    if of(hidden, ffn).parameter_count() > wanted:
        raise ConversionError(f"a Llama of {layers} layers and {vocab_size} tokens has more than {nbytes} bytes")
    return of(hidden, ffn)


def write_model(model: Model) -> None:
    """Writes a Hugging Face model directory with random weights, block by block."""
    model.directory.mkdir()
    generator = torch.Generator().manual_seed(1)
    with SafetensorsWriter(model.directory, model.plan) as writer:
        for name, info in model.plan.items():
            writer.write(name, _random_rows(info, generator))
    config = config_for(LLAMA, model.architecture, {}, str(model.dtype).removeprefix("torch."))
    write_text(model.directory / "config.json", json.dumps(config))
    for path in model.directory.iterdir():
        fsync(path)


def write_ternary(model: Model, plain: Path, target: Path) -> None:
    """Writes the checkpoint that a ternary run on one tensor-parallel rank would save of a model's weights.

    It contains the quantizer record, and the scales in addition to the weights.

    Args:
        model: the model.
        plain: the model's ``torch_dist`` checkpoint without a quantizer.
        target: the new checkpoint directory.
    """
    source, release = plain / RELEASE, target / RELEASE
    rewritten = shutil.ignore_patterns("*.distcp", ".metadata", "common.pt", "metadata.json", DIGESTS)
    shutil.copytree(plain, target, ignore=rewritten)
    reader = TorchDistReader(source)
    linears = [t for t in model.tensors if t.quantizable]

    def scales(key: str, layer: int) -> torch.Tensor:
        return quantize(reader.read(key, (layer,)), CONFIG)[1].unsqueeze(0)

    def chunks() -> Iterator[Chunk]:
        for name, info in reader.tensors().items():
            for offsets, sizes in reader.chunks(name):
                piece = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
                read = partial(reader.read, name, piece)
                yield Chunk(name, info.shape, offsets, sizes, info.dtype, read)
        for t in linears:
            key, rows = f"decoder.layers.{t.suffix}", t.shape[0]
            shape = (model.architecture.num_layers, rows, 1)
            read = partial(scales, key, t.layer)
            yield Chunk(f"{key}{SCALE_SUFFIX}", shape, (t.layer, 0, 0), (1, rows, 1), torch.bfloat16, read)

    TorchDistWriter(release, read_common(source)).write(chunks(), dict.fromkeys(reader.objects))
    modules = {t.module: {"group_size": CONFIG.group_size} for t in linears}
    dtype = str(model.dtype).removeprefix("torch.")
    QuantizerRecord("latent", CONFIG.space, CONFIG.eps, dtype, 1, 16, modules).write(release)
    write_digests(release)
    write_text(target / TRACKER, RELEASE)


def _random_rows(info: TensorInfo, generator: torch.Generator) -> Iterator[torch.Tensor]:
    rows = max(1, _BLOCK * info.shape[0] // info.nbytes)
    for start in range(0, info.shape[0], rows):
        size = (min(rows, info.shape[0] - start), *info.shape[1:])
        yield torch.empty(size).normal_(0, 0.02, generator=generator).to(info.dtype)

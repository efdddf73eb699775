# SPDX-License-Identifier: Apache-2.0
"""Writer of Megatron checkpoints: ``torch_dist``, which loads at every parallel layout, or legacy files for one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...models.architecture import uneven
from ..hf_model.model import HfModel
from ..storage.reader import ConversionError, TensorInfo
from ..tensor_map import EMBEDDING, OTHER_NAMES, OUTPUT, MegatronTensor
from .legacy import rank_directory, write_rank

if TYPE_CHECKING:
    from ..storage.torch_dist_writer import Chunk

# The modules of a layer whose _extra_state megatron-core asks for when it loads: Transformer Engine's modules, and
# megatron-core's own modules under the same names.
_WITH_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class Layout:
    """Parallel layout of a checkpoint.

    Attributes:
        tp: the tensor-parallel size.
        pp: the pipeline-parallel size.
        vp: the number of virtual stages per pipeline rank, or None.
        transformer_impl: the ``--transformer-impl`` that will load legacy files, which decides the names of the norms.
    """

    tp: int = 1
    pp: int = 1
    vp: int | None = None
    transformer_impl: Literal["transformer_engine", "local"] = "transformer_engine"

    def check(self, model: HfModel, legacy: bool) -> None:
        """Checks that the layout divides a model; ``torch_dist`` needs only the chunks of the tensor-parallel size.

        Raises:
            ConversionError: if a size does not divide the model; the message names both.
        """
        a = model.architecture
        channels = a.num_attention_heads * a.kv_channels
        heads = {"key/value heads": a.num_query_groups} if legacy else {"query channels": channels}
        found = uneven({**heads, "ffn channels": a.ffn_hidden_size}, self.tp)
        if found is not None:
            raise ConversionError(f"--target-tensor-parallel-size {self.tp} does not divide the model's {found}")
        if legacy and a.num_layers % (self.pp * (self.vp or 1)):
            raise ConversionError(
                f"the model's {a.num_layers} layers cannot be split over {self.pp} x {self.vp or 1} stages"
            )


Digests = dict[str, dict[str, Any]]
"""Entries of ``DIGESTS.json`` by file name."""


def write_torch_dist(
    model: HfModel, directory: Path, common: Mapping[str, Any], rows: int, tp: int, on_bytes: Callable[[int], Any]
) -> Digests:
    """Writes a ``torch_dist`` checkpoint, in which layers are stacked and each layer is a chunk of its stack.

    Args:
        model: the model.
        directory: the iteration directory, which exists.
        common: the content of ``common.pt``.
        rows: the number of rows of the padded vocabulary.
        tp: the number of chunks of a row-parallel weight, from which tools infer the tensor-parallel size of the
            checkpoint; it loads at every size.
        on_bytes: a function that is called with the size of each piece that was written.

    Returns:
        The digests of the ``.distcp`` files.
    """
    from ..storage.torch_dist_writer import TorchDistWriter

    layers = model.architecture.num_layers
    extra = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}": None
        for module in _WITH_EXTRA_STATE
        for layer in range(layers)
    }
    return TorchDistWriter(directory, common, on_bytes=on_bytes).write(_chunks(model, rows, tp), extra)


def write_legacy(
    model: HfModel,
    directory: Path,
    common: Mapping[str, Any],
    rows: int,
    layout: Layout,
    on_bytes: Callable[[int], Any],
) -> Digests:
    """Writes a legacy checkpoint, with one ``model_optim_rng.pt`` per tensor- and pipeline-parallel rank.

    Args:
        model: the model.
        directory: the iteration directory, which exists.
        common: the values besides the weights that every file contains.
        rows: the number of rows of the padded vocabulary.
        layout: the parallel layout.
        on_bytes: a function that is called with the size of each tensor when it is written.

    Returns:
        The digests of the files.
    """
    digests = {}
    for stage, parts in _stages(model, layout).items():
        for rank in range(layout.tp):
            plan = {
                key: {name: _of_one_rank(model.info(t, rows), t, layout.tp) for name, t in names.items()}
                for key, names in parts.items()
            }

            def fill(
                key: str, name: str, parts: dict = parts, plan: dict = plan, rank: int = rank
            ) -> torch.Tensor | Iterator[torch.Tensor]:
                tensor, info = parts[key][name], plan[key][name]
                on_bytes(info.nbytes)
                if tensor.kind != "vocab":
                    return model.blocks(tensor, rank, layout.tp)
                first = rank * info.shape[0]
                return (model.read_rows(tensor, first + r.start, first + r.stop) for r in info.row_slices())

            file = f"{rank_directory(rank, stage, layout.pp)}/model_optim_rng.pt"
            digests[file] = write_rank(directory / file, plan, fill, common)
    return digests


def _chunks(model: HfModel, rows: int, tp: int) -> Iterator["Chunk"]:
    from ..storage.torch_dist_writer import Chunk

    layers = model.architecture.num_layers
    for tensor in model.tensors:
        info = model.info(tensor, rows)
        if tensor.kind == "vocab":
            for block in info.row_slices():
                sizes = (block.stop - block.start, info.shape[1])
                produce = partial(model.read_rows, tensor, block.start, block.stop)
                yield Chunk(tensor.name, info.shape, (block.start, 0), sizes, info.dtype, produce)
        elif tensor.layer is None:
            yield Chunk(tensor.name, info.shape, (0,), info.shape, info.dtype, partial(model.read, tensor))
        else:
            cuts = tp if tensor.kind == "row" else 1
            width = info.shape[-1] // cuts
            for part in range(cuts):
                yield Chunk(
                    f"decoder.layers.{tensor.suffix}",
                    (layers, *info.shape),
                    (tensor.layer, *[0] * (len(info.shape) - 1), part * width),
                    (1, *info.shape[:-1], width),
                    info.dtype,
                    partial(lambda *of: model.read(*of).unsqueeze(0), tensor, part, cuts),
                )


def _stages(model: HfModel, layout: Layout) -> dict[int, dict[str, dict[str, MegatronTensor]]]:
    """Returns pipeline rank -> model part (``model``, or ``model0``, ``model1``, ...) -> name in it -> tensor."""
    places = [(v, p) for v in range(layout.vp or 1) for p in range(layout.pp)]
    per_stage = model.architecture.num_layers // len(places)
    found: dict[int, dict[str, dict[str, MegatronTensor]]] = {}
    for place, (v, p) in enumerate(places):
        last = place == len(places) - 1
        names: dict[str, MegatronTensor] = {}
        for tensor in model.tensors:
            if tensor.layer is None:
                if place == 0 if tensor.name == EMBEDDING else last:
                    names[tensor.name] = tensor
            elif tensor.layer // per_stage == place:
                local = layout.transformer_impl == "local"
                suffix = OTHER_NAMES.get(tensor.suffix, tensor.suffix) if local else tensor.suffix
                names[f"decoder.layers.{tensor.layer - place * per_stage}.{suffix}"] = tensor
        if model.architecture.tied and layout.pp > 1 and last:
            # Megatron's last stage holds a copy of the tied embedding.
            names[OUTPUT] = next(t for t in model.tensors if t.name == EMBEDDING)
        found.setdefault(p, {})["model" if layout.vp is None else f"model{v}"] = names
    return found


def _of_one_rank(info: TensorInfo, tensor: MegatronTensor, tp: int) -> TensorInfo:
    shape = list(info.shape)
    if tensor.kind != "replicated":
        shape[1 if tensor.kind == "row" else 0] //= tp
    return TensorInfo(tuple(shape), info.dtype)

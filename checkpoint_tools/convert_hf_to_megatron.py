# SPDX-License-Identifier: Apache-2.0
"""Makes a Megatron checkpoint of a Hugging Face model: Llama, MiniCPM, Granite, or a latent export of this package.

    convert_hf_to_megatron.py --load-dir HF --save-dir OUT [--target-tensor-parallel-size N ...] [--format torch_dist]

OUT gets the directory ``release/`` (weights without optimizer state: training starts at iteration 0) and the tracker
that names it, for ``--pretrained-checkpoint OUT``, and ``model.yaml``, the model's flags for
``--model OUT/model.yaml``. ``torch_dist`` loads at every parallel layout, ``legacy`` at the one it was written for.
Everything about the model is read from its own ``config.json``, which goes into ``release/hf/`` with the tokenizer's
files, for the way back.

Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from tqdm import tqdm

from bitcpm_megatron.checkpoint_tools.command import add_common_arguments, dtype_of, run
from bitcpm_megatron.checkpoint_tools.hf_config import architecture_of, read_config
from bitcpm_megatron.checkpoint_tools.hf_files import HfReader
from bitcpm_megatron.checkpoint_tools.latent_export import read_record
from bitcpm_megatron.checkpoint_tools.legacy import rank_directory, write_rank
from bitcpm_megatron.checkpoint_tools.records import to_megatron
from bitcpm_megatron.checkpoint_tools.side_files import HF_DIRECTORY, copy_side_files
from bitcpm_megatron.checkpoint_tools.staging import staged
from bitcpm_megatron.checkpoint_tools.tensors import ConversionError, TensorInfo, TensorReader, check_finite
from bitcpm_megatron.checkpoint_tools.torch_dist import Chunk, TorchDistWriter
from bitcpm_megatron.checkpoint_tools.weights import (
    EMBEDDING,
    OTHER_NAMES,
    OUTPUT,
    MegatronTensor,
    join,
    megatron_tensors,
    padded_rows,
    shard,
)
from bitcpm_megatron.files import write_text
from bitcpm_megatron.models.architecture import Architecture
from bitcpm_megatron.models.arguments import arguments_of, flags_of
from bitcpm_megatron.quantization import fused_group_size
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.training.checkpoint_directory import RELEASE, TRACKER, write_arguments

MODEL_FILE = "model.yaml"
_VOCABULARY_BLOCK = 2**26
# Old Llama checkpoints hold these constants, which are computed from config.json.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass
class Source:
    """A Hugging Face model, checked against its own ``config.json``.

    Attributes:
        reader: its files.
        architecture: of its ``config.json``.
        tensors: what it becomes.
        dtype: to write, or None to keep each tensor's own.
        record: of its quantizer, by Megatron's module names, or None.
    """

    reader: TensorReader
    architecture: Architecture
    tensors: list[MegatronTensor]
    dtype: torch.dtype | None
    record: QuantizerRecord | None

    def dtype_of(self, tensor: MegatronTensor) -> torch.dtype:
        """Of the written tensor."""
        return self.dtype or self.reader.tensors()[tensor.parts[0]].dtype

    def read(self, tensor: MegatronTensor) -> torch.Tensor:
        """A whole Megatron tensor of a layer.

        Raises:
            ConversionError: it holds NaN or infinity.
        """
        parts = [self.reader.read(name) for name in tensor.parts]
        for name, part in zip(tensor.parts, parts, strict=True):
            check_finite(name, part)
        return join(tensor, parts, self.architecture.kv_channels).to(self.dtype_of(tensor))

    def read_rows(self, tensor: MegatronTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a vocabulary tensor; zeros beyond the vocabulary."""
        (name,) = tensor.parts
        rows = self.reader.read(name, (slice(start, min(stop, tensor.shape[0])),))
        check_finite(name, rows)
        missing = stop - max(start, tensor.shape[0])
        if missing > 0:
            rows = torch.cat((rows, rows.new_zeros(missing, tensor.shape[1])))
        return rows.to(self.dtype_of(tensor))


def open_source(directory: Path, dtype: torch.dtype | None, allow_pickle: bool) -> Source:
    """Opens a model directory and checks that it holds what its ``config.json`` describes, and nothing else.

    Raises:
        ConversionError: lists every missing, unexpected or misshapen tensor.
    """
    config = read_config(directory)
    architecture = architecture_of(config)
    arguments_of(architecture)
    reader = HfReader(directory, allow_pickle)
    infos = reader.tensors()
    tensors = megatron_tensors(architecture)
    expected = {
        name: TensorInfo((rows, *t.shape[1:]), torch.float32)
        for t in tensors
        for name, rows in zip(t.parts, t.rows, strict=True)
    }
    wrong = [f"{name}: missing" for name in expected if name not in infos]
    wrong += [
        f"{name}: shape {list(infos[name].shape)}, config.json says {list(info.shape)}"
        for name, info in expected.items()
        if name in infos and infos[name].shape != info.shape
    ]
    leftover = [name for name in infos if name not in expected and not name.endswith(_COMPUTED)]
    if architecture.tied and "lm_head.weight" in leftover:
        leftover.remove("lm_head.weight")
        _check_tied(reader)
    wrong += [f"{name}: not part of the model that config.json describes" for name in leftover]
    if wrong:
        shown = "\n  ".join([*wrong[:20], *([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else [])])
        raise ConversionError(f"{directory} does not hold the model that its config.json describes:\n  {shown}")
    found = read_record(directory)
    source = Source(reader, architecture, tensors, dtype, None if found is None else to_megatron(found, tensors))
    _check_dtypes(source)
    return source


def convert(
    source: Source,
    out: Path,
    *,
    load_dir: Path,
    layout: str,
    tp: int,
    pp: int,
    vp: int | None,
    divisible_by: int,
    transformer_impl: str,
) -> None:
    """Writes the checkpoint directory; it appears whole or not at all."""
    rows = padded_rows(source.architecture.vocab_size, divisible_by * tp)
    arguments = _arguments(source, rows, tp, pp, vp, divisible_by)
    total = sum(_stored(source, t, rows).nbytes for t in source.tensors)
    record = _record_of_fused(source) if source.record is None else source.record
    with staged(out, total) as directory, tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        release = directory / RELEASE
        release.mkdir()
        common = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0}
        if layout == "torch_dist":
            TorchDistWriter(release, common, on_bytes=bar.update).write(_chunks(source, rows, tp), _extra_states(source))
        else:
            _write_legacy(source, release, common, rows, tp, pp, vp, transformer_impl, bar.update)
        write_arguments(release, arguments)
        if record is not None:
            record.write(release)
        (release / HF_DIRECTORY).mkdir()
        copy_side_files(load_dir, release / HF_DIRECTORY)
        write_text(release / HF_DIRECTORY / "config.json", json.dumps(read_config(load_dir), indent=2) + "\n")
        preset = {
            "description": f"converted from {load_dir.name}",
            "vocab-size": source.architecture.vocab_size,
            "flags": flags_of(source.architecture),
        }
        write_text(directory / MODEL_FILE, yaml.safe_dump(preset, sort_keys=False, default_flow_style=None, width=120))
        write_text(directory / TRACKER, RELEASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load-dir", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--save-dir", type=Path, required=True, help="directory to make")
    parser.add_argument("--format", choices=("torch_dist", "legacy"), default="torch_dist")
    parser.add_argument("--target-tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--target-pipeline-parallel-size", type=int, default=1, metavar="M")
    parser.add_argument(
        "--target-virtual-pipeline-parallel-size", type=int, metavar="V", help="virtual stages per rank (legacy)"
    )
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="ROWS")
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="legacy: whose names the norms get, of the --transformer-impl that will load it",
    )
    add_common_arguments(parser)
    args = parser.parse_args(argv)

    def work() -> None:
        source = open_source(args.load_dir, dtype_of(args.dtype), args.allow_pickle)
        tp, pp, vp = (
            args.target_tensor_parallel_size,
            args.target_pipeline_parallel_size,
            args.target_virtual_pipeline_parallel_size,
        )
        _check_layout(source.architecture, tp, pp, vp, args.format, args.make_vocab_size_divisible_by)
        convert(
            source,
            args.save_dir,
            load_dir=args.load_dir,
            layout=args.format,
            tp=tp,
            pp=pp,
            vp=vp,
            divisible_by=args.make_vocab_size_divisible_by,
            transformer_impl=args.transformer_impl,
        )
        a = source.architecture
        print(
            f"{args.save_dir}: {a.parameter_count():,} parameters, {args.format}"
            + (f", TP {tp} x PP {pp}" + (f" x VPP {vp}" if vp else "") if args.format == "legacy" else "")
        )

    return run(work)


def _check_layout(a: Architecture, tp: int, pp: int, vp: int | None, layout: str, divisible_by: int) -> None:
    if min(tp, pp, vp or 1, divisible_by) < 1:
        raise ConversionError("parallel sizes and --make-vocab-size-divisible-by must be 1 or more")
    wrong = [
        f"{size} {what}"
        for what, size in (("key/value heads", a.num_query_groups), ("ffn channels", a.ffn_hidden_size))
        if size % tp
    ]
    if wrong:
        raise ConversionError(f"--target-tensor-parallel-size {tp} does not divide the model's {' and '.join(wrong)}")
    if a.num_layers % (pp * (vp or 1)):
        raise ConversionError(f"the model's {a.num_layers} layers cannot be split over {pp} x {vp or 1} stages")
    if vp is not None and (layout == "torch_dist" or pp == 1):
        raise ConversionError(
            "--target-virtual-pipeline-parallel-size concerns --format legacy with several pipeline stages: torch_dist "
            "loads at every layout"
        )


def _arguments(source: Source, rows: int, tp: int, pp: int, vp: int | None, divisible_by: int) -> dict[str, Any]:
    dtype = source.dtype_of(source.tensors[1])
    return {
        **arguments_of(source.architecture),
        "vocab_size": source.architecture.vocab_size,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": divisible_by,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "num_virtual_stages_per_pipeline_rank": vp,
        "expert_model_parallel_size": 1,
        "data_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }


def _stored(source: Source, tensor: MegatronTensor, rows: int) -> TensorInfo:
    shape = (rows, *tensor.shape[1:]) if tensor.kind == "vocab" else tensor.shape
    return TensorInfo(shape, source.dtype_of(tensor))


def _check_dtypes(source: Source) -> None:
    """``torch_dist`` stacks layers, and one Megatron tensor is made of several: these must have one dtype."""
    by_name: dict[str, set[torch.dtype]] = {}
    for tensor in source.tensors:
        by_name.setdefault(tensor.suffix, set()).update(source.reader.tensors()[part].dtype for part in tensor.parts)
    mixed = [name for name, dtypes in by_name.items() if len(dtypes) > 1]
    if mixed and source.dtype is None:
        raise ConversionError(
            f"{', '.join(mixed)} come in several dtypes, which Megatron stores in one tensor: choose one with --dtype"
        )
    latent = source.record is not None and source.record.state == "latent"
    if latent and source.dtype not in (None, getattr(torch, source.record.latent_dtype)):
        raise ConversionError(
            f"--dtype would change the {source.record.latent_dtype} latent weights, and with them what they are "
            "quantized to: leave it out"
        )


def _check_tied(reader: TensorReader) -> None:
    names = "model.embed_tokens.weight", "lm_head.weight"
    infos = [reader.tensors()[name] for name in names]
    rows = max(1, _VOCABULARY_BLOCK // max(1, infos[0].nbytes // max(1, infos[0].shape[0])))
    same = infos[0] == infos[1]
    for start in range(0, infos[0].shape[0], rows):
        piece = (slice(start, start + rows),)
        same = same and torch.equal(reader.read(names[0], piece), reader.read(names[1], piece))
    if not same:
        raise ConversionError("config.json ties the embeddings, and lm_head.weight differs from embed_tokens.weight")


def _record_of_fused(source: Source) -> QuantizerRecord | None:
    """The record of weights that are ternary already and say so nowhere; None for ordinary ones.

    Raises:
        ConversionError: some linears are ternary and some are not: half of a fused model is nothing to train from.
    """
    linears = [t for t in source.tensors if t.quantizable]
    groups = {}
    for tensor in linears:
        sizes = [fused_group_size(source.reader.read(part)) for part in tensor.parts]
        if all(sizes):
            # What holds for the whole is the group that divides all parts' groups: they have the same row.
            groups[tensor.module] = min(sizes, key=lambda g: tensor.shape[1] if g == -1 else g)
        elif not groups:
            return None
    if len(groups) < len(linears):
        latent = [t.module for t in linears if t.module not in groups]
        raise ConversionError(
            f"{len(groups)} of {len(linears)} linears are ternary already and {', '.join(latent[:3])} ... are not: is "
            "this a damaged export?"
        )
    print("the weights are ternary already (fused): recorded so, and they should not be trained as latents")
    dtype = str(source.dtype_of(linears[0])).removeprefix("torch.")
    modules = {module: {"group_size": group} for module, group in groups.items()}
    return QuantizerRecord("fused", "ternary", 1e-5, dtype, 1, 16, modules)


def _chunks(source: Source, rows: int, tp: int) -> Iterator[Chunk]:
    """The ``torch_dist`` checkpoint: every layer is a chunk of its stack, cut as a tensor-parallel run would cut it."""
    layers = source.architecture.num_layers
    for tensor in source.tensors:
        info = _stored(source, tensor, rows)
        if tensor.kind == "vocab":
            step = max(1, _VOCABULARY_BLOCK // (info.nbytes // rows))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield Chunk(
                    tensor.name,
                    info.shape,
                    (start, 0),
                    (stop - start, info.shape[1]),
                    info.dtype,
                    lambda t=tensor, a=start, b=stop: source.read_rows(t, a, b),
                )
            continue
        if tensor.layer is None:
            yield Chunk(tensor.name, info.shape, (0,), info.shape, info.dtype, lambda t=tensor: source.read(t))
            continue
        whole = (layers, *info.shape)
        key = f"decoder.layers.{tensor.suffix}"
        columns = tp if tensor.kind == "row" else 1
        width = info.shape[-1] // columns
        for part in range(columns):
            yield Chunk(
                key,
                whole,
                (tensor.layer, *[0] * (len(info.shape) - 1), part * width),
                (1, *info.shape[:-1], width),
                info.dtype,
                lambda t=tensor, a=part * width, b=(part + 1) * width: source.read(t)[..., a:b].unsqueeze(0),
            )


def _extra_states(source: Source) -> dict[str, None]:
    """What Transformer Engine's modules, and under its name megatron-core's own, ask for beside their weights."""
    layers = source.architecture.num_layers
    modules = "self_attention.linear_qkv self_attention.linear_proj self_attention.core_attention mlp.linear_fc1 mlp.linear_fc2"
    return {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}": None
        for module in modules.split()
        for layer in range(layers)
    }


def _write_legacy(
    source: Source,
    release: Path,
    common: dict[str, Any],
    rows: int,
    tp: int,
    pp: int,
    vp: int | None,
    transformer_impl: str,
    on_bytes: Callable[[int], Any],
) -> None:
    stages = [(v, p) for v in range(vp or 1) for p in range(pp)]
    per_stage = source.architecture.num_layers // len(stages)
    by_rank: dict[int, dict[str, dict[str, MegatronTensor]]] = {}
    for place, (v, p) in enumerate(stages):
        names: dict[str, MegatronTensor] = {}
        for tensor in source.tensors:
            if tensor.layer is None:
                if place == (0 if tensor.name == EMBEDDING else len(stages) - 1):
                    names[tensor.name] = tensor
            elif tensor.layer // per_stage == place:
                suffix = tensor.suffix
                if transformer_impl == "local":
                    suffix = OTHER_NAMES.get(suffix, suffix)
                names[f"decoder.layers.{tensor.layer - place * per_stage}.{suffix}"] = tensor
        if source.architecture.tied and pp > 1 and place == len(stages) - 1:
            # Megatron's last stage holds a copy of the tied embedding.
            names[OUTPUT] = next(t for t in source.tensors if t.name == EMBEDDING)
        by_rank.setdefault(p, {})["model" if vp is None else f"model{v}"] = names
    for p, parts in by_rank.items():
        for rank in range(tp):
            plan = {
                key: {name: _shard_info(_stored(source, t, rows), t, tp) for name, t in names.items()}
                for key, names in parts.items()
            }

            def fill(
                key: str, name: str, parts: dict = parts, plan: dict = plan, rank: int = rank
            ) -> torch.Tensor | Iterator[torch.Tensor]:
                tensor, info = parts[key][name], plan[key][name]
                on_bytes(info.nbytes)
                if tensor.kind == "vocab":
                    return _vocabulary_shard(source, tensor, rank * info.shape[0], info)
                return shard(tensor.kind, source.read(tensor), rank, tp)

            directory = release / rank_directory(rank, p, pp)
            write_rank(directory / "model_optim_rng.pt", plan, fill, common)


def _shard_info(info: TensorInfo, tensor: MegatronTensor, tp: int) -> TensorInfo:
    if tensor.kind == "replicated":
        return info
    if tensor.kind == "row":
        return replace(info, shape=(info.shape[0], info.shape[1] // tp))
    return replace(info, shape=(info.shape[0] // tp, *info.shape[1:]))


def _vocabulary_shard(source: Source, tensor: MegatronTensor, first: int, info: TensorInfo) -> Iterator[torch.Tensor]:
    step = max(1, _VOCABULARY_BLOCK // (info.nbytes // info.shape[0]))
    for start in range(first, first + info.shape[0], step):
        yield source.read_rows(tensor, start, min(start + step, first + info.shape[0]))


if __name__ == "__main__":
    sys.exit(main())

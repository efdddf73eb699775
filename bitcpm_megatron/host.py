# SPDX-License-Identifier: Apache-2.0
"""The plugin that a host's training job calls: what it does to the model, and when.

This module implements :class:`~bitcpm_megatron.patches.megatron_lm.Plugin`; only ``patches/`` knows the host itself
(Megatron-LM, with or without MindSpeed). The patches call :func:`check_arguments` after the host has validated its own
arguments, :func:`prepare` when its bare model chunks exist in the dtype of training, and :func:`check_loaded` and
:func:`write_record` when it loads and saves. Everything that a user asked for is applied, or an error is raised.
"""

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import ternary_flags
from .checkpoints.compatibility import change_of_teacher
from .models import family_flags, from_arguments
from .models.architecture import LongRope, Multipliers
from .nn.linear import HostModule
from .nn.straight_through import is_shadow
from .patches import HostError
from .quantization.record import QuantizerRecord, RecordError, check_change
from .ternary_flags import take_recorded_shards, ternary_mistakes, ternary_settings
from .training import flags
from .training.distillation.refusals import given, refused
from .training.mistakes import distillation_mistakes

_PREPARED = "_bitcpm_prepared"


@dataclass
class Job:
    """The decisions for the model of this process.

    Attributes:
        theirs: the names of the family arguments that the host defines, and therefore carries out, itself.
        record: the quantizer record of the prepared model, None for a model without quantizer.
        prepared: whether a model was prepared.
        allow_change: whether a checkpoint of another quantizer may be loaded.
    """

    theirs: tuple[str, ...] = ()
    record: QuantizerRecord | None = None
    prepared: bool = False
    allow_change: bool = False


job = Job()
"""The job of this process: there is one per process, as there is one set of Megatron's arguments."""

_READS_WEIGHTS = "its kernels read the latent weights and never call the linears, which would train in full precision"

# Reason why arguments of hosts cannot be combined with --ternary, and the cure -> names of these arguments. On a host
# without an argument, it is simply not set.
_CANNOT = {
    "its GEMMs would quantize the ternary weight once more: leave it out": "fp8 fp8_format fp4 fp4_format qat_scheme",
    "fp8 parameters hold no latent weight to quantize: leave it out": "fp8_param_gather",
    "its GEMMs were not proved to take the quantized weight: use --use-ascend-coc, or neither": "use_ascend_mc2",
    "legacy models have other linears: leave it out": "use_legacy_models",
    "its linears are no row or column parallel ones: leave it out": "tp_2d",
    "it re-points weights in ways that were not proved to reach the quantizer: use --use-distributed-optimizer": (
        "use_torch_fsdp2 use_custom_fsdp use_megatron_fsdp layerzero"
    ),
    "a captured graph would replay the first quantized weight: leave it out": (
        "enable_cuda_graph external_cuda_graph cuda_graph_impl"
    ),
    f"{_READS_WEIGHTS}: leave it out, adapters train beside ternary layers without it": (
        "lora_fusion lu_lora_final_layer_index"
    ),
    f"{_READS_WEIGHTS}: leave it out": "use_fused_mlp use_transformer_engine_op_fuser",
    "it may take quantized weights for activations, and free them while they are used: use --swap-attention": (
        "adaptive_memory_optimization smart_swap compress_activation"
    ),
    "delayed weight gradients were not proved to reach the latent weight: leave it out": "delay_wgrad_compute",
    "it goes into the log of launch/pretrain.py, which hosts do not have: leave it out": "ternary_telemetry_interval",
}
# With these features of MindSpeed the fp32 masters are not where megatron-core keeps them.
_OTHER_MASTERS = ("reuse_fp32_param", "swap_optimizer")
# Flag -> what Megatron-LM derives from it and from the parallel sizes; it sets both even if no flag is given.
_WEIGHT_SHARDS = {
    "tensor_parallel_num_weight_shards": "gtp_weight_remat_size",
    "expert_tensor_parallel_num_weight_shards": "expert_gtp_weight_remat_size",
}
_LOSES_LONGROPE = "--reset-attention-mask: packed samples would lose MindSpeed-LLM's LongRoPE: leave one of the two out"
_UNINITIALIZED = (
    "--init-model-with-meta-device without a checkpoint to load leaves the weights uninitialized: give --load"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds our flags to the host's parser, and records in the job which family flags the host defines itself."""
    job.theirs = ternary_flags.add_arguments(parser)
    flags.add_flags_of_runs(parser, "distillation", flags.OF_DISTILLATION)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that cannot be combined; to be called after the host's own validation.

    Raises:
        HostError: if there are such arguments; the message names every flag and its cure.
    """
    found = list(family_flags.mistakes(_ours(args)))
    if "rope_scaling_type" in job.theirs and args.rope_scaling_type == "longrope" and args.reset_attention_mask:
        # MindSpeed's rotary forward for packed samples replaces MindSpeed-LLM's, which applies the LongRoPE factors. A
        # BF16 model for comparison would lose them, too.
        found.append(_LOSES_LONGROPE)
    with_a_teacher = refused(args, "rope_scaling_type" in job.theirs)
    impossible = [*(_refused(args) if args.ternary else ()), *with_a_teacher]
    found += [f"--{name.replace('_', '-')} {getattr(args, name)}: {why}" for name, why in impossible]
    empty = getattr(args, "init_model_with_meta_device", False)
    if args.ternary and empty and not (args.load or args.pretrained_checkpoint):
        found.append(_UNINITIALIZED)
    found += [*ternary_mistakes(args), *distillation_mistakes(args)]
    if found:
        raise HostError("these arguments cannot go together:\n  " + "\n  ".join(dict.fromkeys(found)))
    flags.fill_in_distillation(args)
    job.allow_change = args.allow_quantizer_change


def _refused(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    yield from given(args, _CANNOT)
    for flag, derived in _WEIGHT_SHARDS.items():
        if getattr(args, derived, 1) > 1:
            why = "a rank would hold a part of its rows only until they are gathered, past the quantizer: leave it out"
            yield flag, why
    if args.ternary_ramp_iters:
        yield "ternary_ramp_iters", "hosts do not tell which step they take: leave it out, or use launch/pretrain.py"
    if args.ternary_param_gather == "packed":
        yield "ternary_param_gather", "a host gathers its parameters by itself: leave it out, or use launch/pretrain.py"
    if args.ternary_cache == "packed":
        yield "ternary_cache", "a host reads and gathers its parameters by itself: use resident, or launch/pretrain.py"
    if getattr(args, "ckpt_format", "torch_dist") not in ("torch", "torch_dist"):
        yield "ckpt_format", "use one of torch, torch_dist"
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        yield "non_persistent_ckpt_type", "such checkpoints carry no quantizer record; use global"


def softmax_scale(args: argparse.Namespace, kv_channels: int) -> float | None:
    """Returns the value that ``TransformerConfig.softmax_scale`` must have, None for the host's own choice."""
    from .models.customize import softmax_scale as wanted

    multipliers, longrope = _multipliers(args)
    return wanted(multipliers, longrope, kv_channels, args.max_position_embeddings)


def prepare(
    args: argparse.Namespace,
    chunks: Sequence[torch.nn.Module],
    checkpoint: Path | None,
    vocab_size: int | None = None,
) -> list[str]:
    """Gives bare model chunks their multipliers, LongRoPE, quantizer and teacher, and proves every quantized layer.

    Collective over all ranks. To be called before DDP and the optimizer are built, when the weights have the dtype
    that the forward sees.

    Args:
        args: the host's validated arguments.
        chunks: all model chunks of this rank, without wrappers.
        checkpoint: the checkpoint that is going to be loaded, None for none: its record gives the number of
            row-parallel shards if no flag does.
        vocab_size: the number of tokens that the tokenizer knows, None if it does not say.

    Returns:
        Lines for the log, the coverage table last.

    Raises:
        HostError: if the request cannot be carried out.
        ProbeError: if a layer is not ternary.
    """
    notes: list[str] = []
    try:
        multipliers, longrope = _multipliers(args)
        if multipliers != Multipliers() or longrope is not None:
            from .models.customize import customize

            for chunk in chunks:
                customize(chunk, multipliers, longrope)
                _check_attention(chunk)
            notes.append(f"{multipliers}" + ("" if longrope is None else ", LongRoPE"))
        if args.distill_teacher is not None:
            notes += _teach(args, chunks, vocab_size)
        job.record = _quantize(args, chunks, checkpoint, notes) if args.ternary else None
    except HostError:
        raise
    except ValueError as error:
        # An error of a recipe, a shape or a backend: the host's script cannot tell our errors from others.
        raise HostError(str(error)) from error
    for chunk in chunks:
        setattr(chunk, _PREPARED, True)
    job.prepared = True
    return notes


def check_prepared(chunks: Sequence[torch.nn.Module]) -> None:
    """Checks that :func:`prepare` has seen all finished model chunks of a host, whatever wraps them.

    Raises:
        HostError: if one was not prepared, so that it would train in full precision.
    """
    for chunk in chunks:
        seen: torch.nn.Module | None = chunk
        while seen is not None and not seen.__dict__.get(_PREPARED):
            seen = getattr(seen, "module", None)
        if seen is None:
            raise HostError(
                f"a model chunk ({type(chunk).__name__}) was built behind the adaptor's back and would train in full "
                "precision: this host builds its model in a way that the adaptor does not know"
            )


def trains_with(args: argparse.Namespace, chunks: Sequence[torch.nn.Module], optimizer: Any) -> str | None:
    """Moves the quantized weights into the parameters, and makes the optimizer step with the estimator's gradients.

    The first happens if ``--ternary-cache`` asks for it and the host allows it; ``--ternary-estimator`` chooses the
    second.

    Returns:
        Lines for the log, None without a quantizer.

    Raises:
        HostError: if ``--ternary-cache resident`` or the estimator is not possible.
    """
    if not args.ternary:
        return None
    from .parallel.estimators import EstimatorError, shape_gradients

    held = _hold(args, chunks, optimizer)
    try:
        shaped = shape_gradients(chunks, optimizer, args.ternary_estimator)
    except EstimatorError as error:
        raise HostError(f"--ternary-estimator {args.ternary_estimator}: {error}") from None
    return "\n".join(filter(None, [held, shaped])) or None


def _hold(args: argparse.Namespace, chunks: Sequence[torch.nn.Module], optimizer: Any) -> str | None:
    from .parallel.resident import ResidentError, hold_in_parameters

    flags = [f"--{name.replace('_', '-')}" for name in _OTHER_MASTERS if getattr(args, name, False)]
    if getattr(args, "optimizer_selection", None) == "fused_ema_adamw":
        flags.append("--optimizer-selection fused_ema_adamw")
    why = ", ".join(flags)
    try:
        if flags and args.ternary_cache == "resident":
            raise ResidentError(f"{why} keeps or writes masters in a way of its own: use --ternary-cache step")
        if flags and args.ternary_cache == "auto":
            return f"cache: step, a quantized weight beside each latent one (not resident: {why})"
        return hold_in_parameters(chunks, optimizer, args.ternary_cache)
    except ResidentError as error:
        raise HostError(f"--ternary-cache resident: {error}") from None


def saving(chunks: Sequence[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the parameters are latent weights, for saving a checkpoint."""
    if job.record is None:
        return contextlib.nullcontext()
    from .parallel.resident import latents

    return latents(chunks)


def loading() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which a model asks a checkpoint for no scales, which are derived and need not be in it."""
    from .parallel.sharded_scales import scales_left_out

    return scales_left_out()


def check_loaded(checkpoint: Path, args: argparse.Namespace, saved: argparse.Namespace | None) -> str | None:
    """Compares a checkpoint's quantizer record, multipliers and LongRoPE with the model's, before its weights are used.

    Args:
        checkpoint: the directory of the checkpoint.
        args: the arguments of this run.
        saved: the arguments of the run that wrote the checkpoint; None, or without our names, if another job or tool
            wrote it.

    Returns:
        One line for the log; None if no model was prepared.

    Raises:
        HostError: if the checkpoint is of another model, or its record contradicts the model's and
            ``--allow-quantizer-change`` is not given.
    """
    if not job.prepared:
        return None
    if saved is not None and any(hasattr(saved, name) for name in from_arguments.NAMES):
        for what, theirs, ours in zip(
            ("multipliers", "LongRoPE"), _multipliers(saved), _multipliers(args), strict=True
        ):
            if theirs != ours:
                raise HostError(f"{checkpoint} was saved with {what} {theirs} (now {ours}): give the same flags")
    change = None if saved is None else change_of_teacher(args, vars(saved))
    if change is not None:
        raise HostError(f"{checkpoint} was saved with {': '.join(change)}")
    try:
        found = QuantizerRecord.read(checkpoint)
        if found is not None and found.ramp < 1.0 and not getattr(args, "finetune", False):
            raise HostError(
                f"{checkpoint} was saved in the middle of a ramp, on which hosts cannot go on: train on with "
                "launch/pretrain.py until --ternary-ramp-iters are over, or --finetune to begin with its weights"
            )
        return check_change(checkpoint, found, job.record, job.allow_change)
    except RecordError as error:
        raise HostError(str(error)) from None


def register_linear(linear: type, kind: Literal["column", "row"], norm_methods: tuple[str, ...]) -> None:
    """Registers a class of linears unknown to megatron-core (:func:`bitcpm_megatron.parallel.register_linear`)."""
    from .parallel import register_linear as register

    register(linear, kind, norm_methods)


is_quantized = is_shadow  # tests a weight as the forward of a linear sees it


def write_record(checkpoint: Path) -> None:
    """Writes the model's quantizer record into a checkpoint's directory; does nothing without a quantizer."""
    if job.record is not None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        job.record.write(checkpoint)


def _quantize(
    args: argparse.Namespace, chunks: Sequence[torch.nn.Module], checkpoint: Path | None, notes: list[str]
) -> QuantizerRecord:
    from .parallel.prepare import prepare_ternary

    def fill(weights: Sequence[torch.nn.Parameter]) -> None:
        """Gives weights from the meta device, which have no values before loading, random ones for the probe."""
        if checkpoint is None:
            raise HostError(_UNINITIALIZED)
        for weight in weights:
            torch.nn.init.normal_(weight, std=args.init_method_std)

    notes += filter(None, [None if checkpoint is None else take_recorded_shards(args, checkpoint)])
    meta = getattr(args, "init_model_with_meta_device", False)
    prepared = prepare_ternary(chunks, ternary_settings(args), fill=fill if meta else None)
    notes += [*prepared.notes, prepared.coverage.table()]
    return prepared.record


def _teach(args: argparse.Namespace, chunks: Sequence[torch.nn.Module], vocab_size: int | None) -> list[str]:
    from .training.distillation.hosts import learn_in_host

    if vocab_size is None:
        raise HostError("--distill-teacher: the tokenizer does not say the size of its vocabulary: give --vocab-size")
    return learn_in_host(args, chunks, vocab_size)


def _multipliers(args: argparse.Namespace) -> tuple[Multipliers, LongRope | None]:
    """Returns the multipliers and the LongRoPE that we must apply; the host applies those it has flags for itself."""
    ours = vars(_ours(args))
    return from_arguments.multipliers_of(ours), from_arguments.longrope_of(ours)


def _ours(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **dict.fromkeys(job.theirs)})


def _check_attention(chunk: HostModule) -> None:
    """Checks the softmax scale of attention that a host replaced, which may not read the scale of the configuration."""
    wanted = chunk.config.softmax_scale
    if wanted is None:
        return
    for name, module in chunk.named_modules():
        if not name.endswith("attention.core_attention") or name.endswith("core_attention.core_attention"):
            continue
        # MindSpeed's emulated Transformer Engine keeps the scale one level deeper.
        inside: Iterable[Any] = module.modules()
        found = {m.softmax_scale for m in inside if hasattr(m, "softmax_scale")}
        if found != {wanted}:
            raise HostError(
                f"{name}: {type(module).__name__} has softmax_scale {', '.join(map(str, found)) or 'nowhere'}, the "
                f"attention multiplier and LongRoPE need {wanted}: use --transformer-impl local"
            )

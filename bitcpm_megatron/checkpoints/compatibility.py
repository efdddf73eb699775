# SPDX-License-Identifier: Apache-2.0
"""Checks whether a run may continue from a checkpoint: contradictions are refused by name, other changes are logged."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.from_arguments import longrope_of, multipliers_of
from ..quantization.record import QuantizerRecord, RecordError, check_change
from .directory import RELEASE, CheckpointError, iteration_of

ARCHITECTURE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels position_embedding_type "
    "rotary_base normalization norm_epsilon swiglu add_bias_linear untie_embeddings_and_output_weights num_experts "
    "moe_router_topk moe_ffn_hidden_size window_size"
).split()
"""The names of the arguments that describe the architecture of a model."""
_OPTIMIZER = ("use_distributed_optimizer", "bf16", "adam_beta1", "adam_beta2", "adam_eps")
_TOLD = (
    "seq_length global_batch_size train_iters data_path split train_data_path valid_data_path tokenizer_model "
    "weight_decay start_weight_decay end_weight_decay weight_decay_incr_style clip_grad "
    "sft reset_position_ids reset_attention_mask eod_mask_loss "
    "distill_teacher distill_targets distill_alpha distill_temperature distill_direction distill_top_k "
    "ternary_estimator"
).split()


def check_quantizer(checkpoint: Path, wanted: QuantizerRecord | None, allow_change: bool) -> str:
    """Compares a checkpoint's quantizer record with the one of this run, and returns a line for the log.

    Raises:
        CheckpointError: if they contradict each other and ``allow_change`` is false.
    """
    found = QuantizerRecord.read(checkpoint)
    try:
        return check_change(checkpoint, found, wanted, allow_change)
    except RecordError as error:
        raise CheckpointError(str(error)) from None


# The values of arguments that are missing in checkpoints of older versions.
_BEFORE = {
    "window_size": None,
    "start_weight_decay": None,
    "end_weight_decay": None,
    "weight_decay_incr_style": "constant",
    "distill_top_k": None,
    "ternary_estimator": "identity",
}


def check_arguments(args: argparse.Namespace, saved: Mapping[str, Any], checkpoint: Path, with_optimizer: bool) -> None:
    """Compares the arguments of a run with those of the run that wrote a checkpoint.

    Raises:
        CheckpointError: if the model, the optimizer or the order of samples differs; the message names the flags.
    """
    model = _differences(args, {**_BEFORE, **saved}, ARCHITECTURE)
    # Compare meanings, because MiniCPM and Granite have different flags for the same numbers.
    for what, of in (("multipliers", multipliers_of), ("LongRoPE", longrope_of)):
        if (before := of(saved)) != (now := of(vars(args))):
            model.append(f"{what} {before} (now {now})")
    checks = [(model, "the model is another one: give the same flags")]
    # A shorter embedding would be cut silently; a longer one would hold rows that were never trained.
    vocabulary = _differences(args, saved, ["vocab_size"])
    checks.append((vocabulary, "the vocabulary is another one: give its tokenizer, or --vocab-size"))
    # Compare contents, because the path may differ. Checkpoints of older versions have no identity to compare.
    before, now = saved.get("tokenizer_identity"), getattr(args, "tokenizer_identity", None)
    if None not in (before, now) and before != now and not args.finetune:
        was = "mock data" if saved.get("mock_data") else f"the tokenizer {saved.get('tokenizer_model')}"
        tokens = f"{args.tokenizer_model or 'mock data'} has other tokens"
        cure = f"{tokens}: give the same, or --finetune to begin with these"
        checks.append(([was], cure))
    if (change := change_of_teacher(args, saved)) is not None:
        checks.append(([change[0]], change[1]))
    if with_optimizer:
        optimizer = _differences(args, saved, _OPTIMIZER)
        checks.append((optimizer, "the optimizer state would not fit: give the same flags, or --no-load-optim"))
    if not args.finetune and checkpoint.name != RELEASE:
        # A ramp that is over leaves no state to continue from, and neither does one that never was.
        ramps = [of.get("ternary_ramp_iters") or 0 for of in (saved, vars(args))]
        if ramps[0] != ramps[1] and iteration_of(checkpoint) < max(ramps):
            was = f"--ternary-ramp-iters {ramps[0]} (now {ramps[1]})"
            cure = (
                "the quantizer would jump in the middle of a ramp: give the same, or --finetune to begin at its start"
            )
            checks.append(([was], cure))
        seed = _differences(args, saved, ["seed"])
        checks.append((seed, "the order of the samples would change: give the same, or --finetune"))
    for different, cure in checks:
        if different:
            raise CheckpointError(f"{checkpoint} was saved with {', '.join(different)}: {cure}")


def change_of_teacher(args: argparse.Namespace, saved: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the previous teacher or targets and the complaint about other ones; None if they did not change."""
    before, now = saved.get("distill_identity"), getattr(args, "distill_identity", None)
    if before is None or now is None or before == now or args.finetune:
        return None
    what = "teacher" if saved.get("distill_targets") is None else "targets"
    given = f"{args.distill_targets or args.distill_teacher} ({now['checkpoint']})"
    was = f"the {what} {saved.get(f'distill_{what}')} ({before['checkpoint']})"
    return was, f"{given} is another one: give the same, or --finetune"


def check_data(args: argparse.Namespace, saved: Mapping[str, Any], checkpoint: Path) -> list[str]:
    """Compares the training data with what a checkpoint was trained on: its position means nothing in other data.

    Returns a line for the log if they differ and ``--allow-data-change`` allows it.

    Raises:
        CheckpointError: if they differ and ``--allow-data-change`` is not given.
    """
    # Checkpoints of older versions have no digests to compare.
    if saved.get("data_digests", args.data_digests) == args.data_digests:
        return []
    now, before = (
        " ".join(a.get("data_path") or a.get("train_data_path") or ["--mock-data"]) for a in (vars(args), saved)
    )
    if not args.allow_data_change:
        where = f"{now} holds now" if now == before else f"{now} (it was {before})"
        raise CheckpointError(
            f"{checkpoint} was trained on other data than {where}: give the same files, or --allow-data-change to go "
            "on with these, or --finetune to begin with them"
        )
    return [f"going on with other training data than {checkpoint} was trained on, as --allow-data-change says"]


def changes(args: argparse.Namespace, saved: Mapping[str, Any]) -> list[str]:
    """Returns one line for the log with the other differences from the run that wrote the checkpoint, or none."""
    different = _differences(args, {**_BEFORE, **saved}, _TOLD)
    return [f"changed since the checkpoint, which had {', '.join(different)}"] if different else []


def _differences(args: argparse.Namespace, saved: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} {saved[name]} (now {getattr(args, name)})"
        for name in names
        if name in saved and saved[name] != getattr(args, name)
    ]

# SPDX-License-Identifier: Apache-2.0
"""Arguments of a host that cannot be combined with a teacher, and the cures. Importing this imports no Megatron."""

import argparse
from collections.abc import Iterator, Mapping

_OWN_LOOP = "or use launch/pretrain.py"

# The reasons why arguments of hosts cannot be combined with --distill-teacher, with the cure -> the arguments' names.
# In hosts that do not have them they are unset.
_CANNOT = {
    "it is MindSpeed's own distillation, of dense models without pipeline stages and with a second forward pass of the "
    "student: use one of the two": "qad_enable",
    "ModelOpt would make a student of it in its own way: leave it out": "modelopt_enabled export_kd_teacher_load",
    f"samples of a host have no numbers by which a store could be asked: use --distill-teacher, {_OWN_LOOP}": (
        "distill_targets"
    ),
    "its schedule takes micro-batches or layers in an order that a teacher does not know: leave it out": (
        "schedules_method moe_fb_overlap overlap_moe_expert_parallel_comm recompute_in_bubble recompute_in_advance "
        "automated_pipeline dist_train"
    ),
    "nobody teaches the tokens further ahead: leave it out": "mtp_num_layers",
    f"the teacher sees a sample as a whole, and each token all before it: leave it out, {_OWN_LOOP}": (
        "reset_attention_mask reset_position_ids sft hybrid_context_parallel variable_seq_lengths "
        "is_instruction_dataset neat_pack"
    ),
    "it changes the layers of every model of the process, also the teacher's: leave it out": (
        "noop_layers tp_2d unaligned_linear use_ascend_mc2 use_multiparameter_pipeline_model_parallel "
        "pipeline_num_transformer_layers swap_layer_input smart_swap adaptive_memory_optimization compress_activation"
    ),
    "it was not tried with a teacher: leave it out": (
        "fp16 fp8 fp8_format fp4 fp4_format qat_scheme layerzero use_torch_fsdp2 use_custom_fsdp use_megatron_fsdp "
        "init_model_with_meta_device"
    ),
    "a captured graph would replay what the teacher said first: leave it out": (
        "enable_cuda_graph external_cuda_graph cuda_graph_impl"
    ),
    "legacy models have no place for its loss: leave it out": "use_legacy_models",
    "it would take a divergence for a loss: leave it out": "check_for_spiky_loss",
}


def given(args: argparse.Namespace, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the arguments of a table that are given, each with its reason.

    Args:
        args: the host's arguments.
        table: the names of arguments, separated by spaces, by the reason to look for them.
    """
    for why, names in table.items():
        for name in names.split():
            value = getattr(args, name, None)
            # Compared by identity, because a layer index of 0 equals False.
            if not (value is None or value is False or value in ("none", "")):
                yield name, why


def refused(args: argparse.Namespace, own_family: bool) -> Iterator[tuple[str, str]]:
    """Yields the names of a host's arguments that exclude a teacher, with the reason; nothing if none is requested.

    Args:
        args: the host's validated arguments.
        own_family: whether the host builds models of the MiniCPM4 family by itself, as MindSpeed-LLM does.
    """
    if args.distill_teacher is None and args.distill_targets is None:
        return
    yield from given(args, _CANNOT)
    if args.distill_teacher is not None and own_family:
        yield (
            "distill_teacher",
            f"MindSpeed-LLM would build it by the student's arguments: leave that one out, {_OWN_LOOP}",
        )
    if args.context_parallel_size > 1:
        yield (
            "context_parallel_size",
            f"hosts cut sequences in ways that a teacher does not know: leave it out, {_OWN_LOOP}",
        )
    if args.eod_mask_loss and not args.calculate_per_token_loss:
        why = "micro-batches would weigh alike whatever they learn: add --calculate-per-token-loss, or leave it out"
        yield "eod_mask_loss", why

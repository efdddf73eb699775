# SPDX-License-Identifier: Apache-2.0
"""Building of model chunks from arguments: GPTModel, ternary linears, mixed precision and DDP."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from ..attention.core import give_core_attention
from ..attention.rotary import RotaryOfDocuments
from ..models.customize import customize, softmax_scale
from ..models.from_arguments import longrope_of, multipliers_of
from ..nn.linear import HostModule, TernaryState
from ..parallel.prepare import Prepared, prepare_ternary
from ..quantization.record import QuantizerRecord
from ..ternary_flags import ternary_settings
from .initialize import device, sum_over_ranks

_FUSED_GEMM = "fused_weight_gradient_mlp_cuda"
# Arguments that are fields of TransformerConfig under the same name.
_SAME_NAMES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
    "add_bias_linear moe_router_topk attention_dropout hidden_dropout init_method_std tensor_model_parallel_size "
    "pipeline_model_parallel_size expert_model_parallel_size context_parallel_size sequence_parallel bf16 "
    "use_cpu_initialization recompute_granularity recompute_method recompute_num_layers cp_comm_type"
).split()


@dataclass
class Model:
    """The model chunks of this rank.

    Attributes:
        chunks: the chunks as the schedules take them, wrapped in DDP for training; several with virtual stages.
        bare: the same chunks without wrappers.
        config: the configuration that all chunks share.
        ternary: what was quantized; None for a BF16 / FP32 run.
        notes: the decisions at start-up, for the log.
    """

    chunks: list[HostModule]
    bare: list[GPTModel]
    config: TransformerConfig
    ternary: Prepared | None
    notes: list[str]

    @property
    def states(self) -> list[TernaryState]:
        """The states of the quantized modules of this rank."""
        return [] if self.ternary is None else self.ternary.states

    @property
    def record(self) -> QuantizerRecord | None:
        """The record of the quantizer for checkpoints; None for a run without a quantizer."""
        return None if self.ternary is None else self.ternary.record


def build_model(args: argparse.Namespace, padded_vocab_size: int, with_ddp: bool = True) -> Model:
    """Builds, quantizes and probes the model, and wraps it for training if ``with_ddp``.

    Raises:
        RecipeError, ProbeError, ValueError, RuntimeError: if the model cannot be quantized as requested.
    """
    config = _transformer_config(args)
    notes = []
    if not config.gradient_accumulation_fusion:
        why = f"{_FUSED_GEMM} is not installed" if args.gradient_accumulation_fusion else "switched off"
        notes.append(f"gradient-accumulation fusion: off ({why})")
    stages = args.num_virtual_stages_per_pipeline_rank
    bare = [_chunk(args, config, padded_vocab_size, i) for i in ([None] if stages is None else range(stages))]
    for chunk in bare:
        chunk.to(device())
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    # This precedes the quantizer, which must see the dtype that the forward pass sees.
    chunks: list[HostModule] = [Float16Module(config, chunk) if args.bf16 else chunk for chunk in bare]
    ternary = None
    if args.ternary:
        ternary = prepare_ternary(bare, ternary_settings(args), will_train=with_ddp)
        notes += ternary.notes
    if with_ddp:
        chunks = _wrap(args, config, chunks)
    return Model(chunks, bare, config, ternary, notes)


def _transformer_config(args: argparse.Namespace) -> TransformerConfig:
    """Returns megatron-core's configuration for the arguments: local spec, unfused element-wise operations."""
    fusion = args.gradient_accumulation_fusion and importlib.util.find_spec(_FUSED_GEMM) is not None
    # MindSpeed takes fields that are not given from the arguments of its job; a teacher is not that job's model.
    given = {field.name: _default(field) for field in dataclasses.fields(TransformerConfig) if field.init}
    given |= {name: getattr(args, name) for name in _SAME_NAMES}
    given |= dict(
        softmax_scale=softmax_scale(
            multipliers_of(vars(args)), longrope_of(vars(args)), args.kv_channels, args.max_position_embeddings
        ),
        window_size=None if args.window_size is None else tuple(args.window_size),
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        num_moe_experts=args.num_experts,
        moe_ffn_hidden_size=(args.moe_ffn_hidden_size or args.ffn_hidden_size) if args.num_experts else None,
        moe_token_dispatcher_type="allgather",
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        # The loss is one mean over all tokens of the global batch, however it is divided into micro-batches and ranks.
        calculate_per_token_loss=True,
        params_dtype=params_dtype(args),
        pipeline_dtype=params_dtype(args),
        gradient_accumulation_fusion=fusion,
        # Over gloo, interleaved stages with batched exchanges run but do not learn; with overlapped ones they learn.
        overlap_p2p_comm=args.num_virtual_stages_per_pipeline_rank is not None,
        batch_p2p_comm=args.num_virtual_stages_per_pipeline_rank is None,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    return TransformerConfig(**given)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    # Fields without a default are always given.
    return None if field.default is dataclasses.MISSING else field.default


def params_dtype(args: argparse.Namespace) -> torch.dtype:
    """Returns the dtype of the weights that the forward pass sees."""
    return torch.bfloat16 if args.bf16 else torch.float32


def answer_with_logits(model: Model) -> None:
    """Makes the last stage return logits ``[seq_length, batch, V / TP]`` instead of losses, for good.

    V is the padded vocabulary size, TP the number of tensor-parallel ranks.
    """
    for chunk in model.bare:
        if chunk.post_process:
            chunk.compute_language_model_loss = _logits


def _logits(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits


@torch.no_grad()
def hear(model: Model, forward: Callable, data_iterator: Any, count: int, **shape: Any) -> list[Any]:
    """Runs a model that has no virtual stages on micro-batches; collective over the ranks that share it.

    Args:
        model: the model; it is run without the half-precision wrapper, which would convert its logits to fp32.
        forward: a ``forward_step_func`` of megatron-core's schedules whose second result collects non-loss data.
        data_iterator: the iterator from which ``forward`` takes the micro-batches.
        count: the number of micro-batches.
        shape: the shape of a micro-batch for the schedule: ``seq_length``, ``micro_batch_size`` and the like.

    Returns:
        The data that ``forward`` collected of each micro-batch, in their order; empty on all stages except the last.
    """
    schedule = (
        schedules.forward_backward_pipelining_without_interleaving
        if parallel_state.get_pipeline_model_parallel_world_size() > 1
        else schedules.forward_backward_no_pipelining
    )
    return schedule(
        forward_step_func=forward,
        data_iterator=data_iterator,
        model=model.bare,
        num_microbatches=count,
        forward_only=True,
        collect_non_loss_data=True,
        **shape,
    )


def parameter_count(model: Model) -> int:
    """Returns the number of parameters of the whole model, over all tensor-, pipeline- and expert-parallel ranks."""
    local = 0
    expert_ranks = parallel_state.get_expert_model_parallel_world_size()
    for chunk in model.bare:
        for name, p in chunk.named_parameters():
            shared_copy = getattr(p, "shared", False) or (name == "output_layer.weight" and not chunk.pre_process)
            if shared_copy and chunk.share_embeddings_and_output_weights:
                continue
            if tensor_parallel.param_is_not_tensor_parallel_duplicate(p):
                local += p.numel() * (1 if getattr(p, "allreduce", True) else expert_ranks)
    return sum_over_ranks(local, parallel_state.get_model_parallel_group())


def _chunk(args: argparse.Namespace, config: TransformerConfig, vocab: int, vp_stage: int | None) -> GPTModel:
    spec = get_gpt_layer_local_spec(
        num_experts=args.num_experts, moe_grouped_gemm=False, normalization=args.normalization
    )
    # A teacher's stages are whole even if its student's are virtual. megatron-core 0.12 has no argument vp_stage.
    whole = vp_stage is None
    stage = {} if whole else {"vp_stage": vp_stage}
    model = GPTModel(
        config=config,
        transformer_layer_spec=give_core_attention(spec),
        vocab_size=vocab,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=whole, **stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=whole, **stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        **stage,
    )
    model.model_type = ModelType.encoder_or_decoder
    customize(model, multipliers_of(vars(args)), longrope_of(vars(args)))
    if args.position_embedding_type == "rope":
        model.rotary_pos_emb = RotaryOfDocuments(model.rotary_pos_emb)
    return model


def _wrap(args: argparse.Namespace, config: TransformerConfig, chunks: Sequence[HostModule]) -> list[HostModule]:
    """Wraps all chunks in DDP, and gives the schedule the same hooks as Megatron-LM's ``train()``."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        bucket_size=40_000_000 if args.overlap_grad_reduce else None,
    )
    wrapped = [DistributedDataParallel(config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
    config.finalize_model_grads_func = finalize_model_grads
    one = len(wrapped) == 1
    if args.overlap_grad_reduce:
        config.no_sync_func = wrapped[0].no_sync if one else [c.no_sync for c in wrapped]
    if args.overlap_grad_reduce and not one:
        config.grad_sync_func = [c.start_grad_sync for c in wrapped]
    if args.overlap_param_gather and not one:
        config.param_sync_func = [c.start_param_sync for c in wrapped]
    return wrapped

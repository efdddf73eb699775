# SPDX-License-Identifier: Apache-2.0
"""A pair of column-parallel and row-parallel linears under megatron-core's DDP, schedule and optimizer.

Its gradients are compared with plain PyTorch in float64. Reports for each case the largest relative error of a weight
gradient over the steps, and other numbers that tests check. The gradient-accumulation GEMM is a stand-in that adds on
the CPU: it proves the plumbing, not the CUDA kernel.
"""

import hashlib
import itertools
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from support.integers import by_definition

from bitcpm_megatron import QuantizerConfig, dequantize, quantize
from bitcpm_megatron.nn import cache, linear, straight_through
from bitcpm_megatron.ops import counts, fake_quantize_activations
from bitcpm_megatron.parallel import ProbeError, Recipe, apply_recipe, cohorts, probe, ternary_modules
from bitcpm_megatron.parallel.estimators import shape_gradients
from bitcpm_megatron.parallel.packed.weights import pack_weights
from bitcpm_megatron.parallel.resident import find_resident, hold_in_parameters, latents
from bitcpm_megatron.patches import cpu
from bitcpm_megatron.patches.megatron_core import without_te
from bitcpm_megatron.quantization import SPACES, quantize_dequantize
from bitcpm_megatron.quantization.spaces import STATISTICS


def _install_fusion_stand_in() -> None:
    def accumulate(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.add_(grad_output.t().to(main_grad.dtype) @ total_input.to(main_grad.dtype))

    module = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate
    sys.modules[module.__name__] = module
    # Where megatron-core was imported before, it has looked for the module already.
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = module, True


_install_fusion_stand_in()

HIDDEN, INNER, SEQUENCE, BATCH = 64, 128, 8, 2
MICRO_BATCHES, STEPS, SHARDS = 3, 3, 2
_TERNARY = QuantizerConfig()
# Multipliers that give scales near those of the least error, so that every level of every space occurs.
MULTIPLIERS = {"absmean": 1.3, "absmax": 0.3}


class Block(torch.nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        init = partial(torch.nn.init.normal_, std=0.05)
        self.linear_fc1 = ColumnParallelLinear(HIDDEN, INNER, config=config, init_method=init, bias=False)
        self.linear_fc2 = RowParallelLinear(
            INNER, HIDDEN, config=config, init_method=init, bias=False, input_is_parallel=True, skip_bias_add=True
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(torch.nn.functional.gelu(self.linear_fc1(x)[0]))[0]


class Pair(MegatronModule):
    shards: int | None = SHARDS

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.mlp = Block(config)
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, tensor: object) -> None:
        """Does nothing: schedules call it, but there is only one stage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class UnshardedPair(Pair):
    """A pair with whole rows as groups."""

    shards = None


class NormedPair(Pair):
    """A pair with whole rows as groups, and a norm that moves the edge between two shards of the buffer into a row."""

    shards = None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.norm = torch.nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mlp(x))


def reference_quantizer(w: torch.Tensor, groups: int) -> torch.Tensor:
    """Quantizes a weight in fp32 and returns it in float64, with the residual form as straight-through estimator.

    ``w`` has the shape [out, in], ``groups`` is the number of groups in a row. A mean in float64 could be on the other
    side of an edge between two scales; tests/unit/test_quantizer.py proves the quantizer itself.
    """
    rows, config = w.detach().float().reshape(w.shape[0] * groups, -1), QuantizerConfig()
    quantized = dequantize(*quantize(rows, config), config, torch.float64).reshape(w.shape)
    return w + (quantized - w).detach()


def reference_gradients(weights: list[torch.Tensor], data: list[tuple], quantized: bool = True) -> list[torch.Tensor]:
    leaves = [w.double().requires_grad_() for w in weights]
    w1, w2 = (reference_quantizer(w, g) if quantized else w for w, g in zip(leaves, (1, SHARDS), strict=True))
    return dense_gradients(leaves, w1, w2, data)


def clipped_gradients(weights: list[torch.Tensor], data: list[tuple], ramp: float) -> list[torch.Tensor]:
    """Returns gradients for weights clamped to 1.5 scales before the straight-through quantizer, and blended by
    ``ramp``."""
    leaves = [w.double().requires_grad_() for w in weights]
    made = []
    for w, groups in zip(leaves, (1, SHARDS), strict=True):
        rows = w.detach().float().reshape(w.shape[0] * groups, -1)
        reach = 1.5 * quantize(rows, QuantizerConfig())[1].double()
        clamped = w.reshape(rows.shape).clamp(-reach, reach).reshape(w.shape)
        quantized = clamped + (reference_quantizer(w.detach(), groups) - clamped).detach()
        made.append(w + ramp * (quantized - w))
    return dense_gradients(leaves, *made, data)


def dense_gradients(
    leaves: list[torch.Tensor], w1: torch.Tensor, w2: torch.Tensor, data: list[tuple]
) -> list[torch.Tensor]:
    made = [torch.nn.functional.gelu(x.double() @ w1.t()) @ w2.t() for x, _ in data]
    (sum((y * target.double()).sum() for y, (_, target) in zip(made, data, strict=True)) / len(data)).backward()
    return [w.grad for w in leaves]


def own_samples(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return samples(step, parallel_state.get_data_parallel_rank())


def samples(step: int, dp_rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 * step + dp_rank)
    draw = partial(torch.randn, SEQUENCE, BATCH, HIDDEN, generator=generator)
    return [(draw(), draw()) for _ in range(MICRO_BATCHES)]


def gathered(local: torch.Tensor, axis: int) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, axis)


def share_gradient_shards(ddp: DistributedDataParallel) -> None:
    """Gathers whole gradients, since the distributed optimizer leaves each rank with only its reduced shard."""
    group = parallel_state.get_data_parallel_group()
    for bucket in (b for buffer in ddp.buffers for b in buffer.buckets):
        shards = list(bucket.grad_data.chunk(group.size()))
        torch.distributed.all_gather(shards, shards[group.rank()].clone(), group=group)


def pair_config(dtype: torch.dtype, **changes: bool) -> TransformerConfig:
    """Returns the configuration of a pair in the current layout."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        **changes,
    )


def build(
    kind: type[Pair],
    fusion: bool,
    sequence_parallel: bool,
    overlap: bool,
    distributed_optimizer: bool,
    cache_mode: str = "step",
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
    quantizer: QuantizerConfig = _TERNARY,
) -> tuple[Pair, DistributedDataParallel, MegatronOptimizer]:
    """Builds a ternary pair, its DDP wrapper, and its optimizer."""
    config = pair_config(dtype, gradient_accumulation_fusion=fusion, sequence_parallel=sequence_parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    model = kind(config).to(dtype)
    model.mlp.linear_fc2.weight.requires_grad_(not frozen)
    for p in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(p)
    apply_recipe(model, default=quantizer, row_parallel_shards=kind.shards, cache=cache_mode)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=distributed_optimizer,
        overlap_param_gather=overlap and distributed_optimizer,
        bucket_size=4096 if overlap else None,
    )
    ddp = DistributedDataParallel(config, ddp_config, model)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = ddp.no_sync
    gather = {"overlap_param_gather": overlap and distributed_optimizer}
    if "overlap_param_gather" not in OptimizerConfig.__dataclass_fields__:  # 0.12.1 reads only DDP's configuration
        gather = {}
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=2e-2,
            weight_decay=0.0,
            clip_grad=0.0,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=distributed_optimizer,
            **gather,
        ),
        [ddp],
    )
    return model, ddp, optimizer


def schedule(ddp: DistributedDataParallel, data: list[tuple]) -> list[dict[str, torch.Tensor]]:
    """Runs the forwards and backwards of all micro-batches of a step; returns the losses."""
    ddp.zero_grad_buffer()
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(data),
        model=[ddp],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
    )


def run_case(
    fusion: bool,
    sequence_parallel: bool,
    overlap: bool,
    distributed_optimizer: bool,
    cache_mode: str = "step",
    frozen: bool = False,
) -> dict[str, object]:
    model, ddp, optimizer = build(Pair, fusion, sequence_parallel, overlap, distributed_optimizer, cache_mode, frozen)
    made = [s for s, _ in ternary_modules(model)]
    before = [s.count for s in made]
    calls = counts.calls
    errors, versus_latent, moved, previous = [], [], [], None
    for step in range(STEPS):
        optimizer.zero_grad()
        schedule(ddp, own_samples(step))
        if distributed_optimizer:
            share_gradient_shards(ddp)
        layers = (model.mlp.linear_fc1, model.mlp.linear_fc2)
        weights = [gathered(m.weight.detach(), axis) for m, axis in zip(layers, (0, 1), strict=True)]
        everything = [d for r in range(parallel_state.get_data_parallel_world_size()) for d in samples(step, r)]
        trained = slice(0, 1) if frozen else slice(0, 2)
        found = [gathered(m.weight.main_grad, a) for m, a in list(zip(layers, (0, 1), strict=True))[trained]]
        errors.append(_relative(found, reference_gradients(weights, everything)[trained]))
        versus_latent.append(_relative(found, reference_gradients(weights, everything, quantized=False)[trained]))
        if previous is not None:
            moved.append(max(float((a - b).abs().max()) for a, b in zip(weights, previous, strict=True)))
        previous = weights
        optimizer.step()
    return {
        "error": max(errors),
        "versus_latent": min(versus_latent),
        "moved": min(moved),
        "quantizations": [s.count - b for s, b in zip(made, before, strict=True)],
        "calls": counts.calls - calls,
    }


def run_space(
    config: QuantizerConfig, fusion: bool, sequence_parallel: bool, kind: type[Pair] = Pair
) -> dict[str, object]:
    """Runs one step in a space, from weights that are the same in every layout.

    Returns a digest of the quantized weights, and the errors of outputs and of all gradients.
    """
    model, ddp, _ = build(kind, fusion, sequence_parallel, False, False, quantizer=config)
    layers, axes = (model.mlp.linear_fc1, model.mlp.linear_fc2), (0, 1)
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    draw = torch.Generator().manual_seed(5)
    weights = []
    for rows, columns in ((INNER, HIDDEN), (HIDDEN, INNER)):
        magnitudes = 10 ** torch.empty(rows, 1).uniform_(-0.5, 0.5, generator=draw)
        weights.append(torch.randn(rows, columns, generator=draw) * magnitudes * 0.05)
    with torch.no_grad():
        for layer, axis, weight in zip(layers, axes, weights, strict=True):
            layer.weight.copy_(weight.chunk(size, axis)[rank])
    outputs: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, given, y: outputs.append(y.detach()))
    data = [(x.requires_grad_(), target) for x, target in samples(0, 0)]
    schedule(ddp, data)
    states = [state for state, _ in ternary_modules(model)]
    used = [
        gathered(state.in_use(layer.weight)[0], axis) for state, layer, axis in zip(states, layers, axes, strict=True)
    ]
    found = [gathered(layer.weight.main_grad, axis) for layer, axis in zip(layers, axes, strict=True)]
    inputs = [x.grad for x, _ in data]
    if sequence_parallel:
        # Each rank has only the outputs of its tokens, and passes gradients only to these tokens.
        outputs = [gathered(y, 0) for y in outputs]
        for gradient in inputs:
            torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    per_shard = INNER // SHARDS if config.group_size == -1 else config.group_size
    configs = (config, replace(config, group_size=per_shard))
    whole = [quantize_dequantize(w, each)[0] for w, each in zip(weights, configs, strict=True)]
    expected = dense_step(weights, whole, data)
    latent = dense_step(weights, weights, data)
    return {
        "quantized": hashlib.sha256(json.dumps([u.tolist() for u in used]).encode()).hexdigest(),
        "slices": all(map(torch.equal, used, whole)),
        "levels": [quantize(w, each)[0].unique().numel() for w, each in zip(weights, configs, strict=True)],
        "forward": _relative(outputs, expected[0]),
        "error": _relative([*found, *inputs], expected[1]),
        "versus_latent": _relative([*found, *inputs], latent[1]),
    }


def dense_step(
    weights: list[torch.Tensor], quantized: list[torch.Tensor], data: list[tuple]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns the outputs of the micro-batches, and the gradients of weights and inputs, in float64.

    The straight-through estimator is the identity.
    """
    leaves = [w.double().requires_grad_() for w in weights]
    made = [w + (q.double() - w).detach() for w, q in zip(leaves, quantized, strict=True)]
    inputs = [(x.detach().double().requires_grad_(), target) for x, target in data]
    gradients = dense_gradients(leaves, *made, inputs)
    with torch.no_grad():
        outputs = [torch.nn.functional.gelu(x @ made[0].t()) @ made[1].t() for x, _ in inputs]
    return outputs, [*gradients, *(x.grad for x, _ in inputs)]


def run_estimator(
    estimator: str,
    fusion: bool,
    sequence_parallel: bool,
    overlap: bool,
    distributed_optimizer: bool,
    ramp: float = 1.0,
) -> dict[str, object]:
    """Runs two optimizer steps; returns the errors and a digest of the gradients used in the second one."""
    model, ddp, optimizer = build(Pair, fusion, sequence_parallel, overlap, distributed_optimizer)
    shape_gradients([ddp], optimizer, estimator)
    cache.set_ramp([ddp], ramp)
    layers = (model.mlp.linear_fc1, model.mlp.linear_fc2)
    for step in range(2):
        optimizer.zero_grad()
        schedule(ddp, own_samples(step))
        weights = [gathered(m.weight.detach().clone(), axis) for m, axis in zip(layers, (0, 1), strict=True)]
        optimizer.step()
    if distributed_optimizer:
        share_gradient_shards(ddp)
    found = [gathered(m.weight.main_grad, axis) for m, axis in zip(layers, (0, 1), strict=True)]
    everything = [d for r in range(parallel_state.get_data_parallel_world_size()) for d in samples(step, r)]
    expected = clipped_gradients(weights, everything, ramp)
    return {
        "error": _relative(found, expected),
        "versus_identity": _relative(found, reference_gradients(weights, everything)),
        "clipped": [float((e == 0).double().mean()) for e in expected],
        "beside": _relative(found, clipped_gradients(weights, everything, 1.0 - ramp)),
        "gradients": hashlib.sha256(json.dumps([f.tolist() for f in found]).encode()).hexdigest(),
    }


def run_where(
    place: str,
    fusion: bool,
    sequence_parallel: bool,
    overlap: bool,
    distributed_optimizer: bool,
    estimator: str = "identity",
) -> dict[str, object]:
    """Runs three steps in bf16 with a storage of the quantized weights: ``resident``, ``packed``, or cached (``step``).

    Returns a digest of everything that the steps computed, and the errors of calls that are refused between them.
    """
    model, ddp, optimizer = build(
        NormedPair, fusion, sequence_parallel, overlap, distributed_optimizer, dtype=torch.bfloat16
    )
    held = pack_weights([ddp], optimizer) if place == "packed" else hold_in_parameters([ddp], optimizer, place)
    shape_gradients([ddp], optimizer, estimator)
    resident = find_resident(ddp)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [float(loss["loss"]) for loss in schedule(ddp, own_samples(step))]
        used = [state.in_use(module.weight)[0].view(torch.uint8).tolist() for state, module in ternary_modules(model)]
        _, norm, _ = optimizer.step()
        masters = [m.detach().view(-1).tolist() for group in optimizer.param_groups for m in group["params"]]
        seen.append([losses, float(norm), used, masters])
    refused = []
    for written in (lambda: ddp.load_state_dict(ddp.state_dict()), optimizer.reload_model_params):
        try:
            written()
        except linear.StaleCacheError as error:
            refused.append(str(error))
    if overlap and distributed_optimizer:
        ddp.start_param_sync(force_sync=True)
    with latents([ddp]):
        latent = [m.weight.detach().float().flatten().tolist() for _, m in ternary_modules(model)]
        ddp.load_state_dict(ddp.state_dict())
        optimizer.reload_model_params()
    digest = hashlib.sha256(json.dumps([seen, latent]).encode()).hexdigest()
    return {"digest": digest, "cuts": resident.cut_groups if resident else 0, "held": held, "refused": refused}


def run_probe(sequence_parallel: bool) -> str:
    """Returns the verdict of the start-up probe on a bf16 pair (in fp32 the residual form happens to be exact)."""
    config = pair_config(torch.bfloat16, sequence_parallel=sequence_parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    model = Pair(config)
    apply_recipe(model, default=QuantizerConfig(), row_parallel_shards=SHARDS)
    try:
        return f"proved {probe(model)}"
    except ProbeError as error:
        return f"ProbeError: {error}"


def run_int8() -> str:
    """Checks that a row-parallel layer rounds its input to 8 bits per shard; returns "equal" or the number of errors.

    All results are integers. Weights of +-1 have a scale of 1. The largest inputs of the two shards are 127 and 254, so
    that levels are 1 and 2 apart; every input is a quarter of a level above the level that it is rounded to, and no sum
    is rounded.
    """
    config = pair_config(torch.float32)
    model = Pair(config)
    apply_recipe(model, default=QuantizerConfig(), row_parallel_shards=SHARDS, activation_bits=8)
    generator = torch.Generator().manual_seed(8)
    signs = torch.randint(0, 2, (HIDDEN, INNER), generator=generator) * 2 - 1
    levels = torch.randint(-126, 126, (SEQUENCE, BATCH, SHARDS, INNER // SHARDS), generator=generator)
    x = levels + 0.25
    levels[..., 0] = x[..., 0] = 127
    apart = torch.tensor([1, 2]).unsqueeze(-1)
    levels, x = (levels * apart).flatten(-2), (x * apart).flatten(-2)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), config.tensor_model_parallel_size
    with torch.no_grad():
        model.mlp.linear_fc2.weight.copy_(signs.chunk(size, 1)[rank])
        found = model.mlp.linear_fc2(x.chunk(size, -1)[rank].contiguous())[0]
    expected = levels @ signs.t()
    return "equal" if torch.equal(found, expected.float()) else f"{int((found != expected).sum())} others"


def run_int8_gemm(fusion: bool, sequence_parallel: bool) -> dict[str, object]:
    """Compares a pair with int8 GEMMs with one with bf16 GEMMs; returns what differs in a bit, and the errors."""
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    config = pair_config(torch.bfloat16, gradient_accumulation_fusion=fusion, sequence_parallel=sequence_parallel)
    pairs = {}
    for gemm in ("int8", "bf16"):
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        pairs[gemm] = Pair(config).mlp
        apply_recipe(pairs[gemm], default=QuantizerConfig(), activation_bits=8, gemm=gemm, recipe=_EVERY_LINEAR)
        for weight in pairs[gemm].parameters():
            weight.main_grad = torch.zeros(weight.shape)
            weight.grad_added_to_main_grad = False
    pairs["bf16"].load_state_dict(pairs["int8"].state_dict())
    different = [] if probe(pairs["int8"]) == 2 else ["probe"]
    errors = []
    for tokens in (SEQUENCE, size if sequence_parallel else 1):
        # The inputs are the same on every rank, and each takes its part. One token is zero, and one saturated.
        draw = torch.Generator().manual_seed(tokens)
        whole = {width: torch.randn(tokens, BATCH, width, generator=draw).bfloat16() for width in (HIDDEN, INNER)}
        whole[HIDDEN][-1, 0], whole[INNER][-1, 0] = 0.0, whole[INNER][-1, 0].sign()
        for name, width, column in (("linear_fc1", HIDDEN, True), ("linear_fc2", INNER, False)):
            local = whole[width] if column else whole[width].chunk(size, -1)[rank]
            given = local.chunk(size)[rank] if column and sequence_parallel else local
            upstream = None
            found = {}
            for gemm, pair in pairs.items():
                layer = getattr(pair, name)
                layer.weight.grad, x = None, given.contiguous().clone().requires_grad_()
                layer.weight.main_grad.zero_()
                y = layer(x)[0]
                upstream = torch.randn(y.shape, generator=draw).to(y.dtype) if upstream is None else upstream
                y.backward(upstream)
                gradient = layer.weight.main_grad.clone() if fusion else layer.weight.grad
                found[gemm] = (y.detach(), gradient, x.grad)
            # The backward gathers the gradient of scattered sums; all ranks drew the same gradient.
            whole_gradient = upstream if column or not sequence_parallel else torch.cat([upstream] * size)
            definition = [each.double().flatten(0, 1) for each in (whole_gradient, fake_quantize_activations(local))]
            errors.append(_relative([found["int8"][1]], [definition[0].t() @ definition[1]]))
            latent, quantizer = getattr(pairs["int8"], name).weight.detach(), QuantizerConfig()
            expected = by_definition(local, dequantize(*quantize(latent, quantizer), quantizer, local.dtype))
            if not column and size > 1:
                torch.distributed.all_reduce(expected, group=parallel_state.get_tensor_model_parallel_group())
                expected = expected.chunk(size)[rank] if sequence_parallel else expected
            if not torch.equal(found["int8"][0], expected):
                different.append(f"{name} of {tokens} tokens")
            different += [
                f"{name} of {tokens} tokens, {what}"
                for i, what in ((1, "weight gradient"), (2, "input gradient"))
                if not torch.equal(found["int8"][i], found["bf16"][i])
            ]
    return {
        "different": different,
        "error": max(errors),
        "fused": all(w.grad_added_to_main_grad for w in pairs["int8"].parameters()),
    }


_EVERY_LINEAR = Recipe.from_mapping(
    {"configs": {"q": {}}, "matchers": {"all": {"config": "q", "pattern": "*"}}}, QuantizerConfig()
)


def _relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    error = max(float((f.double() - e).abs().max() / e.abs().max()) for f, e in pairs)
    # max() drops a NaN or keeps it, depending on the order.
    return error if all(bool(f.isfinite().all()) for f, _ in pairs) else float("inf")


def _forward_step(data: Iterator[tuple], model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
    x, target = next(data)
    if model.config.sequence_parallel:
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        x, target = x.chunk(size)[rank].contiguous(), target.chunk(size)[rank]
    x, target = x.to(model.config.params_dtype), target.to(model.config.params_dtype)

    def loss(y: torch.Tensor) -> tuple[torch.Tensor, dict]:
        total = (y * target).sum()
        return total, {"loss": total.detach()}

    return model(x), loss


def _keep_epoch(self: cache.CacheEpoch) -> None:
    self.open = True


def _full_precision(self: linear.TernaryState, latent: torch.Tensor, training: bool) -> torch.Tensor:
    return latent.detach()


def _residual(self: linear.TernaryState, latent: torch.Tensor, training: bool) -> torch.Tensor:
    return latent.detach() + (self.quantize(latent)[0] - latent.detach())


def _shadow_with(attributes) -> object:
    original = linear.shadow

    def planted(weight: torch.Tensor, quantized: torch.Tensor, *others: object) -> torch.Tensor:
        stand_in = original(weight, quantized, *others)
        stand_in.__dict__ = attributes(weight)
        return stand_in

    return planted


def _wrong_main_grad(weight: torch.Tensor) -> dict[str, object]:
    return {**weight.__dict__, "main_grad": torch.zeros_like(weight)} if hasattr(weight, "main_grad") else {}


def _masked_backward(ctx, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
    """Masks the gradient inside the straight-through function, the place that first comes to mind for an estimator."""
    ctx.shadow = None
    weight, scales = ctx.latent
    rows = weight.reshape(scales.numel(), -1)
    mask = (rows.abs() <= 1.5 * scales.float().reshape(-1, 1)).reshape(weight.shape)
    return None if grad is None else grad * mask, None, None


def _masked_forward(ctx, weight: torch.Tensor, quantized: torch.Tensor, product: None = None) -> torch.Tensor:
    groups = 1 if weight.shape[1] == HIDDEN else SHARDS // parallel_state.get_tensor_model_parallel_world_size()
    rows = weight.detach().reshape(weight.shape[0] * groups, -1)
    ctx.latent = weight.detach().clone(), quantize(rows, QuantizerConfig())[1]
    ctx.set_materialize_grads(False)
    return quantized.detach()


def _whole_chunk(chunk: torch.nn.Module) -> list[cache.Cohort]:
    return [ternary_modules(chunk)]


PLANTED = {
    "stale cache": mock.patch.object(cache.CacheEpoch, "begin", _keep_epoch),
    "unquantized forward": mock.patch.object(linear.TernaryState, "weight", _full_precision),
    "residual form": mock.patch.object(linear.TernaryState, "weight", _residual),
    "gradient to the wrong tensor": mock.patch.object(linear, "shadow", _shadow_with(_wrong_main_grad)),
    "flag not carried back": mock.patch.object(linear, "shadow", _shadow_with(lambda w: dict(w.__dict__))),
}


def main(directory: Path) -> None:
    cpu.install()
    without_te.install()
    torch.distributed.init_process_group("gloo")
    # This also fills tensors from torch.empty() with NaN: the dummy gradients of fusion must never reach a real one.
    torch.use_deterministic_algorithms(True, warn_only=True)
    world = torch.distributed.get_world_size()
    results: dict[str, object] = {}
    for layout, tp in (("TP1", 1),) if world == 1 else (("TP2", 2), ("DP2", 1)):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        for flags in itertools.product((False, True), repeat=4):
            if flags[1] and tp == 1:
                continue
            numbers = dict(zip(("fusion", "sp", "overlap", "do"), map(int, flags), strict=True))
            name = " ".join([layout, *(f"{key}={value}" for key, value in numbers.items())])
            results[name] = run_case(*flags)
        results[f"{layout} no cache"] = run_case(True, tp > 1, False, False, cache_mode="none")
        results[f"{layout} frozen"] = run_case(True, tp > 1, False, False, frozen=True)
        for flags in ((True, tp > 1, True, True), (False, False, False, True), (True, False, False, False)):
            places = {place: run_where(place, *flags) for place in ("step", "resident")}
            results[f"{layout} overlap={int(flags[2])} do={int(flags[3])} places"] = places
        for flags in itertools.product((False, True), repeat=3):
            numbers = dict(zip(("fusion", "overlap", "do"), map(int, flags), strict=True))
            name = " ".join([layout, "clipped", *(f"{key}={value}" for key, value in numbers.items())])
            results[name] = run_estimator("clipped", flags[0], tp > 1, *flags[1:])
        flags = (True, tp > 1, True, True)
        results[f"{layout} ramp"] = run_estimator("clipped", *flags, ramp=0.25)
        results[f"{layout} identity"] = run_estimator("identity", *flags)
        with mock.patch(f"{__name__}.shape_gradients"):
            results[f"{layout} no estimator"] = run_estimator("identity", *flags)
        places = ("step", "resident", "packed")
        where = {place: run_where(place, *flags, estimator="clipped") for place in places}
        results[f"{layout} clipped places"] = where
        for fusion in (False, True):
            with (
                mock.patch.object(straight_through._StraightThrough, "forward", _masked_forward),
                mock.patch.object(straight_through._StraightThrough, "backward", _masked_backward),
            ):
                name = f"{layout} fusion={int(fusion)} planted mask in the function"
                results[name] = run_estimator("identity", fusion, tp > 1, False, False)
        if layout != "DP2":
            for space, statistic, group in itertools.product(SPACES, STATISTICS, (-1, 32)):
                config = QuantizerConfig(space, group, statistic=statistic, scale_multiplier=MULTIPLIERS[statistic])
                name = f"{layout} {space} {statistic} {group}"
                results[name] = [run_space(config, fusion, tp > 1 and fusion) for fusion in (False, True)]
            results[f"{layout} planted whole rows"] = [run_space(_TERNARY, True, tp > 1, UnshardedPair)]
        results[f"{layout} int8"] = run_int8()
        for flags in itertools.product((False, True), (False, True) if tp > 1 else (False,)):
            results[f"{layout} int8 gemm fusion={int(flags[0])} sp={int(flags[1])}"] = run_int8_gemm(*flags)
        results[f"{layout} probe"] = run_probe(tp > 1)
        for bug, patch in PLANTED.items():
            with patch:
                results[f"{layout} planted {bug}"] = {
                    **run_case(True, tp > 1, False, False),
                    "probe": run_probe(tp > 1),
                }
        with mock.patch.object(cohorts, "cohorts_of", _whole_chunk):
            results[f"{layout} planted early bucket"] = run_case(True, tp > 1, True, True)
        parallel_state.destroy_model_parallel()
    (directory / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

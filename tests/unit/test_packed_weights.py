# SPDX-License-Identifier: Apache-2.0
"""Tests of weights that are stored as codes and scales: no dense weight remains, and nothing else changes."""

import argparse
import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitcpm_megatron.nn.cache import CacheEpoch
from bitcpm_megatron.nn.linear import StaleCacheError, TernaryState, make_ternary
from bitcpm_megatron.parallel import ternary_modules
from bitcpm_megatron.parallel.packed.weights import PackedWeights
from bitcpm_megatron.parallel.resident import ResidentError, find_resident, latents
from bitcpm_megatron.quantization import QuantizerConfig, quantize_dequantize
from bitcpm_megatron.ternary_flags import add_ternary_arguments, ternary_mistakes
from bitcpm_megatron.training import model as training_model
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.loop import pretrain
from bitcpm_megatron.training.run import Step

OUT, IN = 48, 64


class Accumulating(torch.autograd.Function):
    """A function that accumulates weight gradients like megatron-core with gradient accumulation fusion."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        weight.main_grad += grad.t() @ x
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.empty_like(weight)


class FusedLinear(torch.nn.Linear):
    gradient_accumulation_fusion = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return Accumulating.apply(x, self.weight), None


def packed_layer(kind: type = torch.nn.Linear) -> tuple[torch.nn.Module, torch.Tensor]:
    """Returns a layer whose parameter has no values, and its quantized weight."""
    layer = kind(IN, OUT, bias=False, dtype=torch.bfloat16)
    quantized, _ = quantize_dequantize(layer.weight.detach(), QuantizerConfig())
    state = TernaryState("layer", QuantizerConfig(), CacheEpoch(), resident=True)
    make_ternary(layer, state)
    layer.weight.data = torch.full((), torch.nan, dtype=torch.bfloat16).expand(OUT, IN)
    state.unpack = lambda out: out.copy_(quantized)
    return layer, quantized


def dense_storages(but: torch.Tensor) -> list[torch.UntypedStorage]:
    """Returns all storages of the weight's size that Python objects refer to, except for that of ``but``."""
    found = {}
    for thing in gc.get_objects():
        # isinstance() would access the object of a weak proxy, which may be gone. Other kinds of tensors, such as fake
        # ones that a compiler has left in another test, have no memory.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.dtype == torch.bfloat16:
            thing = thing.untyped_storage()
        real = type(thing) is torch.UntypedStorage and thing.device.type != "meta"
        if real and thing.nbytes() == 2 * OUT * IN:
            found[thing.data_ptr()] = thing
    return [storage for address, storage in found.items() if address != but.data_ptr()]


@pytest.mark.parametrize("kind", [torch.nn.Linear, FusedLinear])
def test_a_dense_weight_lives_while_its_layer_runs(kind: type) -> None:
    layer, quantized = packed_layer(kind)
    layer.weight.main_grad = torch.zeros(OUT, IN, dtype=torch.bfloat16)
    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    others = len(dense_storages(quantized))
    result = layer(x)
    y = result[0] if isinstance(result, tuple) else result
    assert torch.equal(y, x @ quantized.t()) and len(dense_storages(quantized)) == others
    grad = torch.randn_like(y)
    y.backward(grad)
    # The graph still exists, but the only tensor of the weight's size is its gradient.
    found = layer.weight.main_grad if kind is FusedLinear else layer.weight.grad
    assert torch.equal(x.grad, grad @ quantized) and torch.equal(found, grad.t() @ x)
    assert getattr(layer.weight, "grad_added_to_main_grad", False) == (kind is FusedLinear)
    layer.weight.grad = found = None
    assert found is None and len(dense_storages(quantized)) == others and y.grad_fn is not None


def test_what_another_step_unpacks_is_not_counted_as_a_write_and_a_graph_may_be_kept() -> None:
    layer, quantized = packed_layer()
    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    y = layer(layer(x)[:, :1].expand(3, IN))
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * once) and once.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_recompute(reentrant: bool) -> None:
    layer, quantized = packed_layer()
    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: layer(x).square(), x, use_reentrant=reentrant)
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    weight = quantized.clone().requires_grad_()
    torch.nn.functional.linear(other, weight).square().sum().backward()
    assert torch.equal(x.grad, other.grad) and torch.equal(layer.weight.grad, weight.grad)


def test_saved_tensor_hooks_of_others_keep_what_they_keep() -> None:
    layer, quantized = packed_layer()
    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(y) @ quantized)


def test_a_step_without_gradients_keeps_nothing() -> None:
    layer, quantized = packed_layer()
    others = len(dense_storages(quantized))
    with torch.no_grad():
        y = layer(torch.ones(3, IN, dtype=torch.bfloat16))
    assert y.isfinite().all() and len(dense_storages(quantized)) == others


RUN = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --eval-iters 0 --mock-data --vocab-size 100
    --ternary --bf16 --use-distributed-optimizer --ternary-cache packed --log-interval 1
""".split()
FROZEN = "decoder.layers.0.mlp.linear_fc1"


def test_what_a_run_finds_in_its_parameters(single_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap, seen = training_model._wrap, []

    def wrap_frozen(args: argparse.Namespace, config: object, chunks: list) -> list:
        for state, module in ternary_modules(chunks):
            module.weight.requires_grad_(state.name != FROZEN)
        return wrap(args, config, chunks)

    def watch(step: Step) -> None:
        chunks = step.run.model.chunks
        resident = find_resident(chunks[0])
        assert isinstance(resident, PackedWeights) and resident.holds
        resident.verify()
        assert [b.param_data.untyped_storage().nbytes() for b in chunks[0].buffers] == [0]
        modules = ternary_modules(chunks)
        held = {}
        for state, module in modules:
            if state.name == FROZEN:
                assert module.weight.isfinite().all() and state.unpack is None and state.quantized is not None
                continue
            assert module.weight.isnan().all()
            with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
                module.weight.copy_(torch.ones(module.weight.shape))
            held[state.name] = state.in_use(module.weight)[0]
        with torch.no_grad(), pytest.raises(StaleCacheError, match="was written by something else"):
            module.weight.zero_()
            resident.verify()
        with pytest.raises(StaleCacheError, match="would stand among them as one"):
            chunks[0].load_state_dict(chunks[0].state_dict())
        with latents(chunks):
            for state, module in modules:
                if state.name != FROZEN:
                    assert state.unpack is None
                    assert torch.equal(quantize_dequantize(module.weight, state.config)[0], held[state.name])
        assert resident.holds and all(torch.equal(s.in_use(m.weight)[0], held[s.name]) for s, m in modules if s.unpack)
        seen.append(step.loss)

    monkeypatch.setattr(training_model, "_wrap", wrap_frozen)
    flags = ["--ternary-verify-cache", "--ternary-telemetry-interval", "1", "--log-dir", str(tmp_path)]
    pretrain(parse_args([*RUN, *flags], 1), on_step=watch)
    assert len(seen) == 2


def test_refusals() -> None:
    config = SimpleNamespace(use_distributed_optimizer=False)
    with pytest.raises(ResidentError, match="use --use-distributed-optimizer, or use --ternary-cache resident"):
        PackedWeights([SimpleNamespace(ddp_config=config)], None)
    config = SimpleNamespace(use_distributed_optimizer=True, nccl_ub=True)
    with pytest.raises(ResidentError, match="leave --use-nccl-ub out, or use --ternary-cache resident"):
        PackedWeights([SimpleNamespace(ddp_config=config)], None)
    shared = SimpleNamespace(param_data=torch.empty(8)[:4])
    chunk = SimpleNamespace(
        ddp_config=SimpleNamespace(use_distributed_optimizer=True), buffers=[shared], expert_parallel_buffers=[]
    )
    with pytest.raises(ResidentError, match="no memory of its own that can be freed: use --ternary-cache resident"):
        PackedWeights([chunk], None)


@pytest.mark.parametrize(
    ("flags", "distributed", "mistakes"),
    [
        ("--ternary --ternary-cache packed", True, []),
        ("--ternary --ternary-cache packed --ternary-param-gather packed", True, []),
        ("--ternary --ternary-cache packed", False, ["packed needs --use-distributed-optimizer.*cache resident"]),
    ],
)
def test_flags(flags: str, distributed: bool, mistakes: list[str]) -> None:
    args = add_ternary_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    args.use_distributed_optimizer = distributed
    found = ternary_mistakes(args)
    assert len(found) == len(mistakes)
    for wanted, said in zip(mistakes, found, strict=True):
        with pytest.raises(ValueError, match=wanted):
            raise ValueError(said)

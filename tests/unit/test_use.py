# SPDX-License-Identifier: Apache-2.0
"""Tests of the proof of use: a quantized layer that the first training step never runs is an error."""

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from bitcpm_megatron import QuantizerConfig, apply_recipe
from bitcpm_megatron.parallel import ProbeError, probe, watch_use

pytestmark = pytest.mark.usefixtures("single_rank")
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYERS = [f"decoder.layers.{layer}.mlp.linear_fc{i}" for layer in (0, 1) for i in (1, 2)]


def watched(experts: int | None = None, **changes) -> GPTModel:
    """Makes a ternary model that has passed the probe, and whose first step will be watched."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        num_moe_experts=experts,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        **changes,
    )
    spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=16)
    model.model_type = None
    apply_recipe(model, default=QuantizerConfig())
    probe(model)
    watch_use(model)
    return model


def run(model: GPTModel, micro_batches: int = 2, forward_only: bool = False) -> None:
    """Runs megatron-core's schedule over micro-batches of one sequence of four tokens."""

    def step(data, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        tokens = torch.arange(4).unsqueeze(0)
        loss = model(tokens, tokens, None, labels=tokens)
        return loss, lambda output: (output.mean().clone(), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=[model],
        num_microbatches=micro_batches,
        seq_length=4,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def fused_mlp(self: MLP, hidden: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
    """Computes an MLP like a fused kernel, which reads the weights of linears that it never calls."""
    gate, up = torch.nn.functional.linear(hidden, self.linear_fc1.weight).chunk(2, -1)
    return torch.nn.functional.linear(torch.nn.functional.gelu(gate) * up, self.linear_fc2.weight), None


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["plain", "recompute"])
def test_a_model_that_is_used_passes_and_says_so_once(recompute: dict, capsys: pytest.CaptureFixture) -> None:
    model = watched(**recompute)
    for _ in range(3):
        run(model)
    assert capsys.readouterr().out == "use: the first training step ran the 8 quantized layers of this rank\n"


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["plain", "recompute"])
def test_a_fused_mlp_is_found_in_the_first_step(recompute: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = watched(**recompute)
    monkeypatch.setattr(MLP, "forward", fused_mlp)
    with pytest.raises(ProbeError, match="never ran them") as caught:
        run(model)
    named = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert named == LAYERS


def test_recompute_alone_is_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass uses the fused kernel, and only the recomputation in the backward pass calls the linears."""
    model = watched(**FULL_RECOMPUTE)
    original = MLP.forward

    def fused_at_first(self: MLP, *args, **kwargs) -> tuple:
        return (original if torch._C._current_graph_task_id() != -1 else fused_mlp)(self, *args, **kwargs)

    monkeypatch.setattr(MLP, "forward", fused_at_first)
    with pytest.raises(ProbeError, match=r"decoder\.layers\.1\.mlp\.linear_fc2"):
        run(model)


def test_an_evaluation_before_is_no_training_step(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model = watched()
    run(model, forward_only=True)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(MLP, "forward", fused_mlp)
    run(model, forward_only=True)
    with pytest.raises(ProbeError):
        run(model)


def test_one_micro_batch_that_runs_a_layer_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = watched()
    original, calls = MLP.forward, []

    def now_and_then(self: MLP, *args, **kwargs) -> tuple:
        calls.append(self)
        return (original if len(calls) > 2 else fused_mlp)(self, *args, **kwargs)

    monkeypatch.setattr(MLP, "forward", now_and_then)
    run(model)


class TestExperts:
    """Tests with 16 experts for four tokens, so that at least 12 experts receive none in each of two layers."""

    def test_those_without_a_token_are_exempt_and_named(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        received: dict[SequentialMLP, list[int]] = {}

        def skipping(self: SequentialMLP, hidden: torch.Tensor, tokens_per_expert, probs=None) -> tuple:
            received[self] = [int(n) for n in tokens_per_expert]
            parts = zip(self.local_experts, hidden.split(received[self]), strict=True)
            return torch.cat([expert(part)[0] if len(part) else part for expert, part in parts]), None

        model = watched(experts=16)
        monkeypatch.setattr(SequentialMLP, "forward", skipping)
        run(model, micro_batches=1)
        idle = [
            f"decoder.layers.{layer}.mlp.experts.local_experts.{i}"
            for layer in (0, 1)
            for i, tokens in enumerate(received[model.decoder.layers[layer].mlp.experts])
            if not tokens
        ]
        assert len(idle) >= 24
        assert capsys.readouterr().out.endswith(f"but for experts that received no token: {', '.join(idle)}\n")

    @pytest.mark.parametrize("bypassed", [MLP, SequentialMLP, MoELayer])
    def test_those_with_tokens_are_not(self, bypassed: type, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host bypasses the experts, the code that passes tokens to them, or also the code that counts these."""
        model = watched(experts=16)
        replacement = fused_mlp if bypassed is MLP else lambda self, hidden, *args, **kwargs: (hidden, None)
        monkeypatch.setattr(bypassed, "forward", replacement)
        with pytest.raises(ProbeError, match=r"local_experts\.\d+\.linear_fc1"):
            run(model)

# SPDX-License-Identifier: Apache-2.0
"""Tests of ternary linears in one process: what they compute, when the cache is valid, and what is refused."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from bitcpm_megatron import QuantizerConfig, apply_recipe, dequantize, quantize
from bitcpm_megatron.nn import linear
from bitcpm_megatron.nn.cache import hold_weights, set_ramp
from bitcpm_megatron.ops import counts, fake_quantize_activations
from bitcpm_megatron.parallel import (
    ProbeError,
    Recipe,
    RecipeError,
    StaleCacheError,
    find_epoch,
    probe,
    ternary_modules,
    ternary_state,
)
from bitcpm_megatron.parallel.cohorts import cohorts_of
from bitcpm_megatron.parallel.linears import Candidate, local_config
from bitcpm_megatron.patches import ORIGINAL

pytestmark = pytest.mark.usefixtures("single_rank")
DEFAULT = QuantizerConfig()


def transformer_config(**changes) -> TransformerConfig:
    values = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
    return TransformerConfig(**{**values, "attention_dropout": 0.0, "hidden_dropout": 0.0, **changes})


def gpt(**changes) -> GPTModel:
    config = transformer_config(gated_linear_unit=True, add_bias_linear=False, normalization="RMSNorm", **changes)
    return GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=64, max_sequence_length=16)


class Linears(torch.nn.Module):
    """A model with a column-parallel, a row-parallel and a dense linear, with names that recipes match."""

    def __init__(self, **changes) -> None:
        super().__init__()
        config = transformer_config(**changes)
        init = torch.nn.init.xavier_normal_
        self.mlp = torch.nn.Module()
        self.mlp.linear_fc1 = ColumnParallelLinear(64, 128, config=config, init_method=init, bias=True)
        self.mlp.linear_fc2 = RowParallelLinear(
            128, 64, config=config, init_method=init, bias=True, input_is_parallel=True, skip_bias_add=False
        )
        self.dense = torch.nn.Linear(64, 32)


def wq(weight: torch.Tensor, config: QuantizerConfig = DEFAULT) -> torch.Tensor:
    return dequantize(*quantize(weight, config), config, weight.dtype)


def open_epoch(model: torch.nn.Module) -> None:
    """Opens an epoch of the cache, like a schedule at its first micro-batch."""
    find_epoch(model).start()
    find_epoch(model).begin()


def everything() -> Recipe:
    matchers = {"all": {"config": "q", "pattern": "*"}}
    return Recipe.from_mapping({"configs": {"q": {}}, "matchers": matchers}, DEFAULT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.verifies(
    "training",
    "a layer multiplies by its quantized weight and is quantized once per optimizer step; a probe at start-up proves"
    " the former for every layer",
)
def test_a_forward_multiplies_with_the_quantized_weight(dtype: torch.dtype) -> None:
    model = Linears(params_dtype=dtype)
    model.dense.to(dtype)
    apply_recipe(model, everything(), default=DEFAULT)
    x = torch.randn(5, 2, 64, dtype=dtype)
    y, bias = model.mlp.linear_fc1(x)
    assert bias is None
    assert torch.equal(y, x @ wq(model.mlp.linear_fc1.weight).t() + model.mlp.linear_fc1.bias)
    assert torch.equal(model.dense(x), torch.nn.functional.linear(x, wq(model.dense.weight), model.dense.bias))


@pytest.mark.parametrize("cache", ["step", "none"])
@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
def test_on_a_ramp_a_forward_multiplies_with_the_blend(cache: str, ramp: float) -> None:
    model = Linears()
    apply_recipe(model, everything(), default=DEFAULT, cache=cache, verify_cache=cache == "step")
    layers = (model.mlp.linear_fc1, model.mlp.linear_fc2, model.dense)
    with torch.no_grad():
        for layer in layers:
            # Weights are multiples of 1/4 up to 2, so that scales have few bits and nothing is rounded.
            layer.weight.copy_(torch.randint(-8, 9, layer.weight.shape) / 4)
    set_ramp([model], ramp)
    find_epoch(model).start(cohorts_of(model))
    find_epoch(model).begin()
    expected = [layer.weight.detach() + ramp * (wq(layer.weight) - layer.weight.detach()) for layer in layers]
    for _ in range(2):
        for layer, blend in zip(layers, expected, strict=True):
            x = torch.eye(blend.shape[1]).unsqueeze(1)
            y = layer(x) if layer is model.dense else layer(x)[0]
            assert torch.equal(y.squeeze(1), blend.t() + layer.bias)
            gradient = torch.randint(-4, 5, y.shape).float()
            (found,) = torch.autograd.grad(y, layer.weight, gradient)
            assert torch.equal(found, gradient.squeeze(1).t())
    for layer in layers:
        state = ternary_state(layer)
        # Telemetry and estimators always get the results of the quantizer.
        assert torch.equal(state.in_use(layer.weight)[0], wq(layer.weight))
        assert torch.equal(state.in_use(layer.weight)[1], quantize(layer.weight, DEFAULT)[1])


def test_what_keeps_no_latent_weight_is_refused_on_a_ramp() -> None:
    model = Linears()
    apply_recipe(model, everything(), default=DEFAULT)
    set_ramp([model], 0.5)
    state = ternary_state(model.dense)
    state.resident = True
    with pytest.raises(RuntimeError, match="dense: on a ramp .* use --ternary-cache step"):
        model.dense(torch.ones(1, 64))
    state.resident, state.gemm = False, "int8"
    with pytest.raises(RuntimeError, match="dense: on a ramp .* use --ternary-gemm bf16"):
        model.dense(torch.ones(1, 64))


def test_names_and_checkpoint_keys_are_unchanged() -> None:
    plain, ternary = gpt(), gpt()
    apply_recipe(ternary, default=DEFAULT)
    assert list(plain.state_dict()) == list(ternary.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in ternary.named_parameters()]
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in ternary.named_modules()]


def test_the_scales_travel_in_the_sharded_state_dict() -> None:
    model = gpt()
    apply_recipe(model, default=DEFAULT)
    state = model.sharded_state_dict(metadata={"dp_cp_group": torch.distributed.group.WORLD})
    layer = model.decoder.layers[1]
    saved = state["decoder.layers.1.self_attention.linear_qkv.weight.ternary_scale"]
    assert saved.key == "decoder.layers.self_attention.linear_qkv.weight.ternary_scale"
    assert torch.equal(saved.data, quantize(layer.self_attention.linear_qkv.weight, DEFAULT)[1])
    # Gate and up are separate shards of fc1's weight; their scales must be split in the same way.
    gate, up = state["decoder.layers.1.mlp.linear_fc1.weight.ternary_scale"].build()
    assert torch.equal(torch.cat((gate.data, up.data)), quantize(layer.mlp.linear_fc1.weight, DEFAULT)[1])


def test_embeddings_and_output_layer_are_never_quantized() -> None:
    model = gpt()
    report = apply_recipe(model, everything(), default=DEFAULT)
    assert {e.path.rpartition(".")[2] for e in report.quantized} == {
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    }
    assert len(report.quantized) == 8
    assert {e.path for e in report.entries if e.config is None} == {
        "embedding.word_embeddings",
        "embedding.position_embeddings",
        "output_layer",
    }
    table = report.table()
    assert "decoder.layers.0-1.mlp.linear_fc1" in table and "never quantized" in table


def test_outside_a_schedule_nothing_stale_is_used() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    x = torch.randn(3, 1, 64)
    model.mlp.linear_fc1(x)
    model.mlp.linear_fc1.weight.data.copy_(torch.randn(128, 64))
    y, _ = model.mlp.linear_fc1(x)
    assert torch.equal(y, x @ wq(model.mlp.linear_fc1.weight).t() + model.mlp.linear_fc1.bias)


def test_weights_that_are_held_are_quantized_once_and_anew_after_loading() -> None:
    model = gpt().eval()
    apply_recipe(model, default=DEFAULT)
    hold_weights([model])
    states = [state for state, _ in ternary_modules(model)]
    tokens = torch.arange(8).unsqueeze(0)

    def quantized(forwards: int) -> int:
        before = counts.calls
        for _ in range(forwards):
            model(tokens, tokens, None)
        return counts.calls - before

    assert quantized(3) == len(states)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    state["decoder.layers.0.mlp.linear_fc1.weight"] *= -1
    model.load_state_dict(state, strict=False)
    assert quantized(2) == len(states)
    fc1 = model.decoder.layers[0].mlp.linear_fc1
    assert torch.equal(ternary_state(fc1).quantized, wq(fc1.weight))


def run_schedule(model: torch.nn.Module, forward_step, micro_batches: int, forward_only: bool = False) -> None:
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=micro_batches,
        seq_length=4,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def gpt_step(data, model: torch.nn.Module):
    tokens = torch.randint(0, 64, (1, 4))
    loss = model(tokens, torch.arange(4).unsqueeze(0), None, labels=tokens)
    return loss, lambda output: (output.mean().clone(), {})


def test_once_per_schedule_and_anew_after_train_eval_and_loading() -> None:
    model = gpt()
    apply_recipe(model, default=DEFAULT)
    model.model_type = None
    state = ternary_state(model.decoder.layers[0].mlp.linear_fc1)

    def quantizations(change=lambda: None, micro_batches: int = 3) -> int:
        change()
        before = state.count
        run_schedule(model, gpt_step, micro_batches)
        return state.count - before

    assert quantizations() == 1
    assert quantizations(model.eval) == 1
    assert quantizations(model.train) == 1
    assert not find_epoch(model).open, "the schedule is over"

    def in_the_middle(change) -> int:
        def forward_step(data, chunk: torch.nn.Module):
            result = gpt_step(data, chunk)
            change()
            return result

        before = state.count
        with torch.no_grad():
            run_schedule(model, forward_step, 4, forward_only=True)
        return state.count - before

    assert in_the_middle(lambda: None) == 1
    assert in_the_middle(lambda: model.load_state_dict(model.state_dict())) == 4
    assert in_the_middle(lambda: model.train(not model.training)) == 4


MIXED = {
    "configs": {"rows": {}, "fine": {"group_size": 32}, "coarse": {"group_size": 64}, "high": {"eps": 0.25}},
    "matchers": {
        "high": {"config": "high", "pattern": "decoder.layers.1.self_attention.linear_proj"},
        "fine": {"config": "fine", "pattern": "*.linear_fc1"},
        "coarse": {"config": "coarse", "pattern": "*.linear_fc2"},
        "rest": {"config": "rows", "pattern": "*.linear_*"},
    },
}


def test_all_weights_of_a_schedule_are_quantized_together() -> None:
    """The op is called once per quantizer, for all group sizes, and gives the same bits as for each weight alone."""
    model = gpt()
    apply_recipe(model, Recipe.from_mapping(MIXED, DEFAULT), default=DEFAULT)
    model.model_type = None
    modules = ternary_modules(model)

    def calls(forward_step=gpt_step) -> int:
        before = counts.calls
        run_schedule(model, forward_step, 3)
        return counts.calls - before

    assert {state.config.group_size for state, _ in modules} == {-1, 32, 64}
    for step in range(2):
        with torch.no_grad():
            for _, module in modules:
                module.weight.mul_(-1.5)
        assert calls() == 2, "the quantizer with an eps of its own, and the others"
        for state, module in modules:
            assert torch.equal(state.quantized, wq(module.weight, state.config)), state.name
            assert torch.equal(state.scales, quantize(module.weight, state.config)[1]), state.name
            assert state.count == step + 1
    assert not find_epoch(model).cohorts, "what is kept beyond the schedule is copied and pickled with each layer"

    def one_layer_evaluates(data, chunk: torch.nn.Module):
        result = gpt_step(data, chunk)
        modules[3][1].train(not modules[3][1].training)
        return result

    # This layer is quantized twice more, by itself; the others remain valid.
    assert calls(one_layer_evaluates) == 2 + 2
    assert [state.count for state, _ in modules] == [3, 3, 3, 5, 3, 3, 3, 3]
    before = counts.calls
    gpt_step(None, model)
    assert counts.calls - before == len(modules), "outside a schedule each forward quantizes its own"


def test_old_quantized_weights_go_before_new_ones_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    apply_recipe(model, default=DEFAULT)
    model.model_type = None
    run_schedule(model, gpt_step, 1)
    states = [state for state, _ in ternary_modules(model)]
    old, alive = [weakref.ref(state.quantized) for state in states], []
    quantize_all = linear.quantize_all

    def watched(*arguments):
        gc.collect()
        alive.append(sum(reference() is not None for reference in old))
        return quantize_all(*arguments)

    monkeypatch.setattr(linear, "quantize_all", watched)
    run_schedule(model, gpt_step, 1)
    assert alive == [0]


def test_who_is_quantized_by_others_has_a_cache_and_no_weight_in_the_parameters() -> None:
    model = gpt()
    apply_recipe(model, default=DEFAULT)
    modules = ternary_modules(model)
    states = [state for state, _ in modules]
    states[1].cache, states[2].resident = "none", True
    find_epoch(model).start(cohorts_of(model))
    find_epoch(model).begin()
    before = counts.calls
    modules[0][1](torch.randn(3, 1, 64))
    assert counts.calls - before == 1
    assert [state.count for state in states] == [1, 0, 0, 1, 1, 1, 1, 1]


def test_of_an_unknown_wrapper_nothing_is_assumed() -> None:
    """A wrapper may store weights elsewhere until their layer runs."""

    class Unknown(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = gpt(bf16=True)
    apply_recipe(model, default=DEFAULT)
    assert [len(cohort) for cohort in cohorts_of(model)] == [8]
    assert [len(cohort) for cohort in cohorts_of(Float16Module(model.config, model))] == [8]
    assert cohorts_of(Unknown(model)) == cohorts_of(Float16Module(model.config, Unknown(model))) == []


def test_the_schedule_closes_the_epoch_also_when_it_fails() -> None:
    model = gpt()
    apply_recipe(model, default=DEFAULT)
    model.model_type = None

    def fails(data, chunk: torch.nn.Module):
        gpt_step(data, chunk)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_schedule(model, fails, 2)
    assert not find_epoch(model).open


def test_verify_mode_finds_a_cache_made_stale_by_data_writes() -> None:
    model = gpt()
    apply_recipe(model, default=DEFAULT, verify_cache=True)
    model.model_type = None
    weight = model.decoder.layers[1].mlp.linear_fc2.weight

    def writes(data, chunk: torch.nn.Module):
        result = gpt_step(data, chunk)
        weight.data[0].neg_()
        return result

    with pytest.raises(StaleCacheError, match=r"decoder\.layers\.1\.mlp\.linear_fc2: \d+ of .*--ternary-cache none"):
        run_schedule(model, writes, 2)


def test_many_micro_batches_in_flight_share_one_quantized_weight() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    open_epoch(model)
    weight = model.mlp.linear_fc1.weight
    inputs = [torch.randn(3, 1, 64) for _ in range(4)]
    outputs = [model.mlp.linear_fc1(x)[0] for x in inputs]
    assert ternary_state(model.mlp.linear_fc1).count == 1
    for y in reversed(outputs):
        y.sum().backward()
    expected = sum(torch.ones(3, 128).t() @ x[:, 0] for x in inputs)
    torch.testing.assert_close(weight.grad, expected)


def test_recompute_under_no_grad_takes_the_same_path_and_leaks_nothing() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    layer = model.mlp.linear_fc1
    open_epoch(model)
    x = torch.randn(3, 1, 64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda t: layer(t)[0], x, use_reentrant=True)
    y.sum().backward()
    assert ternary_state(layer).count == 1
    torch.testing.assert_close(x.grad, wq(layer.weight).sum(0).expand_as(x))
    dead = weakref.ref(ternary_state(layer).quantized)
    open_epoch(model)
    layer(x)[0].sum().backward()
    gc.collect()
    assert dead() is None, "a finished step keeps its quantized weight alive"


def test_a_frozen_weight_is_quantized_and_gets_no_gradient() -> None:
    model = Linears()
    model.mlp.linear_fc1.weight.requires_grad_(False)
    report = apply_recipe(model, default=DEFAULT)
    assert "(frozen)" in report.table()
    x = torch.randn(3, 1, 64, requires_grad=True)
    model.mlp.linear_fc1(x)[0].sum().backward()
    torch.testing.assert_close(x.grad, wq(model.mlp.linear_fc1.weight).sum(0).expand_as(x))
    assert model.mlp.linear_fc1.weight.grad is None


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gemms_are_those_of_the_latent_weight(transposed: bool) -> None:
    """The quantized weight must require a gradient, or torch.matmul would multiply token by token.

    A micro-batch of one sequence is [tokens, 1, features], with strides that torch.matmul folds into one GEMM only for
    a weight that requires a gradient; otherwise it multiplies each token by a copy of the weight.
    """

    def gemms(model: Linears) -> list[str]:
        # With several tensor-parallel ranks, the input goes into the GEMM unchanged; this flag has the same effect.
        model.mlp.linear_fc1.allreduce_dgrad = True
        x = torch.randn(1, 8, 64).transpose(0, 1) if transposed else torch.randn(8, 1, 64)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.mlp.linear_fc2(model.mlp.linear_fc1(x.requires_grad_())[0])[0].sum().backward()
        return [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")]

    plain, ternary = Linears(), Linears()
    apply_recipe(ternary, default=DEFAULT)
    assert gemms(ternary) == gemms(plain)


def test_inference_mode_then_training() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    open_epoch(model)
    x = torch.randn(3, 1, 64)
    with torch.inference_mode():
        y = model.mlp.linear_fc1(x)[0]
    again = model.mlp.linear_fc1(x)[0]
    again.sum().backward()
    assert torch.equal(y, again)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    # The model has only dense linears, because megatron-core's hold a process group, which cannot be copied.
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    apply_recipe(model, everything(), default=DEFAULT)
    twin = copy.deepcopy(model)
    twin[0].weight.data.neg_()
    x = torch.randn(3, 64)
    assert torch.equal(twin(x), x @ wq(twin[0].weight).t())
    assert torch.equal(model(x), x @ wq(model[0].weight).t())
    assert not torch.equal(twin(x), model(x))
    assert find_epoch(twin) is ternary_state(twin[0]).epoch is not find_epoch(model)


def test_a_pickled_model_comes_back_ternary(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    apply_recipe(model, everything(), default=DEFAULT)
    torch.save(model, tmp_path / "model.pt")
    # The file is trusted, because it was written in the line above.
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(3, 64)
    assert torch.equal(again(x), x @ wq(model[0].weight).t())
    assert find_epoch(again) is ternary_state(again[0]).epoch


@pytest.mark.parametrize("name", ["dense", "column", "row"])
def test_torch_compile_traces_a_whole_ternary_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Linears()
    apply_recipe(model, everything(), default=DEFAULT)
    # megatron-core's row-parallel forward warns about a default that it uses itself; the compiler would stop there.
    monkeypatch.setattr(layers, "get_tensor_model_parallel_group_if_none", lambda group, **_: group, raising=False)
    layer = {"dense": model.dense, "column": model.mlp.linear_fc1, "row": model.mlp.linear_fc2}[name]
    x = torch.randn(3, 2, layer.weight.shape[1])

    def first(y):
        return y[0] if isinstance(y, tuple) else y

    eager = first(layer(x))
    eager.square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    compiled = first(torch.compile(layer, fullgraph=True, backend="aot_eager")(x))
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(layer.weight.grad, gradient)


def test_torch_compile_with_fusion_is_refused() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    model.mlp.linear_fc1.gradient_accumulation_fusion = True
    with pytest.raises(Exception, match="cannot trace gradient-accumulation fusion"):
        torch.compile(model.mlp.linear_fc1, fullgraph=True, backend="eager")(torch.randn(3, 1, 64))


def test_a_weight_handed_to_forward_is_refused() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    layer = model.mlp.linear_fc1
    for call in ({"weight": layer.weight}, {}):
        arguments = () if call else (layer.weight.detach(),)
        with pytest.raises(RuntimeError, match="mlp.linear_fc1: a weight handed to forward.. would bypass"):
            layer(torch.randn(3, 1, 64), *arguments, **call)


def test_the_probe_finds_a_forward_that_bypasses_the_quantizer() -> None:
    model = Linears()
    apply_recipe(model, everything(), default=DEFAULT)
    assert probe(model) == 3 == len(ternary_modules(model))
    del model.mlp.linear_fc2.__dict__["forward"]
    with pytest.raises(ProbeError, match=r"mlp\.linear_fc2 \(RowParallelLinear\): largest difference") as caught:
        probe(model)
    assert "linear_fc1" not in str(caught.value)


@pytest.mark.parametrize("field", ["fp8", "fp4"])
def test_low_precision_formats_are_refused(field: str) -> None:
    model = Linears()
    setattr(model.mlp.linear_fc1.config, field, "hybrid")
    with pytest.raises(RecipeError, match=rf"mlp\.linear_fc1: {field}='hybrid' is configured.*switch it off"):
        apply_recipe(model, default=DEFAULT)


def test_an_unsupported_dtype_is_refused_and_nothing_is_changed() -> None:
    model = Linears()
    model.mlp.linear_fc2.to(torch.float64)
    with pytest.raises(RecipeError, match=r"mlp\.linear_fc2: a weight of dtype torch\.float64 .*cast it to"):
        apply_recipe(model, default=DEFAULT)
    assert ternary_modules(model) == []
    assert "forward" not in model.mlp.linear_fc1.__dict__


def test_a_module_that_would_bypass_the_quantizer_is_refused() -> None:
    model = Linears()
    model.mlp.linear_odd = torch.nn.Bilinear(4, 4, 4)
    with pytest.raises(RecipeError, match=r"mlp\.linear_odd: matcher 'linears' asks to quantize .*Bilinear"):
        apply_recipe(model, default=DEFAULT)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.linear_fc3", "fits no module of the model"),
        ("decoder.layers.7.*", "fits no module of the model"),
        ("output_layer", "names output_layer: embeddings, the output layer and adapters are never quantized"),
        ("embedding.*", "are never quantized; remove it"),
    ],
)
def test_a_matcher_without_effect_is_refused(pattern: str, message: str) -> None:
    recipe = {"configs": {"q": {"group_size": 32}}, "matchers": {"mine": {"config": "q", "pattern": pattern}}}
    with pytest.raises(RecipeError, match=message):
        apply_recipe(gpt(), Recipe.from_mapping(recipe, DEFAULT), default=DEFAULT)


def test_twice_is_refused() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    with pytest.raises(RecipeError, match="once per model"):
        apply_recipe(model, default=DEFAULT)


def test_what_was_applied_survives_a_refusal() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    epoch = find_epoch(model)
    with pytest.raises(RecipeError):
        apply_recipe(model, default=DEFAULT)
    assert find_epoch(model) is epoch is ternary_state(model.mlp.linear_fc1).epoch


def test_a_foreign_wrapper_on_forward_is_refused() -> None:
    model = Linears()
    model.mlp.linear_fc1.forward = lambda x: x
    with pytest.raises(RecipeError, match="mlp.linear_fc1: its forward is wrapped already"):
        apply_recipe(model, default=DEFAULT)
    assert ternary_modules(model) == [], "apply all of it, or change nothing"


def test_first_matcher_decides_with_global_layer_numbers() -> None:
    recipe = {
        "configs": {"keep": "full-precision", "fine": {"group_size": 32}},
        "matchers": {
            "first": {"config": "keep", "pattern": "decoder.layers.0.*"},
            "off": {"config": "keep", "pattern": "*", "enabled": False},
            "rest": {"config": "fine", "pattern": "*.linear_*"},
        },
    }
    model = gpt()
    report = apply_recipe(model, Recipe.from_mapping(recipe, DEFAULT), default=DEFAULT)
    assert {e.path.split(".")[2] for e in report.quantized} == {"1"}
    assert set(map(str, report.modules(DEFAULT).values())) == {"{'group_size': 32}"}


@pytest.mark.parametrize(
    ("in_features", "tensor_parallel", "group_size", "shards", "expected"),
    [
        (256, 1, -1, None, -1),
        (256, 2, -1, None, -1),
        (256, 1, -1, 4, 64),
        (256, 2, -1, 4, 64),
        (256, 4, -1, 4, -1),
        (256, 2, 64, None, 64),
        (256, 2, 64, 8, 64),
    ],
)
def test_row_parallel_groups(in_features, tensor_parallel, group_size, shards, expected) -> None:
    assert local_group(in_features, tensor_parallel, group_size, shards) == expected


@pytest.mark.parametrize(
    ("in_features", "tensor_parallel", "group_size", "shards", "message"),
    [
        (256, 4, -1, 2, "2 row-parallel shards cannot be spread over a tensor-parallel size of 4"),
        (256, 4, 128, None, "group_size=128 does not divide a row of 64"),
        (96, 1, -1, 2, "cut a row of 96 into groups of 48, which is no multiple of 32"),
    ],
)
def test_row_parallel_groups_that_cannot_be(in_features, tensor_parallel, group_size, shards, message) -> None:
    with pytest.raises(ValueError, match=rf"^here: .*{message}"):
        local_group(in_features, tensor_parallel, group_size, shards)


def local_group(in_features: int, tensor_parallel: int, group_size: int, shards: int | None) -> int:
    module = SimpleNamespace(weight=torch.empty(8, in_features // tensor_parallel), input_size=in_features)
    return local_config(Candidate("here", module, "row"), QuantizerConfig(group_size=group_size), shards).group_size


def test_the_same_row_groups_at_every_tensor_parallel_size() -> None:
    weight = torch.randn(16, 256)
    whole = wq(weight, QuantizerConfig(group_size=local_group(256, 1, -1, 4)))
    for tensor_parallel in (2, 4):
        config = QuantizerConfig(group_size=local_group(256, tensor_parallel, -1, 4))
        assert torch.equal(torch.cat([wq(p, config) for p in weight.chunk(tensor_parallel, 1)], 1), whole)


def test_patches_are_marked_and_applied_once() -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.module import MegatronModule

    apply_recipe(Linears(), default=DEFAULT)
    apply_recipe(Linears(), default=DEFAULT)
    for patched in (MegatronModule.set_is_first_microbatch, schedules.forward_backward_no_pipelining):
        assert not hasattr(getattr(patched, ORIGINAL), ORIGINAL)


def test_unknown_modules_are_listed_not_hidden() -> None:
    model = Linears()
    report = apply_recipe(model, default=DEFAULT)
    dense = next(e for e in report.entries if e.path == "dense")
    assert (dense.config, dense.reason, dense.kind) == (None, "no matcher", "dense")


def test_without_a_wrapped_schedule_the_cache_stays_closed() -> None:
    model = gpt()
    apply_recipe(model, default=DEFAULT)
    model.set_is_first_microbatch()
    assert not find_epoch(model).open


def test_linears_that_others_read_without_calling_are_refused() -> None:
    model = torch.nn.TransformerEncoderLayer(64, 4, 128)
    for pattern in ("linear1", "self_attn.out_proj"):
        recipe = {"configs": {"q": {}}, "matchers": {"m": {"config": "q", "pattern": pattern}}}
        with pytest.raises(RecipeError, match="would bypass the quantizer"):
            apply_recipe(model, Recipe.from_mapping(recipe, DEFAULT), default=DEFAULT)
    recipe = {"configs": {"q": {}}, "matchers": {"m": {"config": "q", "pattern": "here"}}}
    both = torch.nn.ModuleDict({"here": torch.nn.Linear(64, 64, bias=False), "there": model})
    report = apply_recipe(both, Recipe.from_mapping(recipe, DEFAULT), default=DEFAULT)
    matrices = sum(p.numel() for p in both.parameters() if p.dim() >= 2)
    assert sum(e.parameters for e in report.entries) == matrices, "the table counts every matrix"


def test_without_a_recipe_no_matrix_of_a_layer_is_left_out_silently() -> None:
    model = gpt()
    model.decoder.layers[0].mlp.experts = torch.nn.ParameterList([torch.randn(4, 4)])
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.experts: a ParameterList cannot be quantized"):
        apply_recipe(model, default=DEFAULT)


def test_a_parametrization_on_top_is_refused() -> None:
    model = Linears()
    apply_recipe(model, everything(), default=DEFAULT)
    torch.nn.utils.parametrize.register_parametrization(model.dense, "weight", torch.nn.Identity())
    with pytest.raises(RuntimeError, match="dense: something, .* hides the quantized weight"):
        model.dense(torch.randn(2, 64))


def test_a_weight_that_lives_in_the_instance_is_put_back() -> None:
    model = Linears()
    apply_recipe(model, everything(), default=DEFAULT)
    weight = model.dense.weight.detach().clone()
    del model.dense._parameters["weight"]
    model.dense.__dict__["weight"] = weight  # FSDP1 does the same
    for _ in range(2):
        assert torch.equal(model.dense(torch.eye(64)) - model.dense.bias, wq(weight).t() + 0 * model.dense.bias)
        assert model.dense.weight is weight


def test_non_reentrant_recompute_leaks_nothing() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT)
    layer, seen = model.mlp.linear_fc1, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)[0]
        seen.append(weakref.ref(ternary_state(layer).quantized))
        return y

    for _ in range(3):
        x = torch.randn(3, 1, 64, requires_grad=True)
        torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False).sum().backward()
    gc.collect()
    assert [r() is not None for r in seen[:-1]] == [False] * (len(seen) - 1)


def test_activations_are_quantized_before_the_gemm() -> None:
    model = Linears()
    apply_recipe(model, default=DEFAULT, activation_bits=8)
    x = torch.randn(3, 2, 64)
    expected = fake_quantize_activations(x) @ wq(model.mlp.linear_fc1.weight).t() + model.mlp.linear_fc1.bias
    assert torch.equal(model.mlp.linear_fc1(x)[0], expected)
    assert probe(model) == 2
    with pytest.raises(RuntimeError, match="hand the input to forward.. by position"):
        model.mlp.linear_fc1(input_=x)
    with pytest.raises(ValueError, match="activation_bits=4 is not possible"):
        apply_recipe(Linears(), default=DEFAULT, activation_bits=4)

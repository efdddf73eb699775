# SPDX-License-Identifier: Apache-2.0
"""Tests of the adaptor with test doubles of its hosts: what it hooks, in which order, and what it refuses."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from support import host_doubles
from torch.distributed.checkpoint.filesystem import SerializationFormat

from bitcpm_megatron import host
from bitcpm_megatron.launch import pretrain_gpt
from bitcpm_megatron.models.from_arguments import NAMES
from bitcpm_megatron.ops import registry
from bitcpm_megatron.parallel import ProbeError, find_epoch, linears, ternary_modules
from bitcpm_megatron.patches import megatron_lm, mindspeed
from bitcpm_megatron.ternary_flags import add_arguments
from bitcpm_megatron.training.flags import OF_DISTILLATION

# HOOK runs only the first part of IMPORT, which sets the exception hook; the rest would need a host.
IMPORT = "import bitcpm_megatron.adaptor"
HOOK = f"import contextlib\nwith contextlib.suppress(ValueError): {IMPORT}\n0"
# With a process group, torch's exception hook, which prints the rank before each line, wraps ours.
GROUP = "from torch import distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"
pytestmark = pytest.mark.usefixtures("single_rank", "fresh")
CHECKOUT = Path(__file__).resolve().parents[2]
NOTHING = argparse.Namespace(ternary=False)


class LayerNormLinear(torch.nn.Module):
    """A layer with the interface of MindSpeed's emulated TELayerNormColumnParallelLinear."""

    def __init__(self, config: TransformerConfig, rows: int) -> None:
        super().__init__()
        self.config, self.input_size, self.output_size = config, config.hidden_size, rows
        self.weight = torch.nn.Parameter(torch.randn(rows, config.hidden_size) * 0.05)
        self.layer_norm_weight = torch.nn.Parameter(torch.rand(config.hidden_size) + 0.5)

    def _layernorm(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not with RMSNorm")

    def _rmsnorm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.layer_norm_weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(self._rmsnorm(x), self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {f"{prefix}weight": self.weight}


class Bypassing(LayerNormLinear):
    """A layer that computes with its own reference to the weight, past the quantizer."""

    def __init__(self, config: TransformerConfig, rows: int) -> None:
        super().__init__(config, rows)
        self.kept = [self.weight]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(self._rmsnorm(x), self.kept[0]), None


class Chunk(torch.nn.Module):
    """A model chunk with one layer, enough for a recipe."""

    def __init__(self, linear: Callable | None) -> None:
        super().__init__()
        config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, normalization="RMSNorm")
        init = torch.nn.init.xavier_normal_
        more = {"config": config, "init_method": init, "bias": False}
        column = ColumnParallelLinear(64, 128, **more) if linear is None else linear(config, 128)
        row = RowParallelLinear(128, 64, **more, input_is_parallel=True, skip_bias_add=True)
        self.config = config
        self.decoder = torch.nn.ModuleDict({"linear_fc1": column, "linear_fc2": row})

    def sharded_state_dict(self) -> dict:
        """Returns the sharded state dict like a GPTModel."""
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        return {k: v for n, m in self.decoder.items() for k, v in m.sharded_state_dict(f"{n}.", (), metadata).items()}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets the state: no job, no host, no registered linear, and the adaptor is not imported."""
    monkeypatch.setattr(host, "job", host.Job())
    monkeypatch.setattr(linears, "_registered", {})
    monkeypatch.setattr(mindspeed, "_applied", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("BITCPM_HOST", raising=False)
    monkeypatch.delitem(sys.modules, "bitcpm_megatron.adaptor", raising=False)


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Callable[..., host_doubles.MegatronTraining]:
    """Returns a function that makes a Megatron-LM double, whose modules can be imported but are not yet."""

    def make(linear: Callable | None = None, **more) -> host_doubles.MegatronTraining:
        double = host_doubles.MegatronTraining(monkeypatch, lambda: [Chunk(linear)], **more)
        monkeypatch.setattr(megatron_lm, "imported_too_early", lambda: None)
        return double

    return make


def python(script: str) -> subprocess.CompletedProcess:
    """Runs a script in a separate process, which has megatron-core but no Megatron-LM."""
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def adapt() -> str:
    """Imports ``bitcpm_megatron.adaptor``, and returns the host that it found."""
    return importlib.import_module("bitcpm_megatron.adaptor").HOST


def test_a_job_trains_ternary_after_one_import(megatron) -> None:
    job = megatron()
    assert adapt() == "megatron-lm"
    (chunk,) = job.run(["--ternary", "--ternary-group-size", "32"])
    assert [s.name for s, _ in ternary_modules(chunk)] == ["decoder.linear_fc1", "decoder.linear_fc2"]
    assert "holds bit for bit in 2 layers" in "\n".join(job.printed)
    assert "ternary: 2 of 2 modules" in job.printed[-2]
    # The double's optimizer is not one of megatron-core's.
    assert job.printed[-1].startswith("cache: step, a quantized weight beside each latent one (not resident: ")


def test_an_optimizer_with_masters_of_its_own_is_named_by_flags_that_can_be_given() -> None:
    args = argparse.Namespace(optimizer_selection="fused_ema_adamw", reuse_fp32_param=True, ternary_cache="auto")
    flags = "--reuse-fp32-param, --optimizer-selection fused_ema_adamw"
    assert host._hold(args, [], None).endswith(f"(not resident: {flags})")
    args.ternary_cache = "resident"
    with pytest.raises(host.HostError, match=f"^--ternary-cache resident: {flags} keeps .*use --ternary-cache step"):
        host._hold(args, [], None)


def test_an_optimizer_that_would_not_take_the_gradients_of_an_estimator_is_refused(megatron) -> None:
    job = megatron()
    adapt()
    with pytest.raises(host.HostError, match="--ternary-estimator clipped: .*use --ternary-estimator identity"):
        job.run(["--ternary", "--ternary-estimator", "clipped"])


def test_a_ramp_is_for_our_own_loop(megatron, tmp_path: Path) -> None:
    job = megatron()
    adapt()
    with pytest.raises(host.HostError, match="--ternary-ramp-iters 5: hosts do not tell which step they take"):
        job.run(["--ternary", "--ternary-ramp-iters", "5"])
    job.run(["--ternary", "--save", str(tmp_path)])
    (file,) = tmp_path.rglob("ternary_quantizer.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "ramp": 0.5}))
    with pytest.raises(host.HostError, match="saved in the middle of a ramp, on which hosts cannot go on"):
        job.run(["--ternary", "--load", str(tmp_path)])


def test_so_does_a_host_whose_builders_make_the_model(megatron) -> None:
    """Megatron-LM from core_v0.18 on has no get_model, and makes the configuration from arguments elsewhere."""
    job = megatron(builders=True)
    adapt()
    (chunk,) = job.run(["--ternary"])
    assert len(ternary_modules(chunk)) == 2 and "holds bit for bit in 2 layers" in "\n".join(job.printed)


def test_adapters_train_in_full_precision_beside_ternary_layers(megatron, monkeypatch, tmp_path: Path) -> None:
    """PEFT's names change neither quantized layers nor their recorded names: a pretraining checkpoint still fits."""
    job = megatron()
    adapt()
    job.run(["--ternary", "--save", str(tmp_path)])
    monkeypatch.setattr(job, "build_model", lambda: [host_doubles.PeftModel(Chunk(None))])
    (model,) = job.run(["--ternary", "--load", str(tmp_path)])
    assert "quantizer: as the checkpoint records" in job.printed
    layers = {state.name: (state, module) for state, module in ternary_modules(model)}
    assert list(layers) == ["decoder.linear_fc1", "decoder.linear_fc2"]
    (table,) = (line for line in job.printed if "ternary: 2 of 6 modules" in line)
    for name in ("fc1.lora_A", "fc1.lora_B", "fc2.lora_A", "fc2.lora_B"):
        (row,) = (line.split() for line in table.splitlines() if line.startswith(f"decoder.linear_{name}.default "))
        assert row[3:5] == ["full", "precision"]

    adapted, x = model.get_base_model().decoder["linear_fc1"], torch.randn(3, 1, 64)
    state, base = layers["decoder.linear_fc1"]
    quantized, _ = state.quantize(base.weight)
    low = x @ adapted.lora_A["default"].weight.t() @ adapted.lora_B["default"].weight.t()
    assert torch.equal(adapted(x)[0], x @ quantized.t() + low)


def test_without_the_flag_nothing_changes(megatron, tmp_path: Path) -> None:
    job = megatron()
    adapt()
    (chunk,) = job.run(["--save", str(tmp_path)])
    assert not ternary_modules(chunk) and job.printed == []


def test_importing_it_twice_changes_nothing_more(megatron) -> None:
    job = megatron()
    adapt()
    parse_args = sys.modules["megatron.training.arguments"].parse_args
    del sys.modules["bitcpm_megatron.adaptor"]
    adapt()
    assert sys.modules["megatron.training.arguments"].parse_args is parse_args
    job.run(["--ternary"])


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_the_record_goes_with_the_checkpoint_and_is_held_against_the_next_run(megatron, tmp_path, format) -> None:
    job = megatron()
    adapt()
    # The double asserts that the record exists when the tracker is written.
    job.run(["--ternary", "--ternary-row-parallel-shards", "2", "--ckpt-format", format, "--save", str(tmp_path)])
    more = ["--ckpt-format", format, "--load", str(tmp_path)]
    job.run(["--ternary", *more])
    assert job.args.ternary_row_parallel_shards == 2
    assert "quantizer: as the checkpoint records" in job.printed
    assert not any("ternary_scale" in name for name in job.loaded_with)
    with pytest.raises(host.HostError, match="row_parallel_shards: 2 in the checkpoint, 1 asked for"):
        job.run(["--ternary", "--ternary-row-parallel-shards", "1", *more])
    with pytest.raises(host.HostError, match="--ternary is not given"):
        job.run(more)
    job.run(["--allow-quantizer-change", *more])
    assert any("changed on request" in line for line in job.printed)


def test_the_scales_are_saved(megatron) -> None:
    job = megatron()
    adapt()
    (chunk,) = job.run(["--ternary"])
    assert {n for n in chunk.sharded_state_dict() if "ternary_scale" in n} == {
        "linear_fc1.weight.ternary_scale",
        "linear_fc2.weight.ternary_scale",
    }


@pytest.mark.parametrize("builders", [False, True])
def test_the_attention_multiplier_reaches_the_configuration(megatron, monkeypatch, builders: bool) -> None:
    job = megatron(builders=builders)
    adapt()
    monkeypatch.setattr(
        host, "prepare", lambda args, chunks, *_: [setattr(c, "_bitcpm_prepared", 1) for c in chunks] and []
    )
    job.run(["--attention-multiplier", "0.125"])
    assert job.config.softmax_scale == 0.125
    job.run([])
    assert job.config.softmax_scale is None


@pytest.mark.parametrize(
    "flags",
    [
        "--fp8-format hybrid",
        "--qat-scheme w4a16-mxfp4",
        "--use-ascend-mc2",
        "--ckpt-format torch_dcp",
        "--ternary-telemetry-interval 5",
        "--ternary-verify-cache --ternary-cache none",
        "--ternary-param-gather packed",
        "--ternary-cache packed",
        "--rope-scaling-type longrope",
        "--scale-depth 1.4 --residual-multiplier 0.2",
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(megatron, flags: str) -> None:
    job = megatron()
    adapt()
    with pytest.raises(host.HostError, match=flags.split()[0]):
        job.run(["--ternary", *flags.split()])


def test_flags_without_ternary_are_refused(megatron) -> None:
    job = megatron()
    adapt()
    with pytest.raises(host.HostError, match="--ternary-group-size without --ternary"):
        job.run(["--ternary-group-size", "64"])


def check(**of_the_host: object) -> argparse.Namespace:
    """Checks the arguments of a ternary job in a host, and returns them."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--ternary"])
    args.__dict__.update({**dict.fromkeys(OF_DISTILLATION), **of_the_host})
    host.check_arguments(args)
    return args


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "fp4": True,
        "enable_cuda_graph": True,
        "use_torch_fsdp2": True,
        "use_custom_fsdp": True,
        "tp_2d": True,
        "layerzero": True,
        "lora_fusion": True,
        "lu_lora_final_layer_index": 0,
        "use_fused_mlp": True,
        "adaptive_memory_optimization": True,
        "smart_swap": True,
        "compress_activation": "0:8",
        "use_transformer_engine_op_fuser": True,
    }.items(),
)
def test_so_is_what_hosts_have_beyond(name: str, value: object) -> None:
    with pytest.raises(host.HostError, match=f"--{name.replace('_', '-')} {value}"):
        check(**{name: value})
    for off in (None, False, ""):
        check(**{name: off})


ALONE = {"context_parallel_size": 1, "eod_mask_loss": False}


def test_the_flags_of_distillation_mean_in_hosts_what_they_mean_in_our_loop(megatron) -> None:
    learning = check(distill_teacher="runs/8b", **ALONE)
    assert (learning.distill_alpha, learning.distill_temperature, learning.distill_direction) == (1.0, 1.0, "forward")
    assert check().distill_alpha is None
    with pytest.raises(host.HostError, match="--distill-alpha needs --distill-teacher"):
        check(distill_alpha=0.5)
    with pytest.raises(host.HostError, match="--qad-enable True: it is MindSpeed's own distillation"):
        check(distill_teacher="runs/8b", qad_enable=True, **ALONE)
    with pytest.raises(host.HostError, match="--distill-targets store: samples of a host have no numbers"):
        check(distill_targets="store", **ALONE)
    job = megatron()
    adapt()
    with pytest.raises(SystemExit):
        job.run(["--distill-teacher", "runs/8b", "--distill-alpha", "1.5"])


def test_another_teacher_is_refused_where_a_host_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.job, "prepared", True)
    first, second = ({"checkpoint": "iter_0000001", "digest": digest} for digest in ("1", "2"))
    args = check(distill_teacher="runs/8b", finetune=False, distill_identity=first, **ALONE)
    host.check_loaded(tmp_path, args, argparse.Namespace(distill_teacher="old", distill_identity=first))
    saved = argparse.Namespace(distill_teacher="old", distill_identity=second)
    with pytest.raises(host.HostError, match=r"saved with the teacher old \(iter_0000001\): runs/8b .* is another one"):
        host.check_loaded(tmp_path, args, saved)
    args.finetune = True
    host.check_loaded(tmp_path, args, saved)


@pytest.mark.parametrize("prefix", ["", "expert_"])
def test_weights_sharded_beyond_tensor_parallelism_are_refused(prefix: str) -> None:
    """Megatron-LM sets the number of shards in every job; the tensor-parallel size is 2 here."""
    shards, derived = f"{prefix}tensor_parallel_num_weight_shards", f"{prefix}gtp_weight_remat_size"
    with pytest.raises(host.HostError, match=f"--{shards.replace('_', '-')} 4"):
        check(**{shards: 4, derived: 2})
    check(**{shards: 2, derived: 1})


def test_packed_samples_are_refused_where_they_lose_the_longrope_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.job, "theirs", ("rope_scaling_type",))
    for ternary in (True, False):
        with pytest.raises(host.HostError, match="--reset-attention-mask: packed samples would lose"):
            check(rope_scaling_type="longrope", reset_attention_mask=True, ternary=ternary)
    check(rope_scaling_type="longrope", reset_attention_mask=False)
    check(rope_scaling_type="yarn", reset_attention_mask=True)


def test_a_recipe_that_fits_nothing_is_refused(megatron, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("configs: {all: {}}\nmatchers: {none: {config: all, pattern: '*.linear_q'}}\n")
    job = megatron()
    adapt()
    with pytest.raises(host.HostError, match="fits no module"):
        job.run(["--ternary", "--ternary-recipe", str(recipe)])


def test_a_backend_that_is_not_there_is_refused(megatron, monkeypatch) -> None:
    absent = registry.Backend("absent", registry._BACKENDS["torch"].kernel, lambda device: "not built")
    monkeypatch.setitem(registry._BACKENDS, "absent", absent)
    monkeypatch.setattr(registry, "_choices", {})
    job = megatron()
    adapt()
    with pytest.raises(ValueError, match="'absent' was asked for and cannot run on cpu: not built"):
        job.run(["--ternary", "--ternary-backend", "absent"])


@pytest.mark.parametrize("builders", [False, True])
def test_a_host_that_builds_its_model_elsewhere_is_refused(megatron, builders: bool) -> None:
    job = megatron(builders=builders)
    job.fails_to_correct = True
    adapt()
    with pytest.raises(host.HostError, match="behind the adaptor's back"):
        job.run(["--ternary"])


def test_linears_that_nobody_registered_are_refused(megatron) -> None:
    job = megatron(LayerNormLinear)
    adapt()
    with pytest.raises(host.HostError, match="LayerNormLinear, which would bypass the quantizer"):
        job.run(["--ternary"])


def test_a_missing_symbol_raises(megatron) -> None:
    megatron()
    del sys.modules["megatron.training.training"].correct_amax_history_if_needed
    with pytest.raises(host.HostError, match="no megatron.training.training.correct_amax_history_if_needed: use a ver"):
        adapt()


class TestMindSpeed:
    """Tests of the adaptor with MindSpeed, which applies patches as features."""

    @pytest.fixture
    def mindspeed_host(self, monkeypatch, megatron) -> Callable[..., host_doubles.MegatronTraining]:
        def make(linear: type) -> host_doubles.MegatronTraining:
            self.double = host_doubles.MindSpeed(monkeypatch, LayerNormLinear)
            monkeypatch.setattr(mindspeed, "available", lambda name: name == "mindspeed")
            # The double's adaptor is imported when ours imports it.
            real = importlib.import_module

            def import_module(name: str, *args):
                if name == "mindspeed.megatron_adaptor" and name not in sys.modules:
                    self.double.import_adaptor()
                return real(name, *args)

            monkeypatch.setattr(importlib, "import_module", import_module)
            return megatron(linear)

        return make

    def test_a_job_trains_ternary_with_the_norm_inside(self, mindspeed_host) -> None:
        job = mindspeed_host(LayerNormLinear)
        assert adapt() == "mindspeed"
        (chunk,) = job.run(["--ternary"])
        assert "holds bit for bit in 2 layers" in "\n".join(job.printed)
        linear = chunk.decoder["linear_fc1"]
        x = torch.randn(3, 1, 64)
        (quantized,) = [s.quantize(m.weight)[0] for s, m in ternary_modules(chunk) if m is linear]
        assert torch.equal(linear(x)[0], torch.nn.functional.linear(linear._rmsnorm(x), quantized))

    def test_a_linear_that_bypasses_the_quantizer_is_found_by_the_probe(self, mindspeed_host) -> None:
        job = mindspeed_host(Bypassing)
        adapt()
        with pytest.raises(ProbeError, match="linear_fc1"):
            job.run(["--ternary"])

    def test_activations_cannot_be_quantized_before_a_norm(self, mindspeed_host) -> None:
        job = mindspeed_host(LayerNormLinear)
        adapt()
        with pytest.raises(host.HostError, match="normalizes its input itself.*--transformer-impl local"):
            job.run(["--ternary", "--ternary-activation-bits", "8"])

    def test_swapped_attention_leaves_quantized_weights_where_they_are(self, monkeypatch, mindspeed_host) -> None:
        """Two micro-batches are in flight; their activations are freed between the passes, like in MindSpeed."""
        swap = host_doubles.SwapPrefetch
        host_doubles.module(monkeypatch, "mindspeed.core.memory.swap_attention.prefetch", SwapPrefetch=swap)
        monkeypatch.setattr(swap, "no_swap_tensor", staticmethod(swap.no_swap_tensor))
        job = mindspeed_host(LayerNormLinear)
        adapt()
        mindspeed.leave_quantized_weights_on_device(host)
        mindspeed.leave_quantized_weights_on_device(host)
        (chunk,) = job.run(["--ternary"])
        linear = chunk.decoder["linear_fc1"]
        find_epoch(chunk).open = True
        x = torch.randn(3, 1, 64, requires_grad=True)
        expected = linear(x)[0]
        prefetch = swap()
        with torch.autograd.graph.saved_tensors_hooks(prefetch.pack_hook, prefetch.unpack_hook):
            first = linear(x * 1)[0]
        assert prefetch.sync_d2h() > 0
        assert torch.equal(linear(x)[0], expected) and torch.equal(first, expected)

    def test_our_feature_survives_another_list(self, mindspeed_host) -> None:
        mindspeed_host(LayerNormLinear)
        mindspeed.join(host)
        mindspeed.join(host)
        manager = self.double.manager
        assert [f.feature_name for f in manager.FEATURES_LIST] == ["first", "bitcpm_ternary"]
        manager.set_features_list([self.double.feature("llm")])
        assert [f.feature_name for f in manager.FEATURES_LIST] == ["llm", "bitcpm_ternary"]

    def test_their_adaptor_must_not_come_first(self, mindspeed_host) -> None:
        mindspeed_host(LayerNormLinear)
        self.double.import_adaptor()
        with pytest.raises(ValueError, match="mindspeed.megatron_adaptor was imported before this"):
            adapt()

    def test_another_version_of_the_linear_is_refused(self, mindspeed_host, monkeypatch) -> None:
        mindspeed_host(LayerNormLinear)
        monkeypatch.delattr(LayerNormLinear, "_rmsnorm")
        with pytest.raises(ValueError, match="has no _rmsnorm"):
            adapt()


def test_megatron_must_not_come_first(monkeypatch) -> None:
    host_doubles.MegatronTraining(monkeypatch, list)
    with pytest.raises(ValueError, match="megatron.training was imported already.*put `import bitcpm_megatron.adap"):
        adapt()
    sys.modules["megatron.training.global_vars"]._GLOBAL_ARGS = NOTHING
    with pytest.raises(ValueError, match="has parsed its arguments already"):
        adapt()


@pytest.mark.parametrize("named, said", [("mindspeed", "cannot be imported"), ("llama", "is unknown")])
def test_a_host_that_is_not_there_is_refused(megatron, monkeypatch, named: str, said: str) -> None:
    megatron()
    monkeypatch.setenv("BITCPM_HOST", named)
    with pytest.raises(ValueError, match=said):
        adapt()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        (IMPORT, 2, "Megatron-LM cannot be imported (No module named 'megatron.training'"),
        (f"import os; os.environ['BITCPM_HOST'] = 'llama'; {IMPORT}", 2, "llama is unknown: use"),
        (f"{HOOK}; from bitcpm_megatron.host import HostError; raise HostError('leave it out')", 2, "leave it out"),
        (
            f"{HOOK}; {GROUP}; from bitcpm_megatron.host import HostError; raise HostError('give the same')",
            2,
            "give the same",
        ),
        (f"{HOOK}; from bitcpm_megatron.parallel import ProbeError; raise ProbeError('fc1')", 3, "fc1"),
    ],
)
def test_a_refusal_ends_any_script_with_one_line(script: str, status: int, message: str) -> None:
    done = python(script)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_errors_of_the_script_keep_their_traceback() -> None:
    done = python(f"{HOOK}; raise ValueError('of the host')")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "of the host" in done.stderr


def test_checkpoints_can_be_written_with_a_newer_torch(megatron, monkeypatch) -> None:
    """megatron-core 0.12.1 passes no serialization format to torch; the adaptor adds it, without our launcher."""
    megatron()
    written = []

    def _write_item(transforms, stream, data, item, key, serialization_format):
        written.append(serialization_format)

    monkeypatch.setattr(filesystem_async, "_write_item", _write_item)
    adapt()
    filesystem_async._write_item("transforms", "stream", "data", "item", "key")
    assert written == [SerializationFormat.TORCH_SAVE]


def test_flags_that_the_host_has_are_the_hosts(megatron) -> None:
    """MindSpeed-LLM applies --scale-emb itself; applying it twice would be wrong."""
    job = megatron(theirs=("--scale-emb", "--rope-scaling-type"))
    adapt()
    job.run(["--scale-emb", "12"])
    assert "scale_emb" in host.job.theirs
    assert {n for n in NAMES if n.startswith("rope_scaling")} <= set(host.job.theirs)
    assert job.args.scale_emb == 12 and job.printed == []
    with pytest.raises(SystemExit):
        job.run(["--rope-scaling-short-factor", "1", "2"])


def test_a_mistake_on_the_hosts_command_line_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.delenv("RANK", raising=False)
    parser = argparse.ArgumentParser()
    megatron_lm.Replacements(host).register_arguments(parser)
    for flags in (["--ternary-group-size", "48"], ["--no-such-flag"]):
        with pytest.raises(SystemExit) as leaving:
            parser.parse_args(flags)
        said = capsys.readouterr().err
        assert leaving.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and flags[0] in said
    # The same holds for the flags of launch/pretrain_gpt.py itself.
    with pytest.raises(SystemExit):
        pretrain_gpt.build_parser().parse_known_args(["--megatron-path"])
    said = capsys.readouterr().err
    assert said.startswith("error: argument --megatron-path") and said.count("\n") == 1


def test_our_flags_are_added_once_per_parser() -> None:
    parser = argparse.ArgumentParser()
    assert add_arguments(parser) == ()
    with pytest.raises(ValueError, match="--ternary"):
        add_arguments(parser)

# SPDX-License-Identifier: Apache-2.0
"""Tests of what differs between megatron-core's versions.

One difference is the reason to wrap the forward of module instances: 0.12.1 ignores an override of ``_forward_impl``.
"""

import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import package_info
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer import optimizer as mixed_precision_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

from bitcpm_megatron import QuantizerConfig, apply_recipe, dequantize, quantize
from bitcpm_megatron.parallel import probe
from bitcpm_megatron.patches import cpu
from bitcpm_megatron.patches.megatron_core import checkpointing, without_te

pytestmark = pytest.mark.usefixtures("single_rank")
DEFAULT = QuantizerConfig()
ASSIGNS_FORWARD_IMPL = (package_info.MAJOR, package_info.MINOR) == (0, 12)


def wq(weight: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(weight, DEFAULT), DEFAULT, weight.dtype)


class OverridesForwardImpl(ColumnParallelLinear):
    """A layer that quantizes in an overridden method: the obvious way, which trains in full precision on 0.12.1."""

    def _forward_impl(self, input, weight, *args, **kwargs):
        return super()._forward_impl(input, wq(weight), *args, **kwargs)


def layer(kind: type, **more) -> torch.nn.Module:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    return kind(64, 64, config=config, init_method=torch.nn.init.xavier_normal_, bias=False, **more)


@pytest.mark.verifies(
    "hosts",
    "megatron-core 0.12.1 and 0.19.2: layers, gradients, recipes, the start-up probe and the quantizer record work "
    "as with 0.16.1 (`make test-mcore-0.12`, `make test-mcore-0.19`)",
    cpu="yes¹",
)
def test_an_override_of_forward_impl_depends_on_the_version() -> None:
    module = layer(OverridesForwardImpl)
    x = torch.randn(3, 1, 64)
    y = module(x)[0]
    assert torch.equal(y, x @ (module.weight if ASSIGNS_FORWARD_IMPL else wq(module.weight)).t())


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_ours_does_not(kind: type, requires_grad: bool) -> None:
    more = {"input_is_parallel": True, "skip_bias_add": True} if kind is RowParallelLinear else {}
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"linear_fc": layer(kind, **more)})})
    module = model["mlp"]["linear_fc"]
    module.weight.requires_grad_(requires_grad)
    apply_recipe(model, default=DEFAULT)
    x = torch.randn(3, 1, 64)
    for _ in range(2):
        assert torch.equal(module(x)[0], x @ wq(module.weight).t())
    assert probe(model) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has streams of its own: run it with CUDA_VISIBLE_DEVICES=")
def test_gradients_that_wait_for_a_stream_find_one_on_the_cpu() -> None:
    # start_grad_sync of 0.19 does this; it must work with any installed version.
    torch.cuda.current_stream().wait_event(torch.cuda.current_stream())


def of(package: str | None) -> Callable:
    """A function that a module of that package defines, or code that names no module."""

    def function() -> None: ...

    function.__module__ = package and f"{package}.module"
    return function


@pytest.mark.parametrize(
    ("loaded", "cuda", "as_it_is"),
    [((), False, True), ((), True, False), (("torch_npu",), False, False), (("megatron.core",), False, False)],
    ids=["CPU", "CUDA", "NPU", "host"],
)
def test_what_megatron_core_would_compile_at_import(
    loaded: tuple[str, ...], cuda: bool, as_it_is: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_it(model: Callable | None = None, **options: Any) -> tuple:
        return "compiled", model, options

    monkeypatch.setattr(torch, "compile", compile_it)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delitem(sys.modules, "megatron.core")
    for name in loaded:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with cpu.uncompiled():
        kept_by_jit = torch.compile
        for function, plain in ((of("megatron.core"), as_it_is), (of("megatron_user"), False), (of(None), False)):
            assert torch.compile(function, dynamic=True) == (
                function if plain else ("compiled", function, {"dynamic": True})
            )
        assert torch.compile(backend="eager") == ("compiled", None, {"backend": "eager"})
        module = type("Layer", (torch.nn.Module,), {"__module__": "megatron.core.module"})()  # a user's own wish
        assert torch.compile(module) == ("compiled", module, {})
    assert torch.compile is compile_it
    late = of("megatron.core")
    assert kept_by_jit(late) == (late if as_it_is else ("compiled", late, {}))


@pytest.mark.slow
def test_a_megatron_lm_without_legacy_modules_starts_on_the_cpu() -> None:
    # core_v0.18 and later versions have no legacy modules, and neither has PyPI's megatron-core.
    steps = (
        "from bitcpm_megatron.patches import ORIGINAL, megatron_lm",
        "megatron_lm.run_on_cpu()",
        "from megatron.core.datasets import utils",
        "print(hasattr(utils.compile_helpers, ORIGINAL))",
    )
    done = subprocess.run([sys.executable, "-c", "; ".join(steps)], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_stand_in_for_apex_adam_takes_what_newer_versions_hand_over() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    without_te.FusedAdam([weight], lr=0.5, capturable=False).step()
    assert torch.allclose(weight.detach(), torch.full((2,), 0.5))


def test_a_step_that_a_cuda_graph_could_capture_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer_cuda_graph.*switch it off"):
        without_te.FusedAdam([torch.nn.Parameter(torch.ones(2))], capturable=True)


def distributed_optimizer(rate: float) -> MegatronOptimizer:
    """Makes a distributed optimizer of one layer."""
    module = layer(ColumnParallelLinear)
    config = module.config
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), module)
    more = {"optimizer": "adam", "params_dtype": torch.float32, "use_distributed_optimizer": True}
    return get_megatron_optimizer(OptimizerConfig(lr=rate, min_lr=rate / 2, **more), [ddp])


def test_optimizer_state_is_loaded_under_another_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mixed_precision_optimizer, distrib_optimizer):
        if hasattr(module, "param_group_identifier_keys"):  # 0.12.1 matches groups differently
            keys = dict.fromkeys(("max_lr", "min_lr", *module.param_group_identifier_keys))
            monkeypatch.setattr(module, "param_group_identifier_keys", tuple(keys))
    checkpointing.load_optimizer_under_other_rates()
    saved, resumed = distributed_optimizer(1e-2), distributed_optimizer(1e-3)
    resumed.load_state_dict(saved.state_dict())
    assert [(g["max_lr"], g["min_lr"]) for g in resumed.param_groups] == [(1e-2, 5e-3)] * len(resumed.param_groups)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_helpers_of_the_checkpoint_writers_are_not_asked_to_stop_while_they_start(tmp_path: Path) -> None:
    # A scheduler signals every process of a job. A process keeps the signal mask it is started with while it imports.
    script = tmp_path / "start.py"
    script.write_text(
        """
import psutil

if __name__ == "__main__":
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from bitcpm_megatron.patches.megatron_core import checkpointing

    names = ("get_write_results_queue", "_get_write_results_queue")
    start = next((name for name in names if hasattr(filesystem_async, name)), None)
    if start is not None:
        checkpointing.bind_checkpoint_writers()
        getattr(filesystem_async, start)()
    for pid in ["self", *(child.pid for child in psutil.Process().children(recursive=True))]:
        for line in open(f"/proc/{pid}/status"):
            if line.startswith(("SigBlk", "SigIgn")):
                print(pid, *line.split())
"""
    )
    run = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    masks = [(pid, kind, int(mask, 16)) for pid, kind, mask in map(str.split, run.stdout.splitlines())]
    term, usr1 = (1 << (number - 1) for number in (signal.SIGTERM, signal.SIGUSR1))
    # The resource tracker ignores SIGTERM instead of blocking it, and does so before it starts anything itself.
    helpers = {pid for pid, _, _ in masks} - {"self"}
    blocked = {pid: mask for pid, kind, mask in masks if kind == "SigBlk:"}
    assert not blocked["self"] & (term | usr1)
    assert all(blocked[pid] & usr1 for pid in helpers)
    assert sum(not blocked[pid] & term for pid in helpers) <= 1, run.stdout

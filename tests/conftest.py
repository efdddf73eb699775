# SPDX-License-Identifier: Apache-2.0
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.fast_tests import FastTests
from support.process_groups import leave_model_parallel

# Transformers copies trusted modeling files into its cache; tests must not write into the user's cache.
_hf_home = tempfile.TemporaryDirectory(prefix="hf-")
os.environ.setdefault("HF_HOME", _hf_home.name)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton reads this when the first test imports it. With 0, tests/unit/test_triton.py runs on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="unit tests that are not marked slow; each that starts a process fails"
    )
    parser.addoption(
        "--every-setting", action="store_true", help="of tests/distributed/test_resident.py, and more steps"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        config.pluginmanager.register(FastTests())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distributes tests over processes: each file stays in one, as do all files whose tests share their ranks."""
    from xdist.scheduler import LoadFileScheduling

    class SharedRanks(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            alone = scope.endswith("test_kill.py") or not scope.startswith("tests/distributed/")
            return scope if alone else "tests/distributed"

    return SharedRanks(config, log)


def pytest_report_header() -> str:
    """Returns the versions under test: an overlay on PYTHONPATH may hide the installed megatron-core."""
    from megatron.core import package_info

    return f"torch {torch.__version__}, megatron-core {package_info.__version__}"


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    """Initializes a process group of one rank."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def _model_parallel(_process_group: None) -> Iterator[None]:
    """Creates megatron-core's groups at TP1, once per module: creating them takes longer than most tests."""
    from megatron.core import parallel_state

    from bitcpm_megatron.patches import cpu
    from bitcpm_megatron.patches.megatron_core import without_te

    if not torch.cuda.is_available():
        cpu.install()
    without_te.install()
    parallel_state.initialize_model_parallel()
    yield
    leave_model_parallel()


@pytest.fixture
def single_rank(_model_parallel: None) -> None:
    """Provides megatron-core's parallel state at TP1, with its random numbers seeded."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(1)

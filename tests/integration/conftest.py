# SPDX-License-Identifier: Apache-2.0
import pytest
from host_runs import Material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Token files and the checkpoint that all runs in hosts start from."""
    return Material.make(tmp_path_factory.mktemp("hosts"))

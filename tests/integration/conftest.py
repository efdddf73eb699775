# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest
from host_runs import HOSTS, HOW_TO, Material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Makes the token files and checkpoints that all runs in hosts start from; skips the test if there is no host."""
    if all(host.missing() for host in HOSTS.values()):
        pytest.skip(f"no host is there: {HOW_TO}")
    return Material.make(tmp_path_factory.mktemp("hosts"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Prints the last line of ``make test-clients``, the number of passed checks."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # this is a worker of several test processes
        return
    passed = [report for report in reporter.stats.get("passed", []) if "test_clients.py" in report.nodeid]
    if passed:
        print(f"\nclients: {len(passed)} checks passed")

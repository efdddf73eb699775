# SPDX-License-Identifier: Apache-2.0
import functools
import json
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.launcher import Ranks


@pytest.fixture(scope="package")
def shared_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Returns a function that gives a number of ranks, shared by all files: three launches, of one, two and four."""
    launched: list[Ranks] = []

    @functools.cache
    def ranks(count: int) -> Ranks:
        launched.append(Ranks(count, tmp_path_factory.mktemp(f"ranks{count}-")))
        return launched[-1]

    yield ranks
    with ThreadPoolExecutor() as pool:
        list(pool.map(Ranks.close, launched))


@pytest.fixture(scope="package")
def launch_runs(
    shared_ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[dict[str, dict], Path]]:
    """Returns a function that runs trainings (arguments by name) on some ranks; it returns rank 0's report and the
    directory."""
    cache = ["--data-cache-path", str(tmp_path_factory.getbasetemp() / "cache")]

    def launch(
        runs: dict[str, list[str]],
        count: int,
        resave: dict[str, Path] | None = None,
        fused_mlp_on: dict[str, int] | None = None,
        masked: Collection[str] = (),
        fused: Collection[str] = (),
        digests: int | None = None,
        bucket_size: dict[str, int] | None = None,
        memory: bool = False,
    ) -> tuple[dict, Path]:
        directory = tmp_path_factory.mktemp("runs")
        content = {name: {"argv": [*argv, *cache]} for name, argv in runs.items()}
        for name, where in (resave or {}).items():
            content[name]["resave"] = str(where)
        for name, rank in (fused_mlp_on or {}).items():
            content[name]["fused_mlp_on"] = rank
        for run in content.values():
            run["digests"] = digests
            run["memory"] = memory
        for name, size in (bucket_size or {}).items():
            content[name]["bucket_size"] = size
        for names, what in ((masked, "masked"), (fused, "fused")):
            for name in names:
                content[name][what] = True
        report: dict[str, dict] = {}
        fatal: list[str] = []
        while waiting := {name: run for name, run in content.items() if name not in report}:
            (directory / "runs.json").write_text(json.dumps(waiting))
            (directory / "rank0.json").write_text("{}")
            try:
                report |= shared_ranks(count).run("runs", directory)[0]
            except AssertionError as error:
                # A run that ends the ranks fails, and new ranks start for the runs after it. This is limited, because
                # ranks that cannot even start would make every run fail.
                report |= json.loads((directory / "rank0.json").read_text())
                fatal += [name for name in waiting if name not in report][:1]
                if not fatal or fatal[-1] in report or len(fatal) > 2:
                    raise
                report[fatal[-1]] = {"status": None, "stderr": str(error)}
        return report, directory

    return launch

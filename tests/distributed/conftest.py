# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from support.launcher import torchrun


@pytest.fixture(scope="session")
def launch_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, dict], Path]]:
    """Launches training runs, name -> arguments, on some ranks; gives back rank 0's report and the directory."""
    cache = ["--data-cache-path", str(tmp_path_factory.getbasetemp() / "cache")]

    def launch(
        runs: dict[str, list[str]],
        ranks: int,
        resave: dict[str, Path] | None = None,
        fused_mlp_on: dict[str, int] | None = None,
        masked: Collection[str] = (),
    ) -> tuple[dict, Path]:
        directory = tmp_path_factory.mktemp("runs")
        content = {name: {"argv": [*argv, *cache]} for name, argv in runs.items()}
        for name, where in (resave or {}).items():
            content[name]["resave"] = str(where)
        for name, rank in (fused_mlp_on or {}).items():
            content[name]["fused_mlp_on"] = rank
        for name in masked:
            content[name]["masked"] = True
        (directory / "runs.json").write_text(json.dumps(content))
        return torchrun("runs", ranks, directory)[0], directory

    return launch

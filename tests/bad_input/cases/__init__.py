# SPDX-License-Identifier: Apache-2.0
"""The cases: one mistake each, most of them generated from the commands' own parsers and files."""

from pathlib import Path

from . import api, arguments, checkpoints, data_files, exports, job_files, paths, requests
from .case import Case


def all_cases(world: Path) -> list[Case]:
    """Returns every case, in a fixed order and with unique names."""
    makers = (
        arguments.numbers,
        arguments.host_numbers,
        arguments.flags,
        arguments.environment,
        paths.paths,
        paths.outputs,
        paths.overwriting,
        checkpoints.contents,
        checkpoints.trackers,
        checkpoints.flipped_bits,
        checkpoints.code,
        checkpoints.records,
        exports.configs,
        exports.headers,
        job_files.yaml,
        data_files.data,
        requests.requests,
        api.api,
    )
    cases = [case for make in makers for case in make(world)]
    names = [case.name for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two cases of one name: {sorted(twice)}"
    return cases


def good_lines() -> list[tuple[str, tuple[str, ...]]]:
    """Returns commands and arguments that must succeed without damage, so that refusals are caused by the damage."""
    return list(dict.fromkeys([*paths.LINES, *((name, tuple(line.split())) for name, _, line in checkpoints.READERS)]))

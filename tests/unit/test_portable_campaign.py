# SPDX-License-Identifier: Apache-2.0
"""Tests that the campaign over processor settings detects a setting that is not in force, and reports failures."""

from pathlib import Path

import portable_campaign
import pytest
from portable_campaign import SETTINGS, Setting, campaign, observed

ONE_OF_EACH = ("ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=AVX2", "2 threads", "-march=x86-64-v2")
CHOSEN = [setting for setting in SETTINGS if setting.name in ONE_OF_EACH]
TOGETHER = {name: value for setting in CHOSEN for name, value in setting.variables.items()}


@pytest.mark.slow
def test_every_factor_is_in_force_in_tests_and_in_ranks_and_misspelled_in_none(tmp_path: Path) -> None:
    usual = observed({f"{name}S": value for name, value in TOGETHER.items()}, tmp_path / "usual")
    offered = [setting for setting in CHOSEN if not setting.lacking(usual)]
    assert len(CHOSEN) == len(ONE_OF_EACH) and len(offered) >= 2
    variables = {name: value for setting in offered for name, value in setting.variables.items()}
    for as_rank in (False, True):
        facts = observed(variables, tmp_path / "together", as_rank)
        assert [setting.complaint(facts) for setting in offered] == [""] * len(offered)
    # A processor with fewer instructions may use by default what a setting requests.
    narrow = {"ATEN_CPU_CAPABILITY=default": usual["torch"] == "DEFAULT"}
    narrow["ONEDNN_MAX_CPU_ISA=AVX2"] = usual["oneDNN"] == "Intel AVX2"
    narrow["-march=x86-64-v2"] = usual["C kernel"] == "SSE"
    for setting in offered:
        assert (setting.complaint(usual) == "") == narrow.get(setting.name, False), setting.name


TEST = """
import os

def test_alone():
    assert os.environ["OMP_NUM_THREADS"] != "2"

def test_always():
    assert "ATEN_CPU_CAPABILITY" not in os.environ
"""


@pytest.mark.slow
def test_the_last_line_counts_and_failing_tests_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_threads.py").write_text(TEST)
    groups = {"threads": [str(tmp_path / "test_threads.py")]}
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setattr(
        portable_campaign,
        "observed",
        lambda variables, *_, **__: {"fact": variables.get("IT", "usual"), "bf16 product": "-"},
    )
    settings = [
        Setting("good"),
        Setting("absent", {}, {}, {"fact": "something else"}),
        Setting("misspelled", {"TI": "so"}, {"fact": "so"}),
        Setting("two", {"OMP_NUM_THREADS": "2", "IT": "so"}, {"fact": "so"}),
    ]
    assert campaign(settings, groups, 2, tmp_path) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "portable: 1 settings passed, 1 not offered here, 2 failed"
    assert "misspelled is not in force: of a test: fact is 'usual', not 'so'; of a rank: fact is 'usual'" in said
    assert "test_threads.py::test_alone" in said and "::test_always" not in said
    assert campaign(settings[:2], groups, 2, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "portable: 1 settings passed, 1 not offered here"
    groups["none"] = [str(tmp_path / "test_threads.py"), "-k", "nothing"]
    assert campaign(settings[:1], groups, 1, tmp_path) == 1

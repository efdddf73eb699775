# SPDX-License-Identifier: Apache-2.0
"""Tests that apply to every command: its parser, the bounds of its numbers, and one-line errors."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitcpm_megatron import cli
from bitcpm_megatron.ternary_flags import add_arguments

CHECKOUT = Path(__file__).resolve().parents[2]
# Scripts that pass all their arguments on to another program, or get them from one of ours.
NO_PARSER = {"launch/agent", "launch/pretrain_gpt", "benchmarks/throughput_job"}


def commands() -> list[str]:
    """Returns every script with a ``main``, as ``folder/name``."""
    found = (path for room in ("launch", "checkpoint_tools", "benchmarks") for path in (CHECKOUT / room).glob("*.py"))
    names = {f"{path.parent.name}/{path.stem}" for path in found if '__name__ == "__main__"' in path.read_text("utf-8")}
    return sorted(names - NO_PARSER)


class Caught(Exception):
    """An exception that carries a parser out of the command that made it."""


@pytest.fixture
def main(monkeypatch, request):
    """Returns the function ``main`` of a command."""
    room, _, name = request.param.partition("/")
    if room == "benchmarks":
        monkeypatch.syspath_prepend(str(CHECKOUT / room))
        return importlib.import_module(name).main
    return importlib.import_module(f"bitcpm_megatron.{room}.{name}").main


def numbers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, object]]:
    for action in parser._actions:
        if action.type in (int, float):
            yield action.option_strings[0], action.type


@pytest.mark.parametrize("main", commands(), indirect=True)
def test_every_number_has_bounds_and_every_parser_is_ours(main, monkeypatch) -> None:
    caught: list[argparse.ArgumentParser] = []

    def catch(self, *args: object, **named: object) -> None:
        caught.append(self)
        raise Caught

    monkeypatch.setattr(cli.Parser, "parse_known_args", catch)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(Caught):
        main([])
    assert list(numbers(caught[0])) == []


def test_the_flags_on_hosts_have_bounds() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert list(numbers(parser)) == []


@pytest.mark.parametrize("main", commands(), indirect=True)
def test_an_unknown_flag_is_one_line(main, capsys, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as leaving:
        main(["--no-such-flag", "1"])
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "usage" not in err


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE holds 'abc': expected a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE holds '0': must be 1 to"),
        ({"WORLD_SIZE": "2"}, "RANK is not set: start the processes with torchrun"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK holds '1': must be 0 to 0"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK holds '²': expected a whole number"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT holds '-1': must be 0 to 65535"),
    ],
)
def test_the_place_in_the_job_is_a_number(monkeypatch, variables: dict[str, str], said: str) -> None:
    from bitcpm_megatron.training.initialize import world_size

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        world_size()
    assert said in str(caught.value)


@pytest.mark.slow
def test_bind_cores_refuses_a_rank_that_is_none() -> None:
    command = [sys.executable, str(CHECKOUT / "launch" / "launcher" / "bind_cores.py"), "-c", "print('ran')"]
    done = subprocess.run(command, env={**os.environ, "LOCAL_RANK": "abc"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "LOCAL_RANK holds 'abc'" in done.stderr
    assert done.stderr.count("\n") == 1

# SPDX-License-Identifier: Apache-2.0
"""Tests of the common error handler and parser: exit statuses, one line per mistake, numbers with bounds."""

import argparse
import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.launcher import CHECKOUT, environment
from tqdm import tqdm

from bitcpm_megatron import cli


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("--x: give y"), 2, "--x: give y"),
        (cli.MismatchError("3 differ"), 3, "3 differ"),
        (cli.FailedError("diverged"), 1, "diverged"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.bin"), 2, "a.bin: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "memory"),
        (KeyboardInterrupt(), 1, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(capsys, error, status, message):
    assert cli.run(raising(error)) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("bug"), RuntimeError("bug")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))


def test_a_message_stands_on_a_line_of_its_own(capsys):
    bar = tqdm(total=3)
    bar.update()
    assert cli.run(raising(ValueError("bad"))) == 2
    assert capsys.readouterr().err.endswith("\nerror: bad\n")


def test_a_link_to_itself_is_bad_input(capsys, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    # Before Python 3.13, resolve() raises an error that is not an OSError; from 3.13 on, reading the file raises.
    assert cli.run(lambda: (tmp_path / "loop").resolve() and (tmp_path / "loop").read_text() and None) == 2
    assert str(tmp_path / "loop") in capsys.readouterr().err


def test_the_traceback_of_any_error_can_be_asked_for(capsys, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.run(raising(ValueError("bad"))) == 2
    assert "in work" in capsys.readouterr().err


def test_what_work_returns_is_the_exit_code():
    assert cli.run(lambda: None) == 0
    assert cli.run(lambda: 3) == 3


def test_other_ranks_leave_the_word_to_rank_0(capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    cli.complain("bad")
    assert waits and capsys.readouterr().err == "error: rank 2: bad\n"


@pytest.fixture
def parser():
    parser = cli.Parser(prog="tool")
    parser.add_argument("--train-iters", type=cli.Whole(1))
    parser.add_argument("--lr", type=cli.Number(0, open_minimum=True))
    parser.add_argument("--adam-beta1", type=cli.Number(0, 1, open_maximum=True))
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train-iters 0", "--train-iters: '0': must be 1 to 2147483647"),
        ("--train-iters -5", "must be 1 to"),
        ("--train-iters 1.5", "expected a whole number"),
        ("--train-iters ²", "expected a whole number"),
        ("--train-iters 1_000", "expected a whole number"),
        ("--train-iters " + "9" * 5000, "expected a whole number"),
        ("--train-iters 99999999999", "must be 1 to"),
        ("--lr 0", "--lr: '0': must be above 0"),
        ("--lr nan", "expected a finite number"),
        ("--lr inf", "expected a finite number"),
        ("--lr 1e999", "expected a finite number"),
        ("--lr 1_0", "expected a number"),
        ("--adam-beta1 1", "must be at least 0 and below 1"),
        ("--train-iter 5", "unknown arguments: --train-iter: did you mean --train-iters?"),
        ("--zzz 5", "unknown arguments: --zzz"),
        ("stray", "unknown arguments: stray"),
    ],
)
def test_a_mistake_is_one_line_without_the_usage(parser, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err and err.count("\n") == 1 and "usage" not in err and len(err) < 300


def test_numbers_within_bounds(parser):
    args = parser.parse_args("--train-iters 7 --lr 1e-4 --adam-beta1 0".split())
    assert (args.train_iters, args.lr, args.adam_beta1) == (7, 1e-4, 0.0)


@pytest.mark.parametrize("value", [True, "1", 1.0, None])
def test_a_value_of_another_type_is_no_whole_number(value):
    assert cli.Whole().mistake(value) == "expected a whole number"


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", 10**400])
def test_a_value_that_is_no_finite_number(value):
    assert "number" in cli.Number().mistake(value)


def test_a_number_of_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(ValueError, match="WORLD_SIZE holds 'abc': expected a whole number"):
        cli.from_environment("WORLD_SIZE", cli.Whole(1), 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.from_environment("WORLD_SIZE", cli.Whole(1), 1) == 4
    assert cli.from_environment("WORLD_SIZE", cli.Whole(1), 1, {"WORLD_SIZE": "8"}) == 8
    monkeypatch.delenv("WORLD_SIZE")
    assert cli.from_environment("WORLD_SIZE", cli.Whole(1), 1) == 1


@pytest.mark.slow
def test_a_reader_that_has_left_is_told_nothing(tmp_path):
    # The pipe is real, because the interpreter must not complain either when it flushes at its exit.
    script = tmp_path / "noisy.py"
    script.write_text(
        "import sys\nfrom bitcpm_megatron import cli\n"
        "def work():\n    for _ in range(100000): print('x' * 80, flush=True)\n"
        "sys.exit(cli.run(work))\n"
    )
    status = os.system(f"cd {tmp_path} && {os.sys.executable} noisy.py 2>err | head -1 >out")
    assert status == 0 and (tmp_path / "err").read_text() == ""


def test_number_types_name_their_bounds():
    assert str(cli.Number()) == "a finite number"
    assert str(cli.Whole(0, 3)) == "0 to 3"
    with pytest.raises(argparse.ArgumentTypeError):
        cli.Whole(0, 3)("4")


# Printed when the process ends, whatever it was.
WATCH = """
import atexit, gc, json, sys
def report():
    print(json.dumps([gc.get_threshold()[0] < 10**5, gc.get_freeze_count() > 0, sorted(sys.modules)]), file=sys.stderr)
atexit.register(report)
"""


def at_the_end(command: list[str], directory: Path) -> tuple[bool, bool, set[str]]:
    """Whether the garbage collector works as usual when a process ends, whether objects are frozen, and what the
    process has imported."""
    (directory / "sitecustomize.py").write_text(WATCH)
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(directory), env["PYTHONPATH"]])
    done = subprocess.run([sys.executable, *command], env=env, cwd=CHECKOUT, capture_output=True, text=True)
    enabled, frozen, imported = json.loads(done.stderr.splitlines()[-1])
    return enabled, frozen, set(imported)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["launch/presets.py"], ["checkpoint_tools/inspect_checkpoint.py", "there is none"]],
    ids=lambda command: command[0],
)
def test_a_command_works_with_the_usual_collector_and_without_what_it_imported(command, tmp_path):
    assert at_the_end(command, tmp_path)[:2] == (True, True)


@pytest.mark.slow
def test_the_collector_rests_while_a_command_imports(tmp_path):
    """--help ends before there is work."""
    assert at_the_end(["launch/presets.py", "--help"], tmp_path)[:2] == (False, False)


@pytest.mark.slow
def test_the_collector_of_a_program_that_uses_the_package_is_its_own(tmp_path):
    program = tmp_path / "launch" / "program.py"
    program.parent.mkdir()
    program.write_text("import bitcpm_megatron.launch.generate\nfrom bitcpm_megatron import cli\ncli.run(lambda: 0)\n")
    assert at_the_end([str(program)], tmp_path)[:2] == (True, False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA megatron-core compiles functions when it is imported")
@pytest.mark.parametrize("command", ["launch/pretrain.py", "launch/write_targets.py"])
def test_megatron_core_is_imported_without_the_compiler_of_torch(command, tmp_path):
    _, _, imported = at_the_end([command, "--help"], tmp_path)
    assert "megatron.core.models.gpt" in imported and "torch._dynamo" not in imported


@pytest.mark.parametrize("room", ["launch", "checkpoint_tools"])
def test_every_command_ends_its_imports(room):
    """One that did not would rarely collect anything."""
    scripts = [path for path in (CHECKOUT / room).glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    ends = re.compile(r"\bcli\.run\(|\bcli import run as handled|\bcommand import .*\brun\b|\bend_imports\(\)")
    assert len(scripts) > 4
    assert [path.name for path in scripts if not ends.search(path.read_text())] == []

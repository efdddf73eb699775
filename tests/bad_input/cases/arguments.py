# SPDX-License-Identifier: Apache-2.0
"""Bad command lines and environments: numbers out of bounds, and flags and choices that do not exist."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from bitcpm_megatron.cli import Number, Whole
from bitcpm_megatron.ternary_flags import add_arguments

from ..commands import COMMANDS, Command
from .case import Case


def options(command: Command) -> Iterator[tuple[str, argparse.Action]]:
    """Yields the long flags of a command, each with its action in the parser."""
    parser = command.parser()
    for action in parser._actions if parser is not None else ():
        flag = next((s for s in action.option_strings if s.startswith("--")), None)
        if flag is not None and action.dest != "help":
            yield flag, action


def numbers(world: Path) -> Iterator[Case]:
    """Yields cases that give numeric flags zero, negative, NaN, infinite, huge and fractional numbers, and words."""
    for command in COMMANDS.values():
        for flag, action in options(command):
            if action.choices is None and action.type in (int, float):
                # The flag would silently accept any number; it should have the type Whole or Number of cli.py.
                yield Case("numbers", f"{command.name} {flag} has no bounds", call=lambda: None)
            for text, bad in _texts(action.type):
                if bad or command.runs:
                    yield Case(
                        "numbers" if bad else "numbers within bounds",
                        f"{command.name} {flag}={text}",
                        command.name,
                        (*command.good, f"{flag}={text}"),
                        says=(flag,) if bad else (),
                        accepts=not bad,
                        status=(2,) if bad else (1, 2),
                    )


def host_numbers(world: Path) -> Iterator[Case]:
    """Yields the same cases for the flags that a host's parser gets from us; the host decides how it refuses them."""
    parser = _HostParser()
    add_arguments(parser)
    for action in parser._actions:
        flag = action.option_strings[-1]
        if action.choices is None and action.type in (int, float):
            yield Case("host flags", f"a host's {flag} has no bounds", call=lambda: None)
        for text, bad in _texts(action.type):
            if bad:
                yield Case(
                    "host flags",
                    f"a host's {flag}={text}",
                    call=lambda argument=f"{flag}={text}": parser.parse_args([argument]),
                    says=(flag,),
                )


class _HostParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _texts(kind: object) -> list[tuple[str, bool]]:
    """Returns the texts that a numeric flag is given, each with whether the flag must refuse it."""
    if not isinstance(kind, Whole | Number):
        return []
    huge = str(10**30) if isinstance(kind, Whole) else "1e400"
    texts = {"0", "-1", "nan", "inf", "-inf", huge, "1.5", "", "two", "²"}
    texts |= {str(kind.minimum - 1), str(kind.maximum + 1)} if isinstance(kind, Whole) else {"1e300", "-1e-300"}
    return [(text, _refused(kind, text)) for text in sorted(texts)]


def _refused(kind: Whole | Number, text: str) -> bool:
    try:
        kind(text)
    except argparse.ArgumentTypeError:
        return True
    return False


def flags(world: Path) -> Iterator[Case]:
    """Yields cases of unknown and abbreviated flags, stray words, and choices that do not exist."""
    for command in COMMANDS.values():
        known = dict(options(command))
        unknown = [("--no-such-flag", ("--no-such-flag=1",)), ("a stray word", ("stray",))]
        for flag, action in known.items():
            if action.nargs != 0 and not any(other != flag and other.startswith(flag[:-1]) for other in known):
                unknown.append((flag[:-1], (f"{flag[:-1]}=1",)))
                break
        if known:
            for name, more in unknown:
                if name == "a stray word" and command.name in ("inspect_checkpoint", "run", "preflight"):
                    more = ("stray", "stray")
                at_end = more if name.startswith("--") else (*_last_flag(command), *more)
                yield Case(
                    "flags",
                    f"{command.name} {name}",
                    command.name,
                    (*command.good, *at_end),
                    says=(more[-1].partition("=")[0],),
                )
        for flag, action in known.items():
            if action.choices is not None and action.nargs != 0:
                yield Case(
                    "flags",
                    f"{command.name} {flag}=no-such",
                    command.name,
                    (*command.good, f"{flag}=no-such"),
                    says=(flag,),
                )


def _last_flag(command: Command) -> tuple[str, ...]:
    # This flag takes no value, so that a stray word after it does not become one more value of the flag before.
    return next(((s,) for s, a in options(command) if a.nargs == 0), ())


def environment(world: Path) -> Iterator[Case]:
    """Yields cases in which variables that torchrun or a scheduler sets have bad values."""
    for command in ("pretrain", "generate"):
        for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            for text in ("abc", "-1", "1.5", "²"):
                # torchrun sets all of these. If only some were set, the process would first be refused for the world
                # size.
                whole = {
                    "WORLD_SIZE": "1",
                    "RANK": "0",
                    "LOCAL_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": "0",
                }
                # Errors of a rank other than 0 are printed after those of rank 0, with the rank's name.
                yield Case(
                    "environment",
                    f"{command} {variable}={text}",
                    command,
                    COMMANDS[command].good,
                    environment={**whole, variable: text},
                    says=(variable,),
                )
        yield Case(
            "environment",
            f"{command} WORLD_SIZE=0",
            command,
            COMMANDS[command].good,
            environment={"WORLD_SIZE": "0"},
            says=("WORLD_SIZE",),
        )
    for scheduler, whole in _SCHEDULERS.items():
        for variable in (name for name, text in whole.items() if text.isdecimal() and name not in _PRESENT):
            for text in ("abc", "-1", "1.5", "²", "nan", str(10**30)):
                if variable == "PET_NPROC_PER_NODE" and text.isalpha():
                    continue  # torchrun accepts words here
                yield Case(
                    "environment",
                    f"run under {scheduler}: {variable}={text[:10]}",
                    "run",
                    COMMANDS["run"].good,
                    environment={**whole, variable: text},
                    says=(variable,),
                )


_SCHEDULERS = {
    "SLURM": {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
    },
    "ModelArts": {"MA_NUM_HOSTS": "1", "VC_TASK_INDEX": "0", "MA_NUM_GPUS": "1"},
    "PET": {
        "PET_NNODES": "1",
        "PET_NODE_RANK": "0",
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": "29500",
    },
    "Kubernetes": {"MASTER_ADDR": "localhost", "WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500"},
}
_PRESENT = ("SLURM_JOB_ID", "SLURM_STEP_ID")  # these are only tested for their presence

# SPDX-License-Identifier: Apache-2.0
"""The flags of our loop as a job file has them: by section, checked one by one."""

import argparse
import functools
from typing import Any

from ...cli import Number, Whole
from ...files import FileError, nearest
from ...training.flags import build_parser

SECTIONS = ("model", "parallelism", "training", "data", "checkpoint", "logging", "ternary")


class JobError(FileError):
    """A job file, or an override of it, that is not there or not understood."""


@functools.cache
def _actions() -> dict[str, dict[str, argparse.Action]]:
    """Section -> key -> the argument of our parser."""
    groups = {group.title: group for group in build_parser()._action_groups}
    return {
        section: {a.option_strings[0].removeprefix("--"): a for a in groups[section]._group_actions}
        for section in SECTIONS
    }


def section_of(flag: str) -> str | None:
    """The section that a flag of our loop belongs to; None for a flag it does not have."""
    return next((section for section, actions in _actions().items() if flag in actions), None)


def flag_value(section: str, key: Any, value: Any) -> Any:
    """The value of a key of a section, as it is.

    Raises:
        JobError: there is no such flag, or the value is none of it.
    """
    known = _actions()[section]
    where = f"{section}.{key}"
    if key not in known:
        elsewhere = section_of(str(key))
        hint = f": it belongs to section {elsewhere}" if elsewhere else nearest(str(key), sorted(known))
        raise JobError(f"unknown key {where}{hint}")
    action = known[key]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise JobError(f"{where}: expected true or false, got {value!r}")
        return value
    if action.nargs == "+":
        return [_scalar(where, action, item) for item in (value if isinstance(value, list) else [value])]
    return _scalar(where, action, value)


def _scalar(where: str, action: argparse.Action, value: Any) -> Any:
    if isinstance(action.type, Whole | Number):
        mistake = action.type.mistake(value)
        if mistake is not None:
            raise JobError(f"{where}: {value!r}: {mistake}")
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        raise JobError(f"{where}: expected text, got {value!r}")
    if action.choices is not None and value not in action.choices:
        raise JobError(f"{where}: {value!r} is none of {', '.join(map(str, action.choices))}")
    refuse_flags_in(where, value)
    return value


def refuse_flags_in(where: str, value: Any) -> None:
    """A value must not turn into a flag on the command line, nor end it."""
    if isinstance(value, str) and (value.startswith("-") or "\0" in value):
        raise JobError(f"{where}: {value!r} would be taken for a flag")

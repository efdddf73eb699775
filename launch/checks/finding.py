# SPDX-License-Identifier: Apache-2.0
"""What a check says: one line of the preflight's table."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: its name.
        status: ``fail`` stops a job before it starts, ``warn`` does not.
        found: what was found.
        cure: what to do; empty for ``pass``.
    """

    check: str
    status: Status
    found: str
    cure: str = ""


def passed(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "pass", found)


def warned(check: str, found: str, cure: str) -> Finding:
    """The job may run; somebody should look."""
    return Finding(check, "warn", found, cure)


def failed(check: str, found: str, cure: str) -> Finding:
    """The job cannot run as it is."""
    return Finding(check, "fail", found, cure)


def judged(check: str, found: str, mistakes: list[tuple[str, str]]) -> list[Finding]:
    """One ``fail`` per (what was found, cure), or one ``pass``."""
    return [failed(check, what, cure) for what, cure in mistakes] or [passed(check, found)]

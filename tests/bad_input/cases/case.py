# SPDX-License-Identifier: Apache-2.0
"""The definition of a case of bad input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Prepare = Callable[[Path], None]


@dataclass(frozen=True, eq=False)
class Case:
    """One bad input.

    Attributes:
        kind: the kind of the mistake, for samples and counts.
        name: the unique name that is printed.
        command: the name of the command; None for a call of the API.
        argv: the arguments of the command, whose working directory is a copy of the world.
        first: the arguments of a good run before the damage, such as one that fills a cache; empty for none.
        prepare: a function that damages the copy of the world.
        environment: additional environment variables.
        says: words of which the message must contain at least one; empty if any message will do.
        writes: beginnings of the paths that the command may change, such as a log that it continues.
        accepts: whether a success is correct, too, such as if a file is not needed; crashes, hangs and tracebacks are
            not.
        status: the exit statuses of a refusal.
        call: the call of the API, which must raise ValueError or TypeError.
    """

    kind: str
    name: str
    command: str | None = None
    argv: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    prepare: Prepare | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    accepts: bool = False
    status: tuple[int, ...] = (2,)
    call: Callable[[], object] | None = None

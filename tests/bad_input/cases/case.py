# SPDX-License-Identifier: Apache-2.0
"""What a case is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Prepare = Callable[[Path], None]


@dataclass(frozen=True, eq=False)
class Case:
    """One bad input.

    Attributes:
        kind: what is attacked, for samples and counts.
        name: unique, for people.
        command: by name; None for a call of the API.
        argv: its arguments, in a copy of the world as the working directory.
        first: arguments of a good run before the damage, such as one that fills a cache.
        prepare: damages that copy.
        environment: variables.
        says: the message must hold one of these.
        writes: what the command goes on with, such as a log; its files may change.
        accepts: a success is right, too, as where a file is not needed; crashes, hangs and tracebacks never are.
        status: the exit codes of a refusal.
        call: of the API; it must raise ValueError or TypeError.
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

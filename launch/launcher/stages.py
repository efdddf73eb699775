# SPDX-License-Identifier: Apache-2.0
"""Jobs that train in stages: what a stage makes of the job's flags, and where it stands in the content of a job file.

A stage starts from the weights of the one before it, with a fresh optimizer, and saves in a directory of its own. Which
stages have ended is read from the trackers in these directories and from nothing else
(:func:`~.torchrun.next_stage`): every node of a job that is started again decides alike, since no tracker changes
before all of its nodes have met.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...files import FileError, nearest

# Where a stage writes what another one would write over.
_OF_ITS_OWN = ("save", "log-dir")


def flags_of(
    name: str, shared: Mapping[str, Any], own: Mapping[str, Any], earlier: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The flags of a stage.

    Unless it says otherwise itself, it saves and logs in directories with its name below the job's, and starts from
    what the stage before it has saved.

    Args:
        name: of the stage.
        shared: flags of the job, by name without dashes.
        own: those that the stage says.
        earlier: flags of the stages in front of it, by their names, in their order.

    Raises:
        FileError: it has the name or a directory of an earlier one, saves nothing, or is told where to load from.
    """
    if name in earlier:
        raise FileError("there are two of this name")
    flags = {**shared, **own}
    if "load" in flags:
        raise FileError("checkpoint.load: a stage goes on from what it has saved, leave it out")
    for key in _OF_ITS_OWN:
        if key in shared and key not in own:
            flags[key] = f"{shared[key]}/{name}"
        for other, theirs in earlier.items():
            if key in flags and flags[key] == theirs.get(key):
                raise FileError(f"{key}: {flags[key]} is that of stage {other}, give each its own")
    if "save" not in flags:
        raise FileError("checkpoint.save is missing: without checkpoints nobody knows which stage has ended")
    if earlier and "pretrained-checkpoint" not in own:
        flags["pretrained-checkpoint"] = earlier[list(earlier)[-1]]["save"]
    return flags


def that_say(content: Mapping[Any, Any], parts: Sequence[str]) -> list[str]:
    """Names of the stages that say themselves what an override of the job would say for all: ``section``, or ``section
    key``, in a job file's content that may be anything."""
    entries = content.get("stages")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        section = entry.get(parts[0]) if isinstance(entry, dict) else None
        if isinstance(section, dict) and (len(parts) == 1 or parts[1] in section):
            found.append(str(entry.get("name")))
    return found


def named(entries: Sequence[Any], name: str) -> Any:
    """The entry of a stage in a job file's content.

    Raises:
        FileError: there is none of that name.
    """
    known = [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]
    if name not in known:
        raise FileError(f"it has no stage {name!r}{nearest(name, known)}")
    return next(entry for entry in entries if isinstance(entry, dict) and str(entry.get("name")) == name)

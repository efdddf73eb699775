# SPDX-License-Identifier: Apache-2.0
"""Jobs that train in stages: the flags of a stage, and its entry in the content of a job file.

A stage starts from the weights of the preceding one, with a fresh optimizer, and saves in a directory of its own. Only
the trackers in these directories determine which stages have ended (:func:`~.torchrun.next_stage`). All nodes of a
restarted job come to the same decision, since no tracker changes before all nodes have met.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...files import FileError, nearest

# Flags for output directories that two stages must not share, because one would overwrite the other's files.
_OF_ITS_OWN = ("save", "log-dir")


def flags_of(
    name: str, shared: Mapping[str, Any], own: Mapping[str, Any], earlier: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the flags of a stage.

    By default a stage saves and logs in directories with its name below those of the job, and starts from what the
    preceding stage has saved.

    Args:
        name: the name of the stage.
        shared: the flags of the job, by name without dashes.
        own: the flags that the stage sets itself.
        earlier: the flags of the preceding stages, by the names of the stages, in their order.

    Raises:
        FileError: if the stage has the name or a directory of an earlier one, saves nothing, or is told where to load
            from.
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
    """Returns the names of the stages that themselves set what an override of the job would set for all stages.

    Args:
        content: the content of a job file, not checked yet.
        parts: the overridden entry: a section, or a section and a key.
    """
    entries = content.get("stages")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        section = entry.get(parts[0]) if isinstance(entry, dict) else None
        if isinstance(section, dict) and (len(parts) == 1 or parts[1] in section):
            found.append(str(entry.get("name")))
    return found


def named(entries: Sequence[Any], name: str) -> Any:
    """Returns the entry of a stage in the content of a job file.

    Raises:
        FileError: if there is no stage of that name.
    """
    known = [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]
    if name not in known:
        raise FileError(f"it has no stage {name!r}{nearest(name, known)}")
    return next(entry for entry in entries if isinstance(entry, dict) and str(entry.get("name")) == name)

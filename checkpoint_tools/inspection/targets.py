# SPDX-License-Identifier: Apache-2.0
"""Inspection of a store of a teacher's targets: its description, its completeness, and its digests."""

from pathlib import Path
from typing import Any

from ...data.target_store import DESCRIPTION, read_description, shard_path
from ...files import find_damage, read_digests
from ..command import progress_of_reading


def is_store(path: Path) -> bool:
    """Returns whether a path is a target store, complete or still being written."""
    return (path / DESCRIPTION).is_file()


def inspect_store(path: Path, fast: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the facts about a target store, by name, and descriptions of the damage to its files.

    Args:
        path: the directory of the store.
        fast: whether to compare only the sizes of the files with their digests.

    Raises:
        FileError: if the store's description or its digests are damaged.
    """
    found = read_description(path)
    there = {
        shard: samples for number, samples in enumerate(found.shards) if (shard := shard_path(path, number)).is_file()
    }
    recorded, damage = read_digests(path), []
    if recorded is not None:
        with progress_of_reading(path, () if fast else recorded) as bar:
            damage = find_damage(path, contents=not fast, on_read=bar.update) or []
    nbytes, tokens = sum(shard.stat().st_size for shard in there), found.seq_length * sum(map(len, there.values()))
    facts = {
        "path": str(path),
        "format": "targets",
        **found.model_dump(),
        "samples": found.samples,
        "shards": len(found.shards),
        "missing_shards": len(found.shards) - len(there),
        "bytes": nbytes,
        "bytes_per_token": nbytes / tokens if tokens else None,
        "complete": recorded is not None and len(there) == len(found.shards),
        "digests": None if recorded is None else not damage,
        "findings": damage,
    }
    return facts, damage


def as_text(facts: dict[str, Any]) -> str:
    """Returns the facts about a target store, and its findings, as text for people."""
    what = f"{facts['width']} draws" if facts["kind"] == "sampled" else f"the {facts['width']} likeliest"
    each = "" if facts["bytes_per_token"] is None else f", {facts['bytes_per_token']:.1f} per token"
    shaping = {name: value for name, value in facts["data"].items() if value not in (None, False)}
    lines = {
        "targets": f"{facts['path']} ({what} of {facts['vocab_size']:,} ids)",
        "temperature": f"{facts['temperature']:g}",
        "teacher": f"{facts['teacher'].get('checkpoint')} (digest {facts['teacher'].get('digest')})",
        "tokenizer": ", ".join(f"{name} {value}" for name, value in facts["tokenizer"].items()),
        "samples": f"{facts['samples']:,} of {facts['seq_length']:,} tokens",
        "data": ", ".join(f"{part['name']} ({part['samples']:,})" for part in facts["parts"]),
        "shaped by": ", ".join(f"{name} {value}" for name, value in shaping.items()),
        "bytes": f"{facts['bytes']:,}{each}",
        "complete": f"no, {facts['missing_shards']} of {facts['shards']} shards are missing",
        "digests": {None: "none", True: "every file matches", False: "files are damaged"}[facts["digests"]],
    }
    if facts["complete"]:
        lines["complete"] = "yes"
    told = [f"{f'{name}:':14}{value}" for name, value in lines.items()]
    if facts["findings"]:
        told += ["", f"findings ({len(facts['findings'])}):", *(f"  {line}" for line in facts["findings"])]
    return "\n".join(told)

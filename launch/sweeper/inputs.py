# SPDX-License-Identifier: Apache-2.0
"""Digests of the files that runs read: a run is a different one if their contents differ, whatever their names."""

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoints.directory import content_digest
from ...data.blends import blend_of
from ...data.sft_files import read_samples
from ...data.token_headers import read_token_file
from ...files import Strict, read_json, validated, write_text

_DATA = ("data_path", "train_data_path", "valid_data_path")
_OTHERS = ("tokenizer_model", "ternary_recipe", "pretrained_checkpoint", "distill_teacher", "distill_targets")
_RECORD = "inputs.json"


class _Record(Strict):
    digests: dict[str, str]  # digests by path


class Inputs:
    """The digests of all files that the arguments of runs name; each is computed once.

    Args:
        known: the digests by path that are already known; these paths are not read.
    """

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self._digests = dict(known or {})

    @classmethod
    def recorded(cls, directory: Path) -> "Inputs":
        """Reads the digests that a sweep recorded when it last ran, if it did; the files need not exist any more.

        Raises:
            FileError: if the record is damaged.
        """
        path = directory / _RECORD
        return cls(validated(_Record, read_json(path), str(path)).digests if path.exists() else None)

    def record(self, directory: Path) -> None:
        """Writes the digests to the directory of a sweep."""
        write_text(directory / _RECORD, json.dumps({"digests": self._digests}, indent=1) + "\n")

    def of(self, args: argparse.Namespace) -> dict[str, Any]:
        """Returns a digest for each argument that names a file; for data arguments the weights and the digests.

        Raises:
            ValueError: if a file is missing or damaged; the message names it.
        """
        read = functools.partial(read_samples, args.seq_length) if args.sft else read_token_file
        found: dict[str, Any] = {}
        for name in _DATA:
            if getattr(args, name) is not None:
                prefixes, weights = blend_of(getattr(args, name))
                found[name] = [weights, [self._digest(prefix, lambda p: read(p).digest) for prefix in prefixes]]
        for name in _OTHERS:
            if getattr(args, name) is not None:
                found[name] = self._digest(getattr(args, name), lambda p: content_digest(Path(p)))
        return found

    def _digest(self, path: str, take: Any) -> str:
        if path not in self._digests:
            self._digests[path] = take(path)
        return self._digests[path]

# SPDX-License-Identifier: Apache-2.0
"""Storage of a model's answers on disk after every few batches, so that a killed evaluation does not repeat them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from ..files import FileError, parse_json

DIRECTORY = "answers"
# A log-likelihood in nats and whether every token is the likeliest; or a generated text.
Answer = list[Any] | str


def key_of(kind: str, *asked: Any) -> str:
    """Returns a digest that distinguishes a question from others."""
    return xxhash.xxh3_128_hexdigest(json.dumps([kind, *asked], sort_keys=True).encode())


class AnswerStore:
    """An append-only file of answers, one per line, after a first line with the identity of the model.

    The file's name is a digest of the identity, so that another model, or the same model with other settings, never
    finds it. A last line that was left unfinished by a kill is cut off.

    Args:
        output: the directory of an evaluation.
        identity: everything that an answer depends on except the question, such as the digest of the weights.

    Raises:
        FileError: if the file is damaged.
        OSError: if the file cannot be written.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.path = output / DIRECTORY / f"{key_of('identity', dict(identity))}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._known: dict[str, Answer] = {}
        self._read(dict(identity))

    def _read(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            where = f"{self.path}, line {number}"
            value = parse_json(line.decode(errors="replace"), where)
            if number == 1:
                if value != {"identity": json.loads(json.dumps(identity))}:
                    raise FileError(f"{where}: these are not the answers of this model: delete the file")
            elif not isinstance(value, dict) or set(value) != {"key", "answer"}:
                raise FileError(f"{where}: damaged: delete the file, and everything is asked again")
            else:
                self._known[value["key"]] = value["answer"]
        self._file.truncate(whole)
        if not whole:
            self._write([{"identity": identity}])

    def get(self, key: str) -> Answer | None:
        """Returns the answer to a question, or None if there is none yet."""
        return self._known.get(key)

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Stores answers; they are on the disk when this returns."""
        self._write([{"key": key, "answer": answer} for key, answer in answers])
        self._known.update(answers)

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file of answers."""
        self._file.close()

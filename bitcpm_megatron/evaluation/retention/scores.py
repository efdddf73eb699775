# SPDX-License-Identifier: Apache-2.0
"""What one model scored, item by item, as a file: the report needs nothing else."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...checkpoints.directory import content_digest
from ...files import FileError, Strict, read_json, validated, write_text

DIRECTORY = "scores"


class TaskScores(Strict):
    """One task of one model.

    Attributes:
        metric: whose values the scores are; its mean over the items is the task's score.
        versions: of the harness's tasks below it, as they say themselves.
        shots: examples before each question.
        data: digest of the items as they were asked.
        tokens: digest of the ids of all contexts and continuations, which depend on the model's tokenizer.
        items: id -> score, of those that were asked.
        skipped: ids of those that are longer than the model's context.
        chance: the expected score of who draws an answer; None where answers are free text.
        majority: the score of who always gives the commonest answer; None where answers are of no fixed set.
    """

    metric: str
    versions: dict[str, float | int | str | None]
    shots: int
    data: str
    tokens: str
    items: dict[str, float]
    skipped: list[str]
    chance: float | None
    majority: float | None

    @property
    def mean(self) -> float | None:
        """The task's score; None where every item was skipped."""
        return float(np.mean(list(self.items.values()))) if self.items else None


class TextScores(Strict):
    """One text of one model.

    Attributes:
        data: digest of the text.
        tokens: digest of the ids of its documents, and of what stands before them.
        window: longest input of a forward, in tokens.
        overlap: tokens of it at least that are context alone, in every window but a document's first.
        documents: of each ``[nats, tokens, bytes]``: the negative log-likelihood of its tokens, each once.
    """

    data: str
    tokens: str
    window: int
    overlap: int
    documents: list[list[float]]


class ModelScores(Strict):
    """One model.

    Attributes:
        name: as the user calls it.
        model: what it is: path, kind, revision, digest of its weights, dtype, context.
        settings: how it was asked: harness, template, seeds, versions of packages.
        tasks: by name, in the order of the suite.
        texts: by name.
    """

    format: Literal[1] = 1
    name: str
    model: dict[str, Any]
    settings: dict[str, Any]
    tasks: dict[str, TaskScores]
    texts: dict[str, TextScores]

    def write(self, output: Path) -> None:
        """Writes it below the directory of an evaluation."""
        path = scores_path(output, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.model_dump_json(indent=1) + "\n")


def scores_path(output: Path, name: str) -> Path:
    """Where the scores of a model lie."""
    return output / DIRECTORY / f"{name}.json"


def read_scores(output: Path, name: str) -> ModelScores:
    """The scores of a model that was evaluated into a directory.

    Raises:
        FileError: it was not, or the file is damaged.
    """
    path = scores_path(output, name)
    if not path.is_file():
        raise FileError(f"{path}: {name} was not evaluated here: leave out --report-only")
    return validated(ModelScores, read_json(path), str(path))


def model_digest(path: Path) -> str:
    """The digest that tells a model from others: of the newest checkpoint of a run, or of a directory but for its card.

    Raises:
        FileError: there is nothing.
    """
    return content_digest(path, ("README.md",))


def check_alike(base: ModelScores, other: ModelScores) -> None:
    """Makes sure that two models were asked the same.

    Raises:
        ValueError: they were not, naming the task and what differs.
    """
    for what in ("tasks", "texts"):
        _same(f"{base.name} and {other.name}", what, list(getattr(base, what)), list(getattr(other, what)))
    for name, task in base.tasks.items():
        for what in ("metric", "versions", "shots", "data"):
            _same(
                f"{name} of {base.name} and {other.name}", what, getattr(task, what), getattr(other.tasks[name], what)
            )
    for name, text in base.texts.items():
        _same(f"{name} of {base.name} and {other.name}", "data", text.data, other.texts[name].data)
    # The seed draws the examples; where there are none it draws nothing.
    drawn = ("seed",) if any(task.shots for task in base.tasks.values()) else ()
    for what in ("template", "max_new_tokens", *drawn):
        _same(f"{base.name} and {other.name}", what, base.settings.get(what), other.settings.get(what))


def _same(where: str, what: str, one: Any, other: Any) -> None:
    if one != other:
        raise ValueError(f"{where} cannot be compared, {what} differ: {one} and {other}; evaluate both alike")

# SPDX-License-Identifier: Apache-2.0
"""The scores of one model, item by item, as a file that contains everything that the report needs."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...checkpoints.directory import content_digest
from ...files import FileError, Strict, read_json, validated, write_text

DIRECTORY = "scores"


class TaskScores(Strict):
    """The scores of one model on one task.

    Attributes:
        metric: the metric of the items' scores; its mean over the items is the task's score.
        versions: the versions that the harness's tasks of this task report, by name.
        shots: the number of examples before each question.
        data: the digest of the items as they were asked.
        tokens: the digest of the ids of all contexts and continuations, which depend on the model's tokenizer.
        items: the scores of the items that were asked, by item.
        skipped: the items that are longer than the model's context.
        chance: the expected score of random guessing; None if answers are free text.
        majority: the score of always giving the commonest answer; None if answers are not from one fixed set.
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
        """The task's score; None if every item was skipped."""
        return float(np.mean(list(self.items.values()))) if self.items else None


class TextScores(Strict):
    """The scores of one model on one text.

    Attributes:
        data: the digest of the text.
        tokens: the digest of the ids of its documents, and of the token in front of them.
        window: the longest input of a forward pass, in tokens.
        overlap: the least number of tokens that are context only, in every window except a document's first.
        documents: of each document ``[nats, tokens, bytes]``: the negative log-likelihood of its tokens, each scored
            once, the number of its tokens, and its length in UTF-8.
    """

    data: str
    tokens: str
    window: int
    overlap: int
    documents: list[list[float]]


class ModelScores(Strict):
    """All scores of one model.

    Attributes:
        format: the version of the file format.
        name: the user's name for the model.
        model: the description of the model: path, kind, revision, digest of its weights, dtype, context.
        settings: the settings of the evaluation: harness, template, seeds, versions of packages.
        tasks: the scores on tasks by name, in the order of the suite.
        texts: the scores on texts by name.
    """

    format: Literal[1] = 1
    name: str
    model: dict[str, Any]
    settings: dict[str, Any]
    tasks: dict[str, TaskScores]
    texts: dict[str, TextScores]

    def write(self, output: Path) -> None:
        """Writes the scores to a file below the directory of an evaluation."""
        path = scores_path(output, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.model_dump_json(indent=1) + "\n")


def scores_path(output: Path, name: str) -> Path:
    """Returns the path of a model's scores below the directory of an evaluation."""
    return output / DIRECTORY / f"{name}.json"


def read_scores(output: Path, name: str) -> ModelScores:
    """Reads the scores of a model from the directory of an evaluation.

    Raises:
        FileError: if the model was not evaluated there, or the file is damaged.
    """
    path = scores_path(output, name)
    if not path.is_file():
        raise FileError(f"{path}: {name} was not evaluated here: leave out --report-only")
    return validated(ModelScores, read_json(path), str(path))


def model_digest(path: Path) -> str:
    """Returns a digest that distinguishes a model from others: of a run's newest checkpoint, or of a directory.

    The card of a model in a directory is left out.

    Raises:
        FileError: if the path holds no model.
    """
    return content_digest(path, ("README.md",))


def check_alike(base: ModelScores, other: ModelScores) -> None:
    """Checks that two models were asked the same questions in the same way.

    Raises:
        ValueError: if they were not; the message names the task and what differs.
    """
    for what in ("tasks", "texts"):
        _same(f"{base.name} and {other.name}", what, list(getattr(base, what)), list(getattr(other, what)))
    for name, task in base.tasks.items():
        for what in ("metric", "versions", "shots", "data"):
            _same(
                f"{name} of {base.name} and {other.name}", what, getattr(task, what), getattr(other.tasks[name], what)
            )
    for name, text in base.texts.items():
        where, theirs = f"{name} of {base.name} and {other.name}", other.texts[name]
        _same(where, "data", text.data, theirs.data)
        _same(where, "number of documents", len(text.documents), len(theirs.documents))
    # The seed matters only if examples are drawn.
    drawn = ("seed",) if any(task.shots for task in base.tasks.values()) else ()
    for what in ("template", "max_new_tokens", *drawn):
        _same(f"{base.name} and {other.name}", what, base.settings.get(what), other.settings.get(what))


def _same(where: str, what: str, one: Any, other: Any) -> None:
    if one != other:
        raise ValueError(f"{where} cannot be compared, {what} differ: {one} and {other}; evaluate both alike")

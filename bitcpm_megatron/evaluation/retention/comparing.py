# SPDX-License-Identifier: Apache-2.0
"""The rows of the retention table: tasks, the mean over tasks, and texts, of each model compared with the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scores import ModelScores, TaskScores, TextScores, check_alike
from .statistics import Comparison, compare, compare_rates, interval

MEAN = "mean"


@dataclass(frozen=True)
class Row:
    """The result of one model on a task or a text, or its mean over tasks.

    Attributes:
        model: the name of the model.
        task: the name of the task or text, or :data:`MEAN`.
        metric: the metric of the score.
        items: the number of items that both models were asked; for a text, the number of its documents.
        skipped: the number of items that are longer than the context of one of the models.
        score: the score of the model; None if no item is left.
        interval: the 95 % interval of a task's score, for the model that the others are compared with; else None.
        comparison: the comparison with that model; None for that model itself.
        chance: the expected score of random guessing, as in :class:`~.scores.TaskScores`.
        majority: the score of always giving the commonest answer, as in :class:`~.scores.TaskScores`.
        remarks: the caveats of the row.
    """

    model: str
    task: str
    metric: str
    items: int
    skipped: int
    score: float | None
    interval: tuple[float, float] | None = None
    comparison: Comparison | None = None
    chance: float | None = None
    majority: float | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The rows of all models of an evaluation, each compared with the first model."""

    models: Sequence[ModelScores]
    tasks: Sequence[Row]
    texts: Sequence[Row]

    def of(self, model: str, task: str) -> Row | None:
        """Returns the row of a model and a task or text; None if there is none, such as a mean over one task."""
        rows = (*self.tasks, *self.texts)
        return next((row for row in rows if (row.model, row.task) == (model, task)), None)


def table_of(models: Sequence[ModelScores]) -> Table:
    """Compares every model with the first.

    Raises:
        ValueError: if the models were not asked the same questions.
    """
    base = models[0]
    tasks, texts = _alone(base)
    for other in models[1:]:
        check_alike(base, other)
        rows, pairs = [], []
        for name, task in base.tasks.items():
            row, pair = _task(name, base.name, other.name, task, other.tasks[name])
            rows.append(row)
            pairs += [pair] if len(pair) else []
        tasks += [*rows, *_mean(other.name, rows, compare(pairs) if pairs else None)]
        texts += [_text(name, base.name, other.name, text, other.texts[name]) for name, text in base.texts.items()]
    return Table(models, tasks, texts)


def _alone(base: ModelScores) -> tuple[list[Row], list[Row]]:
    tasks = []
    for name, task in base.tasks.items():
        values = np.array(list(task.items.values()))
        remarks = _remarks(task.mean, task)
        ends = interval(values) if len(values) else None
        rest: dict[str, Any] = {"chance": task.chance, "majority": task.majority, "remarks": remarks}
        tasks.append(Row(base.name, name, task.metric, len(values), len(task.skipped), task.mean, ends, **rest))
    arrays = [np.repeat(np.array(list(t.items.values()))[:, None], 2, 1) for t in base.tasks.values() if t.items]
    mean = compare(arrays) if arrays else None
    texts = []
    for name, text in base.texts.items():
        pairs = _documents(name, text, text)
        texts.append(Row(base.name, name, _metric(pairs[:, 0]), len(pairs), 0, _rates(pairs).base))
    return [*tasks, *_mean(base.name, tasks, mean, alone=True)], texts


def _task(name: str, first: str, model: str, base: TaskScores, other: TaskScores) -> tuple[Row, np.ndarray]:
    both = [key for key in base.items if key in other.items]
    pair = np.array([(base.items[key], other.items[key]) for key in both])
    skipped = len({*base.skipped, *other.skipped})
    comparison = compare([pair]) if both else None
    score = comparison.score if comparison else None
    remarks = _remarks(score, other) + _other_tokens(first, base, other)
    rest: dict[str, Any] = {"chance": other.chance, "majority": other.majority, "remarks": remarks}
    return Row(model, name, other.metric, len(both), skipped, score, None, comparison, **rest), pair


def _mean(model: str, rows: Sequence[Row], comparison: Comparison | None, alone: bool = False) -> list[Row]:
    """Returns the row of the mean in a list, which is empty with fewer than two tasks or without any score."""
    asked = [row for row in rows if row.score is not None]
    if len(rows) < 2 or comparison is None:
        return []
    left = [row.task for row in rows if row.score is None]
    remarks = (f"without {', '.join(left)}",) if left else ()
    items, skipped = sum(row.items for row in rows), sum(row.skipped for row in rows)
    said = None if alone else comparison
    metric = f"mean of {len(asked)} tasks"
    return [Row(model, MEAN, metric, items, skipped, comparison.score, None, said, remarks=remarks)]


def _text(name: str, first: str, model: str, base: TextScores, other: TextScores) -> Row:
    pairs = _documents(name, base, other)
    comparison = _rates(pairs)
    remarks = _other_tokens(first, base, other)
    if left := len(base.documents) - len(pairs):
        remarks += (f"without {left} documents of which a tokenizer makes no token",)
    if (base.window, base.overlap) != (other.window, other.overlap):
        remarks += (
            f"windows of {other.window} tokens that overlap by {other.overlap}, of {first} {base.window} by "
            f"{base.overlap}",
        )
    return Row(model, name, _metric(pairs[:, 1]), len(pairs), 0, comparison.score, None, comparison, remarks=remarks)


def _documents(name: str, base: TextScores, other: TextScores) -> np.ndarray:
    """Returns the documents in the rows of :class:`TextScores`, ``[documents, 2 models, 3]``.

    Documents of which one of the tokenizers makes no token are left out for both models.

    Raises:
        ValueError: if no document is left.
    """
    pairs = np.array([base.documents, other.documents]).swapaxes(0, 1)
    pairs = pairs[(pairs[:, :, 1] > 0).all(1)]
    if not len(pairs):
        raise ValueError(f"{name}: every document is one of which a tokenizer makes no token; give another text")
    return pairs


def _rates(pairs: np.ndarray) -> Comparison:
    return compare_rates(pairs[:, :, 0] / np.log(2), pairs[:, 0, 2])


def _metric(documents: np.ndarray) -> str:
    nats, tokens, _ = documents.sum(0)
    return f"bits per byte; perplexity {np.exp(nats / tokens):.2f} over {int(tokens):,} tokens"


def _other_tokens(first: str, base: TaskScores | TextScores, other: TaskScores | TextScores) -> tuple[str, ...]:
    return () if base.tokens == other.tokens else (f"asked in other tokens than {first}",)


def _remarks(score: float | None, task: TaskScores) -> tuple[str, ...]:
    if score is None:
        return ("every item is longer than the context",)
    found = []
    if task.chance is not None and score < task.chance:
        found.append(f"below chance ({100 * task.chance:.1f})")
    if task.majority is not None and score < task.majority:
        found.append(f"below the majority class ({100 * task.majority:.1f})")
    return tuple(found)

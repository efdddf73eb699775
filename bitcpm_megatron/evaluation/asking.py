# SPDX-License-Identifier: Apache-2.0
"""Models of lm-evaluation-harness that store every answer, and skip questions that are longer than their context."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..cli import FailedError
from .answers import Answer, AnswerStore, key_of

# The answer to a question that is too long. It is finite because the harness takes its softmax; the result is not used.
_UNASKED = (-1e9, False)
# The number of batches between two writes to the disk.
_BATCHES = 4
# A context and a continuation as the harness passes them: their texts (None for a window of a text), then their ids.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class Recorded:
    """A mixin that stores the answers of a model class of the harness, and asks it only what is not answered yet.

    It calls the model's ``_loglikelihood_tokens`` and ``generate_until`` with the open questions, the longest first, a
    few batches at a time. Every rank of a job asks the same questions in the same order. Only the first rank has the
    store, and all ranks use what it holds.

    Attributes:
        store: the store of the answers; None on all ranks except the first.
        title: the title of the progress bar.
        skipped: the questions that were too long, as context and continuation (None for a generated answer).
        tokens: a digest of the token ids of every question, by context and continuation, including skipped ones.
        asked: the number of questions that this process has put to the model itself.
    """

    store: AnswerStore | None
    title: str

    def record(self, store: AnswerStore | None, title: str) -> None:
        """Begins to record answers, in the store if there is one."""
        self.store, self.title = store, title
        self.skipped: set[tuple[str, str | None]] = set()
        self.tokens: dict[tuple[str, str | None], str] = {}
        self.asked = 0

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Returns the log-likelihoods of continuations as the harness defines them, without its progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        this: Any = self
        fitting = []
        for texts, context, continuation in requests:
            if texts is not None:
                self.tokens[texts] = key_of("tokens", context, continuation)
            if texts is not None and len(context) + len(continuation) > this.max_length + 1:
                self.skipped.add(texts)
            if texts is None or texts not in self.skipped:
                fitting.append((texts, context, continuation))
        answer = functools.partial(super()._loglikelihood_tokens, disable_tqdm=True)  # type: ignore[misc]
        answers = self._answered(
            "log-likelihood",
            [(key_of("loglikelihood", one[1], one[2]), len(one[1]) + len(one[2]), one) for one in fitting],
            lambda some: [[float(value), bool(greedy)] for value, greedy in answer(some)],
        )
        rest = iter(answers)
        return [
            _UNASKED if texts is not None and texts in self.skipped else tuple(next(rest)) for texts, _, _ in requests
        ]

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        """Returns generated answers as the harness defines them; "" for a question that leaves too little context.

        A question is skipped if it does not fit into the context together with all tokens that may be generated.
        """
        this: Any = self
        questions = []
        for request in requests:
            context, how = request.args
            ids = this.tok_encode(context)
            length = len(ids)
            self.tokens[context, None] = key_of("tokens", ids)
            if length + how["max_gen_toks"] > this.max_length:
                self.skipped.add((context, None))
            else:
                questions.append((key_of("generate", ids, how), length, request))
        answer = functools.partial(super().generate_until, disable_tqdm=True)  # type: ignore[misc]
        answers = iter(self._answered("generation", questions, lambda some: list(answer(some))))
        return ["" if (request.args[0], None) in self.skipped else str(next(answers)) for request in requests]

    def _answered(
        self, what: str, questions: Sequence[tuple[str, int, Any]], answer: Callable[[list[Any]], list[Answer]]
    ) -> list[Answer]:
        known = _agreed([None if self.store is None else self.store.get(key) for key, _, _ in questions])
        found = {key: value for (key, _, _), value in zip(questions, known, strict=True) if value is not None}
        waiting = {key: (length, one) for key, length, one in questions if key not in found}
        ordered = sorted(waiting, key=lambda key: (-waiting[key][0], key))
        first = _rank() == 0
        bar = tqdm(
            total=len({key for key, _, _ in questions}),
            initial=len(found),
            unit="request",
            desc=f"{self.title}: {what}",
            disable=not first or not ordered,
            mininterval=1.0,
        )
        with bar:
            for keys in _parts(ordered, _BATCHES * int(self.batch_size)):  # type: ignore[attr-defined]
                answers = answer([waiting[key][1] for key in keys])
                self.asked += len(keys)
                _require_finite(answers, self.title)
                if self.store is not None:
                    self.store.add(list(zip(keys, answers, strict=True)))
                found.update(zip(keys, answers, strict=True))
                bar.update(len(keys))
        return [found[key] for key, _, _ in questions]


def _parts(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for first in range(0, len(keys), size):
        yield keys[first : first + size]


def _require_finite(answers: Sequence[Answer], title: str) -> None:
    for answer in answers:
        if not isinstance(answer, str) and not math.isfinite(answer[0]):
            raise FailedError(
                f"{title}: a log-likelihood is {answer[0]}: the weights are damaged, or need another dtype"
            )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _agreed(known: list[Any]) -> list[Any]:
    """Returns the first rank's list on every rank; collective."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(known)
    return known

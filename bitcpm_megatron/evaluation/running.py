# SPDX-License-Identifier: Apache-2.0
"""Evaluation of one model on all benchmarks, with the harness's results turned into scores by item."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from ..files import FileError
from .answers import key_of
from .asking import Recorded
from .benchmarks import BENCHMARKS
from .retention.scores import TaskScores
from .tasks import Asked

_METRICS = ("acc", "exact_match")
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def ask(model: Any, asked: Asked, chat: bool) -> dict[str, TaskScores]:
    """Returns the scores of a model on every benchmark; every rank of a job must call it with the same arguments.

    Args:
        model: a model for the harness, an instance of :class:`~.asking.Recorded`.
        asked: the tasks from :func:`~.tasks.load_tasks`.
        chat: whether questions go through the model's chat template, with few-shot examples as turns.

    Raises:
        FailedError, ValueError: if a log-likelihood is not finite, or a task has no score that is known here.
    """
    from lm_eval import evaluator

    said = evaluator.evaluate(
        model,
        {"tasks": dict(asked.tasks), "groups": {}, "group_map": {}},
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return {name: _scores(name, leaves, asked, said["samples"], model) for name, leaves in asked.leaves.items()}


def template_of(model: Any) -> str:
    """Returns a digest of a conversation formatted by the model's chat template, which distinguishes templates."""
    return xxhash.xxh3_128_hexdigest(model.apply_chat_template(_PROBE, add_generation_prompt=True).encode())


def _scores(name: str, leaves: Sequence[str], asked: Asked, samples: Mapping[str, Any], model: Recorded) -> TaskScores:
    tasks = [asked.tasks[leaf] for leaf in leaves]
    taken = {f"{leaf}/{s['doc_id']}": s for leaf in leaves for s in _of_its_filter(name, leaf, samples[leaf])}
    metric = _metric(name, next(iter(taken.values())))
    questions = {key: [_question(pair) for pair in sample["arguments"]] for key, sample in taken.items()}
    left_out = [key for key, asked_of in questions.items() if any(one in model.skipped for one in asked_of)]
    tokens = [(key, [model.tokens[one] for one in asked_of]) for key, asked_of in questions.items()]
    kept = {key: sample for key, sample in taken.items() if key not in set(left_out)}
    content = json.dumps([(key, sample["doc_hash"]) for key, sample in taken.items()])
    return TaskScores(
        metric=metric,
        versions={leaf: (task.config.metadata or {}).get("version") for leaf, task in zip(leaves, tasks, strict=True)},
        shots=max(task.config.num_fewshot or 0 for task in tasks),
        data=xxhash.xxh3_128_hexdigest(content.encode()),
        tokens=key_of("tokens", tokens),
        items={key: float(sample[metric]) for key, sample in kept.items()},
        skipped=left_out,
        chance=_chance(name, kept),
        majority=_majority(name, kept),
    )


def _of_its_filter(name: str, leaf: str, samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the samples of one of the harness's filters: the benchmark's if it names one, else the last."""
    benchmark = BENCHMARKS.get(name)
    wanted = (benchmark and benchmark.filter) or samples[-1]["filter"]
    found = [sample for sample in samples if sample["filter"] == wanted]
    if not found:
        raise FileError(f"{leaf}: this harness has no filter {wanted}: pip install lm-eval==0.4.13")
    return found


def _metric(name: str, sample: Mapping[str, Any]) -> str:
    benchmark = BENCHMARKS.get(name)
    wanted = _METRICS if benchmark is None else (benchmark.metric,)
    for metric in wanted:
        if metric in sample["metrics"]:
            return metric
    raise FileError(
        f"{name}: its scores are {', '.join(sample['metrics'])}, and those of {' or '.join(wanted)} are read here"
    )


def _question(pair: Sequence[Any]) -> tuple[str, str | None]:
    """Returns a question as :class:`~.asking.Recorded` identifies it."""
    return pair[0], pair[1] if isinstance(pair[1], str) else None


def _chooses(sample: Mapping[str, Any]) -> bool:
    return len(sample["arguments"]) > 1


def _chance(name: str, samples: Mapping[str, Mapping[str, Any]]) -> float | None:
    benchmark = BENCHMARKS.get(name)
    if benchmark is not None and benchmark.chance is not None:
        return benchmark.chance
    choices = [len(sample["arguments"]) for sample in samples.values() if _chooses(sample)]
    return sum(1 / count for count in choices) / len(choices) if choices and len(choices) == len(samples) else None


def _majority(name: str, samples: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Returns the share of the commonest answer, if all items have the same choices or are generated letters."""
    benchmark = BENCHMARKS.get(name)
    choices = {tuple(pair[1] for pair in sample["arguments"]) for sample in samples.values() if _chooses(sample)}
    generated = benchmark is not None and benchmark.chance is not None
    if not samples or (len(choices) != 1 and not generated):
        return None
    return Counter(str(sample["target"]) for sample in samples.values()).most_common(1)[0][1] / len(samples)

# SPDX-License-Identifier: Apache-2.0
"""Table of the known benchmarks: their folders in the harness, the columns of their items, and their scores."""

from dataclasses import dataclass

BITCPM_11, SAMPLE_3 = "bitcpm-11", "sample-3"
_LETTERS = "question A B C D answer"


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-evaluation-harness, or a group of tasks.

    Attributes:
        folder: the folder of its YAML files, below the harness's tasks.
        columns: the columns that every item must have, separated by spaces.
        metric: the harness's metric whose mean over the items is the score.
        filter: the harness's filter, if there are several for the metric; None for the last one.
        chance: the score of random guessing among generated answers; None if it follows from the number of choices, or
            answers are free text.
    """

    folder: str
    columns: str
    metric: str = "acc"
    filter: str | None = None
    chance: float | None = None


BENCHMARKS = {
    "arc_challenge": Benchmark("arc", "question choices answerKey"),
    "arc_challenge_chat": Benchmark("arc", "question choices answerKey", "exact_match", chance=0.25),
    "arc_easy": Benchmark("arc", "question choices answerKey"),
    "boolq": Benchmark("super_glue/boolq", "passage question label"),
    "piqa": Benchmark("piqa", "goal sol1 sol2 label"),
    "winogrande": Benchmark("winogrande", "sentence option1 option2 answer"),
    "cmmlu": Benchmark("cmmlu", "Question A B C D Answer"),
    "ceval-valid": Benchmark("ceval", _LETTERS),
    "mmlu": Benchmark("mmlu/default", "question choices answer"),
    "mmlu_generative": Benchmark("mmlu/generative", "question choices answer", "exact_match", "get_response", 0.25),
    "mmlu_redux_generative": Benchmark(
        "mmlu-redux/generative", "question choices answer", "exact_match", "default", 0.25
    ),
    "bbh_cot_fewshot": Benchmark("bbh/cot_fewshot", "input target", "exact_match", "get-answer"),
    "gsm8k": Benchmark("gsm8k", "question answer", "exact_match", "flexible-extract"),
    "hellaswag": Benchmark("hellaswag", "activity_label ctx_a ctx_b endings label", "acc_norm"),
    "truthfulqa_mc1": Benchmark("truthfulqa", "question mc1_targets"),
}

SUITES = {
    BITCPM_11: (
        *("arc_challenge_chat", "arc_easy", "boolq", "piqa", "winogrande", "cmmlu", "ceval-valid", "mmlu_generative"),
        *("mmlu_redux_generative", "bbh_cot_fewshot", "gsm8k"),
    ),
    # Real items that a package on PyPI contains, without few-shot examples.
    SAMPLE_3: ("gsm8k", "hellaswag", "truthfulqa_mc1"),
}

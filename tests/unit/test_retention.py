# SPDX-License-Identifier: Apache-2.0
"""Tests of the retention table: ratios of means, the paired bootstrap, flags, and its files."""

import csv
import math

import numpy as np
import pytest

from bitcpm_megatron.evaluation.retention import report
from bitcpm_megatron.evaluation.retention.comparing import MEAN, table_of
from bitcpm_megatron.evaluation.retention.scores import ModelScores, TaskScores, TextScores, read_scores
from bitcpm_megatron.evaluation.retention.statistics import compare, compare_rates

# The technical report's table: full-precision / ternary scores of each task for 8B, 3B, 1B and 0.5B.
REPORTED = {
    "ARC-c": "87.46/86.10 80.34/78.98 64.41/67.12 51.86/50.51",
    "ARC-e": "95.06/93.47 92.77/88.36 79.89/79.01 71.78/65.08",
    "BoolQ": "84.89/83.39 79.85/77.89 68.38/65.50 62.29/43.55",
    "PIQA": "80.52/78.78 70.57/72.69 66.16/65.45 60.99/58.49",
    "WinoGrande": "63.30/61.17 58.41/52.96 51.62/53.28 51.07/51.54",
    "CMMLU": "80.62/78.92 78.11/76.53 74.57/67.42 65.22/60.49",
    "C-Eval": "81.36/77.50 75.85/75.89 73.25/65.96 66.11/60.74",
    "MMLU": "75.83/70.65 66.95/64.41 57.71/57.71 55.55/50.73",
    "MMLU-Redux": "77.14/69.85 65.82/60.07 54.80/54.16 48.00/43.79",
    "BBH": "76.72/70.70 68.29/68.30 64.40/60.40 49.87/47.44",
    "GSM8K": "91.51/85.75 81.64/79.45 63.15/61.56 52.08/39.42",
}


def _task(values, chance=None, majority=None, skipped=()):
    items = {str(number): float(value) for number, value in enumerate(values)}
    return TaskScores(
        metric="acc",
        versions={"t": 1.0},
        shots=0,
        data="d",
        tokens="t",
        items=items,
        skipped=list(skipped),
        chance=chance,
        majority=majority,
    )


def _model(name, tasks, texts=()):
    return ModelScores(name=name, model={"path": name}, settings={}, tasks=tasks, texts=dict(texts))


@pytest.mark.parametrize("column, retention", [(0, "95.7"), (1, "97.2"), (2, "97.1"), (3, "90.1")])
@pytest.mark.verifies(
    "checkpoints",
    "retention (ternary relative to full-precision scores): the scores in the BitCPM-CANN technical report give its "
    "figures of 95.7, 97.2, 97.1 and 90.1 %; a loss of one item in 100 is not significant, a loss of 30 is",
    cuda="-",
    npu="-",
)
def test_the_reports_own_scores_give_its_retention(column, retention, tmp_path):
    pairs = {task: cells.split()[column].split("/") for task, cells in REPORTED.items()}
    models = [
        _model(name, {task: _task([float(pair[side]) / 100]) for task, pair in pairs.items()})
        for side, name in enumerate(("FP", "ternary"))
    ]
    table = table_of(models)
    report.write(table, tmp_path)
    text = (tmp_path / report.REPORT).read_text()
    [mean] = [line for line in text.splitlines() if line.startswith(f"| {MEAN} |")]
    assert f"| {retention} % (" in mean
    rows = {row["task"]: row for row in csv.DictReader((tmp_path / report.DATA).open()) if row["model"] == "ternary"}
    assert f"{100 * float(rows[MEAN]['retention']):.1f}" == retention
    arc = pairs["ARC-c"]
    assert float(rows["ARC-c"]["retention"]) == pytest.approx(float(arc[1]) / float(arc[0]), abs=1e-6)
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_one_item_of_a_hundred_is_not_significant_and_thirty_are():
    right = np.ones(100)
    for lost, significant in ((1, False), (30, True)):
        other = right.copy()
        other[:lost] = 0
        table = table_of([_model("BF16", {"t": _task(right)}), _model("ternary", {"t": _task(other)})])
        row = table.of("ternary", "t")
        assert row.comparison.difference == pytest.approx(-lost / 100)
        assert row.comparison.significant is significant
        [line] = [line for line in report.lines(table) if line.startswith("| t | acc")]
        assert (report.NOT_SIGNIFICANT in line) is not significant


def test_items_are_drawn_in_pairs():
    # Both models fail on the same half of the items; unpaired, their difference would have an interval of 20 points.
    half = np.arange(200) % 2
    comparison = compare([np.stack([half, half], 1)])
    assert comparison.interval == (0, 0) and not comparison.significant


def test_the_interval_of_a_difference_is_that_of_its_variance():
    generator = np.random.default_rng(3)
    pair = generator.random((150, 2))
    apart = pair[:, 1] - pair[:, 0]
    low, high = compare([pair]).interval
    half = 1.96 * apart.std() / math.sqrt(len(apart))
    assert low == pytest.approx(apart.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(apart.mean() + half, abs=0.1 * half)
    # The mean of two tasks weights both equally, whatever their sizes are.
    both = compare([pair, np.tile([[0.0, 1.0]], (9, 1))])
    assert both.difference == pytest.approx((apart.mean() + 1) / 2)
    assert both.interval[1] - both.interval[0] == pytest.approx((high - low) / 2, rel=0.1)


def test_few_items_are_never_significant():
    assert not compare([np.tile([[1.0, 0.0]], (9, 1))]).significant
    assert compare([np.tile([[1.0, 0.0]], (10, 1))]).significant


def test_a_base_of_nothing_has_no_retention():
    comparison = compare([np.tile([[0.0, 1.0]], (20, 1))])
    assert comparison.retention is None and comparison.retention_interval is None and comparison.significant


def test_a_ratio_has_an_interval_unless_its_base_is_often_nothing():
    # With 8 of 34 items right, about one resample in ten thousand has none right; with 1 of 20, one in three.
    often = compare([np.array([[1.0, 1.0]] * 8 + [[0.0, 1.0]] + [[0.0, 0.0]] * 25)])
    low, high = often.retention_interval
    assert low == pytest.approx(1.0) and 1.3 < high < 2.0
    assert compare([np.array([[1.0, 1.0]] + [[0.0, 0.0]] * 19)]).retention_interval is None


def test_documents_count_by_their_size():
    totals, sizes = np.array([[8.0, 16.0], [90.0, 90.0]]), np.array([8, 90])
    comparison = compare_rates(totals, sizes)
    assert (comparison.base, comparison.score) == (1.0, pytest.approx(106 / 98))
    assert comparison.interval == (pytest.approx(0), pytest.approx(1))


def test_a_document_without_tokens_for_one_tokenizer_counts_for_neither():
    base = TextScores(data="d", tokens="t", window=8, overlap=4, documents=[[3.0, 4, 9], [5.0, 2, 4], [2.0, 3, 8]])
    other = base.model_copy(update={"documents": [[6.0, 4, 9], [0.0, 0, 4], [2.0, 3, 8]]})
    row = table_of([_model("a", {}, {"w": base}), _model("b", {}, {"w": other})]).of("b", "w")
    assert row.items == 2 and row.remarks == ("without 1 documents of which a tokenizer makes no token",)
    assert row.metric.endswith("over 7 tokens")
    assert row.comparison.base == pytest.approx(5.0 / np.log(2) / 17)
    assert row.comparison.score == pytest.approx(8.0 / np.log(2) / 17)
    none = base.model_copy(update={"documents": [[0.0, 0, 9], [0.0, 0, 4], [0.0, 0, 8]]})
    with pytest.raises(ValueError, match="w: every document is one of which a tokenizer makes no token"):
        table_of([_model("a", {}, {"w": base}), _model("b", {}, {"w": none})])
    short = base.model_copy(update={"documents": base.documents[:2]})
    with pytest.raises(ValueError, match="number of documents differ: 3 and 2; evaluate both alike"):
        table_of([_model("a", {}, {"w": base}), _model("b", {}, {"w": short})])


def test_scores_below_chance_or_the_majority_are_flagged():
    values = [1.0] * 4 + [0.0] * 6
    for chance, majority, words in (
        (0.25, 0.4, []),
        (0.5, 0.4, ["below chance (50.0)"]),
        (0.25, 0.62, ["below the majority class (62.0)"]),
    ):
        row = table_of([_model("BF16", {"t": _task(values, chance, majority)})]).of("BF16", "t")
        assert list(row.remarks) == words


def test_an_item_that_one_model_skipped_counts_for_neither():
    base, other = _task([1, 1, 0, 0]), _task([1, 1, 1], skipped=["3"])
    table = table_of([_model("a", {"t": base, "u": base}), _model("b", {"t": other, "u": _task([], skipped="0123")})])
    row = table.of("b", "t")
    assert (row.items, row.skipped) == (3, 1)
    assert row.comparison.base == pytest.approx(2 / 3)
    assert table.of("b", MEAN).remarks == ("without u",)


def test_models_that_were_not_asked_the_same_are_not_compared():
    base = _model("a", {"t": _task([1, 0])})
    for what, value in (("shots", 5), ("data", "e"), ("versions", {"t": 2.0}), ("metric", "acc_norm")):
        with pytest.raises(ValueError, match=f"t of a and b cannot be compared, {what} differ"):
            table_of([base, _model("b", {"t": _task([1, 0]).model_copy(update={what: value})})])
    with pytest.raises(ValueError, match="tasks differ"):
        table_of([base, _model("b", {"u": _task([1, 0])})])


def test_what_differs_though_it_may_be_compared_is_remarked():
    text = TextScores(data="d", tokens="t", window=8, overlap=4, documents=[[3.25, 4, 9]])
    base = _model("a", {"t": _task([1, 0]), "u": _task([1, 0])}, {"w": text, "v": text})
    tasks = {"t": _task([1, 0]).model_copy(update={"tokens": "other"}), "u": _task([1, 0])}
    texts = {"w": text.model_copy(update={"tokens": "other"}), "v": text.model_copy(update={"overlap": 3})}
    table = table_of([base, _model("b", tasks, texts)])
    assert table.of("b", "t").remarks == table.of("b", "w").remarks == ("asked in other tokens than a",)
    assert table.of("b", "u").remarks == () and table.of("a", "t").remarks == ()
    assert table.of("b", "v").remarks == ("windows of 8 tokens that overlap by 3, of a 8 by 4",)
    [line] = [line for line in report.lines(table) if line.startswith("| v | bits")]
    assert "windows of 8 tokens that overlap by 3" in line


def test_examples_that_were_drawn_otherwise_are_not_compared():
    def drawn(name, seed, shots):
        task = _task([1, 0]).model_copy(update={"shots": shots})
        return _model(name, {"t": task}).model_copy(update={"settings": {"seed": seed}})

    with pytest.raises(ValueError, match="a and b cannot be compared, seed differ: 1 and 2"):
        table_of([drawn("a", 1, 5), drawn("b", 2, 5)])
    assert table_of([drawn("a", 1, 0), drawn("b", 2, 0)]).of("b", "t").items == 2


def test_scores_survive_their_file(tmp_path):
    text = TextScores(data="d", tokens="t", window=8, overlap=4, documents=[[3.25, 4, 9]])
    model = _model("a", {"t": _task([1, 0], chance=0.25)}, {"w": text})
    model.write(tmp_path)
    assert read_scores(tmp_path, "a") == model
    with pytest.raises(ValueError, match="b was not evaluated here"):
        read_scores(tmp_path, "b")

# SPDX-License-Identifier: Apache-2.0
"""Tests of the benchmark of packed inference: what it makes, compares and writes, but not its times."""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

import packed_inference
import pytest
import torch
from packed_inference import Row, compare, draw, in_turn, layer_rows, logit_rows, make_model, model_rows, table
from report.tables import write_csv

from bitcpm_megatron.launch.launcher.presets import architecture


def test_ratios_say_how_many_times_faster_the_packed_one_is() -> None:
    times = compare("layer", "ms", [1.0, 2.0, 4.0], [3.0, 8.0, 4.0], "other", inverse=True)
    assert (times.packed, times.other, times.ratio) == (2.0, 4.0, 3.0)
    speeds = compare("model", "tokens/s", [9.0, 8.0, 1.0], [3.0, 8.0, 4.0], "other")
    assert (speeds.packed, speeds.other, speeds.ratio) == (8.0, 4.0, 1.0)


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    seconds = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == list("abababab") and [len(taken) for taken in seconds.values()] == [3, 3]


def test_layers_of_few_and_many_tokens() -> None:
    rows = layer_rows(256, (33,), 1)
    assert [row.what for row in rows] == [
        "256 x 256, 1 token",
        *(f"256 x 256, {tokens} tokens" for tokens in (4, 16, 32, 33)),
    ]
    assert rows[-1].beside == "F.linear + one unpacking" and all(row.ratio > 0 for row in rows)


@pytest.mark.slow
def test_a_small_model_from_its_weights_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="pip install 'bitcpm_megatron[hf]'")
    monkeypatch.setattr(packed_inference, "llama_stepper", lambda gguf, steps: None)
    packed, dense, gguf = make_model(architecture("tiny-minicpm4"), tmp_path)
    rows = [
        Row("memory", "MB", 1.0, 2.0, "1.1 x packed + cache", 0.5, "<= 1"),
        *model_rows(packed, dense, gguf, 4, 1),
        *layer_rows(64, (33,), 1),
    ]
    agree = next(row for row in rows if row.what == "greedy choices that agree")
    assert agree.other == 4
    assert [row.other for row in rows if row.unit == "tokens/s"][-1] is None
    write_csv([asdict(row) for row in rows], tmp_path / "out.csv", ".6g")
    with open(tmp_path / "out.csv", encoding="utf-8") as file:
        assert [line["what"] for line in csv.DictReader(file)] == [row.what for row in rows]
    said = table(rows, argparse.Namespace(rounds=1, model="tiny-minicpm4"), "a command")
    assert "| memory | 1 MB | 2 MB (1.1 x packed + cache) | 0.500 | <= 1 |" in said
    assert "null" in said and said.endswith("Command: `a command`")
    draw(rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.slow
def test_logits_that_differ_show() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'bitcpm_megatron[hf]'")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    models = {name: transformers.LlamaForCausalLM(config).eval() for name in ("packed", "dense")}
    with torch.no_grad():
        models["packed"].load_state_dict(models["dense"].state_dict())
        same = logit_rows(models, 5)
        models["packed"].lm_head.weight.neg_()
        other = logit_rows(models, 5)
    assert (same[0].packed, same[1].packed, same[2].ratio) == (0.0, 5, 1.0)
    assert other[0].packed > 0 and other[1].packed < 5

# SPDX-License-Identifier: Apache-2.0
"""A run's model says of benchmark questions what its export says, over tensor-parallel ranks and pipeline stages."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_hf
from support.launcher import Ranks

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron, export_packed, qat_convert
from bitcpm_megatron.evaluation.opening import find_model, open_model

ORIGINAL = 24  # tokens, LongRoPE's original length
# The lengths lie on both sides of it, one at it, some beyond the context of 128; in batches of 5 one has both sides.
CONTEXTS = (
    "",
    "a b",
    "What is two and two? It",
    "What is three and two",
    "word " * 12,
    "x" * 70,
    "y" * 125,
    "z" * 200,
)
CONTINUATIONS = (" is", " four.", "five")
PAIRS = [[context, continuation] for context in CONTEXTS for continuation in CONTINUATIONS]
# None grows from one side to the other: there Transformers keeps its keys, and a run computes them anew.
PROMPTS = ["What is", "word " * 3, "x" * 60, "z" * 125]
BOUND = 1e-4  # of log-likelihoods, in fp32
LAYOUTS = ("TP1", "TP2", "PP2")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent model, ternary in two row-parallel shards, as a checkpoint and as a fused export."""
    root = tmp_path_factory.mktemp("evaluation")
    a = tiny_hf.llama(longrope=tiny_hf.longrope(ORIGINAL))
    tiny_hf.latent_export(root / "latent", a, tiny_hf.record(), bos_token_id=2, eos_token_id=2)
    tiny_hf.write_tokenizer(root / "latent", front="<s>")
    for tool, words in (
        (convert_hf_to_megatron, f"--load-dir {root}/latent --save-dir {root}/run"),
        (qat_convert, f"--input_bin {root}/latent --output {root}/fused"),
        (export_packed, f"--load-dir {root}/latent --save-dir {root}/packed --format compressed-tensors"),
    ):
        assert tool.main(words.split()) == 0
    return root


@pytest.fixture(scope="module")
def said(shared_ranks: Callable[[int], Ranks], where: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """By layout and turn what each rank reports."""
    found: dict[str, list[dict]] = {}
    case = {"load": str(where / "run"), "batch": 5, "pairs": PAIRS, "prompts": PROMPTS, "count": 8}
    for count in (1, 2):
        directory = tmp_path_factory.mktemp("asked")
        (directory / "cases.json").write_text(json.dumps(case))
        reports = shared_ranks(count).run("evaluation", directory)
        for name in reports[0]:
            found[name] = [report[name] for report in reports]
    return found


@pytest.fixture(scope="module")
def export(where: Path) -> dict:
    """What the harness's own Hugging Face model says of the fused export, one question at a time."""
    return _said_by_export(where, 1)


def _said_by_export(where: Path, batch: int) -> dict:
    model = open_model(find_model("export", where / "fused"), batch, None, True, 1).model
    model.record(None, "export")
    how = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    return {
        "pairs": model.loglikelihood([SimpleNamespace(args=tuple(pair)) for pair in PAIRS]),
        "texts": model.generate_until([SimpleNamespace(args=(prompt, how)) for prompt in PROMPTS]),
        "skipped": model.skipped,
        "tokens": model.tokens,
        "margin": _margin(model),
    }


def _margin(model: Any) -> float:
    """The least by which the likeliest token is before the next one, wherever a choice is compared."""
    rows = []
    for context, continuation in PAIRS:
        shown, asked = (
            model._encode_pair(context, continuation) if context else ([1], model.tok_encode(continuation, False))
        )
        if len(shown) + len(asked) <= model.max_length + 1:
            rows.append((shown + asked[:-1], len(asked)))
    for prompt in PROMPTS:
        ids = model.tok_encode(prompt)
        if len(ids) + 8 <= model.max_length:
            for _ in range(8):
                rows.append((list(ids), 1))
                ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    best = [model.model(torch.tensor([ids])).logits[0, -count:].topk(2).values for ids, count in rows]
    return min(float((values[:, 0] - values[:, 1]).min()) for values in best)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.verifies(
    "checkpoints",
    "evaluation: a run's log-likelihoods are those of its export (1e-4, fp32) at TP1, TP2 and PP2, and its "
    "answers, too",
)
def test_log_likelihoods_and_answers_are_those_of_the_export(layout: str, said: dict, export: dict) -> None:
    # Three continuations behind the longest context, two behind the one before it, and the longest prompt.
    assert len(export["skipped"]) == 6
    # Of two models that differ by BOUND each the likeliest token is the same.
    assert export["margin"] > 2 * BOUND
    for rank in said[f"{layout} first"]:
        _require_alike(rank["pairs"], export)
        assert rank["texts"] == export["texts"]
        assert [((context, continuation), ids) for context, continuation, ids in rank["tokens"]] == [
            *export["tokens"].items()
        ]


def _require_alike(said: Sequence, export: dict) -> None:
    for pair, (value, greedy), (expected, best) in zip(PAIRS, said, export["pairs"], strict=True):
        assert value == pytest.approx(expected, abs=BOUND), pair
        assert greedy == best, pair


def test_an_export_says_in_batches_what_it_says_one_by_one(where: Path, export: dict) -> None:
    said = _said_by_export(where, 5)
    _require_alike(said["pairs"], export)
    assert said["texts"] == export["texts"]


def test_a_packed_export_says_what_the_fused_one_says(where: Path, export: dict) -> None:
    subject = find_model("packed", where / "packed")
    assert subject.kind == "packed"
    model = open_model(subject, 1, None, True, 1).model
    model.record(None, "packed")
    said = model.loglikelihood([SimpleNamespace(args=tuple(pair)) for pair in PAIRS])
    _require_alike(said, export)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_answered_is_not_asked_again(layout: str, said: dict) -> None:
    for first, again in zip(said[f"{layout} first"], said[f"{layout} again"], strict=True):
        assert first["asked"] > 0 and again["asked"] == 0
        assert (again["pairs"], again["texts"]) == (first["pairs"], first["texts"])

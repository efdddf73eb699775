# SPDX-License-Identifier: Apache-2.0
"""A run's model answers benchmark questions like its export, over tensor-parallel ranks and pipeline stages."""

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
# The lengths are on both sides of the original length, one is equal to it, and some exceed the context of 128. One of
# the batches of 5 has lengths on both sides.
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
# No prompt grows across the original length: there Transformers keeps its keys, and a run computes them again.
PROMPTS = ["What is", "word " * 3, "x" * 60, "z" * 125]
BOUND = 1e-4  # largest difference of log-likelihoods, in fp32
LAYOUTS = ("TP1", "TP2", "PP2")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a ternary model in two row-parallel shards, as a latent, fused and packed export and a run."""
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
    """The reports of all ranks by layout and turn ("TP1 first", "TP1 again", ...)."""
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
    """The answers of the harness's own Hugging Face model with the fused export, one question at a time."""
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
    """Returns the smallest margin of the likeliest token before the second one over all compared choices."""
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
    "evaluation: the log-likelihoods and answers of a training checkpoint at TP1, TP2 and PP2 equal those of its "
    "export (log-likelihoods: 1e-4, fp32)",
)
def test_log_likelihoods_and_answers_are_those_of_the_export(layout: str, said: dict, export: dict) -> None:
    # Three continuations of the longest context, two of the second longest, and the longest prompt do not fit.
    assert len(export["skipped"]) == 6
    # With this margin, two models that differ by at most BOUND choose the same token.
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

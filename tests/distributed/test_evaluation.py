# SPDX-License-Identifier: Apache-2.0
"""A run's model says of benchmark questions what its export says, over tensor-parallel ranks and pipeline stages."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
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
    "What is three and two?",
    "word " * 12,
    "x" * 70,
    "y" * 126,
    "z" * 200,
)
CONTINUATIONS = (" is", " four.", "five")
PAIRS = [[context, continuation] for context in CONTEXTS for continuation in CONTINUATIONS]
PROMPTS = ["What is", "word " * 4, "x" * 60, "z" * 125]
LAYOUTS = ("TP1", "TP2", "PP2")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent model, ternary in two row-parallel shards, as a checkpoint and as a fused export."""
    root = tmp_path_factory.mktemp("evaluation")
    a = tiny_hf.llama(longrope=tiny_hf.longrope(ORIGINAL))
    tiny_hf.latent_export(root / "latent", a, tiny_hf.record(), bos_token_id=2, eos_token_id=2)
    tiny_hf.write_tokenizer(root / "latent")
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
    model = open_model(find_model("export", where / "fused"), 1, None, True, 1).model
    model.record(None, "export")
    how = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    return {
        "pairs": model.loglikelihood([SimpleNamespace(args=tuple(pair)) for pair in PAIRS]),
        "texts": model.generate_until([SimpleNamespace(args=(prompt, how)) for prompt in PROMPTS]),
        "skipped": model.skipped,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.verifies(
    "checkpoints",
    "evaluation: a run's log-likelihoods are those of its export (1e-4, fp32) at TP1, TP2 and PP2, and its "
    "answers, too",
)
def test_log_likelihoods_and_answers_are_those_of_the_export(layout: str, said: dict, export: dict) -> None:
    # Three continuations behind the longest context, two behind the one before it, and the longest prompt.
    assert len(export["skipped"]) == 6
    for rank in said[f"{layout} first"]:
        for pair, (value, greedy), (expected, best) in zip(PAIRS, rank["pairs"], export["pairs"], strict=True):
            assert value == pytest.approx(expected, abs=1e-4), pair
            assert greedy == best, pair
        assert rank["texts"] == export["texts"]


def test_a_packed_export_says_what_the_fused_one_says(where: Path, export: dict) -> None:
    subject = find_model("packed", where / "packed")
    assert subject.kind == "packed"
    model = open_model(subject, 1, None, True, 1).model
    model.record(None, "packed")
    said = model.loglikelihood([SimpleNamespace(args=tuple(pair)) for pair in PAIRS])
    for pair, (value, greedy), (expected, best) in zip(PAIRS, said, export["pairs"], strict=True):
        assert value == pytest.approx(expected, abs=1e-4), pair
        assert greedy == best, pair


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_answered_is_not_asked_again(layout: str, said: dict) -> None:
    for first, again in zip(said[f"{layout} first"], said[f"{layout} again"], strict=True):
        assert first["asked"] > 0 and again["asked"] == 0
        assert (again["pairs"], again["texts"]) == (first["pairs"], first["texts"])

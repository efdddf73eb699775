# SPDX-License-Identifier: Apache-2.0
"""Generation with a key-value cache gives the same results as without one, at every layout."""

import json
from collections.abc import Callable

import pytest
import torch
from support.launcher import Ranks
from support.small_model import MODEL, succeeded

LENGTH, PROMPT = 20, 5
# Bound relative to the largest logit, in fp32: both ways sum the same terms in different orders, at most 128 terms,
# some 40 times in a row.
ROUNDING = 1e-5
# An input on the edge between two of 127 levels may be rounded to either, and later ones follow, until both ways are as
# far apart as rounding to 8 bits is from no rounding: 1.5 % were measured. Logits of the next position differ by 100 %.
EIGHT_BITS = 10 / 127
TP2 = ["--tensor-model-parallel-size", "2"]
TERNARY = ["--ternary", "--ternary-row-parallel-shards", "2"]
# The factors depend on the length so far: from the 13th token on, all layers compute with other frequencies.
LONGROPE = [
    *("--rope-scaling-type", "longrope", "--rope-scaling-original-max-position-embeddings", "12"),
    *("--rope-scaling-short-factor", *(str(1 + 0.1 * i) for i in range(8))),
    *("--rope-scaling-long-factor", *(str(2 + 0.3 * i) for i in range(8))),
]
CASES = {
    "TP1": TERNARY,
    "TP2": [*TP2, *TERNARY],
    "full precision": TP2,
    "LongRoPE": [*TP2, *TERNARY, *LONGROPE],
    "learned positions": ["--position-embedding-type", "learned_absolute"],
    "a window": [*TP2, *TERNARY, "--window-size", "6,0"],
    "groups": ["--ternary", "--ternary-group-size", "32"],
    "8 bits": [*TP2, *TERNARY, "--ternary-activation-bits", "8"],
    "experts": [*TERNARY, "--num-experts", "4", "--moe-ffn-hidden-size", "64"],
    "multipliers": [*TP2, "--scale-emb", "12", "--residual-multiplier", "0.3", "--logits-scaling", "2"],
    "untied": [*TP2, *TERNARY, "--untie-embeddings-and-output-weights"],
}
SAVED = "sequence parallel, saved"


@pytest.fixture(scope="module")
def found(
    launch_runs, shared_ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict]:
    directory = tmp_path_factory.mktemp("next_tokens")
    run = [*MODEL, *TP2, "--sequence-parallel", "--ternary", "--train-iters", "1", "--eval-iters", "0"]
    report, _ = launch_runs({"saved": [*run, "--save", str(directory / "saved")]}, 2)
    succeeded(report, "saved")
    tokens = torch.randint(0, 300, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    asked = {"tokens": tokens, "prompt": PROMPT}
    cases = {name: {"argv": [*MODEL, *flags, "--train-iters", "1"], **asked} for name, flags in CASES.items()}
    cases[SAVED] = {"load": str(directory / "saved"), **asked}
    (directory / "cases.json").write_text(json.dumps(cases))
    shared_ranks(2).run("next_tokens", directory)
    return torch.load(directory / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", [*CASES, SAVED])
@pytest.mark.verifies(
    "checkpoints",
    "logits computed with a key-value cache equal those of the whole forward pass (1e-5 of the largest, fp32), at "
    "TP1 and TP2, with LongRoPE, sliding windows and experts",
)
def test_the_cache_changes_no_logit(name: str, found: dict) -> None:
    case = found[name]
    bound = EIGHT_BITS if name == "8 bits" else ROUNDING
    assert case["cached"].shape == case["whole"].shape == (LENGTH - PROMPT + 2, 384)
    difference = (case["cached"] - case["whole"]).abs().max() / case["whole"].abs().max()
    assert difference < bound
    # Logits of successive positions differ, so that a mistake in the position would show.
    assert (case["whole"][1:] - case["whole"][:-1]).abs().max() > 0.1 * case["whole"].abs().max()


@pytest.mark.parametrize("name", [*CASES, SAVED])
def test_the_same_tokens_are_the_likeliest(name: str, found: dict) -> None:
    """Both ways choose the same tokens, also beyond the model's context, where the oldest tokens are dropped."""
    said, margins = found[name]["said"], found[name]["margins"]
    assert len(said["whole"]) == len(margins) == 32 + 3 - PROMPT
    if name == "8 bits":
        return
    # After a choice that rounding decides, the texts may differ.
    certain = next((i for i, margin in enumerate(margins) if margin <= 2 * ROUNDING), len(margins))
    assert said["cached"][:certain] == said["whole"][:certain]
    assert certain > 0


@pytest.mark.parametrize("name", [*CASES, SAVED])
def test_weights_are_quantized_once(name: str, found: dict) -> None:
    quantized = found[name]["quantized"]
    assert bool(quantized) == ("--ternary" in CASES.get(name, ["--ternary"]))
    assert set(quantized) <= {1}

# SPDX-License-Identifier: Apache-2.0
"""With a cache of keys and values a model says what it says without one, at every layout."""

import json
from collections.abc import Callable

import pytest
import torch
from support.launcher import Ranks
from support.small_model import MODEL, succeeded

LENGTH, PROMPT = 20, 5
# Of the largest logit, in fp32: both ways sum the same terms in other orders, 128 at most, some 40 times in a row.
ROUNDING = 1e-5
# An input on the edge between two of 127 levels falls to either side, and others behind it follow, until both ways are
# as far apart as rounding to 8 bits is from none: 1.5 % were measured. The next position's logits are another 100 %.
EIGHT_BITS = 10 / 127
TP2 = ["--tensor-model-parallel-size", "2"]
TERNARY = ["--ternary", "--ternary-row-parallel-shards", "2"]
# Chosen by the length so far: the 13th token makes another model of all layers.
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
    "logits with a key-value cache are those of the whole forward (1e-5 of the largest, fp32), at TP1 and TP2, "
    "with LongRoPE, windows, experts",
)
def test_the_cache_changes_no_logit(name: str, found: dict) -> None:
    case = found[name]
    bound = EIGHT_BITS if name == "8 bits" else ROUNDING
    assert case["cached"].shape == case["whole"].shape == (LENGTH - PROMPT + 2, 384)
    difference = (case["cached"] - case["whole"]).abs().max() / case["whole"].abs().max()
    assert difference < bound
    # Positions tell: what the last token alone would say is something else.
    assert (case["whole"][1:] - case["whole"][:-1]).abs().max() > 0.1 * case["whole"].abs().max()


@pytest.mark.parametrize("name", [*CASES, SAVED])
def test_the_same_tokens_are_the_likeliest(name: str, found: dict) -> None:
    """Also those behind the model's context, which drop the oldest."""
    said, margins = found[name]["said"], found[name]["margins"]
    assert len(said["whole"]) == len(margins) == 32 + 3 - PROMPT
    if name == "8 bits":
        return
    # Behind a choice that rounding decides the texts may go apart.
    certain = next((i for i, margin in enumerate(margins) if margin <= 2 * ROUNDING), len(margins))
    assert said["cached"][:certain] == said["whole"][:certain]
    assert certain > 0


@pytest.mark.parametrize("name", [*CASES, SAVED])
def test_weights_are_quantized_once(name: str, found: dict) -> None:
    quantized = found[name]["quantized"]
    assert bool(quantized) == ("--ternary" in CASES.get(name, ["--ternary"]))
    assert set(quantized) <= {1}

# SPDX-License-Identifier: Apache-2.0
"""Whole training runs: the same losses whatever the cache and the interruptions, and errors for what cannot run."""

import json
import shutil
from pathlib import Path

import pytest
from support.small_model import MODEL, losses, quantized_weights, succeeded

from bitcpm_megatron.files import DIGESTS, check_digests, read_digests
from bitcpm_megatron.training.metrics import read_metrics

TP2 = ["--tensor-model-parallel-size", "2"]
# With dropout, a lost random state shows in the loss.
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
BF16 = [*MODEL, *TP2, "--sequence-parallel", "--bf16", "--ternary", *DROPOUT]
STEPS = 20
TWENTY_STEPS = ["--train-iters", str(STEPS), "--eval-interval", "7", "--eval-iters", "1"]


@pytest.fixture(scope="module")
def base(launch_runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory of a TP1 run with one row-parallel shard."""
    directory = tmp_path_factory.mktemp("base")
    argv = [*MODEL, "--eval-iters", "0", "--train-iters", "1", "--ternary", "--save", str(directory)]
    succeeded(launch_runs({"base": argv}, 1)[0], "base")
    return directory


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_ranks(launch_runs, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Path]:
    """Runs everything in this file that needs two ranks, in one batch; returns report, directory and log directory."""
    logs = tmp_path_factory.mktemp("logs")
    recipes = {
        "idle": {"configs": {"q": {"group_size": 32}}, "matchers": {"m": {"config": "q", "pattern": "*.linear_typo"}}},
        "head": {"configs": {"q": {"group_size": 32}}, "matchers": {"m": {"config": "q", "pattern": "output_layer"}}},
    }
    bare, damaged = logs / "bare", logs / "damaged"
    for copy in (bare, damaged):
        shutil.copytree(base, copy)
    (bare / "iter_0000001" / DIGESTS).unlink()
    flip_a_bit(damaged / "iter_0000001" / "__0_0.distcp")
    for name, content in recipes.items():
        (logs / f"{name}.yaml").write_text(json.dumps(content))
    runs = {}
    for cache in ("step", "none"):
        flags = [*BF16, *TWENTY_STEPS, "--ternary-cache", cache]
        stop = ["--log-dir", str(logs / f"stopped {cache}"), "--save", str(logs / f"save {cache}")]
        runs[f"whole {cache}"] = [*flags, "--log-dir", str(logs / f"whole {cache}")]
        runs[f"stopped {cache}"] = [*flags, *stop, "--exit-interval", "10"]
        runs[f"resumed {cache}"] = [*flags, *stop, "--load", str(logs / f"save {cache}"), "--verify-digests"]
    short = [*MODEL, *TP2, "--eval-iters", "0", "--train-iters", "2"]
    ternary = [*short, "--ternary"]
    other = [*ternary, "--ternary-group-size", "32", "--load", str(logs / "save step")]
    recipe = str(Path(__file__).parent / "keep_last_layer.yaml")
    saved = ["--load", str(logs / "save step")]
    overridden = [*saved, "--override-opt-param-scheduler", "--log-dir", str(logs / "lower rate")]
    one_step = [*MODEL, "--eval-iters", "0", "--train-iters", "1", "--ternary", "--finetune", "--load", str(base)]
    # Two ranks either share the tokens of a packed row of two samples, or have two rows each, one after the other.
    sharing = {"tokens": ["--context-parallel-size", "2", "--micro-batch-size", "2"], "samples": []}
    # Weight decay alone multiplies each weight by about -1e4 in every step: fp32 overflows after ten steps.
    explosive = "--lr 100 --weight-decay 100 --lr-decay-style constant --train-iters 30".split()
    runs |= {
        "verified": [*ternary, "--ternary-verify-cache"],
        "partial recipe": [*ternary, "--save", str(logs / "partial"), "--ternary-recipe", recipe],
        "async": [*ternary, "--save", str(logs / "async"), "--save-interval", "1", "--async-save"],
        "no digests refused": [*ternary, "--load", str(bare), "--verify-digests"],
        "damage refused": [*ternary, "--load", str(damaged), "--verify-digests"],
        "shards refused": [*ternary, "--load", str(base)],
        "group refused": [*ternary, "--ternary-group-size", "64"],
        "no quantizer refused": [*short, "--load", str(base)],
        "lower rate": [*BF16, "--train-iters", "22", "--eval-iters", "0", "--lr", "1e-3", *overridden],
        "diverges": [*ternary, *explosive, "--save", str(logs / "diverged"), "--save-interval", "30"],
        "other model refused": [*BF16, *TWENTY_STEPS, "--rotary-base", "500", *saved],
        "other quantizer refused": other,
        "other quantizer allowed": [*other, "--finetune", "--allow-quantizer-change"],
        "schedule refused": [*BF16, "--train-iters", "30", "--load", str(logs / "save step")],
        "unknown flag refused": [*ternary, "--tenary-cache", "none"],
        "fused on rank 1": [
            *MODEL,
            "--eval-iters",
            "0",
            "--train-iters",
            "2",
            "--ternary",
            "--save",
            str(logs / "fused"),
        ],
        "abbreviation refused": [*ternary, "--ternary-group", "32"],
    }
    for what, flags in sharing.items():
        runs[f"{what} shared"] = [*one_step, *flags, "--log-dir", str(logs / f"{what} shared")]
    for name in recipes:
        runs[f"{name} recipe refused"] = [*ternary, "--ternary-recipe", str(logs / f"{name}.yaml")]
    return *launch_runs(runs, 2, fused_mlp_on={"fused on rank 1": 1}), logs


@pytest.mark.parametrize("cache", ["step", "none"])
@pytest.mark.verifies("training", "a run that is stopped and resumed equals an uninterrupted run bit for bit")
def test_a_stopped_and_resumed_run_goes_on_bit_identically(cache: str, two_ranks: tuple) -> None:
    report, _, logs = two_ranks
    succeeded(report, *(f"{name} {cache}" for name in ("whole", "stopped", "resumed")))
    whole = losses(logs / f"whole {cache}")
    assert [i for kind, i, *_ in whole if kind == "train"] == list(range(1, STEPS + 1))
    assert losses(logs / f"stopped {cache}") == whole


@pytest.mark.parametrize("checkpoint", ["save step/iter_0000010", "async/iter_0000001", "async/iter_0000002"])
def test_every_file_of_a_checkpoint_has_its_digest(checkpoint: str, two_ranks: tuple) -> None:
    """Every file has a digest, also if a background process has written the checkpoint."""
    succeeded(two_ranks[0], "async")
    directory = two_ranks[2] / checkpoint
    names = {path.name for path in directory.iterdir()}
    assert set(read_digests(directory)) == names - {DIGESTS}
    assert {f"__{rank}_0.distcp" for rank in (0, 1)} | {".metadata", "arguments.json"} <= names
    assert not [name for name in names if name.startswith("digests_of")]
    assert check_digests(directory)


def test_the_cache_changes_no_bit_across_evaluation_and_reload(two_ranks: tuple) -> None:
    logs = two_ranks[2]
    assert losses(logs / "whole step") == losses(logs / "whole none")
    assert losses(logs / "stopped step") == losses(logs / "stopped none")
    assert len({loss for _, _, loss, *_ in losses(logs / "whole step")}) > STEPS / 2, "the weights must change"


def test_ranks_that_share_tokens_take_the_step_of_ranks_that_share_samples(two_ranks: tuple) -> None:
    """This test is short enough for every megatron-core; tests/distributed/test_layouts.py tests more, in minutes."""
    report, _, logs = two_ranks
    succeeded(report, "tokens shared", "samples shared")
    (tokens,), (samples,) = (losses(logs / f"{what} shared") for what in ("tokens", "samples"))
    assert tokens[:2] == samples[:2] == ("train", 1)
    assert tokens[2:4] == pytest.approx(samples[2:4], rel=1e-6)


def test_an_overriding_learning_rate_is_used(two_ranks: tuple) -> None:
    report, _, logs = two_ranks
    succeeded(report, "lower rate")
    rates = [r["learning_rate"] for r in read_metrics(logs / "lower rate")]
    assert len(rates) == 2 and 0 < max(rates) <= 1e-3


def test_a_run_that_diverges_ends_and_saves_nothing(two_ranks: tuple) -> None:
    report, _, logs = two_ranks
    assert report["diverges"]["status"] == 1
    assert "training has diverged" in report["diverges"]["stderr"]
    assert not list((logs / "diverged").glob("*"))


def test_a_layer_that_one_rank_never_runs_ends_all_in_the_first_step(two_ranks: tuple) -> None:
    report, _, logs = two_ranks
    assert report["fused on rank 1"]["status"] == 3
    for words in ("never ran them", "decoder.layers.3.mlp.linear_fc2\n", "keep them in full precision"):
        assert words in report["fused on rank 1"]["stderr"]
    assert "linear_qkv" not in report["fused on rank 1"]["stderr"]
    assert not list((logs / "fused").glob("*"))


def test_training_passes_its_own_verification(two_ranks: tuple) -> None:
    succeeded(two_ranks[0], "verified")


def test_a_recipe_that_keeps_a_layer_trains_and_saves(two_ranks: tuple) -> None:
    report, directory, logs = two_ranks
    succeeded(report, "partial recipe")
    assert sorted(quantized_weights(directory, "partial recipe", 2)) == [
        f"decoder.layers.{layer}.{name}"
        for layer in range(3)
        for name in ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    ]
    record = json.loads((logs / "partial" / "iter_0000002" / "ternary_quantizer.json").read_text())
    assert {m["group_size"] for m in record["modules"].values()} == {32}


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "no digests refused": ("iter_0000001 has no DIGESTS.json", "leave out --verify-digests"),
        "damage refused": ("__0_0.distcp does not match its digest", "copy it again"),
        "shards refused": ("1 row-parallel shards", "tensor-parallel size of 2", "use a size that divides 1"),
        "group refused": ("linear_proj", "group_size=64 does not divide a row of 32", "use -1 or one of [32]"),
        "no quantizer refused": ("--ternary is not given", "--allow-quantizer-change"),
        "other quantizer refused": ("group_size -1 in the checkpoint, 32 asked for", "--allow-quantizer-change"),
        "schedule refused": ("another schedule of learning rate or weight decay", "--override-opt-param-scheduler"),
        "other model refused": ("--rotary-base 10000 (now 500)", "give the same flags"),
        "unknown flag refused": ("unknown arguments", "did you mean --ternary-cache?"),
        "abbreviation refused": ("unknown arguments", "--ternary-group: did you mean --ternary-group-size?"),
        "idle recipe refused": ("*.linear_typo", "fits no module", "decoder.layers.0"),
        "head recipe refused": ("output_layer", "never quantized", "remove it"),
    }.items(),
)
def test_what_cannot_be_done_is_refused_with_the_cure(name: str, words: tuple[str, ...], two_ranks: tuple) -> None:
    result = two_ranks[0][name]
    assert result["status"] == 2, result["stderr"]
    for word in words:
        assert word in result["stderr"]


def test_a_changed_quantizer_is_accepted_on_request(two_ranks: tuple) -> None:
    succeeded(two_ranks[0], "other quantizer allowed")

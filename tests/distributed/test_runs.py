# SPDX-License-Identifier: Apache-2.0
"""Whole training runs: the same losses whatever the layout, the cache and the interruptions; and nothing silent."""

import json
from pathlib import Path

import pytest
import torch
from launcher import torchrun

from bitcpm_megatron.training.metrics import read_metrics

# 192: so that the vocabulary is padded to the same 384 rows at TP1 and TP2.
MODEL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1
    --global-batch-size 4 --mock-data --vocab-size 300 --lr 1e-2 --use-distributed-optimizer --log-interval 1
    --make-vocab-size-divisible-by 192
""".split()
LAYOUTS = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    "TP2+SP": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "DP2": [],
}
TP2_BF16 = [*LAYOUTS["TP2+SP"], "--bf16", "--ternary"]
TWENTY_STEPS = ["--train-iters", "20", "--eval-interval", "7", "--eval-iters", "1"]
STEPS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """Launches a dictionary of runs on some ranks: returns (report of rank 0, directory)."""

    def launch(runs: dict[str, list[str]], ranks: int) -> tuple[dict[str, dict], Path]:
        directory = tmp_path_factory.mktemp("runs")
        cache = ["--data-cache-path", str(tmp_path_factory.getbasetemp() / "cache")]
        (directory / "runs.json").write_text(json.dumps({n: [*MODEL, *cache, *argv] for n, argv in runs.items()}))
        return torchrun("runs", ranks, directory)[0], directory

    return launch


@pytest.fixture(scope="module")
def base(run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: ANN001
    """Checkpoints of a TP1 run in fp32: with two row-parallel shards, and with one."""
    directory = tmp_path_factory.mktemp("base")
    common = ["--eval-iters", "0", "--train-iters", "2"]
    two = ["--ternary", "--ternary-row-parallel-shards", "2"]
    runs = {
        "two": [*common, *two, "--save", str(directory / "two")],
        "one": [*common, "--ternary", "--save", str(directory / "one")],
        "TP1": [
            "--eval-iters",
            "0",
            "--train-iters",
            "3",
            *two,
            "--load",
            str(directory / "two"),
            "--log-dir",
            str(directory / "log"),
        ],
    }
    report, where = run(runs, 1)
    assert all(r["status"] == 0 for r in report.values()), report
    return {"two": directory / "two", "one": directory / "one", "log": directory / "log", "runs": where}


@pytest.fixture(scope="module")
def two_ranks(run, base: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:  # noqa: ANN001
    """Every run of this file that needs two ranks, in one launch."""
    logs = tmp_path_factory.mktemp("logs")
    recipes = {
        "idle": {"configs": {"q": {"group_size": 32}}, "matchers": {"m": {"config": "q", "pattern": "*.linear_typo"}}},
        "head": {"configs": {"q": {"group_size": 32}}, "matchers": {"m": {"config": "q", "pattern": "output_layer"}}},
    }
    for name, content in recipes.items():
        (logs / f"{name}.yaml").write_text(json.dumps(content))
    short = ["--eval-iters", "0", "--train-iters", "3"]
    runs = {
        name: [*short, *flags, "--ternary", "--load", str(base["two"]), "--log-dir", str(logs / name)]
        for name, flags in LAYOUTS.items()
    }
    for cache in ("step", "none"):
        flags = [*TP2_BF16, *TWENTY_STEPS, "--ternary-cache", cache]
        stop = ["--log-dir", str(logs / f"stopped {cache}"), "--save", str(logs / f"save {cache}")]
        runs[f"whole {cache}"] = [*flags, "--log-dir", str(logs / f"whole {cache}")]
        runs[f"stopped {cache}"] = [*flags, *stop, "--exit-interval", "10"]
        runs[f"resumed {cache}"] = [*flags, *stop, "--load", str(logs / f"save {cache}")]
    tp2 = [*short, *LAYOUTS["TP2"]]
    runs["verified"] = [*tp2, "--ternary", "--ternary-verify-cache"]
    runs["partial recipe"] = [
        *tp2,
        "--ternary",
        "--save",
        str(logs / "partial"),
        "--ternary-recipe",
        str(Path(__file__).parent / "keep_last_layer.yaml"),
    ]
    runs["shards refused"] = [*tp2, "--ternary", "--load", str(base["one"])]
    runs["group refused"] = [*tp2, "--ternary", "--ternary-group-size", "64"]
    runs["no quantizer refused"] = [*tp2, "--load", str(base["two"])]
    runs["other quantizer refused"] = [*tp2, "--ternary", "--ternary-group-size", "32", "--load", str(base["two"])]
    runs["other quantizer allowed"] = [*runs["other quantizer refused"], "--allow-quantizer-change"]
    runs["unknown flag refused"] = [*tp2, "--ternary", "--tenary-cache", "none"]
    runs["abbreviation refused"] = [*tp2, "--ternary", "--ternary-group", "32"]
    for name in recipes:
        runs[f"{name} recipe refused"] = [*tp2, "--ternary", "--ternary-recipe", str(logs / f"{name}.yaml")]
    report, directory = run(runs, 2)
    (directory / "logs").symlink_to(logs)
    return report, directory


def losses(directory: Path) -> list[tuple]:
    return [
        (r["kind"], r["iteration"], r["lm_loss"], r.get("grad_norm"), r["consumed_samples"])
        for r in read_metrics(directory)
    ]


def weights(directory: Path, name: str, ranks: int) -> dict[str, torch.Tensor]:
    """Quantized weights of a run by module path; ranks that hold the same one must agree."""
    merged: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        for path, weight in torch.load(directory / f"{name}.rank{rank}.pt", weights_only=True).items():
            assert torch.equal(merged.setdefault(path, weight), weight), path
    return merged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_alike_from_one_checkpoint(layout: str, base: dict[str, Path], two_ranks: tuple) -> None:
    report, directory = two_ranks
    assert report[layout]["status"] == 0, report[layout]["stderr"]
    expected = read_metrics(base["log"])
    found = read_metrics(directory / "logs" / layout)
    assert [r["iteration"] for r in found] == [r["iteration"] for r in expected] == [3]
    assert found[0]["lm_loss"] == pytest.approx(expected[0]["lm_loss"], rel=1e-5)
    mine, theirs = weights(directory, layout, 2), weights(base["runs"], "TP1", 1)
    assert sorted(mine) == sorted(theirs) and len(mine) == 8
    for path in mine:
        assert torch.equal(mine[path], theirs[path]), path


@pytest.mark.parametrize("cache", ["step", "none"])
def test_a_stopped_and_resumed_run_goes_on_bit_identically(cache: str, two_ranks: tuple) -> None:
    report, directory = two_ranks
    for name in ("whole", "stopped", "resumed"):
        assert report[f"{name} {cache}"]["status"] == 0, report[f"{name} {cache}"]["stderr"]
    whole = losses(directory / "logs" / f"whole {cache}")
    assert [i for kind, i, *_ in whole if kind == "train"] == list(range(1, STEPS + 1))
    assert losses(directory / "logs" / f"stopped {cache}") == whole


def test_the_cache_changes_no_bit_across_evaluation_and_reload(two_ranks: tuple) -> None:
    logs = two_ranks[1] / "logs"
    assert losses(logs / "whole step") == losses(logs / "whole none")
    assert losses(logs / "stopped step") == losses(logs / "stopped none")
    assert len({loss for _, _, loss, *_ in losses(logs / "whole step")}) > STEPS / 2, "the weights must change"


def test_training_passes_its_own_verification(two_ranks: tuple) -> None:
    assert two_ranks[0]["verified"]["status"] == 0, two_ranks[0]["verified"]["stderr"]


def test_a_recipe_that_keeps_a_layer_trains_and_saves(two_ranks: tuple) -> None:
    report, directory = two_ranks
    assert report["partial recipe"]["status"] == 0, report["partial recipe"]["stderr"]
    assert sorted(weights(directory, "partial recipe", 2)) == [
        f"decoder.layers.0.{name}"
        for name in ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    ]
    record = json.loads((directory / "logs" / "partial" / "iter_0000003" / "ternary_quantizer.json").read_text())
    assert {m["group_size"] for m in record["modules"].values()} == {32}


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "shards refused": ("1 row-parallel shards", "tensor-parallel size of 2", "use a size that divides 1"),
        "group refused": ("linear_proj", "group_size=64 does not divide a row of 32", "use -1 or one of [32]"),
        "no quantizer refused": ("--ternary is not given", "--allow-quantizer-change"),
        "other quantizer refused": ("group size -1 in the checkpoint, 32 asked for", "--allow-quantizer-change"),
        "unknown flag refused": ("unrecognized arguments", "--tenary-cache"),
        "abbreviation refused": ("unrecognized arguments", "--ternary-group"),
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
    assert two_ranks[0]["other quantizer allowed"]["status"] == 0, two_ranks[0]["other quantizer allowed"]["stderr"]

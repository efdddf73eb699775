# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout starts alike from one checkpoint, learns, and takes over the checkpoint of another."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_model import MODEL, losses, quantized_weights, succeeded

from bitcpm_megatron import QuantizerConfig, quantize
from bitcpm_megatron.training.checkpoint_directory import latest
from bitcpm_megatron.training.metrics import read_metrics

SHARDS = ["--ternary", "--ternary-row-parallel-shards", "2"]
TERNARY = [*MODEL, *SHARDS, "--eval-iters", "0"]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
OVERLAPS = ["--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {
    "TP1": (1, []),
    "TP2": (2, TP2),
    "TP2+SP": (2, [*TP2, "--sequence-parallel"]),
    "PP2": (2, PP2),
    "PP2+VPP2": (2, [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]),
    "DP2": (2, []),
    "DP2+overlaps": (2, OVERLAPS),
    "TP2xPP2": (4, [*TP2, *PP2, "--sequence-parallel"]),
    "TP2xDP2": (4, [*TP2, "--sequence-parallel", *OVERLAPS]),
}
# Cached and uncached must agree bit for bit where forwards are repeated, interleaved, or wait for their weights.
CACHE_CASES = {
    "recompute": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    "selective recompute": ["--recompute-granularity", "selective"],
    "VPP": LAYOUTS["PP2+VPP2"][1],
    "overlaps": OVERLAPS,
}
EXPERTS = [*TERNARY, "--num-experts", "4", "--moe-ffn-hidden-size", "64"]
# Variants of the model that start alike at every layout, too: their own checkpoint, and one step at each.
VARIANTS = {
    "int8": ([*TERNARY, "--ternary-activation-bits", "8"], {"TP1": 1, "TP2+SP": 2}),
    "experts": (EXPERTS, {"TP1": 1, "EP2": 2, "TP2+SP": 2}),
    "untied": ([*TERNARY, "--untie-embeddings-and-output-weights"], {"TP1": 1, "PP2": 2}),
}
VARIANT_LAYOUTS = {name: flags for name, (_, flags) in LAYOUTS.items()}
VARIANT_LAYOUTS["EP2"] = ["--expert-model-parallel-size", "2"]
TELEMETRY = ["--ternary-telemetry-interval", "10"]
RESHARDINGS = [
    ("TP2", "PP2"),
    ("DP2", "TP2"),
    ("TP2", "TP1"),
    ("TP2", "TP2"),
    ("PP2", "TP2xDP2"),
    ("DP2+overlaps", "DP2+overlaps"),
]
SAVED_AT, END = 3, 6


@pytest.fixture(scope="module")
def runs(launch_runs, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All runs of this file, in as few launches as they allow: name -> (report, directory), and where logs lie."""
    where = tmp_path_factory.mktemp("layouts")
    results: dict = {"where": where}

    def launch(ranks: int, wanted: dict[str, list[str]], resave: dict[str, Path] | None = None) -> None:
        report, directory = launch_runs(wanted, ranks, resave)
        results.update({name: (report, directory) for name in wanted})

    def logged(name: str) -> list[str]:
        return ["--log-dir", str(where / name)]

    one_step = ["--train-iters", "1", "--save"]
    starts = {"start": [*TERNARY, *one_step, str(where / "start")]}
    for variant, (flags, _) in VARIANTS.items():
        starts[f"start {variant}"] = [*flags, *one_step, str(where / f"start {variant}")]
    launch(1, starts)
    succeeded(results["start"][0], *starts)
    for ranks in (2, 1, 4):
        wanted, resave = {}, {}
        for name, (size, flags) in LAYOUTS.items():
            if size == ranks:
                begin = ["--load", str(where / "start"), "--train-iters", "51", "--override-opt-param-scheduler"]
                wanted[name] = [*TERNARY, *flags, *begin, *logged(name), *TELEMETRY]
        for variant, (model, layouts) in VARIANTS.items():
            for layout in (name for name, size in layouts.items() if size == ranks):
                # Without optimizer state: megatron-core cannot carry it from one expert-parallel rank to several.
                begin = ["--load", str(where / f"start {variant}"), "--no-load-optim"]
                begin += ["--train-iters", "3", "--override-opt-param-scheduler"]
                name = f"{variant} {layout}"
                wanted[name] = [*model, *VARIANT_LAYOUTS[layout], *begin, *logged(name)]
        if ranks == 2:
            for name, flags in CACHE_CASES.items():
                for cache in ("step", "none"):
                    steps = ["--bf16", "--train-iters", "20", "--ternary-cache", cache]
                    wanted[f"{name} {cache}"] = [*TERNARY, *flags, *steps, *logged(f"{name} {cache}")]
            for source in {source for source, _ in RESHARDINGS}:
                flags = [*TERNARY, *LAYOUTS[source][1], "--save", str(where / f"saved {source}")]
                wanted[f"saved {source}"] = [*flags, "--train-iters", str(END), "--exit-interval", str(SAVED_AT)]
                wanted[f"whole {source}"] = [
                    *[*TERNARY, *LAYOUTS[source][1], "--train-iters", str(END)],
                    *logged(f"whole {source}"),
                ]
            recipe = str(Path(__file__).parent / "keep_last_layer.yaml")
            uneven = [
                *EXPERTS,
                *VARIANT_LAYOUTS["EP2"],
                "--ternary-recipe",
                str(Path(__file__).parent / "experts.yaml"),
            ]
            wanted["uneven experts"] = [*uneven, "--train-iters", "1", "--save", str(where / "uneven experts")]
            wanted["other stage"] = [*TERNARY, *PP2, "--train-iters", "1", "--ternary-recipe", recipe]
        for source, target in RESHARDINGS:
            if LAYOUTS[target][0] == ranks:
                name = f"{source} to {target}"
                flags = [*TERNARY, *LAYOUTS[target][1], "--load", str(where / f"saved {source}")]
                wanted[name] = [*flags, "--train-iters", str(END), *logged(name)]
                resave[name] = where / f"resaved {name}"
        launch(ranks, wanted, resave)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_alike_from_one_checkpoint_and_learns(layout: str, runs: dict) -> None:
    report, directory = runs[layout]
    succeeded(report, layout)
    found = [loss for _, _, loss, *_ in losses(runs["where"] / layout)]
    expected = [loss for _, _, loss, *_ in losses(runs["where"] / "TP1")]
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(found) == 50
    assert sum(found[-5:]) / 5 <= found[0] - 1.0
    mine = quantized_weights(directory, layout, LAYOUTS[layout][0])
    reference = quantized_weights(runs["TP1"][1], "TP1", 1)
    assert sorted(mine) == sorted(reference) and len(mine) == 16
    for path in mine:
        assert torch.equal(mine[path], reference[path]), path


@pytest.mark.parametrize(("variant", "layout"), [(v, name) for v, (_, names) in VARIANTS.items() for name in names])
def test_variants_of_the_model_start_alike_at_every_layout(variant: str, layout: str, runs: dict) -> None:
    name, reference = f"{variant} {layout}", f"{variant} TP1"
    succeeded(runs[name][0], name)
    found, expected = losses(runs["where"] / name), losses(runs["where"] / reference)
    assert len(found) == len(expected) == 2
    assert found[0][2] == pytest.approx(expected[0][2], rel=1e-5)
    # After a step weights differ in their last bits, and an activation may round to the neighbouring integer.
    assert found[1][2] == pytest.approx(expected[1][2], rel=1e-4)
    assert found[0][2] != pytest.approx(losses(runs["where"] / "TP1")[0][2], rel=1e-5), "the variant changes nothing"
    mine = quantized_weights(runs[name][1], name, VARIANTS[variant][1][layout])
    whole = quantized_weights(runs[reference][1], reference, 1)
    assert sorted(mine) == sorted(whole)
    for path in mine:
        assert torch.equal(mine[path], whole[path]), path


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "PP2+VPP2", "TP2xPP2", "TP2xDP2"])
def test_telemetry_is_that_of_the_whole_model(layout: str, runs: dict) -> None:
    def records(name: str) -> list[dict]:
        return [r for r in read_metrics(runs["where"] / name) if r["kind"] == "ternary"]

    found, expected = records(layout), records("TP1")
    assert [r["iteration"] for r in found] == [10, 20, 30, 40, 50]
    assert (runs["where"] / layout / "ternary.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(found[0]["modules"]) == sorted(expected[0]["modules"]) and len(found[0]["modules"]) == 16
    assert found[0]["total"]["changed"] is None
    for mine, theirs in zip(found, expected, strict=True):
        for field in ("zeros", "scale_mean", "scale_max"):
            assert mine["total"][field] == pytest.approx(theirs["total"][field], rel=0.02)
    assert all(0 < r["total"]["changed"] < 0.5 for r in found[1:])


@pytest.mark.parametrize("case", CACHE_CASES)
def test_the_cache_changes_no_bit(case: str, runs: dict) -> None:
    succeeded(runs[f"{case} step"][0], f"{case} step", f"{case} none")
    cached = losses(runs["where"] / f"{case} step")
    assert len(cached) == 20
    assert cached == losses(runs["where"] / f"{case} none")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, read without megatron."""
    reader = dcp.FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "size")}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize(("source", "target"), RESHARDINGS)
def test_another_layout_takes_over(source: str, target: str, runs: dict) -> None:
    name, where = f"{source} to {target}", runs["where"]
    succeeded(runs[f"saved {source}"][0], f"saved {source}", f"whole {source}")
    succeeded(runs[name][0], name)
    saved, resaved = tensors(latest(where / f"saved {source}")), tensors(latest(where / f"resaved {name}"))
    assert sorted(saved) == sorted(resaved)
    parts = {key.split(".")[2] for key in saved if key.startswith("optimizer.state.")}
    assert parts == {"param", "exp_avg", "exp_avg_sq"}
    for key in saved:
        assert torch.equal(saved[key], resaved[key]), key
    expected = losses(where / f"whole {source}")[SAVED_AT:]
    found = losses(where / name)
    assert [r[1] for r in found] == [r[1] for r in expected] == list(range(SAVED_AT + 1, END + 1))
    if source == target:
        assert found == expected
    else:
        assert [r[2] for r in found] == pytest.approx([r[2] for r in expected], rel=1e-5)


def test_scales_of_unevenly_quantized_experts_are_saved(runs: dict) -> None:
    succeeded(runs["uneven experts"][0], "uneven experts")
    saved = tensors(latest(runs["where"] / "uneven experts"))
    scale = "decoder.layers.mlp.experts.experts.linear_fc1.weight.ternary_scale"
    kept = {f"{scale}.{layer}.{expert}" for layer in range(4) for expert in (0, 1, 2)}
    assert {key for key in saved if key.startswith(scale)} == kept
    weight = saved["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    for layer, expert in ((0, 0), (3, 2)):
        expected = quantize(weight[layer, expert], QuantizerConfig())[1]
        assert torch.equal(saved[f"{scale}.{layer}.{expert}"], expected)


def test_a_matcher_may_name_a_layer_of_another_stage(runs: dict) -> None:
    report, directory = runs["other stage"]
    succeeded(report, "other stage")
    layers = {path.split(".")[2] for path in quantized_weights(directory, "other stage", 2)}
    assert layers == {"0", "1", "2"}

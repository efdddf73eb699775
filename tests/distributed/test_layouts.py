# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout takes the same step from a checkpoint as one rank, and resumes checkpoints of other layouts.

Layouts and processors sum in different orders, so that no two trainings are compared: only what is exactly equal
(codes, scales, checkpoints, counts), and one step from the same weights to within its rounding.
"""

import math
from pathlib import Path

import pytest
import torch
from support.small_model import MODEL, first_moments, losses, quantized_weights, succeeded, tensors
from support.token_data import write_conversations, write_documents, write_tokenizer

from bitcpm_megatron import QuantizerConfig, quantize
from bitcpm_megatron.checkpoints.directory import latest
from bitcpm_megatron.training.metrics import read_metrics

# Roundings are independent of each other, so that they add up like the root of their number: a step of this model
# passes some 100 operations forward and back, each a sum of at most 384 terms (the vocabulary).
ROUNDING = math.sqrt(100 * 384) * 2**-24
# Promised relative bounds of the error of a step in fp32: for the loss, and for gradients, each by its norm and all of
# them together. They are smaller than the bound above, because roundings average out: 1.3e-7 and 5.0e-7 were the
# largest errors of all layouts, with AVX2 and with AVX-512. A token that is counted twice changes both by 1 / 128.
PROMISED, GRADIENTS, PACKED_GRADIENTS = 1e-6, 1e-5, 1e-6
# An activation on the edge between two of 127 levels may be rounded to either: a difference of this fraction of its
# token's largest activation, in one of 128 tokens. test_gradients.py, where sums are exact, proves that 8 bits are
# rounded per shard.
ONE_LEVEL = 1 / 127
SHARDS = ["--ternary", "--ternary-row-parallel-shards", "2"]
TERNARY = [*MODEL, *SHARDS, "--eval-iters", "0"]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
OVERLAPS = ["--overlap-grad-reduce", "--overlap-param-gather"]
# The model has 4 heads in 2 groups, so that at CP 4 and TP 2 x CP 2 a rank has less than a group of its own.
CP2, CP4 = (["--context-parallel-size", str(ranks)] for ranks in (2, 4))
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
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
    "CP2": (2, CP2),
    "CP4": (4, CP4),
    "TP2xCP2": (4, [*TP2, "--sequence-parallel", *CP2]),
    "CP2xDP2": (4, [*CP2, *OVERLAPS]),
}
# Cached and uncached runs must agree bit for bit if forwards are repeated, interleaved, or wait for their weights.
CACHE_CASES = {
    "recompute": RECOMPUTE,
    "selective recompute": ["--recompute-granularity", "selective"],
    "VPP": LAYOUTS["PP2+VPP2"][1],
    "overlaps": OVERLAPS,
    "CP": CP2,
}
# With context parallelism, weights are also sharded over the ranks that share tokens.
CACHES = {case: ("none", "step", *(("resident", "packed") if case == "CP" else ())) for case in CACHE_CASES}
PACKED = ["--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"]
EXPERTS = [*TERNARY, "--num-experts", "4", "--moe-ffn-hidden-size", "64"]
# Variants of the model that also start alike at every layout: each has its own checkpoint and takes a step per layout.
VARIANTS = {
    "int8": ([*TERNARY, "--ternary-activation-bits", "8"], {"TP1": 1, "TP2+SP": 2}),
    "experts": (EXPERTS, {"TP1": 1, "EP2": 2, "TP2+SP": 2}),
    "spaces": ([*TERNARY, "--ternary-recipe", str(Path(__file__).parent / "spaces.yaml")], {"TP1": 1, "TP2": 2}),
    "untied": ([*TERNARY, "--untie-embeddings-and-output-weights"], {"TP1": 1, "PP2": 2}),
    # One batch of samples with different numbers of tokens: the mean of the means of its parts would be another loss.
    "masked": (
        [*TERNARY, "--micro-batch-size", "4"],
        {"TP1": 1, "in parts": 1, "DP2 in parts": 2, "TP2xPP2 in parts": 4},
    ),
    # Three groups can neither be distributed over two ranks, nor can each group have ranks of its own.
    "three groups": (
        [*TERNARY, "--num-attention-heads", "6", "--num-query-groups", "3", "--kv-channels", "32"],
        {"TP1": 1, "CP2": 2},
    ),
    # Documents of different lengths in each sample, from one token to more than a sample; 3 micro-batches of 2.
    "packed": (
        [*TERNARY, *PACKED, "--micro-batch-size", "2", "--global-batch-size", "6"],
        {
            **{"TP1": 1, "in parts": 1, "TP2+SP": 2, "PP2": 2, "PP2+VPP2 in parts": 2},
            **{"CP2+recompute": 2, "CP4": 4, "TP2xCP2": 4, "PP2xCP2": 4},
        },
    ),
    # Two divergences, one of them with packed documents: a teacher sees the micro-batches that its student sees.
    "distilled": (
        [*TERNARY, "--distill-alpha", "0.5", "--distill-temperature", "2"],
        {"TP1": 1, "TP2+SP": 2, "PP2+VPP2": 2, "DP2+overlaps": 2, "CP2+recompute": 2, "TP2xPP2": 4},
    ),
    "reversed distilled packed": (
        [*TERNARY, *PACKED, "--micro-batch-size", "2", "--distill-direction", "reverse"],
        {"TP1": 1, "in parts": 1, "PP2": 2, "TP2xCP2": 4},
    ),
    # A third of the samples has nothing to learn, and some of the micro-batches consist only of such samples.
    "sft": (
        [*TERNARY, "--sft", "--micro-batch-size", "2", "--global-batch-size", "8"],
        {"TP1": 1, "in parts": 1, "DP2 in parts": 2, "PP2": 2, "TP2xCP2": 4},
    ),
}
VARIANT_LAYOUTS = {name: flags for name, (_, flags) in LAYOUTS.items()}
VARIANT_LAYOUTS["EP2"] = ["--expert-model-parallel-size", "2"]
VARIANT_LAYOUTS["CP2+recompute"] = [*CP2, *RECOMPUTE]
VARIANT_LAYOUTS["PP2xCP2"] = [*PP2, *CP2]
VARIANT_LAYOUTS |= {
    f"{layout} in parts".strip(): [*LAYOUTS.get(layout, (1, []))[1], "--micro-batch-size", "1"]
    for layout in ("", "DP2", "TP2xPP2", "PP2+VPP2")
}
MOCK = ("--mock-data", "--vocab-size", "300")
TELEMETRY = ["--ternary-telemetry-interval", "1"]
# A teacher of different depth, width, heads and kind. It is not trained, since its outputs only have to differ.
TEACHER = """
    --num-layers 8 --hidden-size 96 --ffn-hidden-size 160 --num-attention-heads 8 --num-query-groups 4
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 128 --init-method-std 0.1
    --train-iters 1 --eval-iters 0
""".split()
RESHARDINGS = [
    ("TP2", "PP2"),
    ("CP2", "DP2"),
    ("DP2", "TP2"),
    ("TP2", "TP1"),
    ("TP2", "TP2"),
    ("PP2", "TP2xDP2"),
    ("DP2+overlaps", "DP2+overlaps"),
    ("packed DP2", "packed DP2"),
    ("sft DP2", "sft DP2"),
    ("distilled PP2", "distilled PP2"),
]
CONTINUED = {**LAYOUTS, "packed DP2": (2, PACKED), "sft DP2": (2, ["--sft"]), "distilled PP2": (2, PP2)}
SAVED_AT, END = 3, 6
CACHED = 8
"""The number of steps that are taken with a cache and without."""


@pytest.fixture(scope="module")
def runs(launch_runs, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Runs all trainings of this file, in as few batches as possible.

    Returns the report and the directory of each run by its name, and under ``where`` the directory of the logs.
    """
    where = tmp_path_factory.mktemp("layouts")
    results: dict = {"where": where}
    lengths = [9, 1, 40, 3, 1, 1, 20, 5, 17, 2, 31, 8] * 6
    samples = [[9, 20], [32], [1, 2, 3, 26], [16, 12]] * 3
    files = {
        "--reset-attention-mask": write_documents(where / "documents", lengths),
        "--sft": write_conversations(where / "chat", samples, answers=(0.5, 0.0, 0.2)),
    }
    tokenizer = ["--tokenizer-model", str(write_tokenizer(where / "tokenizer"))]
    real = {flag: ["--data-path", str(path), "--split", "1,0,0", *tokenizer] for flag, path in files.items()}
    blend = ["2", str(where / "documents"), "1", str(write_documents(where / "others", lengths, seed=1))]
    real["--reset-attention-mask"][1:2] = blend

    def launch(ranks: int, wanted: dict[str, list[str]], resave: dict[str, Path] | None = None) -> None:
        masked = [name for name in wanted if name.startswith("masked ")]
        for name in wanted:
            for asking, flags in real.items():
                if asking in wanted[name]:
                    wanted[name] = [flag for flag in wanted[name] if flag not in MOCK] + flags
        report, directory = launch_runs(wanted, ranks, resave, masked=masked)
        results.update({name: (report, directory) for name in wanted})

    def logged(name: str) -> list[str]:
        return ["--log-dir", str(where / name)]

    def saving_steps(name: str) -> list[str]:
        return ["--save", str(where / f"steps {name}"), "--save-interval", "1"]

    def taught(name: str) -> list[str]:
        teacher = "teacher packed" if "packed" in name else "teacher"
        return ["--distill-teacher", str(where / teacher)] if "distilled" in name else []

    def ended(name: str) -> list[str]:
        return ["--save", str(where / f"ended {name}")] if "distilled" in name else []

    one_step = ["--train-iters", "1", "--save"]
    starts = {"start": [*TERNARY, *one_step, str(where / "start")]}
    for variant, (flags, _) in VARIANTS.items():
        starts[f"start {variant}"] = [*flags, *one_step, str(where / f"start {variant}")]
    teachers = {"teacher": [], "teacher packed": PACKED}
    launch(1, {name: [*MODEL, *TEACHER, *flags, "--save", str(where / name)] for name, flags in teachers.items()})
    launch(1, {name: [*flags, *taught(name)] for name, flags in starts.items()})
    succeeded(results["start"][0], *starts)
    for ranks in (2, 1, 4):
        wanted, resave = {}, {}
        for name, (size, flags) in LAYOUTS.items():
            if size == ranks:
                begin = ["--load", str(where / "start"), "--train-iters", "3", "--override-opt-param-scheduler"]
                wanted[name] = [*TERNARY, *flags, *begin, *logged(name), *TELEMETRY, *saving_steps(name)]
        for variant, (model, layouts) in VARIANTS.items():
            for layout in (name for name, size in layouts.items() if size == ranks):
                # Optimizer state is not loaded: megatron-core cannot distribute it from one expert-parallel rank to
                # several.
                begin = ["--load", str(where / f"start {variant}"), "--no-load-optim"]
                begin += ["--train-iters", "2", "--override-opt-param-scheduler"]
                begin += taught(variant)
                name = f"{variant} {layout}"
                wanted[name] = [*model, *VARIANT_LAYOUTS[layout], *begin, *logged(name), *saving_steps(name)]
        if ranks == 2:
            for name, flags in CACHE_CASES.items():
                for cache in CACHES[name]:
                    steps = ["--bf16", "--train-iters", str(CACHED), "--ternary-cache", cache]
                    wanted[f"{name} {cache}"] = [*TERNARY, *flags, *steps, *logged(f"{name} {cache}")]
            for source in {source for source, _ in RESHARDINGS}:
                flags = [*TERNARY, *CONTINUED[source][1], *taught(source), "--train-iters", str(END)]
                saving = ["--save", str(where / f"saved {source}"), "--exit-interval", str(SAVED_AT)]
                wanted[f"saved {source}"] = [*flags, *saving]
                wanted[f"whole {source}"] = [*flags, *logged(f"whole {source}"), *ended(f"whole {source}")]
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
            if CONTINUED[target][0] == ranks:
                name = f"{source} to {target}"
                flags = [*TERNARY, *CONTINUED[target][1], *taught(target), "--load", str(where / f"saved {source}")]
                wanted[name] = [*flags, "--train-iters", str(END), *logged(name), *ended(name)]
                resave[name] = where / f"resaved {name}"
        launch(ranks, wanted, resave)
    return results


def assert_one_step_alike(
    name: str, reference: str, ranks: int, runs: dict, loss: float = PROMISED, gradient: float = GRADIENTS
) -> None:
    """Asserts that two runs take the same step from one checkpoint: equal quantized weights, and the loss and every
    gradient to within their rounding."""
    where = runs["where"]
    succeeded(runs[name][0], name)
    mine, whole = quantized_weights(runs[name][1], name, ranks), quantized_weights(runs[reference][1], reference, 1)
    assert sorted(mine) == sorted(whole)
    for path in mine:
        assert torch.equal(mine[path], whole[path]), path
    found, expected = losses(where / name)[0], losses(where / reference)[0]
    assert found[:2] == expected[:2] == ("train", 2) and found[4] == expected[4]
    for told in (2, 5):  # the loss, and the divergence from a teacher
        assert found[told] == (expected[told] and pytest.approx(expected[told], rel=loss))
    # The first moment is the weighted gradient plus the value from the checkpoint. Since gradients are clipped, only
    # their norm would show if all of them were too large by the same factor.
    assert found[3] == pytest.approx(expected[3], rel=gradient)
    gradients, whole_gradients = (first_moments(where / f"steps {run}" / "iter_0000002") for run in (name, reference))
    assert sorted(gradients) == sorted(whole_gradients) and len(gradients) > 5
    for key, whole_gradient in whole_gradients.items():
        size = whole_gradient.norm()
        assert size > 0, key
        assert (gradients[key] - whole_gradient).norm() <= gradient * size, key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.verifies(
    "training",
    "from one checkpoint, TP1, TP2, TP2+SP, PP2, PP2+VPP2, DP2, TP2xPP2, TP2xDP2, CP2, CP4, TP2xCP2 and CP2xDP2 take"
    " the same step: the quantized weights are equal, the loss and every gradient agree to within rounding (fp32); "
    "likewise with packed documents and with conversations (`--sft`)",
)
def test_every_layout_takes_the_step_of_one_rank(layout: str, runs: dict) -> None:
    assert_one_step_alike(layout, "TP1", LAYOUTS[layout][0], runs)
    assert len(quantized_weights(runs[layout][1], layout, LAYOUTS[layout][0])) == 16


@pytest.mark.parametrize(("variant", "layout"), [(v, name) for v, (_, names) in VARIANTS.items() for name in names])
@pytest.mark.verifies(
    "training",
    "models with int8 activations (to within one quantization level), experts (EP2) or untied embeddings also take "
    "the same step at every layout tested",
)
def test_variants_of_the_model_take_the_step_of_one_rank(variant: str, layout: str, runs: dict) -> None:
    name, reference = f"{variant} {layout}", f"{variant} TP1"
    bounds = {"int8": (ONE_LEVEL / 128, ONE_LEVEL), "packed": (PROMISED, PACKED_GRADIENTS)}.get(variant, ())
    assert_one_step_alike(name, reference, VARIANTS[variant][1][layout], runs, *bounds)
    found, plain = losses(runs["where"] / name)[0][2], losses(runs["where"] / "TP1")[0][2]
    assert found != pytest.approx(plain, rel=ROUNDING), "the variant changes nothing"


def recounted(checkpoint: Path, before: Path | None) -> dict[str, dict]:
    """Returns the expected telemetry of the weights in a checkpoint, by module, counted from the whole weights."""
    now, last = (None if path is None else codes_and_scales(path) for path in (checkpoint, before))

    def record(names: list[str]) -> dict:
        codes, scales = (torch.cat([now[name][i].flatten() for name in names]) for i in (0, 1))
        kept = None if last is None else torch.cat([last[name][0].flatten() for name in names])
        return {
            "zeros": int((codes == 0).sum()) / codes.numel(),
            "changed": None if kept is None else int((codes != kept).sum()) / codes.numel(),
            # Positive numbers are added in fp32 in some order: at most one rounding for each.
            "scale_mean": pytest.approx(scales.double().mean().item(), rel=scales.numel() * 2**-24),
            "scale_min": scales.min().item(),
            "scale_max": scales.max().item(),
        }

    return {**{name: record([name]) for name in now}, "total": record(list(now))}


def codes_and_scales(checkpoint: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns codes and scales of a checkpoint's latent weights by module path; row-parallel rows have two shards with
    a scale each."""
    saved, found = tensors(checkpoint), {}
    for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        for layer, weight in enumerate(saved[f"decoder.layers.{linear}.weight"]):
            group = weight.shape[1] // 2 if linear.endswith(("linear_proj", "linear_fc2")) else -1
            found[f"decoder.layers.{layer}.{linear}"] = quantize(weight, QuantizerConfig(group_size=group))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_telemetry_is_that_of_the_checkpoint_which_the_step_started_from(layout: str, runs: dict) -> None:
    """This proves that each step's forward used the weights that the preceding step wrote, completely, on all ranks."""
    where = runs["where"]
    found = [r for r in read_metrics(where / layout) if r["kind"] == "ternary"]
    assert [r["iteration"] for r in found] == [2, 3]
    start, after = latest(where / "start"), where / f"steps {layout}" / "iter_0000002"
    for record, (checkpoint, before) in zip(found, [(start, None), (after, start)], strict=True):
        assert {**record["modules"], "total": record["total"]} == recounted(checkpoint, before)
    assert found[1]["total"]["changed"] > 0
    assert (where / layout / "ternary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", CACHE_CASES)
def test_the_cache_changes_no_bit(case: str, runs: dict) -> None:
    report, uncached = runs[f"{case} none"][0], losses(runs["where"] / f"{case} none")
    succeeded(report, *(f"{case} {cache}" for cache in CACHES[case]))
    assert len(uncached) == CACHED
    # Without a cache, each of several micro-batches quantizes every weight.
    assert min(report[f"{case} none"]["quantizations"]) >= 2 * CACHED
    for cache in CACHES[case][1:]:
        assert losses(runs["where"] / f"{case} {cache}") == uncached, cache
        # Weights are quantized once to prove that the layers are used, and once per step; resident ones after each step
        # and also before the first.
        times = 1 + CACHED + (cache != "step")
        assert set(report[f"{case} {cache}"]["quantizations"]) == {times}, cache


@pytest.mark.parametrize(("source", "target"), RESHARDINGS)
@pytest.mark.verifies(
    "training",
    "a run that resumes at a different layout takes over master weights and optimizer moments exactly",
)
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
        if "distilled" in source:
            assert found[-1][5] > 0
            ends, whole = (tensors(latest(where / f"ended {run}")) for run in (name, f"whole {source}"))
            assert sorted(ends) == sorted(whole) and all(torch.equal(ends[key], whole[key]) for key in whole)
    else:
        # Only the first step starts from exactly the same state; later ones start from weights that were rounded
        # differently.
        assert found[0][2] == pytest.approx(expected[0][2], rel=ROUNDING)


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

# SPDX-License-Identifier: Apache-2.0
"""Distillation over several ranks, compared with float64 over whole logits on one rank.

Losses over two tensor-parallel ranks are tested by value, gradient and traffic, and with two planted mistakes; whole
runs by their steps, in a pairwise cover of settings.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
import torch
from support.distillation import WholeStep, in_float64
from support.launcher import Ranks
from support.pairwise import cover, pairs
from support.small_model import MODEL, first_moments, losses, succeeded

from bitcpm_megatron.checkpoints.directory import latest
from bitcpm_megatron.training import data
from bitcpm_megatron.training.flags import parse_args

from .workers.runs import unevenly_masked

CASES = [
    f"{form} {where} T={temperature}{chunks}"
    for form in ("forward", "reverse", "top-k", "sampled")
    for where in ("padded", "full", "one rank")
    for temperature in (1, 2)
    for chunks in ("", " in chunks")
]
# Bound of the difference from float64, relative to the largest element. fp32 has 2^-24 per rounding.
EXACT = 1e-5
TOKENS = 12
# fp32 numbers that are reduced per token: two maxima and three sums (forward and reverse); one maximum and ten sums for
# nine ids (top-k); one maximum and two sums (sampled).
NUMBERS = {"forward": 5, "reverse": 5, "top-k": 11, "sampled": 3}


@pytest.fixture(scope="module")
def results(shared_ranks: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """The reports of two ranks for each case."""
    reports = shared_ranks(2).run("distillation", tmp_path_factory.mktemp("distillation"))
    return {name: [report[name] for report in reports] for name in reports[0]}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_rank(case: str, results: dict[str, list[dict]]) -> None:
    for result in results[case]:
        assert result["loss"] < EXACT and result["gradient"] < EXACT
        assert result["reductions"] == (6 if case.endswith("in chunks") else 2), "two for each chunk of tokens"
        assert result["collectives"] == {"allreduce_": 4 * TOKENS * NUMBERS[case.split()[0]]}, "nothing is gathered"


@pytest.mark.parametrize("alpha", ["0", "0.25", "1"])
def test_the_mix_is_that_of_one_rank(alpha: str, results: dict[str, list[dict]]) -> None:
    for result in results[f"alpha={alpha}"]:
        assert result["loss"] < EXACT and result["gradient"] < EXACT
        # Three reductions are those of megatron-core's cross entropy.
        assert result["reductions"] == (3 if alpha == "0" else 5) and set(result["collectives"]) == {"allreduce_"}


@pytest.mark.parametrize("mutant", ["plain_all_reduce", "all_gather_of_logits"])
def test_right_losses_with_wrong_gradients_are_told_apart(mutant: str, results: dict[str, list[dict]]) -> None:
    for result in results[mutant]:
        assert result["loss"] < EXACT
        assert result["gradient"] > 0.3


@dataclass(frozen=True)
class Setting:
    """A layout and a way to learn from a teacher; ``top_k`` is None for learning from all logits."""

    tp: int
    pp: int
    vpp: int
    dp: int
    sp: bool
    overlaps: bool
    fusion: bool
    alpha: float
    temperature: float
    top_k: int | None
    teacher: str

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    def arguments(self) -> list[str]:
        """Returns the arguments of ``launch/pretrain.py`` for the setting."""
        argv = f"--tensor-model-parallel-size {self.tp} --pipeline-model-parallel-size {self.pp}".split()
        argv += ["--num-virtual-stages-per-pipeline-rank", "2"] if self.vpp == 2 else []
        argv += ["--sequence-parallel"] if self.sp else []
        argv += ["--overlap-grad-reduce", "--overlap-param-gather"] if self.overlaps else []
        argv += [] if self.fusion else ["--no-gradient-accumulation-fusion"]
        argv += [] if self.top_k is None else ["--distill-top-k", str(self.top_k)]
        return [*argv, "--distill-alpha", str(self.alpha), "--distill-temperature", str(self.temperature)]


VOCABULARY, PADDED = 300, 384
# All logits; all ids except one, whose probability follows from the others, so that nothing is lost; and few ids.
TOP_K = (None, VOCABULARY - 1, 5)
# A teacher that differs from the student in depth, width, heads and rows of its tied embedding; and one with experts.
TEACHER = """
    --num-layers 2 --hidden-size 96 --ffn-hidden-size 160 --num-attention-heads 8 --num-query-groups 4
    --make-vocab-size-divisible-by 100 --init-method-std 0.1
""".split()
TEACHERS = {"tied": TEACHER, "experts": [*TEACHER, "--num-experts", "4", "--moe-ffn-hidden-size", "64"]}
VALUES = ((1, 2), (1, 2), (1, 2), (1, 2), (False, True), (False, True), (False, True))
VALUES = (*VALUES, (0.0, 0.5, 1.0), (1.0, 2.0), TOP_K, tuple(TEACHERS))
EVERY = [Setting(*values) for values in itertools.product(*VALUES)]
# Sequence parallelism needs tensor parallelism, virtual stages need a pipeline, and there are only four ranks.
POSSIBLE = [s for s in EVERY if s.ranks <= 4 and (s.tp == 2 or not s.sp) and (s.pp == 2 or s.vpp == 1)]
# A launch of four ranks takes longer than two of two.
SETTINGS = cover(POSSIBLE, cost=lambda setting: 1 + setting.ranks)
# Relative bound of the error of a step in fp32, for a loss, and for a gradient by its norm. Roundings are independent
# of each other, so that they add up like the root of their number: a step passes some 100 operations forward and back,
# each a sum of at most 384 terms, which makes 1.2e-5 for errors that go in one direction all along. In fact they
# average out: 7.3e-7 was the largest error seen.
STEP = 1e-5


def test_every_two_values_of_settings_meet() -> None:
    apart = set().union(*map(pairs, EVERY)) - set().union(*map(pairs, SETTINGS))
    names = [field.name for field in fields(Setting)]
    said = {tuple((names[place], value) for place, value in pair) for pair in apart}
    assert said == {(("tp", 1), ("sp", True)), (("pp", 1), ("vpp", 2))}, "these cannot"
    assert len(SETTINGS) <= 16


@pytest.fixture(scope="module")
def steps(launch_runs, _model_parallel: None, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Returns a function that gives the entropy, divergence and moments of a setting's run, and the expected step."""
    where = tmp_path_factory.mktemp("steps")
    start = [*MODEL, "--train-iters", "1", "--eval-iters", "0"]
    student = [*start, "--ternary", "--ternary-row-parallel-shards", "2"]
    begins = {"student": student, **{name: [*start, *flags] for name, flags in TEACHERS.items()}}
    report, _ = launch_runs({name: [*argv, "--save", str(where / name)] for name, argv in begins.items()}, 1)
    succeeded(report, *begins)
    for ranks in (1, 2, 4):
        mine = [setting for setting in SETTINGS if setting.ranks == ranks]
        runs = {}
        for setting in mine:
            place = ["--save", str(where / str(setting)), "--log-dir", str(where / str(setting) / "log")]
            learn = ["--distill-teacher", str(where / setting.teacher), "--clip-grad", "0"]
            begin = ["--pretrained-checkpoint", str(where / "student")]
            runs[str(setting)] = [*student, *setting.arguments(), *learn, *begin, *place]
        fused = [str(setting) for setting in mine if setting.fusion]
        report, _ = launch_runs(runs, ranks, masked=list(runs), fused=fused)
        succeeded(report, *runs)
        assert [name for name in runs if report[name]["fused"]] == fused
    definitions = _definitions(where, student)

    def compared(setting: Setting) -> tuple:
        (_, _, entropy, _, _, divergence), *_ = losses(where / str(setting) / "log")
        moments = first_moments(latest(where / str(setting)))
        expected = definitions[setting.teacher].expected(setting.alpha, setting.temperature, setting.top_k)
        return entropy, divergence, moments, expected

    return compared


def _definitions(where: Path, argv: list[str]) -> dict[str, WholeStep]:
    """Returns the reference step of the student in ``where`` for each teacher."""
    args = parse_args([*argv, "--micro-batch-size", "4"], 1)
    tokenizer, _ = data.build_tokenizer(args)
    batch = next(data.batches(args, data.build_data(args, tokenizer, {}).train, 0))
    batch["loss_mask"] = unevenly_masked(batch["tokens"])
    student = in_float64(latest(where / "student"), PADDED)
    found = {}
    for name in TEACHERS:
        with torch.no_grad():
            said = in_float64(latest(where / name), VOCABULARY)(batch["tokens"], batch["position_ids"], None)
        assert said.dtype == torch.float64
        found[name] = WholeStep(student, said, batch, VOCABULARY)
    return found


def _in_checkpoint(name: str) -> str:
    """Returns the name of a weight in checkpoints, which stack layers and keep norms with the linear after them."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return re.sub(r"layers\.\d+", "layers", name)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.verifies(
    "training",
    "distillation: the loss and every weight gradient equal those computed from the full logits on one rank (1e-5, "
    "fp32), in a pairwise cover of layouts and settings",
)
def test_the_step_of_every_setting_is_that_of_whole_logits_on_one_rank(setting: Setting, steps: Callable) -> None:
    entropy, divergence, moments, expected = steps(setting)
    assert entropy == pytest.approx(expected[0], rel=STEP)
    assert divergence == (pytest.approx(expected[1], rel=STEP) if setting.alpha else None)
    found: dict[str, list[torch.Tensor]] = {}
    for name, gradient in expected[2].items():
        found.setdefault(_in_checkpoint(name), []).append(gradient)
    assert sorted(moments) == sorted(found)
    for name, gradients in found.items():
        gradient = torch.stack(gradients) if ".layers." in name else gradients[0]
        # After one step from zero, the first moment is (1 - 0.9) times the gradient.
        assert (moments[name] / (1 - 0.9) - gradient).norm() <= STEP * gradient.norm(), name

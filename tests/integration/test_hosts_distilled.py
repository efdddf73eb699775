# SPDX-License-Identifier: Apache-2.0
"""Tests of students in unmodified hosts that learn from a teacher of ours: ``make test-hosts HOSTS='-k distilled'``."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from host_runs import HOSTS, MODEL, TERNARY, TRAINING, UPSTREAM, Material, records_of_ours, run
from test_hosts import LLM_HOST, host_named, succeeded

# The teacher has another depth, width and number of heads, no grouped queries, and fewer rows of padding.
TEACHER = """
    --num-layers 2 --hidden-size 96 --ffn-hidden-size 192 --num-attention-heads 6 --num-query-groups 6
    --init-method-std 0.1 --make-vocab-size-divisible-by 64 --train-iters 1 --lr 1e-9 --no-gradient-accumulation-fusion
""".split()
MIXED = "--distill-alpha 0.5 --distill-temperature 2".split()
LAYOUTS = ("1 process", "TP2+SP", "PP2", "PP2+VPP2", "DP2, distributed optimizer, overlaps")
TEACHING = [name for name in HOSTS if name != LLM_HOST]


@pytest.fixture(scope="session")
def teacher(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a teacher: an untrained checkpoint of our own loop, whose outputs differ from the student's."""
    work = tmp_path_factory.mktemp("teacher")
    records_of_ours(1, [*MODEL, *TRAINING, *material.data, *TEACHER, "--save", str(work / "save")], work / "log")
    return work / "save"


@pytest.fixture(scope="session")
def first_step(material: Material, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Returns a function of further flags that returns our own loop's record of its first step."""

    @functools.cache
    def found(*flags: str) -> dict:
        common = [*MODEL, *TRAINING, *material.data, *material.start, *TERNARY, "--exit-interval", "1"]
        common += ["--distill-teacher", str(teacher), "--no-gradient-accumulation-fusion"]
        return records_of_ours(1, [*common, *flags], tmp_path_factory.mktemp("ours"))[0]

    return found


def taught(name: str, layout: str, material: Material, teacher: Path, *flags: str):
    """Runs the first step of a host's ternary student at a layout."""
    host = host_named(name)
    processes, of_layout = host.cases[layout]
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *material.start, *TERNARY, "--exit-interval", "1"]
    return succeeded(run(host, processes, [*common, *of_layout, "--distill-teacher", str(teacher), *flags]), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TEACHING)
@pytest.mark.verifies(
    "hosts",
    "distillation in these hosts: loss and divergence equal those of our own training loop (1e-4) (`make test-hosts`)",
    cpu="yes¹",
)
def test_a_host_learns_what_our_own_loop_learns(
    name: str, layout: str, material: Material, teacher: Path, first_step
) -> None:
    found, ours = taught(name, layout, material, teacher, *MIXED), first_step(*MIXED)
    assert f"teacher: {teacher}/iter_0000001, bf16" in found.output
    assert found.losses[0] == pytest.approx(ours["lm_loss"], rel=1e-4)
    assert found.divergences[0] == pytest.approx(ours["distill_loss"], rel=1e-4)
    # The norm is that of bf16 gradients, printed with three digits.
    assert float(found.norms[0]) == pytest.approx(ours["grad_norm"], rel=5e-3)
    assert abs(first_step("--distill-alpha", "0")["grad_norm"] / ours["grad_norm"] - 1) > 0.05


@pytest.mark.parametrize("name", TEACHING)
def test_so_it_does_the_other_way_round_and_of_the_teacher_alone(
    name: str, material: Material, teacher: Path, first_step
) -> None:
    reverse = ["--distill-direction", "reverse"]
    found, ours = taught(name, "1 process", material, teacher, *reverse), first_step(*reverse)
    assert found.divergences[0] == pytest.approx(ours["distill_loss"], rel=1e-4)
    assert float(found.norms[0]) == pytest.approx(ours["grad_norm"], rel=5e-3)


@pytest.mark.parametrize("name", TEACHING)
def test_likeliest_ids_may_stand_for_all(name: str, material: Material, teacher: Path, first_step) -> None:
    likeliest = ["--distill-top-k", "5"]
    found, ours = taught(name, "PP2", material, teacher, *likeliest), first_step(*likeliest)
    assert found.divergences[0] == pytest.approx(ours["distill_loss"], rel=1e-4)
    assert float(found.norms[0]) == pytest.approx(ours["grad_norm"], rel=5e-3)
    assert abs(first_step()["grad_norm"] / ours["grad_norm"] - 1) > 0.05


@pytest.mark.parametrize("name", TEACHING)
def test_a_teacher_of_no_weight_changes_nothing(name: str, material: Material, teacher: Path) -> None:
    """The teacher does not even change the random numbers of dropout."""
    host = host_named(name)
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *material.start, *TERNARY, "--exit-interval", "2"]
    common += "--hidden-dropout 0.1 --attention-dropout 0.1".split()
    alone = succeeded(run(host, 1, common), 2)
    beside = succeeded(run(host, 1, [*common, "--distill-teacher", str(teacher), "--distill-alpha", "0"]), 2)
    assert beside.losses == alone.losses and beside.norms == alone.norms and not beside.divergences


def test_a_students_flags_are_none_of_its_teachers(material: Material, teacher: Path, first_step) -> None:
    """The teacher does not get the student's flags, although MindSpeed fills all configurations with the job's flags.

    The teacher's attention would refuse this flag. The student's attention scores are the same with it, to within
    rounding.
    """
    scaled = [*MIXED, "--apply-query-key-layer-scaling"]
    found = taught("core_v0.12.1 + MindSpeed, local", "1 process", material, teacher, *scaled)
    assert found.divergences[0] == pytest.approx(first_step(*MIXED)["distill_loss"], rel=1e-4)


def test_another_teacher_is_refused_where_a_host_goes_on(material: Material, teacher: Path, tmp_path: Path) -> None:
    """The other teacher is a converted model."""
    host = host_named("core_v0.16.1, local")
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *TERNARY, "--save", str(tmp_path), "--save-interval", "1"]
    first = [*common, *material.start, "--exit-interval", "1"]
    succeeded(run(host, 1, [*first, "--distill-teacher", str(teacher)]), 1)
    again = [*common, "--load", str(tmp_path), "--exit-interval", "2", "--distill-teacher"]
    refused = run(host, 1, [*again, material.start[1]])
    assert refused.status != 0 and not refused.losses
    assert f"was saved with the teacher {teacher} (iter_0000001): {material.start[1]} (release) is" in refused.output
    succeeded(run(host, 1, [*again, str(teacher)]), 1)

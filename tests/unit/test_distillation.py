# SPDX-License-Identifier: Apache-2.0
"""Tests of distillation losses and their gradients against their definitions in float64, on one rank."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from steps.meters import memory
from support.distillation import by_definition, forms, relative, sampled, top_k

from bitcpm_megatron.objectives import distillation as module
from bitcpm_megatron.objectives.distillation import Divergence, distillation, divergence
from bitcpm_megatron.objectives.targets import DenseTargets, SampledTargets, Targets, TopKTargets

# A rounding in fp32 is 2^-24, and in a sum of n roundings they grow by about sqrt(n).
EXACT = 1e-5
V, PADDED = 50, 64

pytestmark = pytest.mark.usefixtures("_model_parallel")


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradient(logits: torch.Tensor, targets: Targets, rule: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    z = logits.detach().requires_grad_()
    losses = divergence(z, targets, rule, torch.distributed.group.WORLD)
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


def pair(seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits of a student and of a teacher, ``[5, 2, PADDED]`` (sequence, batch, padded vocabulary)."""
    both = draw(2, 5, 2, PADDED, seed=seed, scale=scale)
    return both[0], both[1]


def all_forms(teacher: torch.Tensor, temperature: float = 1.0) -> list[tuple[str, Targets, Divergence]]:
    return list(forms(teacher, Divergence(V, temperature), 7, torch.Generator().manual_seed(1)))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    vocab_size=st.integers(2, 300),
    padding=st.integers(0, 40),
    temperature=st.sampled_from([0.5, 1.0, 1.7, 4.0]),
    scale=st.sampled_from([1.0, 10.0, 1e4]),
    chunk=st.sampled_from([1, 700, 1 << 23]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.verifies("training", "the KL divergence and its gradient equal those of PyTorch's `kl_div` in float64")
def test_losses_and_gradients_are_those_of_the_definition(
    tokens: tuple[int, int], vocab_size: int, padding: int, temperature: float, scale: float, chunk: int, seed: int
) -> None:
    student, teacher = draw(2, *tokens, vocab_size + padding, seed=seed, scale=scale)
    # If a teacher is certain of one id, rounding leaves different probabilities of the others in fp32 and in float64.
    rule = Divergence(vocab_size, temperature)
    generator = torch.Generator().manual_seed(seed)
    for name, targets, asked in forms(teacher, rule, max(1, vocab_size // 7), generator):
        with mock.patch.object(module, "_CHUNK_ELEMENTS", chunk):
            losses, gradient = with_gradient(student, targets, asked)
        expected, expected_gradient = by_definition(student, targets, asked)
        assert losses.dtype == torch.float32 and losses.shape == tokens
        # Losses and gradients are differences of terms near 1, and in the reverse gradient of terms as large as the
        # loss.
        assert relative(losses, expected, 0.1 * temperature**2) < EXACT, name
        least = 0.1 * temperature + float(expected.max()) / 10 * asked.reverse
        assert relative(gradient[..., :vocab_size], expected_gradient, least) < EXACT, name
        assert not gradient[..., vocab_size:].any(), name


def test_sums_over_a_whole_vocabulary_stay_exact() -> None:
    vocab_size = 73_448
    student, teacher = draw(2, 4, 1, vocab_size + 24)
    for name, targets, rule in forms(teacher, Divergence(vocab_size), 64, torch.Generator().manual_seed(1)):
        found, expected = with_gradient(student, targets, rule), by_definition(student, targets, rule)
        assert relative(found[0], expected[0], 0.1) < EXACT, name
        assert relative(found[1][..., :vocab_size], expected[1], 0.0) < EXACT, name


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(reverse: bool) -> None:
    student = draw(6, 2, PADDED)
    # These logits are equal except for a constant and the padding.
    shifted = student + 2.0
    shifted[..., V:] = 9.0
    for teacher, loss, slope in ((student, 0.0, 0.0), (shifted, 1e-6, 1e-6)):
        losses, gradient = with_gradient(student, DenseTargets(teacher), Divergence(V, 2.0, reverse))
        assert float(losses.abs().max()) <= loss and float(gradient.abs().max()) <= slope
    losses, gradient = with_gradient(student, top_k(student[..., :V], 7, 1.0), Divergence(V))
    assert float(losses.abs().max()) < 1e-6 and float(gradient.abs().max()) < 1e-6


def test_equal_logits_give_equal_gradients() -> None:
    """If all logits are tied, the teacher's remaining probability is divided evenly, and every id is the maximum."""
    student = torch.zeros(1, 1, PADDED)
    teacher = torch.full((1, 1, V), 3.0)
    for targets in (DenseTargets(torch.nn.functional.pad(teacher, (0, PADDED - V))), top_k(teacher, 5, 1.0)):
        losses, gradient = with_gradient(student, targets, Divergence(V))
        assert float(losses.abs().max()) < 1e-6 and float(gradient.abs().max()) < 1e-7


@pytest.mark.parametrize("padding", [1e4, -1e4, float("inf"), float("-inf"), float("nan")])
def test_padding_moves_nothing(padding: float) -> None:
    student, teacher = pair()
    moved, moved_teacher = student.clone(), teacher.clone()
    moved[..., V:], moved_teacher[..., V:] = padding, -padding
    for (_, before, rule), (_, after, _) in zip(all_forms(teacher), all_forms(moved_teacher), strict=True):
        expected, found = with_gradient(student, before, rule), with_gradient(moved, after, rule)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert not found[1][..., V:].any()


def test_what_remains_beside_k_ids_is_as_exact_as_they_are() -> None:
    """The student's remaining probability, about 1e-26, would be lost if it were 1 minus the sum of the others."""
    student = torch.full((1, 1, V), -60.0)
    student[..., :3] = 0.0
    p = torch.tensor([0.5, 0.25, 0.125])
    targets = TopKTargets(torch.arange(3).int().view(1, 1, 3), p.log().view(1, 1, 3), 1.0)
    losses, gradient = with_gradient(student, targets, Divergence(V))
    expected, expected_gradient = by_definition(student, targets, Divergence(V))
    assert relative(losses, expected, 1.0) < EXACT and relative(gradient, expected_gradient, 1e-3) < EXACT
    # The remaining probability of 1/8 is distributed over 47 ids.
    assert torch.allclose(gradient[..., 3:], torch.tensor(-0.125 / (V - 3)))


def test_nothing_remains_where_rounding_says_so() -> None:
    student, _ = pair()
    certain = torch.full((5, 2, 1), 1e-4)
    targets = TopKTargets(torch.full((5, 2, 1), 4, dtype=torch.int32), certain, 1.0)
    losses, gradient = with_gradient(student, targets, Divergence(V))
    only = torch.full((5, 2), 4)
    assert torch.allclose(
        losses, torch.nn.functional.cross_entropy(student[..., :V].permute(0, 2, 1), only, reduction="none")
    )
    assert torch.allclose(gradient.sum(-1), torch.zeros(()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_costs_the_rounding_of_the_gradient_alone(dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in pair())
    scale = 1024.0
    for name, targets, rule in all_forms(teacher, 2.0):
        z = student.detach().requires_grad_()
        losses = divergence(z, targets, rule, torch.distributed.group.WORLD)
        (losses.sum() * scale).backward()
        expected, slope = by_definition(student, targets, rule)
        assert losses.dtype == torch.float32 and relative(losses, expected, 0.4) < EXACT, name
        assert z.grad.dtype == dtype
        # In bf16, the gradient is rounded when it is saved and when it is multiplied. In fp16, it is rounded once, and
        # the scale preserves values that fp16 could not represent.
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
        difference = (z.grad[..., :V].double() / scale - slope).abs()
        assert bool((difference <= rounding * slope.abs() + 1e-6).all()), name


def test_small_probabilities_survive_fp16_under_a_loss_scale() -> None:
    student = torch.zeros(1, 1, V, dtype=torch.float16)
    student[..., 1:] = -20.0
    targets = TopKTargets(torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1), 1.0)
    z = student.requires_grad_()
    (divergence(z, targets, Divergence(V), torch.distributed.group.WORLD).sum() * 2.0**16).backward()
    assert torch.allclose(z.grad[..., 1:].double() / 2**16, torch.tensor(-20.0).double().exp(), rtol=2**-10, atol=0)


def test_float64_logits_are_computed_in_float64() -> None:
    student, teacher = (logits.double() for logits in pair())
    for name, targets, rule in all_forms(teacher, 3.0):
        found, expected = with_gradient(student, targets, rule), by_definition(student, targets, rule)
        assert relative(found[0], expected[0], 0.1) < 1e-12, name
        assert relative(found[1][..., :V], expected[1], 0.1) < 1e-12, name


def test_logits_stay_what_they_are_and_a_graph_runs_backward_once() -> None:
    student, teacher = pair()
    before, before_teacher = student.clone(), teacher.clone()
    for _, targets, rule in all_forms(teacher):
        z = (student.requires_grad_() * 1).view(student.shape)
        losses = divergence(z, targets, rule, torch.distributed.group.WORLD)
        weights = torch.linspace(0, 1, 10).view(5, 2)
        (found,) = torch.autograd.grad((losses * weights).sum(), student, retain_graph=True)
        assert relative(found[..., :V], by_definition(before, targets, rule)[1] * weights.unsqueeze(-1), 0.1) < EXACT
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(losses.sum(), student)
        assert torch.equal(student, before) and torch.equal(teacher, before_teacher)


def of_draws(student: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and the standard error, over tokens with equal logits, of the loss and each gradient element."""
    losses, gradient = with_gradient(student.expand(*targets.shape, V), targets, Divergence(V))
    found = torch.cat((losses.unsqueeze(-1), gradient), -1).double()[0]
    return found.mean(0), found.std(0) / len(found) ** 0.5


def test_the_mean_over_draws_is_the_dense_loss_and_that_of_a_renormalized_top_k_is_not() -> None:
    student, teacher = draw(2, 1, 1, V, seed=3, scale=1.5)
    dense, slope = with_gradient(student, DenseTargets(teacher), Divergence(V))
    p = teacher.double().softmax(-1)
    expected = torch.cat((dense.double().view(1) - (p * p.log()).sum(), slope.double().view(-1)))

    def within(mean: torch.Tensor, error: torch.Tensor) -> bool:
        return bool(((mean - expected).abs() <= 3 * error).all())

    mean, error = of_draws(student, sampled(teacher.expand(1, 10_000, V), 12, 1.0, torch.Generator().manual_seed(1)))
    assert within(mean, error) and float(error.max()) < 0.01
    kept = top_k(teacher, 8, 1.0)
    mutant = TopKTargets(kept.ids, kept.log_probabilities.log_softmax(-1), 1.0)
    assert not within(of_draws(student, mutant)[0], error)


def test_the_cross_entropy_comes_from_the_same_logits_and_last() -> None:
    """The cross entropy must come last, because megatron-core's overwrites fp32 logits with its softmax."""
    student, teacher = pair()
    labels = torch.randint(0, V, (5, 2), generator=torch.Generator().manual_seed(2))
    z = student.double().requires_grad_()
    entropy = torch.nn.functional.cross_entropy(z.permute(0, 2, 1), labels, reduction="none")
    (slope,) = torch.autograd.grad(entropy.sum(), z)
    for _, targets, rule in all_forms(teacher, 2.0):
        apart, apart_slope = by_definition(student, targets, rule)
        for alpha in (0.3, 0.9, 1.0):
            given = student.clone().requires_grad_()
            found = distillation(given * 1, labels, targets, rule, alpha)
            (gradient,) = torch.autograd.grad(found.total.sum(), given)
            assert relative(found.total, (1 - alpha) * entropy + alpha * apart, 0.4) < EXACT
            expected = (1 - alpha) * slope
            expected[..., :V] += alpha * apart_slope
            assert relative(gradient, expected, 0.2 + float(apart.max()) / 10 * rule.reverse) < EXACT
            assert relative(found.cross_entropy, entropy, 0.1) < EXACT
            assert relative(found.divergence, apart, 0.4) < EXACT
            assert not found.cross_entropy.requires_grad and not found.divergence.requires_grad


def test_alpha_at_its_ends() -> None:
    student, _ = pair()
    labels = torch.randint(0, V, (5, 2), generator=torch.Generator().manual_seed(2))
    # A divergence could not use this teacher.
    teacher = DenseTargets(torch.zeros(1, 1, 1))
    given = student.clone().requires_grad_()
    alone = vocab_parallel_cross_entropy(given * 1, labels)
    found = distillation(given * 1, labels, teacher, Divergence(V), 0.0)
    assert torch.equal(found.total, alone) and torch.equal(found.cross_entropy, alone) and found.divergence is None
    gradients = [torch.autograd.grad(loss.sum(), given)[0] for loss in (alone, found.total)]
    assert torch.equal(*gradients)
    kept = student.clone()
    found = distillation(kept, labels, DenseTargets(student + 1), Divergence(V), 1.0)
    assert torch.equal(found.total, found.divergence)
    assert torch.equal(found.cross_entropy, alone) and torch.equal(kept, student)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="use 0 "):
            distillation(student, labels, teacher, Divergence(V), alpha)


def test_what_cannot_be_is_refused() -> None:
    student, teacher = pair()
    dense, kept = DenseTargets(teacher), top_k(teacher[..., :V], 3, 1.0)
    drawn = sampled(teacher[..., :V], 12, 1.0, torch.Generator())
    for targets, rule, named in (
        (kept, Divergence(V, reverse=True), "a teacher that runs along, or the forward"),
        (drawn, Divergence(V, reverse=True), "a teacher that runs along, or the forward"),
        (kept, Divergence(V, 2.0), "written at a temperature of 1.0 .* write targets at 2.0"),
        (drawn, Divergence(V, 2.0), "written at a temperature of 1.0 .* write targets at 2.0"),
        (DenseTargets(teacher[..., :-1]), Divergence(V), "63 columns per rank and the student 64: build the teacher"),
        (dense[1:], Divergence(V), r"\[4, 2\] tokens for logits of \[5, 2\]"),
        (kept[:, :1], Divergence(V), r"\[5, 1\] tokens for logits of \[5, 2\]"),
        (dense, Divergence(PADDED + 1), "do not hold a vocabulary of 65"),
        (top_k(teacher[..., :3], 3, 1.0), Divergence(3), "leave no rest: use fewer"),
    ):
        with pytest.raises(ValueError, match=named):
            divergence(student, targets, rule, torch.distributed.group.WORLD)
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="use a number above 0"):
            Divergence(V, temperature)
    for ids, weights in ((kept.ids.long(), kept.log_probabilities), (kept.ids[1:], kept.log_probabilities)):
        with pytest.raises(ValueError, match="int32 ids and log_probabilities of one shape"):
            TopKTargets(ids, weights, 1.0)
    with pytest.raises(ValueError, match="int32 ids and uint8 counts of one shape"):
        SampledTargets(kept.ids, kept.ids, 12, 1.0)


def test_malformed_targets_make_their_tokens_loss_nan() -> None:
    student, teacher = pair()
    kept = top_k(teacher[..., :V], 3, 1.0)
    drawn = sampled(teacher[..., :V], 12, 1.0, torch.Generator())
    raw = teacher[..., :V].topk(3)
    spoiled: list[Targets] = [TopKTargets(raw.indices.int(), raw.values, 1.0)[:1]]
    for unknown in (-1, V, PADDED):
        for targets in (kept, drawn):
            ids = targets.ids.clone()
            ids[0, 0, 2] = unknown
            spoiled.append(replace(targets, ids=ids))
    counts = drawn.counts.clone()
    counts[0, 0, 0] += 1
    spoiled.append(SampledTargets(drawn.ids, counts, 12, 1.0))
    for targets in spoiled:
        bad = targets.malformed(V)
        losses, _ = with_gradient(student[: len(bad)], targets, Divergence(V))
        assert bool(bad[0, 0]) and torch.equal(losses.isnan(), bad)
    assert not kept.malformed(V).any() and not drawn.malformed(V).any()


def test_targets_are_cut_and_moved_like_tensors() -> None:
    student, teacher = pair()
    for _, targets, rule in all_forms(teacher):
        assert targets.shape == (5, 2) and targets.flatten().shape == (10,)
        whole, _ = with_gradient(student, targets, rule)
        for tokens in (slice(1, 4), torch.tensor([3, 0]), (slice(None), slice(0, 1)), 2):
            part, _ = with_gradient(student[tokens], targets[tokens], rule)
            assert torch.allclose(part, whole[tokens])
        moved = targets.to("meta")
        assert type(moved) is type(targets) and moved.shape == (5, 2)
        assert all(v.is_meta for v in vars(moved).values() if isinstance(v, torch.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "top-k", "sampled"])
def test_memory_beside_the_logits_is_at_most_two_copies_of_them(form: str) -> None:
    vocab_size, tokens = 73_448, 4096
    logits = torch.zeros(tokens, 1, vocab_size, dtype=torch.bfloat16).requires_grad_() * 1
    ids = torch.arange(64).int().expand(tokens, 1, 64)
    targets: dict[str, Targets] = {
        "dense": DenseTargets(torch.zeros_like(logits)),
        "top-k": TopKTargets(ids, torch.full(ids.shape, -5.0), 1.0),
        "sampled": SampledTargets(ids, torch.ones(ids.shape, dtype=torch.uint8), 64, 1.0),
    }
    labels = torch.zeros(tokens, 1, dtype=torch.long)
    with memory(torch.device("cpu")) as used:
        losses = distillation(logits, labels, targets[form], Divergence(vocab_size), 1.0).total
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all() and gradient.shape == logits.shape
    # Memory is needed for the gradient, in the dtype of the logits, and for some chunks in fp32.
    assert logits.nbytes < used.peak < 2 * logits.nbytes

# SPDX-License-Identifier: Apache-2.0
"""Tests of what is stored of a teacher's logits: draws from its softmax, and its likeliest ids, on one rank."""

from unittest import mock

import numpy as np
import pytest
import torch

from bitcpm_megatron.objectives import distillation as module
from bitcpm_megatron.objectives.extracts import draws, likeliest, log_likelihoods, require_finite

V, PADDED, DRAWS = 50, 64, 10_000

pytestmark = pytest.mark.usefixtures("_model_parallel")


@pytest.fixture
def logits() -> torch.Tensor:
    """Returns logits ``[3, 2, PADDED]`` (sequence, batch, vocabulary) with large padding and one certain token."""
    found = 2 * torch.randn(3, 2, PADDED, generator=torch.Generator().manual_seed(1))
    found[..., V:] = 30.0
    found[1, 0, 17] = 40.0
    return found


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_the_mean_of_draws_is_within_three_standard_errors(
    temperature: float, chunk: int, logits: torch.Tensor
) -> None:
    with mock.patch.object(module, "_CHUNK_ELEMENTS", chunk):
        ids = draws(logits, uniform(3, 2, DRAWS), V, temperature, torch.distributed.group.WORLD)
    assert ids.shape == (3, 2, DRAWS) and ids.dtype == torch.int32
    p = (logits[..., :V].double() / temperature).softmax(-1)
    # The draws estimate the cross entropy of a student with other logits.
    losses = -torch.randn(V, generator=torch.Generator().manual_seed(2)).double().log_softmax(-1)
    expected = (p * losses).sum(-1)
    error = ((p * losses**2).sum(-1) - expected**2).clamp(min=0).div(DRAWS).sqrt()
    assert ((losses[ids.long()].mean(-1) - expected).abs() <= 3 * error + 1e-12).all()
    found = torch.nn.functional.one_hot(ids.long(), V).double().mean(-2)
    # Of 300 frequencies, some deviate by more than three standard errors, and rare ids may be drawn once or twice.
    assert ((found - p).abs() <= 4.5 * (p * (1 - p) / DRAWS).sqrt() + 2 / DRAWS).all()


def test_every_number_finds_its_id_by_the_cumulative_sums(logits: torch.Tensor) -> None:
    numbers = uniform(3, 2, 200)
    below = logits[..., :V].double().softmax(-1).cumsum(-1)
    wanted = torch.searchsorted(below, numbers.double(), right=True)
    found = draws(logits, numbers, V, 1.0, torch.distributed.group.WORLD)
    # Rounding may move a number across the border of an id.
    assert (found != wanted).sum() <= 1


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_no_number_leads_into_the_padding(number: float, logits: torch.Tensor) -> None:
    logits = torch.cat((logits, torch.zeros(3, 2, PADDED)), -1)
    logits[..., 0] = logits[..., V - 1] = -300.0
    found = draws(logits, torch.full((3, 2, 1), number), V, 1.0, torch.distributed.group.WORLD)
    assert (found < V).all() and (found > 0 if number == 0.0 else found >= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_the_likeliest_are_those_of_the_whole_vocabulary(temperature: float, chunk: int, logits: torch.Tensor) -> None:
    with mock.patch.object(module, "_CHUNK_ELEMENTS", chunk):
        ids, log_p = likeliest(logits, 7, V, temperature, torch.distributed.group.WORLD)
    wanted, names = (logits[..., :V].double() / temperature).log_softmax(-1).topk(7)
    assert torch.equal(ids, names.int()) and torch.allclose(log_p.double(), wanted, rtol=0, atol=1e-5)


def test_logits_that_are_not_finite_are_refused(logits: torch.Tensor) -> None:
    logits[0, 1, 3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        draws(logits, uniform(3, 2, 5), V, 1.0, torch.distributed.group.WORLD)
    _, log_p = likeliest(logits, 5, V, 1.0, torch.distributed.group.WORLD)
    assert torch.equal(log_p.isfinite().all(-1), logits.isfinite().all(-1))
    with pytest.raises(ValueError, match="logits are not finite"):
        require_finite(log_p)


@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_log_likelihoods_are_of_the_vocabulary_without_its_padding(chunk: int, logits: torch.Tensor) -> None:
    logits[2, 1, 9] = logits[2, 1, 4] = 60.0
    ids = torch.tensor([[3, V - 1], [17, 0], [int(logits[2, 0, :V].argmax()), 9]])
    with mock.patch.object(module, "_CHUNK_ELEMENTS", chunk):
        found, best = log_likelihoods(logits, ids, V, torch.distributed.group.WORLD)
    expected = logits[..., :V].double().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    # Of two equal logits, the first counts as the likeliest, as for argmax.
    assert best.tolist() == (logits[..., :V].argmax(-1) == ids).tolist()
    assert best[1, 0] and best[2, 0] and not best[2, 1]

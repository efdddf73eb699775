# SPDX-License-Identifier: Apache-2.0
"""Recognises weights that are levels times scale already, without being told so.

Quantizing such a *fused* weight again would keep its codes and multiply every scale by the density of its non-zeros
(0.69 for Gaussian weights): a wrong model that looks right. In a fused ternary weight every group has one non-zero
magnitude; in a latent one 32 neighbours that agree in magnitude do not occur. Of other spaces the smallest magnitude of
a group says its scale, and all values have to be the levels of this one, rounded as the quantizer rounds them: 1.5 s is
no multiple of 0.5 s any more once it is rounded.
"""

import torch

from .config import GROUP_MULTIPLE
from .quantizer import level_values, smallest_magnitudes
from .spaces import SPACES, TERNARY, Space
from .weights import check_weight

_SAMPLE_ROWS = 4
_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_BLOCK_ELEMENTS_ON_DEVICE = 1 << 25


@torch.no_grad()
def fused_space(weight: torch.Tensor) -> str | None:
    """The space of a pseudo-quantized weight, found from its values alone: the one with the fewest levels that fits.

    Args:
        weight: ``[out, in]`` in fp32, bf16 or fp16.

    Returns:
        Its name; None for a latent weight. Values of ternary are values of most spaces, and ternary comes first.

    Raises:
        ValueError: see :func:`fused_group_size`.
    """
    return next((name for name in SPACES if fused_group_size(weight, name) is not None), None)


@torch.no_grad()
def fused_group_size(weight: torch.Tensor, space: str = TERNARY.name) -> int | None:
    """The group size of a pseudo-quantized weight, found from its values alone.

    A latent weight is recognised in its first rows; a fused one is read once, in blocks of rows (of another space than
    ternary once for each divisor of the row).

    Args:
        weight: ``[out, in]`` in fp32, bf16 or fp16.
        space: whose levels they could be.

    Returns:
        The largest group size for which every group of any row has levels of one scale only (of ternary: one non-zero
        magnitude): -1 for the whole row, else a multiple of 32 that divides the row; None for a latent weight. Rows
        that 32 does not divide have whole-row scales or none. At the edges:

        - the divisors of the answer fit as well: two neighbouring groups with one scale are one larger group;
        - an all-zero weight is -1, and so is one with a single non-zero value (or magnitude) in every row;
        - fp16 rounds products with a scale below 2**-16 to a few bits, so that other spaces than ternary are not
          recognised there;
        - rows shorter than 32 elements can agree in magnitude by chance; no ternary model has them;
        - a weight with a NaN or an infinity is None: what is wrong with it, the quantizer's scales tell.

    Raises:
        ValueError: no matrix, an empty one, or of another dtype.
    """
    columns = check_weight(weight, -1)
    block = GROUP_MULTIPLE if columns % GROUP_MULTIPLE == 0 else columns
    blocks = columns // block
    # In blocks per group. What fails for a size fails for its multiples.
    sizes = [size for size in range(1, blocks + 1) if blocks % size == 0]
    levels = SPACES[space]
    if not _surviving(weight[:_SAMPLE_ROWS], block, sizes, levels):
        return None
    rows = max(1, _BLOCK_ELEMENTS.get(weight.device.type, _BLOCK_ELEMENTS_ON_DEVICE) // columns)
    for start in range(0, weight.shape[0], rows):
        sizes = _surviving(weight[start : start + rows], block, sizes, levels)
        if not sizes:
            return None
    return -1 if sizes[-1] == blocks else sizes[-1] * block


def _surviving(rows: torch.Tensor, block: int, sizes: list[int], space: Space) -> list[int]:
    """Those of the ascending group sizes (in blocks) that fit these rows ``[rows, in]``."""
    if space is not TERNARY:
        found: list[int] = []
        for size in sizes:
            # What fits a size fits its divisors.
            if all(divisor in found for divisor in sizes if divisor < size and size % divisor == 0):
                found += [size] if _are_levels(rows.detach().reshape(-1, size * block), space) else []
        return found
    magnitudes = rows.detach().abs().reshape(rows.shape[0], -1, block)
    # Now [rows, blocks]: the magnitude that stands for each block.
    magnitudes, one_each = _common(magnitudes)
    if not one_each:
        return []
    surviving: list[int] = []
    failed: list[int] = []
    for size in sizes:
        fits = not any(size % f == 0 for f in failed) and _common(magnitudes.reshape(rows.shape[0], -1, size))[1]
        (surviving if fits else failed).append(size)
    return surviving


def _common(magnitudes: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The largest magnitude along the last dimension, and whether all others there are equal to it or zero."""
    largest = magnitudes.amax(-1, keepdim=True)
    # Without masks, which are slow on a CPU: min(a, max - a) is 0 for 0 and max only, since the difference of two
    # floating-point numbers of one type never rounds to 0. It is NaN where the maximum is infinite or NaN.
    odd = torch.minimum(magnitudes, largest - magnitudes).amax()
    return largest.squeeze(-1), odd.item() == 0


def _are_levels(groups: torch.Tensor, space: Space) -> bool:
    """Whether all values of groups ``[rows, group]`` are levels of one scale each; an all-zero group is.

    A product is rounded to the dtype of the weight, or it was rounded to bf16 before it was stored in a wider one.
    """
    lowest = smallest_magnitudes(groups.abs()).unsqueeze(-1)
    values = level_values(groups.float(), lowest.float() / space.smallest_magnitude, space)
    same = (values.to(groups.dtype) == groups) | (values.to(torch.bfloat16).to(groups.dtype) == groups)
    return bool((groups.isfinite() & (same | (lowest == 0))).all())

# SPDX-License-Identifier: Apache-2.0
"""Detection of fused weights, which are already levels times scale, from their values alone.

Quantizing such a *fused* weight again would keep its codes and multiply every scale by the density of its non-zeros
(0.69 for Gaussian weights): a wrong model that looks right. In a fused ternary weight every group has one non-zero
magnitude; in a latent weight, 32 neighbors that agree in magnitude do not occur. In the other spaces the smallest
non-zero magnitude of a group determines its scale, and all values have to be levels of this scale, rounded as the
quantizer rounds them: once 1.5 s is rounded, it need not be a multiple of 0.5 s.
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
    """Finds the space of a pseudo-quantized weight from its values alone: the one with the fewest levels that fits.

    Args:
        weight: the weight, ``[out, in]`` in fp32, bf16 or fp16.

    Returns:
        The name of the space; None for a latent weight. Values of the ternary space are also values of most other
        spaces; ternary comes first.

    Raises:
        ValueError: if the weight is not a matrix, is empty, or has another dtype.
    """
    return next((name for name in SPACES if fused_group_size(weight, name) is not None), None)


@torch.no_grad()
def fused_group_size(weight: torch.Tensor, space: str = TERNARY.name) -> int | None:
    """Finds the group size of a pseudo-quantized weight from its values alone.

    A latent weight is recognized in its first rows. A fused one is read once, in blocks of rows; in another space than
    ternary, it is read once for each divisor of the row.

    Args:
        weight: the weight, ``[out, in]`` in fp32, bf16 or fp16.
        space: the name of the space whose levels the values are compared with.

    Returns:
        The largest group size for which every group of every row has levels of one scale only (in ternary: one non-zero
        magnitude): -1 for the whole row, else a multiple of 32 that divides the row; None for a latent weight. Rows
        that 32 does not divide have whole-row scales or none. Special cases:

        - the divisors of the answer fit as well: two neighboring groups with one scale are one larger group;
        - an all-zero weight is -1, and so is one with a single non-zero value (or magnitude) in every row;
        - fp16 rounds products with a scale below 2**-16 to a few bits, so that spaces other than ternary are not
          recognized there;
        - rows shorter than 32 elements can agree in magnitude by chance; no ternary model has them;
        - a weight with a NaN or an infinity is None; the quantizer's scales report what is wrong with it.

    Raises:
        ValueError: if the weight is not a matrix, is empty, or has another dtype.
    """
    columns = check_weight(weight, -1)
    block = GROUP_MULTIPLE if columns % GROUP_MULTIPLE == 0 else columns
    blocks = columns // block
    # Sizes in blocks per group. If a size does not fit, neither do its multiples.
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
    """Returns the ascending group sizes (in blocks) that fit these rows ``[rows, in]``."""
    if space is not TERNARY:
        found: list[int] = []
        for size in sizes:
            # If a size fits, so do its divisors.
            if all(divisor in found for divisor in sizes if divisor < size and size % divisor == 0):
                found += [size] if _are_levels(rows.detach().reshape(-1, size * block), space) else []
        return found
    magnitudes = rows.detach().abs().reshape(rows.shape[0], -1, block)
    # From here on the shape is [rows, blocks]: one magnitude represents each block.
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
    """Returns the largest magnitude along the last dimension, and whether all others there are equal to it or zero."""
    largest = magnitudes.amax(-1, keepdim=True)
    # This avoids masks, which are slow on a CPU. min(a, max - a) is 0 only for 0 and max, because the difference of two
    # unequal floating-point numbers of one type never rounds to 0. It is NaN if the maximum is infinite or NaN.
    odd = torch.minimum(magnitudes, largest - magnitudes).amax()
    return largest.squeeze(-1), odd.item() == 0


def _are_levels(groups: torch.Tensor, space: Space) -> bool:
    """Returns whether all values of each group of ``[rows, group]`` are levels of one scale, or zeros.

    A product was rounded to the dtype of the weight, or it was rounded to bf16 before it was stored in a wider dtype.
    """
    lowest = smallest_magnitudes(groups.abs()).unsqueeze(-1)
    values = level_values(groups.float(), lowest.float() / space.smallest_magnitude, space)
    same = (values.to(groups.dtype) == groups) | (values.to(torch.bfloat16).to(groups.dtype) == groups)
    return bool((groups.isfinite() & (same | (lowest == 0))).all())

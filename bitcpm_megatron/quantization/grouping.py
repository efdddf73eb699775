# SPDX-License-Identifier: Apache-2.0
"""Group sizes: how many elements share a scale along a whole row, and along a row that tensor-parallel ranks share."""

from .config import GROUP_MULTIPLE, effective_group


def row_group(in_features: int, group_size: int) -> int:
    """Returns the number of elements per scale along a row that one rank holds completely; -1 for the whole row.

    Args:
        in_features: the number of elements of the row.
        group_size: the group size as a quantizer's configuration has it.

    Raises:
        ValueError: if the group does not divide the row.
    """
    return -1 if effective_group(in_features, group_size) == in_features else group_size


def row_parallel_group(in_features: int, group_size: int, tensor_parallel: int, shards: int) -> int:
    """Returns the number of elements per scale along the whole row of a row-parallel weight; -1 for the whole row.

    With ``group_size=-1``, a whole row is always ``shards`` groups, so that the quantized weights are the same at every
    tensor-parallel size that divides ``shards``.

    Args:
        in_features: the number of elements of the whole row.
        group_size: the group size as a quantizer's configuration has it.
        tensor_parallel: the number of ranks that share the row.
        shards: the number of row-parallel shards of the training run.

    Raises:
        ValueError: if a group would cross ranks, or has a size that the kernels do not support.
    """
    if group_size != -1:
        group = row_group(in_features, group_size)
        effective_group(in_features // tensor_parallel, group_size)
        return group
    if shards % tensor_parallel:
        raise ValueError(
            f"{shards} row-parallel shards cannot be spread over a tensor-parallel size of {tensor_parallel}: "
            f"use a size that divides {shards} (--ternary-row-parallel-shards is fixed when training starts)"
        )
    if shards == 1:
        return -1
    if in_features % (shards * GROUP_MULTIPLE):
        raise ValueError(
            f"{shards} row-parallel shards cut a row of {in_features} into groups of {in_features / shards:g}, which "
            f"is no multiple of {GROUP_MULTIPLE}: use fewer shards, or a group_size"
        )
    return in_features // shards

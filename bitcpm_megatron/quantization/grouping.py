# SPDX-License-Identifier: Apache-2.0
"""How many elements share a scale: along a whole row, and along one that tensor-parallel ranks share."""

from .config import GROUP_MULTIPLE, effective_group


def row_group(in_features: int, group_size: int) -> int:
    """Elements per scale along a row that is in one place; -1 for all of them.

    Args:
        in_features: elements of the row.
        group_size: as a quantizer's configuration has it.

    Raises:
        ValueError: the group does not divide the row.
    """
    return -1 if effective_group(in_features, group_size) == in_features else group_size


def row_parallel_group(in_features: int, group_size: int, tensor_parallel: int, shards: int) -> int:
    """Elements per scale along the whole row of a row-parallel weight; -1 for all of them.

    With ``group_size=-1`` a whole row is ``shards`` groups for ever, so that the weights are the same at every
    tensor-parallel size that divides this number.

    Args:
        in_features: elements of the whole row.
        group_size: as a quantizer's configuration has it.
        tensor_parallel: ranks that share the row.
        shards: row-parallel shards of the training run.

    Raises:
        ValueError: a group would cross ranks, or is none that the kernels know.
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

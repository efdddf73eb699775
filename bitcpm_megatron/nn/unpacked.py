# SPDX-License-Identifier: Apache-2.0
"""A weight that is unpacked for one layer has memory only while the layer runs, in the forward and in the backward.

Between the two the graph holds the weight, or views of it, without bytes. Its storage is emptied and filled, and not a
copy put in its place as saved-tensor hooks would: fused weight gradients want the very tensor that was saved, with its
attributes, and a hook of ours would displace those of activation recompute.
"""

from collections.abc import Callable
from typing import Any

import torch

_ASKED = "asked whether there are any"


def free_until_backward(weight: torch.Tensor, result: Any, unpack: Callable[[torch.Tensor], None]) -> None:
    """Takes the memory of an unpacked weight away, until the backward pass of what was computed with it comes.

    Where saved-tensor hooks of somebody else are active it stays, for what they keep of it is theirs.

    Args:
        weight: the stand-in of a parameter in a graph, of which nothing else shares the storage.
        result: of the layer: a tensor, or a tuple of some.
        unpack: writes the same values into a tensor of the weight's shape.
    """
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
    graph = [output for output in outputs if output.grad_fn is not None]
    if not graph or weight.grad_fn is None or _saved_tensors_are_hooked():
        return
    storage, size = weight.untyped_storage(), weight.nbytes
    shape, strides, values = weight.shape, weight.stride(), weight.new_empty(0)

    @torch.no_grad()
    def fill(gradient: torch.Tensor | None) -> None:
        if not storage.nbytes():
            storage.resize_(size)
            # Through a tensor of its own: autograd counts what is written to the one that it saved.
            unpack(torch.empty_like(values).set_(storage, 0, shape, strides))

    def empty(gradient: torch.Tensor | None) -> None:
        storage.resize_(0)

    for output in graph:
        output.register_hook(fill)
    # Its gradient is there: the layer's backward is over. The graph, and with it these hooks, may live on.
    weight.register_hook(empty)
    storage.resize_(0)


def _saved_tensors_are_hooked() -> bool:
    """Whether anybody's saved-tensor hooks are active: those forbid that hooks be switched off."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_ASKED):
            return False
    except RuntimeError as error:
        if _ASKED not in str(error):
            raise
        return True

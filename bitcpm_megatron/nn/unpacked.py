# SPDX-License-Identifier: Apache-2.0
"""Memory of a weight that is unpacked for one layer: it exists only while the layer runs its forward or its backward.

Between the two, the graph holds the weight, or views of it, without bytes. The weight's own storage is emptied and
filled again. Saved-tensor hooks are no alternative: they would replace the weight by a copy, while fused weight
gradients need the very tensor that was saved, with its attributes; and a hook of ours would displace those of
activation recompute.
"""

from collections.abc import Callable
from typing import Any

import torch

_ASKED = "asked whether there are any"


def free_until_backward(weight: torch.Tensor, result: Any, unpack: Callable[[torch.Tensor], None]) -> None:
    """Frees the memory of an unpacked weight until the backward pass of its layer begins.

    If saved-tensor hooks of other code are active, the memory is not freed, because those hooks own what they save of
    it.

    Args:
        weight: the stand-in of a parameter in a graph; nothing else shares its storage.
        result: the result of the layer: a tensor, or a tuple with tensors.
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
            # The values are written through another tensor, because autograd counts writes to the one that it saved.
            unpack(torch.empty_like(values).set_(storage, 0, shape, strides))

    def empty(gradient: torch.Tensor | None) -> None:
        storage.resize_(0)

    for output in graph:
        output.register_hook(fill)
    # Once the weight has its gradient, the layer's backward is over. The graph, and these hooks with it, may live on.
    weight.register_hook(empty)
    storage.resize_(0)


def _saved_tensors_are_hooked() -> bool:
    """Returns whether saved-tensor hooks of any code are active: while they are, hooks cannot be disabled."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_ASKED):
            return False
    except RuntimeError as error:
        if _ASKED not in str(error):
            raise
        return True

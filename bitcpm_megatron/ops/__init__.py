# SPDX-License-Identifier: Apache-2.0
"""Floor 3: the registered ops, and the backends of ``bitcpm::fake_quantize``.

``ascendc``, ``triton`` and ``cpu`` register themselves, and load or compile what they run on when it is first needed.
"""

from . import ascendc, cpu, triton
from .fake_quantize import fake_quantize, quantize_weight
from .fake_quantize_activations import fake_quantize_activations
from .registry import Backend, Choice, active_backend, backends, register_backend, set_backend

__all__ = [
    "Backend",
    "Choice",
    "active_backend",
    "ascendc",
    "backends",
    "cpu",
    "fake_quantize",
    "fake_quantize_activations",
    "quantize_weight",
    "register_backend",
    "set_backend",
    "triton",
]

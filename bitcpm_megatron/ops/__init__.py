# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401  # these names are for the other floors
"""Floor 3: the registered ops, and the backends of ``bitcpm::fake_quantize``.

Importing ``ascendc``, ``triton`` and ``cpu`` registers these backends; each loads or compiles its kernels when they are
first needed.
"""

from . import ascendc, cpu, triton
from .fake_quantize import Counts, counts, fake_quantize, quantize_all, quantize_in_place, quantize_weight
from .fake_quantize_activations import fake_quantize_activations
from .registry import Backend, Choice, active_backend, backends, register_backend, set_backend

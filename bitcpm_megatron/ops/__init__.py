# SPDX-License-Identifier: Apache-2.0
"""Floor 2: the registered op ``bitcpm::fake_quantize`` and its backends."""

from .fake_quantize import fake_quantize
from .registry import Backend, Choice, active_backend, backends, register_backend, set_backend

__all__ = ["Backend", "Choice", "active_backend", "backends", "fake_quantize", "register_backend", "set_backend"]

# SPDX-License-Identifier: Apache-2.0
"""``python -m bitcpm_megatron``: what this machine offers, and which backend quantizes on which device, and why."""

import importlib.metadata
import importlib.util
import platform
import sys

import torch

from . import QuantizerConfig, __version__, dequantize, fake_quantize, quantize
from .ops import active_backend, backends

_PACKAGES = (
    "torch",
    "megatron-core",
    "mindspeed",
    "torch_npu",
    "triton",
    "transformer_engine",
    "apex",
    "sentencepiece",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "a checkout" if importlib.util.find_spec(package.replace("-", "_")) else "absent"


def _devices() -> list[str]:
    return ["cpu"] + [d for d in ("cuda", "npu") if hasattr(torch, d) and getattr(torch, d).is_available()]


def _self_test(device: str) -> str:
    config = QuantizerConfig(group_size=32)
    weight = torch.linspace(-1, 1, 64 * 128).reshape(64, 128).to(device, torch.bfloat16)
    expected = dequantize(*quantize(weight, config), config, weight.dtype)
    return "ok" if torch.equal(fake_quantize(weight, config), expected) else "DIFFERS from the reference"


def main() -> int:
    """Prints the report; returns 3 if a backend disagrees with the reference."""
    print(f"bitcpm_megatron {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages: " + ", ".join(f"{p} {_version(p)}" for p in _PACKAGES))
    healthy = True
    for device in _devices():
        for backend in backends():
            print(f"{device}: backend {backend.name}: {backend.unavailable(device) or 'available'}")
        choice, verdict = active_backend(device), _self_test(device)
        healthy &= verdict == "ok"
        print(f"{device}: would use {choice.backend.name} ({choice.reason}); self-test: {verdict}")
    return 0 if healthy else 3


if __name__ == "__main__":
    sys.exit(main())

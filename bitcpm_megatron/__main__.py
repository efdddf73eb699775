# SPDX-License-Identifier: Apache-2.0
"""``python -m bitcpm_megatron``: reports what this machine offers, and which backend quantizes on each device and why.

Each available backend quantizes a few small weights, and the results are compared with the reference.

Exit status: 0 if all of them agree, 3 if one does not.
"""

import importlib.metadata
import importlib.util
import platform
import sys
import time
from collections.abc import Sequence

import torch

from . import __version__, cli
from .ops import active_backend, backends
from .ops.self_test import self_test

_PACKAGES = "torch megatron-core mindspeed torch_npu triton transformer_engine apex sentencepiece".split()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "a checkout" if importlib.util.find_spec(package.replace("-", "_")) else "absent"


def _devices() -> list[str]:
    return ["cpu"] + [d for d in ("cuda", "npu") if hasattr(torch, d) and getattr(torch, d).is_available()]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status, 3 if a backend disagrees with the reference."""
    cli.Parser(prog="python -m bitcpm_megatron", description=__doc__).parse_args(argv)
    return cli.run(_report)


def _report() -> int:
    print(f"bitcpm_megatron {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages: " + ", ".join(f"{p} {_version(p)}" for p in _PACKAGES))
    healthy = True
    for device in _devices():
        for backend in backends():
            reason = backend.unavailable(device)
            if reason is not None:
                print(f"{device}: backend {backend.name}: not available: {reason}")
                continue
            start = time.perf_counter()
            wrong = self_test(backend, device)
            healthy &= wrong is None
            verdict = f"ok ({time.perf_counter() - start:.1f} s)" if wrong is None else f"FAILED: {wrong}"
            print(f"{device}: backend {backend.name}: available; self-test: {verdict}")
        choice = active_backend(device)
        print(f"{device}: would use {choice.backend.name} ({choice.reason})")
    return cli.DONE if healthy else cli.MISMATCH


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""``make kernel-cpu-debug``: runs the cases of the emulation in the CANN toolkit's own CPU-debug mode."""

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from ascendc import cases
from ascendc.emulator import DTYPES, LANES, SOURCES, Space, Weight

BUILD = SOURCES.parents[1] / "build" / "ascendc-cpu"
WEIGHT, SCALES, PACKED, PREVIOUS, STATISTICS = 1, 2, 4, 8, 16
"""The bit of each tensor, as in tests/ascendc/emulation/cpu_debug.cpp."""


def missing() -> str | None:
    """Returns why the command cannot run here, or None if it can."""
    if not os.environ.get("ASCEND_HOME_PATH"):
        return "there is no CANN toolkit (ASCEND_HOME_PATH is not set: source its set_env.sh)"
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    return None


def build() -> Path:
    """Builds the program with the toolkit and returns its path.

    Raises:
        subprocess.CalledProcessError: if cmake or the compiler fails; they have printed why.
    """
    subprocess.run(["cmake", "-S", str(SOURCES), "-B", str(BUILD), "-DRUN_MODE=cpu"], check=True)
    subprocess.run(["cmake", "--build", str(BUILD), "--target", "ternary_cpu_debug", "-j"], check=True)
    return BUILD / "ternary_cpu_debug"


def encode(case: cases.Case, weight: Weight) -> bytes:
    """Encodes one case as input of the program."""
    wanted = (PACKED if weight.pack else 0) | (STATISTICS if _counts(weight) else 0)
    given = (WEIGHT if weight.latent is not None else 0) | (SCALES if weight.given else 0)
    given |= PREVIOUS if weight.previous is not None else 0
    config = weight.config
    head = struct.pack("<4If3I", DTYPES[case.dtype], *case.shape, case.group, config.eps, case.cores, wanted, given)
    head += struct.pack("<fI", config.scale_multiplier, config.statistic == "absmax") + bytes(Space.of(config.space))
    tensors = (weight.latent, weight.scales if weight.given else None, weight.previous)
    return head + b"".join(_bytes(t) for t in tensors if t is not None)


def decode(case: cases.Case, weight: Weight, results: memoryview) -> int:
    """Fills the results of a weight from the program's output, and returns their number of bytes."""
    if _counts(weight):
        weight.statistics = torch.zeros(case.cores, 2 * LANES, dtype=torch.int32)
    at = 0
    for name in ("quantized", "scales", "packed", "statistics"):
        tensor = getattr(weight, name)
        if tensor is not None:
            size = tensor.numel() * tensor.element_size()
            content = torch.frombuffer(bytearray(results[at : at + size]), dtype=tensor.dtype)
            setattr(weight, name, content.reshape(tensor.shape))
            at += size
    return at


def _counts(weight: Weight) -> bool:
    return weight.latent is not None and (weight.count or weight.previous is not None)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every so many cases")
    args = parser.parse_args()
    reason = missing()
    if reason:
        print(f"kernel-cpu-debug cannot run: {reason}", file=sys.stderr)
        return 1
    program = build()
    chosen = list(cases.all_cases())[:: args.every]
    weights = [cases.make_weight(case) for case in chosen]
    with tempfile.TemporaryDirectory() as work:
        given, results = Path(work) / "cases", Path(work) / "results"
        given.write_bytes(b"".join(encode(c, w) for c, w in zip(chosen, weights, strict=True)))
        subprocess.run([str(program), str(given), str(results)], check=True)
        left = memoryview(results.read_bytes())
    for case, weight in zip(chosen, weights, strict=True):
        left = left[decode(case, weight, left) :]
        try:
            cases.check(case, weight)
        except AssertionError as error:
            print(f"{case}: {error}", file=sys.stderr)
            return 1
    print(f"kernel-cpu-debug: {len(chosen)} cases ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""How far quantized weights lie from latent ones, by space, statistic and multiplier.

    python studies/space_errors.py [--rows 4096] [--columns 1024] [--seed 1]

Quantizes Gaussian rows to every space, with the scale that is the space's own and with multiples of both statistics
from a grid. Reported is the relative error sum((Wq - W)^2) / sum(W^2) over all rows, of the own scale and of the best
multiple of each statistic, and the share of the weights that the least used level then has. Prints a table in Markdown.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CHECKOUT)]

import torch  # noqa: E402

from bitcpm_megatron import cli  # noqa: E402
from bitcpm_megatron.ops import fake_quantize  # noqa: E402
from bitcpm_megatron.quantization import SPACES, QuantizerConfig, quantize  # noqa: E402

# Multiples of the mean and of the maximum, of which a row of 1,024 has about 4 means.
GRIDS = {"absmean": [i / 20 for i in range(8, 51)], "absmax": [i / 100 for i in range(10, 81, 2)]}


def error(weight: torch.Tensor, config: QuantizerConfig) -> float:
    """Relative squared error of a quantized weight ``[out, in]`` in fp32."""
    difference = fake_quantize(weight, config).sub_(weight).double()
    return (difference.square().sum() / weight.double().square().sum()).item()


def rarest(weight: torch.Tensor, config: QuantizerConfig) -> tuple[float, float]:
    """The least used level of a space, and its share of the weights."""
    space = SPACES[config.space]
    codes = quantize(weight, config)[0]
    shares = [(codes == space.lowest_code + i).float().mean().item() for i in range(len(space.levels))]
    least = min(range(len(shares)), key=shares.__getitem__)
    return space.levels[least], shares[least]


def best(weight: torch.Tensor, space: str, statistic: str) -> tuple[float, QuantizerConfig]:
    """The smallest error over the grid of a statistic, and its quantizer."""
    configs = [QuantizerConfig(space, statistic=statistic, scale_multiplier=m) for m in GRIDS[statistic]]
    errors = [error(weight, config) for config in configs]
    least = min(range(len(errors)), key=errors.__getitem__)
    return errors[least], configs[least]


def table(weight: torch.Tensor) -> list[str]:
    """The lines of the table, one per space."""
    lines = [
        "| space | own scale: error | its least used level | best multiple of the mean: error, level | maximum |",
        "|---|---|---|---|---|",
    ]
    for space in SPACES:
        own = QuantizerConfig(space)
        level, share = rarest(weight, own)
        cells = [space, f"{own.scale}: {error(weight, own):.3f}", f"{level:g}: {100 * share:.2f} %"]
        for statistic in GRIDS:
            least, config = best(weight, space, statistic)
            level, share = rarest(weight, config)
            cells.append(f"{config.scale_multiplier:g}: {least:.3f}, {level:g}: {100 * share:.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=cli.Whole(1, 2**20), default=4096)
    parser.add_argument("--columns", type=cli.Whole(1, 2**20), default=1024)
    parser.add_argument("--seed", type=cli.Whole(0, 2**31 - 1), default=1)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)
    weight = torch.randn(args.rows, args.columns, generator=generator)
    return cli.run(lambda: print("\n".join(table(weight))))


if __name__ == "__main__":
    sys.exit(main())

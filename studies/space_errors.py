# SPDX-License-Identifier: Apache-2.0
"""Error of quantized weights relative to latent ones, by space, statistic and multiplier.

    python studies/space_errors.py [--rows 4096] [--columns 1024] [--seed 1]
    python studies/space_errors.py --weights PATH [--rows N] [--group-size G]

Quantizes Gaussian rows, or the linears of a model's layers, to every space, with the space's own scale and with
multiples of both statistics from a grid. PATH is a Megatron --save directory or one iteration of it, a Hugging Face
model directory, or one .safetensors / .bin file. All linears of a model are quantized in the same way; --rows takes at
most that many rows of each, evenly spread. Prints a table in Markdown: the relative error sum((Wq - W)^2) / sum(W^2)
over all rows, in fp32, for the own scale and for the best multiple of each statistic, and the percentage of the weights
at each level, from the lowest to the highest.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CHECKOUT)]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bitcpm_megatron import cli  # noqa: E402
from bitcpm_megatron.checkpoint_tools.command import one_thread  # noqa: E402
from bitcpm_megatron.checkpoint_tools.inspection.opening import open_inspection  # noqa: E402
from bitcpm_megatron.checkpoint_tools.storage.reader import check_finite, refuse_mistakes  # noqa: E402
from bitcpm_megatron.files import FileError  # noqa: E402
from bitcpm_megatron.ops import fake_quantize  # noqa: E402
from bitcpm_megatron.quantization import SPACES, QuantizerConfig, effective_group, fused_space, quantize  # noqa: E402
from bitcpm_megatron.ternary_flags import GroupSize  # noqa: E402

# Multiples of the mean and of the maximum. The maximum is about 4 means in a Gaussian row of 1,024, and more in others.
GRIDS = {"absmean": [i / 20 for i in range(8, 51)], "absmax": [i / 100 for i in range(2, 81, 2)]}
# Number of elements in a block of weights that stays in the processor's cache between the steps of a configuration.
_BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Latent:
    """Latent weights to be quantized.

    Attributes:
        blocks: the blocks of rows ``[rows, in]``, in fp32; ``in`` is the number of input features.
        group_size: the number of weights per scale, -1 for the whole row.
        energy: the sum of the squares of all weights.
    """

    blocks: Sequence[torch.Tensor]
    group_size: int
    energy: float

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], group_size: int = -1) -> "Latent":
        """Splits whole weights ``[out, in]`` into blocks of rows."""
        blocks = [b for w in weights for b in w.float().split(max(1, _BLOCK_ELEMENTS // w.shape[1]))]
        return cls(blocks, group_size, sum(_squares(block) for block in blocks))

    def error(self, config: QuantizerConfig) -> float:
        """Returns the relative squared error of the quantized weights."""
        return sum(_squares(fake_quantize(block, config).sub_(block)) for block in self.blocks) / self.energy

    def shares(self, config: QuantizerConfig) -> list[float]:
        """Returns the share of the weights at each level of the space, from the lowest level to the highest."""
        space = SPACES[config.space]
        counts = torch.zeros(len(space.levels), dtype=torch.int64)
        for block in self.blocks:
            codes = quantize(block, config)[0].flatten().int() - space.lowest_code
            counts += codes.bincount(minlength=len(space.levels))
        return (counts.double() / counts.sum()).tolist()

    def best(self, space: str, statistic: str) -> tuple[float, QuantizerConfig]:
        """Returns the smallest error over the grid of multiples of a statistic, and the quantizer that has it."""
        configs = [
            QuantizerConfig(space, self.group_size, statistic=statistic, scale_multiplier=m) for m in GRIDS[statistic]
        ]
        return min(((self.error(config), config) for config in configs), key=lambda found: found[0])


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def gaussian(rows: int, columns: int, seed: int) -> list[torch.Tensor]:
    """Returns one weight ``[rows, columns]`` with Gaussian elements."""
    return [torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))]


def trained(path: Path, rows: int | None, group_size: int) -> list[torch.Tensor]:
    """Reads the weights of the linears of a model's layers, at most ``rows`` evenly spread rows of each.

    Raises:
        FileError: if there is no model, it is damaged, its weights are quantized already, or groups do not fit.
    """
    found = open_inspection(path)
    refuse_mistakes(str(path), found.findings)
    linears = [weight for weight in found.weights if weight.linear]
    if not linears:
        raise FileError(f"{path}: there are no linears of a layer in it, as *.self_attn.q_proj.weight would be one")
    weights = []
    for linear in tqdm(linears, "reading", unit="tensor", disable=None):
        whole = linear.read(slice(None))
        check_finite(linear.name, whole)
        if whole.any() and (space := fused_space(whole)) is not None:
            raise FileError(f"{path}: {linear.name} is quantized already, to {space}: give the latent weights")
        try:
            effective_group(whole.shape[1], group_size)
        except ValueError as error:
            raise FileError(f"{linear.name}: {error}") from None
        taken = min(rows or whole.shape[0], whole.shape[0])
        weights.append(whole[torch.arange(taken) * whole.shape[0] // taken].float())
    return weights


def table(latent: Latent) -> list[str]:
    """Returns the lines of the table, one per space after its head."""
    lines = [
        "| space | own scale: error | levels, % | best multiple of the mean: error | levels, % | of the maximum: error "
        "| levels, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for space in tqdm(SPACES, "quantizing", unit="space", disable=None):
        own = QuantizerConfig(space, latent.group_size)
        cells = [space, f"{own.scale}: {latent.error(own):.3f}", _percentages(latent.shares(own))]
        for statistic, grid in GRIDS.items():
            least, config = latent.best(space, statistic)
            edge = " (the edge of the grid)" if config.scale_multiplier in (grid[0], grid[-1]) else ""
            cells += [f"{config.scale_multiplier:g}{edge}: {least:.3f}", _percentages(latent.shares(config))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percentages(shares: Sequence[float]) -> str:
    return " ".join(f"{100 * share:.{1 if share < 0.1 else 0}f}" if share >= 5e-4 else "<0.05" for share in shares)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the errors and prints the table; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="PATH", help="a model's instead of Gaussian ones")
    parser.add_argument("--rows", type=cli.Whole(1, 2**20), help="default 4096, of a model all")
    parser.add_argument("--columns", type=cli.Whole(1, 2**20), help="of Gaussian rows, default 1024")
    parser.add_argument("--seed", type=cli.Whole(0, 2**31 - 1), help="of Gaussian rows, default 1")
    parser.add_argument("--group-size", type=GroupSize(), default=-1, metavar="G", help="weights per scale, default -1")
    args = parser.parse_args(argv)
    if args.weights is not None and (args.columns is not None or args.seed is not None):
        parser.error("--columns and --seed are of Gaussian rows: leave them out, or --weights")
    return cli.run(lambda: _measure(args))


def _measure(args: argparse.Namespace) -> None:
    with one_thread():
        if args.weights is not None:
            weights = trained(args.weights, args.rows, args.group_size)
        else:
            columns, seed = args.columns or 1024, 1 if args.seed is None else args.seed
            effective_group(columns, args.group_size)
            weights = gaussian(args.rows or 4096, columns, seed)
        latent = Latent.of(weights, args.group_size)
        if latent.energy == 0:
            raise FileError(f"{args.weights}: all of its weights are zero")
        lines = table(latent)
    print(f"{len(weights)} weights, {sum(w.numel() for w in weights):,} values\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())

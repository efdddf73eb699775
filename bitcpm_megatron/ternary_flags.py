# SPDX-License-Identifier: Apache-2.0
"""The plugin's own flags, with the same names and meanings on every host.

Importing this module imports no Megatron, so that a host's adaptor can import it before Megatron is imported.
"""

import argparse
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cli import Number, Whole
from .models.family_flags import add_model_arguments
from .models.from_arguments import NAMES
from .nn.settings import TernarySettings
from .quantization import SPACES, STATISTICS, QuantizerConfig
from .quantization.config import GROUP_MULTIPLE, LARGEST_GROUP, LARGEST_MULTIPLIER, SMALLEST_MULTIPLIER
from .quantization.record import QuantizerRecord


@dataclass(frozen=True)
class GroupSize(Whole):
    """The type of a flag that is a group size: -1, or a multiple of 32."""

    minimum: int = -1
    maximum: int = LARGEST_GROUP

    def mistake(self, value: Any) -> str | None:
        """Returns what is wrong with a value; None if nothing is."""
        found = super().mistake(value)
        if found is None and value != -1 and (not value or value % GROUP_MULTIPLE):
            return f"must be {self}"
        return found

    def __str__(self) -> str:
        return f"-1 (one scale per row) or a multiple of {GROUP_MULTIPLE} up to {self.maximum}"


def add_arguments(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """Adds the ``--ternary`` flags and those of the MiniCPM4 family to a host's parser.

    If the host already has a family flag (MindSpeed-LLM: ``--scale-emb``, ``--rope-scaling-type`` and others), the
    host's flag stays, and the host carries it out; a host with a LongRoPE of its own gets none of our LongRoPE flags.

    Returns:
        The names of the family arguments that the host defines.

    Raises:
        ValueError: if the host already has a ``--ternary`` flag.
    """
    taken = parser._option_string_actions
    # MindSpeed's parser accepts a second flag of the same name, which would silently win.
    if clash := [flag for flag in taken if flag.startswith("--ternary") or flag == "--allow-quantizer-change"]:
        raise ValueError(f"the parser has {', '.join(clash)} already: add_arguments() once per parser")
    theirs = {name for name in NAMES if f"--{name.replace('_', '-')}" in taken}
    if "rope_scaling_type" in theirs:
        theirs.update(name for name in NAMES if name.startswith("rope_scaling_"))
    family = argparse.ArgumentParser(add_help=False)
    add_model_arguments(family.add_argument_group("MiniCPM4 family"))
    group = parser.add_argument_group("MiniCPM4 family")
    for action in family._actions:
        if action.dest not in theirs:
            group._add_action(action)
    add_ternary_arguments(parser)
    return tuple(sorted(theirs))


def add_ternary_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the ``--ternary`` flags, which are the same on every host, and returns the parser."""
    group = parser.add_argument_group("ternary")
    group.add_argument("--ternary", action="store_true", help="quantize the linears of the decoder layers")
    _add_quantizer_arguments(group)
    group.add_argument("--ternary-recipe", metavar="FILE", help="YAML: which module is quantized how")
    group.add_argument(
        "--ternary-row-parallel-shards",
        type=Whole(1, 2**16),
        metavar="N",
        help="with group size -1: groups per row of row-parallel weights, fixed when training starts "
        "(default: what the loaded checkpoint records, else the tensor-parallel size)",
    )
    group.add_argument("--ternary-backend", choices=("auto", *_backends()), default="auto")
    group.add_argument(
        "--ternary-cache",
        choices=("auto", "resident", "packed", "step", "none"),
        default="auto",
        help="where quantized weights are: resident, in the parameters (latents in the optimizer's masters alone); "
        "packed, the same as codes of 2 bits (4 for five-value) and scales, unpacked when a layer runs; "
        "step, beside them; none, quantized in every forward; auto, resident where it is possible, else step",
    )
    group.add_argument(
        "--ternary-param-gather",
        choices=("bf16", "packed"),
        default="bf16",
        help="how data-parallel ranks hand out resident quantized weights: as bf16 values, or as codes of 2 bits (4 "
        "for five-value) and scales; bit-identical",
    )
    group.add_argument("--ternary-verify-cache", action="store_true", help="requantize at each use and compare (slow)")
    _add_integer_arguments(group)
    _add_gradient_arguments(group)
    group.add_argument(
        "--ternary-telemetry-interval",
        type=Whole(1, 10**9),
        metavar="N",
        help="every N iterations: zeros, changed codes, levels and scales of every module, into --log-dir",
    )
    group.add_argument("--allow-quantizer-change", action="store_true", help="load a checkpoint of another quantizer")
    return parser


def _add_integer_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ternary-activation-bits",
        type=Whole(8, 16),
        choices=(16, 8),
        default=16,
        help="8: int8 inputs, one scale per token",
    )
    group.add_argument(
        "--ternary-gemm",
        choices=("bf16", "int8"),
        default="bf16",
        help="int8: compute the forward of quantized layers from int8 inputs and ternary codes, as an integer GEMM",
    )
    group.add_argument(
        "--ternary-gemm-backward",
        choices=("bf16", "int8"),
        default="bf16",
        help="int8: the input gradients, too, from gradients rounded to 8 bits per token",
    )


def _add_gradient_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ternary-estimator",
        choices=("identity", "clipped"),
        default="identity",
        help="of the gradient through the quantizer: identity, straight through; clipped, none for a latent "
        "weight more than half a step beyond the outermost level",
    )
    group.add_argument(
        "--ternary-ramp-iters",
        type=Whole(0, 10**9),
        default=0,
        metavar="N",
        help="step k of the first N uses W + (k - 1) / N (Wq - W) in the place of the quantized weight Wq",
    )


def _add_quantizer_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of the default quantizer, which modules have unless a recipe says otherwise."""
    group.add_argument(
        "--ternary-space",
        choices=tuple(SPACES),
        default="ternary",
        help="the levels of a weight, in units of its scale: ternary -1 0 1, asymmetric-4 -2 -1 0 1, half-integer-4 "
        "-1.5 -.5 .5 1.5, integer-4 -2 -1 1 2, five-value -2 -1 0 1 2 (docs/spaces.md)",
    )
    group.add_argument(
        "--ternary-statistic",
        choices=STATISTICS,
        help="what a scale is made of: the mean or the maximum of its group's magnitudes (default: the space's own, "
        "absmean for ternary and absmax for the others)",
    )
    group.add_argument(
        "--ternary-scale-multiplier",
        type=Number(SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER),
        metavar="FLOAT",
        help="a scale is so many times the statistic (default: the space's own with its own statistic, else 1)",
    )
    group.add_argument(
        "--ternary-group-size", type=GroupSize(), default=-1, help="elements per scale, -1 for a whole row"
    )


def _backends() -> Iterable[str]:
    """Returns the names of the registered backends; without torch, of those that come with the package."""
    if importlib.util.find_spec("torch") is None:
        return "ascendc", "triton", "cpu", "torch"
    from .ops import backends

    return (backend.name for backend in backends())


def ternary_settings(args: argparse.Namespace) -> TernarySettings:
    """Returns the settings that the ``--ternary`` flags request for a model."""
    return TernarySettings(
        default=QuantizerConfig(
            args.ternary_space,
            args.ternary_group_size,
            statistic=args.ternary_statistic,
            scale_multiplier=args.ternary_scale_multiplier,
        ),
        recipe=args.ternary_recipe,
        row_parallel_shards=args.ternary_row_parallel_shards,
        backend=args.ternary_backend,
        cache=args.ternary_cache,
        verify_cache=args.ternary_verify_cache,
        activation_bits=args.ternary_activation_bits,
        gemm=args.ternary_gemm,
        gemm_backward=args.ternary_gemm_backward,
    )


def take_recorded_shards(args: argparse.Namespace, checkpoint: Path) -> str | None:
    """Sets ``--ternary-row-parallel-shards`` to the value that the checkpoint to load records, unless it is given.

    Returns:
        A line for the log if the flag was set, else None.
    """
    recorded = QuantizerRecord.read(checkpoint)
    if not args.ternary or recorded is None or args.ternary_row_parallel_shards is not None:
        return None
    args.ternary_row_parallel_shards = recorded.row_parallel_shards
    return f"row-parallel shards: {recorded.row_parallel_shards}, as {checkpoint} records"


def ternary_mistakes(args: argparse.Namespace) -> list[str]:
    """Returns the contradictions among the parsed ``--ternary`` flags, one line each."""
    if args.ternary:
        shards = args.ternary_row_parallel_shards
        grouped = args.ternary_group_size != -1 and args.ternary_recipe is None
        if shards is not None and grouped and args.ternary_activation_bits == 16:
            return ["--ternary-row-parallel-shards does nothing with a --ternary-group-size: leave it out"]
        if args.ternary_verify_cache and args.ternary_cache == "none":
            return ["--ternary-verify-cache has nothing to verify with --ternary-cache none"]
        return [*_packed_mistakes(args), *_gather_mistakes(args), *_gemm_mistakes(args), *_ramp_mistakes(args)]
    parser = add_ternary_arguments(argparse.ArgumentParser())
    idle = [
        action.option_strings[0]
        for action in parser._actions
        if action.dest.startswith("ternary_") and getattr(args, action.dest) != action.default
    ]
    return [f"{', '.join(idle)} without --ternary would do nothing"] if idle else []


def _packed_mistakes(args: argparse.Namespace) -> Iterator[str]:
    if args.ternary_cache == "packed" and not getattr(args, "use_distributed_optimizer", False):
        yield (
            "--ternary-cache packed needs --use-distributed-optimizer: without it there is no buffer of parameters to "
            "free, use --ternary-cache resident"
        )


def _gather_mistakes(args: argparse.Namespace) -> Iterator[str]:
    if args.ternary_param_gather == "bf16":
        return
    asked = f"--ternary-param-gather {args.ternary_param_gather}"
    if args.ternary_cache not in ("auto", "resident", "packed"):
        cache = f"--ternary-cache {args.ternary_cache}"
        yield f"{asked} needs quantized weights in the parameters, which {cache} does not keep there: use resident"
    if not getattr(args, "use_distributed_optimizer", False):
        yield f"{asked} needs --use-distributed-optimizer: without it no parameters are gathered"


def _ramp_mistakes(args: argparse.Namespace) -> Iterator[str]:
    if not args.ternary_ramp_iters:
        return
    asked = f"--ternary-ramp-iters {args.ternary_ramp_iters}"
    if args.ternary_cache in ("resident", "packed"):
        kept = f"--ternary-cache {args.ternary_cache} keeps the quantized one alone"
        yield f"{asked} needs the latent weight in every forward, and {kept}: use step"
    if args.ternary_param_gather != "bf16":
        yield f"{asked} does not go with --ternary-param-gather {args.ternary_param_gather}: latents have no codes"
    if args.ternary_gemm != "bf16":
        yield f"{asked} does not go with --ternary-gemm {args.ternary_gemm}: what lies between two codes has none"


def _gemm_mistakes(args: argparse.Namespace) -> Iterator[str]:
    if args.ternary_gemm == "bf16":
        if args.ternary_gemm_backward != "bf16":
            yield "--ternary-gemm-backward int8 needs --ternary-gemm int8, whose codes it multiplies with"
        return
    if args.ternary_activation_bits != 8:
        yield "--ternary-gemm int8 needs --ternary-activation-bits 8: it multiplies integers"
    if args.ternary_group_size != -1 and args.ternary_recipe is None:
        yield (
            "--ternary-gemm int8 needs one scale per row, and so --ternary-group-size -1: sums of integers would have "
            f"to be cut at every {args.ternary_group_size} products"
        )
    if args.ternary_space != "ternary":
        yield f"--ternary-gemm int8 knows ternary codes only, not --ternary-space {args.ternary_space}"
    if not (getattr(args, "bf16", True) or getattr(args, "fp16", False)):
        yield "--ternary-gemm int8 needs --bf16: it stands against GEMMs of 16-bit numbers"

# SPDX-License-Identifier: Apache-2.0
"""The quantizer record that a job's checkpoints will contain, derived only from the job's flags."""

import argparse

from ...quantization.grouping import row_group, row_parallel_group
from ...quantization.record import QuantizerRecord
from ...ternary_flags import ternary_settings
from .shapes import Layout, recipe_of

_NEVER = ("embedding.word_embeddings", "output_layer")


def expected_record(layout: Layout, args: argparse.Namespace, shards: int) -> QuantizerRecord:
    """Returns the quantizer record of a ternary job with some row-parallel shards, as ``apply_recipe`` would make it.

    Raises:
        ValueError: if the groups of some modules do not fit (the message names them all), or the group size or the
            recipe is impossible.
    """
    recipe, default = recipe_of(args), ternary_settings(args).default
    modules: dict[str, dict[str, object]] = {}
    mistakes: dict[str, str] = {}
    for linear in layout.all_linears():
        matcher = recipe.decide(linear.path)
        if matcher is None or matcher.config is None:
            continue
        config = matcher.config
        try:
            group = row_group(linear.in_features, config.group_size)
            if linear.row_parallel:
                group = row_parallel_group(linear.in_features, config.group_size, layout.tp, shards)
        except ValueError as error:
            mistakes.setdefault(str(error), linear.path)
            continue
        modules[linear.path] = QuantizerRecord.of_module(config, default, group)
    if mistakes:
        raise ValueError("; ".join(f"{path}: {text}" for text, path in mistakes.items()))
    return QuantizerRecord(
        state="latent",
        space=default.space,
        eps=default.eps,
        latent_dtype="bfloat16" if args.bf16 else "float32",
        row_parallel_shards=shards,
        activation_bits=args.ternary_activation_bits,
        modules=modules,
        statistic=default.statistic,
        scale_multiplier=default.scale_multiplier,
    )


def idle_matchers(layout: Layout, args: argparse.Namespace) -> list[str]:
    """Describes the matchers of the job's recipe that fit no module, or only modules that are never quantized.

    Raises:
        ValueError: if the group size is impossible, or the recipe cannot be read.
    """
    paths = [linear.path for linear in layout.all_linears()]
    if layout.experts:
        paths += [f"decoder.layers.{i}.mlp.router" for i in range(layout.layers)]
    found = []
    for matcher in recipe_of(args).matchers:
        if any(matcher.fits(path) for path in paths):
            continue
        never = [path for path in _NEVER if matcher.fits(path)]
        if not never:
            found.append(f"{matcher.name} ({matcher.pattern}) fits no module")
        elif matcher.config is not None:
            found.append(f"{matcher.name} ({matcher.pattern}) names {never[0]}, which is never quantized")
    return found

# SPDX-License-Identifier: Apache-2.0
"""Application of a recipe to a model: all of its modules become ternary, or an error is raised and nothing changes."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state

from ..agreement import all_gathered
from ..cli import Whole
from ..nn.cache import attach_epoch, first_micro_batch, schedule_ended
from ..nn.coverage import CoverageEntry, CoverageReport
from ..nn.linear import TernaryState, check_unwrapped, make_ternary
from ..nn.settings import CacheMode, Gemm
from ..ops.int8 import check_int8
from ..patches.megatron_core import schedules
from ..quantization import QuantizerConfig, check_weight, effective_group
from ..quantization.config import check_config
from ..quantization.recipe import Matcher, Recipe, RecipeError
from .cohorts import schedule_started
from .linears import Candidate, activation_groups, candidates, local_config, whole_shape
from .sharded_scales import save_scales_with


def apply_recipe(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    recipe: Recipe | str | Path | None = None,
    *,
    default: QuantizerConfig,
    row_parallel_shards: int | None = None,
    cache: CacheMode = "step",
    verify_cache: bool = False,
    activation_bits: int = 16,
    gemm: Gemm = "bf16",
    gemm_backward: Gemm = "bf16",
) -> CoverageReport:
    """Makes the linears of a model ternary.

    Call it on the bare model, before DDP and the optimizer are built, on all ranks at once: they exchange their module
    names, so that a matcher may name a layer of another pipeline stage and all ranks raise if one does.

    Args:
        model: a model, or all model chunks of this rank under virtual pipeline parallelism.
        recipe: a :class:`Recipe`, a YAML file, or None for every linear of the decoder layers.
        default: the quantizer of modules whose recipe entry does not say otherwise.
        row_parallel_shards: the number of groups per whole row of row-parallel weights under ``group_size=-1``; None
            for the tensor-parallel size of this run. A later run must use the same number.
        cache: ``step`` quantizes once per optimizer step, ``none`` in every forward; the results are bit-identical.
        verify_cache: whether to quantize again at every use of the cache, and raise if it is stale.
        activation_bits: 8 also quantizes the input of every quantized layer, per token; 16 leaves it alone.
        gemm: ``int8`` computes the forward from int8 inputs and ternary codes; needs ``activation_bits=8``.
        gemm_backward: ``int8`` also computes the input gradients as int8 GEMMs; needs ``gemm="int8"``.

    Returns:
        The report of what was quantized and what was not, in the whole model.

    Raises:
        RecipeError: if a matcher fits no module of the whole model, or one that cannot be quantized.
        ValueError: if a weight's dtype or shape does not fit, or fp8 / fp4 is configured.
        TypeError: if the arguments hold no modules, no configuration, or no recipe.
    """
    chunks = _chunks(model)
    _check_options(default, row_parallel_shards, cache, activation_bits)
    _check_gemms(gemm, gemm_backward, activation_bits)
    chosen = _recipe(recipe, default)
    found = [[(c, chosen.decide(c.path)) for c in candidates(chunk)] for chunk in chunks]
    shards = row_parallel_shards or _tensor_parallel_size(c for chunk in found for c, _ in chunk)
    report = _plan([pair for chunk in found for pair in chunk], chosen, shards, activation_bits, gemm, recipe is None)
    configs = {e.path: e.config for e in report.entries}
    uneven = report.uneven_layers()
    schedules.announce_schedules(schedule_started, first_micro_batch, schedule_ended)
    for chunk, pairs in zip(chunks, found, strict=True):
        epoch = attach_epoch(chunk)
        make = functools.partial(TernaryState, epoch=epoch, cache=cache, verify=verify_cache, gemm=gemm)
        for candidate, _ in pairs:
            path, config = candidate.path, configs[candidate.path]
            if config is not None:
                groups = activation_groups(candidate, shards) if activation_bits == 8 else 0
                state = make(name=path, config=config, activation_groups=groups, like_all_layers=path not in uneven)
                state.gemm_backward = gemm_backward
                make_ternary(candidate.module, state)
                if candidate.kind != "dense":
                    save_scales_with(candidate.module)
    return report


def _plan(
    found: Sequence[tuple[Candidate, Matcher | None]],
    recipe: Recipe,
    shards: int,
    activation_bits: int,
    gemm: Gemm,
    unnamed: bool,
) -> CoverageReport:
    """Decides about every candidate of the whole model; raises on all ranks if one of them fails."""
    mistakes: list[str] = []
    entries: list[CoverageEntry] = []
    for candidate, matcher in found:
        try:
            entries.append(_entry(candidate, matcher, shards))
            if unnamed:
                _refuse_unnamed(candidate)
            if activation_bits == 8 and entries[-1].config is not None:
                groups = activation_groups(candidate, shards)
                if gemm == "int8":
                    _refuse_split_sums(candidate, entries[-1].config, groups)
        except ValueError as error:
            mistakes.append(str(error))
    entries, mistakes = _whole_model(entries, mistakes)
    mistakes += _idle_matchers(recipe, entries)
    if mistakes:
        raise RecipeError("the recipe cannot be applied:\n  " + "\n  ".join(mistakes))
    return CoverageReport(tuple(entries), shards)


def _check_options(
    default: QuantizerConfig, row_parallel_shards: int | None, cache: CacheMode, activation_bits: int
) -> None:
    check_config(default)
    if cache not in ("step", "none"):
        raise ValueError(f"cache={cache!r} is not possible: use step or none")
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits={activation_bits} is not possible: use 8, or 16 for none")
    if row_parallel_shards is not None and (mistake := Whole(1, 2**16).mistake(row_parallel_shards)):
        raise ValueError(f"row_parallel_shards={row_parallel_shards!r} is not possible: {mistake}")


def _check_gemms(gemm: Gemm, gemm_backward: Gemm, activation_bits: int) -> None:
    for name, value in (("gemm", gemm), ("gemm_backward", gemm_backward)):
        if value not in ("bf16", "int8"):
            raise ValueError(f"{name}={value!r} is not possible: use bf16 or int8")
    if gemm == "int8" and activation_bits != 8:
        raise ValueError("gemm='int8' multiplies integers: it needs activation_bits=8")
    if gemm_backward == "int8" and gemm != "int8":
        raise ValueError("gemm_backward='int8' needs gemm='int8', whose codes it multiplies with")


def _refuse_split_sums(candidate: Candidate, config: QuantizerConfig, activation_groups: int) -> None:
    """Checks that weight and input have one scale per local row, which an int8 GEMM sums at once."""
    weight = candidate.module.weight
    groups = max(activation_groups, weight.shape[1] // effective_group(weight.shape[1], config.group_size))
    if config.space != "ternary":
        raise ValueError(f"{candidate.path}: an int8 GEMM knows ternary codes, not {config.space}: use gemm bf16")
    if groups > 1:
        cure = "group size -1, on the command line or in the recipe,"
        if candidate.kind == "row":
            cure += " and as many --ternary-row-parallel-shards as tensor-parallel ranks,"
        raise ValueError(
            f"{candidate.path}: an int8 GEMM sums a whole row of {weight.shape[1]}, which has {groups} scales here: "
            f"use {cure} or --ternary-gemm bf16"
        )
    try:
        check_int8(weight)
    except ValueError as error:
        raise ValueError(f"{candidate.path}: {error}") from None


def _recipe(recipe: Recipe | str | Path | None, default: QuantizerConfig) -> Recipe:
    if recipe is None:
        return Recipe.all_linears(default)
    if isinstance(recipe, str | Path):
        return Recipe.from_yaml(recipe, default)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"a recipe is a Recipe or the path of a file, not a {type(recipe).__name__}")
    return recipe


def _chunks(model: object) -> list[torch.nn.Module]:
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model) if isinstance(model, Iterable) else []
    if not chunks or not all(isinstance(chunk, torch.nn.Module) for chunk in chunks):
        raise TypeError(f"apply_recipe takes a module or a list of modules (all model chunks), not {model!r:.80}")
    return chunks


def _entry(candidate: Candidate, matcher: Matcher | None, shards: int) -> CoverageEntry:
    weight = getattr(candidate.module, "weight", None)
    module, kind, path = candidate.module, candidate.kind, candidate.path
    shape = whole_shape(module)
    wanted = None if matcher is None else matcher.config
    if kind == "never" or matcher is None or wanted is None:
        reason = "never quantized" if kind == "never" else f"matcher {matcher.name}" if matcher else "no matcher"
        return CoverageEntry(path, kind, shape, None, 0, reason)
    if kind == "unsupported" or weight is None:
        raise ValueError(
            f"{path}: matcher {matcher.name!r} asks to quantize a {type(module).__module__}.{type(module).__name__}, "
            "which would bypass the quantizer: use column / row parallel linears of megatron-core (local spec), or "
            "keep it in full precision"
        )
    check_unwrapped(module, path)
    _refuse_low_precision(candidate)
    config = local_config(candidate, wanted, shards)
    try:
        group = check_weight(weight, config.group_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return CoverageEntry(
        path, kind, shape, config, shape[1] // group, f"matcher {matcher.name}", not weight.requires_grad
    )


def _refuse_unnamed(candidate: Candidate) -> None:
    """Refuses an unsupported module of a decoder layer when there is no recipe, except for the router of experts.

    Without a recipe, everything in the decoder layers counts as requested.
    """
    layer, router = ".layers." in f".{candidate.path}.", candidate.path.endswith(".router")
    if candidate.kind == "unsupported" and layer and not router:
        raise ValueError(
            f"{candidate.path}: a {type(candidate.module).__name__} cannot be quantized, and would stay in full "
            "precision: use column / row parallel linears (for experts SequentialMLP), or name it in a recipe"
        )


def _refuse_low_precision(candidate: Candidate) -> None:
    config = getattr(candidate.module, "config", None)
    for name in ("fp8", "fp4", "use_kitchen"):
        if getattr(config, name, None):
            raise ValueError(
                f"{candidate.path}: {name}={getattr(config, name)!r} is configured, whose GEMMs would requantize the "
                "ternary weight: switch it off, or train without --ternary"
            )


def _tensor_parallel_size(found) -> int:  # noqa: ANN001 - an iterator of Candidate
    return max((c.module.input_size // c.module.weight.shape[1] for c in found if c.kind == "row"), default=1)


def _whole_model(entries: list[CoverageEntry], mistakes: list[str]) -> tuple[list[CoverageEntry], list[str]]:
    """Returns the entries and mistakes of all expert-, pipeline- and tensor-parallel ranks; the same on each."""
    if not parallel_state.model_parallel_is_initialized():
        return entries, mistakes
    for group in (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    ):
        gathered = all_gathered((entries, mistakes), group)
        entries = list({e.path: e for part, _ in gathered for e in part}.values())
        mistakes = list(dict.fromkeys(m for _, part in gathered for m in part))
    return entries, mistakes


def _idle_matchers(recipe: Recipe, entries: list[CoverageEntry]) -> list[str]:
    mistakes = []
    examples = ", ".join(e.path for e in entries[:6]) or "(none)"
    for matcher in recipe.matchers:
        fitting = [e for e in entries if matcher.fits(e.path)]
        if not fitting:
            mistakes.append(
                f"matcher {matcher.name!r} ({matcher.pattern}) fits no module of the model; its modules with weights "
                f"are named like {examples}"
            )
        elif matcher.config is not None and all(e.kind == "never" for e in fitting):
            mistakes.append(
                f"matcher {matcher.name!r} ({matcher.pattern}) names {fitting[0].path}: embeddings, the output "
                "layer and adapters are never quantized; remove it"
            )
    return mistakes

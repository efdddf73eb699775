# SPDX-License-Identifier: Apache-2.0
"""Quantized weights in the model's own parameters, so that ternary training needs no second copy of them.

The bf16 copy of a latent weight serves only the quantizer. Here the latent weight is stored only in the optimizer's
fp32 masters. After its step the optimizer writes bf16(master) into the parameters, as always. They are quantized there
in place, each data-parallel rank its own shard, and the ordinary all-gather of the distributed optimizer distributes
quantized weights. A linear multiplies by its parameter itself, whose gradient is used as the latent weight's: that is
the straight-through estimator. Every bit is that of ``--ternary-cache step``.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..nn.cache import find_attached
from ..nn.linear import HostModule, StaleCacheError, TernaryState, per_row
from ..ops import quantize_in_place
from ..patches.megatron_core import schedules
from ..quantization import QuantizerConfig
from .probe import ternary_modules
from .shards import Share, Shares, places_of

_ATTRIBUTE = "_ternary_resident"
_FSDP = ("use_megatron_fsdp", "use_custom_fsdp")
# Methods of megatron-core's optimizers, from 0.12.1 to 0.19: _COPY runs after a step, _RELOAD after weights were loaded
# without masters.
_COPY = "_copy_main_params_to_model_params"
_RELOAD = "_copy_model_params_to_main_params"


class ResidentError(ValueError):
    """A run whose parameters cannot hold quantized weights."""


class Resident:
    """The quantized weights of a training run that are stored in the parameters.

    The parameters become quantized when the first schedule starts or :meth:`begin` is called. Until then, and inside
    :meth:`latents`, they are the latent weights, and only then may ``load_state_dict`` write them.

    Args:
        chunks: the model chunks of this rank, wrapped in DDP, after :func:`~bitcpm_megatron.parallel.apply_recipe`.
        optimizer: the optimizer that trains them, as ``get_megatron_optimizer`` builds it.

    Attributes:
        holds: whether the parameters hold quantized weights at present.
        gathers_packed: whether the weights are always gathered as codes and scales.

    Raises:
        ResidentError: if the parameters cannot hold quantized weights; the message has the reason.
    """

    gathers_packed = False

    def __init__(self, chunks: Sequence[HostModule], optimizer: Any) -> None:
        self._chunks = list(chunks)
        self._modules = [(s, m) for s, m in ternary_modules(chunks) if m.weight.requires_grad]
        parts = [part for part in optimizers_of(optimizer) if not getattr(part, "is_stub_optimizer", False)]
        owner: dict[torch.nn.Parameter, int] = {}
        for i, part in enumerate(parts):
            whole = [parameter for group in getattr(part, "float16_groups", ()) for parameter in group]
            owner |= dict.fromkeys(places_of(part) or whole, i)
        _check(self._modules, parts, owner)
        self._shares: list[tuple[Any, Shares]] = []
        for i, part in enumerate(parts):
            weights = [(s, m.weight) for s, m in self._modules if owner[m.weight] == i]
            # An optimizer that trains none of them gets Shares as well, so that all its data-parallel ranks do the
            # same.
            self._shares.append((part, Shares(part, weights)))
        self.holds = False
        for part, shares in self._shares:
            setattr(part, _COPY, functools.partial(self._copy, part, getattr(part, _COPY), shares))
            setattr(part, _RELOAD, functools.partial(self._reload, getattr(part, _RELOAD)))
        for chunk in self._chunks:
            chunk.__dict__[_ATTRIBUTE] = self
            # Wrappers pass load_state_dict on to the chunk inside, some without a hook of their own.
            while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
                chunk = inner
            chunk.register_load_state_dict_pre_hook(self._refuse_load)
        schedules.announce_schedules(_begin)

    @property
    def cut_groups(self) -> int:
        """The number of groups that an edge of this rank's shard cuts."""
        return sum(shares.cut_groups for _, shares in self._shares)

    @property
    def shares(self) -> list[Share]:
        """The shares that this rank quantizes, one for every weight."""
        return [share for _, shares in self._shares for share in shares.shares]

    @torch.no_grad()
    def begin(self) -> None:
        """Quantizes the latent weights in the parameters, in place; does nothing if they are quantized already."""
        if self.holds:
            return
        kinds: defaultdict[QuantizerConfig, list[tuple[TernaryState, HostModule]]] = defaultdict(list)
        for state, module in self._modules:
            kinds[per_row(state)].append((state, module))
        for config, modules in kinds.items():
            sizes = [state.config.group_size for state, _ in modules]
            made = quantize_in_place([module.weight.detach() for _, module in modules], config, sizes)
            for (state, _), scales in zip(modules, made, strict=True):
                state.quantized, state.scales = None, scales
                state.count += 1
        self._set(True)

    @contextlib.contextmanager
    def latents(self) -> Iterator[None]:
        """Context in which the parameters are the latent weights of the optimizer; collective over all ranks.

        It is for code that reads or writes weights: saving, exporting, and loading (``load_state_dict`` and then the
        optimizer's ``reload_model_params``, because training continues from its masters). The optimizer must not step
        inside.
        """
        if not self.holds:
            yield
            return
        # A gather that is in progress must end before the masters are written to the parameters.
        self._synchronize()
        self._set(False)
        for part, _ in self._shares:
            getattr(part, _COPY)()
        self._synchronize()
        try:
            yield
        finally:
            self.begin()

    def verify(self) -> None:
        """Checks this rank's shard against the masters; collective over all ranks.

        Raises:
            StaleCacheError: if other code has written to a parameter.
        """
        for part, shares in self._shares:
            masters = masters_of(part)
            kept = [(share.state.scales, share.state.count) for share in shares.shares]
            fresh: list[torch.Tensor] = []

            def latent(share: Share, masters: dict = masters, fresh: list = fresh) -> torch.Tensor:
                made = share.parameter.new_empty(share.end - share.start)
                if share.start < share.end:
                    made.copy_(masters[share.parameter].detach().flatten())
                fresh.append(made)
                return made

            shares.quantize(latent)
            for share, made, (scales, count) in zip(shares.shares, fresh, kept, strict=True):
                share.state.scales, share.state.count = scales, count
                check_held(share.state, made, _flat(share))

    def masters(self) -> Iterator[tuple[Share, torch.Tensor]]:
        """Yields this rank's shares of quantized weights, each with its flat fp32 master ``[end - start]``."""
        for part, shares in self._shares:
            masters = masters_of(part)
            for share in shares.shares:
                if share.start < share.end:
                    yield share, masters[share.parameter].detach().view(-1)

    def _copy(self, part: Any, original: Callable[[], None], shares: Shares) -> None:
        original()
        if self.holds:
            shares.quantize(_flat)

    def _reload(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.holds:
            raise StaleCacheError(
                "the optimizer's masters would be overwritten with quantized weights: reload them inside "
                "Resident.latents(), or run with --ternary-cache step"
            )
        original(*args, **kwargs)

    def _refuse_load(self, *arguments: object) -> None:
        if self.holds:
            raise StaleCacheError(
                "the parameters hold quantized weights, and what is loaded would stand among them as one: load before "
                "the first step or inside Resident.latents(), or run with --ternary-cache step"
            )

    def _set(self, holds: bool) -> None:
        self.holds = holds
        for state, _ in self._modules:
            state.resident = holds

    def _synchronize(self) -> None:
        """Gathers all shards, after a gather that is in progress."""
        for chunk in self._chunks:
            config = getattr(chunk, "ddp_config", None)
            if config is not None and config.use_distributed_optimizer:
                if config.overlap_param_gather:
                    chunk.start_param_sync(force_sync=True)
                chunk.start_param_sync(force_sync=True)


def hold_in_parameters(chunks: Sequence[torch.nn.Module], optimizer: Any, cache: str) -> str | None:
    """Makes the parameters hold the quantized weights if ``--ternary-cache`` asks for it.

    Call it after the optimizer is built, before or after a checkpoint is loaded: it takes effect with the first
    schedule.

    Args:
        chunks: the model chunks of this rank, as for :class:`Resident`.
        optimizer: the optimizer that trains them, as for :class:`Resident`.
        cache: ``resident``, or ``auto`` for resident if it is possible; other values do nothing.

    Returns:
        One line for the log; None if nothing was requested.

    Raises:
        ResidentError: if ``resident`` is requested and not possible; the message has the cure.
    """
    if cache not in ("auto", "resident") or not ternary_modules(chunks):
        return None
    try:
        Resident(chunks, optimizer)
    except ResidentError as error:
        if cache == "resident":
            raise ResidentError(f"{error}: use --ternary-cache step") from None
        return f"cache: step, a quantized weight beside each latent one (not resident: {error})"
    return "cache: resident, the parameters hold the quantized weights and the optimizer's masters the latent ones"


def find_resident(model: torch.nn.Module) -> Resident | None:
    """Returns the :class:`Resident` of a chunk, looking through wrappers; None if there is none."""
    return find_attached(model, _ATTRIBUTE)


def latents(chunks: Sequence[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the parameters of model chunks are latent weights, whatever the cache of the run is.

    It is collective over all ranks, like :meth:`Resident.latents`.
    """
    resident = find_resident(chunks[0])
    return contextlib.nullcontext() if resident is None else resident.latents()


def check_held(state: TernaryState, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Checks that the stored values of a weight are the expected ones; all NaN are equal.

    Raises:
        StaleCacheError: if they are not.
    """
    if not torch.equal(expected.nan_to_num(), found.nan_to_num()):
        raise StaleCacheError(
            f"{state.name}: its parameter, which holds the quantized weight, no longer is the quantization of the "
            "optimizer's master weight: it was written by something else. Write weights inside Resident.latents(), "
            "and then optimizer.reload_model_params(), or run with --ternary-cache step."
        )


def _begin(chunks: Sequence[torch.nn.Module]) -> None:
    for resident in dict.fromkeys(find_resident(chunk) for chunk in chunks):
        if resident is not None:
            if resident.holds and any(state.verify for state, _ in resident._modules):
                resident.verify()
            resident.begin()


def _flat(share: Share) -> torch.Tensor:
    return share.parameter.detach().view(-1)[share.start : share.end]


def optimizers_of(optimizer: Any) -> list[Any]:
    """Returns the parts of a chained optimizer of megatron-core; the optimizer itself if it is not chained."""
    chained = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if chained is None else [part for inner in chained for part in optimizers_of(inner)]


def masters_of(part: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Returns the fp32 masters of this rank's shard, by parameter."""
    pairs: Iterable[tuple[Any, Any]]
    if hasattr(part, "model_float16_groups"):
        pairs = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
    else:
        pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
    return {parameter: master for group in pairs for parameter, master in zip(*group, strict=True)}


def _check(
    modules: Sequence[tuple[TernaryState, HostModule]], parts: Sequence[Any], owner: dict[torch.nn.Parameter, int]
) -> None:
    for part in parts:
        config = getattr(part, "config", None)
        if getattr(config, "use_precision_aware_optimizer", False):
            raise ResidentError("the precision-aware optimizer keeps no fp32 masters that could be written back")
        if getattr(config, "optimizer_cpu_offload", False):
            raise ResidentError("an optimizer on the host writes the parameters by itself")
        kept = [getattr(type(part), name, None) for name in (_COPY, _RELOAD)]
        ours = all(method is not None and method.__module__.startswith("megatron.core.") for method in kept)
        if not ours or {_COPY, _RELOAD} & vars(part).keys():
            raise ResidentError(f"{type(part).__name__} keeps its masters in a way that is not megatron-core's")
        if any(getattr(part, "ddp_config", None) and getattr(part.ddp_config, name, False) for name in _FSDP):
            raise ResidentError("FSDP re-points the parameters")
    for state, module in modules:
        if module.weight.dtype != torch.bfloat16:
            raise ResidentError(f"{state.name} is trained in {module.weight.dtype}, without a master of its own")
        if module.weight not in owner:
            raise ResidentError(f"{state.name}: no optimizer keeps a master of its weight")

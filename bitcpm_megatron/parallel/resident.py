# SPDX-License-Identifier: Apache-2.0
"""Quantized weights that live in the model's own parameters, so that ternary training takes no second copy of them.

The bf16 copy of a latent weight serves the quantizer alone. Here the latent weight stands in the optimizer's fp32
masters only: after its step the optimizer writes bf16(master) into the parameters, as always, they are quantized there
in place, each data-parallel rank its own shard, and the ordinary all-gather of the distributed optimizer hands out
quantized weights. A linear multiplies with its parameter itself, whose gradient is the latent weight's: that is the
straight-through estimator. Every bit is that of ``--ternary-cache step``.

The shards of the flat parameter buffer ignore rows, so that a shard's edge may cut a group. All ranks that hold a piece
of it send each other the raw bf16 piece, and each sums the whole group in the one order that all backends have; sums of
pieces would not be exact.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..nn.cache import find_attached
from ..nn.linear import HostModule, StaleCacheError, TernaryState
from ..ops import quantize_in_place
from ..patches.megatron_core import schedules
from ..quantization import QuantizerConfig
from .probe import ternary_modules

_ATTRIBUTE = "_ternary_resident"
_FSDP = ("use_megatron_fsdp", "use_custom_fsdp")
# Methods of megatron-core's optimizers, from 0.12.1 to 0.19: after a step, and for weights that came without masters.
_COPY = "_copy_main_params_to_model_params"
_RELOAD = "_copy_model_params_to_main_params"


class ResidentError(ValueError):
    """The parameters of this run cannot hold quantized weights."""


@dataclass(frozen=True)
class Span:
    """Neighbouring elements of one group, in one data-parallel rank's shard; offsets count in the flat weight."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class Share:
    """What a data-parallel rank quantizes of one weight.

    Attributes:
        state: of the module.
        parameter: its weight ``[out, in]``.
        group: elements per scale.
        start: first element of the flat weight in this rank's shard.
        end: behind the last one; equal to ``start`` where the shard holds nothing of it.
        cuts: the groups of which the shard holds a piece, and others the rest; each in order of the shards.
    """

    state: TernaryState
    parameter: torch.nn.Parameter
    group: int
    start: int
    end: int
    cuts: tuple[tuple[Span, ...], ...] = ()

    @property
    def whole(self) -> tuple[int, int]:
        """The elements of the shard that are whole groups."""
        first, last = -(-self.start // self.group) * self.group, self.end // self.group * self.group
        return (first, last) if first < last else (self.start, self.start)


def share_of(
    state: TernaryState, parameter: torch.nn.Parameter, first: int, shard: int, rank: int, ranks: int
) -> Share:
    """The share of one rank in a weight that lies in a buffer which is cut into equal shards.

    Args:
        state: of the module.
        parameter: its weight ``[out, in]``.
        first: where the weight begins in the buffer.
        shard: elements of one shard.
        rank: data-parallel rank that asks.
        ranks: shards of the buffer.
    """
    count = parameter.numel()
    group = parameter.shape[1] if state.config.group_size == -1 else state.config.group_size
    edges = [0, *(e for r in range(1, ranks) if 0 < (e := r * shard - first) < count), count]
    start, end = (min(max(r * shard - first, 0), count) for r in (rank, rank + 1))
    cuts = []
    for cut in sorted({edge // group for edge in edges[1:-1] if edge % group}):
        low, high = cut * group, (cut + 1) * group
        inside = [low, *(edge for edge in edges if low < edge < high), high]
        spans = [Span((first + a) // shard, a, b) for a, b in zip(inside, inside[1:], strict=False)]
        if any(span.rank == rank for span in spans):
            cuts.append(tuple(spans))
    return Share(state, parameter, group, start, end, tuple(cuts))


class Shares:
    """The quantized weights of one of megatron-core's optimizers, as this data-parallel rank sees them.

    Args:
        optimizer: a ``DistributedOptimizer`` or ``Float16OptimizerWithFloat16Params``.
        weights: quantized modules whose weights it trains.
    """

    def __init__(self, optimizer: Any, weights: Sequence[tuple[TernaryState, torch.nn.Parameter]]) -> None:
        places = _places(optimizer)
        self.group: torch.distributed.ProcessGroup | None = optimizer.data_parallel_group if places else None
        self._rank, ranks = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        self.shares: list[Share] = []
        for state, parameter in weights:
            first, shard = 0, parameter.numel()
            if self.group is not None:
                first, length = places[parameter]
                shard = length // ranks
            self.shares.append(share_of(state, parameter, first, shard, self._rank, ranks))

    @property
    def cut_groups(self) -> int:
        """Groups of which this rank holds a piece only."""
        return sum(len(share.cuts) for share in self.shares)

    @torch.no_grad()
    def quantize(self, flat: Callable[[Share], torch.Tensor]) -> None:
        """Quantizes this rank's shard in place, and keeps the scales of it; collective over the data-parallel group.

        Args:
            flat: from a share its latent weight ``[end - start]``, contiguous, which becomes the quantized one.
        """
        pieces = [flat(share) for share in self.shares]
        kinds: defaultdict[QuantizerConfig, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for i, (share, piece) in enumerate(zip(self.shares, pieces, strict=True)):
            start, end = (offset - share.start for offset in share.whole)
            if start < end:
                kinds[_per_row(share)].append((i, piece[start:end].view(-1, share.group)))
        completed = self._complete(pieces)
        for i, groups in completed.items():
            kinds[_per_row(self.shares[i])].append((i, groups))
        scales: list[list[torch.Tensor]] = [[] for _ in self.shares]
        for config, rows in kinds.items():
            for (i, _), made in zip(rows, quantize_in_place([row for _, row in rows], config), strict=True):
                scales[i].append(made.flatten())
        for i, groups in completed.items():
            share = self.shares[i]
            for spans, group in zip(share.cuts, groups, strict=True):
                for span in (s for s in spans if s.rank == self._rank):
                    own = group[span.start % share.group :][: span.end - span.start]
                    pieces[i][span.start - share.start : span.end - share.start] = own
        for share, made in zip(self.shares, scales, strict=True):
            share.state.scales = torch.cat(made) if made else None
            share.state.count += 1

    def _complete(self, pieces: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The whole groups ``[cuts, group]`` of which the shard holds a piece, by the share's number."""
        groups: dict[int, torch.Tensor] = {}
        sent: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        wanted: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        for i, (share, piece) in enumerate(zip(self.shares, pieces, strict=True)):
            if not share.cuts:
                continue
            groups[i] = piece.new_empty(len(share.cuts), share.group)
            for spans, group in zip(share.cuts, groups[i], strict=True):
                for span in spans:
                    place = group[span.start % share.group :][: span.end - span.start]
                    if span.rank != self._rank:
                        wanted[span.rank].append(place)
                        continue
                    own = piece[span.start - share.start : span.end - share.start]
                    place.copy_(own)
                    for peer in {s.rank for s in spans} - {self._rank}:
                        sent[peer].append(own)
        # One message each way between two ranks; both list the groups in the order of the buffers.
        received = {peer: torch.cat(places) for peer, places in wanted.items()}
        operations = []
        for peer in sorted(sent):
            there = torch.distributed.get_global_rank(self.group, peer)
            for call, tensor in (
                (torch.distributed.isend, torch.cat(sent[peer])),
                (torch.distributed.irecv, received[peer]),
            ):
                operations.append(torch.distributed.P2POp(call, tensor, there, self.group))
        if operations:
            for work in torch.distributed.batch_isend_irecv(operations):
                work.wait()
        for peer, places in wanted.items():
            for place, values in zip(places, received[peer].split([p.numel() for p in places]), strict=True):
                place.copy_(values)
        return groups


def _per_row(share: Share) -> QuantizerConfig:
    """The quantizer of a weight that is seen as rows of one group each."""
    return replace(share.state.config, group_size=-1)


class Resident:
    """The quantized weights of a training run that live in the parameters.

    They become so when the first schedule starts, or :meth:`begin` is called: until then, and again from a
    ``load_state_dict`` to the next schedule, the parameters are the latent weights.

    Args:
        chunks: the model chunks of this rank, wrapped in DDP, after
            :func:`~bitcpm_megatron.parallel.apply_recipe`.
        optimizer: that trains them, as ``get_megatron_optimizer`` builds it.

    Raises:
        ResidentError: they cannot, with the reason.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], optimizer: Any) -> None:
        self._chunks = list(chunks)
        self._modules = [(s, m) for s, m in ternary_modules(chunks) if m.weight.requires_grad]
        parts = [part for part in _parts(optimizer) if not getattr(part, "is_stub_optimizer", False)]
        owner: dict[torch.nn.Parameter, int] = {}
        for i, part in enumerate(parts):
            whole = [parameter for group in getattr(part, "float16_groups", ()) for parameter in group]
            owner |= dict.fromkeys(_places(part) or whole, i)
        _check(self._modules, parts, owner)
        self._shares: list[tuple[Any, Shares]] = []
        for i, part in enumerate(parts):
            weights = [(s, m.weight) for s, m in self._modules if owner[m.weight] == i]
            # Also where it trains none of them: its data-parallel ranks do all the same.
            self._shares.append((part, Shares(part, weights)))
        self.holds = False
        for part, shares in self._shares:
            setattr(part, _COPY, functools.partial(self._copy, getattr(part, _COPY), shares))
            setattr(part, _RELOAD, functools.partial(self._reload, getattr(part, _RELOAD)))
        for chunk in self._chunks:
            chunk.__dict__[_ATTRIBUTE] = self
            # Wrappers hand load_state_dict on to the chunk inside, some without a hook of their own.
            while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
                chunk = inner
            chunk.register_load_state_dict_post_hook(self._loaded)
        schedules.announce_schedules(_begin)

    @property
    def cut_groups(self) -> int:
        """Groups that a shard's edge cuts, as this rank sees them."""
        return sum(shares.cut_groups for _, shares in self._shares)

    @torch.no_grad()
    def begin(self) -> None:
        """Quantizes the latent weights in the parameters, in place; does nothing where they are quantized."""
        if self.holds:
            return
        for state, module in self._modules:
            state.quantized = None
            (state.scales,) = quantize_in_place([module.weight.detach()], state.config)
            state.count += 1
        self._set(True)

    @contextlib.contextmanager
    def latents(self) -> Iterator[None]:
        """While it lasts, the parameters are the latent weights of the optimizer; collective over all ranks.

        For what reads weights: saving, exporting. The optimizer may not step meanwhile.
        """
        if not self.holds:
            yield
            return
        # What is being gathered comes first, and then what the masters say.
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
            StaleCacheError: a parameter was written by somebody else.
        """
        for part, shares in self._shares:
            masters = _masters(part)
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
                if not torch.equal(made.nan_to_num(), _flat(share).nan_to_num()):
                    raise StaleCacheError(
                        f"{share.state.name}: its parameter, which holds the quantized weight, no longer is the "
                        "quantization of the optimizer's master weight: it was written by something else. Write "
                        "weights by load_state_dict and optimizer.reload_model_params(), or run with "
                        "--ternary-cache step."
                    )

    def _copy(self, original: Callable[[], None], shares: Shares) -> None:
        original()
        if self.holds:
            shares.quantize(_flat)

    def _reload(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.holds:
            raise StaleCacheError(
                "the optimizer's masters would be overwritten with quantized weights: load the latent weights by "
                "load_state_dict first, or run with --ternary-cache step"
            )
        original(*args, **kwargs)

    def _loaded(self, module: torch.nn.Module, incompatible_keys: object) -> None:
        self._set(False)

    def _set(self, holds: bool) -> None:
        self.holds = holds
        for state, _ in self._modules:
            state.resident = holds

    def _synchronize(self) -> None:
        """Gathers all shards, after those that are on their way."""
        for chunk in self._chunks:
            config = getattr(chunk, "ddp_config", None)
            if config is not None and config.use_distributed_optimizer:
                if config.overlap_param_gather:
                    chunk.start_param_sync(force_sync=True)
                chunk.start_param_sync(force_sync=True)


def hold_in_parameters(chunks: Sequence[torch.nn.Module], optimizer: Any, cache: str) -> str | None:
    """Lets the parameters hold the quantized weights where ``--ternary-cache`` asks for it.

    To be called once the optimizer is built and a checkpoint loaded.

    Args:
        chunks: as for :class:`Resident`.
        optimizer: see there.
        cache: ``resident``; ``auto`` for resident where it is possible; anything else does nothing.

    Returns:
        One line for the log, None where nothing was asked for.

    Raises:
        ResidentError: ``resident`` is not possible.
    """
    if cache not in ("auto", "resident") or not ternary_modules(chunks):
        return None
    try:
        Resident(chunks, optimizer)
    except ResidentError as error:
        if cache == "resident":
            raise
        return f"cache: step, a quantized weight beside each latent one (not resident: {error})"
    return "cache: resident, the parameters hold the quantized weights and the optimizer's masters the latent ones"


def find_resident(model: torch.nn.Module) -> Resident | None:
    """What holds the quantized weights of a chunk in its parameters, looking through wrappers; None without."""
    return find_attached(model, _ATTRIBUTE)


def latents(chunks: Sequence[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    """While it lasts, the parameters of model chunks are latent weights, however the run keeps the quantized ones.

    Collective over all ranks, see :meth:`Resident.latents`.
    """
    resident = find_resident(chunks[0])
    return contextlib.nullcontext() if resident is None else resident.latents()


def _begin(chunks: Sequence[torch.nn.Module]) -> None:
    for resident in dict.fromkeys(find_resident(chunk) for chunk in chunks):
        if resident is not None:
            if resident.holds and any(state.verify for state, _ in resident._modules):
                resident.verify()
            resident.begin()


def _flat(share: Share) -> torch.Tensor:
    return share.parameter.detach().view(-1)[share.start : share.end]


def _parts(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if chained is None else [part for inner in chained for part in _parts(inner)]


def _places(part: Any) -> dict[torch.nn.Parameter, tuple[int, int]]:
    """Where every parameter of a distributed optimizer begins in its bucket, and the bucket's length, in elements.

    By the map of the buffer, as the optimizer: that of a bucket leaves out what a parameter's start is padded with.
    """
    if not hasattr(part, "gbuf_ranges"):
        return {}
    found = {}
    for buffer in part.buffers:
        for parameter, (start, _, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            found[parameter] = start - bucket.offset, bucket.param_data.numel()
    return found


def _masters(part: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """fp32 masters of this rank's shard, by the parameter."""
    pairs: Iterable[tuple[Any, Any]]
    if hasattr(part, "model_float16_groups"):
        pairs = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
    else:
        pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
    return {parameter: master for group in pairs for parameter, master in zip(*group, strict=True)}


def _check(
    modules: Sequence[tuple[TernaryState, HostModule]], parts: Sequence[Any], owner: dict[torch.nn.Parameter, int]
) -> None:
    cure = "use --ternary-cache step"
    for part in parts:
        config = getattr(part, "config", None)
        if getattr(config, "use_precision_aware_optimizer", False):
            raise ResidentError(
                f"the precision-aware optimizer keeps no fp32 masters that could be written back: {cure}"
            )
        if getattr(config, "optimizer_cpu_offload", False):
            raise ResidentError(f"an optimizer on the host writes the parameters by itself: {cure}")
        kept = [getattr(type(part), name, None) for name in (_COPY, _RELOAD)]
        ours = all(method is not None and method.__module__.startswith("megatron.core.") for method in kept)
        if not ours or {_COPY, _RELOAD} & vars(part).keys():
            raise ResidentError(f"{type(part).__name__} keeps its masters in a way that is not megatron-core's: {cure}")
        if any(getattr(part, "ddp_config", None) and getattr(part.ddp_config, name, False) for name in _FSDP):
            raise ResidentError(f"FSDP re-points the parameters: {cure}")
    for state, module in modules:
        if module.weight.dtype != torch.bfloat16:
            raise ResidentError(
                f"{state.name} is trained in {module.weight.dtype}, without a master of its own: {cure}"
            )
        if module.weight not in owner:
            raise ResidentError(f"{state.name}: no optimizer keeps a master of its weight: {cure}")

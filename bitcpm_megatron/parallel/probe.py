# SPDX-License-Identifier: Apache-2.0
"""Proofs that a host trains ternary: of every quantized layer at start-up, and of its use in the first training step.

A host may replace a linear's class, its forward or the functions below it, and a model whose quantizer is bypassed
trains in full precision with a perfectly normal loss. So each layer is run, as it is, on one-hot inputs: its outputs
are then columns of the weight that the GEMM really used, exact in every dtype, and compared bit for bit. An int8 GEMM
is also given integers, whose sums are known. A norm inside the layer is skipped meanwhile.

A fused kernel that reads the weights of layers without calling them would pass this test. So the first training step
must have run every quantized layer.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence

import torch

from ..agreement import all_gathered
from ..cli import MismatchError
from ..nn.cache import find_attached
from ..nn.linear import HostModule, TernaryState, ternary_state
from ..patches.megatron_core import schedules
from ..quantization import quantize_dequantize
from .linears import parallel_kind, registered_linear, tensor_parallel_group

_POSITIONS = 16
_WATCH = "_ternary_watch"
_NAMED = 32


class ProbeError(MismatchError):
    """A layer that should be ternary but computes with another weight, or is not used."""


def ternary_modules(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[tuple[TernaryState, HostModule]]:
    """Returns the states and quantized modules of a model or of its chunks, in order."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    return [(s, m) for chunk in chunks for m in chunk.modules() if (s := ternary_state(m)) is not None]


@torch.no_grad()
def probe(model: torch.nn.Module | Sequence[torch.nn.Module]) -> int:
    """Runs every quantized layer on one-hot inputs and compares with an independent quantization of its weight.

    Layers communicate as in training, so that every rank of a tensor-parallel group must call this at once.

    Args:
        model: a model, or all chunks of this rank, after :func:`apply_recipe`.

    Returns:
        The number of layers that were proved.

    Raises:
        ProbeError: if a layer's output is not ``x Wq^T``; the message names every such layer, with the largest
            difference.
    """
    wrong = []
    modules = ternary_modules(model)
    for state, module in modules:
        for inputs in (_columns, _sums) if state.gemm == "int8" else (_columns,):
            found, expected = inputs(state, module)
            if not torch.equal(found, expected):
                difference = (found.float() - expected.float()).abs().max().item()
                wrong.append(f"{state.name} ({type(module).__name__}): largest difference {difference:g}")
                break
    if wrong:
        raise ProbeError(
            "these layers do not compute x Wq^T, something bypasses the quantizer:\n  " + "\n  ".join(wrong)
        )
    return len(modules)


def _columns(state: TernaryState, module: HostModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns columns of the weight that the layer's forward used, and the expected ones; both ``[positions, out]``."""
    weight, place = module.weight, _Place(module)
    positions = torch.linspace(0, place.whole_in - 1, _POSITIONS * place.size, device=weight.device).long()
    one_hot = torch.nn.functional.one_hot(positions, place.whole_in).to(weight.dtype)
    quantized, _ = _quantized(state, weight)
    local = positions - place.first
    inside = (local >= 0) & (local < weight.shape[1])
    expected = quantized.t()[local.clamp(0, weight.shape[1] - 1)] * inside.unsqueeze(1)
    return place.run(one_hot[:, place.first : place.first + weight.shape[1]], expected)


def _sums(state: TernaryState, module: HostModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the results of an int8 GEMM for integer inputs, and the expected ones; both ``[positions, out]``.

    The largest magnitude of an input is 127, so that the input is its own int8 codes and is multiplied only by the
    weight's scale. In row-parallel layers one rank has all of an input, so that nothing is rounded when ranks add up.
    """
    weight, place = module.weight, _Place(module)
    positions = torch.arange(_POSITIONS * place.size, device=weight.device).unsqueeze(-1)
    x = (positions * weight.shape[1] + torch.arange(weight.shape[1], device=weight.device)) * 89 % 255 - 127
    x[:, 0] = 127
    mine = positions % place.size == place.first // weight.shape[1] if place.row_parallel else True
    local = (x * mine).to(weight.dtype)
    quantized, scales = _quantized(state, weight)
    # fp32 holds the sums exactly, and every fp32 GEMM the factors, even if it rounds them to fewer bits.
    sums = local.float() @ quantized.sign().float().t()
    return place.run(local, (sums * scales.float().t()).to(weight.dtype))


def _quantized(state: TernaryState, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the reference's quantization under the backend's scales, which may be one bf16 step off its own."""
    return quantize_dequantize(weight, state.config, state.quantize(weight)[1])


class _Place:
    """The place of a layer among the tensor-parallel ranks, and its run on an input there."""

    def __init__(self, module: HostModule) -> None:
        self._module = module
        self._group = tensor_parallel_group(module)
        self.row_parallel = parallel_kind(module) == "row"
        rank, self.size = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        self._rank, local_in = rank, module.weight.shape[1]
        self.whole_in = local_in * self.size if self.row_parallel else local_in
        self.first = rank * local_in if self.row_parallel else 0

    def run(self, x: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the layer.

        Args:
            x: this rank's part of the inputs, ``[positions, in]``.
            expected: the expected outputs from this rank's shard of the weight, ``[positions, out]``.

        Returns:
            The layer's outputs, and the expected ones.
        """
        module, x = self._module, x.unsqueeze(1)
        # Experts leave gathering, reducing and scattering to the token dispatcher.
        communicates = self.size > 1 and not getattr(module, "explicit_expert_comm", False)
        sequence_parallel = getattr(module, "sequence_parallel", False) and communicates
        if sequence_parallel and not self.row_parallel:
            x = x.chunk(self.size)[self._rank]
        with _without_norm(module):
            output = module(x.contiguous())
        found, bias = output if isinstance(output, tuple) else (output, None)
        found = found.squeeze(1)
        if self.row_parallel and communicates:
            torch.distributed.all_reduce(expected, group=self._group)
            if sequence_parallel:
                expected = expected.chunk(self.size)[self._rank]
        if bias is None and getattr(module, "bias", None) is not None:
            expected = expected + module.bias
        return found, expected.to(found.dtype)


@contextlib.contextmanager
def _without_norm(module: torch.nn.Module) -> Iterator[None]:
    """Context in which the norm of a layer is skipped, so that its input reaches the GEMM unchanged."""
    registered = registered_linear(module)
    names = () if registered is None else registered.norm_methods
    for name in names:
        module.__dict__[name] = lambda hidden: hidden
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]


def watch_use(model: torch.nn.Module | Sequence[torch.nn.Module]) -> None:
    """Makes the first training step prove that the host runs every quantized layer.

    This is the first schedule with gradients. Every layer must run there at least once over all micro-batches of its
    rank, in a forward pass: recompute in the backward pass does not count. Layers of experts that received no token are
    exempt, and named in a line that rank 0 prints. If a layer was not run, all ranks raise :class:`ProbeError` from the
    schedule. After that schedule nothing is watched.

    Args:
        model: a model, or all chunks of this rank, after :func:`apply_recipe`. Every rank has to call this, because the
            proof is collective over all of them.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    for chunk in chunks:
        chunk.__dict__[_WATCH] = _Watch(chunk)
    schedules.announce_schedules(on_start=_start_watching, on_trained=_prove_use)


class _Watch:
    """The layers of a model chunk that a schedule ran, and the number of tokens that its experts received."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        self.layers = [state for state, _ in ternary_modules(chunk)]
        self.tokens: dict[str, int] = {}
        self.over = False
        self.hooks = []
        for module in chunk.modules():
            experts = getattr(module, "local_experts", None)
            if isinstance(experts, torch.nn.ModuleList):
                count = functools.partial(self._count_tokens, [_expert_in(expert) for expert in experts])
                self.hooks.append(module.register_forward_pre_hook(count, with_kwargs=True))

    def _count_tokens(self, experts: list[str | None], module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Counts tokens before megatron-core's ``experts(hidden_states, tokens_per_expert, probabilities)``."""
        tokens = kwargs.get("tokens_per_expert", args[1] if len(args) > 1 else None)
        tokens = [] if tokens is None else torch.as_tensor(tokens).flatten().tolist()
        if len(tokens) == len(experts):
            for expert, received in zip(experts, tokens, strict=True):
                if expert is not None:
                    self.tokens[expert] = self.tokens.get(expert, 0) + int(received)

    def start(self) -> None:
        self.tokens.clear()
        for state in self.layers:
            state.used = False

    def stop(self) -> tuple[list[str], list[str]]:
        """Returns the layers that were not run, and separately the experts that were not because they had no token."""
        self.over = True
        for hook in self.hooks:
            hook.remove()
        unused: list[str] = []
        idle: list[str] = []
        for state in self.layers:
            if not state.used:
                expert = _expert_of(state.name)
                # An expert without a token count may have been bypassed together with its tokens.
                if expert is not None and self.tokens.get(expert) == 0:
                    idle.append(expert)
                else:
                    unused.append(state.name)
        return unused, list(dict.fromkeys(idle))


def _expert_of(layer: str) -> str | None:
    found = re.match(r".*\blocal_experts\.\d+", layer)
    return None if found is None else found.group()


def _expert_in(module: torch.nn.Module) -> str | None:
    """Returns the global path of an expert, or None if it has no quantized layers."""
    return next((_expert_of(state.name) for state, _ in ternary_modules(module)), None)


def _pending(chunks: Sequence[torch.nn.Module]) -> list[_Watch]:
    watches = [find_attached(chunk, _WATCH) for chunk in chunks]
    return [watch for watch in watches if watch is not None and not watch.over]


def _start_watching(chunks: Sequence[torch.nn.Module]) -> None:
    for watch in _pending(chunks):
        watch.start()


def _prove_use(chunks: Sequence[torch.nn.Module]) -> None:
    watches = _pending(chunks)
    if not watches:
        return
    found = [watch.stop() for watch in watches]
    unused, idle = _of_all_ranks(*([name for pair in found for name in pair[i]] for i in (0, 1)))
    if unused:
        raise ProbeError(
            "these layers are quantized, but the first training step never ran them, so that something computes with "
            "their latent weights (a fused MLP, an op fuser, fused adapters):\n  "
            + "\n  ".join(unused)
            + "\nSwitch it off, or keep them in full precision with --ternary-recipe"
        )
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        layers = sum(len(watch.layers) for watch in watches)
        exempt = f", but for experts that received no token: {', '.join(idle)}" if idle else ""
        print(f"use: the first training step ran the {layers} quantized layers of this rank{exempt}", flush=True)


def _of_all_ranks(unused: list[str], idle: list[str]) -> tuple[list[str], list[str]]:
    """Returns both lists over all ranks, without repetition and cut to a readable length; the same on each rank."""
    gathered = all_gathered((unused[: _NAMED + 1], idle[: _NAMED + 1]))
    found = [list(dict.fromkeys(name for pair in gathered for name in pair[i])) for i in (0, 1)]
    unused, idle = ([*names[:_NAMED], "..."] if len(names) > _NAMED else names for names in found)
    return unused, idle

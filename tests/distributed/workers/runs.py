# SPDX-License-Identifier: Apache-2.0
"""Runs the training loop several times in one set of processes, for the runs in ``runs.json``.

    name: {
        "argv": [...], the arguments of launch/pretrain.py
        "resave": "DIR or absent: directory in which to save at once what was loaded",
        "fused_mlp_on": the rank whose MLPs compute with their weights and never call their linears, or absent
        "fused": whether fused weight gradients are available, through the stand-in of tests/stubs/fusion
        "masked": whether different numbers of tokens count for the loss in different samples
        "digests": interval in steps, or absent: <name>.digests.rank<N>.json gets the losses of all steps, and digests
            of masters and of quantized weights at this interval
        "memory": whether to measure memory: its peak, and the bytes of quantized weights that remain between steps
        "bucket_size": elements of a bucket if gradient reduction is overlapped; absent: megatron-core's default
    }

Reports for each run its exit status, its standard error, the sizes of the messages of bytes that it gathered, the
number of fused weight gradients, how often each weight was quantized, and the measured memory. The quantized weights of
the first training forward, gathered over the tensor-parallel ranks, go to ``<name>.rank<N>.pt``.
"""

import contextlib
import functools
import importlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

# Imports are inside functions because the checkpoint writer's helper process imports this file at each save.


def gathered_weights(chunks) -> dict:
    """Returns unsharded quantized weights by global module path, with all rows of gate before all rows of up."""
    import torch
    from megatron.core import parallel_state

    from bitcpm_megatron.parallel import ternary_modules

    group = parallel_state.get_tensor_model_parallel_group()
    whole = {}
    for state, module in ternary_modules(chunks):
        quantized, _ = state.in_use(module.weight)
        parts = [torch.empty_like(quantized) for _ in range(group.size())]
        torch.distributed.all_gather(parts, quantized.contiguous(), group=group)
        if hasattr(module, "input_size_per_partition"):
            whole[state.name] = torch.cat(parts, 1)
        elif state.name.endswith("linear_fc1"):
            halves = [p.chunk(2) for p in parts]
            whole[state.name] = torch.cat([h[0] for h in halves] + [h[1] for h in halves])
        else:
            whole[state.name] = torch.cat(parts, 0)
    return whole


def unevenly_masked(tokens):
    """Returns a loss mask ``[samples, sequence]``; the first token of a sample decides how many of its tokens count."""
    import torch

    return (torch.arange(tokens.shape[1]) <= tokens[:, :1] % tokens.shape[1]).float()


def digest(tensors) -> str:
    """Returns a digest of the bytes of tensors, in their order."""
    import hashlib

    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests(step) -> dict:
    """Returns digests of this rank's masters and of the next step's quantized weights, wherever these are stored."""
    from bitcpm_megatron.parallel import ternary_modules

    for chunk in step.run.model.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    quantized = []
    for state, module in ternary_modules(step.run.model.bare):
        quantized.append(state.held(module.weight) if state.resident else state.quantize(module.weight)[0])
    masters = [master for group in step.run.optimizer.param_groups for master in group["params"]]
    return {"masters": digest(masters), "quantized": digest(quantized)}


def dense_bytes(step) -> int:
    """Returns the bytes of the largest bf16 storage in this process, except for parameters that are not quantized."""
    import gc

    import torch

    from bitcpm_megatron.parallel import ternary_modules

    quantized = {module.weight for _, module in ternary_modules(step.run.model.bare)}
    plain = {
        parameter.untyped_storage().data_ptr()
        for chunk in step.run.model.bare
        for parameter in chunk.parameters()
        if parameter not in quantized
    }
    # type() is used because isinstance() asks the object of a weak proxy, which may be gone.
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [found for found in gc.get_objects() if type(found) in kinds and found.dtype == torch.bfloat16]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return max((storage.nbytes() for storage in storages if storage.data_ptr() not in plain), default=0)


@contextlib.contextmanager
def waiting():
    """Waits for collectives before they return; otherwise the timing of gloo's threads would decide whether its copies
    are measured."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waiting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.namespace == "c10d" and ("reduce_scatter" in str(function) or "allgather" in str(function)):
                work = result[-1] if isinstance(result, tuple) else result
                torch._C._distributed_c10d.Work.unbox(work).wait()
            return result

    with Waiting():
        yield


@contextlib.contextmanager
def measured(here: bool):
    """Measures memory if ``here`` is true, into the yielded dictionary, which otherwise stays empty."""
    import torch

    from bitcpm_megatron.parallel.packed import bucket

    found: dict[str, int] = {}
    if not here:
        yield found
        return
    from steps.meters import memory

    # A block must be smaller than this small model.
    with mock.patch.object(bucket, "_BLOCK_ELEMENTS", 1 << 16), waiting(), memory(torch.device("cpu")) as bytes_:
        yield found
    found["peak"] = bytes_.peak


def train(
    argv: list[str], weights: Path, counts: list[int], interval: int | None = None, memory: dict | None = None
) -> None:
    """Trains like ``launch/pretrain.py``, but does not leave the process groups.

    Writes the quantized weights of the first step to ``weights``, and appends to ``counts`` how often each weight was
    quantized. ``interval`` and ``memory`` are the options "digests" and "memory" of a run.
    """
    import torch

    from bitcpm_megatron.launch.launcher import presets
    from bitcpm_megatron.parallel import ternary_modules
    from bitcpm_megatron.parallel.resident import find_resident
    from bitcpm_megatron.patches.megatron_core import schedules
    from bitcpm_megatron.training.flags import parse_args
    from bitcpm_megatron.training.initialize import initialize, world_size
    from bitcpm_megatron.training.loop import pretrain

    seen = []

    def keep_the_first(chunks):
        # The optimizer runs after the schedule and replaces these weights by those of the next step.
        if memory is None and not weights.exists():
            torch.save(gathered_weights(chunks), weights)

    def report(step):
        if memory is not None:
            memory["dense"] = max(memory.get("dense", 0), dense_bytes(step))
            memory["weights"] = sum(module.weight.numel() for _, module in ternary_modules(step.run.model.bare))
        if interval is None:
            return
        resident = find_resident(step.run.model.chunks[0])
        seen.append({"loss": step.loss, "grad_norm": step.grad_norm})
        if step.iteration % interval == 0:
            seen[-1] |= digests(step)
        of_all = {"steps": seen, "cut_groups": 0 if resident is None else resident.cut_groups}
        name = weights.name.replace(".rank", ".digests.rank")
        weights.with_name(name).with_suffix(".json").write_text(json.dumps(of_all))

    args = parse_args(presets.expand(argv), world_size())
    initialize(args)
    schedules.announce_schedules(on_trained=keep_the_first)
    try:
        run = pretrain(args, on_step=report)
    finally:
        schedules._listeners["trained"].remove(keep_the_first)
    counts += [state.count for state in run.model.states]


@contextlib.contextmanager
def resaving(directory: str | None):
    """Saves everything that is loaded again at once, to ``directory`` if one is given."""
    import argparse
    import dataclasses

    from bitcpm_megatron.training import checkpoint

    load = checkpoint.load

    def load_and_save(run, path):
        notes = load(run, path)
        again = argparse.Namespace(**{**vars(run.args), "save": directory})
        checkpoint.Saver(dataclasses.replace(run, args=again)).save()
        return notes

    with mock.patch.object(checkpoint, "load", load_and_save if directory else load):
        yield


@contextlib.contextmanager
def masking(here: bool):
    """Makes different numbers of tokens count in different samples, if ``here`` is true."""
    from bitcpm_megatron.training import data

    batches = data.batches

    def masked(*args):
        for batch in batches(*args):
            yield {**batch, "loss_mask": unevenly_masked(batch["tokens"])}

    with mock.patch.object(data, "batches", masked if here else batches):
        yield


@contextlib.contextmanager
def accumulating(here: bool):
    """Installs the stand-in for the gradient-accumulation GEMM, if ``here`` is true; yields its result shapes."""
    from megatron.core.tensor_parallel import layers

    calls = []
    if not here:
        yield calls
        return
    name, stubs = "fused_weight_gradient_mlp_cuda", str(Path(__file__).resolve().parents[2] / "stubs" / "fusion")
    sys.path.append(stubs)
    gemm = importlib.import_module(name)
    add = gemm.wgrad_gemm_accum_fp32

    def counting(*tensors):
        calls.append(tensors[-1].shape)
        add(*tensors)

    gemm.wgrad_gemm_accum_fp32 = counting
    try:
        with mock.patch.multiple(layers, create=True, _grad_accum_fusion_available=True, **{name: gemm}):
            yield calls
    finally:
        sys.path.remove(stubs)
        del sys.modules[name]


@contextlib.contextmanager
def fused_mlp(here: bool):
    """Replaces the forward of every MLP in this process by one like a host's fused kernels, if ``here`` is true."""
    import torch
    from megatron.core.transformer.mlp import MLP

    def forward(self, hidden, *args, **kwargs):
        # The computation has the shapes and collectives of the linears, but does not call them.
        up = torch.nn.functional.linear(hidden, self.linear_fc1.weight).chunk(2, -1)[0]
        return torch.nn.functional.linear(up, self.linear_fc2.weight), None

    with mock.patch.object(MLP, "forward", forward if here else MLP.forward):
        yield


@contextlib.contextmanager
def buckets_of(size: int | None):
    """Makes buckets small enough for a small model to have several, if a size is given."""
    from bitcpm_megatron.training import model

    made = model.DistributedDataParallelConfig

    def config(**fields):
        return made(**{**fields, "bucket_size": size} if fields["overlap_grad_reduce"] else fields)

    with mock.patch.object(model, "DistributedDataParallelConfig", config if size else made):
        yield


@contextlib.contextmanager
def gathered_bytes():
    """Yields a list that gets the sizes of all messages of bytes that are gathered."""
    import torch

    sizes = []
    gather = torch.distributed.all_gather_into_tensor

    def counting(everything, own, *args, **kwargs):
        if own.dtype == torch.uint8:
            sizes.append(own.numel())
        return gather(everything, own, *args, **kwargs)

    with mock.patch.object(torch.distributed, "all_gather_into_tensor", counting):
        yield sizes


def main(directory: Path) -> None:
    import torch
    from megatron.core import parallel_state
    from support.process_groups import free_models, leave_model_parallel

    from bitcpm_megatron import cli

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    report = {}
    for name, run in json.loads((directory / "runs.json").read_text()).items():
        errors, counts = io.StringIO(), []
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(errors))
            stack.enter_context(fused_mlp(run.get("fused_mlp_on") == rank))
            stack.enter_context(resaving(run.get("resave")))
            stack.enter_context(masking(run.get("masked", False)))
            accumulated = stack.enter_context(accumulating(run.get("fused", False)))
            weights = directory / f"{name}.rank{rank}.pt"
            stack.enter_context(buckets_of(run.get("bucket_size")))
            gathered = stack.enter_context(gathered_bytes())
            used = stack.enter_context(measured(run.get("memory", False)))
            more = (run.get("digests"), used if run.get("memory") else None)
            work = functools.partial(train, run["argv"], weights, counts, *more)
            try:
                status = cli.run(work)
            except SystemExit as leaving:
                status = leaving.code
        report[name] = {
            "status": status,
            "stderr": errors.getvalue(),
            "gathered": gathered,
            "fused": len(accumulated),
            "quantizations": counts,
            "memory": used,
        }
        if parallel_state.model_parallel_is_initialized():
            leave_model_parallel()
            free_models()
        # The report is written after each run, so that it exists if a later run ends the processes.
        (directory / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

# SPDX-License-Identifier: Apache-2.0
"""Runs ``launch/pretrain.py`` several times in one set of processes, as the dictionary in ``runs.json`` says:

    name: {
        "argv": [...],
        "resave": "DIR or absent: save here at once what was loaded",
        "fused_mlp_on": rank or absent: whose MLPs compute with their weights and never call their linears
        "masked": whether samples count for the loss with numbers of tokens that differ
    }

Reports each run's exit status and standard error, and writes the quantized weights that its first training forward
used, gathered over the tensor-parallel ranks, to ``<name>.rank<N>.pt``.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

# Imports stand where they are used: the checkpoint writer's helper process imports this file at each save.


def gathered_weights(model) -> dict:
    """Whole quantized weights by global module path, gate and up apart."""
    import torch
    from megatron.core import parallel_state

    from bitcpm_megatron.parallel import ternary_modules

    group = parallel_state.get_tensor_model_parallel_group()
    whole = {}
    for state, module in ternary_modules(model.bare):
        if state.quantized is None:
            continue
        parts = [torch.empty_like(state.quantized) for _ in range(group.size())]
        torch.distributed.all_gather(parts, state.quantized.contiguous(), group=group)
        if hasattr(module, "input_size_per_partition"):
            whole[state.name] = torch.cat(parts, 1)
        elif state.name.endswith("linear_fc1"):
            halves = [p.chunk(2) for p in parts]
            whole[state.name] = torch.cat([h[0] for h in halves] + [h[1] for h in halves])
        else:
            whole[state.name] = torch.cat(parts, 0)
    return whole


def unevenly_masked(tokens):
    """A loss mask ``[samples, sequence]`` that counts from one token of a sample to all, as its first token says."""
    import torch

    return (torch.arange(tokens.shape[1]) <= tokens[:, :1] % tokens.shape[1]).float()


def hook(loop, name: str, rank: int, directory: Path, resave: str | None, masked: bool) -> None:
    """Makes the loop's next run report its first quantized weights, save its checkpoint again, and mask tokens."""
    import argparse

    import torch

    build, forward_backward = loop.build_model.__wrapped__, loop._forward_backward.__wrapped__
    batches = loop.batches.__wrapped__
    load, built, steps = loop.checkpoint.load.__wrapped__, [], []

    def build_and_keep(*args):
        built.append(build(*args))
        return built[0]

    def forward_backward_and_report(*args):
        loss = forward_backward(*args)
        if not steps:
            torch.save(gathered_weights(built[0]), directory / f"{name}.rank{rank}.pt")
        steps.append(loss)
        return loss

    def load_and_save(args, path, model, optimizer, scheduler):
        result = load(args, path, model, optimizer, scheduler)
        if resave is not None:
            again = argparse.Namespace(**{**vars(args), "save": resave})
            loop.checkpoint.Saver(again, None).save(model, optimizer, scheduler, result[0])
        return result

    def batches_to_train_on(*args):
        for batch in batches(*args):
            yield {**batch, "loss_mask": unevenly_masked(batch["tokens"])} if masked else batch

    replace(loop, "batches", batches_to_train_on)
    replace(loop, "build_model", build_and_keep)
    replace(loop, "_forward_backward", forward_backward_and_report)
    replace(loop.checkpoint, "load", load_and_save)


@contextlib.contextmanager
def fused_mlp(here: bool):
    """What a host's fused kernels do, in the place of every MLP of this process."""
    import torch
    from megatron.core.transformer.mlp import MLP

    original = MLP.forward

    def forward(self, hidden, *args, **kwargs):
        # The linears' forms at these sizes, as far as shapes and collectives go.
        up = torch.nn.functional.linear(hidden, self.linear_fc1.weight).chunk(2, -1)[0]
        return torch.nn.functional.linear(up, self.linear_fc2.weight), None

    MLP.forward = forward if here else original
    try:
        yield
    finally:
        MLP.forward = original


def replace(owner, name: str, function) -> None:
    original = getattr(owner, name)
    function.__wrapped__ = getattr(original, "__wrapped__", original)
    setattr(owner, name, function)


def main(directory: Path) -> None:
    import torch
    from megatron.core import parallel_state
    from support.process_groups import leave_model_parallel

    from bitcpm_megatron.launch import pretrain as command
    from bitcpm_megatron.training import initialize, loop

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    initialize.shutdown = lambda: None
    replaced = ((loop, "batches"), (loop, "build_model"), (loop, "_forward_backward"), (loop.checkpoint, "load"))
    for owner, name in replaced:
        replace(owner, name, lambda *args: None)
    report = {}
    for name, run in json.loads((directory / "runs.json").read_text()).items():
        hook(loop, name, rank, directory, run.get("resave"), run.get("masked", False))
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), fused_mlp(run.get("fused_mlp_on") == rank):
                status = command.main(run["argv"])
        except SystemExit as leaving:
            status = leaving.code
        report[name] = {"status": status, "stderr": errors.getvalue()}
        if parallel_state.model_parallel_is_initialized():
            leave_model_parallel()
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

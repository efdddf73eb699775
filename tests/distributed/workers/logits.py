# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints as a tensor-parallel job over all ranks and writes their logits, for the cases in ``cases.json``.

    name: {"load": "DIR", "tokens": [[...]], "legacy": false}

``logits.pt``, written by rank 0, holds the logits by name, in fp32 ``[batch, tokens, vocabulary]``. A legacy checkpoint
is loaded with the bare model's own ``load_state_dict``, as in Megatron-LM.
"""

import argparse
import json
import sys
from pathlib import Path


def legacy_model(path: Path, rank: int):
    import torch

    from bitcpm_megatron.checkpoints.directory import saved_arguments
    from bitcpm_megatron.training.flags import defaults
    from bitcpm_megatron.training.initialize import initialize
    from bitcpm_megatron.training.model import build_model

    args = argparse.Namespace(**{**defaults(), **saved_arguments(path)})
    args.gradient_accumulation_fusion = False
    initialize(args)
    model = build_model(args, args.padded_vocab_size, with_ddp=False)
    name = f"mp_rank_{rank:02d}" if args.pipeline_model_parallel_size == 1 else f"mp_rank_00_{rank:03d}"
    # A context manager would also remove the globals that megatron-core itself has declared safe.
    torch.serialization.add_safe_globals([argparse.Namespace])
    state = torch.load(path / name / "model_optim_rng.pt", weights_only=True)
    model.bare[0].load_state_dict(state["model"], strict=True)
    return args, model


def forward(args, chunk, tokens, positions):
    """Returns the logits of a model, or of two pipeline stages (then only on rank 0)."""
    import torch

    if args.pipeline_model_parallel_size == 1:
        return chunk(tokens, positions, None)
    hidden = torch.empty(tokens.shape[1], tokens.shape[0], args.hidden_size)
    logits = torch.empty(*tokens.shape, args.padded_vocab_size)
    if torch.distributed.get_rank() == 0:
        torch.distributed.send(chunk(tokens, positions, None), 1)
        torch.distributed.recv(logits, 1)
    else:
        torch.distributed.recv(hidden, 0)
        chunk.set_input_tensor(hidden)
        torch.distributed.send(chunk(tokens, positions, None).contiguous(), 0)
    return logits


def main(directory: Path) -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from bitcpm_megatron.checkpoints.directory import latest
    from bitcpm_megatron.inference.megatron_run import load_for_inference

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        if case.get("legacy"):
            args, model = legacy_model(Path(case["load"]) / "release", rank)
        else:
            args, model = load_for_inference(latest(case["load"]), fp32=True)
        tokens = torch.tensor(case["tokens"])
        positions = torch.arange(tokens.shape[1]).unsqueeze(0).expand_as(tokens)
        with torch.no_grad():
            logits = forward(args, model.chunks[0].eval(), tokens, positions)
        group = parallel_state.get_tensor_model_parallel_group()
        if args.pipeline_model_parallel_size == 1:
            logits = gather_from_tensor_model_parallel_region(logits, group=group)
        found[name] = logits[..., : args.vocab_size].float().clone()
        parallel_state.destroy_model_parallel()
    if rank == 0:
        torch.save(found, directory / "logits.pt")
    (directory / f"rank{rank}.json").write_text("{}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

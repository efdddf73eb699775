# SPDX-License-Identifier: Apache-2.0
"""Generates tokens with models in two ways, with a key-value cache and without one, for the cases in ``cases.json``.

    name: {"argv": ["--num-layers", ...], "tokens": [...], "prompt": 5} or {"load": "DIR", ...}

A model built from a command line has random weights; a checkpoint is loaded, over all ranks. ``found.pt``, written by
rank 0, holds by name: the logits of both ways ``[positions, rows of the vocabulary]`` in fp32, the greedy texts of both
ways, and how often each layer was quantized.
"""

import json
import sys
from pathlib import Path


def main(directory: Path) -> None:
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        args, model = opened(case)
        found[name] = asked(args, model, case["tokens"], case["prompt"])
        parallel_state.destroy_model_parallel()
    if rank == 0:
        torch.save(found, directory / "found.pt")
    (directory / f"rank{rank}.json").write_text("{}")
    torch.distributed.destroy_process_group()


def opened(case: dict) -> tuple:
    import torch

    from bitcpm_megatron.checkpoints.directory import latest
    from bitcpm_megatron.data.vocabulary import padded_vocab_size
    from bitcpm_megatron.inference.megatron_run import load_for_inference
    from bitcpm_megatron.nn.cache import hold_weights
    from bitcpm_megatron.training.flags import parse_args
    from bitcpm_megatron.training.initialize import initialize
    from bitcpm_megatron.training.model import build_model

    if "load" in case:
        return load_for_inference(latest(case["load"]), fp32=True)
    args = parse_args(case["argv"], torch.distributed.get_world_size())
    args.gradient_accumulation_fusion = False
    initialize(args)
    rows = padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    model = build_model(args, rows, with_ddp=False)
    with torch.no_grad():
        for name, parameter in model.bare[0].named_parameters():
            # With its initial weights, a model would only repeat the last token.
            if "linear" in name or "experts" in name:
                parameter.mul_(8.0)
    for chunk in model.chunks:
        chunk.eval()
    hold_weights(model.bare)
    return args, model


def asked(args, model, tokens: list[int], prompt: int) -> dict:
    import torch

    from bitcpm_megatron.inference.generate import NextToken, generate
    from bitcpm_megatron.inference.megatron_run import MegatronNextToken

    margins = []

    class Whole(NextToken):
        """A model that computes the whole text for every token, and records the margin between the two likeliest
        tokens, relative to the largest logit."""

        def logits(self, tokens):
            logits = torch.from_numpy(whole(model, tokens)[-1])
            first, second = logits[: args.vocab_size].topk(2).values
            margins.append(float((first - second) / logits.abs().max()))
            return logits

        def _forward(self, tokens, kept):
            raise NotImplementedError

    cached = MegatronNextToken(model, args.seq_length)
    before = [state.count for state in model.states]
    # The prompt as a whole, then tokens one by one, and finally several other tokens at once from the middle on, like
    # the next turn of a conversation.
    positions = list(range(prompt, len(tokens) + 1))
    logits = [cached.logits(tokens[:end]) for end in positions]
    again = cached.logits([*tokens[: prompt - 2], *reversed(tokens[prompt - 2 :])])
    count = args.seq_length + 3 - prompt
    said = {
        kind: list(generate(asks, tokens[:prompt], count, args.seq_length, args.vocab_size))
        for kind, asks in {"cached": cached, "whole": Whole()}.items()
    }
    turned = [*tokens[: prompt - 2], *reversed(tokens[prompt - 2 :])]
    return {
        "cached": torch.stack([*logits, again]).float().clone(),
        "whole": torch.stack(
            [torch.from_numpy(whole(model, tokens[:end])[-1]) for end in positions]
            + [torch.from_numpy(whole(model, turned)[-1])]
        ),
        "said": said,
        "margins": margins,
        "quantized": [state.count - start for state, start in zip(model.states, before, strict=True)],
    }


def whole(model, tokens: list[int]):
    """Returns the logits of all positions ``[tokens, rows of the vocabulary]``, computed without a cache."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    inputs = torch.tensor([tokens])
    with torch.no_grad():
        logits = model.chunks[0](inputs, torch.arange(len(tokens)).unsqueeze(0), None)
        logits = gather_from_tensor_model_parallel_region(
            logits, group=parallel_state.get_tensor_model_parallel_group()
        )
    return logits[0].float().numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

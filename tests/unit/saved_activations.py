# SPDX-License-Identifier: Apache-2.0
"""Prints the bytes that our loop's model saves for its backward, and what ``launch/estimates/memory.py`` expects.

    python tests/unit/saved_activations.py FLAGS_OF_PRETRAIN

The flags are those of ``launch/pretrain.py``.
"""

import json
import sys

import torch

from bitcpm_megatron.data.vocabulary import padded_vocab_size
from bitcpm_megatron.launch.estimates.memory import estimate, options_of
from bitcpm_megatron.launch.estimates.shapes import layout_of, recipe_of
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.initialize import initialize
from bitcpm_megatron.training.model import build_model


def main() -> None:
    """Runs one forward pass in this process, and prints both numbers."""
    args = parse_args(presets.expand(sys.argv[1:]), 1)
    initialize(args)
    padded = padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by)
    model = build_model(args, padded, with_ddp=False)
    weights = {p.untyped_storage().data_ptr() for p in model.bare[0].parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The storage is kept alive, because another tensor could otherwise get its address later.
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, args.vocab_size, (args.micro_batch_size, args.seq_length))
    positions = torch.arange(args.seq_length).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model.chunks[0](tokens, positions, None, labels=tokens)
    layout = layout_of(args, 1, args.vocab_size)
    options = options_of(args, cpu=True, recipe=recipe_of(args) if args.ternary else None)
    _, need = estimate(layout, options)
    # The quantized weights are saved for the backward; the logits are saved only in fp32, not in the dtype of the
    # model.
    expected = need.activations + need.logits + need.quantized - options.size * layout.tokens * padded
    print(json.dumps({"saved": sum(s.nbytes() for s in saved.values()), "expected": expected}))


if __name__ == "__main__":
    main()

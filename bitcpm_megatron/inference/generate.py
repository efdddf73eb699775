# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model: plain sampling, one full forward per token. For looking at a model, not for serving it."""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from ..data.vocabulary import padded_vocab_size
from ..training.checkpoint import trained_model
from ..training.flags import arguments_of
from ..training.initialize import device, initialize, world_size
from ..training.model import Model


def load_for_inference(path: Path, fp32: bool = False) -> tuple[argparse.Namespace, Model]:
    """The arguments of the run that wrote a checkpoint, and its model: ternary where it was, over all processes of this
    job as tensor-parallel ranks.

    Args:
        path: an iteration directory, or a release.
        fp32: compute in fp32, with the same weights, also where the run did not.

    Raises:
        ValueError: this number of processes does not fit the model or its row-parallel shards, or what the checkpoint
            says of its run cannot be.
    """
    args = arguments_of(path, world_size())
    args.bf16 = args.bf16 and not fp32
    initialize(args)
    vocabulary = padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    return args, trained_model(args, path, vocabulary)


@torch.inference_mode()
def generate(
    model: Model,
    prompt: list[int],
    count: int,
    context: int,
    vocab_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Collection[int] = (),
) -> list[int]:
    """The next ``count`` tokens of a prompt, or fewer where one of ``ends`` comes, which is then the last of them.

    Every tensor-parallel rank must call this alike, and gets the same.

    Args:
        model: from :func:`load_for_inference`.
        prompt: token ids, at least one.
        context: longest input of the model; earlier tokens are dropped.
        vocab_size: without padding; padded entries are never drawn.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
        ends: ids of tokens behind which nothing is drawn.

    Raises:
        ValueError: a prompt without tokens, or with one that is none of the vocabulary.
    """
    if not prompt or not all(0 <= token < vocab_size for token in prompt):
        raise ValueError(f"a prompt of {len(prompt)} tokens: give one or more, from 0 to {vocab_size - 1}")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        inputs = torch.tensor([tokens[-context:]], device=device())
        positions = torch.arange(inputs.shape[1], device=device()).unsqueeze(0)
        logits = model.chunks[0](inputs, positions, None)[:, -1]
        logits = gather_from_tensor_model_parallel_region(
            logits, group=parallel_state.get_tensor_model_parallel_group()
        )
        logits = logits[0, :vocab_size].double().cpu()
        if temperature > 0:
            # Of the differences to the largest: however small the temperature is, that one is no infinity.
            likelihood = ((logits - logits.max()) / temperature).softmax(-1)
            token = int(torch.multinomial(likelihood, 1, generator=generator))
        else:
            token = int(logits.argmax())
        tokens.append(token)
        if token in ends:
            break
    return tokens[len(prompt) :]

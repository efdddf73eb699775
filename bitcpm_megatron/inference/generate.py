# SPDX-License-Identifier: Apache-2.0
"""Text from a trained model: plain sampling, one full forward per token. For looking at a model, not for serving it."""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from ..checkpoints.directory import saved_arguments
from ..data.vocabulary import padded_vocab_size
from ..models.architecture import uneven
from ..quantization.recipe import Recipe
from ..quantization.record import QuantizerRecord
from ..training import checkpoint
from ..training.flags import recorded
from ..training.initialize import device, initialize, world_size
from ..training.mistakes import ffn_channels
from ..training.model import Model, build_model


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
    args = recorded(saved_arguments(path), str(path))
    args.tensor_model_parallel_size = world_size()
    args.pipeline_model_parallel_size = args.data_parallel_size = args.context_parallel_size = 1
    args.num_virtual_stages_per_pipeline_rank = None
    args.sequence_parallel = False
    args.gradient_accumulation_fusion = False
    args.bf16 = args.bf16 and not fp32
    # The same model to within rounding, at every tensor-parallel size, in fp32, and without the op.
    args.ternary_gemm = args.ternary_gemm_backward = "bf16"
    record = QuantizerRecord.read(path)
    # Fused weights are ternary already.
    args.ternary = False
    if record is not None and record.state == "latent":
        args.ternary = True
        args.ternary_recipe = Recipe.of(record)
        args.ternary_row_parallel_shards = record.row_parallel_shards
        args.ternary_activation_bits = record.activation_bits
    channels = (args.num_experts and args.moe_ffn_hidden_size) or ffn_channels(args)
    found = uneven({"query groups": args.num_query_groups, "ffn channels": channels}, world_size())
    if found is not None:
        raise ValueError(f"{world_size()} processes do not divide the model's {found}")
    if args.vocab_size is None:
        raise ValueError(f"{path} does not say how large its vocabulary is")
    initialize(args)
    vocabulary = padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    model = build_model(args, vocabulary, with_ddp=False)
    checkpoint.load_weights(path, model)
    model.chunks[0].eval()
    return args, model


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

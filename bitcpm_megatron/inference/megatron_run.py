# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a training run, to be asked: its model over all tensor-parallel ranks, its cache, its tokenizer."""

import argparse
from pathlib import Path

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from ..checkpoints.directory import check_ends, kept_tokenizer
from ..data.tokenizers import Tokenizer
from ..data.vocabulary import padded_vocab_size
from ..nn.cache import hold_weights
from ..training.checkpoint import trained_model
from ..training.data import build_tokenizer
from ..training.flags import arguments_of
from ..training.initialize import device, initialize, world_size
from ..training.model import Model
from .generate import NextToken


def load_for_inference(path: Path, fp32: bool = False, stages: int = 1) -> tuple[argparse.Namespace, Model]:
    """The arguments of the run that wrote a checkpoint, and its model: ternary where it was, over all processes of this
    job as tensor-parallel ranks of some stages. Every weight is quantized once, whatever ``--ternary-cache`` it had.

    Args:
        path: an iteration directory, or a release.
        fp32: compute in fp32, with the same weights, also where the run did not.
        stages: of the pipeline.

    Raises:
        ValueError: this number of processes or stages does not fit the model or its row-parallel shards, or what the
            checkpoint says of its run cannot be.
    """
    if world_size() % stages:
        raise ValueError(f"{world_size()} processes cannot be split into {stages} pipeline stages")
    args = arguments_of(path, world_size() // stages)
    if args.num_layers % stages:
        raise ValueError(f"{path}: {stages} pipeline stages do not divide the model's {args.num_layers} layers")
    args.pipeline_model_parallel_size = stages
    args.bf16 = args.bf16 and not fp32
    args.ternary_cache, args.ternary_verify_cache = "step", False
    initialize(args)
    vocabulary = padded_vocab_size(args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    model = trained_model(args, path, vocabulary)
    hold_weights(model.bare)
    return args, model


def context_of(run: argparse.Namespace) -> int:
    """The tokens that a run's model was trained with: its longest input."""
    return int(run.seq_length if hasattr(run, "seq_length") else run.max_position_embeddings)


class MegatronNextToken(NextToken):
    """megatron-core's ``StaticInferenceContext`` as the cache of a run's model; every rank must ask alike.

    Args:
        model: of :func:`load_for_inference`, without pipeline stages.
        context: tokens for which the cache has room.
    """

    def __init__(self, model: Model, context: int) -> None:
        rope = getattr(model.bare[0], "rotary_pos_emb", None)
        super().__init__(getattr(getattr(rope, "rope", rope), "original_length", None))
        self._chunk = model.chunks[0]
        self._cache = StaticInferenceContext(1, context)

    def _forward(self, tokens: list[int], kept: int) -> torch.Tensor:
        self._cache.sequence_len_offset = kept
        inputs = torch.tensor([tokens[kept:]], device=device())
        positions = torch.arange(kept, len(tokens), device=device()).unsqueeze(0)
        # megatron-core asserts that logits are gathered wherever there is a context.
        logits = self._chunk(inputs, positions, None, inference_context=self._cache, runtime_gather_output=True)
        return logits[0, -1]


def tokenizer_of(run: argparse.Namespace, path: Path, given: str | None = None, kind: str | None = None) -> Tokenizer:
    """The run's tokenizer, that which came with a converted checkpoint, or another file that can be it.

    Args:
        run: its arguments, from :func:`load_for_inference`.
        path: its checkpoint.
        given: a tokenizer to take in the place of the run's.
        kind: of :data:`~..data.vocabulary.TOKENIZER_TYPES`, where one is given; None for what it holds.

    Raises:
        ValueError: there is none, or one of another size, whose pieces stand for other rows of the embedding.
    """
    recorded, trained = run.tokenizer_model, run.vocab_size
    if run.mock_data and given is not None:
        raise ValueError(f"{path} was trained on mock data, whose tokens are numbers: leave out --tokenizer-model")
    kept = kept_tokenizer(path)
    if given is not None:
        run.tokenizer_model, run.tokenizer_type = given, kind
    elif kept is not None:
        run.tokenizer_model, run.tokenizer_type = str(kept), None
    if run.tokenizer_model is None and not run.mock_data:
        raise ValueError(f"{path} does not say which tokenizer it is for: give --tokenizer-model PATH")
    # A run may have more rows than its own tokenizer has pieces (--vocab-size); with another file that is a mistake.
    if not run.mock_data:
        run.vocab_size = None
    # By content, which a checkpoint from before there were identities does not tell.
    trained_with = getattr(run, "tokenizer_identity", None)
    tokenizer, _ = build_tokenizer(run)
    if trained_with not in (None, run.tokenizer_identity):
        raise ValueError(f"{path} was trained with another tokenizer than {run.tokenizer_model}: give its own")
    if not run.mock_data:
        check_ends(path, tokenizer.eod, run.tokenizer_model)
    pieces = tokenizer.vocab_size
    # Published models have their rows padded already, and say how many; a run of ours says how many pieces it had.
    multiple = run.make_vocab_size_divisible_by if recorded is None else 1
    other = given is not None and given != recorded
    if pieces > trained or (other and padded_vocab_size(pieces, multiple) < trained):
        raise ValueError(
            f"the tokenizer {run.tokenizer_model} has {pieces:,} pieces, and {path} was trained for {trained:,}: give "
            f"the run's own --tokenizer-model" + (f" ({recorded})" if recorded else "")
        )
    return tokenizer

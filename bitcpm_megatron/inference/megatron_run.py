# SPDX-License-Identifier: Apache-2.0
"""Inference from a training run's checkpoint: its model over all tensor-parallel ranks, its cache and its tokenizer."""

import argparse
from pathlib import Path

import torch

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
    """Loads a checkpoint for inference; returns the arguments of the run that wrote it, and its model.

    The model is ternary if the run's was. All processes of this job become tensor-parallel ranks of the pipeline
    stages. Every weight is quantized once, whatever ``--ternary-cache`` the run had.

    Args:
        path: an iteration directory, or a release.
        fp32: whether to compute in fp32, with the same weights, even if the run did not.
        stages: the number of pipeline stages.

    Raises:
        ValueError: if this number of processes or stages does not fit the model or its row-parallel shards, or the
            checkpoint records impossible arguments.
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
    """Returns the longest input of a run's model, in tokens: the sequence length that it was trained with."""
    return int(run.seq_length if hasattr(run, "seq_length") else run.max_position_embeddings)


class MegatronNextToken(NextToken):
    """A run's model with megatron-core's ``StaticInferenceContext`` as its cache; every rank must call it alike.

    Args:
        model: the model from :func:`load_for_inference`, with one pipeline stage.
        context: the number of tokens for which the cache has room.
    """

    def __init__(self, model: Model, context: int) -> None:
        rope = getattr(model.bare[0], "rotary_pos_emb", None)
        super().__init__(getattr(getattr(rope, "rope", rope), "original_length", None))
        # Not at the top: megatron-core must be imported after bitcpm_megatron.training, which prepares its import.
        from megatron.core.inference.contexts import StaticInferenceContext

        self._chunk = model.chunks[0]
        self._cache = StaticInferenceContext(1, context)

    def _forward(self, tokens: list[int], kept: int) -> torch.Tensor:
        self._cache.sequence_len_offset = kept
        inputs = torch.tensor([tokens[kept:]], device=device())
        positions = torch.arange(kept, len(tokens), device=device()).unsqueeze(0)
        # megatron-core asserts that logits are gathered if there is an inference context.
        logits = self._chunk(inputs, positions, None, inference_context=self._cache, runtime_gather_output=True)
        return logits[0, -1]


def tokenizer_of(run: argparse.Namespace, path: Path, given: str | None = None, kind: str | None = None) -> Tokenizer:
    """Opens the tokenizer of a run: the given one, that of a converted checkpoint, or the one that the run recorded.

    Args:
        run: the arguments of the run from :func:`load_for_inference`; they get the path of the tokenizer.
        path: the checkpoint of the run.
        given: the path of a tokenizer to use instead of the run's; it must be equivalent.
        kind: the type of the given tokenizer, one of :data:`~..data.vocabulary.TOKENIZER_TYPES`; None to detect it.

    Raises:
        ValueError: if there is no tokenizer, or it differs from the run's, so that its pieces would belong to other
            rows of the embedding.
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
    # Tokenizers are compared by content, except for checkpoints that record no tokenizer_identity.
    trained_with = getattr(run, "tokenizer_identity", None)
    tokenizer, _ = build_tokenizer(run)
    if trained_with not in (None, run.tokenizer_identity):
        raise ValueError(f"{path} was trained with another tokenizer than {run.tokenizer_model}: give its own")
    if not run.mock_data:
        check_ends(path, tokenizer.eod, run.tokenizer_model)
    pieces = tokenizer.vocab_size
    # A published model records its number of rows, padding included; a run of ours records its number of pieces.
    multiple = run.make_vocab_size_divisible_by if recorded is None else 1
    other = given is not None and given != recorded
    if pieces > trained or (other and padded_vocab_size(pieces, multiple) < trained):
        raise ValueError(
            f"the tokenizer {run.tokenizer_model} has {pieces:,} pieces, and {path} was trained for {trained:,}: give "
            f"the run's own --tokenizer-model" + (f" ({recorded})" if recorded else "")
        )
    return tokenizer

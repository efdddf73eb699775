# SPDX-License-Identifier: Apache-2.0
"""Samples text from a checkpoint: ``torchrun --nproc_per_node TP launch/generate.py --load DIR --prompt TEXT``.

A ternary checkpoint computes with its ternary weights. Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bitcpm_megatron.training.checkpoint_directory import CheckpointError, latest
from bitcpm_megatron.training.data import build_tokenizer
from bitcpm_megatron.training.generate import generate, load_for_inference
from bitcpm_megatron.training.initialize import shutdown


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a bad one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--load", required=True, metavar="DIR", help="the --save directory of a run")
    parser.add_argument("--prompt", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="SentencePiece model, default the run's")
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.num_tokens < 1 or args.temperature < 0:
        parser.error("--num-tokens must be 1 or more, and --temperature 0 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Prints one continuation per prompt on rank 0; returns the exit status."""
    args = parse_arguments(argv)
    try:
        path = latest(args.load)
        if path is None:
            raise ValueError(f"no checkpoint in {args.load}")
        run, model = load_for_inference(path)
        run.tokenizer_model = args.tokenizer_model or run.tokenizer_model
        if run.tokenizer_model is None and not run.mock_data:
            raise ValueError(f"{path} does not say which tokenizer it is for: give --tokenizer-model FILE")
        tokenizer, _ = build_tokenizer(run)
        context = run.seq_length if hasattr(run, "seq_length") else run.max_position_embeddings
        for prompt in args.prompt:
            ids = tokenizer.tokenize(prompt)
            if not ids:
                raise ValueError(f"the prompt {prompt!r} has no token")
            new = generate(model, ids, args.num_tokens, context, tokenizer.vocab_size, args.temperature, args.seed)
            if torch.distributed.get_rank() == 0:
                print(tokenizer.detokenize(ids + new), flush=True)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

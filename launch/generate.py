# SPDX-License-Identifier: Apache-2.0
"""Text generation with a model: ``python launch/generate.py PATH --prompt TEXT``.

PATH is the ``--save`` directory of a run or one checkpoint in it, a Hugging Face directory of dense weights, or a
compressed-tensors export. A run is opened on all processes of the job (``torchrun --nproc_per_node TP``). Ternary
models compute with their ternary weights. With ``--chat``, prompts are messages of a user, and only the answers are
printed.


Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bitcpm_megatron import cli
from bitcpm_megatron.data.vocabulary import TOKENIZER_TYPES
from bitcpm_megatron.files import directory_mistake, write_text
from bitcpm_megatron.inference.generate import generate
from bitcpm_megatron.inference.streaming import TextStream
from bitcpm_megatron.inference.text_model import TextModel, is_first_rank, open_questioner, open_text_model


def main(argv: list[str] | None = None) -> int:
    """Prints one continuation per prompt on rank 0; returns the exit status."""
    parser = cli.Parser(description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--prompt", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="ask by the tokenizer's chat template; answers alone")
    parser.add_argument("--num-tokens", type=cli.Whole(1, 2**20), default=64, help="at most")
    parser.add_argument(
        "--stop-at-end", action="store_true", help="of a document; --chat stops at the end of an answer"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON Lines of prompt, text and whether the model ended it"
    )
    args = parser.parse_args(argv)
    if args.chat_template is not None and not args.chat:
        parser.error("--chat-template needs --chat")
    check_model_flags(parser, args)
    if args.output is not None and (mistake := directory_mistake(args.output.parent)) is not None:
        parser.error(f"--output {args.output}: {mistake}")
    return cli.run(lambda: _generate(args))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags shared by all commands that ask a model."""
    parser.add_argument("path", type=Path, metavar="PATH", help="a run, a Hugging Face directory or a packed export")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="default the model's")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: what --tokenizer-model holds")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="in Jinja, default the tokenizer's own")
    parser.add_argument("--temperature", type=cli.Number(0, 1000), default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=cli.Whole(0, 2**32 - 1), default=0)
    parser.add_argument("--fp32", action="store_true", help="compute in fp32, with the same weights")


def check_model_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a parser error if the model flags contradict each other."""
    if args.tokenizer_type is not None and args.tokenizer_model is None:
        parser.error("--tokenizer-type says what --tokenizer-model is: give both")


def _generate(args: argparse.Namespace) -> None:
    model = open_text_model(
        args.path, fp32=args.fp32, tokenizer=args.tokenizer_model, tokenizer_type=args.tokenizer_type
    )
    tokenizer = model.tokenizer
    questioner = open_questioner(model, args.chat_template) if args.chat else None
    ends = model.ends | questioner.ends if questioner is not None else model.ends if args.stop_at_end else frozenset()
    lines = []
    for prompt in args.prompt:
        ids = tokenizer.tokenize(prompt) if questioner is None else questioner.ask(prompt)
        if not ids:
            raise ValueError(f"--prompt {prompt!r} has no token")
        if len(ids) > model.context:
            raise ValueError(
                f"a prompt has {len(ids):,} tokens, and the model's context is {model.context:,}: give a shorter one"
            )
        new = _said(model, ids, [] if args.chat else ids, args, ends)
        text = tokenizer.detokenize(new if args.chat else ids + new)
        lines.append(json.dumps({"prompt": prompt, "text": text, "ended": new[-1] in ends}) + "\n")
    if args.output is not None and is_first_rank():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, "".join(lines))
    model.close()


def _said(
    model: TextModel, prompt: list[int], shown: list[int], args: argparse.Namespace, ends: frozenset[int]
) -> list[int]:
    """Generates and returns the tokens after a prompt; rank 0 prints ``shown`` and then the new tokens as they come."""
    stream, new, generator = TextStream(model.tokenizer), list[int](), torch.Generator().manual_seed(args.seed)

    def show(text: str) -> None:
        if is_first_rank():
            print(text, end="", flush=True)

    show("".join(map(stream.put, shown)))
    vocabulary = model.tokenizer.vocab_size
    for token in generate(
        model.tokens, prompt, args.num_tokens, model.context, vocabulary, args.temperature, generator, ends
    ):
        new.append(token)
        show(stream.put(token))
    show(stream.end() + "\n")
    return new


if __name__ == "__main__":
    sys.exit(main())

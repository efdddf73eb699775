# SPDX-License-Identifier: Apache-2.0
"""Samples text from a checkpoint: ``torchrun --nproc_per_node TP launch/generate.py --load DIR --prompt TEXT``.

A ternary checkpoint computes with its ternary weights. With ``--chat`` prompts are what a user says, and answers are
printed alone. Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    # From a bare checkout the package stands two levels up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bitcpm_megatron import cli
from bitcpm_megatron.checkpoints.directory import check_ends, kept_tokenizer, latest
from bitcpm_megatron.data.sft.chat_template import open_chat_template, require_chat_tokenizer
from bitcpm_megatron.data.sft.questions import Questioner
from bitcpm_megatron.data.tokenizers import Tokenizer
from bitcpm_megatron.data.vocabulary import TOKENIZER_TYPES, padded_vocab_size
from bitcpm_megatron.files import directory_mistake, write_text
from bitcpm_megatron.inference.generate import generate, load_for_inference
from bitcpm_megatron.training.data import build_tokenizer
from bitcpm_megatron.training.initialize import shutdown, world_size


def main(argv: list[str] | None = None) -> int:
    """Prints one continuation per prompt on rank 0; returns the exit status."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--load", required=True, metavar="DIR", help="the --save directory of a run")
    parser.add_argument("--prompt", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="default the run's")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="default: what --tokenizer-model holds")
    parser.add_argument("--chat", action="store_true", help="ask by the tokenizer's chat template; answers alone")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="in Jinja, default the tokenizer's own")
    parser.add_argument("--num-tokens", type=cli.Whole(1, 2**20), default=64, help="at most")
    parser.add_argument(
        "--stop-at-end", action="store_true", help="of a document; --chat stops at the end of an answer"
    )
    parser.add_argument("--temperature", type=cli.Number(0, 1000), default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=cli.Whole(0, 2**32 - 1), default=0)
    parser.add_argument("--fp32", action="store_true", help="compute in fp32, with the same weights")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON Lines of prompt, text and whether the model ended it"
    )
    args = parser.parse_args(argv)
    if args.chat_template is not None and not args.chat:
        parser.error("--chat-template needs --chat")
    if args.tokenizer_type is not None and args.tokenizer_model is None:
        parser.error("--tokenizer-type says what --tokenizer-model is: give both")
    if args.output is not None and (mistake := directory_mistake(args.output.parent)) is not None:
        parser.error(f"--output {args.output}: {mistake}")
    return cli.run(lambda: _generate(args))


def _generate(args: argparse.Namespace) -> None:
    world_size()
    path = latest(args.load)
    if path is None:
        raise ValueError(f"--load {args.load}: there is no checkpoint")
    run, model = load_for_inference(path, args.fp32)
    tokenizer = _tokenizer(run, args.tokenizer_model, args.tokenizer_type, path)
    questioner = _questioner(tokenizer, args.chat_template, path) if args.chat else None
    ends = questioner.ends if questioner is not None else {tokenizer.eod} if args.stop_at_end else set()
    context = run.seq_length if hasattr(run, "seq_length") else run.max_position_embeddings
    lines = []
    for prompt in args.prompt:
        ids = tokenizer.tokenize(prompt) if questioner is None else questioner.ask(prompt)
        if not ids:
            raise ValueError(f"--prompt {prompt!r} has no token")
        new = generate(model, ids, args.num_tokens, context, tokenizer.vocab_size, args.temperature, args.seed, ends)
        text = tokenizer.detokenize(ids + new if questioner is None else new)
        lines.append(json.dumps({"prompt": prompt, "text": text, "ended": new[-1] in ends}) + "\n")
        if torch.distributed.get_rank() == 0:
            print(text, flush=True)
    if args.output is not None and torch.distributed.get_rank() == 0:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, "".join(lines))
    shutdown()


def _questioner(tokenizer: Tokenizer, template: Path | None, checkpoint: Path) -> Questioner:
    chats = require_chat_tokenizer(tokenizer, f"the tokenizer of {checkpoint}")
    return Questioner(chats, open_chat_template(chats, template))


def _tokenizer(run: argparse.Namespace, given: str | None, kind: str | None, path: Path) -> Tokenizer:
    """The run's tokenizer, that which came with a converted checkpoint, or another file that can be it.

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


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model on a terminal: ``python launch/chat.py PATH``.

PATH is the ``--save`` directory of a run or one checkpoint in it, a Hugging Face directory of dense weights, or a
compressed-tensors export. Its tokenizer needs a chat template. Every line of standard input is one message of the user.
``/new`` begins another conversation; ``/exit`` or the end of the input ends the command. Ctrl-C stops an answer, of
which the conversation keeps what was written so far; at the prompt it discards the line typed so far.

Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.inference.conversation import Conversation
from bitcpm_megatron.inference.text_model import open_questioner, open_text_model
from bitcpm_megatron.launch.generate import add_model_flags, check_model_flags

_NEW, _EXIT = "/new", "/exit"


def main(argv: list[str] | None = None) -> int:
    """Runs conversations until the input ends; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="what every conversation begins with, as the system says")
    parser.add_argument("--num-tokens", type=cli.Whole(1, 2**20), default=512, help="of an answer, at most")
    args = parser.parse_args(argv)
    check_model_flags(parser, args)
    return cli.run(lambda: _chat(args))


def _chat(args: argparse.Namespace) -> None:
    if cli.from_environment("WORLD_SIZE", cli.Whole(1, 2**20), 1) > 1:
        raise ValueError(
            "a chat runs in one process: start it without torchrun. A run that needs more is asked by "
            "torchrun --nproc_per_node TP launch/generate.py PATH --chat"
        )
    model = open_text_model(
        args.path, fp32=args.fp32, tokenizer=args.tokenizer_model, tokenizer_type=args.tokenizer_type
    )
    questioner = open_questioner(model, args.chat_template)

    def begin() -> Conversation:
        return Conversation(model, questioner, args.system, args.num_tokens, args.temperature, args.seed)

    conversation = begin()
    for line in _lines():
        if line == _NEW:
            conversation = begin()
        else:
            _answer(conversation, line)
    model.close()


def _lines() -> Iterator[str]:
    """Yields the messages of the user, line by line."""
    # Lines that are not UTF-8 get through here: the tokenizer refuses them one at a time.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    at_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print(f"\n({_EXIT} or Ctrl-D ends)", flush=True)
            continue
        if line == _EXIT:
            return
        if line:
            yield line


def _answer(conversation: Conversation, line: str) -> None:
    """Prints the answer to a line while it is generated."""
    with _interruptible() as interrupted:
        try:
            parts = conversation.say(line)
        except ValueError as error:
            cli.complain(f"{error} ({_NEW})")
            return
        try:
            for part in parts:
                print(part, end="", flush=True)
                if interrupted:
                    break
        finally:
            parts.close()
    print("", flush=True)
    if interrupted:
        print("(stopped)", file=sys.stderr, flush=True)
    elif conversation.full:
        print(f"(the model's context is full: {_NEW} begins another conversation)", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Appends a first Ctrl-C to the yielded list, so that the answer can stop at a token; a second one interrupts."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())

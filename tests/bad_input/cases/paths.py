# SPDX-License-Identifier: Apache-2.0
"""Cases in which paths that commands read or write are replaced by something that they must not be."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import damage
from ..commands import COMMANDS
from ..damage import damaging
from .arguments import options
from .case import Case, Prepare

_TRAIN = COMMANDS["pretrain"].good
LINES = (
    *((c.name, c.good) for c in COMMANDS.values() if c.runs),
    ("pretrain", (*_TRAIN, "--load", "run")),
    ("pretrain", (*_TRAIN, *"--pretrained-checkpoint start --load out --allow-quantizer-change".split())),
    ("pretrain", (*_TRAIN, "--ternary-recipe", "recipe.yaml")),
    ("pretrain", ("--model", "preset.yaml", *_TRAIN)),
    ("qat_convert", tuple("--input_bin weights.bin --output out.bin".split())),
    ("convert_megatron_to_hf", tuple("--load-dir legacy --save-dir out --weights fused".split())),
    (
        "preprocess_data",
        tuple("--input corpus.txt --tokenizer-model tokenizer.model --append-eod --output-prefix out/c".split()),
    ),
    ("preprocess_sft", (*COMMANDS["preprocess_sft"].good, "--chat-template", "chat.jinja")),
    ("pretrain", (*_TRAIN, "--distill-targets", "targets")),
    ("inspect_checkpoint", ("targets",)),
    ("inspect_checkpoint", ("fused",)),
    ("inspect_checkpoint", ("legacy",)),
    ("inspect_checkpoint", ("weights.bin",)),
)
"""Commands and arguments that succeed in the world; among the arguments are the files that the commands read."""
_MADE = {("pretrain", "--load"), ("pretrain", "--data-path"), ("write_targets", "--data-path")}
"""Commands and flags of paths that may be missing, because the command then creates them or starts without."""


def paths(world: Path) -> Iterator[Case]:
    """Yields cases in which a file or directory that a command reads is removed, damaged or replaced."""
    seen = set()
    for name, argv in LINES:
        chosen = {flag for flag, action in options(COMMANDS[name]) if action.choices is not None}
        for before, word in zip(("", *argv), argv, strict=False):
            target = world / word
            # In ``--weights fused``, the word does not mean the directory of this name.
            if not target.exists() or before in chosen or word.startswith("-") or (name, word) in seen:
                continue
            seen.add((name, word))
            ways = damage.DIRECTORY_DAMAGE if target.is_dir() else damage.FILE_DAMAGE
            ways = {**ways, "socket": damage.unix_socket}
            for way, function in ways.items():
                if way == "cut" and target.suffix in (".jsonl", ".txt"):
                    continue  # half of a text is a valid text
                # An empty job file is a job with only defaults, and is refused for what it lacks.
                yield Case(
                    "paths",
                    f"{name} {word}: {way}",
                    name,
                    argv,
                    prepare=damaging(word, function),
                    says=(target.name, before),
                    # ``--load`` may name a run that only starts now, and a directory next to data may be its cache.
                    accepts=way == "missing" and (name, before) in _MADE,
                )


def outputs(world: Path) -> Iterator[Case]:
    """Yields cases of outputs that cannot be written: a file, pipe or loop, or a path that cannot be created."""
    for command in COMMANDS.values():
        if not command.runs:
            continue
        for i, word in enumerate(command.good):
            if not word.startswith("out"):
                continue
            for way, function in (("file", damage.file), ("fifo", damage.fifo), ("loop", damage.loop)):
                yield Case(
                    "outputs",
                    f"{command.name} {command.good[i - 1]}: {way}",
                    command.name,
                    command.good,
                    prepare=damaging(word.partition("/")[0], function),
                    says=(word.partition("/")[0],),
                )
            for bad in ("corpus.txt/below", "/proc/nowhere/out", "x" * 300):
                argv = (*command.good[:i], bad, *command.good[i + 1 :])
                yield Case(
                    "outputs",
                    f"{command.name} {command.good[i - 1]}={bad[:20]}",
                    command.name,
                    argv,
                    says=(bad[:10], "corpus.txt"),
                    status=(1, 2),
                )


def overwriting(world: Path) -> Iterator[Case]:
    """Yields cases of outputs that are inputs, or that already exist and are not empty."""
    tokens = "--tokenizer-model tokenizer.model --append-eod --input-format text --overwrite"

    def same(link: Callable[[Path, Path], None]) -> Prepare:
        return lambda root: link(root / "corpus.txt", root / "x_text_document.bin")

    for what, link in (
        ("itself", lambda a, b: shutil.copy(a, b)),
        ("a symbolic link", lambda a, b: b.symlink_to(a)),
        ("a hard link", lambda a, b: b.hardlink_to(a)),
    ):
        source = "x_text_document.bin" if what == "itself" else "corpus.txt"
        yield Case(
            "overwriting",
            f"preprocess_data --overwrite onto its input: {what}",
            "preprocess_data",
            tuple(f"{tokens} --input {source} --output-prefix x".split()),
            prepare=same(link),
            says=("x_text_document", "corpus.txt"),
        )
    yield Case(
        "overwriting",
        "preprocess_data --train-tokenizer onto its input",
        "preprocess_data",
        tuple(
            "--train-tokenizer corpus.txt --vocab-size 300 --append-eod --input corpus.txt --output-prefix out/c --overwrite".split()
        ),
        says=("corpus.txt",),
    )
    for command, line in (
        ("convert_hf_to_megatron", "--load-dir fused --save-dir fused"),
        ("convert_hf_to_megatron", "--load-dir fused --save-dir run"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir run --weights fused"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir fused --weights fused"),
        ("qat_convert", "--input_bin latent --output latent"),
        ("qat_convert", "--input_bin latent --output fused"),
        ("qat_convert", "--input_bin weights.bin --output weights.bin"),
    ):
        yield Case("overwriting", f"{command} {line}", command, tuple(line.split()), says=tuple(line.split()[3:4]))

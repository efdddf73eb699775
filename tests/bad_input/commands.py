# SPDX-License-Identifier: Apache-2.0
"""Every command of the project, with a good command line and its parser."""

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .world import DATA, MODEL

CHECKOUT = Path(__file__).resolve().parents[2]
# In these directories, the interpreter finds what these scripts import.
sys.path += [str(CHECKOUT / room) for room in ("benchmarks", "studies", "examples/hf")]
_WRAPPERS = ("bind_cores", "pretrain_gpt")
_HUGGING_FACE = tuple("--model_name_or_path latent --train_files corpus.txt --output_dir out --report_to none".split())
_TRAIN = [*MODEL, *DATA, "--train-iters", "2", "--eval-iters", "1"]


@dataclass(frozen=True)
class Command:
    """A command, which is a script.

    Attributes:
        name: the name of the script, without ``.py``.
        room: the folder of the script, relative to the checkout.
        good: arguments that the command accepts in the world; outputs are called ``out``, other files exist there.
        runs: whether the good line is run; other commands take minutes or need more than this machine has, so that
            only their arguments are tested.
    """

    name: str
    room: str
    good: tuple[str, ...]
    runs: bool = True

    def main(self) -> Callable[..., int | None]:
        """Imports the command and returns its function ``main``."""
        if self.room.startswith(("launch", "checkpoint_tools")):
            return importlib.import_module(f"bitcpm_megatron.{self.room.replace('/', '.')}.{self.name}").main
        if self.room == "bitcpm_megatron":
            return importlib.import_module(f"bitcpm_megatron.{self.name}").main
        spec = importlib.util.spec_from_file_location(f"{self.room}_{self.name}".replace("/", "_"), self.path)
        module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
        if not hasattr(module, "main"):
            spec.loader.exec_module(module)
        return module.main

    @property
    def path(self) -> Path:
        """The path of the script."""
        return CHECKOUT / self.room / f"{self.name}.py"

    def call(self, argv: list[str]) -> int | None:
        """Runs the command in this process, as the interpreter would."""
        main = self.main()
        sys.argv = [str(self.path), *argv]
        return main() if not inspect.signature(main).parameters else main(argv)

    def parser(self) -> argparse.ArgumentParser | None:
        """Returns the parser of the command; None if it takes no arguments or passes them on to another program."""
        if self.name in _WRAPPERS:
            return None
        with _caught_parser() as caught:
            try:
                self.call([])
            except _Caught:
                return caught[0]
            except SystemExit:
                return None
        return None


COMMANDS = {
    command.name: command
    for command in (
        Command("pretrain", "launch", (*_TRAIN, "--ternary", "--save", "out", "--log-dir", "out2")),
        Command(
            "generate",
            "launch",
            tuple("run --prompt fox --num-tokens 2 --tokenizer-model tokenizer.model".split()),
        ),
        Command("chat", "launch", tuple("fused --num-tokens 2 --tokenizer-model chat".split())),
        Command(
            "preprocess_data",
            "launch",
            tuple("--input corpus.jsonl --tokenizer-model tokenizer.model --append-eod --output-prefix out/c".split()),
        ),
        Command(
            "preprocess_sft",
            "launch",
            tuple("--input talks.jsonl --tokenizer-model chat --seq-length 900 --output-prefix out/c".split()),
        ),
        Command(
            "write_targets",
            "launch",
            (*"--teacher run --seq-length 32 --micro-batch-size 1 --output out".split(), *DATA),
        ),
        Command("run", "launch", ("job.yaml", "--print")),
        Command("preflight", "launch", ("job.yaml",)),
        Command("sweep", "launch", ("sweep.yaml", "--output", "swept", "--report-only")),
        Command(
            "evaluate",
            "launch",
            tuple("--model a=run --text corpus.jsonl --tokenizer-model tokenizer.model --output out".split()),
        ),
        Command("presets", "launch", ()),
        Command("demo", "launch", ("--output", "out"), runs=False),
        Command("demo_chat", "launch", ("--output", "out"), runs=False),
        Command("bind_cores", "launch/launcher", (), runs=False),
        Command("pretrain_gpt", "launch", tuple("--megatron-path corpus.txt".split()), runs=False),
        Command("convert_hf_to_megatron", "checkpoint_tools", tuple("--load-dir fused --save-dir out".split())),
        Command(
            "convert_megatron_to_hf",
            "checkpoint_tools",
            tuple("--load-dir run --save-dir out --weights fused --verify".split()),
        ),
        Command("qat_convert", "checkpoint_tools", tuple("--input_bin latent --output out".split())),
        Command(
            "export_packed",
            "checkpoint_tools",
            tuple("--load-dir run --tokenizer chat --save-dir out --format gguf".split()),
        ),
        Command("inspect_checkpoint", "checkpoint_tools", ("run",)),
        Command("__main__", "bitcpm_megatron", (), runs=False),
        Command("train", "examples/hf", _HUGGING_FACE, runs=False),
        Command("train_sft", "examples/hf", _HUGGING_FACE, runs=False),
        Command("throughput", "benchmarks", ("--output-dir", "out"), runs=False),
        Command("kernel", "benchmarks", ("--output-dir", "out"), runs=False),
        Command("conversion", "benchmarks", ("--output-dir", "out"), runs=False),
        Command("roofline", "benchmarks", ("--output-dir", "out"), runs=False),
        Command("memory", "benchmarks", ("--tp", "2")),
        Command("packed_inference", "benchmarks", ("--output-dir", "out"), runs=False),
        Command("kernel_against", "benchmarks", ("HEAD",), runs=False),
        Command("space_errors", "studies", ("--rows", "2", "--columns", "8"), runs=False),
        Command("int8_quality", "studies", ("--work", "out", "--output", "out2"), runs=False),
        Command("demo_evaluation", "studies", ("--output", "out"), runs=False),
        Command("distillation_stages", "studies", ("--work", "out", "--output", "out2"), runs=False),
    )
}


def scripts() -> Iterator[str]:
    """Yields the names of all scripts on disk that are commands, so that one without a good line is noticed."""
    for room in ("launch", "checkpoint_tools", "benchmarks", "studies", "examples/hf"):
        for path in sorted((CHECKOUT / room).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if '__name__ == "__main__"' in text and "ArgumentParser(" in text.replace("Parser(", "ArgumentParser("):
                yield path.stem


class _Caught(Exception):
    """Raised instead of parsing."""


@contextmanager
def _caught_parser() -> Iterator[list[argparse.ArgumentParser]]:
    caught: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.parse_known_args

    def catch(self: argparse.ArgumentParser, *arguments: object, **named: object) -> object:
        if not self.add_help:  # a helper that looks for one flag runs before the real parser
            return original(self, *arguments, **named)
        caught.append(self)
        raise _Caught

    argparse.ArgumentParser.parse_known_args = catch
    try:
        yield caught
    finally:
        argparse.ArgumentParser.parse_known_args = original

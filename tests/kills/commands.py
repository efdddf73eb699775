# SPDX-License-Identifier: Apache-2.0
"""Commands that write an artifact in one go: converters and preprocessing."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.chat import CHATML, chat_tokenizer
from support.launcher import environment

from bitcpm_megatron.files import digest

from .processes import Disk, Started, first
from .subject import FULL_DISK, KILL, PATIENCE, TERMINATE, Subject, TooLate, demand, end_of, one_message

CHECKOUT = Path(__file__).resolve().parents[2]
Files = dict[str, str]


def files(place: Path) -> Files:
    """Returns everything below a directory: the digest of each file by its path, and "directory" for directories."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        found[name] = digest(path)["xxh3_128"] if path.is_file() else "directory"
    return found


@dataclass(frozen=True)
class Line:
    """A command line of a command.

    Attributes:
        name: the name of the line for people.
        argv: the arguments; ``{input}`` and ``{out}`` are directories. Everything that the command writes is below
            ``{out}``.
        groups: the files that appear together, as first components of paths below ``{out}``. The last one of a group
            completes the artifact: without it the others have no meaning, and may exist or be missing.
        old: the command line that wrote the artifact that this one replaces; or None.
    """

    name: str
    argv: str
    groups: tuple[tuple[str, ...], ...] = (("model",),)
    old: str | None = None


@dataclass
class Undisturbed:
    """The result of a command line that is not disturbed: its files, the replaced files, its duration and size."""

    files: Files
    old: Files
    seconds: float
    nbytes: int


class Command(Subject):
    """A script of the checkout as a subject.

    Args:
        name: the name of the script, without suffix.
        room: the folder of the script.
        lines: the command lines to choose from.
        make_input: a function that fills ``{input}``.
    """

    batch = 2

    def __init__(self, name: str, room: str, lines: tuple[Line, ...], make_input: Callable[[Path], None]) -> None:
        self.name = name
        self._script = CHECKOUT / room / f"{name}.py"
        self._lines = lines
        self._make_input = make_input
        self._undisturbed: dict[str, Undisturbed] = {}

    def prepare(self, scratch: Path) -> None:
        self._input = scratch / self._make_input.__name__
        self._output = scratch / f"{self.name}.txt"
        if not self._input.is_dir():
            self._make_input(self._input)
        self._before = files(self._input)

    def begin(self, place: Path, rng: random.Random) -> None:
        self._line = line = rng.choice(self._lines)
        if line.name not in self._undisturbed:
            self._undisturbed[line.name] = self._measure(line, place)
        self._whole = self._undisturbed[line.name]
        self._place = place
        if line.old is not None:
            self._succeed(self._start(line.old, place))
            demand(files(place) == self._whole.old, "the artifact that is to be replaced differs from run to run")

    def disturb(self, how: str, rng: random.Random, disk: Disk | None) -> str:
        before = files(self._place)
        if before == self._whole.files:
            raise TooLate
        self._standing = sum(
            path.stat().st_blocks * 512 for name in self._whole.old if (path := self._place / name).is_file()
        )
        started = self._start(self._line.argv, self._place)
        act = (
            functools.partial(self._fill, started, rng, disk)
            if how == FULL_DISK
            else functools.partial(self._signal, started, rng, signal.Signals[how])
        )
        done, status = end_of(started, how, disk, act)
        after = files(self._place)
        said = started.said
        if status == 0:
            demand(after == self._whole.files, f"it ended well, and differs: {self._difference(after)}", said)
            raise TooLate
        # Before its own handler is installed, a command dies of the signal, and has not written anything yet.
        if how == FULL_DISK or (how == TERMINATE and status != -signal.SIGTERM):
            one_message(said, status, 1)
        strangers = self._check(after, said)
        if how == FULL_DISK:
            lost = [name for name, was in self._whole.old.items() if before.get(name) == was != after.get(name)]
            demand(lost == [], f"what stood there before is gone: {lost}", said)
        if how != KILL:
            # A command that ended before it looked at the directory leaves the remains of an earlier kill. A lock that
            # it took has new content.
            left = [name for name in strangers if after[name] != before.get(name)]
            demand(left == [], f"left behind after {how}: {left}", said)
        return f"{self._line.name}: {done}"

    def finish(self) -> None:
        whole_already = files(self._place) == self._whole.files
        started = self._start(self._line.argv, self._place)
        status = started.wait(PATIENCE)
        started.clear()
        # A complete artifact is not written again: the command may refuse with status 2.
        allowed = (0, 2) if whole_already else (0,)
        demand(status in allowed, f"the same command again ends with {status}", started.said)
        after = files(self._place)
        demand(after == self._whole.files, f"the same command again: {self._difference(after)}", started.said)
        demand(files(self._input) == self._before, "the input was changed", started.said)

    def _measure(self, line: Line, place: Path) -> Undisturbed:
        """Runs a command line undisturbed, returns its result, and leaves the directory empty."""
        if line.old is not None:
            self._succeed(self._start(line.old, place))
        old = files(place)
        began = time.monotonic()
        self._succeed(self._start(line.argv, place))
        seconds = time.monotonic() - began
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        made = Undisturbed(files(place), old, seconds, size)
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return made

    def _start(self, argv: str, place: Path) -> Started:
        words = argv.format(input=self._input, out=place).split()
        return Started([sys.executable, str(self._script), *words], CHECKOUT, self._output, environment())

    def _succeed(self, started: Started) -> None:
        status = started.wait(PATIENCE)
        started.clear()
        demand(status == 0, f"an undisturbed {self.name} ends with {status}", started.said)

    def _signal(self, started: Started, rng: random.Random, number: signal.Signals) -> str:
        kind = rng.random()
        if kind < 0.3:
            moment = rng.uniform(0.0, self._whole.seconds)
            where = "after its start"
        else:
            # The moment depends on what has been written and not on time, which depends on the load of the machine.
            share = rng.random() if kind < 0.8 else 1.0
            self._wait_until_written(started, share)
            moment = rng.uniform(0.0, 0.2) if share == 1.0 else 0.0
            where = f"after {share:.0%} of its bytes"
        if started.wait(moment) is None:
            started.signal(number, first)
        return f"{number.name} {moment:.3f} s {where}"

    def _fill(self, started: Started, rng: random.Random, disk: Disk) -> str:
        if rng.random() < 0.5:
            leave = rng.randrange(self._whole.nbytes)
            disk.fill(leave)
            return f"a disk with {leave:,} of {self._whole.nbytes:,} bytes free"
        share = rng.uniform(0.0, 0.9)
        self._wait_until_written(started, share)
        disk.fill()
        return f"a disk that is full after {share:.0%} of its bytes"

    def _wait_until_written(self, started: Started, share: float) -> None:
        """Waits until the command has written a share of its artifact, or has ended."""
        wanted = self._standing + share * self._whole.nbytes
        # The remains of a killed attempt exist until this attempt removes them.
        while started.process.poll() is None and _bytes_on_disk(self._place) > wanted:
            time.sleep(0.001)
        while started.process.poll() is None and _bytes_on_disk(self._place) <= wanted:
            time.sleep(0.001)

    def _check(self, after: Files, said: str) -> list[str]:
        """Demands that everything with a final name is complete; returns the paths without one."""
        old, whole = self._whole.old, self._whole.files
        for group in self._line.groups:
            now, was, new = ({name: _below(found, name) for name in group} for found in (after, old, whole))
            if now in (was, new):
                continue
            # Between two renames only the file that completes the artifact may be missing: without it nobody uses the
            # others.
            demand(len(group) > 1 and not now[group[-1]], f"{group} is neither the old one nor the new one", said)
            for name in group:
                demand(now[name] in ({}, was[name], new[name]), f"{name} is neither the old one nor the new one", said)
        known = {*old, *whole}
        return [name for name in after if name not in known]

    def _difference(self, after: Files) -> str:
        whole = self._whole.files
        return (
            f"missing {sorted(set(whole) - set(after))[:5]}, left {sorted(set(after) - set(whole))[:5]}, "
            f"different {sorted(name for name in set(whole) & set(after) if whole[name] != after[name])[:5]}"
        )


def _below(all_files: Mapping[str, str], name: str) -> Files:
    return {path: value for path, value in all_files.items() if path == name or path.startswith(f"{name}/")}


def _bytes_on_disk(place: Path) -> int:
    """Returns the bytes that files below a directory occupy; their lengths do not tell, since files are created at full
    length and then filled."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


def make_model(directory: Path) -> None:
    """Writes a latent model of 92 MB, so that converting it takes a while, its checkpoint, and a tokenizer."""
    import torch
    from safetensors.torch import load_file
    from support import tiny_hf

    from bitcpm_megatron.data.tokenizers import train_sentencepiece

    layers = 6
    architecture = tiny_hf.llama(
        num_layers=layers,
        hidden_size=512,
        ffn_hidden_size=1536,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=8192,
    )
    names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in tiny_hf.PROJECTIONS]
    record = tiny_hf.record(row_parallel_shards=1, modules={name: {"group_size": -1} for name in names})
    tiny_hf.latent_export(directory / "latent", architecture, record)
    script = CHECKOUT / "checkpoint_tools" / "convert_hf_to_megatron.py"
    argv = [sys.executable, str(script), "--load-dir", str(directory / "latent"), "--save-dir", str(directory / "run")]
    started = Started(argv, CHECKOUT, directory / "output.txt", environment())
    demand(started.wait(PATIENCE) == 0, "no checkpoint", started.said)
    (directory / "output.txt").unlink()
    texts = ["the quick brown fox jumps over a lazy dog while seven wizards boil black quartz"] * 20
    (directory / "tokenizer.model").write_bytes(train_sentencepiece(texts, 300))
    (directory / "pickled").mkdir()
    torch.save(load_file(directory / "latent" / "model.safetensors"), directory / "pickled" / "weights.bin")
    for name in ("config.json", "ternary_quantizer.json"):
        shutil.copy(directory / "latent" / name, directory / "pickled")


def make_text(directory: Path) -> None:
    """Writes a corpus of 3 MB, and a tokenizer."""
    directory.mkdir(parents=True)
    words = "the quick brown fox jumps over a lazy dog while seven wizards boil black quartz and mix pale ink".split()
    rng = random.Random(1)
    with (directory / "corpus.jsonl").open("w") as stream:
        for _ in range(6000):
            text = " ".join(rng.choice(words) + rng.choice(("", "s", "ed", "ing")) for _ in range(80))
            stream.write(json.dumps({"text": text}) + "\n")
    script = CHECKOUT / "launch" / "preprocess_data.py"
    argv = f"--input {directory}/corpus.jsonl --train-tokenizer {directory}/tokenizer.model --vocab-size 300"
    argv += f" --append-eod --output-prefix {directory}/c"
    started = Started([sys.executable, str(script), *argv.split()], CHECKOUT, directory / "output.txt", environment())
    demand(started.wait(PATIENCE) == 0, "no tokenizer", started.said)
    for path in [*directory.glob("c_*"), directory / "output.txt"]:
        path.unlink()


def make_talks(directory: Path) -> None:
    """Writes conversations of 1 MB, and a tokenizer with a chat template."""
    rng = random.Random(1)
    words = "the quick brown fox jumps over a lazy dog while seven wizards boil black quartz and mix pale ink".split()
    chat_tokenizer(directory / "chat", CHATML)
    with (directory / "talks.jsonl").open("w") as stream:
        for _ in range(2000):
            text = " ".join(rng.choices(words, k=rng.randint(20, 160)))
            stream.write(json.dumps({"instruction": text[:60], "output": text}) + "\n")


def converters() -> Iterator[Command]:
    """Yields all converters."""
    yield Command(
        "convert_hf_to_megatron",
        "checkpoint_tools",
        (
            Line("torch_dist", "--load-dir {input}/latent --save-dir {out}/model"),
            Line(
                "legacy",
                "--load-dir {input}/latent --save-dir {out}/model --format legacy --target-tensor-parallel-size 2",
            ),
        ),
        make_model,
    )
    yield Command(
        "convert_megatron_to_hf",
        "checkpoint_tools",
        (
            Line("fused, verified", "--load-dir {input}/run --save-dir {out}/model --weights fused --verify"),
            Line(
                "latent, sharded",
                "--load-dir {input}/run --save-dir {out}/model --weights latent --max-shard-size 20MB",
            ),
        ),
        make_model,
    )
    yield Command(
        "qat_convert",
        "checkpoint_tools",
        (
            Line("directory", "--input_bin {input}/latent --output {out}/model"),
            Line(
                "file",
                "--input_bin {input}/latent/model.safetensors --output {out}/model.safetensors",
                (("model.safetensors",), ("DIGESTS.json",)),
            ),
            Line(
                "pickled file",
                "--input_bin {input}/pickled/weights.bin --output {out}/weights.bin",
                (("weights.bin",), ("DIGESTS.json",)),
            ),
        ),
        make_model,
    )
    packed = "--load-dir {input}/latent --tokenizer {input} --save-dir {out}/model --format"
    yield Command(
        "export_packed",
        "checkpoint_tools",
        (Line("GGUF", f"{packed} gguf"), Line("sharded", f"{packed} compressed-tensors --max-shard-size 5MB")),
        make_model,
    )


def preprocessing() -> Command:
    """Returns the command that turns text into token files, with the tokenizer given and trained."""
    pair = ("c_text_document.bin", "c_text_document.idx")
    given = "--input {input}/corpus.jsonl --tokenizer-model {input}/tokenizer.model --output-prefix {out}/c"
    trained = "--input {input}/corpus.jsonl --train-tokenizer {out}/t.model --vocab-size 400 --output-prefix {out}/c"
    return Command(
        "preprocess_data",
        "launch",
        (
            Line("tokenizer given, 2 workers", f"{given} --append-eod --workers 2", (pair,)),
            Line("tokenizer trained", f"{trained} --append-eod", (("t.model", *pair),)),
            Line("overwritten", f"{given} --append-eod --overwrite", (pair,), old=given),
        ),
        make_text,
    )


def preprocessing_sft() -> Command:
    """Returns the command that turns conversations into the token files of fine-tuning."""
    together = tuple(f"c_{part}{suffix}" for part in ("tokens", "answers", "ends") for suffix in (".bin", ".idx"))
    line = "--input {input}/talks.jsonl --tokenizer-model {input}/chat --seq-length 4096 --output-prefix {out}/c"
    return Command(
        "preprocess_sft",
        "launch",
        (Line("written", line, (together,)), Line("overwritten", f"{line} --overwrite", (together,), old=line)),
        make_talks,
    )

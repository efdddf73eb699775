# SPDX-License-Identifier: Apache-2.0
"""Cases of checkpoints and exports with a file that is missing, damaged or contradictory, or that would run code."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import damage
from ..commands import COMMANDS
from ..damage import damaging
from .case import Case, Prepare

_RESUMED = (*COMMANDS["pretrain"].good, *"--load run --train-iters 3 --override-opt-param-scheduler".split())
READERS = (
    ("convert_megatron_to_hf", "run", "--load-dir run --save-dir out --weights fused"),
    ("convert_megatron_to_hf", "legacy", "--load-dir legacy --save-dir out --weights fused"),
    ("convert_hf_to_megatron", "fused", "--load-dir fused --save-dir out"),
    ("convert_hf_to_megatron", "sharded", "--load-dir sharded --save-dir out"),
    ("qat_convert", "latent", "--input_bin latent --output out"),
    ("inspect_checkpoint", "run", "run"),
    ("inspect_checkpoint", "legacy", "legacy"),
    ("inspect_checkpoint", "fused", "fused"),
    ("pretrain", "run", " ".join(_RESUMED)),
    ("generate", "run", " ".join(COMMANDS["generate"].good)),
    ("generate", "latent", "latent --prompt fox --num-tokens 2 --tokenizer-model chat"),
    ("chat", "fused", " ".join(COMMANDS["chat"].good)),
)


def contents(world: Path) -> Iterator[Case]:
    """Yields cases in which a file of a checkpoint without digests is missing or damaged."""
    for command, root, line in READERS:
        for path in sorted((world / root).rglob("*")):
            if not path.is_file() or path.name in ("DIGESTS.json", "README.md", ".lock"):
                continue
            word = path.relative_to(world).as_posix()
            for way, function in damage.FILE_DAMAGE.items():
                if way == "loop":
                    continue
                yield Case(
                    "contents",
                    f"{command} {word}: {way}",
                    command,
                    tuple(line.split()),
                    prepare=_foreign(root, word, function),
                    accepts=not _vital(command, path, way),
                    status=(2, 3),
                )


def _foreign(root: str, word: str, function: Prepare) -> Prepare:
    def prepare(here: Path) -> None:
        damage.forget_digests(here / root)
        function(here / word)

    return prepare


def _vital(command: str, path: Path, way: str) -> bool:
    """Returns whether a command must notice that a file is damaged although there are no digests."""
    if path.parent.name == "hf" and way in ("missing", "directory", "fifo"):
        return False  # the file is kept, if it exists, for the conversion back
    if path.name in ("latest_checkpointed_iteration.txt", ".metadata", "config.json", "model.safetensors.index.json"):
        return True
    if path.name == "metadata.json":
        return way == "missing"  # nothing reads its contents
    if path.suffix == ".safetensors":
        return True
    if path.name == "arguments.json" and any(path.parent.glob("mp_rank_*")):
        return False  # legacy files hold the arguments; this one is for people
    # Weights may be stored in one of several files, and a reader opens only those that it needs.
    return path.name in ("model_optim_rng.pt", "ternary_quantizer.json", "arguments.json") and way != "missing"


def trackers(world: Path) -> Iterator[Case]:
    """Yields cases of trackers that name no iteration or a missing one, and of damaged metrics of a resumed run."""
    for command, root, line in READERS:
        tracker = world / root / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            continue
        for text in ("²", "-2", "2.0", "nan", "3", "9" * 30, "2 3", "../run", "Release", "0x2", "\0"):
            yield Case(
                "trackers",
                f"{command} tracker of {root}: {text[:10]!r}",
                command,
                tuple(line.split()),
                prepare=_foreign(
                    root, f"{root}/{tracker.name}", lambda path, text=text: path.write_text(text) and None
                ),
                says=(tracker.name, "iter_"),
            )
    for way, function in damage.FILE_DAMAGE.items():
        yield Case(
            "trackers",
            f"pretrain log/metrics.jsonl: {way}",
            "pretrain",
            (*_RESUMED, "--log-dir", "log"),
            prepare=damaging("log/metrics.jsonl", function),
            says=("metrics.jsonl",),
            writes=("log/",),
            accepts=way in ("missing", "empty", "cut"),
        )


def flipped_bits(world: Path) -> Iterator[Case]:
    """Yields cases with one flipped bit in a file that a digest covers."""
    for command, root, line in READERS:
        argv = tuple(line.split())
        if command == "generate" and root == "run":
            continue  # generate has no flag to verify digests
        if command == "pretrain":
            argv = (*argv, "--verify-digests")
        for path in sorted((world / root).rglob("*")):
            if (
                path.is_file()
                and (path.parent / "DIGESTS.json").exists()
                and path.name not in ("DIGESTS.json", ".lock")
            ):
                word = path.relative_to(world).as_posix()
                yield Case(
                    "digests",
                    f"{command} {word}: one bit",
                    command,
                    argv,
                    prepare=damaging(word, damage.flip),
                    says=(path.name, "JSON", "UTF-8"),
                    status=(2, 3),
                )


def code(world: Path) -> Iterator[Case]:
    """Yields cases of files that would run code if they were unpickled."""
    metadata = next((world / "run").glob("iter_*/.metadata")).relative_to(world).as_posix()
    folder = metadata.rpartition("/")[0]
    attacks = {
        metadata: (damage.evil_pickle, damage.evil_torch_file),
        f"{folder}/common.pt": (damage.evil_pickle, damage.evil_torch_file, damage.deflated_bomb),
    }
    readers = [r for r in READERS if r[1] == "run"]
    for command, _, line in readers:
        for word, ways in attacks.items():
            for way in ways:
                yield Case(
                    "code",
                    f"{command} {word}: {way.__name__}",
                    command,
                    tuple(line.split()),
                    prepare=_foreign("run", word, way),
                    status=(2, 3),
                    accepts=command in ("convert_megatron_to_hf", "inspect_checkpoint") and "common" in word,
                )
        yield Case(
            "code",
            f"{command} object entry",
            command,
            tuple(line.split()),
            prepare=_foreign("run", metadata, damage.evil_object_entry),
            # Commands that read only tensors never open the object.
            status=(2, 3),
            accepts=command != "pretrain",
        )
    start = next((world / "start").rglob(".metadata")).relative_to(world).as_posix()
    yield Case(
        "code",
        "pretrain --pretrained-checkpoint: .metadata",
        "pretrain",
        (*COMMANDS["pretrain"].good, *"--pretrained-checkpoint start --load out --allow-quantizer-change".split()),
        prepare=_foreign("start", start, damage.evil_pickle),
        says=(".metadata",),
    )
    legacy = next((world / "legacy").rglob("model_optim_rng.pt")).relative_to(world).as_posix()
    for way in (damage.evil_pickle, damage.evil_torch_file, damage.deflated_bomb):
        for command, line in (
            ("convert_megatron_to_hf", "--load-dir legacy --save-dir out --weights fused"),
            ("inspect_checkpoint", "legacy"),
        ):
            yield Case(
                "code",
                f"{command} legacy: {way.__name__}",
                command,
                tuple(line.split()),
                prepare=_foreign("legacy", legacy, way),
                says=("model_optim_rng.pt",),
                status=(2, 3),
            )
        yield Case(
            "code",
            f"qat_convert weights.bin: {way.__name__}",
            "qat_convert",
            tuple("--input_bin weights.bin --output out.bin".split()),
            prepare=damaging("weights.bin", way),
            says=("weights.bin",),
        )
        yield Case(
            "code",
            f"pytorch_model.bin: {way.__name__}",
            "convert_hf_to_megatron",
            tuple("--load-dir fused --save-dir out".split()),
            prepare=_pytorch_model(way),
            says=("pytorch_model.bin",),
        )
    for index in ("document_index", "sample_index", "shuffle_index"):
        for way in (damage.evil_numpy, damage.evil_pickle, damage.garbage, damage.cut, damage.empty):
            yield Case(
                "code" if "evil" in way.__name__ else "data",
                f"sample cache {index}: {way.__name__}",
                "pretrain",
                (*COMMANDS["pretrain"].good, "--data-cache-path", "cache"),
                first=(*COMMANDS["pretrain"].good, "--data-cache-path", "cache"),
                prepare=_cache(index, way),
                writes=("cache/",),  # a damaged cache is built again
                says=(index,),
                accepts=True,
            )


def _pytorch_model(way: Prepare) -> Prepare:
    def prepare(root: Path) -> None:
        damage.forget_digests(root / "fused")
        for path in (root / "fused").glob("*.safetensors"):
            path.unlink()
        way(root / "fused" / "pytorch_model.bin")

    return prepare


def _cache(index: str, way: Prepare) -> Prepare:
    def prepare(root: Path) -> None:
        found = sorted((root / "cache").rglob(f"*{index}.npy"))
        assert found, "the good run left no cache"
        for path in found:
            way(path)
        # The outputs of the good run are removed, so that the bad run starts from the beginning.
        for name in ("out", "out2"):
            shutil.rmtree(root / name, ignore_errors=True)

    return prepare


def records(world: Path) -> Iterator[Case]:
    """Yields cases of quantizer records that contradict themselves or have values that no quantizer has."""
    changes = {
        "version 99": {"version": 99},
        "version text": {"version": "x"},
        "unknown state": {"state": "liquid"},
        "unknown space": {"space": "octal"},
        "eps 0": {"eps": 0},
        "eps text": {"eps": "small"},
        "shards 0": {"row_parallel_shards": 0},
        "shards half": {"row_parallel_shards": 0.5},
        "bits 7": {"activation_bits": 7},
        "modules a list": {"modules": []},
        "group 0": {"modules": {"model.layers.0.mlp.down_proj": {"group_size": 0}}},
        "group text": {"modules": {"model.layers.0.mlp.down_proj": {"group_size": "x"}}},
        "an unknown key": {"no_such": 1},
    }
    iteration = next((world / "run").glob("iter_*")).relative_to(world).as_posix()
    for command, root, line in READERS:
        if root == "legacy" or root == "sharded":
            continue
        folder = iteration if root == "run" else root
        for what, change in changes.items():
            yield Case(
                "records",
                f"{command} record of {root}: {what}",
                command,
                tuple(line.split()),
                prepare=_record(root, folder, change),
                says=("ternary_quantizer.json", "record"),
                status=(2, 3),
            )


def _record(root: str, folder: str, change: Mapping[str, object]) -> Prepare:
    def prepare(here: Path) -> None:
        damage.forget_digests(here / root)
        for name in ("ternary_quantizer.json",):
            damage.edit_json(here / folder / name, lambda content: {**content, **change})

    return prepare

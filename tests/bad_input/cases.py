# SPDX-License-Identifier: Apache-2.0
"""The cases: one mistake each, as many as possible generated from the commands' own parsers and files."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitcpm_megatron.cli import Number, Whole

from . import damage
from .api import CALLS
from .commands import COMMANDS, Command

Prepare = Callable[[Path], None]


@dataclass(frozen=True, eq=False)
class Case:
    """One bad input.

    Attributes:
        kind: what is attacked, for samples and counts.
        name: unique, for people.
        command: by name; None for a call of the API.
        argv: its arguments, in a copy of the world as the working directory.
        first: arguments of a good run before the damage, such as one that fills a cache.
        prepare: damages that copy.
        environment: variables.
        says: the message must hold one of these.
        accepts: a success is right, too, as where a file is not needed; crashes, hangs and tracebacks never are.
        status: the exit codes of a refusal.
        call: of the API; it must raise ValueError or TypeError.
    """

    kind: str
    name: str
    command: str | None = None
    argv: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    prepare: Prepare | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    accepts: bool = False
    status: tuple[int, ...] = (2,)
    call: Callable[[], object] | None = None


def all_cases(world: Path) -> list[Case]:
    """Every case, in a fixed order; names are unique."""
    makers = (
        _numbers,
        _flags,
        _environment,
        _paths,
        _outputs,
        _contents,
        _flipped_bits,
        _code,
        _configs,
        _headers,
        _yaml,
        _records,
        _data,
        _overwriting,
        _requests,
        _api,
    )
    cases = [case for make in makers for case in make(world)]
    names = [case.name for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two cases of one name: {sorted(twice)}"
    return cases


# ---------------------------------------------------------------------------------------- arguments


def _options(command: Command) -> Iterator[tuple[str, argparse.Action]]:
    parser = command.parser()
    for action in parser._actions if parser is not None else ():
        flag = next((s for s in action.option_strings if s.startswith("--")), None)
        if flag is not None and action.dest != "help":
            yield flag, action


def _numbers(world: Path) -> Iterator[Case]:
    """Every numeric flag of every command gets zero, negative, NaN, infinite, huge and half numbers, and words."""
    for command in COMMANDS.values():
        for flag, action in _options(command):
            kind = action.type
            if action.choices is None and kind in (int, float):
                # Accepted in silence, whatever it is: the cure is a Whole or a Number of cli.py.
                yield Case("numbers", f"{command.name} {flag} has no bounds", call=lambda: None)
            if not isinstance(kind, Whole | Number):
                continue
            huge = str(10**30) if isinstance(kind, Whole) else "1e400"
            texts = {"0", "-1", "nan", "inf", "-inf", huge, "1.5", "", "two", "²"}
            texts |= {str(kind.minimum - 1), str(kind.maximum + 1)} if isinstance(kind, Whole) else {"1e300", "-1e-300"}
            for text in sorted(texts):
                bad = _refused(kind, text)
                if bad or command.runs:
                    yield Case(
                        "numbers" if bad else "numbers within bounds",
                        f"{command.name} {flag}={text}",
                        command.name,
                        (*command.good, f"{flag}={text}"),
                        says=(flag,) if bad else (),
                        accepts=not bad,
                        status=(2,) if bad else (1, 2),
                    )


def _refused(kind: Whole | Number, text: str) -> bool:
    try:
        kind(text)
    except argparse.ArgumentTypeError:
        return True
    return False


def _flags(world: Path) -> Iterator[Case]:
    """Unknown, abbreviated and unfinished flags, and choices that are none."""
    for command in COMMANDS.values():
        options = dict(_options(command))
        unknown = [("--no-such-flag", ("--no-such-flag=1",)), ("a stray word", ("stray",))]
        for flag, action in options.items():
            if action.nargs != 0 and not any(other != flag and other.startswith(flag[:-1]) for other in options):
                unknown.append((flag[:-1], (f"{flag[:-1]}=1",)))
                break
        if options:
            for name, more in unknown:
                if name == "a stray word" and command.name in ("inspect_checkpoint", "run", "preflight"):
                    more = ("stray", "stray")
                at_end = more if name.startswith("--") else (*_last_flag(command), *more)
                yield Case(
                    "flags",
                    f"{command.name} {name}",
                    command.name,
                    (*command.good, *at_end),
                    says=(more[-1].partition("=")[0],),
                )
        for flag, action in options.items():
            if action.choices is not None and action.nargs != 0:
                yield Case(
                    "flags",
                    f"{command.name} {flag}=no-such",
                    command.name,
                    (*command.good, f"{flag}=no-such"),
                    says=(flag,),
                )


def _last_flag(command: Command) -> tuple[str, ...]:
    # So that the stray word does not become one more value of a flag that takes several.
    return next(((s,) for s, a in _options(command) if a.nargs == 0), ())


def _environment(world: Path) -> Iterator[Case]:
    """What torchrun sets, set to something else."""
    for command in ("pretrain", "generate"):
        for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            for text in ("abc", "-1", "1.5", "²"):
                # torchrun sets all of them; a process that has half of them is asked for the world's size first.
                whole = {
                    "WORLD_SIZE": "1",
                    "RANK": "0",
                    "LOCAL_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": "0",
                }
                # A rank other than 0 is told after those of rank 0, under its own name.
                yield Case(
                    "environment",
                    f"{command} {variable}={text}",
                    command,
                    COMMANDS[command].good,
                    environment={**whole, variable: text},
                    says=(variable,),
                )
        yield Case(
            "environment",
            f"{command} WORLD_SIZE=0",
            command,
            COMMANDS[command].good,
            environment={"WORLD_SIZE": "0"},
            says=("WORLD_SIZE",),
        )


# ---------------------------------------------------------------------------------------- paths


def _paths(world: Path) -> Iterator[Case]:
    """Whatever a command reads is replaced: by nothing, nothing inside, garbage, a directory, a pipe, a loop."""
    lines = [(c.name, c.good) for c in COMMANDS.values() if c.runs]
    train = COMMANDS["pretrain"].good
    lines += [
        ("pretrain", (*train, "--load", "run")),
        ("pretrain", (*train, "--pretrained-checkpoint", "start", "--load", "out")),
        ("pretrain", (*train, "--ternary-recipe", "recipe.yaml")),
        ("pretrain", ("--model", "preset.yaml", *train)),
        ("qat_convert", tuple("--input_bin weights.bin --output out.bin".split())),
        ("convert_megatron_to_hf", tuple("--load-dir legacy --save-dir out --weights fused".split())),
        (
            "preprocess_data",
            tuple("--input corpus.txt --tokenizer-model tokenizer.model --output-prefix out/c".split()),
        ),
        ("inspect_checkpoint", ("fused",)),
        ("inspect_checkpoint", ("legacy",)),
        ("inspect_checkpoint", ("weights.bin",)),
    ]
    seen = set()
    for name, argv in lines:
        for word in argv:
            target = world / word
            if not target.exists() or word in (".", "..") or word.startswith("-") or (name, word) in seen:
                continue
            seen.add((name, word))
            ways = damage.DIRECTORY_DAMAGE if target.is_dir() else damage.FILE_DAMAGE
            for way, function in ways.items():
                if way == "cut" and target.suffix in (".jsonl", ".txt"):
                    continue  # half a text is a text
                # An empty job file is a job of defaults, and is refused for what is missing.
                yield Case(
                    "paths",
                    f"{name} {word}: {way}",
                    name,
                    argv,
                    prepare=_damaging(word, function),
                    says=(target.name, "--load" if word == "run" else target.name),
                )


def _damaging(word: str, function: Prepare) -> Prepare:
    return lambda root: function(root / word)


def _outputs(world: Path) -> Iterator[Case]:
    """Whatever a command writes is impossible: a file, a pipe, a loop, below a file, where nothing can be made."""
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
                    prepare=_damaging(word.partition("/")[0], function),
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


# ---------------------------------------------------------------------------------------- checkpoints

_READERS = (
    ("convert_megatron_to_hf", "run", "--load-dir run --save-dir out --weights fused"),
    ("convert_megatron_to_hf", "legacy", "--load-dir legacy --save-dir out --weights fused"),
    ("convert_hf_to_megatron", "fused", "--load-dir fused --save-dir out"),
    ("convert_hf_to_megatron", "sharded", "--load-dir sharded --save-dir out"),
    ("qat_convert", "latent", "--input_bin latent --output out"),
    ("inspect_checkpoint", "run", "run"),
    ("inspect_checkpoint", "legacy", "legacy"),
    ("inspect_checkpoint", "fused", "fused"),
    ("pretrain", "run", " ".join([*COMMANDS["pretrain"].good, "--load", "run", "--train-iters", "3"])),
    ("generate", "run", " ".join(COMMANDS["generate"].good)),
)


def _contents(world: Path) -> Iterator[Case]:
    """Each file of a checkpoint from elsewhere, without digests, is lost or damaged."""
    for command, root, line in _READERS:
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
    """Whether a command must notice that a file is damaged, also where no digest tells."""
    if path.name in ("latest_checkpointed_iteration.txt", ".metadata", "config.json", "model.safetensors.index.json"):
        return True
    if path.name == "metadata.json":
        return way == "missing"  # of what it says nobody needs a word
    if path.suffix == ".safetensors":
        return True
    # Weights may lie in one of several files, of which a reader opens what it needs.
    return path.name in ("model_optim_rng.pt", "ternary_quantizer.json", "arguments.json") and way != "missing"


def _flipped_bits(world: Path) -> Iterator[Case]:
    """One bit in each file that a digest covers."""
    for command, root, line in _READERS:
        argv = tuple(line.split())
        if command == "generate":
            continue  # has no flag for it
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
                    prepare=_damaging(word, damage.flip),
                    says=(path.name, "JSON", "UTF-8"),
                    status=(2, 3),
                )


def _code(world: Path) -> Iterator[Case]:
    """Files that would run code, wherever one is read."""
    metadata = next((world / "run").glob("iter_*/.metadata")).relative_to(world).as_posix()
    folder = metadata.rpartition("/")[0]
    attacks = {
        metadata: (damage.evil_pickle, damage.evil_torch_file),
        f"{folder}/common.pt": (damage.evil_pickle, damage.evil_torch_file, damage.deflated_bomb),
    }
    readers = [r for r in _READERS if r[1] == "run"]
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
            # Who reads tensors alone never opens it.
            status=(2, 3),
            accepts=command != "pretrain",
        )
    start = next((world / "start").rglob(".metadata")).relative_to(world).as_posix()
    yield Case(
        "code",
        "pretrain --pretrained-checkpoint: .metadata",
        "pretrain",
        (*COMMANDS["pretrain"].good, "--pretrained-checkpoint", "start"),
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
            prepare=_damaging("weights.bin", way),
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
        # Where the good run saved, the bad one shall start anew.
        for name in ("out", "out2"):
            shutil.rmtree(root / name, ignore_errors=True)

    return prepare


# ---------------------------------------------------------------------------------------- Hugging Face files


def _configs(world: Path) -> Iterator[Case]:
    """Numbers of ``config.json`` that no model has."""
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    values = {
        "zero": 0,
        "negative": -1,
        "half": 0.5,
        "huge": 10**9,
        "word": "x",
        "null": None,
        "true": True,
        "list": [1],
    }
    for command, line in (
        ("convert_hf_to_megatron", "--load-dir fused --save-dir out"),
        ("qat_convert", "--input_bin latent --output out"),
    ):
        root = line.split()[1]
        for key in sizes:
            for name, value in values.items():
                yield Case(
                    "config",
                    f"{command} {key}: {name}",
                    command,
                    tuple(line.split()),
                    prepare=_config(root, {key: value}),
                    says=("config.json", key),
                    # Weights are fused one by one, whatever the model's shape.
                    accepts=command == "qat_convert",
                )
        for text in ("[" * 100_000, "{}", "[]", "null", '{"architectures": []}', '{"a": 1, "a": 2}', "\xff"):
            yield Case(
                "config",
                f"{command} config.json {text[:20]!r}",
                command,
                tuple(line.split()),
                prepare=_config_text(root, text),
                says=("config.json",),
            )
    for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "num_key_value_heads", "head_dim"):
        for name, value in values.items():
            yield Case(
                "config",
                f"convert_hf_to_megatron {key}: {name}",
                "convert_hf_to_megatron",
                tuple("--load-dir fused --save-dir out".split()),
                prepare=_config("fused", {key: value}),
                accepts=value is None or (key == "max_position_embeddings" and name == "huge"),
                says=("config.json", key),
            )


def _config(root: str, changes: Mapping[str, object]) -> Prepare:
    def prepare(here: Path) -> None:
        damage.forget_digests(here / root)
        damage.edit_json(here / root / "config.json", lambda content: {**content, **changes})

    return prepare


def _config_text(root: str, text: str) -> Prepare:
    def prepare(here: Path) -> None:
        damage.forget_digests(here / root)
        (here / root / "config.json").write_bytes(text.encode("latin-1"))

    return prepare


def _headers(world: Path) -> Iterator[Case]:
    """Headers and indices of safetensors files that lie."""

    def first(header: dict) -> dict:
        return next(entry for name, entry in header.items() if name != "__metadata__")

    def shape(value: list) -> Callable[[dict], None]:
        return lambda header: first(header).update(shape=value)

    def offsets(value: list) -> Callable[[dict], None]:
        return lambda header: first(header).update(data_offsets=value)

    def overlapping(header: dict) -> None:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        same = [e for e in entries if e["shape"] == entries[0]["shape"]] + entries
        entries[0]["data_offsets"] = next(e for e in same if e is not entries[0])["data_offsets"]

    changes = {
        "fractional shape": shape([64.5, 64]),
        "negative shape": shape([-64, -64]),
        "true in a shape": shape([True, 64]),
        "huge shape": shape([2**62, 2**62]),
        "text in a shape": shape(["64", 64]),
        "other shape": shape([3, 5]),
        "offsets beyond the file": offsets([0, 2**60]),
        "offsets backwards": offsets([100, 0]),
        "negative offsets": offsets([-100, 0]),
        "one offset": offsets([0]),
        "overlapping tensors": overlapping,
        "unknown dtype": lambda header: first(header).update(dtype="Q7"),
        "no dtype": lambda header: first(header).pop("dtype") and None,
        "an entry that is a list": lambda header: {**header, "x": [1]},
        "a list": lambda header: [1],
    }
    for name, change in changes.items():
        for command, line in (
            ("convert_hf_to_megatron", "--load-dir fused --save-dir out"),
            ("qat_convert", "--input_bin latent --output out"),
            ("inspect_checkpoint", "fused"),
        ):
            root = "latent" if "latent" in line else "fused"
            yield Case(
                "headers",
                f"{command} safetensors: {name}",
                command,
                tuple(line.split()),
                prepare=_header(root, change),
                says=(".safetensors",),
                status=(2, 3),
            )
    for name, where in (
        ("a file outside", "../weights.bin"),
        ("an absolute path", "/etc/passwd"),
        ("a directory", "."),
        ("a number", 3),
    ):
        yield Case(
            "headers",
            f"convert_hf_to_megatron index: {name}",
            "convert_hf_to_megatron",
            tuple("--load-dir sharded --save-dir out".split()),
            prepare=_index(where),
            says=("index.json", str(where)),
        )


def _header(root: str, change: Callable[[dict], object]) -> Prepare:
    def prepare(here: Path) -> None:
        damage.forget_digests(here / root)
        damage.edit_safetensors(here / root / "model.safetensors", change)

    return prepare


def _index(where: object) -> Prepare:
    def change(content: dict) -> dict:
        return {**content, "weight_map": dict.fromkeys(content["weight_map"], where)}

    def prepare(here: Path) -> None:
        damage.forget_digests(here / "sharded")
        damage.edit_json(here / "sharded" / "model.safetensors.index.json", change)

    return prepare


# ---------------------------------------------------------------------------------------- YAML and records

_BAD_YAML = {
    "a key twice": "{key}: 1\n{key}: 2\n",
    "a date that is none": "{key}: 2024-13-45\n",
    "5,000 digits": "{key}: " + "9" * 5000 + "\n",
    "nested 3,000 deep": "{key}: " + "[" * 3000 + "]" * 3000 + "\n",
    "a list as key": "? [1, 2]\n: 3\n",
    "a mapping as key": "? {{a: 1}}\n: 3\n",
    "an object": "{key}: !!python/object/apply:os.system ['touch " + damage.MARKER + "']\n",
    "an alias of itself": "{key}: &a [*a]\n",
    "laughs": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    .replace("{", "{{")
    .replace("}", "}}"),
    "a bare word": "word\n",
    "a list": "[1, 2]\n",
    "an unknown key": "no-such-key: 1\n",
    "unfinished": "{key}: [1, 2\n",
    "binary": "\x00\x01\x02",
}


def _yaml(world: Path) -> Iterator[Case]:
    """Job files, recipes and presets that are no YAML, or not what they should be."""
    train = COMMANDS["pretrain"].good
    for command, argv, name, key in (
        ("run", ("job.yaml", "--print"), "job.yaml", "model"),
        ("preflight", ("job.yaml",), "job.yaml", "model"),
        ("pretrain", (*train, "--ternary-recipe", "recipe.yaml"), "recipe.yaml", "configs"),
        ("pretrain", ("--model", "preset.yaml", *train), "preset.yaml", "flags"),
    ):
        for what, text in _BAD_YAML.items():
            yield Case(
                "yaml",
                f"{command} {name}: {what}",
                command,
                argv,
                prepare=_text(name, text.format(key=key)),
                says=(name,),
            )
    for change in (
        "cluster.nodes=0",
        "cluster.nodes=-1",
        "cluster.nodes=1.5",
        "cluster.nodes=nan",
        "cluster.master-port=99999",
        "cluster.devices-per-node=0",
        "cluster.max-restarts=-1",
        "cluster.subnet=10.0.0.1/8",
        "cluster.hosts=[a b]",
        "cluster.no-such=1",
        "cluster.environment={A B: 1}",
        "training.lr=nan",
        "training.lr=-1",
        "training.lr=.inf",
        "training.micro-batch-size=0",
        "training.micro-batch-size=true",
        "training.train-iters=1e30",
        "training.no-such=1",
        "model.preset=3",
        "model.preset=no-such",
        "model.num-layers=0",
        "data.split=[1]",
        "ternary.ternary=yes",
        "ternary.ternary-group-size=7",
        "host.kind=other",
        "host.flags={a: 1}",
        "nonsense",
        "=1",
        "training.lr.deeper=1",
        "checkpoint.save={a: 1}",
        "training={}",
        "cluster.device-memory-gib=.nan",
    ):
        for command, more in (("run", ("--print",)), ("preflight", ())):
            yield Case(
                "yaml",
                f"{command} --set {change}",
                command,
                ("job.yaml", *more, "--set", change),
                status=(2, 3),
                says=tuple(change.partition("=")[0].split(".")[-1:]) + ("section.key=value", "train-iters"),
            )
    for what, text in {
        "an unknown config": "configs: {a: {group_size: -1}}\nmatchers: {m: {config: b, type: glob, pattern: '*'}}\n",
        "group size 0": "configs: {a: {group_size: 0}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "group size 48": "configs: {a: {group_size: 48}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "group size true": "configs: {a: {group_size: true}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "eps nan": "configs: {a: {eps: .nan}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "eps negative": "configs: {a: {eps: -1}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "an idle pattern": "configs: {a: {group_size: -1}}\nmatchers: {m: {config: a, type: glob, pattern: '*.no_such'}}\n",
        "no pattern": "configs: {a: {group_size: -1}}\nmatchers: {m: {config: a, type: glob}}\n",
        "a typo": "configs: {a: {group_sise: -1}}\nmatchers: {m: {config: a, type: glob, pattern: '*'}}\n",
        "nothing": "configs: {}\nmatchers: {}\n",
    }.items():
        yield Case(
            "yaml",
            f"recipe: {what}",
            "pretrain",
            (*train, "--ternary-recipe", "recipe.yaml"),
            prepare=_text("recipe.yaml", text),
            says=("recipe.yaml", "no_such", "group", "48"),
        )


def _text(name: str, text: str) -> Prepare:
    return lambda root: (root / name).write_text(text) and None


def _records(world: Path) -> Iterator[Case]:
    """Quantizer records that contradict themselves or hold what no quantizer has."""
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
    for command, root, line in _READERS:
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


# ---------------------------------------------------------------------------------------- data


def _data(world: Path) -> Iterator[Case]:
    """Token files, splits and corpora."""
    train = COMMANDS["pretrain"].good
    prefix = "data/corpus_text_document"
    for command, argv in (("pretrain", train), ("preflight", ("job.yaml",))):
        for suffix in (".bin", ".idx"):
            for way, function in damage.FILE_DAMAGE.items():
                yield Case(
                    "data",
                    f"{command} {suffix}: {way}",
                    command,
                    argv,
                    prepare=_damaging(prefix + suffix, function),
                    says=(f"corpus_text_document{suffix}", "corpus_text_document"),
                    status=(2, 3),
                )
        for offset, what in (
            (0, "magic"),
            (9, "version"),
            (17, "dtype"),
            (18, "count"),
            (26, "documents"),
            (34, "lengths"),
        ):
            yield Case(
                "data",
                f"{command} .idx: {what}",
                command,
                argv,
                prepare=_overwrite_bytes(prefix + ".idx", offset),
                says=("corpus_text_document",),
                status=(2, 3),
            )
    yield Case(
        "data",
        "pretrain tokens beyond the vocabulary",
        "pretrain",
        train,
        prepare=_fill(prefix + ".bin"),
        says=("corpus_text_document", "vocabulary"),
    )
    for split in (
        "",
        "a,b,c",
        "1,2,3,4,5",
        "-1,1,1",
        "nan,1,1",
        "0,0,0",
        "inf,0,0",
        "0,100,0",
        "100,0,0",
        "99.9,0.1,0",
    ):
        yield Case(
            "data",
            f"pretrain --split={split}",
            "pretrain",
            (*train, f"--split={split}"),
            says=("split",),
            accepts=split == "99.9,0.1,0",
        )
    yield Case(
        "data",
        "pretrain default split of few documents",
        "pretrain",
        (*train, "--split=969,30,1"),
        prepare=_few,
        says=("split",),
        accepts=True,
    )
    for path in (
        "nowhere/x",
        "data",
        "0.5",
        "0.5 data/corpus_text_document 0.5",
        "nan data/corpus_text_document 1 data/corpus_text_document",
        "-1 data/corpus_text_document 2 data/corpus_text_document",
    ):
        yield Case(
            "data",
            f"pretrain --data-path {path}",
            "pretrain",
            (*train, "--data-path", *path.split()),
            says=("data", "weight", path.split()[0]),
        )
    preprocess = tuple("--tokenizer-model tokenizer.model --append-eod --output-prefix out/c --input x.jsonl".split())
    for what, text in {
        "no key": '{"txt": "a"}\n',
        "a number": '{"text": 3}\n',
        "a list": "[1]\n",
        "half a line": '{"text": "a\n',
        "nested": '{"text": ' + "[" * 100_000 + "\n",
        "nothing": "",
        "white space": '{"text": "  "}\n',
        "half a surrogate": '{"text": "\\ud800"}\n',
        "latin": '{"text": "\xe9"}\n',
        "a word": "word\n",
    }.items():
        yield Case(
            "data",
            f"preprocess_data {what}",
            "preprocess_data",
            preprocess,
            prepare=_latin("x.jsonl", text),
            says=("x.jsonl", "documents"),
        )
    for name, content in (("x.txt.gz", b"no gzip"), ("x.unknown", b"text"), ("x.txt", b"\xff\xfe")):
        argv = tuple(f"--tokenizer-model tokenizer.model --append-eod --output-prefix out/c --input {name}".split())
        yield Case(
            "data", f"preprocess_data {name}", "preprocess_data", argv, prepare=_bytes(name, content), says=(name,)
        )
    size = tuple(
        "--input corpus.jsonl --train-tokenizer new.model --append-eod --output-prefix out/c --vocab-size".split()
    )
    for text in ("1", "5", "1000000", "2000000000"):
        yield Case(
            "data",
            f"preprocess_data --vocab-size {text}",
            "preprocess_data",
            (*size, text),
            says=("vocab", "--vocab-size"),
        )
    # A tokenizer that does not fit the model.
    yield Case(
        "data",
        "generate with a smaller tokenizer",
        "generate",
        tuple("--load run --prompt fox --num-tokens 2 --tokenizer-model small.model".split()),
        prepare=_small_tokenizer,
        says=("tokenizer", "small.model"),
    )


def _small_tokenizer(root: Path) -> None:
    from bitcpm_megatron.training.tokenizer import train_sentencepiece

    texts = [json.loads(line)["text"] for line in (root / "corpus.jsonl").read_text().splitlines()]
    train_sentencepiece(iter(texts), root / "small.model", 290)


def _few(root: Path) -> None:
    """Three documents instead of sixty."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = root / "data" / "corpus_text_document"
    documents = [np.asarray(IndexedDataset(str(prefix))[i]) for i in range(3)]
    for path in (root / "data").glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=documents[0].dtype.type)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


def _overwrite_bytes(name: str, offset: int) -> Prepare:
    def prepare(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[offset : offset + 8] = b"\xfe" * len(content[offset : offset + 8])
        (root / name).write_bytes(content)

    return prepare


def _fill(name: str) -> Prepare:
    return lambda root: (root / name).write_bytes(b"\xff\xfe" * ((root / name).stat().st_size // 2)) and None


def _latin(name: str, text: str) -> Prepare:
    return lambda root: (root / name).write_bytes(text.encode("latin-1")) and None


def _bytes(name: str, content: bytes) -> Prepare:
    return lambda root: (root / name).write_bytes(content) and None


def _overwriting(world: Path) -> Iterator[Case]:
    """Outputs that are inputs, or hold something."""
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


def _requests(world: Path) -> Iterator[Case]:
    """Requests that contradict each other or the files."""
    train = COMMANDS["pretrain"].good
    for more in (
        "--num-attention-heads 3",
        "--hidden-size 65",
        "--seq-length 64",
        "--min-lr 1",
        "--lr-warmup-iters 2",
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--sequence-parallel",
        "--overlap-param-gather",
        "--mock-data",
        "--save-interval 1 --exit-on-missing-checkpoint",
        "--ternary-group-size 48",
        "--ternary-group-size 96",
        "--ternary-row-parallel-shards 3",
        "--ternary-group-size 32 --ternary-row-parallel-shards 2",
        "--moe-router-topk 2",
        "--num-experts 2 --moe-router-topk 3",
        "--recompute-method uniform",
        "--lr-decay-style WSD",
        "--ternary-backend triton-no",
        "--load run --hidden-size 128 --num-attention-heads 4",
        "--load run --seed 7",
        "--load run --ternary-group-size 32",
        "--load run --vocab-size 512",
        "--vocab-size 5",
        "--finetune",
        "--rotary-base 7 --position-embedding-type learned_absolute",
        "--distributed-backend nccl",
        "--load run --adam-beta1 0.5",
        "--load corpus.txt",
        "--global-batch-size 3 --micro-batch-size 2",
    ):
        yield Case("requests", f"pretrain {more}", "pretrain", (*train, *more.split()), status=(2,))
    for command, line in (
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --max-shard-size 0"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --max-shard-size -5GB"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --max-shard-size many"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --hf-architecture GraniteX"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --ternary-group-size 32"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --vocab-size 5"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --tokenizer nowhere"),
        ("convert_hf_to_megatron", "--load-dir fused --save-dir out --format legacy --target-tensor-parallel-size 3"),
        ("convert_hf_to_megatron", "--load-dir fused --save-dir out --format legacy --target-pipeline-parallel-size 7"),
        ("convert_hf_to_megatron", "--load-dir fused --save-dir out --target-virtual-pipeline-parallel-size 2"),
        ("qat_convert", "--input_bin latent --output out --group_size 48"),
        ("qat_convert", "--input_bin fused --output out"),
        ("qat_convert", "--input_bin latent --output out --quant_type binary"),
        ("generate", "--load run --prompt fox --temperature nan --tokenizer-model tokenizer.model"),
        ("generate", "--load run --prompt= --tokenizer-model tokenizer.model"),
        ("presets", "stray"),
        ("run", "no-such-job --print"),
        ("preflight", "no-such-job"),
        ("run", "job.yaml --print --node-rank 5"),
    ):
        argv = tuple(line.split())
        # A fused directory is fused already: done, and nothing is changed.
        yield Case(
            "requests", f"{command} {line}", command, argv, accepts="--input_bin fused" in line or command == "presets"
        )


# ---------------------------------------------------------------------------------------- the API


def _api(world: Path) -> Iterator[Case]:
    for name, call in CALLS.items():
        yield Case("api", f"api: {name}", call=call)

# SPDX-License-Identifier: Apache-2.0
"""Cases of Hugging Face directories with a wrong configuration, header or index."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .. import damage
from .case import Case, Prepare


def configs(world: Path) -> Iterator[Case]:
    """Yields cases of ``config.json`` with numbers that no model has, or with invalid contents."""
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
                    # qat_convert fuses weights one by one and does not need the model's shape.
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
                # 10**9 positions, a base of 10**9 and an epsilon of 0.5 are unusual but possible.
                accepts=value is None
                or (key, name)
                in (("max_position_embeddings", "huge"), ("rope_theta", "huge"), ("rms_norm_eps", "half")),
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


def headers(world: Path) -> Iterator[Case]:
    """Yields cases of safetensors files with a wrong header or index."""

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

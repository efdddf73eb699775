# SPDX-License-Identifier: Apache-2.0
"""Packed samples for hosts, weights that are already ternary, and their losses in plain Transformers."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from host_runs import CHECKOUT, SAMPLES, STUBS, Host, Material, _tool
from safetensors.torch import load_file, save_file

from bitcpm_megatron import QuantizerConfig, fake_quantize

ROW, END, IGNORED = 64, 2, -100
RESET = "--reset-position-ids --reset-attention-mask --train-iters 1".split()

Piece = tuple[Sequence[int], Sequence[int]]
"""Tokens that attend to each other, and their labels: the next tokens, or :data:`IGNORED` if none is learned."""


def rows() -> list[list[int]]:
    """Returns the rows of one step, each with the token after it; documents of 5 to 40 tokens cross their ends."""
    draw = random.Random(7)
    tokens = [draw.randrange(END + 1, 512) for _ in range(SAMPLES * ROW + 1)]
    end = draw.randrange(5, 40)
    while end < len(tokens):
        tokens[end] = END
        end += draw.randrange(5, 40)
    return [tokens[start : start + ROW + 1] for start in range(0, SAMPLES * ROW, ROW)]


def documents(row: Sequence[int]) -> list[Piece]:
    """Returns the documents of a row, each up to its end-of-document token."""
    bounds = sorted({0, *(i + 1 for i in range(ROW) if row[i] == END), ROW})
    return [(row[a:b], row[a + 1 : b + 1]) for a, b in itertools.pairwise(bounds)]


def instructions(prefix: Path, cut: int | None = None) -> list[list[Piece]]:
    """Returns the samples of every row that MindSpeed-LLM packed; the token after position ``cut`` is not learned."""
    ids, labels, numbers = (
        numpy.fromfile(f"{prefix}_packed_{field}_document.bin", dtype=numpy.int32).reshape(-1, ROW).tolist()
        for field in ("input_ids", "labels", "attention_mask")
    )
    found = []
    for row, row_labels, row_numbers in zip(ids, labels, numbers, strict=True):
        wanted = [*row_labels[1:], IGNORED]
        if cut is not None:
            wanted[cut] = IGNORED
        bounds = [i for i in range(ROW) if i == 0 or row_numbers[i] != row_numbers[i - 1]]
        found.append([(row[a:b], wanted[a:b]) for a, b in itertools.pairwise([*bounds, ROW])])
    return found


def joined(micro_batch: Sequence[Piece]) -> list[Piece]:
    """Returns the pieces of a row as one piece, in which later tokens attend to all earlier ones."""
    tokens, wanted = zip(*micro_batch, strict=True)
    return [(sum(map(list, tokens), []), sum(map(list, wanted), []))]


def loss(weights: Mapping[str, torch.Tensor], material: Material, micro_batches: Sequence[Sequence[Piece]]) -> float:
    """Returns the mean over micro-batches of the mean loss of their learned tokens.

    Plain Transformers computes each piece by itself.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(material.directory / "hf", dtype=torch.bfloat16)
    model.load_state_dict(weights)
    means = []
    for pieces in micro_batches:
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([tokens])).logits[0].float() for tokens, _ in pieces])
        wanted = torch.tensor([label for _, labels in pieces for label in labels])
        means.append(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED).item())
    return sum(means) / len(means)


def quantized_as_shipped(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight of a Hugging Face model, quantized as in a training with two row-parallel shards."""
    if not name.endswith("_proj.weight"):
        return weight
    shards = 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
    return fake_quantize(weight, QuantizerConfig(group_size=weight.shape[1] // shards))


@dataclass(frozen=True)
class Packed:
    """Packed samples that are stored with a material, and its model with weights that are already ternary.

    Attributes:
        material: the material, which contains the latent model and the tokenizer.
    """

    material: Material

    @property
    def data(self) -> list[str]:
        """Flags that name the token file of :func:`rows` and the tokenizer."""
        directory = self.material.directory
        return (
            f"--data-path {directory}/packed_text_document --tokenizer-model {directory}/tokenizer.model "
            f"--data-cache-path {directory}/packed-cache"
        ).split()

    @property
    def ternary(self) -> dict[str, torch.Tensor]:
        """The quantized weights, by Hugging Face names."""
        latent = load_file(self.material.directory / "hf" / "model.safetensors")
        return {name: quantized_as_shipped(name, weight) for name, weight in latent.items()}

    @property
    def baked(self) -> list[str]:
        """Flags that load the quantized weights as the weights of a BF16 training."""
        return ["--pretrained-checkpoint", str(self.material.directory / "start-baked"), "--allow-quantizer-change"]

    def instructions(self, host: Host) -> Path:
        """Packs samples with MindSpeed-LLM's preprocess_data.py, with their boundaries; returns the files' prefix."""
        prefix = self.material.directory / "neat"
        if Path(f"{prefix}_packed_labels_document.idx").exists():
            return prefix
        draw = random.Random(3)
        texts = [
            " ".join(f"w{draw.randrange(3, 512)}" for _ in range(draw.randrange(4, 14))) for _ in range(6 * SAMPLES)
        ]
        samples = [{"instruction": a, "input": "", "output": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
        text = prefix.with_suffix(".jsonl")
        text.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        checkouts = [os.environ[name] for name in (host.megatron, host.mindspeed, host.llm) if name]
        packages = [os.environ.get(name, "") for name in (*host.packages, "HOST_SITE_PACKAGES")]
        flags = "--handler-name AlpacaStyleInstructionHandler --prompt-type empty --pack --neat-pack".split()
        flags += ["--input", str(text), "--output-prefix", str(prefix), "--seq-length", str(ROW)]
        flags += ["--tokenizer-name-or-path", str(self.material.directory / "hf-tokenizer")]
        done = subprocess.run(
            [sys.executable, str(host.script("preprocess_data.py")), *flags, "--cache-dir", f"{prefix}-cache"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(STUBS), *filter(None, packages), *checkouts])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return prefix

    @classmethod
    def make(cls, material: Material) -> "Packed":
        """Writes a token file of all rows, of which a step takes each once, and the checkpoint with ternary weights."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        packed, directory = cls(material), material.directory
        prefix = directory / "packed_text_document"
        if not prefix.with_suffix(".idx").exists():
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
            tokens = [token for row in rows() for token in row[:ROW]] + rows()[-1][ROW:]
            builder.add_document(tokens, [len(tokens)])
            builder.finalize(f"{prefix}.idx")
        if not (directory / "start-baked").exists():
            (directory / "hf-baked").mkdir()
            shutil.copy(directory / "hf" / "config.json", directory / "hf-baked")
            save_file(packed.ternary, directory / "hf-baked" / "model.safetensors", metadata={"format": "pt"})
            tool = [sys.executable, str(CHECKOUT / "checkpoint_tools" / "convert_hf_to_megatron.py")]
            _tool([*tool, "--load-dir", str(directory / "hf-baked"), "--save-dir", str(directory / "start-baked")])
        return packed

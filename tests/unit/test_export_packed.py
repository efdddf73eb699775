# SPDX-License-Identifier: Apache-2.0
"""Packed exports: what others read of them is the weight of the training forward, bit for bit."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="pip install 'bitcpm_megatron[export]'")

from safetensors.torch import load_file
from support.packed import architecture, decoded, latent_model, open_gguf, value, write_sentence_piece

from bitcpm_megatron.checkpoint_tools import export_packed, qat_convert
from bitcpm_megatron.quantization.record import QuantizerRecord

GROUPS = [(-1, 1), (-1, 2), (-1, 4), (-1, 8), (256, 1), (128, 2), (64, 4), (32, 8)]


def export(source: Path, target: Path, form: str, *more: str) -> int:
    argv = ["--load-dir", str(source), "--save-dir", str(target), "--format", form, *more]
    return export_packed.main(argv)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Latent models by group size and shards, each with the weights of its training forward; made once."""
    made = {}

    def model(group: int = -1, shards: int = 1) -> tuple[Path, dict[str, torch.Tensor]]:
        if (group, shards) not in made:
            directory = tmp_path_factory.mktemp("models") / f"g{group}-s{shards}"
            made[group, shards] = directory, latent_model(directory, architecture(), group, shards)
            write_sentence_piece(directory)
        return made[group, shards]

    return model


@pytest.mark.parametrize(("group", "shards"), GROUPS)
@pytest.mark.parametrize("linear_type", ["auto", "Q4_0", "BF16", "F32", "F16"])
def test_gguf_holds_the_weights_of_the_training_forward(models, tmp_path, group, shards, linear_type, capsys) -> None:
    source, forward = models(group, shards)
    assert export(source, tmp_path / "out", "gguf", "--linear-type", linear_type) == 0
    file = open_gguf(tmp_path / "out" / "model.gguf")
    found = decoded(file)
    assert found.keys() == forward.keys()
    for name, weight in forward.items():
        kind, values = found[name]
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(values, weight.float()), name
        if linear_type != "auto" and "_proj" in name:
            assert kind == linear_type
    printed = capsys.readouterr().out
    data = (tmp_path / "out" / "model.gguf").stat().st_size - file.data_offset
    assert f"\n{data:,} bytes, " in printed

# SPDX-License-Identifier: Apache-2.0
"""Tests of packed exports in vLLM on a CPU: ``make test-vllm`` installs vLLM and runs them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.packed import architecture, latent_model, write_config

from bitcpm_megatron.checkpoint_tools import export_packed

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="installs vLLM, some 3 GB: make test-vllm")
TOKENS = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()
GRANITE = dict(embedding_multiplier=12.0, residual_multiplier=1.0, logits_scaling=4.0)


def packed(place: Path, bits: int) -> Path:
    out = place / f"packed-{bits}"
    argv = ["--load-dir", str(place / "latent"), "--save-dir", str(out), "--format", "compressed-tensors"]
    assert export_packed.main([*argv, "--bits", str(bits)]) == 0
    return out


def served(model: Path, place: Path) -> tuple[list[dict[int, float]], str]:
    """Returns log-probabilities by position and id (none if vLLM cannot serve the model), and vLLM's output."""
    (place / "tokens.json").write_text(json.dumps(TOKENS))
    worker = Path(__file__).with_name("vllm_logprobs.py")
    command = [PYTHON, str(worker), str(model), str(place / "tokens.json"), str(place / "told.json")]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=alone, timeout=600)
    told = json.loads((place / "told.json").read_text()) if run.returncode == 0 else []
    return [{int(token): chance for token, chance in at.items()} for at in told], run.stdout + run.stderr


def furthest(told: list[dict[int, float]], exact: torch.Tensor) -> float:
    return max(abs(chance - float(exact[i, token])) for i, at in enumerate(told) for token, chance in at.items())


@pytest.mark.verifies(
    "checkpoints",
    "vLLM on a CPU serves packed 4-bit exports; its log-probabilities deviate from fp32 by less than twice as much "
    "as those of Transformers in bf16 (`make test-vllm`)",
    cuda="not run",
    npu="-",
)
@pytest.mark.parametrize(
    ("multipliers", "group", "shards"), [({}, -1, 1), ({}, 64, 1), ({}, -1, 4), (GRANITE, -1, 1), (GRANITE, 128, 1)]
)
def test_vllm_serves_four_bits(multipliers: dict, group: int, shards: int, tmp_path: Path) -> None:
    a = architecture(max_position_embeddings=256, **multipliers)
    weights = latent_model(tmp_path / "latent", a, group, shards)
    (tmp_path / "dense").mkdir()
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    write_config(tmp_path / "dense", a, torch.bfloat16)
    exact, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)(torch.tensor([TOKENS]))
        .logits[0]
        .detach()
        .float()
        .log_softmax(-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    model = packed(tmp_path, 4)
    told, said = served(model, tmp_path)
    assert len(told) == len(TOKENS) - 1, said[-3000:]
    off, allowed = furthest(told, exact), 2 * float((rounded - exact).abs().max())
    print(f"{off:.3f} from fp32; Transformers in bf16 {allowed / 2:.3f}")
    assert off < allowed
    # The bound is small enough to detect wrong scales in half of the rows of each linear.
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name][: len(tensors[name]) // 2] *= 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert furthest(served(model, tmp_path)[0], exact) > allowed


def test_vllm_refuses_two_bits_on_a_cpu(tmp_path: Path) -> None:
    """docs/packed.md and the model card say that vLLM on a CPU needs 4 bits."""
    latent_model(tmp_path / "latent", architecture(max_position_embeddings=256))
    told, said = served(packed(tmp_path, 2), tmp_path)
    assert not told
    assert "uint2b2" in said, said[-3000:]

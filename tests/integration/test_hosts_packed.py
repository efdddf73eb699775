# SPDX-License-Identifier: Apache-2.0
"""Tests of packed samples and instructions, also with Ulysses, in unmodified MindSpeed and MindSpeed-LLM.

Run them with ``make test-hosts``. The same hosts also train without the plugin, from weights that are already ternary.
Both must take the same first step, in loss and gradient norm, because the plugin changes only the weights.
Transformers, which computes every document by itself, gives the expected loss.
"""

from pathlib import Path

import pytest
import torch
from host_runs import HOSTS, LONG, MODEL, SHORT, TERNARY, TP2, TRAINING, UPSTREAM, Material, run
from packed_runs import RESET, ROW, Packed, documents, instructions, joined, loss, rows
from test_hosts import LLM_HOST, host_named, succeeded

FLASH = ["--use-flash-attn"]
ULYSSES = "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo --variable-seq-lengths".split()
LAYOUTS = {"1 process": (1, FLASH), "TP2": (2, [*TP2, *FLASH]), "Ulysses CP2": (2, [*ULYSSES, *FLASH])}
# The operator of fused RoPE has a stand-in that accepts only what its documentation allows.
FUSED_ROPE = {
    f"{name}, fused RoPE": (n, [*flags, "--use-fused-rotary-pos-emb"]) for name, (n, flags) in LAYOUTS.items()
}
PACKING = [name for name in HOSTS if HOSTS[name].mindspeed]
MINDSPEED = "core_v0.12.1 + MindSpeed, local"


@pytest.fixture(scope="session")
def packed(material: Material) -> Packed:
    """Makes rows of several documents, and the checkpoint with ternary weights."""
    return Packed.make(material)


def first_steps(name: str, layout: str, flags: list[str], packed: Packed) -> float:
    """Returns the first loss of a ternary run, after comparing its step with that of the host on ternary weights."""
    host = host_named(name)
    processes, of_layout = {**LAYOUTS, **FUSED_ROPE}[layout]
    common = [*MODEL, *TRAINING, *UPSTREAM, *of_layout, *flags]
    ternary = succeeded(run(host, processes, [*common, *packed.material.start, *TERNARY]), 1)
    alone = succeeded(run(host, processes, [*common, *packed.baked]), 1)
    assert ternary.proved == 16 and alone.proved == 0
    assert "use: the first training step ran the 16 quantized layers" in ternary.output
    assert (ternary.losses, ternary.norms) == (alone.losses, alone.norms)
    return ternary.losses[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, "1 process, fused RoPE", "Ulysses CP2, fused RoPE"])
@pytest.mark.parametrize("name", PACKING)
@pytest.mark.verifies(
    "hosts",
    "packed documents and conversations train correctly in these hosts under MindSpeed, also at CP2 (`make "
    "test-hosts`)",
    cpu="yes¹",
)
def test_packed_documents_are_computed_apart(name: str, layout: str, packed: Packed) -> None:
    found = first_steps(name, layout, [*packed.data, *RESET], packed)
    apart = loss(packed.ternary, packed.material, [documents(row) for row in rows()])
    assert found == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize("name", PACKING)
def test_documents_see_one_another_where_nothing_is_reset(name: str, packed: Packed) -> None:
    """The loss then differs by more than ten times the tolerance of the test above."""
    found = first_steps(name, "1 process", [*packed.data, "--train-iters", "1"], packed)
    apart = [documents(row) for row in rows()]
    together = loss(packed.ternary, packed.material, [joined(row) for row in apart])
    assert found == pytest.approx(together, rel=1e-4)
    assert abs(together - loss(packed.ternary, packed.material, apart)) > 1e-3 * together


@pytest.mark.parametrize("original, layout", [(ROW, "1 process"), (ROW // 2, "1 process"), (ROW // 2, "Ulysses CP2")])
def test_longrope_rotates_packed_samples(original: int, layout: str, packed: Packed, tmp_path: Path) -> None:
    """LongRoPE works with MindSpeed's replacement of the rotary forward, at positions that restart with each document.

    The length of the row, not of documents, chooses the factors.
    """
    host = host_named(MINDSPEED)
    processes, flags = LAYOUTS[layout]
    flags = [*flags, *packed.data, *RESET, *TERNARY, "--rope-scaling-type", "longrope"]
    flags += ["--rope-scaling-short-factor", *map(str, SHORT), "--rope-scaling-long-factor", *map(str, LONG)]
    flags += ["--rope-scaling-original-max-position-embeddings", str(original)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUMP_TO", str(tmp_path))
        patch.setenv("DUMP_SCRIPT", str(host.script("pretrain_gpt.py")))
        script = ["--script", str(Path(__file__).parent / "dump_rotary.py")]
        succeeded(run(host, processes, [*script, *MODEL, *TRAINING, *UPSTREAM, *flags]), 1)
    for rank in range(processes):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["forward"] == "mindspeed.core.transformer.flash_attention.reset_attention_mask.adaptor"
        assert torch.equal(found["table"].squeeze(), longrope_angles(original))
        slices = [restarting(row)[rank * ROW // processes :][: ROW // processes] for row in rows()]
        assert found["positions"].squeeze(1).tolist() in slices


def longrope_angles(original: int) -> torch.Tensor:
    """Returns the angles of Transformers' LongRoPE at the positions of a row, ``[ROW, 16]`` (channels per head)."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG}
    rope["original_max_position_embeddings"] = original
    shape = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": ROW}
    inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](LlamaConfig(**shape, rope_parameters=rope), "cpu", seq_len=ROW)
    return torch.outer(torch.arange(ROW).float(), inv_freq).repeat(1, 2)


def restarting(row: list[int]) -> list[int]:
    """Returns the position of every token in its document."""
    return [position for tokens, _ in documents(row) for position in range(len(tokens))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_instructions_are_learned_apart(layout: str, packed: Packed) -> None:
    """In samples that MindSpeed-LLM packed itself, every answer is learned from its own prompt only.

    With context parallelism, MindSpeed-LLM does not learn a token that is the first of a rank's slice.
    """
    prefix = packed.instructions(host_named(LLM_HOST))
    micro_batches = instructions(prefix, cut=ROW // 2 - 1 if layout == "Ulysses CP2" else None)
    flags = "--script posttrain_gpt.py --stage sft --is-instruction-dataset --prompt-type empty --finetune".split()
    flags += ["--tokenizer-type", "PretrainedFromHF", "--data-path", str(prefix), *RESET, "--neat-pack"]
    flags += ["--tokenizer-name-or-path", str(packed.material.directory / "hf-tokenizer")]
    flags += ["--global-batch-size", str(len(micro_batches))]
    found = first_steps(LLM_HOST, layout, flags, packed)
    assert found == pytest.approx(loss(packed.ternary, packed.material, micro_batches), rel=2e-4)
    everything = [[(tokens, [*tokens[1:], -100]) for tokens, _ in row] for row in micro_batches]
    for other in (everything, [joined(row) for row in micro_batches]):
        assert abs(found - loss(packed.ternary, packed.material, other)) > 2e-3 * found

# SPDX-License-Identifier: Apache-2.0
"""Tests of unmodified Megatron-LM and MindSpeed jobs on the CPU, by ``launch/pretrain_gpt.py``: ``make test-hosts``."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from host_runs import (
    CHECKOUT,
    HOSTS,
    HOW_TO,
    LARGE,
    LORA,
    MODEL,
    OTHER_SHAPES,
    OVERLAPS,
    TERNARY,
    TP2,
    TRAINING,
    UPSTREAM,
    Host,
    Material,
    Result,
    _tool,
    run,
    run_ours,
    samples,
)
from packed_runs import quantized_as_shipped
from safetensors.torch import load_file

LLM_HOST = "core_v0.12.1 + MindSpeed-LLM, local"
CASES = [(host, case) for host in HOSTS for case in HOSTS[host].cases]
SP = [*TP2, "--sequence-parallel", "--use-distributed-optimizer"]
INT8 = ["--ternary", "--ternary-activation-bits", "8", "--ternary-gemm", "int8"]


def host_named(name: str) -> Host:
    """Returns a host, or skips the test with instructions to install it."""
    host = HOSTS[name]
    if host.missing():
        pytest.skip(f"{', '.join(host.missing())} not set: {HOW_TO}")
    return host


@pytest.fixture(scope="session")
def ours(material: Material, tmp_path_factory: pytest.TempPathFactory):
    """Returns a function of starting flags and further flags that returns the first loss of our own loop."""

    @functools.cache
    def first_loss(start: tuple[str, ...], *flags: str) -> float:
        common = [*MODEL, *TRAINING, *material.data, *start, "--no-gradient-accumulation-fusion"]
        return run_ours(1, [*common, *flags], tmp_path_factory.mktemp("ours"))[0]

    return first_loss


def succeeded(result, steps: int):
    """Asserts that a run ended without an error after a number of steps, and returns its result."""
    assert result.status == 0, result.output[-6000:]
    assert len(result.losses) == steps, result.output[-6000:]
    return result


@pytest.mark.parametrize("name, case", CASES)
@pytest.mark.verifies(
    "hosts",
    "unmodified `pretrain_gpt.py` scripts train ternary models: Megatron-LM 0.16.1, 0.12.1 and 0.19.0, Megatron-LM "
    "under MindSpeed (with a stand-in for torch_npu), and MindSpeed-LLM (`make test-hosts`, needs their checkouts)",
    cpu="yes¹",
)
def test_it_trains_ternary_at_every_layout(name: str, case: str, material: Material, ours) -> None:
    host = host_named(name)
    processes, flags = host.cases[case]
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *material.start, *flags]
    bf16 = succeeded(run(host, processes, common), 20).losses
    result = succeeded(run(host, processes, [*common, *TERNARY]), 20)
    ternary = result.losses
    layers = 2 if "--pipeline-model-parallel-size" in flags else 4
    assert result.proved == 4 * layers
    assert bf16[-1] < bf16[0] - 0.8 and ternary[-1] < ternary[0] - 0.8
    assert all(a != b for a, b in zip(bf16, ternary, strict=True))
    assert ternary[0] == pytest.approx(ours(tuple(material.start), *TERNARY), rel=1e-4)
    assert bf16[0] == pytest.approx(ours(tuple(material.start)), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in HOSTS if name != LLM_HOST])
def test_a_minicpm_computes_as_in_our_loop(name: str, material: Material, ours) -> None:
    """Multipliers and LongRoPE take effect: the loss is not that of a Llama, and other multipliers are refused.

    MindSpeed-LLM is left out because it has its own implementation of both.
    """
    host = host_named(name)
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *TERNARY, "--exit-interval", "1"]
    found = succeeded(run(host, 1, [*common, *material.minicpm]), 1).losses[0]
    assert found == pytest.approx(ours(tuple(material.minicpm), *TERNARY), rel=2e-4)
    assert abs(found - ours(tuple(material.start), *TERNARY)) > 1e-3
    refused = run(host, 1, [*common, *material.minicpm, "--scale-emb", "10"])
    assert refused.status != 0 and "embedding_multiplier=12.0" in refused.output, refused.output[-3000:]


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
@pytest.mark.parametrize("name", HOSTS)
def test_its_checkpoints_resume_and_convert_exactly(name: str, form: str, material: Material, tmp_path: Path) -> None:
    """The fused export contains exactly the weights that the resumed run's first forward used."""
    host = host_named(name)
    start = material.start if form == "torch_dist" else ["--pretrained-checkpoint", str(legacy(host, material))]
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *SP, "--ternary", "--ckpt-format", form]
    saved = tmp_path / "saved"
    save = ["--save", str(saved), "--save-interval", "5", "--exit-interval", "5"]
    succeeded(run(host, 2, [*common, *start, *save]), 5)
    assert (saved / "iter_0000005" / "ternary_quantizer.json").is_file()

    again = dumping(host, "pretrain_gpt.py", [*common, "--load", str(saved), "--exit-interval", "7"], tmp_path)
    assert "row-parallel shards: 2, as" in again.output and "quantizer: as the checkpoint records" in again.output

    tool = [sys.executable, str(CHECKOUT / "checkpoint_tools" / "convert_megatron_to_hf.py"), "--weights", "fused"]
    _tool([*tool, "--load-dir", str(saved), "--save-dir", str(tmp_path / "hf"), "--vocab-size", "512", "--verify"])
    assert_same_weights(load_file(tmp_path / "hf" / "model.safetensors"), torch.load(tmp_path / "rank0.pt"))


@pytest.mark.parametrize("name", HOSTS)
def test_weights_that_live_in_the_parameters_change_no_loss(name: str, material: Material) -> None:
    host = host_named(name)
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *material.start, *OVERLAPS, *TERNARY]
    common += ["--exit-interval", "6"]
    resident = succeeded(run(host, 2, common), 6)
    step = succeeded(run(host, 2, [*common, "--ternary-cache", "step"]), 6)
    assert "cache: resident" in resident.output and "cache: resident" not in step.output
    assert resident.losses == step.losses
    assert len(resident.norms) == 6 and resident.norms == step.norms


@pytest.mark.parametrize("name", HOSTS)
def test_clipped_gradients_are_the_same_wherever_quantized_weights_are(name: str, material: Material) -> None:
    host = host_named(name)
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *material.start, *OVERLAPS, *TERNARY]
    common += ["--exit-interval", "3"]
    straight = succeeded(run(host, 2, common), 3)
    clipped = [*common, "--ternary-estimator", "clipped"]
    resident = succeeded(run(host, 2, clipped), 3)
    step = succeeded(run(host, 2, [*clipped, "--ternary-cache", "step"]), 3)
    assert "estimator: clipped" in resident.output and "estimator:" not in straight.output
    assert resident.losses == step.losses and resident.norms == step.norms
    # This is the first step, before any weight has changed.
    assert straight.losses[0] == resident.losses[0] and float(straight.norms[0]) > float(resident.norms[0])


# Transformer Engine's layers normalize their input themselves: 8-bit activations are refused there.
@pytest.mark.parametrize("name", [name for name in HOSTS if not name.endswith(", TE")])
def test_int8_gemms_take_the_place_of_its_own(name: str, material: Material, ours) -> None:
    host = host_named(name)
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *material.start, *INT8, "--exit-interval", "2"]
    alone = succeeded(run(host, 1, common), 2)
    assert "int8 GEMM (" in alone.output and alone.proved == 16
    assert alone.losses[0] == pytest.approx(ours(tuple(material.start), *INT8), rel=1e-4)
    # With two row-parallel shards instead of one, the model is nearly the same.
    shared = succeeded(run(host, 2, [*common, *SP, "--ternary-gemm-backward", "int8"]), 2)
    assert shared.losses[0] == pytest.approx(alone.losses[0], rel=1e-2) and shared.losses[1] < shared.losses[0]


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_mindspeed_runs_every_layer_of_other_shapes(case: str, material: Material) -> None:
    host = host_named("core_v0.12.1 + MindSpeed, local")
    layers, processes, flags = OTHER_SHAPES[case]
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *TERNARY, "--exit-interval", "2"]
    result = succeeded(run(host, processes, [*common, *flags]), 2)
    assert result.proved == layers
    assert f"use: the first training step ran the {layers} quantized layers of this rank" in result.output


def test_swapped_attention_computes_what_it_does_without(material: Material) -> None:
    """Swapping must not free quantized weights as if they were activations: micro-batches of a step still use them."""
    host = host_named("core_v0.12.1 + MindSpeed, local")
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *TERNARY, *LARGE, "--exit-interval", "1"]
    expected = succeeded(run(host, 2, common), 1).losses
    assert succeeded(run(host, 2, [*common, "--swap-attention"]), 1).losses == expected


def dumping(host: Host, script: str, flags: list[str], directory: Path) -> Result:
    """Runs two steps of a host's script on two processes, and writes the first one's quantized weights (rank<N>.pt)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUMP_TO", str(directory))
        patch.setenv("DUMP_SCRIPT", str(host.script(script)))
        dump = str(Path(__file__).parent / "dump_quantized.py")
        return succeeded(run(host, 2, ["--script", dump, *flags]), 2)


def legacy(host: Host, material: Material) -> Path:
    """Returns the starting checkpoint in the legacy format, for two tensor-parallel ranks of this host."""
    kind = host.flags[1]
    path = material.directory / f"start-{kind}"
    if not path.exists():
        tool = [sys.executable, str(CHECKOUT / "checkpoint_tools" / "convert_hf_to_megatron.py"), "--format", "legacy"]
        tool += ["--target-tensor-parallel-size", "2", "--transformer-impl", kind]
        _tool([*tool, "--load-dir", str(material.directory / "hf"), "--save-dir", str(path)])
    return path


def assert_same_weights(hf: dict[str, torch.Tensor], quantized: dict[str, torch.Tensor]) -> None:
    """Asserts that every quantized weight of a run equals that of a Hugging Face model bit for bit."""
    assert len(quantized) == 16
    for path, weight in quantized.items():
        layer, module = re.fullmatch(r"decoder\.(layers\.\d+)\.\w+\.(\w+)", path).groups()
        prefix = f"model.{layer}"
        if module == "linear_fc1":
            expected = torch.cat([hf[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
        elif module == "linear_qkv":
            # Each key/value group has its query heads, its key and its value, in this order.
            q, k, v = (hf[f"{prefix}.self_attn.{part}_proj.weight"].reshape(2, -1, 64) for part in "qkv")
            expected = torch.cat([q, k, v], 1).reshape(-1, 64)
        else:
            expected = hf[
                f"{prefix}." + {"linear_fc2": "mlp.down", "linear_proj": "self_attn.o"}[module] + "_proj.weight"
            ]
        assert torch.equal(weight, expected), path


def test_mindspeed_llm_fine_tunes_ternary(material: Material, tmp_path: Path) -> None:
    """Trains all weights, or only adapters, which start at zero, so that the first losses and weights are the same.

    Both start from a legacy checkpoint, the only format whose weights MindSpeed-LLM renames for PEFT.
    """
    host = host_named(LLM_HOST)
    start = ["--load", str(legacy(host, material)), "--ckpt-format", "torch", "--no-load-optim", "--no-load-rng"]
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.instructions, *start, *SP[:3], *TERNARY, "--exit-interval", "2"]
    latent = load_file(material.directory / "hf" / "model.safetensors")
    ternary = {name: quantized_as_shipped(name, weight) for name, weight in latent.items()}
    expected, of_latent = instruction_loss(ternary, material), instruction_loss(latent, material)

    losses = {}
    for kind, flags in {"full": [], "LoRA": LORA}.items():
        (tmp_path / kind).mkdir()
        save = ["--save", str(tmp_path / kind), "--save-interval", "2"]
        result = dumping(host, "posttrain_gpt.py", [*common, *flags, *save], tmp_path / kind)
        assert "use: the first training step ran the 16 quantized layers" in result.output
        assert result.proved == 16
        assert_same_weights(ternary, torch.load(tmp_path / kind / "rank0.pt"))
        assert (tmp_path / kind / "iter_0000002" / "ternary_quantizer.json").is_file()
        losses[kind] = result.losses
    for layer in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        for adapter in ("lora_A", "lora_B"):
            assert re.search(rf"{layer}\.{adapter}\.default +never .* full precision", result.output), result.output
    assert losses["full"][0] == losses["LoRA"][0]
    assert losses["full"][1] != losses["LoRA"][1]
    assert abs(losses["full"][0] - expected) < abs(losses["full"][0] - of_latent) / 4


def instruction_loss(weights: dict[str, torch.Tensor], material: Material) -> float:
    """Returns the mean loss of the samples, which plain Transformers computes for the answers only."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(material.directory / "hf", torch_dtype=torch.bfloat16)
    model.load_state_dict(weights)
    with torch.no_grad():
        found = [
            model(torch.tensor([tokens]), labels=torch.tensor([labels])).loss.item() for tokens, labels in samples()
        ]
    return sum(found) / len(found)


REFUSALS = {
    "core_v0.16.1, local": {
        "--ternary --ternary-group-size 48": "--ternary-group-size:",
        "--ternary --ternary-telemetry-interval 2": "--ternary-telemetry-interval",
        "--ternary --init-model-with-meta-device": "without a checkpoint to load",
        "--ternary --rope-scaling-type longrope": "needs --rope-scaling-short-factor",
        "--ternary-group-size 64": "without --ternary",
        "--distill-alpha 0.5": "--distill-alpha needs --distill-teacher",
        "--distill-targets targets": "--distill-targets targets: samples of a host have no numbers",
        "--distill-teacher teacher --reset-attention-mask": "--reset-attention-mask True: the teacher sees a sample as",
        "--distill-teacher /no/where": "the teacher /no/where: there is no checkpoint",
    },
    "core_v0.12.1 + MindSpeed, local": {
        "--ternary --qat-scheme w4a16-mxfp4": "--qat-scheme w4a16-mxfp4",
        "--distill-teacher teacher --swap-layer-input": "--swap-layer-input True: it changes the layers of every model",
    },
    "core_v0.12.1 + MindSpeed, TE": {
        "--ternary --ternary-activation-bits 8": "normalizes its input itself",
    },
    LLM_HOST: {
        "--ternary --reset-attention-mask --use-flash-attn --rope-scaling-type longrope --short-factor 1 "
        "--long-factor 2 --rope-scaling-original-max-position-embeddings 32": "lose MindSpeed-LLM's LongRoPE",
        "--distill-teacher teacher": "--distill-teacher teacher: MindSpeed-LLM would build it by",
        f"--ternary --lora-fusion {' '.join(LORA)}": "--lora-fusion True: its kernels read the latent weights",
    },
}


@pytest.mark.parametrize("name, flags", [(name, flags) for name in REFUSALS for flags in REFUSALS[name]])
def test_what_cannot_be_done_is_refused_by_name(name: str, flags: str, material: Material) -> None:
    host = host_named(name)
    result = run(host, 1, [*MODEL, *TRAINING, *UPSTREAM, *material.data, *flags.split()])
    assert result.status != 0 and not result.losses
    assert REFUSALS[name][flags] in result.output, result.output[-3000:]
    # The only traceback is torchrun's, which reports that our process failed.
    assert result.output.count("Traceback") == 1, result.output[-3000:]


def test_coc_with_transformer_engine_is_refused_by_mindspeed(material: Material) -> None:
    """If MindSpeed did not refuse it, the probe would: COC replaces GEMMs inside the forward that the plugin wraps."""
    host = host_named("core_v0.12.1 + MindSpeed, TE")
    flags = [*TP2, "--use-ascend-coc", "--ternary"]
    result = run(host, 2, [*MODEL, *TRAINING, *UPSTREAM, *material.data, *flags])
    assert result.status != 0 or result.proved == 16

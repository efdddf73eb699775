# SPDX-License-Identifier: Apache-2.0
"""Unmodified Megatron-LM and MindSpeed jobs on the CPU, through ``launch/pretrain_gpt.py``: ``make test-hosts``."""

import functools
import os
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from host_runs import (
    CHECKOUT,
    HOSTS,
    HOW_TO,
    MODEL,
    TERNARY,
    TP2,
    TRAINING,
    UPSTREAM,
    Host,
    Material,
    _tool,
    run,
    run_ours,
)

CASES = [(host, case) for host in HOSTS for case in HOSTS[host].cases]
SP = [*TP2, "--sequence-parallel", "--use-distributed-optimizer"]


def host_named(name: str) -> Host:
    """A host, or a skip that says how to bring it."""
    host = HOSTS[name]
    if host.missing():
        pytest.skip(f"{', '.join(host.missing())} not set: {HOW_TO}")
    return host


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Token files and the checkpoint that all runs start from."""
    return Material.make(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="session")
def ours(material: Material, tmp_path_factory: pytest.TempPathFactory):
    """First-step loss of our own loop, by what it starts from and further flags."""

    @functools.cache
    def first_loss(start: tuple[str, ...], *flags: str) -> float:
        common = [*MODEL, *TRAINING, *material.data, *start, "--no-gradient-accumulation-fusion"]
        return run_ours(1, [*common, *flags], tmp_path_factory.mktemp("ours"))[0]

    return first_loss


def succeeded(result, steps: int):
    """Asserts that a run ended well after so many steps."""
    assert result.status == 0, result.output[-6000:]
    assert len(result.losses) == steps, result.output[-6000:]
    return result


@pytest.mark.parametrize("name, case", CASES)
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


@pytest.mark.parametrize("name", HOSTS)
def test_a_minicpm_computes_as_in_our_loop(name: str, material: Material, ours) -> None:
    """Multipliers and LongRoPE, with another loss than a Llama of the same weights; other numbers are refused."""
    host = host_named(name)
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *TERNARY, "--exit-interval", "1"]
    found = succeeded(run(host, 1, [*common, *material.minicpm]), 1).losses[0]
    assert found == pytest.approx(ours(tuple(material.minicpm), *TERNARY), rel=2e-4)
    assert abs(found - ours(tuple(material.start), *TERNARY)) > 1e-3
    refused = run(host, 1, [*common, *material.minicpm, "--scale-emb", "10"])
    assert refused.status != 0 and "embedding=12.0" in refused.output, refused.output[-3000:]


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
@pytest.mark.parametrize("name", HOSTS)
def test_its_checkpoints_resume_and_convert_exactly(name: str, form: str, material: Material, tmp_path: Path) -> None:
    """The fused export holds the very weights that the resumed run's first forward used."""
    host = host_named(name)
    start = material.start if form == "torch_dist" else ["--pretrained-checkpoint", str(legacy(host, material))]
    common = [*MODEL, *TRAINING, *UPSTREAM, *material.data, *SP, "--ternary", "--ckpt-format", form]
    saved = tmp_path / "saved"
    save = ["--save", str(saved), "--save-interval", "5", "--exit-interval", "5"]
    succeeded(run(host, 2, [*common, *start, *save]), 5)
    assert (saved / "iter_0000005" / "ternary_quantizer.json").is_file()

    script = ["--script", str(Path(__file__).parent / "dump_quantized.py")]
    environment = {"DUMP_TO": str(tmp_path), "DUMP_SCRIPT": str(Path(os.environ[host.megatron]) / "pretrain_gpt.py")}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        again = succeeded(run(host, 2, [*script, *common, "--load", str(saved), "--exit-interval", "7"]), 2)
    assert "row-parallel shards: 2, as" in again.output and "quantizer: as the checkpoint records" in again.output

    tool = [sys.executable, str(CHECKOUT / "checkpoint_tools" / "convert_megatron_to_hf.py"), "--weights", "fused"]
    _tool([*tool, "--load-dir", str(saved), "--save-dir", str(tmp_path / "hf"), "--vocab-size", "512", "--verify"])
    assert_same_weights(tmp_path / "hf", torch.load(tmp_path / "rank0.pt"))


def legacy(host: Host, material: Material) -> Path:
    """The starting checkpoint in the legacy format, for two tensor-parallel ranks of this host."""
    kind = host.flags[1]
    path = material.directory / f"start-{kind}"
    if not path.exists():
        tool = [sys.executable, str(CHECKOUT / "checkpoint_tools" / "convert_hf_to_megatron.py"), "--format", "legacy"]
        tool += ["--target-tensor-parallel-size", "2", "--transformer-impl", kind]
        _tool([*tool, "--load-dir", str(material.directory / "hf"), "--save-dir", str(path)])
    return path


def assert_same_weights(export: Path, quantized: dict[str, torch.Tensor]) -> None:
    """Every quantized weight of a run against an export, bit for bit."""
    from safetensors.torch import load_file

    hf = load_file(export / "model.safetensors")
    assert len(quantized) == 16
    for path, weight in quantized.items():
        layer, module = re.fullmatch(r"decoder\.(layers\.\d+)\.\w+\.(\w+)", path).groups()
        prefix = f"model.{layer}"
        if module == "linear_fc1":
            expected = torch.cat([hf[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
        elif module == "linear_qkv":
            # Per key/value group: its query heads, its key, its value.
            q, k, v = (hf[f"{prefix}.self_attn.{part}_proj.weight"].reshape(2, -1, 64) for part in "qkv")
            expected = torch.cat([q, k, v], 1).reshape(-1, 64)
        else:
            expected = hf[
                f"{prefix}." + {"linear_fc2": "mlp.down", "linear_proj": "self_attn.o"}[module] + "_proj.weight"
            ]
        assert torch.equal(weight, expected), path


REFUSALS = {
    "core_v0.16.1, local": {
        "--ternary --ternary-group-size 48": "--ternary-group-size:",
        "--ternary --ternary-telemetry-interval 2": "--ternary-telemetry-interval",
        "--ternary --init-model-with-meta-device": "without a checkpoint to load",
        "--ternary --rope-scaling-type longrope": "needs --rope-scaling-short-factor",
        "--ternary-group-size 64": "without --ternary",
    },
    "core_v0.12.1 + MindSpeed, local": {
        "--ternary --qat-scheme w4a16-mxfp4": "--qat-scheme w4a16-mxfp4",
    },
    "core_v0.12.1 + MindSpeed, TE": {
        "--ternary --ternary-activation-bits 8": "normalises its input itself",
    },
}


@pytest.mark.parametrize("name, flags", [(name, flags) for name in REFUSALS for flags in REFUSALS[name]])
def test_what_cannot_be_done_is_refused_by_name(name: str, flags: str, material: Material) -> None:
    host = host_named(name)
    result = run(host, 1, [*MODEL, *TRAINING, *UPSTREAM, *material.data, *flags.split()])
    assert result.status != 0 and not result.losses
    assert REFUSALS[name][flags] in result.output, result.output[-3000:]


def test_coc_with_transformer_engine_is_refused_by_mindspeed(material: Material) -> None:
    """Or it would be by the probe: COC's GEMMs stand below the wrapped forward."""
    host = host_named("core_v0.12.1 + MindSpeed, TE")
    flags = [*TP2, "--use-ascend-coc", "--ternary"]
    result = run(host, 2, [*MODEL, *TRAINING, *UPSTREAM, *material.data, *flags])
    assert result.status != 0 or result.proved == 16

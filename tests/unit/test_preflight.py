# SPDX-License-Identifier: Apache-2.0
"""Tests of the preflight: a sane job passes, and every planted mistake is found by its check."""

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support.launcher import free_port

from bitcpm_megatron import QuantizerConfig
from bitcpm_megatron.data.tokenizers import train_sentencepiece
from bitcpm_megatron.launch import preflight
from bitcpm_megatron.launch.checks import cluster as checks_cluster
from bitcpm_megatron.launch.checks import software as checks_software
from bitcpm_megatron.launch.checks.subject import Finding, Subject
from bitcpm_megatron.launch.estimates.memory import Options, estimate, layer_activations
from bitcpm_megatron.launch.estimates.quantizer import expected_record
from bitcpm_megatron.launch.estimates.shapes import Layout
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.launch.launcher.job import read_job
from bitcpm_megatron.quantization.recipe import Recipe

JOB = """
description: what a careful user would write
model: {{preset: tiny-llama, seq-length: 32, make-vocab-size-divisible-by: 64}}
parallelism: {{tensor-model-parallel-size: 2, sequence-parallel: true, use-distributed-optimizer: true}}
training:
  {{micro-batch-size: 1, global-batch-size: 4, train-iters: 20, lr: 1.0e-3, min-lr: 1.0e-4, bf16: true,
   lr-decay-style: WSD, lr-warmup-iters: 2, lr-wsd-decay-iters: 5}}
data:
  {{data-path: [{d}/corpus], split: "90,10,0", tokenizer-model: {d}/tokenizer.model, vocab-size: 300, eval-iters: 1}}
ternary: {{ternary: true, ternary-row-parallel-shards: 2}}
checkpoint: {{save: {d}/save, save-interval: 10, keep-last-n: 2}}
logging: {{log-interval: 1}}
cluster: {{profile: cpu, nodes: 1, devices-per-node: 2, master-port: {port}}}
"""


@dataclass
class Place:
    """A directory that contains a sane job."""

    directory: Path
    monkeypatch: pytest.MonkeyPatch
    environ: dict[str, str]

    def findings(self, *overrides: str) -> list[Finding]:
        job = read_job(str(self.directory / "job.yaml"), overrides)
        return preflight.findings(Subject(job, environ=self.environ))


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return train_sentencepiece(["the quick brown fox jumps over the lazy dog"] * 50, 290)


@pytest.fixture
def place(tmp_path: Path, tokenizer: bytes, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer)
    write_tokens(tmp_path / "corpus", np.arange(2600, dtype=np.uint16) % 290)
    (tmp_path / "job.yaml").write_text(JOB.format(d=tmp_path, port=free_port()))
    return Place(tmp_path, monkeypatch, {})


def write_tokens(prefix: Path, tokens: np.ndarray, code: int = 8, cut: int = 0, magic: bytes = b"MMIDIDX\0\0") -> None:
    """Writes a .bin / .idx pair of documents with 100 tokens each, in Megatron's format."""
    tokens.tofile(f"{prefix}.bin")
    count = len(tokens) // 100
    head = magic + struct.pack("<QBQQ", 1, code, count, count + 1)
    lengths, starts = np.full(count, 100, np.int32), np.arange(count, dtype=np.int64) * 100 * tokens.itemsize
    body = head + lengths.tobytes() + starts.tobytes() + np.arange(count + 1, dtype=np.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(body[: len(body) - cut])


def save_checkpoint(place: Place, iteration: int = 10, **changes: object) -> Path:
    """Writes what the preflight reads of a checkpoint of the sane job, with changed arguments or quantizer."""
    subject = Subject(read_job(str(place.directory / "job.yaml")), environ={})
    path = place.directory / "save" / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / "metadata.json").write_text("{}")
    x = subject.layout
    saved = vars(subject.args) | {"ffn_hidden_size": x.ffn, "num_query_groups": x.groups, "rotary_base": 10000}
    saved |= {"kv_channels": x.head_dim, "moe_router_topk": 2, "vocab_size": 300}
    record = expected_record(x, subject.args, 2)
    of_record = {k: v for k, v in changes.items() if hasattr(record, k)}
    replace(record, **of_record).write(path)
    saved |= {k: v for k, v in changes.items() if k not in of_record}
    (path / "arguments.json").write_text(json.dumps(saved, default=str))
    (path.parent / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def test_a_sane_job_passes(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert [f for f in place.findings() if f.status != "pass" and f.check != "versions"] == []
    assert preflight.main([str(place.directory / "job.yaml")]) == 0
    assert " 0 failures" in capsys.readouterr().out
    assert preflight.main([str(place.directory / "job.yaml"), "--set", "training.nonsense=1"]) == 2
    assert preflight.main([str(place.directory / "job.yaml"), "--json", "--set", "training.min-lr=1"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert {"check", "status", "found", "cure"} == set(report["findings"][0])


# The packages of a login node: PyYAML, pydantic and their dependencies.
ON_A_LOGIN_NODE = ("yaml", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection")


@pytest.fixture(scope="module")
def login_node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that runs a script of ``launch`` with only these packages."""
    packages = tmp_path_factory.mktemp("packages")
    for name in ON_A_LOGIN_NODE:
        found = Path(importlib.util.find_spec(name).origin)
        found = found.parent if found.name == "__init__.py" else found
        (packages / found.name).symlink_to(found)
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # With -S, Python does not see the packages of the tests' environment.
        command = [sys.executable, "-S", str(Path(preflight.__file__).with_name(script)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment, timeout=120)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("job", ["tiny-cpu", "8b-64npu"])
def test_a_login_node_needs_neither_megatron_nor_torch(job: str, login_node) -> None:
    run = login_node("preflight.py", job, "--json")
    assert run.stderr == ""
    found = json.loads(run.stdout)["findings"]
    assert {"world-size", "heads-and-ffn", "device-memory", "quantizer", "resume"} <= {f["check"] for f in found}
    # The built-in loop needs megatron-core; the other job names a checkout, which is looked for.
    host = next(f for f in found if f["check"] == "host")
    assert ("needs megatron-core" if job == "tiny-cpu" else "/opt/Megatron-LM") in host["found"]
    assert host["cure"]
    unread = [f["status"] for f in found if "numpy" in f["found"]]
    assert unread == ([] if job == "tiny-cpu" else ["warn"])


@pytest.mark.slow
def test_a_login_node_prints_what_would_run(login_node) -> None:
    run = login_node(
        "run.py", "8b-64npu", "--print", "--node-rank", "1", "--set", "cluster.hosts=[a, b, c, d, e, f, g, h]"
    )
    assert run.returncode == 0 and run.stderr == ""
    assert "--rdzv_endpoint a:29500" in run.stdout and "--ternary " in run.stdout


Plant = Callable[[Place], None]


def recipe(text: str) -> Plant:
    return lambda place: (place.directory / "recipe.yaml").write_text(text) and None


def listen(place: Place) -> None:
    taken = socket.socket()
    taken.bind(("0.0.0.0", 24680))
    taken.listen()
    place.monkeypatch.setattr(place, "taken", taken, raising=False)


def damage(**arguments: object) -> Plant:
    tokens = {"tokens": np.arange(2600, dtype=np.uint16) % 290, **arguments}
    return lambda place: write_tokens(place.directory / "corpus", **tokens)


def cut_tokens(place: Place) -> None:
    path = place.directory / "corpus.bin"
    path.write_bytes(path.read_bytes()[:-2])


def checkpoint(**changes: object) -> Plant:
    return lambda place: save_checkpoint(place, **changes) and None


def incomplete(place: Place) -> None:
    (save_checkpoint(place) / "metadata.json").unlink()


def without_arguments(place: Place) -> None:
    (save_checkpoint(place) / "arguments.json").unlink()


def converted_with_ends(token: int) -> Plant:
    def plant(place: Place) -> None:
        kept = save_checkpoint(place) / "hf"
        kept.mkdir()
        (kept / "config.json").write_text(json.dumps({"eos_token_id": token}))

    return plant


def spoiled_record(place: Place) -> None:
    (save_checkpoint(place) / "ternary_quantizer.json").write_text("{")


def full_disk(place: Place) -> None:
    usage = type("usage", (), {"free": 1000, "total": 64 * 2**30})
    place.monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def small_shared_memory(place: Place) -> None:
    usage = type("usage", (), {"free": 2**50, "total": 64 * 2**20})
    place.monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def a_file_for_a_directory(place: Place) -> None:
    (place.directory / "save").write_text("")


def exported(**variables: str) -> Plant:
    return lambda place: place.environ.update(variables)


def version(package: str, text: str) -> Plant:
    original = checks_software.versions
    return lambda place: place.monkeypatch.setattr(
        checks_software, "versions", lambda job, environ: {**original(job, environ), package: text}
    )


def too_few_devices(place: Place) -> None:
    place.monkeypatch.setattr(checks_cluster, "device_count", lambda kind: 4)


def no_plan(place: Place) -> None:
    return None


NPU = ["cluster.profile=ascend910b"]
BIG = [*NPU, "model.preset=minicpm4-8b", "data.vocab-size=73448", "model.seq-length=4096"]
MATCHERS = "matchers: {{m: {{config: a, type: glob, pattern: '{}'}}}}"

INT8 = ["ternary.ternary-activation-bits=8", "ternary.ternary-gemm=int8"]
PLANTED: dict[str, tuple[list[str], Plant, str, str, str]] = {
    # name: (overrides, function that plants the mistake, the check that finds it, its status, words of the finding)
    "world size": (["cluster.devices-per-node=3"], no_plan, "world-size", "fail", "groups of 2"),
    "heads over TP": (
        ["parallelism.tensor-model-parallel-size=8", "cluster.devices-per-node=8"],
        no_plan,
        "heads-and-ffn",
        "fail",
        "4 attention heads are not divisible",
    ),
    "KV groups over TP": (
        ["parallelism.tensor-model-parallel-size=4", "cluster.devices-per-node=4"],
        no_plan,
        "heads-and-ffn",
        "fail",
        "2 query groups are not divisible",
    ),
    "heads per group": (["model.num-query-groups=3"], no_plan, "heads-and-ffn", "fail", "do not divide 4 heads"),
    "ffn over TP": (["model.ffn-hidden-size=127"], no_plan, "heads-and-ffn", "fail", "127 ffn channels"),
    "layers over stages": (
        ["parallelism.pipeline-model-parallel-size=3", "cluster.devices-per-node=6"],
        no_plan,
        "pipeline",
        "fail",
        "2 layers cannot be split over 3 stages",
    ),
    "virtual stages alone": (
        ["parallelism.num-virtual-stages-per-pipeline-rank=2"],
        no_plan,
        "pipeline",
        "fail",
        "without pipeline",
    ),
    "global batch": (["training.micro-batch-size=3"], no_plan, "global-batch", "fail", "no multiple of micro-batch 3"),
    "micro-batches over virtual stages": (
        [
            "parallelism.pipeline-model-parallel-size=2",
            "parallelism.num-virtual-stages-per-pipeline-rank=1",
            "cluster.devices-per-node=4",
            "training.global-batch-size=1",
        ],
        no_plan,
        "global-batch",
        "warn",
        "stages would wait",
    ),
    "sequence over TP": (["model.seq-length=31"], no_plan, "sequence", "fail", "31 is not divisible by TP 2"),
    "sequence beyond the positions": (["model.seq-length=256"], no_plan, "sequence", "fail", "exceeds 128 positions"),
    "sequence parallel alone": (
        ["parallelism.tensor-model-parallel-size=1"],
        no_plan,
        "sequence",
        "fail",
        "without tensor parallelism",
    ),
    "no sequence parallelism": (["parallelism.sequence-parallel=false"], no_plan, "sequence", "warn", "keeps norms"),
    "context parallelism": (
        [
            "host.kind=megatron-lm",
            "host.megatron-path=/m",
            "parallelism.context-parallel-size=3",
            "cluster.devices-per-node=6",
        ],
        no_plan,
        "sequence",
        "fail",
        "cannot be split over CP 3",
    ),
    "experts": (["parallelism.expert-model-parallel-size=2"], no_plan, "experts", "fail", "without experts"),
    "padding": (
        [*BIG[1:], "model.make-vocab-size-divisible-by=50000"],
        no_plan,
        "vocabulary",
        "warn",
        "padded to 100000",
    ),
    "overlap without its optimizer": (
        ["parallelism.use-distributed-optimizer=false", "parallelism.overlap-param-gather=true"],
        no_plan,
        "switches",
        "fail",
        "without --use-distributed-optimizer",
    ),
    "recomputation by halves": (
        ["training.recompute-granularity=full"],
        no_plan,
        "switches",
        "fail",
        "go together",
    ),
    "connections": (
        NPU,
        exported(CUDA_DEVICE_MAX_CONNECTIONS="8"),
        "switches",
        "fail",
        "CUDA_DEVICE_MAX_CONNECTIONS is 8",
    ),
    "tensor parallelism over nodes": (
        [
            "cluster.devices-per-node=1",
            "cluster.nodes=2",
            "cluster.hosts=[127.0.0.1, 127.0.0.2]",
        ],
        no_plan,
        "tensor-parallel-placement",
        "warn",
        "spans nodes of 1",
    ),
    "memory": (BIG, no_plan, "device-memory", "fail", "of 64 GiB"),
    "memory is tight": (
        [*BIG, "cluster.device-memory-gib=97"],
        no_plan,
        "device-memory",
        "warn",
        "of 97 GiB",
    ),
    "warm-up beyond the end": (["training.lr-warmup-iters=20"], no_plan, "schedule", "fail", "warm-up of 20"),
    "warm-up meets decay": (["training.lr-wsd-decay-iters=19"], no_plan, "schedule", "fail", "decay of 19"),
    "WSD without its decay": (["training.lr-wsd-decay-iters="], no_plan, "schedule", "fail", "WSD"),
    "min-lr above lr": (["training.min-lr=0.1"], no_plan, "schedule", "fail", "down to 0.1"),
    "learning rate": (["training.lr=1.0"], no_plan, "schedule", "warn", "--lr 1"),
    "schedule too short": (["training.lr-decay-iters=10"], no_plan, "schedule", "warn", "ends at 10 of 20"),
    "restarts without saving": (
        ["checkpoint=", "cluster.max-restarts=2"],
        no_plan,
        "saving",
        "fail",
        "nothing is saved",
    ),
    "nothing is saved in time": (["checkpoint.save-interval=1000"], no_plan, "saving", "warn", "beyond --train-iters"),
    "restarts from elsewhere": (
        ["checkpoint.load=/elsewhere", "cluster.max-restarts=2"],
        no_plan,
        "saving",
        "fail",
        "loads /elsewhere again",
    ),
    "fp8 and ternary": (
        ["host.kind=megatron-lm", "host.megatron-path=/m", "host.flags.fp8-format=hybrid"],
        no_plan,
        "precision",
        "fail",
        "fp8-format together with ternary",
    ),
    "fp32 on an NPU": ([*NPU, "training.bf16=false"], no_plan, "precision", "warn", "fp32 on npu"),
    "group size": (["ternary.ternary-group-size=96"], no_plan, "quantizer", "fail", "group_size=96"),
    "group over rows": (["ternary.ternary-group-size=96"], no_plan, "quantizer", "fail", "does not divide a row of 64"),
    "group over shards": (
        ["ternary.ternary-group-size=64", "parallelism.tensor-model-parallel-size=2", "model.ffn-hidden-size=192"],
        no_plan,
        "quantizer",
        "fail",
        "does not divide a row of 96",
    ),
    "row-parallel shards over TP": (
        ["ternary.ternary-row-parallel-shards=3"],
        no_plan,
        "quantizer",
        "fail",
        "cannot be spread",
    ),
    "row-parallel shards over rows": (
        ["ternary.ternary-row-parallel-shards=8"],
        no_plan,
        "quantizer",
        "fail",
        "groups of 16",
    ),
    "int8 GEMMs of groups": ([*INT8, "ternary.ternary-group-size=32"], no_plan, "quantizer", "fail", "one for 32 of"),
    "int8 GEMMs of shards": (
        [*INT8, "ternary.ternary-row-parallel-shards=4"],
        no_plan,
        "quantizer",
        "fail",
        "as many row-parallel shards as TP",
    ),
    "int8 GEMMs of 16 bits": (
        ["ternary.ternary-gemm=int8"],
        no_plan,
        "arguments",
        "fail",
        "needs --ternary-activation",
    ),
    "ternary flags without ternary": (["ternary.ternary=false"], no_plan, "quantizer", "fail", "would do nothing"),
    "recipe without a fit": (
        ["ternary.ternary-recipe=recipe.yaml"],
        recipe("configs: {a: {group_size: 32}}\n" + MATCHERS.format("*.layers.7.*")),
        "recipe",
        "fail",
        "m (*.layers.7.*) fits no module",
    ),
    "recipe for the head": (
        ["ternary.ternary-recipe=recipe.yaml"],
        recipe("configs: {a: {group_size: 32}}\n" + MATCHERS.format("output_layer")),
        "recipe",
        "fail",
        "never quantized",
    ),
    "recipe unreadable": (
        ["ternary.ternary-recipe=recipe.yaml"],
        recipe("configs: {a: {grop_size: 32}}"),
        "recipe",
        "fail",
        "grop_size",
    ),
    "a flag that our loop refuses": (
        ["checkpoint.finetune=true", "checkpoint.save="],
        no_plan,
        "arguments",
        "fail",
        "--finetune needs --load",
    ),
    "two sources of data": (["data.mock-data=true"], no_plan, "data-source", "fail", "data-path and mock-data"),
    "no data": (["data.data-path=/nowhere/corpus"], no_plan, "data-path", "fail", "is not there"),
    "a file for a prefix": (["data.data-path=corpus.bin"], no_plan, "data-path", "fail", "is a file"),
    "no index": ([], damage(magic=b"MMIDIDY\0\0"), "data-path", "fail", "is no index"),
    "unknown dtype": ([], damage(code=77), "data-path", "fail", "dtype code 77"),
    "index cut off": ([], damage(cut=9), "data-path", "fail", "is cut off"),
    "tokens cut off": ([], cut_tokens, "data-path", "fail", "its index counts 2600 tokens"),
    "another tokenizer's data": (
        [],
        damage(tokens=np.arange(2600, dtype=np.uint16) % 400),
        "token-range",
        "fail",
        "holds token 399",
    ),
    "dtype too narrow": (
        [],
        damage(tokens=(np.arange(2600) % 100).astype(np.uint8), code=1),
        "token-range",
        "fail",
        "uint8 tokens, too narrow",
    ),
    "no validation data": (["data.split='100,0,0'"], no_plan, "split", "fail", "no validation"),
    "split": (["data.split='train'"], no_plan, "split", "fail", "--split train"),
    "too little data": (
        [],
        damage(tokens=np.arange(100, dtype=np.uint16)),
        "data-amount",
        "warn",
        "epochs",
    ),
    "no tokenizer": (["data.tokenizer-model=/nowhere.model"], no_plan, "tokenizer", "fail", "is not there"),
    "tokenizer of another size": (["data.vocab-size=280"], no_plan, "tokenizer", "fail", "has 290 pieces"),
    "a tokenizer that is none": (
        ["data.tokenizer-model=job.yaml"],
        no_plan,
        "tokenizer",
        "fail",
        "not a SentencePiece",
    ),
    "documents without ends": (
        ["data.eod-mask-loss=true"],
        damage(tokens=np.where(np.arange(2600) == 1299, 5, 2).astype(np.uint16)),
        "document-ends",
        "fail",
        "corpus do not end with token 2, for --eod-mask-loss",
    ),
    "a tokenizer of other content": (
        [],
        checkpoint(tokenizer_identity={"sha256": "0"}),
        "checkpoint-tokenizer",
        "fail",
        "was trained with other tokens",
    ),
    "a tokenizer of other ends": (
        [],
        converted_with_ends(7),
        "checkpoint-tokenizer",
        "fail",
        "ends texts with token 7",
    ),
    "a checkpoint that names no tokenizer": (
        ["data.tokenizer-model="],
        without_arguments,
        "tokenizer",
        "fail",
        "without the arguments of the run",
    ),
    "save is a file": ([], a_file_for_a_directory, "save-writable", "fail", "is a file"),
    "save is relative": (
        ["checkpoint.save=save", "cluster.nodes=2", "cluster.hosts=[127.0.0.1, 127.0.0.2]"],
        no_plan,
        "save-writable",
        "fail",
        "is relative, on 2 nodes",
    ),
    "full disk": ([], full_disk, "disk-space", "fail", "GiB free"),
    "another quantizer": (
        ["ternary.ternary-group-size=32", "ternary.ternary-row-parallel-shards="],
        checkpoint(),
        "checkpoint-quantizer",
        "fail",
        "linear_fc1: group_size -1 in the checkpoint, 32 asked for",
    ),
    "another dtype": ([], checkpoint(latent_dtype="float32"), "checkpoint-quantizer", "fail", "latent_dtype"),
    "fused weights": ([], checkpoint(state="fused"), "checkpoint-quantizer", "fail", "'fused'"),
    "no quantizer asked for": (
        ["ternary="],
        checkpoint(),
        "checkpoint-quantizer",
        "fail",
        "--ternary is not given",
    ),
    "a record that is none": ([], spoiled_record, "checkpoint-quantizer", "fail", "not valid JSON"),
    "another model": ([], checkpoint(num_layers=3), "checkpoint-model", "fail", "--num-layers 3"),
    "checkpoint incomplete": ([], incomplete, "resume", "fail", "not a complete checkpoint"),
    "nothing left to train": ([], checkpoint(iteration=20), "resume", "warn", "nothing is left"),
    "no first weights": (
        ["checkpoint.pretrained-checkpoint=/nowhere"],
        no_plan,
        "resume",
        "fail",
        "/nowhere holds no checkpoint",
    ),
    "a torch that is too old": ([], version("torch", "2.5.1"), "versions", "fail", "torch before 2.6"),
    "an unrelated apex": ([], version("apex", "0.9.10.dev0"), "versions", "fail", "another project"),
    "torch_npu of another torch": (NPU, version("torch-npu", "2.1.0"), "versions", "fail", "with torch_npu 2.1.0"),
    "an unknown combination": ([], version("megatron-core", "0.99.0"), "versions", "warn", "unknown combination"),
    "no Megatron-LM": (
        ["host.kind=megatron-lm", "host.megatron-path=/nowhere"],
        no_plan,
        "host",
        "fail",
        "has no pretrain_gpt.py",
    ),
    "nodes and scheduler disagree": (
        ["cluster.nodes=4"],
        exported(SLURM_JOB_ID="1", SLURM_NNODES="2", SLURM_NODEID="0"),
        "node",
        "fail",
        "cluster.nodes is 4",
    ),
    "a login node": (
        ["cluster.hosts=[a.invalid, b.invalid]", "cluster.nodes=2"],
        no_plan,
        "node",
        "warn",
        "does not say which of the 2 nodes",
    ),
    "a host twice": (
        ["cluster.hosts=[127.0.0.1, 127.0.0.1]", "cluster.nodes=2"],
        no_plan,
        "hosts",
        "fail",
        "listed 2 times",
    ),
    "an unknown host": (
        ["cluster.hosts=[127.0.0.1, no.such.invalid]", "cluster.nodes=2"],
        no_plan,
        "hosts",
        "fail",
        "cannot be resolved",
    ),
    "a reserved port": (["cluster.master-port=80"], no_plan, "master-port", "fail", "reserved for the system"),
    "a port in use": (["cluster.master-port=24680"], listen, "master-port", "fail", "in use"),
    "HCCL among outgoing connections": (
        [*NPU, "cluster.environment.HCCL_IF_BASE_PORT=50000"],
        no_plan,
        "master-port",
        "warn",
        "HCCL's ports 50000-50015",
    ),
    "HCCL's port": ([*NPU, "cluster.master-port=61003"], no_plan, "master-port", "fail", "one of HCCL's ports"),
    "a port of outgoing connections": (["cluster.master-port=40404"], no_plan, "master-port", "warn", "outgoing"),
    "no such interface": (
        ["cluster.network-interface=nic9"],
        no_plan,
        "network-interface",
        "fail",
        "nic9 is not on this node",
    ),
    "no such subnet": (["cluster.subnet=203.0.113.0/24"], no_plan, "network-interface", "fail", "203.0.113.0/24"),
    "an exported interface": (
        [],
        exported(GLOO_SOCKET_IFNAME="nic9"),
        "network-interface",
        "fail",
        "GLOO_SOCKET_IFNAME=nic9",
    ),
    "an illegal variable": (NPU, exported(HCCL_CONNECT_TIMEOUT="60"), "environment", "fail", "from 120 to 7200"),
    "an illegal choice": (
        [*NPU, "cluster.environment.STREAMS_PER_DEVICE=16"],
        no_plan,
        "environment",
        "fail",
        "one of 8, 32",
    ),
    "a variable kept": ([], exported(OMP_NUM_THREADS="7"), "environment", "warn", "OMP_NUM_THREADS=7"),
    "small buffers": ([*BIG, "cluster.environment.HCCL_BUFFSIZE=8"], no_plan, "environment", "warn", "HCCL_BUFFSIZE=8"),
    "waiting for ever": (
        [*NPU, "cluster.environment.HCCL_EXEC_TIMEOUT=0"],
        no_plan,
        "time-outs",
        "warn",
        "waits for ever",
    ),
    "static restarts": (
        ["cluster.max-restarts=2", "cluster.nodes=2", "cluster.hosts=[127.0.0.1, 127.0.0.2]"],
        no_plan,
        "restarts",
        "warn",
        "static rendezvous",
    ),
    "too few devices": ([*NPU, "cluster.devices-per-node=8"], too_few_devices, "devices", "fail", "4 npu devices here"),
    "shared memory": (["data.num-workers=2"], small_shared_memory, "shared-memory", "warn", "0.1 GiB"),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.verifies(
    "trust",
    "the preflight check finds more than a hundred planted mistakes and suggests a remedy for each",
    cuda="-",
    npu="-",
)
def test_a_planted_mistake_is_found(place: Place, name: str) -> None:
    overrides, plant, check, status, said = PLANTED[name]
    place.monkeypatch.chdir(place.directory)
    plant(place)
    found = place.findings(*overrides)
    matching = [f for f in found if f.check == check and f.status == status and said in f.found + f.cure]
    assert matching, preflight.table(read_job(str(place.directory / "job.yaml")), found)
    assert all(f.cure for f in found if f.status != "pass"), "a finding without a cure"
    assert (status == "fail") <= (preflight.status(found) == 3)


def test_another_space_on_an_npu_passes(place: Place) -> None:
    found = place.findings(*NPU, "ternary.ternary-space=five-value", "ternary.ternary-backend=ascendc")
    assert [f.status for f in found if f.check == "quantizer"] == ["pass"]


def test_int8_gemms_of_whole_rows_pass(place: Place) -> None:
    assert [f.status for f in place.findings(*INT8) if f.check in ("quantizer", "arguments")] == ["pass", "pass"]


def test_the_scheduler_counts_the_nodes_where_it_does_not_say_which_this_is(place: Place) -> None:
    place.environ.update(SLURM_JOB_ID="1", SLURM_NNODES="2", SLURM_JOB_NODELIST="n[1-2]", SLURM_STEP_ID="0")
    subject = Subject(read_job(str(place.directory / "job.yaml"), ["cluster.nodes="]), environ=place.environ)
    assert "does not say which of the 2 nodes" in subject.place_mistake
    assert (subject.nodes, subject.layout.world) == (2, 4)


def test_a_checkpoint_with_experts_of_their_own_width_holds_the_model(place: Place) -> None:
    experts = ["model.num-experts=2", "model.moe-ffn-hidden-size=64", "ternary="]
    job = read_job(str(place.directory / "job.yaml"), experts)
    path = save_checkpoint(place)
    saved = vars(Subject(job, environ={}).args) | {"ffn_hidden_size": 128, "kv_channels": 32, "moe_router_topk": 2}
    saved |= {"rotary_base": 10000, "vocab_size": 300}
    (path / "arguments.json").write_text(json.dumps(saved, default=str))
    assert [f.status for f in place.findings(*experts) if f.check == "checkpoint-model"] == ["pass"]


PAPER = Layout(
    layers=96, hidden=12288, ffn=4 * 12288, heads=96, groups=96, head_dim=128, vocab_size=51200, sequence=2048,
    micro_batch=1, experts=0, topk=1, gated=False, tied=True, tp=8, pp=8, vpp=1, cp=1, ep=1, world=64,
)  # fmt: skip
PLAIN = Options(
    bf16=True, sequence_parallel=False, use_distributed_optimizer=False, hidden_dropout=0.1, attention_dropout=0.1,
    fused=True,
)  # fmt: skip


def test_activations_are_those_of_the_published_formula() -> None:
    s, b, h, a, t = 2048, 1, 12288, 96, 8
    assert layer_activations(PAPER, PLAIN) == s * b * h * (10 + 24 / t + 5 * a * s / (h * t))
    sequence = replace(PLAIN, sequence_parallel=True)
    assert layer_activations(PAPER, sequence) == s * b * h / t * (34 + 5 * a * s / h)
    assert layer_activations(PAPER, replace(sequence, recompute_granularity="selective")) == s * b * h / t * 34
    # Full recomputation keeps the inputs of all layers and one layer's activations; stage 0 has 8 micro-batches in
    # flight.
    undropped = replace(sequence, hidden_dropout=0.0, attention_dropout=0.0)
    full = replace(undropped, recompute_granularity="full", recompute_method="uniform")
    stage, need = estimate(PAPER, full)
    working = layer_activations(PAPER, full)
    assert stage == 0 and need.activations == 8 * 12 * 2 * s * b * h / t + working


def test_on_a_ramp_quantized_weights_stand_beside_the_latent_ones() -> None:
    assert PLAIN.cache == "resident" and replace(PLAIN, ternary_ramp_iters=1).cache == "step"
    assert replace(PLAIN, ternary_ramp_iters=1, ternary_cache="none").cache == "none"


def test_parameters_and_states_are_counted() -> None:
    whole = replace(PAPER, tp=1, pp=1, world=4, vocab_size=51200)
    _, need = estimate(whole, PLAIN)
    h = 12288
    parameters = 96 * (12 * h * h + 2 * h) + h + 51200 * h
    assert need.weights == 2 * parameters and need.gradients == 4 * parameters and need.optimizer == 12 * parameters
    assert estimate(whole, replace(PLAIN, use_distributed_optimizer=True))[1].optimizer == 3 * parameters
    ternary = replace(PLAIN, recipe=Recipe.all_linears(QuantizerConfig()), ternary_cache="step")
    # The memory is that of the quantized copy in bf16, its scales, and fp32 scratch for the largest weight.
    linears = whole.all_linears()
    scales = sum(x.out_features for x in linears) * 2
    copy, scratch = 96 * 12 * h * h * 2 + scales, 4 * 4 * h * h
    assert estimate(whole, ternary)[1].quantized == copy + scratch
    # Packed weights are 2-bit codes and scales instead of parameters; one weight is unpacked at a time.
    packed = estimate(whole, replace(ternary, ternary_cache="packed"))[1]
    assert packed.quantized == 96 * 12 * h * h / 4 + scales + 3 * 4 * h * h
    assert packed.weights == 2 * (parameters - 96 * 12 * h * h)
    # Without the cache, the graphs of all micro-batches in flight have copies: PP of them on the first of PP stages.
    uncached = replace(ternary, ternary_cache="none")
    assert estimate(whole, uncached)[1].quantized == copy + scratch
    assert estimate(replace(whole, pp=4, world=16), uncached)[1].quantized == 4 * copy / 4 + scratch
    twice = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    recomputed = replace(uncached, **twice)
    assert estimate(whole, recomputed)[1].quantized == copy * 2 / 96 + scratch


def test_where_quantized_weights_are_decides_what_they_need() -> None:
    whole = replace(PAPER, tp=1, pp=1, world=4)
    scales = 2 * sum(x.out_features for x in whole.all_linears())
    recipe = Recipe.all_linears(QuantizerConfig())
    ternary = replace(PLAIN, recipe=recipe, use_distributed_optimizer=True, ternary_backend="ascendc")

    def quantized(**changes) -> float:
        return estimate(whole, replace(ternary, **changes))[1].quantized

    copy = 96 * 12 * 12288**2 * 2 + scales
    assert quantized(ternary_cache="step") == quantized(ternary_cache="none") == copy
    assert quantized(ternary_cache="auto") == quantized(ternary_cache="resident") == scales / 4
    assert quantized(ternary_cache="resident", use_distributed_optimizer=False) == scales
    assert quantized(ternary_cache="auto", bf16=False) == 2 * copy - scales
    # After the optimizer step, the torch backend can use the memory of the activations.
    assert quantized(ternary_cache="step", ternary_backend="torch") == copy + 4 * 4 * 12288**2
    assert quantized(ternary_cache="step", ternary_backend="torch", cpu=True) == copy
    assert quantized(ternary_cache="resident", ternary_backend="torch") == scales / 4


def test_gloo_copies_the_gradients_that_it_scatters() -> None:
    small = replace(PAPER, layers=2, tp=1, pp=1, world=2, sequence=32)
    bare = replace(PLAIN, use_distributed_optimizer=True, fused=False)
    need, over_gloo = (estimate(small, replace(bare, cpu=cpu))[1] for cpu in (False, True))
    waiting = 2 * 51200 * 12288
    passing = need.activations + need.logits + need.backward
    assert need.communication == 0 and over_gloo.communication == need.gradients + waiting - passing
    # This holds in a group of one rank, too; an all-reduce works in place.
    assert estimate(replace(small, world=1), replace(bare, cpu=True))[1].communication == over_gloo.communication
    assert estimate(small, replace(bare, cpu=True, use_distributed_optimizer=False))[1].communication == 0
    # In the backward of fc2, there are the gradients of its output, input and weight, and no logits anymore.
    assert need.backward == waiting + 2 * (32 * (1 + 4) + 4 * 12288) * 12288 - need.logits


def test_the_finding_says_where_quantized_weights_are(place: Place) -> None:
    for flags, expected in (
        (["ternary.ternary-cache=step"], "step"),
        (["ternary.ternary-cache=none"], "none"),
        (["ternary.ternary-cache=auto"], "resident"),
        (["ternary.ternary-cache=auto", "training.bf16=false"], "step"),
    ):
        (found,) = (f for f in place.findings(*flags) if f.check == "device-memory")
        assert found.found.endswith(f"GiB, quantized weights: {expected}")
    tight = [*BIG, "ternary.ternary=true", "ternary.ternary-cache=step"]
    (found,) = (f for f in place.findings(*tight) if f.check == "device-memory")
    assert found.status == "fail" and "--ternary-cache auto (no second copy" in found.cure


@pytest.mark.parametrize("preset", presets.names())
def test_the_weights_of_a_preset_are_all_counted(place: Place, preset: str) -> None:
    text = f"model: {{preset: {preset}, seq-length: 32, make-vocab-size-divisible-by: 1}}\n"
    text += "training: {micro-batch-size: 1, train-iters: 1, lr: 1, bf16: true}\n"
    (place.directory / "preset.yaml").write_text(text)
    subject = Subject(read_job(str(place.directory / "preset.yaml")), environ={})
    need = estimate(subject.layout, replace(PLAIN, make_vocab_size_divisible_by=1))[1]
    assert need.weights == 2 * presets.architecture(preset).parameter_count()


@pytest.mark.slow
def test_the_activations_of_our_loop_are_those_that_it_saves() -> None:
    script = Path(__file__).parent / "saved_activations.py"
    flags = "--model tiny-llama --seq-length 128 --micro-batch-size 2 --mock-data --vocab-size 1000 --bf16 --ternary"
    flags += " --ternary-cache step"
    command = [sys.executable, str(script), *flags.split(), "--train-iters", "1", "--lr", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["saved"] == pytest.approx(report["expected"], rel=0.02), done.stderr


def test_the_megatron_hosts_flags_are_looked_up_in_its_sources(tmp_path: Path) -> None:
    for path, text in (
        ("m/pretrain_gpt.py", ""),
        (
            "m/megatron/training/ternary_flags.py",
            "group.add_argument('--use-flash-attn')\nclass Config:\n    new_style: int",
        ),
        ("s/mindspeed/megatron_adaptor.py", "'--use-fused-swiglu'"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    host = f"host: {{kind: megatron-lm, megatron-path: {tmp_path}/m, mindspeed-path: {tmp_path}/s, flags: {{FLAGS}}}}\n"
    flags = "use-flash-attn: true, use-fused-swiglu: true, new-style: 1"
    (tmp_path / "job.yaml").write_text(host.replace("FLAGS", flags))
    assert checks_software.unknown_flags(read_job(str(tmp_path / "job.yaml"))) == []
    (tmp_path / "job.yaml").write_text(host.replace("FLAGS", f"{flags}, use-fused-swigl: true"))
    assert checks_software.unknown_flags(read_job(str(tmp_path / "job.yaml"))) == ["use-fused-swigl"]

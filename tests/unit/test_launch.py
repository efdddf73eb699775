# SPDX-License-Identifier: Apache-2.0
"""Tests of what the launcher decides before it starts anything: job files, nodes, environment, cores."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bitcpm_megatron.launch import run
from bitcpm_megatron.launch.launcher import bind_cores
from bitcpm_megatron.launch.launcher.environment import read_profile, resolve
from bitcpm_megatron.launch.launcher.job import Cluster, Job, JobError, read_job
from bitcpm_megatron.launch.launcher.network import NetworkError, choose_interface
from bitcpm_megatron.launch.launcher.presets import PresetError
from bitcpm_megatron.launch.launcher.scheduler import ClusterError, Placement, detect, expand_nodelist
from bitcpm_megatron.launch.launcher.torchrun import environment as child_environment
from bitcpm_megatron.launch.launcher.torchrun import host_argv, resume, torchrun

CHECKOUT = Path(__file__).resolve().parents[2]
SMALL = """
model: {preset: tiny-llama, seq-length: 32}
training: {micro-batch-size: 1, train-iters: 10, lr: 1e-3}
data: {mock-data: true, vocab-size: 300}
"""
UPSTREAM = "host: {kind: megatron-lm, megatron-path: /opt/m, mindspeed-path: /opt/s, flags: {use-flash-attn: true}}\n"


def job(directory: Path, text: str = SMALL, *overrides: str) -> Job:
    path = directory / "job.yaml"
    path.write_text(text)
    return read_job(str(path), overrides)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("traning.lr=1", "did you mean training?"),
        ("training.micro_batch_size=1", "did you mean micro-batch-size?"),
        ("training.seq-length=1", "it belongs to section model"),
        ("training.lr=fast", "training.lr: 'fast': expected a number"),
        ("training.train-iters=10.5", "expected a whole number"),
        ("training.bf16=1", "expected true or false"),
        ("training.lr-decay-style=wsd", "is none of constant"),
        ("parallelism.tensor-model-parallel-size=true", "expected a whole number"),
        ("cluster.node=2", "did you mean nodes?"),
        ("cluster.nodes=0", "cluster.nodes: 0: must be 1 to 65536"),
        ("cluster.hosts=[a b]", "cluster.hosts.0: 'a b' is no legal host name"),
        ("cluster.hosts=[-oProxyCommand=x]", "no legal host name"),
        ("cluster.master-addr=$(id)", "legal host name"),
        ("cluster.master-port=70000", "must be 1 to 65535"),
        ("cluster.rendezvous=etcd", "expected 'static' or 'c10d', got 'etcd'"),
        ("cluster.rendezvous-id=a b", "is not a name"),
        ("cluster.subnet=10.0.0.1/8", "host bits must be 0"),
        ("cluster.network-interface=eth0;id", "is not the name of an interface"),
        ("cluster.environment={A B: 1}", "is no name of a variable"),
        ("cluster.scheduler=pbs", "expected 'auto', 'single'"),
        ("host.kind=nemo", "expected 'built-in' or 'megatron-lm'"),
        ("host.megatron-path=/m", "only the megatron-lm host has use for it"),
        ("host.kind=megatron-lm", "needs the path of a Megatron-LM checkout"),
        ("model=tiny", "model: expected a mapping"),
        ("tiny", "write section.key=value"),
        ("model.preset=[a]", "expected the name of a preset"),
        ("cluster.devices_per_node=2", "did you mean devices-per-node?"),
        ("cluster.device-memory-gib=.nan", "expected a finite number"),
        ("cluster.environment={A: true}", "A: expected text or a number"),
        ("training.lr=.inf", "training.lr: inf: expected a finite number"),
        ("training.seed=-1", "training.seed: -1: must be 0 to"),
        ("model.num-layers=0", "model.num-layers: 0: must be 1 to"),
        ("training.train-iters=10000000000", "training.train-iters: 10000000000: must be"),
        ("training.lr=[", "--set training.lr:1:2: expected the node content"),
        ("checkpoint.save=--finetune", "checkpoint.save: '--finetune' would be taken for a flag"),
        ("data.data-path=[a, --mock-data]", "would be taken for a flag"),
    ],
)
def test_a_job_is_strict(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(JobError, match="job.yaml") as caught:
        job(tmp_path, SMALL, override)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "expected a mapping"),
        ("model: [1]", "model: expected a mapping"),
        ("model: {", "expected"),
        ("model: {preset: !!python/object/apply:os.getcwd []}", "could not determine a constructor"),
        (UPSTREAM.replace("use-flash-attn: true", "lr: 1"), "host.flags: lr: it belongs to section training"),
        (UPSTREAM.replace("use-flash-attn: true", "'--x': 1"), "is no name of a flag"),
        (UPSTREAM.replace("use-flash-attn: true", "x: {y: 1}"), "expected true, a value or a list"),
        ("cluster: {network-interface: eth0, subnet: 10.0.0.0/8}", "give one"),
        (UPSTREAM.replace("use-flash-attn: true", "x: --y"), "would be taken for a flag"),
        (UPSTREAM.replace("use-flash-attn: true", "context-parallel-size: 2"), "it belongs to section parallelism"),
        ("model: {seq-length: 1, seq-length: 2}", "the key 'seq-length' stands there twice"),
        ("training: {train-iters: " + "9" * 5000 + "}", "so many digits"),
        ("training: {train-iters: 2024-13-45}", "training.train-iters: '2024-13-45': expected a whole number"),
        ("model: {a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_a_malformed_job_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(JobError) as caught:
        job(tmp_path, text)
    assert said in str(caught.value)


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such job file"):
        read_job(str(tmp_path / "no.yaml"))
    with pytest.raises(JobError, match="--num-layers"):
        job(tmp_path, "model: {seq-length: 1}").arguments()
    with pytest.raises(PresetError, match="no preset of that name"):
        job(tmp_path, SMALL, "model.preset=tiny-lama").arguments()
    assert job(tmp_path, SMALL, "model.preset=tiny-llama").arguments().num_layers == 2
    assert job(tmp_path, SMALL, "training.lr=").flags.get("lr") is None


def test_the_command_is_a_list_and_nothing_is_expanded(tmp_path: Path) -> None:
    nasty = "a b;$(touch x)`id`'\""
    made = job(tmp_path, SMALL, f"checkpoint.save={json.dumps(nasty)}")
    command = torchrun(made, Placement("test", 2, 1, 4, "n0", 1234))
    assert command[:2] == [sys.executable, str(CHECKOUT / "launch" / "agent.py")]
    assert command[command.index("--save") + 1] == nasty
    assert command[command.index("--load") + 1] == nasty
    assert shlex.split(run.display(command).replace("\\\n", " ")) == command


def test_static_and_c10d_rendezvous(tmp_path: Path) -> None:
    place = Placement("test", 2, 1, 8, "10.0.0.1", 1234)
    static = " ".join(torchrun(job(tmp_path), place))
    assert "--rdzv_backend static --node_rank 1" in static and "--master_addr 10.0.0.1 --master_port 1234" in static
    more = ["cluster.rendezvous=c10d", "cluster.max-restarts=3", "cluster.keep-alive-seconds=30"]
    elastic = " ".join(torchrun(job(tmp_path, SMALL, *more), place, "10.0.0.2"))
    assert "--max_restarts 3 --rdzv_backend c10d --rdzv_endpoint 10.0.0.1:1234 --rdzv_id job" in elastic
    assert "is_host=false,join_timeout=900,keep_alive_interval=10,keep_alive_max_attempt=3" in elastic
    assert "--local_addr 10.0.0.2" in elastic and "--node_rank" not in elastic
    v6 = torchrun(job(tmp_path, SMALL, *more), Placement("test", 2, 0, 8, "fd00::1", 1234))
    assert "[fd00::1]:1234" in v6 and any("is_host=true" in part for part in v6)


def test_the_megatron_host_gets_the_preset_in_full(tmp_path: Path) -> None:
    made = job(tmp_path, UPSTREAM + SMALL, "training.override-opt-param-scheduler=true", "host.flags.x=[1, 2]")
    argv = host_argv(made)
    assert argv[0].endswith("launch/pretrain_gpt.py")
    assert argv[1:5] == ["--megatron-path", "/opt/m", "--mindspeed-path", "/opt/s"]
    assert "--model" not in argv and "--disable-bias-linear" in argv
    assert argv[argv.index("--vocab-size") + 1] == "300"
    # Upstream spells this flag with underscores.
    assert "--override-opt_param-scheduler" in argv and argv[-4:] == ["--use-flash-attn", "--x", "1", "2"]
    with pytest.raises(JobError, match="keeps every checkpoint"):
        host_argv(job(tmp_path, UPSTREAM + SMALL, "checkpoint.keep-last-n=2"))
    with pytest.raises(JobError, match="ternary-ramp-iters .*do not tell which step"):
        host_argv(job(tmp_path, UPSTREAM + SMALL, "ternary.ternary-ramp-iters=2"))
    for flag in ("ternary-cache", "ternary-param-gather"):
        with pytest.raises(JobError, match=f"{flag} packed with the megatron-lm host"):
            host_argv(job(tmp_path, UPSTREAM + SMALL, f"ternary.{flag}=packed"))
    falls = [
        "training.start-weight-decay=0.1",
        "training.end-weight-decay=0",
        "training.weight-decay-incr-style=linear",
    ]
    with pytest.raises(JobError, match="end-weight-decay 0 below start-weight-decay 0.1"):
        host_argv(job(tmp_path, UPSTREAM + SMALL, *falls))


def test_where_a_job_resumes(tmp_path: Path) -> None:
    save = tmp_path / "save"
    made = job(tmp_path, SMALL, f"checkpoint.save={save}", "checkpoint.pretrained-checkpoint=/w")
    assert resume(made).line == f"{save} holds no checkpoint: starts from the weights in /w"
    (save / "iter_0000020").mkdir(parents=True)
    (save / "iter_0000020" / "metadata.json").write_text("{}")
    (save / "latest_checkpointed_iteration.txt").write_text("20")
    assert resume(made).iteration == 20
    assert resume(job(tmp_path, UPSTREAM + SMALL, f"checkpoint.save={save}")).iteration == 20
    assert resume(job(tmp_path)).iteration is None
    (save / "latest_checkpointed_iteration.txt").write_text("30")
    assert run.main([str(tmp_path / "job.yaml"), "--print", "--set", f"checkpoint.save={save}"]) == 2


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", "n1"),
        ("n[1-3]", "n1 n2 n3"),
        ("n[01-03,7],gpu-a[1-2]b", "n01 n02 n03 n7 gpu-a1b gpu-a2b"),
        ("r[1-2]n[8-9]", "r1n8 r1n9 r2n8 r2n9"),
        ("n[008-010].site,x", "n008.site n009.site n010.site x"),
    ],
)
def test_slurm_node_lists(text: str, hosts: str) -> None:
    assert expand_nodelist(text) == hosts.split()


@pytest.mark.parametrize("text", ["", "n[1-", "n]1[", "n[3-1]", "n[a-b]", "n[1-2],n2", "a b", "n[1-9999999]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(ClusterError):
        expand_nodelist(text)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
PYTORCHJOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "RANK": "2"}
PET = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "t-0",
    "PET_MASTER_PORT": "29400",
}
MODELARTS = {"MA_NUM_HOSTS": "2", "MA_NUM_GPUS": "8", "VC_TASK_INDEX": "1", "VC_WORKER_HOSTS": "w-0.j.ns,w-1.j.ns"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("no scheduler", 1, 0, "127.0.0.1", 29500)),
        (SLURM | STEP, ("SLURM", 2, 1, "n1", 29500)),
        (PYTORCHJOB, ("Kubernetes (MASTER_ADDR, RANK)", 3, 2, "job-master-0", 23456)),
        (PET, ("Kubernetes (PET_*)", 2, 1, "t-0", 29400)),
        # Kubeflow sets both kinds of variables; WORLD_SIZE then counts processes.
        (PYTORCHJOB | PET | {"WORLD_SIZE": "16"}, ("Kubernetes (PET_*)", 2, 1, "t-0", 29400)),
        (
            {"PET_NNODES": "1:2", "PET_RDZV_ENDPOINT": "t-0:29401", "RANK": "1"},
            ("Kubernetes (PET_*)", 2, 1, "t-0", 29401),
        ),
        (MODELARTS, ("ModelArts", 2, 1, "w-0.j.ns", 29500)),
        ({"VC_WORKER_HOSTS": "a,b", "VC_WORKER_NUM": "2", "VK_TASK_INDEX": "0"}, ("ModelArts", 2, 0, "a", 29500)),
    ],
)
def test_schedulers_are_recognized(environ: dict[str, str], expected: tuple) -> None:
    place = detect(Cluster(devices_per_node=8), environ)
    assert (place.source, place.nodes, place.node_rank, place.master_addr, place.master_port) == expected


@pytest.mark.parametrize(
    ("cluster", "environ", "rank", "said"),
    [
        ({"nodes": 4}, SLURM | STEP, None, "cluster.nodes is 4, but SLURM says 2 nodes"),
        ({}, SLURM | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16"}, None, "--ntasks-per-node=1"),
        ({}, SLURM | {"SLURM_NNODES": "3"}, None, "names 2"),
        ({}, SLURM | {"SLURM_NODEID": "x"}, None, "SLURM_NODEID holds 'x': expected a whole number"),
        ({}, SLURM | {"SLURM_NNODES": "²"}, None, "SLURM_NNODES holds '²': expected a whole number"),
        ({}, PYTORCHJOB | {"WORLD_SIZE": "abc"}, None, "WORLD_SIZE holds 'abc'"),
        ({}, PYTORCHJOB | {"MASTER_PORT": "99999"}, None, "MASTER_PORT holds '99999': must be 1 to 65535"),
        ({"nodes": 2}, {}, None, "does not say which of the 2 nodes this is"),
        ({"nodes": 2}, {}, 0, "nobody says where node 0 is"),
        ({"nodes": 2, "master_addr": "a"}, {}, 2, "node rank 2 is not below"),
        ({"hosts": ("somewhere.invalid", "elsewhere.invalid")}, {}, None, "give cluster.hosts with its name"),
        ({"hosts": ("127.0.0.1", "127.0.0.1")}, {}, None, "are all this node"),
        ({"scheduler": "hosts"}, {}, None, "cluster.hosts is empty"),
        ({"devices_per_node": 4}, MODELARTS, None, "but ModelArts says 8"),
        ({}, MODELARTS | {"VC_WORKER_HOSTS": "a"}, None, "names 1"),
        ({}, PYTORCHJOB | {"MASTER_ADDR": "a b"}, None, "no legal host name"),
    ],
)
def test_contradictions_are_errors(cluster: dict, environ: dict, rank: int | None, said: str) -> None:
    with pytest.raises(ClusterError) as caught:
        detect(Cluster(**cluster), environ, rank)
    assert said in str(caught.value)


def test_a_node_finds_itself_by_name_or_address() -> None:
    assert detect(Cluster(hosts=("elsewhere.invalid", socket.gethostname())), {}).node_rank == 1
    place = detect(Cluster(hosts=("192.0.2.254", "127.0.0.1")), {})
    assert (place.node_rank, place.master_addr) == (1, "192.0.2.254")
    assert detect(Cluster(hosts=("192.0.2.253", "192.0.2.254")), {}, 1).node_rank == 1
    assert "not inside srun" in detect(Cluster(), SLURM).notes[0]


def test_interfaces_by_name_and_by_subnet() -> None:
    here = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.1.2.3"], "ib0": ["10.2.0.1", "fe80::1"]}
    assert choose_interface(Cluster(), here) is None
    assert choose_interface(Cluster(network_interface="ib0"), here) == "ib0"
    assert choose_interface(Cluster(subnet="10.2.0.0/16"), here) == "ib0"
    assert choose_interface(Cluster(subnet="fe80::/10"), here) == "ib0"
    with pytest.raises(NetworkError, match="not on this node: lo"):
        choose_interface(Cluster(network_interface="eth9"), here)
    with pytest.raises(NetworkError, match="several: eth0, ib0"):
        choose_interface(Cluster(subnet="10.0.0.0/8"), here)
    with pytest.raises(NetworkError, match="is none"):
        choose_interface(Cluster(subnet="172.16.0.0/12"), here)


def test_exported_variables_are_kept_unless_told_otherwise() -> None:
    profile = read_profile("ascend910b")
    exported = {"HCCL_BUFFSIZE": "512", "HCCL_SOCKET_IFNAME": "=bond0", "STREAMS_PER_DEVICE": "32"}

    def of(interface: str | None, **cluster: object) -> dict[str, tuple[str, str]]:
        settings = resolve(profile, Cluster(profile="ascend910b", **cluster), exported, interface)
        return {s.name: (s.value, s.origin) for s in settings}

    kept = of("eth0")
    assert kept["HCCL_BUFFSIZE"] == ("512", "kept") and kept["HCCL_SOCKET_IFNAME"] == ("=bond0", "kept")
    assert kept["GLOO_SOCKET_IFNAME"] == ("eth0", "profile") and kept["STREAMS_PER_DEVICE"] == ("32", "profile")
    assert of("eth0", override_environment=True)["HCCL_SOCKET_IFNAME"] == ("=eth0", "profile")
    assert "GLOO_SOCKET_IFNAME" not in of(None) and of(None)["HCCL_SOCKET_IFNAME"] == ("=bond0", "kept")
    assert of(None, environment={"TASK_QUEUE_ENABLE": "1", "X": "y"})["X"] == ("y", "job")
    assert of(None, bind_cores="numa")["CPU_AFFINITY_CONF"][0] == "0"
    # A node that returns to a c10d rendezvous would otherwise wait for the address of the shared store.
    assert of(None, rendezvous="c10d")["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == ("1", "launcher")


def test_every_profile_has_reasons_and_legal_values() -> None:
    for name in ("ascend910b", "cuda", "cpu"):
        for variable in read_profile(name).variables.values():
            assert variable.reason.endswith(".") and variable.mistake(variable.value) is None, variable
    with pytest.raises(JobError, match="no profile of that name"):
        read_profile("ascend910")


def test_torchrun_takes_no_defaults_from_the_scheduler() -> None:
    made = child_environment(PET | {"PET_STANDALONE": "1", "PET_TEE": "3", "HOME": "/h"}, {"OMP_NUM_THREADS": "1"})
    assert made == {"PET_TEE": "3", "HOME": "/h", "OMP_NUM_THREADS": "1"}


TOPOLOGY = """
\t   NPU0       NPU1       NPU2       NPU3       CPU Affinity
NPU0       X          HCCS       HCCS       HCCS       144-167
NPU1       HCCS       X          HCCS       HCCS       144-167
NPU2       HCCS       HCCS       X          HCCS       0-3,8
NPU3       HCCS       HCCS       HCCS       X          0-3,8

Legend:
  X    = Self
  HCCS = Connection traversing HCCS.
"""


def test_cores_come_from_the_topology() -> None:
    affinity = bind_cores.parse_topology(TOPOLOGY)
    assert affinity[2] == {0, 1, 2, 3, 8} and len(affinity) == 4
    everything = set(range(200))
    assert bind_cores.plan(affinity, everything, 0) == set(range(144, 156))
    assert bind_cores.plan(affinity, everything, 1) == set(range(156, 168))
    assert bind_cores.plan(affinity, set(range(150, 200)), 1) == set(range(159, 168))
    assert bind_cores.plan(affinity, {5}, 2) == set() == bind_cores.plan({}, everything, 0)
    assert bind_cores.visible_device(1, {"ASCEND_RT_VISIBLE_DEVICES": "4,6"}) == 6
    assert bind_cores.ranges(bind_cores.parse_ranges("0-3,8")) == "0-3,8"


def test_cores_come_from_sysfs_where_npu_smi_is_silent(tmp_path: Path) -> None:
    for i, (vendor, kind, node) in enumerate(
        [("0x19e5", "0x120000", 1), ("0x8086", "0x020000", 0), ("0x19e5", "0x120000", 0)]
    ):
        device = tmp_path / f"bus/pci/devices/0000:0{i}:00.0"
        device.mkdir(parents=True)
        for name, value in (("vendor", vendor), ("class", kind), ("numa_node", node)):
            (device / name).write_text(f"{value}\n")
    for node, cores in ((0, "0-3"), (1, "4-7")):
        directory = tmp_path / f"devices/system/node/node{node}"
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(f"{cores}\n")
    assert bind_cores.affinity_from_sysfs(tmp_path) == {0: {4, 5, 6, 7}, 1: {0, 1, 2, 3}}


@pytest.mark.slow
def test_binding_changes_nothing_without_an_npu() -> None:
    script = "import os; print(sorted(os.sched_getaffinity(0)))"
    wrapper = str(CHECKOUT / "launch" / "launcher" / "bind_cores.py")
    environ = {**os.environ, "PATH": "/nonexistent"}
    done = subprocess.run([sys.executable, wrapper, "-c", script], capture_output=True, text=True, env=environ)
    first, second = done.stdout.splitlines()
    assert "nothing bound" in first and second == str(sorted(os.sched_getaffinity(0)))

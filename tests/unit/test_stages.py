# SPDX-License-Identifier: Apache-2.0
"""Tests of jobs that train in stages: each stage's job, the next stage, transitions, and the preflight of stages."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bitcpm_megatron.data.tokenizers import NullTokenizer
from bitcpm_megatron.launch import preflight, run
from bitcpm_megatron.launch.checks.subject import Finding, Subject
from bitcpm_megatron.launch.estimates.memory import estimate, options_of
from bitcpm_megatron.launch.estimates.quantizer import expected_record
from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.launch.launcher.job import Job, JobError, read_job, read_stages
from bitcpm_megatron.launch.launcher.scheduler import ClusterError, place_of
from bitcpm_megatron.launch.launcher.supervisor import Supervisor
from bitcpm_megatron.launch.launcher.torchrun import host_argv, next_stage, torchrun
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.model import build_model

JOB = """
description: two stages
model: {{preset: tiny-minicpm4, seq-length: 32}}
parallelism: {{}}
training: {{micro-batch-size: 1, global-batch-size: 4, lr: 1.0e-2, bf16: true}}
data: {{mock-data: true, vocab-size: 300, eval-iters: 0}}
ternary: {{ternary: true, ternary-telemetry-interval: 10}}
checkpoint: {{save: {d}/save, save-interval: 5, pretrained-checkpoint: {d}/start}}
logging: {{log-interval: 1, log-dir: {d}/log}}
cluster: {{profile: cpu, nodes: 1, devices-per-node: 2, master-port: 24000}}
stages:
  - name: qat
    training: {{train-iters: 20}}
  - name: distill
    training: {{train-iters: 10, lr: 2.0e-3, lr-warmup-iters: 2}}
    distillation: {{distill-teacher: {d}/teacher, distill-alpha: 0.5}}
"""
# The file that names the latest iteration of a checkpoint directory.
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Writes the file of a sane job, its initial weights and its teacher; returns the file."""
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(d=tmp_path))
    qat = read_stages(str(path))[0]
    save(tmp_path / "start", "release", qat)
    save(tmp_path / "teacher", "release", qat, num_layers=4, hidden_size=96, ffn_hidden_size=192, ternary=False)
    return path


def save(directory: Path, name: int | str, of: Job, **changes: object) -> Path:
    """Writes what the launcher reads of a checkpoint of a run with the flags of a job; returns its directory."""
    path = directory / (name if isinstance(name, str) else f"iter_{name:07d}")
    path.mkdir(parents=True)
    (path / "metadata.json").write_text("{}")
    (directory / TRACKER).write_text(str(name))
    filled = parse_args(presets.expand(host_argv(of)[1:]), 2)
    (path / "arguments.json").write_text(json.dumps({**vars(filled), **changes}, default=str))
    return path


def test_a_stage_is_the_job_with_what_it_changes(job: Path) -> None:
    qat, distill = read_stages(str(job), ["stages.distill.training.min-lr=1e-4", "training.seed=7"])
    at = job.parent
    assert (qat.name, qat.stage, qat.before, distill.stage, distill.before) == ("job-qat", "qat", None, "distill", qat)
    shared = {"lr": 1e-2, "seed": 7, "train-iters": 20, "pretrained-checkpoint": f"{at}/start"}
    assert shared.items() <= qat.flags.items() and not any(flag.startswith("distill") for flag in qat.flags)
    own = {"lr": 2e-3, "seed": 7, "train-iters": 10, "min-lr": 1e-4, "distill-alpha": 0.5}
    assert own.items() <= distill.flags.items()
    # A stage has directories of its own, and takes only the weights from the previous stage.
    for stage in (qat, distill):
        assert stage.flags["save"] == f"{at}/save/{stage.stage}" and stage.flags["log-dir"] == f"{at}/log/{stage.stage}"
        argv = host_argv(stage)
        assert argv[argv.index("--load") + 1] == stage.flags["save"] and "--finetune" not in argv
    assert distill.flags["pretrained-checkpoint"] == f"{at}/save/qat"
    said = ["stages.distill.checkpoint={save: elsewhere, pretrained-checkpoint: first}", "stages.distill.logging={}"]
    flags = read_stages(str(job), said)[1].flags
    assert (flags["save"], flags["pretrained-checkpoint"]) == ("elsewhere", "first")


def test_stages_do_not_meet(job: Path) -> None:
    qat, distill = read_stages(str(job), ["cluster.rendezvous=c10d", "cluster.nodes=2", "cluster.hosts=[a, b]"])
    commands = [torchrun(stage, place_of(stage, {}, 1)) for stage in (qat, distill)]
    endpoints = [command[command.index("--rdzv_endpoint") + 1] for command in commands]
    assert endpoints == ["a:24000", "a:24001"]
    assert [command[command.index("--rdzv_id") + 1] for command in commands] == ["job-qat", "job-distill"]
    named = read_stages(str(job), ["cluster.rendezvous-id=mine"])
    assert [stage.cluster.rendezvous_id for stage in named] == ["mine-qat", "mine-distill"]
    with pytest.raises(ClusterError, match="stage distill needs port 65536, 1 above the master's: it must be 1 to"):
        place_of(read_stages(str(job), ["cluster.master-port=65535"])[1], {})


def test_a_job_without_stages_is_its_own_only_one(job: Path) -> None:
    plain = ["stages=", "training.train-iters=3"]
    assert read_stages(str(job), plain) == [read_job(str(job), plain)]
    with pytest.raises(JobError, match=r"it has stages \(qat, distill\), and is not one job"):
        read_job(str(job))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.distill.traning={}"], "stage distill: unknown key traning: did you mean training?"),
        (["stages.distill.training.lrr=1"], "stage distill: unknown key training.lrr: did you mean lr?"),
        (["stages.distill.training.lr=fast"], "stage distill: training.lr: 'fast': expected a number"),
        (["stages.distill.host={kind: built-in}"], "stage distill: unknown key host"),
        (["stages.distill.cluster={nodes: 2}"], "stage distill: unknown key cluster"),
        (["stages.distill.data.distill-alpha=1"], "stage distill: unknown key data.distill-alpha: it belongs to sec"),
        (["stages.distill.distillation.distill-alpha=2"], "distillation.distill-alpha: 2: must be at least 0 and at"),
        (["stages.distill.training=3"], "stage distill: training: expected a mapping"),
        (["stages.distill.model.preset=[a]"], "stage distill: model.preset: expected the name"),
        (["stages.distill.name=../up"], "stage ../up: name: '../up' is not a name of letters"),
        (["stages.distill.name=qat"], "stage qat: there are two of this name"),
        (["stages.distill.name="], "stage 2: name is missing"),
        (
            ["stages.distill.checkpoint.load=x"],
            "stage distill: checkpoint.load: a stage goes on from what it has saved",
        ),
        (["stages.distill.checkpoint.save={d}/save/qat"], "stage distill: save: .*/save/qat is that of stage qat"),
        (["stages.distill.logging.log-dir={d}/log/qat"], "stage distill: log-dir: .*/log/qat is that of stage qat"),
        (["checkpoint.save="], "stage qat: checkpoint.save is missing"),
        (["stages=3"], "stages: expected a list"),
        (["stages=[3]"], "stages.0: expected a mapping"),
        (["stages.distil.training.lr=1"], "it has no stage 'distil': did you mean distill?"),
        (["stages.distill=1"], "write stages.NAME.section.key=value"),
        (["training.lr=1"], r"stages have their own \(distill\): write stages.distill.training.lr="),
        (["training={}"], r"stages have their own \(qat, distill\): write stages.qat.training="),
        (["traning.lr=1"], "unknown key traning: did you mean training?"),
    ],
)
def test_a_mistake_in_a_stage_is_refused_by_its_name(job: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(JobError, match=said.replace("'../up'", r"'\.\./up'")):
        read_stages(str(job), [override.replace("{d}", str(job.parent)) for override in overrides])


def test_what_a_stage_lacks_is_said_with_its_name(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(job), "--print", "--set", "stages.distill.training.train-iters="]) == 2
    assert "stage distill with the preset tiny-minicpm4: " in capsys.readouterr().err


MEGATRON_HOST = [
    "host={kind: megatron-lm, megatron-path: /opt/m}",
    "ternary.ternary-telemetry-interval=",
    "logging.log-dir=",
]


def test_a_megatron_host_gets_the_teacher_and_no_store(job: Path) -> None:
    _, distill = read_stages(str(job), MEGATRON_HOST)
    argv = host_argv(distill)
    assert argv[argv.index("--distill-teacher") :][:4] == [
        "--distill-teacher",
        f"{job.parent}/teacher",
        "--distill-alpha",
        "0.5",
    ]
    store = ["stages.distill.distillation={distill-targets: /targets}"]
    with pytest.raises(JobError, match="distill-targets with the megatron-lm host: .* use distill-teacher"):
        host_argv(read_stages(str(job), [*MEGATRON_HOST, *store])[1])
    with pytest.raises(JobError, match="distill-teacher: it belongs to section distillation"):
        read_stages(str(job), ["host={kind: megatron-lm, megatron-path: /m, flags: {distill-teacher: x}}"])


def test_trackers_say_which_stage_is_next(job: Path) -> None:
    stages = read_stages(str(job))
    qat, distill = stages
    assert next_stage(stages) is qat
    save(job.parent / "save" / "qat", 10, qat)
    assert next_stage(stages) is qat
    save(job.parent / "save" / "qat", 20, qat)
    assert next_stage(stages) is distill
    save(job.parent / "save" / "distill", 5, distill)
    assert next_stage(stages) is distill
    longer = read_stages(str(job), ["stages.qat.training.train-iters=30"])
    with pytest.raises(
        JobError, match="stage distill has begun in .*/save/distill, and stage qat ends at iteration 30"
    ):
        next_stage(longer)
    save(job.parent / "save" / "distill", 10, distill)
    assert next_stage(stages) is None


class Agents:
    """A double of agents that saves the checkpoints of a plan, and exits as the plan says."""

    def __init__(self, job: Path, plan: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.asks = False
        stages = {str(stage.stage): stage for stage in read_stages(str(job))}

        def agent(supervisor: Supervisor, command: list[str], variables: dict[str, str]) -> int:
            name, iteration, status = plan[len(self.ran)]
            self.ran.append(Path(command[command.index("--save") + 1]).name)
            save(job.parent / "save" / name, iteration, stages[name])
            supervisor.asked = self.asks
            return status

        monkeypatch.setattr(Supervisor, "run", agent)


@pytest.mark.parametrize(
    ("plan", "asks", "ran", "status", "said"),
    [
        ([("qat", 20, 0), ("distill", 10, 0)], False, ["qat", "distill"], 0, "every stage has ended"),
        # Whether this node or another one was asked to stop makes no difference here.
        ([("qat", 19, 0)], False, ["qat"], 0, "stage qat has not ended"),
        ([("qat", 20, 0)], True, ["qat"], 0, "asked to stop"),
        ([("qat", 15, 1)], False, ["qat"], 1, "stage qat has not ended"),
        ([("qat", 20, 2)], False, ["qat"], 2, "stage qat has not ended"),
        (
            [("qat", 20, 0), ("distill", 5, -9)],
            False,
            ["qat", "distill"],
            1,
            "the agent of stage distill ended by SIGKILL",
        ),
    ],
)
def test_a_stage_follows_where_the_one_before_has_ended(
    plan: list, asks: bool, ran: list[str], status: int, said: str, job: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    agents = Agents(job, plan, monkeypatch)
    agents.asks = asks
    before = signal.getsignal(signal.SIGTERM)
    assert run.main([str(job)]) == status
    assert agents.ran == ran and signal.getsignal(signal.SIGTERM) is before
    printed = capfd.readouterr()
    assert said in printed.out + printed.err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_this_process_is_asked_reaches_the_agent(number: signal.Signals) -> None:
    script = f"""
import os, signal, time
signal.signal({int(number)}, lambda *_: os._exit(7))
os.kill(os.getppid(), {int(number)})
time.sleep(60)
"""
    with Supervisor() as supervisor:
        assert supervisor.run([sys.executable, "-c", script], os.environ) == 7
        assert supervisor.asked
        # This process is started after the request.
        assert supervisor.run([sys.executable, "-c", "import time; time.sleep(60)"], {}) == -signal.SIGTERM


@pytest.mark.slow
def test_ctrl_c_asks_all_children_and_a_second_one_does_not_wait(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print(sys.argv[1], os.getpid() == os.getsid(0), flush=True))
print("ready", flush=True)
for _ in range(600):
    time.sleep(0.1)
"""
    path = tmp_path / "output.txt"

    def said(lines: int) -> list[str]:
        deadline = time.monotonic() + 60
        while len(path.read_text().splitlines()) < lines:
            assert time.monotonic() < deadline, path.read_text()
            time.sleep(0.02)
        return path.read_text().splitlines()

    with path.open("ab") as output, pytest.raises(KeyboardInterrupt), Supervisor(interactive=True) as supervisor:
        children = [supervisor.start([sys.executable, "-c", script, name], os.environ, output) for name in "ab"]
        said(2)
        signal.raise_signal(signal.SIGINT)
        # Each child has a session of its own, so that the terminal signals only this process.
        assert supervisor.asked and sorted(said(4)[2:]) == ["a True", "b True"]
        assert [child.poll() for child in children] == [None, None]
        signal.raise_signal(signal.SIGINT)
    assert [child.poll() for child in children] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process when its parent dies")
def test_an_agent_dies_with_who_started_it() -> None:
    script = """
import sys
import time
from bitcpm_megatron.launch.launcher.supervisor import Supervisor
with Supervisor() as supervisor:
    supervisor.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], {})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip().isdecimal()
    process.kill()
    # This waits until the child has closed its end of the pipe.
    process.communicate(timeout=30)


def findings(job: Path, stage: int, *overrides: str) -> dict[str, Finding]:
    chosen = read_stages(str(job), overrides)[stage]
    return {finding.check: finding for finding in preflight.findings(Subject(chosen, environ={}))}


def test_a_sane_job_of_stages_passes(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in range(2):
        # The optimizer and the order of samples start anew, so that the seed and adam-beta2 may differ.
        found = findings(job, stage, "stages.distill.training.seed=5", "stages.distill.training.adam-beta2=0.95")
        # Findings about this machine do not depend on the job.
        assert [f for f in found.values() if f.status != "pass" and f.check not in ("versions", "open-files")] == []
    assert found["resume"].found.startswith("starts from the weights that stage qat will leave in ")
    assert found["stages"].found == "qat -> distill" and found["stage-weights"].status == "pass"
    assert "teacher" in found["device-memory"].found and "bf16, 0.000" in found["teacher"].found
    assert preflight.main([str(job)]) == 0
    told = capsys.readouterr().out
    assert f"preflight of job-qat ({job})" in told and f"preflight of job-distill ({job})" in told
    assert preflight.main([str(job), "--json", "--set", "stages.distill.training.min-lr=1"]) == 3
    wrong = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["status"] == "fail"]
    assert {(f["stage"], f["check"]) for f in wrong} == {("distill", "schedule"), ("distill", "arguments")}
    assert run.main([str(job), "--preflight", "--set", "stages.distill.training.min-lr=1"]) == 3


def test_a_stage_that_has_ended_is_no_warning(job: Path) -> None:
    qat = read_stages(str(job))[0]
    path = save(job.parent / "save" / "qat", 20, qat)
    assert findings(job, 0)["resume"].found == "stage qat has ended at iteration 20"
    found = findings(job, 1, "stages.distill.training.seed=5", "stages.distill.training.adam-beta2=0.95")
    assert found["resume"].found.endswith(f"starts from the weights in {path.parent}")
    # The existing checkpoint is checked instead of the planned one.
    assert "stage-weights" not in found and found["checkpoint-model"].status == "pass"


def damage(**changes: object) -> Callable[[Path], None]:
    """Returns a function that changes the arguments in the teacher's checkpoint."""

    def plant(job: Path) -> None:
        path = job.parent / "teacher" / "release" / "arguments.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return plant


def no_teacher(job: Path) -> None:
    (job.parent / "teacher" / TRACKER).unlink()
    (job.parent / "teacher" / "release").rename(job.parent / "elsewhere")


def begun_too_early(job: Path) -> None:
    save(job.parent / "save" / "distill", 5, read_stages(str(job))[1])


def nothing(job: Path) -> None:
    return None


IDENTITY = dict(NullTokenizer(299).unique_identifiers)
PIPELINE = ["parallelism.pipeline-model-parallel-size=2"]
TENSOR = ["parallelism.tensor-model-parallel-size=2", "parallelism.sequence-parallel=true"]
PLANTED: dict[str, tuple[list[str], Callable[[Path], None], str, str, str]] = {
    # name: (overrides, function that plants the mistake, check that finds it in stage distill, status, words of it)
    "no teacher": ([], no_teacher, "teacher", "fail", "teacher holds no checkpoint"),
    "nowhere": (["stages.distill.distillation.distill-teacher=/no/where"], nothing, "teacher", "fail", "no checkpoint"),
    "no teacher's memory": ([], no_teacher, "device-memory", "warn", "unknown until the checkpoint is there"),
    "a teacher of no arguments": ([], damage(hidden_size="wide"), "teacher", "fail", "hidden_size 'wide'"),
    "layers over PP": (PIPELINE, damage(num_layers=3), "teacher", "fail", "its 3 layers cannot be split over 2 stages"),
    "heads over TP x CP": (
        ["parallelism.context-parallel-size=2"], damage(num_attention_heads=3), "teacher", "fail",
        "its 3 heads cannot be split over 2 ranks",
    ),
    "groups over TP": (TENSOR, damage(num_query_groups=3, num_attention_heads=6), "teacher", "fail", "query groups"),
    "positions": (
        [], damage(max_position_embeddings=16), "teacher", "fail", "16 positions, less than --seq-length 32",
    ),
    "another tokenizer": (
        [], damage(tokenizer_identity={**IDENTITY, "vocab_size": "7"}), "teacher", "fail", "another tokenizer",
    ),
    "a teacher too large": (
        ["cluster.device-memory-gib=1"], damage(num_layers=64, hidden_size=2048, ffn_hidden_size=8192),
        "device-memory", "fail", "teacher ",
    ),
    "another model": (
        ["stages.distill.model.hidden-size=96"], nothing, "stage-weights", "fail", "--hidden-size 64 (now 96)",
    ),
    "another quantizer": (
        ["stages.distill.ternary.ternary-group-size=32"], nothing, "stage-weights", "fail", "another quantizer",
    ),
    "all ids kept": (
        ["stages.distill.distillation.distill-top-k=300"], nothing, "teacher", "fail", "of 300 ids leaves no rest",
    ),
    "full precision": (["stages.distill.ternary.ternary=false"], nothing, "stage-weights", "fail", "--ternary is not"),
    "a group that does not fit": (
        ["stages.distill.ternary.ternary-group-size=96"], nothing, "stage-weights", "fail", "96",
    ),
    "begun too early": ([], begun_too_early, "stages", "fail", "stage distill has begun"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(job: Path, name: str) -> None:
    overrides, plant, check, status, said = PLANTED[name]
    plant(job)
    found = findings(job, 1, *overrides)
    assert check in found, list(found)
    assert found[check].status == status and said in found[check].found + found[check].cure, found[check]
    assert all(f.cure for f in found.values() if f.status != "pass"), "a finding without a cure"


@pytest.mark.parametrize("identity", [IDENTITY, None])
def test_a_teacher_of_the_same_tokens_passes(job: Path, identity: dict | None) -> None:
    damage(tokenizer_identity=identity)(job)
    assert findings(job, 1)["teacher"].status == "pass"


def test_the_first_stage_may_be_the_teacher_of_the_second(job: Path) -> None:
    own = [f"stages.distill.distillation.distill-teacher={job.parent}/save/qat"]
    found = findings(job, 1, *own)
    assert found["teacher"].found == f"stage qat will leave it in {job.parent}/save/qat"
    assert found["device-memory"].status == "warn"
    save(job.parent / "save" / "qat", 20, read_stages(str(job))[0])
    found = findings(job, 1, *own)
    assert [found[name].status for name in ("teacher", "device-memory")] == ["pass", "pass"]


def test_what_a_megatron_host_leaves_is_no_teacher(job: Path) -> None:
    found = findings(job, 1, f"stages.distill.distillation.distill-teacher={job.parent}/save/qat", *MEGATRON_HOST)
    assert (
        found["teacher"].status == "fail"
        and "stage qat will leave a checkpoint of Megatron-LM" in found["teacher"].found
    )


def test_a_teacher_takes_its_weights_its_logits_and_the_buffers(job: Path, single_rank: None) -> None:
    distill = read_stages(str(job))[1]
    subject = Subject(distill, environ={})
    teacher = subject.teacher
    own = teacher.args
    model = build_model(own, 384, with_ddp=False)
    weights = sum(p.numel() for chunk in model.bare for p in chunk.parameters())
    # The memory holds bf16 weights, and for 32 tokens bf16 logits, their gradient and five fp32 chunks.
    expected = 2 * weights + 2 * 2 * 32 * 384 + 5 * 4 * 32 * 384
    assert teacher.nbytes(0, 384, 2) == expected
    options = options_of(subject.args, cpu=True)
    alone, beside = (estimate(subject.layout, replace(options, teacher=each))[1] for each in (None, teacher))
    assert beside.total - alone.total == expected


def test_a_ternary_teacher_takes_its_quantized_weights_too(job: Path) -> None:
    distill = read_stages(str(job))[1]
    plain = Subject(distill, environ={})
    record = expected_record(plain.teacher.layout, plain.args, 1)
    record.write(job.parent / "teacher" / "release")
    weights = sum(linear.weights for linear in plain.teacher.layout.all_linears())
    assert Subject(distill, environ={}).teacher.nbytes(0, 384, 2) == plain.teacher.nbytes(0, 384, 2) + 2 * weights


def test_pipeline_stages_hear_all_of_a_step_before_the_student_begins(job: Path) -> None:
    distill = read_stages(str(job), PIPELINE)[1]
    teacher = Subject(distill, environ={}).teacher
    first, last = (teacher.nbytes(stage, 384, 2) for stage in range(2))
    layer, embedding, norm, logits = first - 2 * 384 * 96, 2 * 384 * 96, 2 * 96, 32 * 384
    assert teacher.micro_batches == 4 and last == layer + embedding + norm + logits * (2 * 4 + 2 + 20)
    # Instead of all logits of four micro-batches, there are logits of two, and for all four 8 ids of 8 bytes per token.
    distill = read_stages(str(job), [*PIPELINE, "stages.distill.distillation.distill-top-k=8"])[1]
    kept = Subject(distill, environ={}).teacher.nbytes(1, 384, 2)
    assert kept == layer + embedding + norm + logits * (2 * 2 + 20) + 4 * 32 * 8 * 8


def test_the_8b_teacher_of_the_job_that_comes_with_the_package(tmp_path: Path) -> None:
    own = [f"stages.distill.distillation.distill-teacher={tmp_path}", "cluster.master-addr=127.0.0.1"]
    distill = read_stages("two-stage", own)[1]
    needed = "--seq-length 1 --micro-batch-size 1 --train-iters 1 --lr 1 --bf16 --vocab-size 73448 --mock-data"
    saved = vars(parse_args([*presets.flags("minicpm4-8b"), *needed.split()], 1))
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "metadata.json").write_text("{}")
    (tmp_path / "release" / "arguments.json").write_text(json.dumps(saved, default=str))
    (tmp_path / TRACKER).write_text("release")
    subject = Subject(distill, environ={}, node_rank=0)
    found = {f.check: f for f in preflight.findings(subject)}
    assert found["device-memory"].status == found["teacher"].status == "pass", found["device-memory"]
    assert "bf16, 7.88 billion weights per token: 7.1 times the FLOPs of a step" in found["teacher"].found
    # The memory holds its weights, whose number is known, and the logits and buffers of 4 x 4,096 tokens.
    buffers = 4 * 4 * 4096 * 73472 + 20 * 2**23
    assert subject.teacher.nbytes(0, 73472, 2) - buffers == pytest.approx(16.4e9, rel=0.01)

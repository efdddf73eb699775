# SPDX-License-Identifier: Apache-2.0
"""The ``torchrun`` command of a job (through ``launch/agent.py``) for this node's place, as a list of arguments."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoints.directory import RELEASE, TRACKER, CheckpointError, iteration_of, latest, tracked, tracker_cure
from . import presets
from .job import MEGATRON_LM, Job, JobError
from .scheduler import Placement

_COMMANDS = Path(__file__).resolve().parents[1]
_UPSTREAM_NAMES = {
    "override-opt-param-scheduler": "override-opt_param-scheduler",
    "use-checkpoint-opt-param-scheduler": "use-checkpoint-opt_param-scheduler",
}
_NOT_UPSTREAM = {
    "keep-last-n": "Megatron-LM keeps every checkpoint: leave it out",
    "sft": "Megatron-LM's own reads other files and knows other formats of conversations: use the built-in host",
    "distill-targets": "its samples have no numbers by which a store could be asked: use distill-teacher",
    "ternary-ramp-iters": "hosts do not tell which step they take: use the built-in host",
    "verify-digests": "Megatron-LM knows no digests: leave it out",
    "log-dir": "Megatron-LM writes TensorBoard events alone: use host.flags.tensorboard-dir",
    "ternary-telemetry-interval": "it goes into the log of our own loop: leave it out",
}
_SETTLED_HERE = frozenset(
    "PET_NNODES PET_NPROC_PER_NODE PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_RDZV_BACKEND PET_RDZV_ENDPOINT "
    "PET_RDZV_ID PET_RDZV_CONF PET_STANDALONE PET_MAX_RESTARTS PET_LOCAL_ADDR".split()
)


@dataclass(frozen=True)
class Resume:
    """The point at which a job will start."""

    iteration: int | None  # iteration of the checkpoint that the job resumes; None for a new start or other weights
    line: str  # description for people


def host_argv(job: Job) -> list[str]:
    """Returns the script of the job's host and all its arguments.

    ``--load`` defaults to ``--save``, so that the same job file starts and resumes; and the job saves when it is asked
    to stop (``--exit-signal-handler``) unless it says ``exit-signal-handler: false``.

    Raises:
        JobError: if the host lacks a flag that the job gives, or does not support its value.
    """
    flags = dict(job.flags)
    if "save" in flags and "load" not in flags:
        flags["load"] = flags["save"]
    # Clusters preempt jobs without warning their owners.
    flags.setdefault("exit-signal-handler", True)
    if job.host.kind != MEGATRON_LM:
        preset = ["--model", job.preset] if job.preset else []
        return [str(_COMMANDS / "pretrain.py"), *preset, *presets.arguments(flags)]
    for flag, cure in _NOT_UPSTREAM.items():
        if flag in flags:
            raise JobError(f"{flag} with the {MEGATRON_LM} host: {cure}")
    for flag in ("ternary-cache", "ternary-param-gather"):
        if flags.get(flag) == "packed":
            raise JobError(f"{flag} packed with the {MEGATRON_LM} host: it holds and gathers its parameters by itself")
    start, end = (float(flags.get(f"{moment}-weight-decay", 0)) for moment in ("start", "end"))
    if end < start:
        raise JobError(
            f"end-weight-decay {end:g} below start-weight-decay {start:g} with the {MEGATRON_LM} host: its scheduler "
            "takes no weight decay that falls, use the built-in host"
        )
    argv = [str(_COMMANDS / "pretrain_gpt.py"), "--megatron-path", str(job.host.megatron_path)]
    if job.host.mindspeed_path is not None:
        argv += ["--mindspeed-path", job.host.mindspeed_path]
    if job.preset:
        argv += presets.flags(job.preset)
        if (size := job.vocab_size()) is not None:
            flags["vocab-size"] = size
    return argv + presets.arguments({_UPSTREAM_NAMES.get(k, k): v for k, v in flags.items()} | job.host.flags)


def torchrun(job: Job, place: Placement, local_address: str | None = None) -> list[str]:
    """Returns the whole command of this node.

    Args:
        job: the job, or one stage of it.
        place: this node's place in the job.
        local_address: the address at which other nodes reach this one; None for its host name.

    Raises:
        JobError: if the host does not support a flag of the job (:func:`host_argv`).
    """
    cluster = job.cluster
    command = [sys.executable, str(_COMMANDS / "agent.py")]
    command += ["--nnodes", str(place.nodes), "--nproc_per_node", str(place.devices_per_node)]
    command += ["--max_restarts", str(cluster.max_restarts), "--rdzv_backend", cluster.rendezvous]
    if cluster.rendezvous == "static":
        command += ["--node_rank", str(place.node_rank), "--rdzv_conf", f"timeout={cluster.rendezvous_timeout}"]
        command += ["--master_addr", place.master_addr, "--master_port", str(place.master_port)]
    else:
        # The rank and not the name tells the host of the rendezvous: in containers names may resolve to anything.
        conf = f"is_host={str(place.node_rank == 0).lower()},join_timeout={cluster.rendezvous_timeout}"
        conf += f",keep_alive_interval={max(1, cluster.keep_alive_seconds // 3)},keep_alive_max_attempt=3"
        address = f"[{place.master_addr}]" if ":" in place.master_addr else place.master_addr
        command += ["--rdzv_endpoint", f"{address}:{place.master_port}"]
        command += ["--rdzv_id", cluster.rendezvous_id or job.name, "--rdzv_conf", conf]
        if local_address is not None:
            command += ["--local_addr", local_address]
    if cluster.bind_cores == "numa":
        command.append(str(_COMMANDS / "launcher" / "bind_cores.py"))
    return [*command, *host_argv(job)]


def environment(environ: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the command: the exported variables, overridden by the job's settings.

    The ``PET_*`` variables are left out from which ``torchrun`` would take defaults for what the command settles.
    """
    return {**{k: v for k, v in environ.items() if k not in _SETTLED_HERE}, **settings}


def resume(job: Job) -> Resume:
    """Returns the point at which the job will start, found in the same way as its host finds it.

    Raises:
        CheckpointError: if the newest checkpoint is unusable (:func:`~bitcpm_megatron.checkpoints.directory.latest`).
    """
    directory = job.flags.get("load") or job.flags.get("save")
    if directory is None:
        return Resume(None, "nothing is saved or loaded: starts at iteration 0")
    found = latest_of(job, str(directory))
    if found is None:
        first = job.flags.get("pretrained-checkpoint")
        anew = f"starts from the weights in {first}" if first else "starts anew"
        return Resume(None, f"{directory} holds no checkpoint: {anew}")
    if found.name == RELEASE:
        return Resume(None, f"starts from the weights in {found}, at iteration 0")
    return Resume(iteration_of(found), f"goes on from {found}")


def is_finished(job: Job) -> bool:
    """Returns whether the newest checkpoint that a job has saved is that of its last iteration.

    Raises:
        CheckpointError: if the newest checkpoint is unusable (:func:`~bitcpm_megatron.checkpoints.directory.latest`).
        JobError, PresetError: if the arguments of the job are bad (:meth:`Job.arguments`).
    """
    found = latest_of(job, str(job.flags["save"])) if "save" in job.flags else None
    return found is not None and iteration_of(found) >= job.arguments().train_iters


def next_stage(jobs: Sequence[Job]) -> Job | None:
    """Returns the first stage of a job that has not ended, or None if all have.

    Raises:
        JobError: if a later stage has begun already: it would not see what the returned stage still has to learn.
        CheckpointError: if a newest checkpoint is unusable (:func:`~bitcpm_megatron.checkpoints.directory.latest`).
    """
    left = [job for job in jobs if not is_finished(job)]
    for job in jobs[jobs.index(left[0]) + 1 :] if left else ():
        if latest_of(job, str(job.flags["save"])) is not None:
            raise JobError(
                f"{job.path}: stage {job.stage} has begun in {job.flags['save']}, and stage {left[0].stage} ends at "
                f"iteration {left[0].arguments().train_iters} only: give that stage its old train-iters, or name other "
                f"directories to begin anew"
            )
    return left[0] if left else None


def latest_of(job: Job, directory: str) -> Path | None:
    """Returns the newest checkpoint in a directory as the job's host would find it, or None.

    Raises:
        CheckpointError: if the newest checkpoint is unusable (:func:`~bitcpm_megatron.checkpoints.directory.latest`).
    """
    if job.host.kind != MEGATRON_LM:
        return latest(directory)
    # Megatron-LM reads its legacy format as well, which our loop's check would refuse.
    name = tracked(Path(directory))
    if name is None:
        return None
    path = Path(directory) / name
    if not path.is_dir() or not any(path.iterdir()):
        raise CheckpointError(
            f"{Path(directory) / TRACKER} names {path}, which is not there: {tracker_cure(Path(directory))}"
        )
    return path

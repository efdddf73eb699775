# SPDX-License-Identifier: Apache-2.0
"""Tests of a teacher in a host: the host's schedule learns from it, with a forward step that does not know of it."""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules as megatron_schedules

from bitcpm_megatron.checkpoints.directory import CheckpointError, latest
from bitcpm_megatron.objectives.distillation import Divergence
from bitcpm_megatron.objectives.extracts import likeliest
from bitcpm_megatron.objectives.language_modeling import Batch
from bitcpm_megatron.objectives.targets import DenseTargets, TopKTargets
from bitcpm_megatron.training.checkpoint import trained_model
from bitcpm_megatron.training.distillation import hosts
from bitcpm_megatron.training.distillation.objective import TARGETS, DistillationObjective
from bitcpm_megatron.training.distillation.refusals import refused
from bitcpm_megatron.training.distillation.teacher import Teacher
from bitcpm_megatron.training.flags import arguments_of, parse_args
from bitcpm_megatron.training.loop import pretrain
from bitcpm_megatron.training.model import Model, build_model

SHARED = """
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --mock-data
    --vocab-size 100 --make-vocab-size-divisible-by 8 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0
    --position-embedding-type rope --swiglu --disable-bias-linear --init-method-std 0.1 --train-iters 1
""".split()
STUDENT = [*SHARED, *"--num-layers 1 --hidden-size 32 --num-attention-heads 2 --ternary".split()]
LARGER = [*SHARED, *"--num-layers 3 --hidden-size 48 --num-attention-heads 4".split()]
# Arguments that only Megatron-LM has, or that have other values there than in our loop.
OF_HOSTS = {
    "padded_vocab_size": 104,
    "tokenizer_type": "NullTokenizer",
    "cp_comm_type": ["p2p"],
    "virtual_pipeline_model_parallel_size": 2,
}
ALPHA, TEMPERATURE, COUNT = 0.5, 2.0, 3


@pytest.fixture
def teacher(single_rank: None, tmp_path: Path) -> Path:
    """Makes an untrained checkpoint of a larger model."""
    pretrain(parse_args([*LARGER, "--save", str(tmp_path / "teacher")], 1))
    return tmp_path / "teacher"


def arguments(teacher: Path, **changes: object) -> argparse.Namespace:
    """Returns the arguments of a host whose student learns from a teacher."""
    flags = [
        "--distill-teacher",
        str(teacher),
        "--distill-alpha",
        str(ALPHA),
        "--distill-temperature",
        str(TEMPERATURE),
    ]
    return argparse.Namespace(**{**vars(parse_args([*STUDENT, *flags], 1)), **OF_HOSTS, **changes})


def batches(count: int = COUNT) -> list[Batch]:
    """Returns micro-batches with loss masks, which are the same at each call."""
    drawn, found = torch.Generator().manual_seed(3), []
    for _ in range(count):
        tokens, labels = (torch.randint(100, (2, 16), generator=drawn) for _ in range(2))
        mask = (torch.rand(2, 16, generator=drawn) < 0.7).float()
        positions = torch.arange(16).expand(2, -1)
        found.append({"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": mask})
    return found


def loss_func(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Computes the loss like pretrain_gpt.py of core_v0.16.1."""
    loss = torch.sum(output.view(-1).float() * mask.view(-1))
    tokens = mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack((loss.detach(), tokens.float()))}


def forward_step(data: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    """Runs a forward step like pretrain_gpt.py; models other than students get a mask, which our attention refuses."""
    batch = next(data)
    mask = None if getattr(model, "takes_no_mask", False) else torch.ones(2, 1, 16, 16, dtype=torch.bool).triu(1)
    given = batch["tokens"], batch["position_ids"], mask
    output = model(*given, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, functools.partial(loss_func, batch["loss_mask"])


def run(
    model: Model, data: Iterator[Batch] | None, step: Callable = forward_step, forward_only: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Runs what a host's train_step calls, and returns the report of each micro-batch."""
    return megatron_schedules.get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=data,
        model=model.bare,
        num_microbatches=COUNT,
        seq_length=16,
        micro_batch_size=2,
        decoder_seq_length=16,
        forward_only=forward_only,
    )


def student() -> Model:
    """Makes a student, which has the same weights at each call."""
    torch.manual_seed(5)
    model = build_model(parse_args([*STUDENT, "--use-cpu-initialization"], 1), 104, with_ddp=False)
    model.bare[0].takes_no_mask = True
    return model


def expected(teacher: Path, k: int | None = None) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Returns the gradients and reports of our own loop's objective with the teacher's outputs."""
    checkpoint = latest(teacher)
    said = trained_model(arguments_of(checkpoint, 1), checkpoint, 104).bare[0]
    model, reported = student(), []
    objective = DistillationObjective(model.bare, Divergence(100, TEMPERATURE), ALPHA)
    for batch in batches():
        with torch.no_grad():
            logits = said(batch["tokens"], batch["position_ids"], None).transpose(0, 1).contiguous()
        targets = DenseTargets(logits)
        if k is not None:
            group = parallel_state.get_tensor_model_parallel_group()
            targets = TopKTargets(*likeliest(logits, k, 100, TEMPERATURE, group), TEMPERATURE)
        output, loss_of = objective({**batch, TARGETS: targets}, model.bare[0])
        loss, _, told = loss_of(output)
        loss.backward()
        reported.append({"lm loss": told["lm_loss"], "distill loss": told["distill_loss"]})
    return {name: p.grad for name, p in model.bare[0].named_parameters()}, reported


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "k"), [(False, None), (True, None), (True, 5)])
def test_a_hosts_schedule_learns_what_our_own_loop_learns(
    ahead: bool, k: int | None, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds also if the teacher runs ahead for the whole step, as with pipelines; evaluation uses no teacher."""
    gradients, reported = expected(teacher, k)
    monkeypatch.setattr(Teacher, "runs_ahead", ahead)
    model, args = student(), arguments(teacher, distill_top_k=k)
    notes = hosts.learn_in_host(args, model.bare, 100)
    assert "the tokenizer was not compared" in notes[-1] and args.distill_identity["checkpoint"] == "iter_0000001"
    plain = student()
    data = iter([*batches(), "the next step's"])
    found = run(model, data)
    assert next(data) == "the next step's"
    for name, parameter in model.bare[0].named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    for one, wanted in zip(found, reported, strict=True):
        assert one.keys() == wanted.keys() and all(torch.equal(one[name], wanted[name]) for name in wanted)
    evaluated, alone = (run(each, iter(batches()), forward_only=True) for each in (model, plain))
    for one, wanted in zip(evaluated, alone, strict=True):
        assert one.keys() == {"lm loss"} and torch.equal(one["lm loss"], wanted["lm loss"])
    # Another model in the process is not affected.
    assert all(one.keys() == {"lm loss"} for one in run(plain, iter(batches())))


@pytest.mark.slow
def test_while_a_teacher_runs_the_hosts_arguments_describe_it(teacher: Path) -> None:
    """MindSpeed reads from the arguments what megatron-core reads from a model's own configuration."""
    model, args = student(), arguments(teacher)
    before = dict(vars(args))
    hosts.learn_in_host(args, model.bare, 100)
    seen = []

    def step(data: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        seen.append((args.num_layers, args.hidden_size, args.virtual_pipeline_model_parallel_size))
        return forward_step(data, chunk)

    run(model, iter(batches()), step)
    assert seen == [(3, 48, None), (1, 32, 2)] * COUNT
    identity = vars(args).pop("distill_identity")
    assert vars(args) == before and identity["checkpoint"] == "iter_0000001"


@pytest.mark.slow
def test_ranks_that_read_nothing_hear_the_teacher_too(teacher: Path) -> None:
    """In a host, only the first tensor-parallel rank reads data, and passes micro-batches on to the others."""
    model, handed = student(), iter([batch for batch in batches() for _ in range(2)])
    hosts.learn_in_host(arguments(teacher), model.bare, 100)

    def step(data: None, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        assert data is None
        return forward_step(handed, chunk)

    run(model, None, step)
    gradients, _ = expected(teacher)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.bare[0].named_parameters())


def test_a_script_with_another_loss_is_refused(single_rank: None) -> None:
    losses = hosts.Losses(torch.ones(2, 16), torch.ones(2, 16), torch.ones(2, 16))
    with pytest.raises(ValueError, match="reports dpo loss and no lm loss: use pretrain_gpt.py"):
        hosts._reported(lambda output: (output.sum(), {"dpo loss": output.sum()}), losses, losses.total)


def test_a_teacher_that_is_not_there_is_refused(single_rank: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the teacher .*nowhere: there is no checkpoint"):
        hosts.learn_in_host(arguments(tmp_path / "nowhere"), [], 100)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"qad_enable": True},
            "qad_enable: it is MindSpeed's own distillation, of dense models without pipeline stages",
        ),
        ({"distill_targets": "targets", "distill_teacher": None}, "distill_targets: samples of a host have no numbers"),
        ({"schedules_method": "dualpipev"}, "schedules_method: its schedule takes micro-batches"),
        ({"mtp_num_layers": 1}, "mtp_num_layers: nobody teaches the tokens further ahead"),
        ({"reset_attention_mask": True}, "reset_attention_mask: the teacher sees a sample as a whole"),
        ({"noop_layers": [0]}, "noop_layers: it changes the layers of every model of the process"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl: a captured graph would replay"),
        ({"context_parallel_size": 2}, "context_parallel_size: hosts cut sequences"),
        (
            {"eod_mask_loss": True},
            "eod_mask_loss: micro-batches would weigh alike whatever they learn: add --calculate",
        ),
        ({"own_family": True}, "distill_teacher: MindSpeed-LLM would build it by the student's arguments"),
    ],
)
def test_what_does_not_go_with_a_teacher_is_refused_by_name(changes: dict[str, object], said: str) -> None:
    given = {"distill_teacher": "teacher", "distill_targets": None, "context_parallel_size": 1, "eod_mask_loss": False}
    given |= {"calculate_per_token_loss": False, "cuda_graph_impl": "none", "mtp_num_layers": None, "own_family": False}
    assert list(refused(argparse.Namespace(**given), False)) == []
    given |= changes
    ((name, why),) = refused(argparse.Namespace(**given), given.pop("own_family"))
    assert said in f"{name}: {why}"
    assert list(refused(argparse.Namespace(**given | {"distill_teacher": None, "distill_targets": None}), True)) == []

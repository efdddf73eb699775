# SPDX-License-Identifier: Apache-2.0
"""Tests of runs with a teacher: the gradients of the mixed loss, and a teacher that the run does not change."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from support.small_model import tensors

from bitcpm_megatron.checkpoints.directory import CheckpointError, saved_arguments
from bitcpm_megatron.objectives.distillation import Divergence
from bitcpm_megatron.objectives.extracts import likeliest
from bitcpm_megatron.objectives.targets import DenseTargets
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.training.distillation import teacher as module
from bitcpm_megatron.training.distillation.objective import TARGETS, DistillationObjective
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.loop import TrainingError, pretrain
from bitcpm_megatron.training.metrics import read_metrics
from bitcpm_megatron.training.model import build_model
from bitcpm_megatron.training.run import Step

SHARED = """
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --mock-data
    --vocab-size 100 --make-vocab-size-divisible-by 8 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0
    --position-embedding-type rope --swiglu --disable-bias-linear --log-interval 1 --init-method-std 0.1
""".split()
STUDENT = [*SHARED, *"--num-layers 1 --hidden-size 32 --num-attention-heads 2".split()]
# The teacher has another depth, width, number of heads, precision, and number of rows of the embedding (100, not 104).
LARGER = """
    --num-layers 3 --hidden-size 48 --num-attention-heads 4 --make-vocab-size-divisible-by 4 --bf16
    --untie-embeddings-and-output-weights
""".split()


@pytest.fixture
def teacher(single_rank: None, tmp_path: Path) -> Path:
    """Makes an untrained checkpoint of a larger model."""
    pretrain(parse_args([*SHARED, *LARGER, "--train-iters", "1", "--save", str(tmp_path / "teacher")], 1))
    return tmp_path / "teacher"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 2.0)])
def test_loss_and_gradients_are_those_of_plain_torch(
    alpha: float, temperature: float, reverse: bool, single_rank: None
) -> None:
    model = build_model(parse_args([*STUDENT, "--train-iters", "1", "--ternary"], 1), 104, with_ddp=False)
    chunk, drawn = model.bare[0], torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(100, (2, 16), generator=drawn) for _ in range(2))
    batch = {"tokens": tokens, "labels": labels, "position_ids": torch.arange(16).expand(2, -1)}
    batch["loss_mask"] = (torch.rand(2, 16, generator=drawn) < 0.7).float()
    said = torch.randn(16, 2, 104, generator=drawn) * 3

    logits = chunk(tokens, batch["position_ids"], None)[..., :100].double()
    p = (said.transpose(0, 1)[..., :100].double() / temperature).log_softmax(-1)
    q = (logits / temperature).log_softmax(-1)
    of, against = (q, p) if reverse else (p, q)
    apart = torch.nn.functional.kl_div(against, of, reduction="none", log_target=True).sum(-1) * temperature**2
    # megatron-core's cross entropy includes the padded rows.
    padded = chunk(tokens, batch["position_ids"], None).double()
    entropy = torch.nn.functional.cross_entropy(padded.flatten(0, 1), labels.flatten(), reduction="none").view(2, 16)
    expected = ((1 - alpha) * entropy + alpha * apart) * batch["loss_mask"]
    expected.sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in chunk.named_parameters()}
    chunk.zero_grad()

    objective = DistillationObjective(model.bare, Divergence(100, temperature, reverse), alpha)
    output, loss_of = objective({**batch, TARGETS: DenseTargets(said)}, chunk)
    loss, count, reported = loss_of(output)
    loss.backward()
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert int(count) == int(batch["loss_mask"].sum())
    assert reported["lm_loss"][0].item() == pytest.approx((entropy * batch["loss_mask"]).sum().item(), rel=1e-5)
    if alpha:
        assert reported["distill_loss"][0].item() == pytest.approx((apart * batch["loss_mask"]).sum().item(), rel=1e-5)
    for name, parameter in chunk.named_parameters():
        assert (parameter.grad - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name
    # Evaluation uses no teacher.
    plain, _ = objective(batch, chunk)
    assert torch.allclose(plain.double(), entropy, rtol=1e-5)


@pytest.mark.slow
def test_nothing_touches_a_teacher_and_nobody_hears_of_it(teacher: Path, tmp_path: Path) -> None:
    forwards, before = [], {}
    log, save = tmp_path / "log", tmp_path / "save"

    def watch(step: Step) -> None:
        chunk = step.run.teacher._model.bare[0]
        now = {name: tensor.clone() for name, tensor in chunk.state_dict().items() if isinstance(tensor, torch.Tensor)}
        if not before:
            before.update(now)
            chunk.register_forward_hook(lambda *_: forwards.append(step.iteration))
        assert all(torch.equal(before[name], tensor) for name, tensor in now.items())
        assert not chunk.training and not any(p.requires_grad or p.grad is not None for p in chunk.parameters())

    flags = f"--train-iters 20 --ternary --ternary-telemetry-interval 1 --log-dir {log} --save {save} --eval-iters 1"
    args = parse_args([*STUDENT, *flags.split(), "--distill-teacher", str(teacher)], 1)
    run = pretrain(args, on_step=watch)
    assert {p.dtype for p in run.teacher._model.bare[0].parameters()} == {torch.bfloat16}
    assert len(forwards) == 19 * args.num_microbatches, "one forward for each micro-batch that is trained on"
    assert run.teacher._model.ternary is None and not any(hasattr(m, "_ternary") for m in run.teacher._model.bare)
    own = {id(p) for chunk in run.teacher._model.bare for p in chunk.parameters()}
    trained = {id(p) for chunk in run.model.chunks for p in chunk.parameters()}
    trained |= {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not own & trained
    modules = {name for record in read_metrics(log) if record["kind"] == "ternary" for name in record["modules"]}
    assert modules and all(".layers.0." in name for name in modules)
    assert all(record["distill_loss"] > 0 for record in read_metrics(log) if record["kind"] == "train")
    pretrain(parse_args([*STUDENT, *f"--train-iters 1 --ternary --save {tmp_path}/alone".split()], 1))
    beside, alone = save / "iter_0000020", tmp_path / "alone" / "iter_0000001"
    shapes = [{name: tensor.shape for name, tensor in tensors(directory).items()} for directory in (beside, alone)]
    assert shapes[0] == shapes[1] and QuantizerRecord.read(beside) == QuantizerRecord.read(alone)
    saved = saved_arguments(beside)
    assert saved["distill_teacher"] == str(teacher) and saved["distill_identity"]["checkpoint"] == "iter_0000001"


@pytest.mark.slow
def test_what_a_teacher_says_of_ids_that_are_padding_is_not_heard(teacher: Path) -> None:
    """The teacher's checkpoint has 100 rows, and the student's embedding 104."""
    found = []
    for loud in (False, True):
        steps: list[Step] = []

        def watch(step: Step, steps: list[Step] = steps, loud: bool = loud) -> None:
            steps.append(step)
            if loud:
                step.run.teacher._model.bare[0].output_layer.weight[100:] = 1e3

        torch.manual_seed(1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        flags = f"--ternary --train-iters 3 --distill-alpha 0.5 --distill-teacher {teacher}".split()
        pretrain(parse_args([*STUDENT, *flags], 1), on_step=watch)
        found.append([(step.loss, step.divergence, step.grad_norm) for step in steps])
    assert len(found[0]) == 3 and found[0] == found[1]


@pytest.mark.slow
def test_who_is_its_own_teacher_learns_nothing(single_rank: None, tmp_path: Path) -> None:
    start = [*STUDENT, "--bf16", "--train-iters"]
    pretrain(parse_args([*start, "1", "--save", str(tmp_path / "self")], 1))
    steps: list[Step] = []
    weights: list[list[torch.Tensor]] = []

    def watch(step: Step) -> None:
        steps.append(step)
        weights.append([p.detach().clone() for p in step.run.model.bare[0].parameters()])

    again = f"--load {tmp_path}/self --finetune --distill-teacher {tmp_path}/self --weight-decay 0"
    run = pretrain(parse_args([*start, "2", *again.split()], 1), on_step=watch)
    taught = list(run.teacher._model.bare[0].parameters())
    assert all(step.divergence < 1e-6 and step.loss > 1 for step in steps)
    assert all(torch.equal(a, b) for found in weights for a, b in zip(found, taught, strict=True))


@pytest.mark.slow
def test_a_ternary_teacher_teaches_with_its_ternary_weights(single_rank: None, tmp_path: Path) -> None:
    start = [*STUDENT, "--bf16", "--ternary", "--train-iters"]
    pretrain(parse_args([*start, "1", "--save", str(tmp_path / "self")], 1))
    again = f"--load {tmp_path}/self --finetune --distill-teacher {tmp_path}/self"
    steps: list[Step] = []
    run = pretrain(parse_args([*start, "1", *again.split()], 1), on_step=steps.append)
    assert steps[0].divergence < 1e-6 and run.teacher._model.ternary is not None
    plain = [flag for flag in start if flag != "--ternary"]
    with_latents: list[Step] = []
    argv = [*plain, "1", *again.split(), "--allow-quantizer-change"]
    run = pretrain(parse_args(argv, 1), on_step=with_latents.append)
    assert run.model.ternary is None and run.teacher._model.ternary is not None
    assert with_latents[0].divergence > 1e-3


@pytest.mark.slow
def test_another_teacher_is_refused_by_name_where_a_run_goes_on(teacher: Path, tmp_path: Path) -> None:
    run = [*STUDENT, "--ternary", "--train-iters", "2", "--save", str(tmp_path / "save")]
    pretrain(parse_args([*run, "--distill-teacher", str(teacher), "--exit-interval", "1"], 1))
    going_on = f"--train-iters 2 --override-opt-param-scheduler --save {teacher} --load {teacher}"
    pretrain(parse_args([*SHARED, *LARGER, *going_on.split()], 1))
    argv = [*run, "--load", str(tmp_path / "save"), "--distill-teacher", str(teacher)]
    with pytest.raises(CheckpointError, match=r"the teacher .*\(iter_0000001\): .*\(iter_0000002\) is another"):
        pretrain(parse_args(argv, 1))
    pretrain(parse_args([*argv, "--finetune", "--save", str(tmp_path / "other")], 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("--seq-length 32 --max-position-embeddings 32", "knows 16 positions, less than --seq-length 32"),
        ("--vocab-size 99", "was trained with another tokenizer"),
        ("--distill-top-k 100", "--distill-top-k 100 of 100 ids leaves no rest: use fewer"),
    ],
)
def test_who_cannot_teach_is_refused_with_the_reason(teacher: Path, changes: str, said: str) -> None:
    argv = [*STUDENT, "--train-iters", "1", *changes.split(), "--distill-teacher", str(teacher)]
    with pytest.raises(ValueError, match=said):
        pretrain(parse_args(argv, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["", "--distill-top-k 5"])
def test_a_teacher_that_says_no_numbers_ends_the_run(teacher: Path, kept: str) -> None:
    def damage(step: Step) -> None:
        step.run.teacher._model.bare[0].decoder.final_layernorm.weight[0] = torch.nan

    argv = [*STUDENT, "--train-iters", "2", *kept.split(), "--distill-teacher", str(teacher)]
    with pytest.raises(TrainingError, match="the divergence from the teacher is nan: its weights are damaged"):
        pretrain(parse_args(argv, 1), on_step=damage)


@pytest.mark.slow
def test_where_the_likeliest_ids_are_kept_no_logits_stay(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref] = []
    alive: list[int] = []

    def watch(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(weakref.ref(logits))
        alive.append(sum(ref() is not None for ref in seen))
        return likeliest(logits, *others)

    argv = [*STUDENT, "--train-iters", "1", "--distill-top-k", "5", "--distill-teacher", str(teacher)]
    run = pretrain(parse_args(argv, 1))
    monkeypatch.setattr(module, "likeliest", watch)
    batch = {name: torch.arange(16).expand(2, -1) for name in ("tokens", "labels", "position_ids")}
    said = run.teacher.targets([{**batch, "loss_mask": torch.ones(2, 16)}] * 4)
    # The schedule releases an output when it has the next one.
    assert alive == [1, 2, 2, 2] and not any(ref() is not None for ref in seen)
    assert [targets.shape for targets in said] == [(16, 2)] * 4
    for kept in (tensor for targets in said for tensor in (targets.ids, targets.log_probabilities)):
        assert kept.untyped_storage().nbytes() == 4 * 16 * 2 * 5


def test_a_teacher_that_is_not_there_is_refused(single_rank: None, tmp_path: Path) -> None:
    argv = [*STUDENT, "--train-iters", "1", "--distill-teacher", str(tmp_path / "nowhere")]
    with pytest.raises(CheckpointError, match="the teacher .*nowhere: there is no checkpoint"):
        pretrain(parse_args(argv, 1))


@pytest.mark.slow
def test_building_a_teacher_draws_nothing_of_the_students_random_numbers(teacher: Path) -> None:
    """With dropout, a run with a teacher of weight 0 equals the run without a teacher bit for bit."""
    drops = "--hidden-dropout 0.3 --attention-dropout 0.3 --train-iters 3 --ternary".split()
    found = []
    for extra in ([], ["--distill-teacher", str(teacher), "--distill-alpha", "0"]):
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        run = pretrain(parse_args([*STUDENT, *drops, *extra], 1))
        found.append([p.detach().clone() for p in run.model.bare[0].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_flags_of_distillation_need_a_teacher(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_args([*STUDENT, "--train-iters", "1", "--distill-temperature", "2"], 1)
    assert "--distill-temperature needs --distill-teacher" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Tests of what the loop reports to observers about each optimizer step."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from bitcpm_megatron.checkpoints.directory import CheckpointError, check_ends, latest
from bitcpm_megatron.training import loop
from bitcpm_megatron.training.flags import parse_args
from bitcpm_megatron.training.loop import pretrain
from bitcpm_megatron.training.metrics import read_metrics
from bitcpm_megatron.training.run import Step

RUN = """
    --num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-3 --eval-iters 0 --mock-data --vocab-size 100
    --ternary --log-interval 1
""".split()


def test_every_step_is_told_after_it_was_taken(single_rank: None, tmp_path: Path) -> None:
    steps: list[Step] = []
    weights: list[torch.Tensor] = []

    def watch(step: Step) -> None:
        steps.append(step)
        assert step.iteration == step.run.iteration == len(steps)
        assert step.run.consumed_samples == 4 * step.iteration
        weights.append(step.run.model.bare[0].decoder.final_layernorm.weight.detach().clone())

    run = pretrain(parse_args([*RUN, "--log-dir", str(tmp_path)], 1), on_step=watch)
    assert run.iteration == len(steps) == 3 and steps[0].run is run
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], run.model.bare[0].decoder.final_layernorm.weight)
    logged = [(r["iteration"], r["lm_loss"], r["grad_norm"], r["learning_rate"]) for r in read_metrics(tmp_path)]
    assert logged == [(s.iteration, s.loss, s.grad_norm, s.learning_rate) for s in steps]


@pytest.mark.slow
def test_what_a_watcher_raises_ends_the_run_before_anything_of_the_step_is_saved(
    single_rank: None, tmp_path: Path
) -> None:
    def stop(step: Step) -> None:
        if step.iteration == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pretrain(parse_args([*RUN, "--save", str(tmp_path), "--save-interval", "1"], 1), on_step=stop)
    assert latest(tmp_path).name == "iter_0000001"


def test_a_run_without_a_tokenizer_takes_its_checkpoints(tmp_path: Path) -> None:
    args = argparse.Namespace(tokenizer_model=None, tokenizer_type=None)
    recorded = {"tokenizer_model": "run.model", "tokenizer_type": "GPTSentencePieceTokenizer"}
    (tmp_path / "arguments.json").write_text(json.dumps(recorded))
    loop._take_its_tokenizer(args, tmp_path)
    assert vars(args) == recorded
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").touch()
    loop._take_its_tokenizer(args, tmp_path)
    assert vars(args) == {"tokenizer_model": str(tmp_path / "hf"), "tokenizer_type": None}


@pytest.mark.parametrize(("ends", "refused"), [(None, None), (2, None), ([5, 2], None), (7, "7"), ([5, 7], "5 or 7")])
def test_a_tokenizer_ends_documents_as_the_model_ends_texts(tmp_path: Path, ends, refused: str | None) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"eos_token_id": ends}))
    if refused is None:
        check_ends(tmp_path, 2, "t.model")
        return
    with pytest.raises(CheckpointError, match=f"ends texts with token {refused}, and the tokenizer t.model ends .* 2"):
        check_ends(tmp_path, 2, "t.model")

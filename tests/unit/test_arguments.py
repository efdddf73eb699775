# SPDX-License-Identifier: Apache-2.0
"""Tests of the command line: unknown flags are errors, all contradictions are named, defaults follow Megatron-LM."""

from pathlib import Path

import pytest

from bitcpm_megatron.inference import megatron_run
from bitcpm_megatron.training import flags as flags_of_runs
from bitcpm_megatron.training.flags import parse_args

GOOD = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --train-iters 10 --lr 1e-3 --mock-data --vocab-size 100
""".split()


def parse(*more: str, world_size: int = 1, base: list[str] = GOOD):
    return parse_args([*base, *more], world_size)


def refusal(capsys: pytest.CaptureFixture, *more: str, **kwargs) -> str:
    with pytest.raises(SystemExit) as leaving:
        parse(*more, **kwargs)
    assert leaving.value.code == 2
    return capsys.readouterr().err


def test_defaults_that_depend_on_others() -> None:
    args = parse("--swiglu", "--global-batch-size", "8", world_size=2)
    assert (args.data_parallel_size, args.num_microbatches) == (2, 2)
    assert (args.ffn_hidden_size, args.kv_channels, args.num_query_groups, args.lr_decay_iters) == (128, 16, 4, 10)
    assert (parse().ffn_hidden_size, parse().weight_decay) == (256, 0.01)
    assert parse("--num-query-groups", "2").num_query_groups == 4, "as in Megatron-LM: without the GQA flag, no groups"


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        (["--tensor-model-parallel-size", "3"], 3, "3 does not divide 4 attention heads"),
        (["--tensor-model-parallel-size", "8"], 8, "these sizes do: 1, 2, 4"),
        (
            ["--tensor-model-parallel-size", "4", "--ffn-hidden-size", "130"],
            4,
            "130 ffn channels (--ffn-hidden-size); these ",
        ),
        (
            ["--num-attention-heads", "6", "--hidden-size", "96", "--tensor-model-parallel-size", "6", "--swiglu"],
            6,
            "6 does not divide 256 ffn channels (--ffn-hidden-size); these sizes do: 1, 2",
        ),
        (
            [
                "--num-experts",
                "2",
                "--moe-ffn-hidden-size",
                "6",
                "--tensor-model-parallel-size",
                "4",
                "--sequence-parallel",
            ],
            4,
            "4 does not divide 6 ffn channels (--moe-ffn-hidden-size); these sizes do: 1, 2",
        ),
        (["--kv-channels", "7", "--position-embedding-type", "rope"], 1, "heads of 7 channels"),
        (["--log-dir", "/dev/null"], 1, "--log-dir /dev/null: /dev/null is no directory"),
        (["--data-cache-path", "/dev/null/x"], 1, "--data-cache-path /dev/null/x: /dev/null"),
        (["--global-batch-size", "0"], 1, "--global-batch-size: '0': must be 1 to"),
        (["--lr-decay-iters", "0"], 1, "--lr-decay-iters: '0': must be 1 to"),
        (["--kv-channels", "0"], 1, "--kv-channels: '0': must be 1 to"),
        (["--adam-beta1", "2"], 1, "--adam-beta1: '2': must be at least 0 and below 1"),
        (["--adam-eps", "0"], 1, "--adam-eps: '0': must be at least 1e-30"),
        (["--clip-grad", "nan"], 1, "--clip-grad: 'nan': expected a finite number"),
        (["--seed", "-1"], 1, "--seed: '-1': must be 0 to 4294967295"),
        (["--hidden-dropout", "1"], 1, "--hidden-dropout: '1': must be at least 0 and below 1"),
        (["--ternary", "--ternary-group-size", "0"], 1, "--ternary-group-size: '0': must be -1 (one scale per row) or"),
        (["--ternary", "--ternary-group-size", "48"], 1, "'48': must be -1 (one scale per row) or a multiple of 32"),
        (["--tensor-model-parallel-size", "2"], 3, "3 processes cannot be split into groups of 2"),
        (
            ["--tensor-model-parallel-size", "4", "--group-query-attention", "--num-query-groups", "2"],
            4,
            "4 does not divide 2 query groups",
        ),
        (["--sequence-parallel"], 1, "--sequence-parallel needs --tensor-model-parallel-size > 1"),
        (["--pipeline-model-parallel-size", "3"], 3, "--num-layers 4 cannot be split over 3 stages"),
        (["--num-virtual-stages-per-pipeline-rank", "2"], 1, "needs --pipeline-model-parallel-size > 1"),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6".split(),
            2,
            "multiple of 2 micro-batches",
        ),
        (["--overlap-param-gather"], 1, "--overlap-param-gather needs --use-distributed-optimizer"),
        (["--global-batch-size", "3"], 1, "--global-batch-size 3 is not a multiple of --micro-batch-size 2 x 1"),
        (["--seq-length", "64"], 1, "--seq-length 64 exceeds --max-position-embeddings 32"),
        (["--num-attention-heads", "5"], 1, "--hidden-size 64 is not divisible by 5 heads"),
        (["--recompute-granularity", "full"], 1, "--recompute-method go together"),
        (["--recompute-num-layers", "1"], 1, "--recompute-num-layers needs --recompute-method"),
        (["--lr-warmup-iters", "10"], 1, "must be less than the 10 iterations"),
        (["--min-lr", "1"], 1, "--min-lr 1.0 is above --lr 0.001"),
        (["--lr-decay-style", "WSD"], 1, "WSD and --lr-wsd-decay-iters go together"),
        (
            ["--start-weight-decay", "0.1"],
            1,
            "--start-weight-decay does nothing with --weight-decay-incr-style constant",
        ),
        (
            ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1"],
            1,
            "--weight-decay-incr-style linear needs --end-weight-decay",
        ),
        (
            "--weight-decay-incr-style cosine --start-weight-decay 1 --end-weight-decay 0 --weight-decay 0.01".split(),
            1,
            "--weight-decay does nothing with --weight-decay-incr-style cosine",
        ),
        (["--data-path", "x"], 1, "give the data in one way"),
        (["--tokenizer-model", "x"], 1, "--tokenizer-model and --tokenizer-type are for real data"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], 1, "says what --tokenizer-model is: give both"),
        (["--tokenizer-type", "TikTokenizer"], 1, "invalid choice"),
        (["--save-interval", "5"], 1, "--save-interval needs --save"),
        (["--finetune"], 1, "--finetune needs --load"),
        (["--ternary", "--ternary-group-size", "33"], 1, "multiple of 32"),
        (["--ternary", "--ternary-verify-cache", "--ternary-cache", "none"], 1, "nothing to verify"),
        (["--ternary-cache", "none", "--ternary-verify-cache"], 1, "without --ternary would do nothing"),
        (["--ternary-ramp-iters", "5"], 1, "--ternary-ramp-iters without --ternary would do nothing"),
        (["--ternary", "--ternary-ramp-iters", "10"], 1, "--ternary-ramp-iters 10 of --train-iters 10 leaves no step"),
        ("--ternary --ternary-ramp-iters 5 --ternary-cache resident".split(), 1, "the quantized one alone: use step"),
        (
            "--ternary --ternary-ramp-iters 5 --use-distributed-optimizer --ternary-cache packed".split(),
            1,
            "--ternary-cache packed keeps the quantized one alone",
        ),
        (
            "--ternary --ternary-ramp-iters 5 --use-distributed-optimizer --ternary-param-gather packed".split(),
            1,
            "does not go with --ternary-param-gather packed",
        ),
        (
            "--ternary --bf16 --ternary-ramp-iters 5 --ternary-activation-bits 8 --ternary-gemm int8".split(),
            1,
            "does not go with --ternary-gemm int8",
        ),
        (["--distributed-backend", "nccl"], 1, "needs CUDA"),
        (["--eval-interval", "0"], 1, "--eval-interval: '0': must be 1 to"),
        (["--eval-iters", "-1"], 1, "--eval-iters: '-1': must be 0 to"),
        (["--lr", "-1"], 1, "--lr: '-1': must be above 0 and at most 100"),
        (["--moe-router-topk", "2"], 1, "need --num-experts"),
        (["--num-experts", "3", "--expert-model-parallel-size", "2"], 2, "--num-experts 3 does not go with"),
        (["--rotary-base", "500"], 1, "--rotary-base needs --position-embedding-type rope"),
        (["--no-load-optim"], 1, "--no-load-optim needs --load"),
        (["--keep-last-n", "2"], 1, "--keep-last-n needs --save"),
        ("--ternary --ternary-group-size 32 --ternary-row-parallel-shards 2".split(), 1, "does nothing"),
        (["--ternary", "--ternary-telemetry-interval", "5"], 1, "needs --log-dir"),
        (["--train-iters", "0"], 1, "--train-iters: '0': must be 1 to"),
        (["--tensor-model-parallel-size", "0"], 1, "--tensor-model-parallel-size: '0': must be 1 to"),
        (["--save-intervall", "3"], 1, "unknown arguments: --save-intervall: did you mean --save-interval?"),
        (["--train-iter", "3"], 1, "unknown arguments: --train-iter: did you mean --train-iters?"),
        (["--ternary-space", "5-value"], 1, "invalid choice"),
        (["--ternary-backend", "cuda"], 1, "invalid choice"),
    ],
)
def test_contradictions_are_reported_before_anything_starts(capsys, flags, world_size, message) -> None:
    assert message in refusal(capsys, *flags, world_size=world_size)


def test_all_mistakes_are_named_at_once(capsys) -> None:
    said = refusal(capsys, "--sequence-parallel", "--min-lr", "1", "--finetune")
    assert all(flag in said for flag in ("--sequence-parallel", "--min-lr", "--finetune"))


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        (
            [],
            3,
            "3 tensor-parallel ranks do not divide the model's 4 query groups and 256 ffn channels; .* do: 1, 2, 4",
        ),
        (
            ["--ffn-hidden-size", "130"],
            4,
            "4 tensor-parallel ranks do not divide the model's 130 ffn channels; these sizes do: 1, 2",
        ),
    ],
)
def test_generation_names_the_numbers_of_processes_that_fit(
    flags, processes, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flags_of_runs, "saved_arguments", lambda path: vars(parse(*flags)))
    monkeypatch.setattr(megatron_run, "world_size", lambda: processes)
    with pytest.raises(ValueError, match=message):
        megatron_run.load_for_inference(tmp_path)

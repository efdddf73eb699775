# SPDX-License-Identifier: Apache-2.0
"""Cases of arguments that contradict each other or the files."""

from collections.abc import Iterator
from pathlib import Path

from ..commands import COMMANDS
from .case import Case


def requests(world: Path) -> Iterator[Case]:
    """Yields cases of arguments that contradict each other or the files."""
    train = COMMANDS["pretrain"].good
    for more in (
        "--num-attention-heads 3",
        "--hidden-size 65",
        "--seq-length 64",
        "--min-lr 1",
        "--lr-warmup-iters 2",
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--sequence-parallel",
        "--overlap-param-gather",
        "--mock-data",
        "--save-interval 1 --exit-on-missing-checkpoint",
        "--ternary-group-size 48",
        "--ternary-group-size 96",
        "--ternary-row-parallel-shards 3",
        "--ternary-group-size 32 --ternary-row-parallel-shards 2",
        "--moe-router-topk 2",
        "--num-experts 2 --moe-router-topk 3",
        "--recompute-method uniform",
        "--lr-decay-style WSD",
        "--ternary-backend triton-no",
        "--load run --hidden-size 128 --num-attention-heads 4",
        "--load run --seed 7",
        "--load run --ternary-group-size 32",
        "--load run --vocab-size 512",
        "--vocab-size 5",
        "--finetune",
        "--rotary-base 7 --position-embedding-type learned_absolute",
        "--distributed-backend nccl",
        "--load run --adam-beta1 0.5",
        "--load corpus.txt",
        "--global-batch-size 3 --micro-batch-size 2",
    ):
        yield Case("requests", f"pretrain {more}", "pretrain", (*train, *more.split()), status=(2,))
    for command, line in (
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --max-shard-size 0"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --max-shard-size -5GB"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --max-shard-size many"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --hf-architecture GraniteX"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --ternary-group-size 32"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --vocab-size 5"),
        ("convert_megatron_to_hf", "--load-dir run --save-dir out --weights fused --tokenizer nowhere"),
        ("convert_hf_to_megatron", "--load-dir fused --save-dir out --format legacy --target-tensor-parallel-size 3"),
        ("convert_hf_to_megatron", "--load-dir fused --save-dir out --format legacy --target-pipeline-parallel-size 7"),
        ("convert_hf_to_megatron", "--load-dir fused --save-dir out --target-virtual-pipeline-parallel-size 2"),
        ("qat_convert", "--input_bin latent --output out --group_size 48"),
        ("qat_convert", "--input_bin fused --output out"),
        ("qat_convert", "--input_bin latent --output out --quant_type binary"),
        ("generate", "run --prompt fox --temperature nan --tokenizer-model tokenizer.model"),
        ("generate", "run --prompt= --tokenizer-model tokenizer.model"),
        ("presets", "stray"),
        ("run", "no-such-job --print"),
        ("preflight", "no-such-job"),
        ("run", "job.yaml --print --node-rank 5"),
        ("conversion", "--output-dir out --size 0"),
        ("conversion", "--output-dir out --size -1GB"),
        ("conversion", "--output-dir out --size nan"),
        ("conversion", "--output-dir out --size 1e30GB"),
        ("conversion", "--output-dir corpus.txt"),
        ("conversion", "--output-dir out --work-dir nowhere --size 1GB"),
        ("throughput", "--output-dir out --layouts TP0"),
        ("throughput", "--output-dir out --layouts TP-1"),
        ("throughput", "--output-dir out --layouts many"),
        ("throughput", "--output-dir out --layouts DP99999"),
        ("throughput", "--output-dir out --layouts TP3 --model 0.5b-layers --variants bf16"),
        ("throughput", "--output-dir out --variants ternary"),
        ("throughput", "--output-dir out --name ../outside"),
        ("throughput", "--output-dir corpus.txt"),
        ("throughput", "--output-dir out --host megatron-lm --megatron-path nowhere"),
        ("kernel", "--output-dir out --groups 48"),
        ("kernel", "--output-dir out --groups 96 --rounds 1"),
        ("kernel", "--output-dir corpus.txt"),
        ("kernel", "--output-dir out --device npu"),
        ("roofline", "--output-dir corpus.txt"),
        ("roofline", "--output-dir out --validate nowhere.csv"),
        ("roofline", "--output-dir out --validate corpus.txt"),
        ("roofline", "--output-dir out --tp 7"),
        ("demo", "--output corpus.txt"),
        ("demo", "--output corpus.txt/below"),
        ("demo_chat", "--output corpus.txt"),
        ("generate", "run --prompt fox --tokenizer-model tokenizer.model --chat"),
        ("generate", "run --prompt fox --tokenizer-model tokenizer.model --chat-template corpus.txt"),
        ("generate", "run --prompt fox --tokenizer-model tokenizer.model --output corpus.txt/below"),
        ("generate", "nowhere --prompt fox"),
        ("generate", "data --prompt fox"),
        ("generate", "tokenizer.model --prompt fox"),
        ("generate", "fused --prompt fox"),
        ("generate", "run/iter_0000002 --prompt= --tokenizer-model tokenizer.model"),
        ("chat", "run"),
        ("chat", "fused --tokenizer-model tokenizer.model"),
        ("chat", "fused --tokenizer-model chat --chat-template corpus.txt"),
        ("chat", "fused --tokenizer-model chat --tokenizer-type GPTSentencePieceTokenizer"),
        ("chat", "fused --tokenizer-model chat --num-tokens 0"),
        ("bind_cores", ""),
        ("pretrain_gpt", "--megatron-path nowhere"),
        ("pretrain_gpt", "--megatron-path corpus.txt"),
        ("pretrain_gpt", "--script nowhere.py"),
        ("pretrain_gpt", "--script data"),
    ):
        argv = tuple(line.split())
        # A fused directory is accepted and left unchanged, because nothing remains to be done.
        yield Case(
            "requests", f"{command} {line}", command, argv, accepts="--input_bin fused" in line or command == "presets"
        )

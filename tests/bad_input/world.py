# SPDX-License-Identifier: Apache-2.0
"""The world: a directory of small, good inputs (text, tokens, checkpoints, job files), of which cases damage copies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.chat import CHATML, chat_tokenizer

MODEL = """
    --num-layers 1 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --lr 1e-3 --log-interval 1
""".split()
DATA = "--data-path data/corpus_text_document --split 80,20,0 --tokenizer-model tokenizer.model".split()
RECIPE = """
configs:
  coarse: {group_size: -1}
matchers:
  linears: {config: coarse, type: glob, pattern: "*.linear_*", enabled: true}
"""
JOB = """
description: a job of the campaign
model: {preset: tiny-llama, seq-length: 32}
training: {micro-batch-size: 1, global-batch-size: 1, train-iters: 2, lr: 1.0e-3}
data: {data-path: [data/corpus_text_document], tokenizer-model: tokenizer.model, split: "80,20,0"}
ternary: {ternary: true, ternary-recipe: recipe.yaml}
checkpoint: {save: out, save-interval: 1}
cluster: {profile: cpu, nodes: 1, devices-per-node: 1}
"""
# No run of this sweep has started yet.
SWEEP = """
description: a sweep of the campaign
base: job.yaml
grid: {lr: [1.0e-3, 2.0e-3]}
seeds: [1, 2]
last-records: 1
"""


def build(directory: Path, run: Callable[[str, list[str]], None]) -> None:
    """Makes the world with the project's own commands.

    Args:
        directory: the directory to fill, which becomes the working directory of every command.
        run: a function that runs a command there, given its name and arguments, and raises if the command fails.
    """
    directory.mkdir(parents=True)
    words = "the quick brown fox jumps over a lazy dog while seven wizards boil black quartz and mix pale ink".split()
    documents = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(40)) for i in range(60)]
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (directory / "corpus.txt").write_text("\n\f\n".join(documents))
    talks = [[{"role": "user", "content": d[:40]}, {"role": "assistant", "content": d[40:]}] for d in documents]
    (directory / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    chat_tokenizer(directory / "chat", CHATML)
    (directory / "chat.jinja").write_text(CHATML)
    (directory / "recipe.yaml").write_text(RECIPE)
    (directory / "job.yaml").write_text(JOB)
    (directory / "sweep.yaml").write_text(SWEEP)
    (directory / "swept").mkdir()
    line = "--input corpus.jsonl --train-tokenizer tokenizer.model --vocab-size 300 --append-eod"
    run("preprocess_data", [*line.split(), "--output-prefix", "data/corpus"])
    train = [*MODEL, *DATA, "--train-iters", "2", "--eval-iters", "1", "--eval-interval", "2", "--log-dir", "log"]
    run("pretrain", [*train, "--ternary", "--save", "run"])
    targets = "--teacher run --seq-length 32 --micro-batch-size 4 --output targets"
    run("write_targets", [*targets.split(), *DATA])
    export = "--load-dir run --hf-architecture auto"
    run("convert_megatron_to_hf", [*export.split(), "--weights", "latent", "--save-dir", "latent"])
    run("convert_megatron_to_hf", [*export.split(), "--weights", "fused", "--save-dir", "fused"])
    run(
        "convert_megatron_to_hf",
        [*export.split(), "--weights", "fused", "--save-dir", "sharded", "--max-shard-size", "20KB"],
    )
    run("convert_hf_to_megatron", "--load-dir fused --save-dir start".split())
    run("convert_hf_to_megatron", "--load-dir fused --save-dir legacy --format legacy".split())
    weights = load_file(directory / "latent" / "model.safetensors")
    torch.save(weights, directory / "weights.bin")
    preset = directory / "start" / "model.yaml"
    shutil.copy(preset, directory / "preset.yaml")

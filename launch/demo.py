# SPDX-License-Identifier: Apache-2.0
"""The whole path on one small machine: text, tokens, a BF16 and a ternary run, and a packed file that writes text.

    python launch/demo.py [--output DIR] [--train-iters N]

Everything runs on the CPU (or one GPU per process) with tensor parallelism 2, on prose that every CPython contains.
The last line is ``demo: ok`` if every part worked and the ternary validation loss is below the entropy of the token
frequencies of the validation data (the loss of a model that only counts tokens) and at most 10 % above the BF16 loss.
All files stay in the output directory. Exit status: 0 ok, 1 a part failed, 3 a loss is not where it should be.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path.insert(0, str(CHECKOUT))

import numpy as np

from bitcpm_megatron.checkpoints.directory import latest
from bitcpm_megatron.cli import FailedError, MismatchError, Parser, Whole
from bitcpm_megatron.cli import run as handled
from bitcpm_megatron.files import directory_mistake
from bitcpm_megatron.quantization.record import QuantizerRecord
from bitcpm_megatron.training.metrics import plot_losses, read_metrics

TENSOR_PARALLEL = 2
VOCABULARY = 2048
PROMPTS = ("The function returns", "If the argument is", "This module provides")
TOLERANCE = 1.10

MODEL = """
    --num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --seq-length 128 --max-position-embeddings 128
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64
    --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --bf16
    --micro-batch-size 4 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --lr-decay-style WSD
    --lr-wsd-decay-style linear --lr-warmup-iters 10 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --seed 1234
""".split()


def run(title: str, command: list[str], log: Path) -> str:
    """Runs one part of the demo, prints its standard output, writes it to ``log``, and returns it.

    Raises:
        FailedError: if the command does not exit with status 0.
    """
    print(f"\n== {title}\n$ {' '.join(command)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    text = ""
    with subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            text += line
            print(line, end="", flush=True)
    log.write_text(text, encoding="utf-8")
    if process.returncode:
        raise FailedError(f"FAILED: {title}: exit status {process.returncode}; its output is in {log}")
    return text


def prepare(out: Path) -> None:
    """Trains a tokenizer on the corpus and writes the token files for training and for validation."""
    (out / "data").mkdir()
    model = str(out / "tokenizer.model")
    for title, part, tokenizer in (
        ("tokenizer and training data", "train", ["--train-tokenizer", model, "--vocab-size", str(VOCABULARY)]),
        ("validation data", "valid", ["--tokenizer-model", model]),
    ):
        tool = [sys.executable, "launch/preprocess_data.py", "--builtin-corpus", "python-prose", "--append-eod"]
        output = ["--split", part, "--output-prefix", str(out / "data" / part)]
        run(title, [*tool, *output, *tokenizer], out / f"prepare-{part}.log")


def train(out: Path, name: str, iterations: int, flags: list[str]) -> float:
    """Runs one training and returns its last validation loss."""
    directory = out / name
    command = torchrun("launch/pretrain.py") + MODEL + flags
    command += ["--train-iters", str(iterations), "--lr-wsd-decay-iters", str(iterations // 4)]
    command += ["--train-data-path", str(out / "data" / "train_text_document")]
    command += ["--valid-data-path", str(out / "data" / "valid_text_document")]
    command += ["--tokenizer-model", str(out / "tokenizer.model"), "--data-cache-path", str(out / "cache")]
    command += ["--eval-interval", str(max(iterations // 4, 1)), "--eval-iters", "8", "--log-interval", "10"]
    command += ["--save", str(directory / "checkpoint"), "--log-dir", str(directory)]
    run(f"{name} training", command, out / f"{name}.log")
    return [r["lm_loss"] for r in read_metrics(directory) if r["kind"] == "valid"][-1]


def pack(out: Path) -> tuple[int, int]:
    """Exports both runs, the ternary one packed, and samples text from the packed export.

    Returns:
        The sizes of the exported files in bytes: BF16, packed.

    Raises:
        FailedError: if a part fails, or the packed export writes no text.
    """
    tool, tokenizer = [sys.executable, "checkpoint_tools/convert_megatron_to_hf.py"], ["--tokenizer", str(out)]
    arguments = ["--load-dir", str(out / "bf16" / "checkpoint"), "--save-dir", str(out / "bf16-model")]
    run("the BF16 model as a file", [*tool, *arguments, *tokenizer, "--weights", "latent"], out / "bf16-model.log")
    tool, arguments = [sys.executable, "checkpoint_tools/export_packed.py"], ["--format", "compressed-tensors"]
    arguments += ["--load-dir", str(out / "ternary" / "checkpoint"), "--save-dir", str(out / "packed")]
    run("the ternary model as a packed file", [*tool, *arguments, *tokenizer], out / "packed.log")
    tool, arguments = [sys.executable, "launch/generate.py", str(out / "packed")], ["--temperature", "0.7"]
    title, log = "sample from the packed file", out / "packed-sample.txt"
    if not run(title, [*tool, *arguments, "--num-tokens", "40", "--prompt", *PROMPTS], log).strip():
        raise FailedError(f"FAILED: {title}: no text came of it")
    bf16, packed = ((out / name / "model.safetensors").stat().st_size for name in ("bf16-model", "packed"))
    return bf16, packed


def torchrun(script: str) -> list[str]:
    """Returns the command that starts a script in one process per tensor-parallel rank."""
    return [sys.executable, "launch/agent.py", "--standalone", "--nproc_per_node", str(TENSOR_PARALLEL), script]


def unigram_entropy(prefix: Path) -> float:
    """Returns the entropy of the token frequencies of an indexed dataset, in nats."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    counts = np.bincount(np.concatenate([dataset[i] for i in range(len(dataset))]))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def parser_of(description: str | None, name: str, iterations: int, least: int) -> Parser:
    """Returns the command-line parser of a demo: its output directory (default ``runs/NAME``) and its iterations."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHECKOUT / "runs" / name, metavar="DIR")
    told = f"less than {least} is no training"
    parser.add_argument("--train-iters", type=Whole(least, 10**6), default=iterations, help=told)
    return parser


def parsed(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments of a demo; an ``--output`` that cannot be written to is a parser error."""
    args = parser.parse_args(argv)
    mistake = directory_mistake(args.output)
    if mistake is not None:
        parser.error(f"--output {args.output}: {mistake}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo of pretraining; returns the exit status."""
    args = parsed(parser_of(__doc__, "demo", iterations=200, least=50), argv)
    return handled(lambda: _demo(args))


def _demo(args: argparse.Namespace) -> None:
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the demo's last part needs {package}: pip install 'bitcpm_megatron[standalone,hf]'")
    started = time.perf_counter()
    out = args.output.resolve() / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    prepare(out)
    runs = {"BF16": [], "ternary": ["--ternary", "--ternary-telemetry-interval", "20"]}
    losses = {name: train(out, name.lower(), args.train_iters, flags) for name, flags in runs.items()}
    saved = out / "ternary" / "checkpoint"
    command = [*torchrun("launch/generate.py"), str(saved), "--num-tokens", "40", "--temperature", "0.7"]
    sample = run("sample from the ternary weights", [*command, "--prompt", *PROMPTS], out / "sample.txt")
    newest = latest(saved)
    record = None if newest is None else QuantizerRecord.read(newest)
    if record is None or not record.modules or not sample.strip():
        raise FailedError("demo: FAILED: the ternary checkpoint holds no quantizer record, or no text came of it")
    bf16, packed = pack(out)
    entropy = unigram_entropy(out / "data" / "valid_text_document")
    plot_losses({"BF16": out / "bf16", "ternary": out / "ternary"}, out / "loss.png", {"unigram entropy": entropy})
    ratio = losses["ternary"] / losses["BF16"]
    print(f"\n{'run':<22}{'validation loss':>16}{'tokens/s (median)':>20}")
    for name, loss in losses.items():
        speed = np.median([r["tokens_per_second"] for r in read_metrics(out / name.lower()) if r["kind"] == "train"])
        print(f"{name:<22}{loss:>16.4f}{speed:>20.0f}")
    print(f"{'unigram entropy':<22}{entropy:>16.4f}")
    print(f"ternary / BF16 {ratio:.4f}; {len(record.modules)} ternary modules; {time.perf_counter() - started:.0f} s")
    print(f"packed file {packed:,} bytes, {bf16 / packed:.2f} times smaller than BF16's of {bf16:,}")
    print(f"curves: {out / 'loss.png'}; what the quantizer did: {out / 'ternary' / 'ternary.png'}")
    if not losses["ternary"] < entropy or not ratio <= TOLERANCE:
        raise MismatchError("demo: FAILED: the ternary validation loss is not below the entropy, or too far above BF16")
    print("demo: ok")


if __name__ == "__main__":
    sys.exit(main())

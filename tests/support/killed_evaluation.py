# SPDX-License-Identifier: Apache-2.0
"""Kills an evaluation at some of its writes: ``killed_evaluation.py WRITES ASKED -- ARGUMENTS``.

``WRITES`` is a list of numbers, separated by commas. For each of them a process evaluates and is killed in the middle
of that write to its store; finally one evaluates to the end. ``ASKED`` is the file that gets a line for every question
that a model was asked.
"""

import importlib
import os
import signal
import sys
from pathlib import Path


def _evaluate(write: int | None, asked: Path, arguments: list[str]) -> None:
    from lm_eval.models.huggingface import HFLM

    from bitcpm_megatron.evaluation.answers import AnswerStore
    from bitcpm_megatron.launch import evaluate

    log = os.open(asked, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    scored, generated, done = HFLM._loglikelihood_tokens, HFLM.generate_until, AnswerStore._write

    def score(self, requests, **options):
        requests = list(requests)
        os.write(log, "".join(f"{self.title} {one[1:]}\n" for one in requests).encode())
        return scored(self, requests, **options)

    def generate(self, requests, **options):
        os.write(log, "".join(f"{self.title} {one.args!r}\n" for one in requests).encode())
        return generated(self, requests, **options)

    writes = 0

    def keep(self, records):
        nonlocal writes
        writes += 1
        if writes == write:
            done(self, records[: len(records) // 2])
            self._file.write(b'{"key": "a line that is not')
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        done(self, records)

    HFLM._loglikelihood_tokens, HFLM.generate_until, AnswerStore._write = score, generate, keep
    os._exit(evaluate.main(arguments))


def main() -> int:
    # These modules are imported once for all processes below, which are forks.
    for name in (
        *("lm_eval.evaluator", "lm_eval.models.huggingface", "datasets", "matplotlib.figure", "transformers"),
        *("transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers"),
        *(f"bitcpm_megatron.{module}" for module in ("launch.evaluate", "evaluation.opening", "evaluation.running")),
        *("bitcpm_megatron.inference.transformers_model", "bitcpm_megatron.training.initialize"),
    ):
        importlib.import_module(name)

    writes, asked, _, *arguments = sys.argv[1:]
    for write in [*map(int, filter(None, writes.split(","))), None]:
        child = os.fork()
        if child == 0:
            _evaluate(write, Path(asked), arguments)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != (0 if write is None else -signal.SIGKILL):
            print(f"write {write}: status {status}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The output of a run while it trains: a progress bar, lines on standard output, and the records of its log."""

from typing import Any

import torch
from tqdm import tqdm

from .metrics import MetricsLog
from .run import Run, Step

RARE_LEVEL = 0.01
"""The share of the weights below which a level counts as hardly used."""


class RunReport:
    """Reporter of the progress of one run; silent on all ranks except the first."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._speaks = torch.distributed.get_rank() == 0
        self._log = MetricsLog(run.args.log_dir if self._speaks else None, run.iteration)
        self._bar = tqdm(
            total=run.args.train_iters,
            initial=run.iteration,
            unit="it",
            desc="train",
            disable=not self._speaks,
            mininterval=1.0,
        )

    def step(self, step: Step) -> None:
        """Reports a finished optimizer step."""
        args = self._run.args
        tokens = args.global_batch_size * args.seq_length / step.seconds
        self._bar.set_postfix({"loss": f"{step.loss:.3f}", "tok/s": f"{tokens:.0f}"}, refresh=False)
        self._bar.update()
        if step.iteration % args.log_interval == 0 or step.iteration == args.train_iters:
            self._write(
                "train",
                consumed_samples=self._run.consumed_samples,
                lm_loss=step.loss,
                **({} if step.divergence is None else {"distill_loss": step.divergence}),
                grad_norm=step.grad_norm,
                learning_rate=step.learning_rate,
                tokens_per_second=tokens,
                elapsed_ms=step.seconds * 1e3,
            )
            norm = "" if step.grad_norm is None else f"grad norm {step.grad_norm:.3f} | "
            apart = "" if step.divergence is None else f"from the teacher {step.divergence:.4f} | "
            self.say(f"loss {step.loss:.4f} | {apart}{norm}lr {step.learning_rate:.3e} | {tokens:.0f} tokens/s")
        if step.codes is not None:
            modules = {name: statistics for name, statistics in step.codes.items() if name != "total"}
            self._write("ternary", total=step.codes["total"], modules=modules)
            for space, levels in step.codes["total"].get("levels", {}).items():
                for level in (level for level, share in levels.items() if share < RARE_LEVEL):
                    self.say(
                        f"warning: level {level} is used by {100 * levels[level]:.2g} % of the {space} weights: "
                        "another --ternary-scale-multiplier or --ternary-statistic would use it more (docs/spaces.md)"
                    )

    def valid(self, loss: float) -> None:
        """Reports a finished evaluation, whose loss is in nats per token."""
        self._write("valid", consumed_samples=self._run.consumed_samples, lm_loss=loss)
        self.say(f"validation loss {loss:.4f}")

    def say(self, text: str) -> None:
        """Prints a line with the current iteration in front."""
        self.line(f"iteration {self._run.iteration:>7}/{self._run.args.train_iters} | {text}")

    def line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._speaks:
            self._bar.write(text)

    def close(self) -> None:
        """Closes the bar as it stands, and the log, which draws its pictures."""
        self._bar.close()
        self._log.close()

    def _write(self, kind: str, **values: Any) -> None:
        self._log.write({"kind": kind, "iteration": self._run.iteration, **values})

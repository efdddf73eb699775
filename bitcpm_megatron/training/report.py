# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains: a progress bar, lines on standard output, and the records of its log."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import Progress
from .metrics import MetricsLog


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells.

    Attributes:
        loss: mean over the tokens of the global batch, in nats.
        grad_norm: before clipping; None without clipping.
        learning_rate: that the step used.
        seconds: it took.
        codes: telemetry, where it was due (see :class:`~bitcpm_megatron.parallel.Telemetry`).
    """

    loss: float
    grad_norm: float | None
    learning_rate: float
    seconds: float
    codes: Mapping[str, Mapping[str, float | None]] | None


class RunReport:
    """The voice of one run; silent on all ranks but the first.

    Args:
        args: of the run.
        progress: where it starts.
        enabled: whether this rank is the one that speaks.
    """

    def __init__(self, args: argparse.Namespace, progress: Progress, enabled: bool) -> None:
        self._args = args
        self._enabled = enabled
        self._log = MetricsLog(args.log_dir if enabled else None, progress.iteration)
        self._bar = tqdm(
            total=args.train_iters,
            initial=progress.iteration,
            unit="it",
            desc="train",
            disable=not enabled,
            mininterval=1.0,
        )

    def step(self, progress: Progress, result: StepResult) -> None:
        """An optimizer step is done."""
        tokens = self._args.global_batch_size * self._args.seq_length / result.seconds
        self._bar.set_postfix({"loss": f"{result.loss:.3f}", "tok/s": f"{tokens:.0f}"}, refresh=False)
        self._bar.update()
        if progress.iteration % self._args.log_interval == 0 or progress.iteration == self._args.train_iters:
            self._write(
                "train",
                progress,
                consumed_samples=progress.consumed_samples,
                lm_loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                tokens_per_second=tokens,
                elapsed_ms=result.seconds * 1e3,
            )
            norm = "" if result.grad_norm is None else f"grad norm {result.grad_norm:.3f} | "
            rate = f"lr {result.learning_rate:.3e}"
            self._say(progress, f"loss {result.loss:.4f} | {norm}{rate} | {tokens:.0f} tokens/s")
        if result.codes is not None:
            modules = {name: statistics for name, statistics in result.codes.items() if name != "total"}
            self._write("ternary", progress, total=result.codes["total"], modules=modules)

    def valid(self, progress: Progress, loss: float) -> None:
        """An evaluation is done."""
        self._write("valid", progress, consumed_samples=progress.consumed_samples, lm_loss=loss)
        self._say(progress, f"validation loss {loss:.4f}")

    def saving(self, progress: Progress, seconds: float) -> None:
        """A checkpoint is written, or begun with ``--async-save``; training waited so long for it."""
        self._say(progress, f"saving, training waited {seconds:.2f} s")

    def saved(self, paths: Sequence[Path]) -> None:
        """These checkpoints became complete."""
        for path in paths:
            self._line(f"saved {path}")

    def stopped(self, progress: Progress) -> None:
        """The run was asked to stop, and leaves."""
        kept = "the same command goes on from here" if self._args.save else "nothing is kept without --save"
        self._say(progress, f"asked to stop by SIGTERM or SIGUSR1: {kept}")

    def close(self) -> None:
        """Leaves the bar as it stands, and draws the pictures."""
        self._bar.close()
        self._log.close()

    def _write(self, kind: str, progress: Progress, **values: Any) -> None:
        self._log.write({"kind": kind, "iteration": progress.iteration, **values})

    def _say(self, progress: Progress, text: str) -> None:
        self._line(f"iteration {progress.iteration:>7}/{self._args.train_iters} | {text}")

    def _line(self, text: str) -> None:
        if self._enabled:
            self._bar.write(text)

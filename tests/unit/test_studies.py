# SPDX-License-Identifier: Apache-2.0
"""Studies: the runs that they would start, and what they make of losses."""

import json
from pathlib import Path

import int8_quality
import pytest

from bitcpm_megatron.training.flags import parse_args


@pytest.mark.parametrize("kind", int8_quality.KINDS)
def test_runs_differ_in_the_flags_that_are_compared(kind: str, tmp_path: Path) -> None:
    for part in ("train", "valid"):
        for suffix in (".idx", ".bin"):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / f"{part}_text_document{suffix}").touch()
    (tmp_path / "tokenizer.model").touch()
    args, base = (parse_args(int8_quality.Run(name, 7, 2000, tmp_path).command()[2:], 1) for name in (kind, "W1.58A16"))
    changed = {k for k, v in vars(args).items() if v != getattr(base, k)} - {"load", "save", "log_dir"}
    expected = {"W1.58A16": set(), "W1.58A8, bf16 GEMMs": {"ternary_activation_bits"}}
    assert changed == expected.get(kind, {"ternary_activation_bits", "ternary_gemm"})
    assert (args.seed, args.train_iters, args.tensor_model_parallel_size) == (7, 2000, 1)
    assert args.load == args.save, "a run that was stopped would be refused, for it has checkpoints already"


def test_a_gap_is_the_mean_over_seeds_with_students_interval(tmp_path: Path) -> None:
    runs, losses = [], {"W1.58A8, int8 GEMMs": (3.02, 2.98, 3.03), "W1.58A16": (3.0, 3.0, 3.0)}
    for kind, values in losses.items():
        for seed, loss in enumerate(values, start=1):
            run = int8_quality.Run(kind, seed, 50, tmp_path)
            run.directory.mkdir(parents=True)
            lines = [{"kind": "valid", "iteration": i, "lm_loss": loss + (50 - i)} for i in (25, 50)]
            (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            run.carry_out()  # it is over: nothing is started
            runs.append(run)
    found = int8_quality.gap(runs, *losses)
    # Differences 0.02, -0.02, 0.03: deviation 0.02646, and 4.303 / sqrt(3) of it.
    assert found["mean"] == pytest.approx(0.01)
    assert found["high"] - found["mean"] == pytest.approx(0.0657, abs=1e-4)
    assert found["mean"] - found["low"] == pytest.approx(0.0657, abs=1e-4)


@pytest.mark.parametrize("seeds", [["1"], ["1", "1"], [str(s) for s in range(1, 12)]])
def test_seeds_that_no_interval_is_known_for_are_refused(seeds: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as refused:
        int8_quality.main(["--seeds", *seeds])
    assert refused.value.code == 2
    assert "different ones" in capsys.readouterr().err

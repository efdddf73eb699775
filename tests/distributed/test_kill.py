# SPDX-License-Identifier: Apache-2.0
"""A short campaign of kills at random moments; ``make test-kill`` runs a long one."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kill_campaign import campaign


def test_killed_runs_resume_from_a_complete_checkpoint_bit_identically(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    assert campaign(3, 240.0, seed, tmp_path / "campaign") == 3

# SPDX-License-Identifier: Apache-2.0
"""A sample of the campaign of kills, requests to stop and full disks; ``make test-kill`` runs all of it."""

import random
import sys
from pathlib import Path

import pytest
from kills.campaign import Campaign, subjects


@pytest.mark.skipif(sys.platform != "linux", reason="looks for orphans in /proc")
@pytest.mark.parametrize(("what", "kills"), [("train", 3), ("convert", 2), ("preprocess", 2), ("targets", 1)])
@pytest.mark.verifies(
    "trust",
    "a command that is killed, asked to stop, or stopped by a full disk, and then run again, ends with the artifact "
    "of an undisturbed run (`make test-kill`)",
)
def test_what_is_disturbed_ends_with_the_artifact_of_an_undisturbed_run(what: str, kills: int, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    # At most one disturbance of each subject, beginning with SIGKILL: 10 steps leave room for more.
    campaign = Campaign(subjects(what, steps=10), kills, 400.0, seed, tmp_path)
    assert campaign.run(), campaign.faults

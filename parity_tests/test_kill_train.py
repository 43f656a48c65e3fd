"""Training that is killed at random moments comes to the same weights: `scripts/kill-train`, in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def kill_train(*options):
    program = [sys.executable, str(ROOT / "scripts" / "kill-train"), "--once", *options]
    # Threads that wait for each other lose most of their time on a machine that others use.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_killed_run_comes_to_the_same_weights(framework):
    done = kill_train("--kills", "2", "--steps", "60", "--framework", framework)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| kills | 2 |" in done.stdout and "| anything that differed | 0 |" in done.stdout


@pytest.mark.slow
def test_kills_find_a_run_that_loses_its_place_in_the_data():
    done = kill_train("--kills", "3", "--steps", "500", "--framework", "torch", "--plant")
    assert done.returncode == 1 and "differs" in done.stdout, done.stdout + done.stderr

"""The GPU benchmark cannot run here; its rehearsal keeps every section of it in step with the code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def test_every_section_of_the_gpu_check_runs_at_toy_sizes() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--rehearse"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [row for row in rows if row.endswith("| FAIL |")]
    sections = {row.split("|")[1].strip() for row in rows}
    assert {"head right", "attention right", "certificate", "training", "head speed", "attention speed"} <= sections

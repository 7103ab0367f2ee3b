"""SIGKILL anywhere, resume, and not one bit differs. The programs fork their runs, so each is a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, environment

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def run_program(name: str, *arguments: str, seconds: float) -> str:
    """What tests/faults/NAME printed; fails with its output unless it exits 0."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests", "tests/faults"))
    command = [sys.executable, str(HERE / name), *arguments]
    done = subprocess.run(command, env=environment(PYTHONPATH=paths), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def kills(folder: Path, number: int, *arguments: str, seconds: float) -> None:
    """`number` kills or more, at least 30 % of them inside a save."""
    printed = run_program("kills.py", str(folder), "--kills", str(number), *arguments, seconds=seconds)
    print(printed)
    found = json.loads(printed.splitlines()[-1])
    assert found["kills"] >= number
    assert found["in_save"] >= 0.3 * found["kills"]


@pytest.mark.timeout(900)
def test_forty_kills_change_no_bit(tmp_path: Path) -> None:
    kills(tmp_path, 40, seconds=900)


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_two_hundred_kills_over_the_whole_matrix_change_no_bit(tmp_path: Path) -> None:
    kills(tmp_path, 200, "--all", seconds=7200)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_costs_saves_and_not_the_run(tmp_path: Path) -> None:
    assert run_program("storage.py", str(tmp_path), seconds=300).count("as promised") == 4


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
def test_a_save_struck_at_each_of_its_system_calls_is_whole_or_not_there(tmp_path: Path) -> None:
    printed = run_program("syscalls.py", str(tmp_path), seconds=300)
    print(printed)
    assert sum(line.startswith("killed at") for line in printed.splitlines()) == 7
    assert sum("the next save worked" in line for line in printed.splitlines()) == 20

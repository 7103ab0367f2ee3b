"""Checkpoints over real process groups: exact on 1 and 2 ranks and across, errors agreed on, kills never halve one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.launch.job import Job
from sft_dist.launch.local import supervise
from sft_dist.launch.stops import Stops

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def run_ranks(folder: Path, scenario: str, num: int, attempt: int = 1) -> None:
    """Start `num` ranks of checkpoint_ranks.py and show their logs when one fails."""
    command = (sys.executable, str(HERE / "checkpoint_ranks.py"), scenario, str(folder))
    job = Job(command, num, folder, attempt)
    job.attempt_dir.mkdir(parents=True)
    code = supervise(job, Stops()).code
    assert code == 0, "\n".join(job.log_path(rank).read_text() for rank in range(num))


def test_two_ranks_save_agree_fall_back_and_one_rank_reads_it(tmp_path: Path) -> None:
    run_ranks(tmp_path, "all", 2)
    run_ranks(tmp_path, "resharded", 1, attempt=2)


def test_one_rank_saves_and_two_ranks_read_it(tmp_path: Path) -> None:
    run_ranks(tmp_path, "sharded", 1)
    run_ranks(tmp_path, "resharded", 2, attempt=2)


def test_sigkill_at_every_point_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "checkpoint_kills.py"), str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 10, done.stdout

"""A rank that stops or dies in the middle of a real run: found, shown, ended, and the run goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import SECONDS, environment, lines, start, train, trajectory, weights, write_recipe

from sft_dist.launch.job import Job
from sft_dist.launch.local import supervise
from sft_dist.launch.stops import Stops
from sft_dist.observe.report import read_attempts
from sft_dist.resilience.lock import RunLock
from sft_dist.resilience.orphan import ancestors

pytestmark = pytest.mark.slow

CHANGES = {
    "optim": {"max_steps": 60},
    "checkpoint": {"every_steps": 20},
    "eval": {"generate": 0, "every_steps": 60},
    "parallel": {"strategy": "fsdp2"},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("hang")
    train(write_recipe(folder, "straight", **CHANGES), "--nproc", "2")
    return folder / "straight"


def workers_of(launcher: int) -> list[int]:
    """Process ids of its workers, by rank."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    below = [pid for pid in pids if any(above.pid == launcher for above in ancestors(pid))]
    return sorted(below, key=lambda pid: b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())


def strike(run_dir: Path, process: subprocess.Popen[str], number: signal.Signals, step: int) -> list[int]:
    """Send `number` to rank 1 once `step` is in metrics.jsonl; returns the process ids of all workers."""
    deadline = time.monotonic() + SECONDS
    while len(lines(run_dir, "step")) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    pids = workers_of(process.pid)
    assert len(pids) == 2
    os.kill(pids[1], number)
    return pids


def wait_until_dead(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "cause"), [(signal.SIGSTOP, "hang"), (signal.SIGKILL, "rank 1 died of SIGKILL")], ids=["hang", "kill"]
)
def test_the_run_is_started_again_and_ends_with_the_bits_of_the_straight_one(
    straight: Path, number: signal.Signals, cause: str
) -> None:
    recipe = write_recipe(straight.parent, number.name, **CHANGES, resilience={"hang_seconds": 4.0})
    run_dir = straight.parent / number.name
    process = start("train", str(recipe), "--nproc", "2")
    pids = strike(run_dir, process, number, step=25)
    wait_until_dead(pids, seconds=4 + 5 + 10)
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, output

    assert f"attempt 1 ended ({cause}): going on after step 20, restart 1 of 3" in output
    assert trajectory(run_dir) == trajectory(straight)
    assert weights(run_dir) == weights(straight)
    RunLock.acquire(run_dir, wait_seconds=0).release()
    attempts = read_attempts(run_dir, lines(run_dir, "step"))
    assert [attempt["steps"] for attempt in attempts] == ["1 to 20", "21 to 60"]

    if number == signal.SIGSTOP:
        assert "odd one out is rank 1: " in output and "gave no stack" in output
        assert "in train_step" in (run_dir / "logs" / "attempt_0001" / "rank_00000.stacks.txt").read_text()
        assert "71" in attempts[0]["ending"]


# Rank 1 waits for a message that nobody sends while the others are in an all-reduce.
MISMATCH = """
import os, torch, torch.distributed as dist
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.stacks import answer_with_stacks
answer_with_stacks()
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=os.environ["SFT_RENDEZVOUS"], rank=rank, world_size=world)
def reduce_gradients(): dist.all_reduce(torch.zeros(1))
def receive_a_message(): dist.recv(torch.zeros(1), src=0)
for step in range(1, 100):
    heart().beat(step, "train")
    receive_a_message() if (step, rank) == (50, 1) else reduce_gradients()
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Three ranks of MISMATCH."""
    for name, value in environment(OMP_NUM_THREADS="1").items():
        monkeypatch.setenv(name, value)
    job = Job((sys.executable, "-c", MISMATCH), 3, tmp_path, 1)
    job.attempt_dir.mkdir(parents=True)
    yield job


def test_ranks_in_different_collectives_are_told_apart_by_their_stacks(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    with Stops() as stops:
        ending = supervise(job, stops, hang_seconds=3.0)
    assert (ending.code, ending.may_pass) == (71, True)
    err = capfd.readouterr().err
    assert "odd one out is rank 1: step 50, train, at " in err
    assert "ranks 0, 2: step 50, train, at " in err
    assert "receive_a_message" in job.stacks_path(1).read_text()
    assert all("reduce_gradients" in job.stacks_path(rank).read_text() for rank in (0, 2))
    events = [json.loads(line) for line in (job.attempt_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "hang", "end"]
    assert events[-1]["returncodes"] == [-9, -9, -9]

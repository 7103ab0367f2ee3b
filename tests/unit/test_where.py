"""Where each rank is, asked from outside: whatever started it, stuck or stopped, and without harm to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_dist.cli.where import explain
from sft_dist.launch.where import Place, find_ranks

# A rank that does what `sft_dist.train` does first, says where it is, and then waits in a function with a known name.
RANK = """
import os, sys, time
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.stacks import answer_with_stacks
def wait_for_the_others():
    print("ready", flush=True)
    sys.stdin.readline()
if os.environ["KIND"] == "rank":
    answer_with_stacks()
    heart().beat(int(os.environ["STEP"]), "train")
wait_for_the_others()
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs" / "attempt_0001").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def ranks(run_dir: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Rank 0 at step 7, rank 1 at step 6, rank 2 still loading its libraries; and a rank of another run."""
    started = []
    for rank, (kind, step, folder) in enumerate(
        [("rank", 7, run_dir), ("rank", 6, run_dir), ("loading", 0, run_dir), ("rank", 9, f"{run_dir}-other")]
    ):
        environ = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "KIND": kind, "STEP": str(step),
            "SFT_EXIT_CODE_FILE": f"{folder}/logs/exit_code",
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, "sft_dist.train"],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield started
    for process in started:
        process.kill()
        process.communicate()


def functions(place: Place) -> list[str]:
    """The calls without their lines: the first look may come before the one in which the rank waits."""
    return [call.partition(" in ")[2] for call in place.calls]


def test_each_rank_says_where_it_is_and_none_is_harmed(ranks: list[subprocess.Popen[str]], run_dir: Path) -> None:
    places = find_ranks(run_dir)
    assert [(place.rank, place.step, place.phase) for place in places] == [
        (0, 7, "train"),
        (1, 6, "train"),
        (2, 0, "start"),
    ]
    assert [place.pid for place in places] == [process.pid for process in ranks[:3]]
    assert all(any("wait_for_the_others" in call for call in place.calls) for place in places[:2])
    assert places[2].calls == ()  # it would have died of the signal
    assert all(process.poll() is None for process in ranks)
    assert [functions(place) for place in find_ranks(run_dir)] == [functions(place) for place in places]
    lines = explain(places[:2])
    assert lines[0] == "behind: rank 1; the others wait for it"
    assert f"rank 0 on {places[0].host} (process {ranks[0].pid}): step 7, train for" in lines[1]


def test_a_stopped_rank_gives_no_stack_and_goes_on_later(ranks: list[subprocess.Popen[str]], run_dir: Path) -> None:
    ranks[1].send_signal(signal.SIGSTOP)
    places = find_ranks(run_dir)
    assert places[0].calls and places[1].calls == ()
    assert "gives no stack: it is stopped, or stuck in the kernel" in str(places[1])
    ranks[1].send_signal(signal.SIGCONT)
    assert find_ranks(run_dir)[1].calls


def test_a_run_that_is_not_here_has_no_ranks(tmp_path: Path) -> None:
    assert find_ranks(tmp_path) == [] and explain([]) == []

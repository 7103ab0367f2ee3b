"""A run over two nodes that is stuck: both give the same answer, and the odd rank is named whichever node it is on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.launch import hearing
from sft_dist.launch.hearing import Hearing
from sft_dist.launch.job import Job
from sft_dist.launch.nodes import Nodes
from sft_dist.resilience.heartbeat import Beat
from sft_dist.resilience.watchdog import Witness

# Ranks without torch: three wait for the fourth.
RANK = """
import os, threading
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.stacks import answer_with_stacks
answer_with_stacks()
def wait_for_the_others(): threading.Event().wait()
def read_a_dead_disk(): threading.Event().wait()
for step in range(1, 5):
    heart().beat(step, "train")
read_a_dead_disk() if os.environ["RANK"] == "3" else wait_for_the_others()
"""
NODE = """
import sys
from pathlib import Path
from sft_dist.launch.job import Job
from sft_dist.launch.local import Stops, supervise
from sft_dist.launch.nodes import Nodes
job = Job((sys.executable, "-c", sys.argv[1]), 2, Path(sys.argv[2]), 1, Nodes(2, int(sys.argv[3]), "n", 1, "m"))
with Stops() as stops:
    sys.exit(supervise(job, stops, hang_seconds=float(sys.argv[4])).code)
"""


def test_every_node_ends_with_71_and_the_first_names_the_rank_of_the_other(tmp_path: Path) -> None:
    """The first node would be patient for an hour: it hears of the hang from the other."""
    (tmp_path / "logs" / "attempt_0001").mkdir(parents=True)
    command = [sys.executable, "-c", NODE, RANK, str(tmp_path)]
    nodes = [
        subprocess.Popen([*command, str(node), patience], stderr=subprocess.PIPE, text=True)
        for node, patience in enumerate(("3600", "2"))
    ]
    errors = [node.communicate(timeout=60)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [71, 71], errors
    assert "odd one out is rank 3: step 4, train, at " in errors[0] and "ranks 0, 1, 2: step 4" in errors[0]
    assert errors[1] == ""  # said once
    attempt = tmp_path / "logs" / "attempt_0001"
    assert "read_a_dead_disk" in (attempt / "rank_00003.stacks.txt").read_text()
    assert "wait_for_the_others" in (attempt / "rank_00000.stacks.txt").read_text()
    events = [json.loads(line) for line in (attempt / "events.jsonl").read_text().splitlines()]
    assert sorted(event["event"] for event in events) == ["end", "end", "hang", "start", "start"]
    (hang,) = (event for event in events if event["event"] == "hang")
    assert sorted(hang["ranks"]) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("sees_the_disk", [True, False])
def test_a_node_that_says_nothing_is_not_waited_for_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sees_the_disk: bool
) -> None:
    monkeypatch.setattr(hearing, "PATIENCE_SECONDS", 0.2)
    job = Job(("true",), 1, tmp_path, 1, Nodes(2, 1, "n", 1, "m"))
    job.attempt_dir.mkdir(parents=True)
    if not sees_the_disk:
        (job.attempt_dir / "hang").touch()  # where its folder would be
    mine = Witness(1, Beat(4, "train", -9.0, 1), ())
    with Hearing(job) as heard:
        told = heard.hear(7.0, [mine])
    assert (told.silence_seconds, told.witnesses, told.speaker) == (7.0, (mine,), 1)

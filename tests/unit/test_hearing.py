"""A run over two nodes that is stuck: both give the same answer, and the odd rank is named whichever node it is on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sft_dist.launch import hearing, local
from sft_dist.launch.hearing import Hearing, no_word_from
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
from sft_dist.launch.local import supervise
from sft_dist.launch.stops import Stops
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
        heard.call()
        told = heard.hear(7.0, [mine])
    assert (told.silence_seconds, told.witnesses, told.speaker, told.missing) == (7.0, (mine,), 1, (0,))


def test_the_others_are_called_before_the_ranks_of_this_node_have_answered(tmp_path: Path) -> None:
    """Asked one after the other, a stopped rank on each of two nodes would cost more than T + 5 s."""
    first, second = (Hearing(Job(("true",), 1, tmp_path, 1, Nodes(2, node, "n", 1, "m"))) for node in range(2))
    (tmp_path / "logs" / "attempt_0001").mkdir(parents=True)
    with first, second:
        assert not second.is_called
        first.call()
        assert second._called.wait(30)
    assert [path.name for path in (tmp_path / "logs" / "attempt_0001" / "hang").iterdir()] == ["node_00000.called"]


def test_patience_counts_from_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "PATIENCE_SECONDS", 3600.0)
    job = Job(("true",), 1, tmp_path, 1, Nodes(2, 0, "n", 1, "m"))
    job.attempt_dir.mkdir(parents=True)
    with Hearing(job) as heard:
        heard.call()
        heard._began -= 3601.0  # that long the ranks of this node have been asked
        assert heard.hear(7.0, []).missing == (1,)


def test_the_line_says_which_nodes_have_not_told() -> None:
    told = hearing.Testimony(7.0, (Witness(1, Beat(4, "train", -9.0, 1), ()),), 1, (0, 5))
    assert local._hang_line(told).endswith("; no word from nodes 0, 5")
    assert "no word" not in local._hang_line(replace(told, missing=()))
    assert no_word_from([3]) == "no word from node 3"
    assert no_word_from(range(10)) == "no word from nodes 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_a_file_that_is_not_there_is_not_asked_for_and_one_that_was_read_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 nodes that each open 511 files again and again would be millions of calls to the disk that hangs."""
    monkeypatch.setattr(hearing, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(hearing, "_LOOK_SECONDS", 0.01)
    job = Job(("true",), 1, tmp_path, 1, Nodes(4, 0, "n", 1, "m"))
    (job.attempt_dir / "hang").mkdir(parents=True)
    (job.attempt_dir / "hang" / "node_00002.json").write_text(json.dumps(asdict(hearing.Testimony(9.0, (), 2))))
    read, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: (read.append(path.name), read_text(path))[1])
    heard = Hearing(job)
    heard.call()
    told = heard.hear(7.0, [])
    assert read == ["node_00002.json"]
    assert (told.silence_seconds, told.speaker, told.missing) == (9.0, 0, (1, 3))


@pytest.mark.parametrize(("count", "seconds"), [(2, 0.5), (32, 0.5), (512, 8.0)])
def test_many_nodes_look_out_less_often(tmp_path: Path, count: int, seconds: float) -> None:
    assert Hearing(Job(("true",), 1, tmp_path, 1, Nodes(count, 0, "n", 1, "m")))._look_seconds == seconds

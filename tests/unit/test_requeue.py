"""Whether a job starts again, for every way in which one ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.cluster import ClusterSection
from sft_dist.config.loader import dump_recipe, load_recipe, load_resolved
from sft_dist.launch import requeue
from sft_dist.launch.requeue import Ending, excluded, judge

ENVIRON = {"SFT_SUBMISSION": "s", "SLURM_JOB_ID": "7", "SFT_MEETING": "7.0", "SLURM_JOB_NODELIST": "n[1-2]"}


def ending(code: int, step: int = 10, **changes: Any) -> Ending:
    return Ending(
        "s", "7", 0, "n[1-2]", code, changes.pop("near_end", False), changes.pop("ended", False), step, **changes
    )


@pytest.mark.parametrize(
    ("last", "again"),
    [
        (ending(0), False),
        (ending(75), False),  # somebody made RUN_DIR/stop
        (ending(75, near_end=True), True),
        (ending(75, near_end=True, ended=True), False),  # scancel came as well
        (ending(71), True),
        (ending(74), True),
        (ending(1), True),  # a crash without a word
        (ending(137), True),
        (ending(2), False),
        (ending(65), False),
        (ending(70), False),
        (ending(73), False),
        (ending(77), False),  # nobody to leave out
        (ending(77, bad_nodes=("n2",)), True),
        (ending(143, ended=True), False),
        (ending(71, ended=True), False),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again_and_what_was_ended_is_not(last: Ending, again: bool) -> None:
    judged = judge(last, [], max_restarts=3)
    assert judged.again is again and judged.code == last.code and judged.why


def test_crashes_are_bounded_and_time_limits_are_not() -> None:
    crashes = [ending(71, step) for step in (10, 20)]
    assert judge(ending(71, 30), crashes, max_restarts=3).again
    assert not judge(ending(71, 30), crashes, max_restarts=2).again
    limits = [ending(75, step, near_end=True) for step in range(10, 200, 10)]
    assert judge(ending(75, 200, near_end=True), limits, max_restarts=0).again


def test_three_starts_without_a_new_checkpoint_are_enough() -> None:
    stuck = [ending(75, 10, near_end=True)] * 3  # the first of them brought step 10
    assert judge(ending(75, 10, near_end=True), stuck[:2], max_restarts=9).again
    last = judge(ending(75, 10, near_end=True), stuck, max_restarts=9)
    assert (last.code, last.again) == (76, False)
    assert judge(ending(75, 20, near_end=True), stuck, max_restarts=9).again


def test_bad_nodes_add_up_to_the_recipes() -> None:
    found = [ending(77, bad_nodes=("n2",)), ending(77, bad_nodes=("n3", "n2"))]
    assert excluded(ClusterSection(exclude="n9"), found) == "n9,n2,n3"
    assert excluded(ClusterSection(), []) == ""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    settings = ["model.path=gpt2", "data.sources=[{path: x.json}]", f"run.dir={tmp_path}"]
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "recipe.yaml").write_text(dump_recipe(load_recipe([], settings)))
    return tmp_path


def test_a_bad_node_is_left_out_where_that_is_allowed(run_dir: Path) -> None:
    meeting = run_dir / "logs" / "preflight-7.0"
    meeting.mkdir(parents=True)
    (meeting / "bad_nodes").write_text("n2\n")
    assert requeue.end(run_dir, 77, False, False, ENVIRON) == (77, "requeue n2")
    recipe = run_dir / "slurm" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("exclude_bad_nodes: true", "exclude_bad_nodes: false"))
    assert requeue.end(run_dir, 77, False, False, ENVIRON) == (77, "")


def test_later_links_of_a_chain_see_that_it_is_over(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert requeue.begin(run_dir, ENVIRON) == "go"
    requeue.end(run_dir, 75, True, False, ENVIRON)
    assert requeue.begin(run_dir, ENVIRON) == "go"
    requeue.end(run_dir, 65, False, False, ENVIRON)
    assert requeue.begin(run_dir, ENVIRON) == "65"
    assert "would only fail again" in capsys.readouterr().err
    assert requeue.begin(run_dir, ENVIRON | {"SFT_SUBMISSION": "later"}) == "go"
    lines = (run_dir / "slurm" / "endings.jsonl").read_text().splitlines()
    assert [json.loads(line)["code"] for line in lines] == [75, 65]


def test_without_requeue_nothing_is_asked_of_slurm(run_dir: Path) -> None:
    recipe = run_dir / "slurm" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("requeue: true", "requeue: false"))
    assert requeue.end(run_dir, 75, True, False, ENVIRON) == (75, "")


def test_starting_anew_is_obeyed_once_for_each_submission(run_dir: Path) -> None:
    recipe = run_dir / "slurm" / "recipe.yaml"
    mark = run_dir / "logs" / "attempt_0001" / "begun_anew"
    mark.parent.mkdir(parents=True)
    mark.touch()  # of an earlier submission
    os.utime(mark, (1, 1))
    recipe.write_text(recipe.read_text().replace("resume: auto", "resume: never"))
    assert requeue.begin(run_dir, ENVIRON) == "go"
    assert load_resolved(recipe).checkpoint.resume == "never"  # ended before it could put anything aside
    mark.touch()
    assert requeue.begin(run_dir, ENVIRON) == "go"
    assert load_resolved(recipe).checkpoint.resume == "auto"


@pytest.mark.parametrize(
    ("reason", "stop_file", "again"),
    [("the time limit is near", False, True), (None, False, True), (None, True, False), ("SIGUSR1", False, False)],
)
def test_a_run_that_left_in_time_by_itself_goes_on(
    run_dir: Path, reason: str | None, stop_file: bool, again: bool
) -> None:
    attempt = run_dir / "logs" / "attempt_0002"
    attempt.mkdir(parents=True)
    events = [{"event": "start"}, {"event": "stopped", "reason": reason}, {"event": "end", "code": 75}]
    (attempt / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if stop_file:
        (run_dir / "stop").touch()
    code, action = requeue.end(run_dir, 75, False, False, ENVIRON)
    assert code == 75 and action.startswith("requeue") is again

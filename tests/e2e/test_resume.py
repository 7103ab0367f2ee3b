"""Killed anywhere, run again: the trajectory and the final weights are those of the run that was never killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import kill_after, lines, train, trajectory, weights, write_recipe

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "full-replicas-1": ({}, 1),
    "lora-shards-2-dropout": (
        {"tuning": {"method": "lora", "rank": 4, "dropout": 0.1}, "parallel": {"strategy": "fsdp2"}},
        2,
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=CASES.keys())
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, str]:
    """(straight, killed, stopped and continued, what the restart printed) of one case."""
    changes, nproc = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    recipes = {name: write_recipe(folder, name, **changes) for name in ("straight", "killed", "stopped")}
    train(recipes["straight"], "--nproc", str(nproc))
    kill_after(recipes["killed"], folder / "killed", step=5, nproc=nproc)
    printed = train(recipes["killed"], "--nproc", str(nproc))
    train(recipes["stopped"], "optim.stop_after_step=4", "--nproc", str(nproc), code=75)
    train(recipes["stopped"], "--nproc", str(nproc))
    return folder / "straight", folder / "killed", folder / "stopped", printed


def test_killed_run_continues_bit_identically(runs: tuple[Path, Path, Path, str]) -> None:
    straight, killed, _, _ = runs
    assert len(trajectory(straight)) == 12
    assert trajectory(killed) == trajectory(straight)
    assert weights(killed) == weights(straight)


def test_stopped_run_continues_bit_identically(runs: tuple[Path, Path, Path, str]) -> None:
    straight, _, stopped, _ = runs
    assert trajectory(stopped) == trajectory(straight)
    assert weights(stopped) == weights(straight)


def test_restart_says_where_it_continues_and_keeps_what_it_rolled_back(runs: tuple[Path, Path, Path, str]) -> None:
    _, killed, _, printed = runs
    assert "resuming after step 3" in printed
    rolled = [json.loads(line) for line in (killed / "logs/attempt_0002/rolled_back.jsonl").read_text().splitlines()]
    assert [record["step"] for record in rolled if record["kind"] == "step"][:2] == [4, 5]
    assert {record["attempt"] for record in lines(killed, "step")} == {1, 2}


def test_evaluations_are_those_of_the_straight_run(runs: tuple[Path, Path, Path, str]) -> None:
    straight, killed, stopped, _ = runs
    expected = [(record["step"], record["eval_loss"]) for record in lines(straight, "eval")]
    assert [step for step, _ in expected] == [0, 6, 12]
    for run_dir in (killed, stopped):
        assert [(record["step"], record["eval_loss"]) for record in lines(run_dir, "eval")] == expected

"""Looking at a run changes nothing: its bits are the same with evaluations, answers and trackers and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import lines, train, trajectory, weights, write_recipe

pytestmark = pytest.mark.slow

WATCHED: dict[str, Any] = {
    "eval": {"every_steps": 2, "generate": 2, "exact_match": 2, "max_new_tokens": 4},
    "log": {"every_steps": 1, "trackers": ["tensorboard"]},
}
UNWATCHED: dict[str, Any] = {"eval": {"every_steps": 99, "generate": 0}, "log": {"every_steps": 99}}
DROPOUT: dict[str, Any] = {"tuning": {"method": "lora", "rank": 3, "dropout": 0.2}, "optim": {"max_steps": 6}}


def test_switching_evaluation_and_logging_changes_no_bit_of_training(tmp_path: Path) -> None:
    """With dropout: an evaluation that drew from the generator of training, or left it elsewhere, would show."""
    watched, unwatched = (
        write_recipe(tmp_path, name, **DROPOUT, **changes)
        for name, changes in (("watched", WATCHED), ("unwatched", UNWATCHED))
    )
    train(watched)
    train(unwatched)
    run, silent = tmp_path / "watched", tmp_path / "unwatched"
    assert len(lines(run, "eval")) == 4 and len(lines(silent, "eval")) == 2  # before, and after the last step
    assert len(trajectory(run)) == 6
    assert trajectory(run) == trajectory(silent)
    assert weights(run) == weights(silent)

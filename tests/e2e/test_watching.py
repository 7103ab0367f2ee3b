"""What changes no bit of a run on a CPU: evaluations, answers and trackers; asking for deterministic kernels."""

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
    run, silent, deterministic = (tmp_path / name for name in ("watched", "unwatched", "deterministic"))
    train(write_recipe(tmp_path, run.name, **DROPOUT, **WATCHED))
    train(write_recipe(tmp_path, silent.name, **DROPOUT, **UNWATCHED))
    train(write_recipe(tmp_path, deterministic.name, **DROPOUT, **UNWATCHED, run={"deterministic": True}))
    assert len(lines(run, "eval")) == 4 and len(lines(silent, "eval")) == 2  # before, and after the last step
    assert len(trajectory(run)) == 6
    assert trajectory(run) == trajectory(silent) == trajectory(deterministic)
    assert weights(run) == weights(silent) == weights(deterministic)

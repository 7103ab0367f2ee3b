"""metrics.jsonl: floats read back equal, a resume rolls back, early stopping reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from sft_dist.config.schema import Recipe
from sft_dist.observe.metrics import MetricsLog, best_step, read_metrics, rises, roll_back
from sft_dist.observe.run_files import read_lines
from sft_dist.observe.trackers import Trackers
from sft_dist.types import StepMetrics

RECIPE = Recipe.model_validate({"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}})


def step(number: int, loss: float = 0.1) -> StepMetrics:
    return StepMetrics(number, 1, loss, 1 / 3, 1e-5, 10, 4, "ab", 0.5, 20.0, None, 0.1)


def write(run_dir: Path, last: int) -> None:
    log = MetricsLog(run_dir, Trackers(run_dir, RECIPE, print))
    log.evaluation(0, 3.0, 7)
    for number in range(1, last + 1):
        log.step(step(number, loss=math.pi / number))
        if number % 2 == 0:
            log.evaluation(number, 1 / number, 7)
    log.close()


def test_floats_read_back_equal(tmp_path: Path) -> None:
    write(tmp_path, 3)
    assert [line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "step"] == [
        math.pi / n for n in (1, 2, 3)
    ]


def test_an_interrupted_last_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert len(read_metrics(tmp_path)) == 2


def test_pages_that_a_power_cut_has_lost_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 3)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    start = whole.index(b'"step": 1')
    (tmp_path / "metrics.jsonl").write_bytes(whole[:start] + bytes(20) + whole[start + 20 :])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 2, 3]


def test_a_line_appended_behind_a_lost_page_counts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bytes(40) + b'{"a": 2}\n{"b": {"a"' + bytes(9) + b'"c": 3}}\n{"a": 4}\n')
    assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_roll_back_keeps_the_lines_up_to_the_step_and_moves_the_rest(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in (0, 2, 4)))
    assert roll_back(tmp_path, 3, tmp_path) == 3
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 2, 3]
    assert len((tmp_path / "rolled_back.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def test_from_step_0_everything_is_measured_again(tmp_path: Path) -> None:
    write(tmp_path, 2)
    roll_back(tmp_path, 0, tmp_path)
    assert read_metrics(tmp_path) == []


def test_rises_after_patience_evaluations_without_a_better_one() -> None:
    assert not rises([3.0, 2.0, 1.0], 2)
    assert not rises([3.0, 1.0, 2.0], 2)
    assert rises([3.0, 1.0, 2.0, 1.5], 2)
    assert not rises([1.0], 2)


def test_best_step_ignores_the_untrained_model_and_infinities() -> None:
    losses = [(0, 0.1), (2, 0.5), (4, 0.4), (6, math.inf), (8, 0.6)]
    assert best_step({"kind": "eval", "step": n, "eval_loss": loss} for n, loss in losses) == 4
    assert best_step([]) is None

"""Stopping before the job's end, on a clock that the test turns."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from sft_dist.config.schema import ResilienceSection
from sft_dist.errors import ConfigError
from sft_dist.resilience.time_limit import TimeLimit, end_time

NOW = 1_800_000_000.0


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 50.0

    def __call__(self) -> float:
        return self.seconds


def walk(limit: TimeLimit, clock: Clock, phases: list[tuple[str, float]]) -> None:
    for phase, seconds in phases:
        limit.enter(phase)
        clock.seconds += seconds


STEP = [("data", 1.0), ("train", 9.0)]


def test_without_an_end_it_is_never_near() -> None:
    clock = Clock()
    limit = TimeLimit(None, 90.0, clock=clock)
    walk(limit, clock, STEP * 100)
    assert not limit.is_near


def test_it_is_near_when_two_steps_two_saves_and_the_margin_no_longer_fit() -> None:
    clock = Clock()
    limit = TimeLimit(NOW + 1000, 90.0, wall=lambda: NOW, clock=clock)
    walk(limit, clock, [*STEP, *STEP, ("save", 30.0), *STEP, ("evaluate", 5.0), ("data", 0.0)])
    spent = 10 + 10 + 30 + 10 + 5
    needed = 2 * 30 + 2 * 10 + 5 + 90
    clock.seconds += 1000 - spent - needed - 0.5
    assert not limit.is_near
    clock.seconds += 1.0
    assert limit.is_near


@pytest.mark.parametrize(("left", "margin"), [(36000.0, 90.0), (900.0, 90.0), (60.0, 6.0)])
def test_the_margin_is_ninety_seconds_or_a_tenth_of_a_short_job(left: float, margin: float) -> None:
    clock = Clock()
    limit = TimeLimit(NOW + left, "auto", wall=lambda: NOW, clock=clock)
    clock.seconds += left - margin - 0.01
    assert not limit.is_near
    clock.seconds += 0.02
    assert limit.is_near


def test_the_first_step_in_which_kernels_are_compiled_does_not_count() -> None:
    clock = Clock()
    limit = TimeLimit(NOW + 1000, 0.0, wall=lambda: NOW, clock=clock)
    walk(limit, clock, [("data", 1.0), ("train", 600.0), *STEP, ("data", 0.0)])
    assert not limit.is_near
    clock.seconds = 50.0 + 1000 - 20 + 0.5
    assert limit.is_near


def test_a_save_that_the_loop_does_not_wait_for_counts_whole() -> None:
    clock = Clock()
    limit = TimeLimit(NOW + 1000, 0.0, wall=lambda: NOW, clock=clock)
    walk(limit, clock, [*STEP, *STEP, ("save", 1.0), ("data", 0.0)])
    limit.learn("save", 400.0)
    clock.seconds += 1000 - 21 - 2 * 400 - 2 * 10 + 0.5
    assert limit.is_near


def test_a_clock_that_jumps_later_changes_nothing() -> None:
    clock, wall = Clock(), iter([NOW, NOW + 1e6])
    limit = TimeLimit(NOW + 1000, 0.0, wall=lambda: next(wall), clock=clock)
    assert not limit.is_near
    clock.seconds += 1001
    assert limit.is_near


def test_the_end_comes_from_the_recipe_or_from_slurm() -> None:
    slurm = {"SLURM_JOB_END_TIME": "1800000000"}
    assert end_time("auto", slurm) == NOW
    assert end_time("auto", {"SLURM_JOB_END_TIME": "0"}) is None
    assert end_time("auto", {}) is None
    assert end_time("none", slurm) is None
    assert end_time(5.5, slurm) == 5.5
    assert end_time(datetime.fromtimestamp(NOW, UTC).isoformat(), {}) == NOW
    with pytest.raises(ConfigError, match=r"SLURM_JOB_END_TIME=soon.*resilience\.end_time"):
        end_time("auto", {"SLURM_JOB_END_TIME": "soon"})


@pytest.mark.parametrize("value", ["tomorrow", "25:00", ""])
def test_other_words_are_refused_with_an_example(value: str) -> None:
    with pytest.raises(ValidationError, match="2026-01-31T18:00:00"):
        ResilienceSection(end_time=value)


@pytest.mark.parametrize("value", ["auto", "none", 1.8e9, 1800000000, "2026-01-31T18:00:00", "2026-01-31T18:00+02:00"])
def test_these_are_taken(value: object) -> None:
    ResilienceSection(end_time=value)  # type: ignore[arg-type]

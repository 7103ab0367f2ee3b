"""Saves by the clock: not more than 2 % of the time, and no more than half an hour of work is lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from sft_dist.resilience.unsaved import LONGEST_SECONDS, SHORTEST_SECONDS, Unsaved


def run(step_seconds: Sequence[float], save_seconds: float) -> tuple[list[float], float]:
    """(seconds between the beginnings of two saves, the most that a crash at any moment would have lost) of a loop over
    such steps, which saves in the background: what a step finds written at its start is committed at its end."""
    now, begun, committed, under_way, most = 0.0, [0.0], 0.0, False, 0.0
    unsaved = Unsaved(lambda: now)
    for seconds in step_seconds:
        is_due, is_written = unsaved.is_due(save_seconds), now >= begun[-1] + save_seconds
        now += seconds
        most = max(most, now - committed)
        if under_way and (is_written or is_due):
            now = max(now, begun[-1] + save_seconds)
            most, committed, under_way = max(most, now - committed), begun[-1], False
        if is_due:
            unsaved.begin_anew()
            begun.append(now)
            under_way = True
    return [later - sooner for sooner, later in pairwise(begun)], most


def over(seconds: float) -> list[float]:
    return [seconds] * int(5 * LONGEST_SECONDS / seconds)


@pytest.mark.parametrize("seconds", [0.01, 10.0, 200.0])
def test_a_quick_save_comes_every_ten_minutes(seconds: float) -> None:
    intervals, lost = run(over(seconds), 1.0)
    assert all(SHORTEST_SECONDS - 1e-6 <= interval <= SHORTEST_SECONDS + seconds + 1e-6 for interval in intervals[1:])
    assert SHORTEST_SECONDS - 1e-6 <= intervals[0] <= SHORTEST_SECONDS + 2 * seconds + 1e-6  # none has shown its length
    assert len(intervals) >= 10 and lost <= LONGEST_SECONDS


@pytest.mark.parametrize("save_seconds", [12.0, 13.0, 20.0, 30.0])
@pytest.mark.parametrize("seconds", [1.0, 47.0])
def test_saves_take_at_most_a_fiftieth_of_the_time(seconds: float, save_seconds: float) -> None:
    intervals, lost = run(over(seconds), save_seconds)
    assert min(intervals) >= 50 * save_seconds - 1e-6 and lost <= LONGEST_SECONDS + 1e-6


@pytest.mark.parametrize("seconds", [0.5, 10.0, 100.0, 300.0, 400.0])
@pytest.mark.parametrize("save_seconds", [0.1, 36.0, 100.0, 500.0])
def test_no_crash_loses_more_than_half_an_hour(seconds: float, save_seconds: float) -> None:
    lost = run(over(seconds), save_seconds)[1]
    assert lost <= max(LONGEST_SECONDS, 4 * seconds + save_seconds) + 1e-6
    assert save_seconds < 36 or lost > LONGEST_SECONDS - 4 * seconds  # and none is begun without need


@pytest.mark.parametrize(
    "steps",
    [[1200.0] * 20, [1790.0] * 20, [2000.0] * 20, [60.0 + 20 * n for n in range(60)], [5.0] * 300 + [1700.0] * 3],
    ids=["1200", "1790", "2000", "growing", "suddenly long"],
)
@pytest.mark.parametrize("save_seconds", [1.0, 100.0])
def test_long_and_growing_steps_exceed_it_by_a_few_at_most(steps: list[float], save_seconds: float) -> None:
    assert run(steps, save_seconds)[1] <= LONGEST_SECONDS + 3 * max(steps) + save_seconds


def test_steps_as_long_as_the_limit_are_each_saved() -> None:
    assert set(run([1790.0] * 5, 1.0)[0][1:]) == {1790.0}


def test_saves_that_take_longer_than_there_is_time_are_not_begun_all_the_time() -> None:
    assert min(run(over(10.0), 3600.0)[0]) > LONGEST_SECONDS / 3


def test_one_that_does_not_ask_is_never_due() -> None:
    now = 0.0
    silent, asking = Unsaved(lambda: now, asks=False), Unsaved(lambda: now)
    now = 10 * LONGEST_SECONDS
    assert asking.is_due(1.0) and not silent.is_due(1.0)

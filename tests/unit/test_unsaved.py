"""Saves by the clock: not more than 2 % of the time, and no more than half an hour of work unsaved."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sft_dist.resilience.unsaved import LONGEST_SECONDS, SHORTEST_SECONDS, Unsaved


def intervals(step_seconds: Sequence[float], save_seconds: float = 1.0) -> list[float]:
    """Seconds between two saves, and from the last one to the end, of a loop over such steps."""
    now, saves = 0.0, [0.0]
    unsaved = Unsaved(lambda: now)
    for seconds in step_seconds:
        is_due = unsaved.is_due(save_seconds)
        now += seconds
        if is_due:
            unsaved.begin_anew()
            saves.append(now)
    return [later - sooner for sooner, later in zip(saves, [*saves[1:], now], strict=True)]


def over(seconds: float) -> list[float]:
    return [seconds] * int(4 * LONGEST_SECONDS / seconds)


@pytest.mark.parametrize("seconds", [0.01, 10.0, 300.0])
def test_a_quick_save_comes_every_ten_minutes(seconds: float) -> None:
    found = intervals(over(seconds))
    assert all(SHORTEST_SECONDS - 1e-6 <= interval <= SHORTEST_SECONDS + seconds + 1e-6 for interval in found[1:-1])
    assert SHORTEST_SECONDS - 1e-6 <= found[0] <= SHORTEST_SECONDS + 2 * seconds + 1e-6  # no step has shown its length
    assert len(found) >= 10


@pytest.mark.parametrize("save_seconds", [12.0, 13.0, 20.0, 30.0, 36.0])
@pytest.mark.parametrize("seconds", [1.0, 47.0])
def test_saves_take_at_most_a_fiftieth_of_the_time(seconds: float, save_seconds: float) -> None:
    found = intervals(over(seconds), save_seconds)
    slack = 1e-6 if 50 * save_seconds < LONGEST_SECONDS - seconds else 2 * seconds  # half an hour comes first
    assert min(found[:-1]) >= 50 * save_seconds - slack and max(found) <= LONGEST_SECONDS + 1e-6


@pytest.mark.parametrize("seconds", [0.5, 10.0, 300.0, 599.0, 900.0])
def test_a_slow_save_comes_before_half_an_hour_is_over(seconds: float) -> None:
    found = intervals(over(seconds), save_seconds=1e6)
    assert LONGEST_SECONDS - 2 * seconds < max(found) <= LONGEST_SECONDS + 1e-6


@pytest.mark.parametrize(
    "steps",
    [[1200.0] * 20, [1790.0] * 20, [2000.0] * 20, [60.0 + 20 * n for n in range(60)], [5.0] * 300 + [1700.0] * 3],
    ids=["1200", "1790", "2000", "growing", "suddenly long"],
)
@pytest.mark.parametrize("save_seconds", [1.0, 100.0])
def test_long_and_growing_steps_exceed_it_by_two_at_most(steps: list[float], save_seconds: float) -> None:
    assert max(intervals(steps, save_seconds)) <= LONGEST_SECONDS + 2 * max(steps)


def test_steps_as_long_as_the_limit_are_each_saved() -> None:
    assert intervals([1790.0] * 5)[1:-1] == [1790.0] * 3

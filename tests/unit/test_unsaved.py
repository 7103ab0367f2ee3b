"""No more than half an hour of work is unsaved, or two steps where they are longer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sft_dist.resilience.unsaved import Unsaved

LIMIT = 1800.0


def longest_unsaved(step_seconds: Sequence[float]) -> float:
    """Seconds between two saves, or from the last save to the end, of a loop over such steps."""
    now, saves = 0.0, [0.0]
    unsaved = Unsaved(LIMIT, lambda: now)
    for seconds in step_seconds:
        is_due = unsaved.is_due()
        now += seconds
        if is_due:
            unsaved.begin_anew()
            saves.append(now)
    return max(later - sooner for sooner, later in zip(saves, [*saves[1:], now], strict=True))


@pytest.mark.parametrize("seconds", [0.01, 10.0, 300.0, 599.0, 900.0])
def test_steps_of_one_length_keep_the_limit(seconds: float) -> None:
    found = longest_unsaved([seconds] * int(3 * LIMIT / seconds))
    assert LIMIT - 2 * seconds < found <= LIMIT + 1e-6


@pytest.mark.parametrize(
    "steps",
    [[1200.0] * 20, [1790.0] * 20, [2000.0] * 20, [60.0 + 20 * n for n in range(60)], [5.0] * 300 + [1700.0] * 3],
    ids=["1200", "1790", "2000", "growing", "suddenly long"],
)
def test_long_and_growing_steps_exceed_it_by_two_at_most(steps: list[float]) -> None:
    assert longest_unsaved(steps) <= LIMIT + 2 * max(steps)


def test_steps_as_long_as_the_limit_are_each_saved() -> None:
    now = 0.0
    unsaved = Unsaved(LIMIT, lambda: now)
    assert not unsaved.is_due()
    now = 1790.0
    assert unsaved.is_due()
    unsaved.begin_anew()
    now += 1790.0
    assert unsaved.is_due()

"""A loss far above the last ones stands out; the usual fall, noise and one earlier spike do not hide or fake it."""

from __future__ import annotations

import math
import random

import pytest

from sft_dist.observe.spikes import LEAST_STEPS, Spikes


def noisy(number: int, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [2.0 + 0.1 * source.gauss(0, 1) for _ in range(number)]


def test_noise_is_no_spike() -> None:
    for seed in range(20):
        spikes = Spikes()
        assert not any(spikes.see(loss) for loss in noisy(400, seed))


@pytest.mark.parametrize("number", [LEAST_STEPS, 200, 1000])
def test_a_jump_is_one(number: int) -> None:
    spikes = Spikes(noisy(number))
    limit = spikes.see(4.0)
    assert limit is not None and 2.3 < limit < 3.6


def test_an_earlier_spike_hides_no_later_one() -> None:
    spikes = Spikes(noisy(100))
    assert spikes.see(1e6) and spikes.see(4.0)


def test_too_few_steps_tell_nothing() -> None:
    assert Spikes(noisy(LEAST_STEPS - 1)).see(1e9) is None


def test_a_falling_loss_and_equal_losses_are_none() -> None:
    falling = Spikes()
    assert not any(falling.see(5.0 * math.exp(-step / 50)) for step in range(300))
    equal = Spikes([1.0] * 50)
    assert equal.see(1.0 + 1e-6) is None and equal.see(1.1)


def test_what_is_no_number_is_left_out() -> None:
    spikes = Spikes(noisy(50))
    assert spikes.see(math.nan) is None and spikes.see(math.inf) is None and spikes.see(2.0) is None

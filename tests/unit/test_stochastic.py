"""Stochastic rounding: unbiased, a function of (seed, step, tensor, element), and worth having."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sft_dist.config.schema import OptimSection, PrecisionSection
from sft_dist.optim import build_optimizer, set_step
from sft_dist.optim.stochastic import hashed_bits, round_stochastically

CPU = torch.device("cpu")
DRAWS = 400_000


@pytest.mark.parametrize("value", [1.0 + 2**-9, 1.0 + 2**-8 / 3, -3.14159, 1e-20, 6.1e30, 2.0 - 2**-12])
def test_the_mean_is_the_value(value: float) -> None:
    """Within four standard errors; both neighbours are met, in their proportion."""
    rounded = round_stochastically(torch.full((DRAWS,), value), seed=12345).double()
    low, high = rounded.min().item(), rounded.max().item()
    exact = torch.tensor(value).double().item()
    assert low <= exact <= high
    assert torch.tensor(high).bfloat16() == high and len(rounded.unique()) == 2
    assert abs(rounded.mean().item() - exact) < 4 * (high - low) / 2 / math.sqrt(DRAWS)
    share = (exact - low) / (high - low)
    assert abs((rounded == high).double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / DRAWS) + 1e-12


def test_what_bfloat16_holds_is_never_moved() -> None:
    exact = torch.randn(10_000).bfloat16()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf]).bfloat16()
    for values in (exact, special):
        assert torch.equal(round_stochastically(values.float(), seed=3), values)


def test_bits_are_even_and_differ_by_seed_and_place() -> None:
    bits = hashed_bits(1 << 18, seed=0, offset=0, device=CPU)
    for shift in range(32):
        assert abs((bits >> shift & 1).double().mean().item() - 0.5) < 0.005, shift
    low = bits & 0xFFFF
    for other in (hashed_bits(1 << 18, 1, 0, CPU), hashed_bits(1 << 18, 1 << 40, 0, CPU), bits.roll(1)):
        together = torch.stack([low.double(), (other & 0xFFFF).double()])
        assert abs(torch.corrcoef(together)[0, 1].item()) < 0.01
    assert torch.equal(hashed_bits(100, 5, 1000, CPU), hashed_bits(1100, 5, 0, CPU)[1000:])
    assert not torch.equal(hashed_bits(100, 5, 1 << 32, CPU), hashed_bits(100, 5, 0, CPU))


def test_a_piece_is_rounded_as_in_the_whole() -> None:
    values = torch.randn(6, 50)
    whole = round_stochastically(values, seed=9)
    assert torch.equal(whole[4:], round_stochastically(values[4:], seed=9, offset=200))


def run(rounded: bool, steps: int, resume_at: int | None = None) -> torch.Tensor:
    """Weights of 1 pulled down by 2e-5 a step: each update is a hundredth of what bfloat16 resolves there."""
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))

    def made() -> torch.optim.Optimizer:
        optimizer = build_optimizer({"w": weight}, OptimSection(), 2e-5, rounding_seed=1 if rounded else None)
        optimizer.allocate([weight])
        return optimizer

    optimizer = made()
    for step in range(steps):
        if step == resume_at:
            kept, optimizer = optimizer.state[weight], made()
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][key].copy_(kept[key])
            set_step(optimizer, step)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


def test_small_updates_arrive_on_average_where_rounding_to_nearest_loses_them() -> None:
    assert torch.equal(run(rounded=False, steps=100), torch.ones(4096, dtype=torch.bfloat16))
    moved = 1 - run(rounded=True, steps=100).double().mean().item()
    assert moved == pytest.approx(100 * 2e-5, rel=0.15)


def test_a_resume_repeats_every_draw() -> None:
    assert torch.equal(run(rounded=True, steps=20), run(rounded=True, steps=20, resume_at=7))


def test_masters_that_lose_nothing_need_no_rounding() -> None:
    with pytest.raises(ValueError, match=r"stochastic_rounding needs precision\.master=bfloat16"):
        PrecisionSection(stochastic_rounding=True)

"""Moments in 8 bits: the rounding is as fine as promised, independent of sharding, and trains like fp32 moments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sft_dist.config.schema import OptimSection
from sft_dist.optim import build_optimizer
from sft_dist.optim.adamw8bit import BLOCK, decode, dynamic_levels, encode


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_the_256_of_the_paper(signed: bool) -> None:
    levels = dynamic_levels(signed)
    assert len(levels) == len(levels.unique()) == 256
    assert levels[-1] == 1.0 and 0.0 in levels
    assert levels[0] == pytest.approx(-0.993, abs=1e-3) if signed else levels[0] == 0.0
    assert levels[levels > 0].min() < 1e-6


def matrix(rows: int, columns: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) * torch.logspace(-3, 0, rows)[:, None]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(8, 1024), (5, 300), (3, 7)])
def test_rounding_is_within_half_a_level(signed: bool, shape: tuple[int, int]) -> None:
    values = matrix(*shape) if signed else matrix(*shape).square()
    codes, scales = encode(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    assert scales.shape == (shape[0], -(-shape[1] // BLOCK))
    found = decode(codes, scales, signed)
    largest = scales.repeat_interleave(BLOCK, dim=1)[:, : shape[1]]
    gap = dynamic_levels(signed).diff().max().item()
    assert ((found - values).abs() <= largest * gap / 2 * 1.001).all()
    relative = ((found - values).abs() / values.abs())[values.abs() > largest * 0.1]
    assert relative.max() < (0.071 if signed else 0.036)  # right above 0.1, where levels lie widest apart


def test_rows_are_rounded_alike_wherever_they_are_cut() -> None:
    values = matrix(10, 700)
    whole, parts = encode(values, True), [encode(part, True) for part in values.split(3)]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_nothing_but_zeros_stays_nothing() -> None:
    codes, scales = encode(torch.zeros(2, 300), False)
    assert torch.equal(decode(codes, scales, False), torch.zeros(2, 300))


def losses(name: str) -> tuple[list[float], int]:
    """A regression of 100 steps, and the bytes that the optimizer keeps for its matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    target, inputs = torch.randn(200, 64), torch.randn(200, 64)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimSection.model_validate({"name": name}), 2e-3)
    optimizer.allocate(model.parameters())
    found = []
    for _ in range(100):
        loss = (model(inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    state = optimizer.state[model[0].weight]
    return found, sum(t.numel() * t.element_size() for key, t in state.items() if key != "step")


def test_it_learns_like_fp32_moments_in_a_quarter_of_the_bytes() -> None:
    (exact, bytes_exact), (rounded, bytes_rounded) = losses("adamw"), losses("adamw8bit")
    assert exact[-1] < 0.1 * exact[0]
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.15)
    assert rounded != exact
    assert bytes_rounded < 0.28 * bytes_exact

"""Learning rate as a function of the step; optimizer state as named tensors that can be loaded in place."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sft_dist.config.schema import OptimSection
from sft_dist.optim import build_optimizer, lr_at, set_step
from sft_dist.parallel.ddp import build_ddp
from sft_dist.parallel.engine import Engine


def rates(schedule: str, num_steps: int = 100, warmup: float = 0.1) -> list[float]:
    return [lr_at(step, 1.0, num_steps, schedule, warmup) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warms_up_linearly_to_the_peak(schedule: str) -> None:
    values = rates(schedule)
    assert values[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(values) == 1.0


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_decays_as_named(schedule: str, middle: float, last: float) -> None:
    values = rates(schedule)
    assert values[55] == pytest.approx(middle, abs=0.02)
    assert values[-1] == pytest.approx(last, abs=0.02)


def test_every_step_of_a_short_run_learns() -> None:
    assert all(value > 0 for schedule in ("cosine", "linear") for value in rates(schedule, num_steps=3, warmup=0.03))


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def engine() -> Engine:
    packed = nn.Module()
    packed.model = network()
    return build_ddp(packed, 1, partial(build_optimizer, optim=OptimSection(), lr=1e-2))


def train(made: Engine, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        made.model(torch.randn(5, 4)).square().sum().backward()
        made.optimizer.step()
        made.optimizer.zero_grad()


def test_state_restored_in_place_continues_bit_identically() -> None:
    straight, first, second = engine(), engine(), engine()
    train(straight, range(6))
    train(first, range(3))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    for name, tensor in second.state().items():
        tensor.copy_(saved[name])
    set_step(second.optimizer, 3)
    train(second, range(3, 6))
    assert all(torch.equal(straight.state()[name], tensor) for name, tensor in second.state().items())


def test_weight_decay_spares_vectors() -> None:
    model = network()
    groups = build_optimizer(dict(model.named_parameters()), OptimSection(weight_decay=0.1), 1e-2).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.1, [2]), (0.0, [1])]

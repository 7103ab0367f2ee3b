"""Learning rate as a function of the step; optimizer state as named tensors that can be loaded in place."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sft_dist.config.schema import OptimSection
from sft_dist.optim import build_optimizer, lr_at, set_lr, set_step
from sft_dist.optim.groups import decays
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


OTHERS = ["adamw8bit", "adafactor", "muon"]


@pytest.mark.parametrize("name", OTHERS)
def test_every_optimizer_continues_bit_identically(name: str) -> None:
    def wide() -> Engine:
        packed = nn.Module()
        torch.manual_seed(0)
        packed.model = nn.Sequential(nn.Linear(4, 1100), nn.Linear(1100, 2))
        return build_ddp(packed, 1, partial(build_optimizer, optim=OptimSection(name=name), lr=1e-2))  # type: ignore[arg-type]

    straight, first, second = wide(), wide(), wide()
    train(straight, range(6))
    train(first, range(3))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    assert all(tensor.ndim for tensor in saved.values())  # what a checkpoint can hold
    for key, tensor in second.state().items():
        tensor.copy_(saved[key])
    set_step(second.optimizer, 3)
    train(second, range(3, 6))
    assert all(torch.equal(straight.state()[key], tensor) for key, tensor in second.state().items())
    assert not torch.equal(straight.model[0].weight, wide().model[0].weight)


def test_fused_adamw_takes_the_textbook_step() -> None:
    """PyTorch's fused kernel and its plain loop, 50 steps: 1e-6 apart."""
    models = [network(), network()]
    plain = torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    ours = build_optimizer(dict(models[0].named_parameters()), OptimSection(weight_decay=0.1), 1e-2)
    ours.param_groups[-1]["weight_decay"] = 0.1  # the plain one has one group
    ours.allocate(models[0].parameters())
    for step in range(50):
        torch.manual_seed(step)
        inputs = torch.randn(5, 4)
        for model, optimizer in zip(models, (ours, plain), strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-6, atol=1e-6)


def test_norms_and_biases_do_not_decay_whatever_their_shape() -> None:
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    for name in ("mlp.up_proj.weight", "embed_tokens.weight", "lora_A.default.weight"):
        assert decays(name, matrix)
    for name, parameter in (
        ("input_layernorm.weight", vector),
        ("norm.weight", matrix),
        ("experts.down_proj_bias", matrix),
        ("lora_magnitude_vector.default.weight", vector),
    ):
        assert not decays(name, parameter)


def test_lora_plus_speeds_up_the_second_matrix_only() -> None:
    named = {f"l.{part}.default.weight": nn.Parameter(torch.zeros(2, 2)) for part in ("lora_A", "lora_B")}
    optimizer = build_optimizer(named, OptimSection(lora_plus_ratio=16.0), 1e-3)
    set_lr(optimizer, 1e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(parameter)] for parameter in named.values()] == pytest.approx([1e-4, 16e-4])


def test_muon_orthogonalises_decoder_matrices_only() -> None:
    shapes = {
        "embed_tokens.weight": (9, 4),
        "layers.0.q_proj.weight": (6, 4),
        "norm.weight": (4,),
        "lm_head.weight": (9, 4),
    }
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = build_optimizer(named, OptimSection(name="muon"), 1e-2)
    optimizer.allocate(named.values())
    kept = {name: set(optimizer.state[p]) - {"step"} for name, p in named.items()}
    assert [name for name, keys in kept.items() if keys == {"momentum_buffer"}] == ["layers.0.q_proj.weight"]
    before = named["layers.0.q_proj.weight"].detach().clone()
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = (before - named["layers.0.q_proj.weight"]) / (1e-2 * 0.2 * 6**0.5)
    values = torch.linalg.svdvals(moved)
    assert ((values > 0.6) & (values < 1.3)).all(), values  # five iterations come this near to one


def test_weight_decay_spares_vectors() -> None:
    model = network()
    groups = build_optimizer(dict(model.named_parameters()), OptimSection(weight_decay=0.1), 1e-2).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.1, [2]), (0.0, [1])]

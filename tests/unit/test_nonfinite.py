"""Two passes over a step compared, and where its first NaN is: one process, no run around it."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sft_dist import nonfinite
from sft_dist.first_nonfinite import HEAD, first_layer, first_parameter
from sft_dist.nonfinite import compare
from sft_dist.parallel.runtime import Runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def changes(first: list[float], second: list[float], norms: tuple[float, float] = (1.0, 1.0), on: torch.device = CPU):  # type: ignore[no-untyped-def]
    return compare(Runtime(0, 1, 0, 1, on, 1), (first, second), norms)


@pytest.mark.parametrize("on", [CPU, GPU])
def test_the_same_twice_is_no_change(on: torch.device) -> None:
    assert changes([1.5, nan, inf], [1.5, nan, inf], (nan, nan), on) == []


@pytest.mark.parametrize(
    ("first", "second"), [(nan, inf), (inf, -inf), (1.5, 1.5 + 2**-52), (0.0, -0.0), (nan, 1.5), (1.5, nan)]
)
def test_every_bit_counts_where_kernels_are_steady(
    first: float, second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = changes([1.0, first], [1.0, second])
    assert line.startswith(f"the loss sum of micro-batch 1 is {second} and not {first} on rank 0 (")
    assert line.endswith(", cpu)")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert len(changes([1.0, first], [1.0, second], on=GPU)) == 1


@pytest.mark.parametrize(
    ("first", "second", "is_change"), [(nan, inf, False), (1.5, 1.75, False), (nan, 1.5, True), (1.5, inf, True)]
)
def test_which_are_finite_counts_where_sums_have_no_order(first: float, second: float, is_change: bool) -> None:
    assert bool(changes([first], [second], on=GPU)) == is_change
    assert bool(changes([1.0], [1.0], (first, second), on=GPU)) == is_change


def test_a_norm_names_hosts_and_only_where_no_loss_names_a_rank() -> None:
    (line,) = changes([1.0], [1.0], (inf, 2.5))
    assert line.startswith("the gradient norm is 2.5, computed on ") and "rank" not in line
    (line,) = changes([nan], [1.0], (nan, 2.5))
    assert "on rank 0" in line


class Packed(nn.Module):
    """Two layers, the second in a part of its own, and a sum as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))

    def forward(self, batch: Tensor) -> Tensor:
        return self.model(batch).sum() / batch[0, 0]


def sighted(spoilt: str | None, *batches: Tensor, micro_batch: int) -> dict[str, Any]:
    """What is found where the layer `spoilt` has an infinite weight."""
    packed = Packed()
    if spoilt is not None:
        packed.model.get_submodule(spoilt).weight.data.fill_(inf)  # type: ignore[union-attr]
    engine = SimpleNamespace(packed=packed, model=packed.model, discard_gradients=packed.zero_grad)
    loaded = SimpleNamespace(indices=tuple(range(len(batches))))

    def again() -> Tensor:
        for batch in batches:
            packed(batch).backward()
        return torch.zeros(len(batches))

    found = first_layer(engine, loaded, again, micro_batch)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in packed.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in packed.modules())
    return found


GOOD, BAD, ZERO = torch.ones(1, 2), torch.tensor([[1.0, inf]]), torch.tensor([[0.0, 1.0]])


@pytest.mark.parametrize(
    ("spoilt", "batches", "micro_batch", "layer"),
    [
        ("1.1", (GOOD,), 0, "1.1"),
        ("0", (GOOD,), 0, "0"),
        (None, (GOOD, BAD), 1, "0"),
        (None, (BAD, ZERO), 1, HEAD),  # the first micro-batch is looked at apart
    ],
)
def test_the_first_layer_of_the_forward_pass_is_named(
    spoilt: str | None, batches: tuple[Tensor, ...], micro_batch: int, layer: str
) -> None:
    assert sighted(spoilt, *batches, micro_batch=micro_batch) == {
        "layer": layer,
        "micro_batch": micro_batch,
        "rank": 0,
    }


def test_the_first_gradient_of_the_backward_pass_is_named() -> None:
    assert first_parameter({"a": inf, "b": nan, "c": 1.0}) == {"parameter": "b"}
    assert first_parameter({"a": 1.0}) is None


def test_micro_batches_to_blame() -> None:
    assert nonfinite.bad_losses([1.0, nan, 2.0, -inf]) == [1, 3]

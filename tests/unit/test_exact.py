"""Sums in canonical order: right, and the same however the work was cut."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sft_dist.config.elastic import check_micro_batches, check_world
from sft_dist.errors import ConfigError
from sft_dist.optim.adamw import AdamW
from sft_dist.optim.adamw_exact import ExactAdamW
from sft_dist.parallel.exact import TreeSum, fold, row_squares


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values over ten orders of magnitude: their sum depends on the order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10 ** (10 * torch.rand(*shape, generator=generator) - 5)


def tree(values: list[torch.Tensor]) -> torch.Tensor:
    sums = TreeSum()
    for value in values:
        sums.add([value.clone()])
    return sums.take()[0]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 8, 13, 16])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rounds_of_any_number_of_ranks_make_the_same_tree(number: int, ranks: int) -> None:
    leaves = list(wide(number, 50))
    filled = leaves + [torch.zeros(50)] * (-number % ranks)
    rounds = []
    for start in range(0, len(filled), ranks):
        level = filled[start : start + ranks]
        while len(level) > 1:
            level = [a + b for a, b in zip(level[0::2], level[1::2], strict=True)]
        rounds.append(level[0])
    assert torch.equal(tree(rounds), tree(leaves))
    assert torch.allclose(tree(leaves), torch.stack(leaves).sum(0), rtol=1e-4)


def test_one_after_the_other_is_another_sum() -> None:
    leaves = list(wide(16, 50))
    assert not torch.equal(tree(leaves), torch.stack(leaves).cumsum(0)[-1])


def test_a_tree_has_no_negative_zeros() -> None:
    assert math.copysign(1.0, tree([torch.tensor([-0.0]), torch.tensor([-0.0])]).item()) == 1.0


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 64, 1001])
def test_squares_of_a_row_do_not_depend_on_the_rows_beside_it(columns: int) -> None:
    rows = wide(11, columns)
    whole = row_squares(rows)
    for cuts in ([0, 11], [0, 1, 11], [0, 4, 4, 8, 11]):
        assert torch.equal(torch.cat([row_squares(rows[a:b]) for a, b in pairwise(cuts)]), whole)
    torch.testing.assert_close(whole, rows.double().square().sum(1), rtol=1e-14, atol=0)


def test_rows_are_taken_in_parts_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = wide(40, 30)
    whole = row_squares(rows)
    monkeypatch.setattr("sft_dist.parallel.exact.NORM_ELEMENTS", 100)
    assert torch.equal(row_squares(rows), whole)


def test_fold_adds_everything_once() -> None:
    for length in range(1, 40):
        assert fold(torch.arange(1.0, length + 1)) == length * (length + 1) / 2


@pytest.mark.parametrize("world_size", [3, 6, 12])
def test_only_powers_of_two(world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"elastic on {world_size} processes: needs a power of two"):
        check_world(world_size)


def test_every_rank_gets_as_many_micro_batches() -> None:
    for world_size in (1, 2, 4, 8):
        check_world(world_size)
        check_micro_batches(world_size, 8)
        check_micro_batches(world_size, None)
    with pytest.raises(ConfigError, match="4 processes do not divide the 6 micro-batches of a step"):
        check_micro_batches(4, 6)


def test_the_update_does_not_depend_on_the_cut_and_is_adamw() -> None:
    """Cuts of 1 to 13 elements: all that a vector of eight or sixteen leaves over."""
    number = 4000
    start, gradients = wide(number), [wide(number, seed=seed) for seed in range(1, 7)]

    def train(kind: type[torch.optim.AdamW], size: int, **options: bool) -> torch.Tensor:
        cuts = [slice(at, at + size) for at in range(0, number, size)]
        parts = [torch.nn.Parameter(start[cut].clone()) for cut in cuts]
        optimizer = kind(parts, lr=1e-2, weight_decay=0.1, **options)
        if isinstance(optimizer, AdamW):
            optimizer.allocate(parts)
        for gradient in gradients:
            for part, cut in zip(parts, cuts, strict=True):
                part.grad = gradient[cut].clone()
            optimizer.step()
        return torch.cat([part.detach() for part in parts])

    whole = train(ExactAdamW, number)
    for size in (1, 3, 7, 12, 13):
        assert torch.equal(train(ExactAdamW, size), whole), size
    torch.testing.assert_close(whole, train(torch.optim.AdamW, number, fused=True), rtol=1e-5, atol=1e-7)

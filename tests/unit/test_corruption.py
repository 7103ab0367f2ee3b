"""Checksums see every single bit; the minority is who differs from the rest."""

from __future__ import annotations

import random

import pytest
import torch

from sft_dist.resilience.corruption import checksum, minority


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_bit_that_falls_over_changes_the_checksum(dtype: torch.dtype) -> None:
    source = random.Random(0)
    tensors = [(torch.randn(37, 3) * 50).to(dtype), torch.zeros(5).to(dtype), torch.ones(1).to(dtype)]
    whole = checksum(tensors)
    assert whole == checksum([tensor.clone() for tensor in tensors])
    for _ in range(300):
        octets = source.choice(tensors).view(torch.uint8).flatten()
        place, bit = source.randrange(len(octets)), 1 << source.randrange(8)
        octets[place] ^= bit
        assert checksum(tensors) != whole
        octets[place] ^= bit
    assert checksum(tensors) == whole


def test_order_counts_and_parts_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(100), torch.randn(100)
    assert checksum([a, b]) != checksum([b, a])
    assert checksum([]) == 0
    swapped = torch.cat([a[2:4], a[:2], a[4:]])
    assert checksum([swapped]) != checksum([a])
    monkeypatch.setattr("sft_dist.resilience.corruption.WORDS_AT_A_TIME", 7)
    assert checksum([a]) == checksum([a.clone()])


@pytest.mark.parametrize(
    ("values", "odd"),
    [([1], []), ([1, 1], []), ([1, 2], [0, 1]), ([1, 1, 2], [2]), ([2, 1, 1, 1], [0]), ([1, 1, 2, 2], [0, 1, 2, 3])],
)
def test_minority(values: list[int], odd: list[int]) -> None:
    assert minority(values) == odd

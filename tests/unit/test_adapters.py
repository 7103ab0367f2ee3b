"""The digest of frozen weights: it changes with any of them, and only with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft_dist.models.adapters import frozen_digest


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4)).to(dtype)
    layers[0].requires_grad_(False)
    return layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_frozen_weight_counts_and_no_trained_one(dtype: torch.dtype) -> None:
    base = frozen_digest(model(dtype))
    assert base == frozen_digest(model(dtype))
    changed = model(dtype)
    changed[1].weight.data += 1
    assert frozen_digest(changed) == base
    changed[0].weight.data[299, 299] += 0.5
    assert frozen_digest(changed) != base


def test_places_and_types_count() -> None:
    blocks = model(torch.float32)
    first = frozen_digest(blocks)
    blocks[0].weight.data = blocks[0].weight.data.flatten().roll(150 * 300).view(300, 300)
    assert frozen_digest(blocks) != first
    assert frozen_digest(model(torch.bfloat16)) != first


def test_nothing_frozen_has_no_digest() -> None:
    assert frozen_digest(model().requires_grad_(True)) is None

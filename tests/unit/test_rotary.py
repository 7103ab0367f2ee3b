"""Rotary embeddings that depend on the longest document of a row: seen to leak, and refused where they would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_config
from transformers import PretrainedConfig

from sft_dist.certify import Documents, merge
from sft_dist.data.collate import collate
from sft_dist.errors import ConfigError
from sft_dist.models import attention
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM
from sft_dist.models.rotary import refuse_shared_turns, turning_point
from sft_dist.types import TokenizedExample
from sft_kernels import choose_head

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16, "rope_theta": 1e4, "factor": 4.0}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def turned(model_type: str, rope: dict[str, Any]) -> PretrainedConfig:
    config = tiny_config(model_type)
    config.max_position_embeddings = 16
    if model_type == "phi3":
        config.original_max_position_embeddings = 16
        config.max_position_embeddings = 64
    config.rope_parameters = dict(rope)
    return config


@pytest.mark.parametrize(("model_type", "rope"), [("phi3", LONGROPE), ("llama", DYNAMIC)], ids=["longrope", "dynamic"])
@torch.no_grad()
def test_a_long_neighbour_moves_a_short_document(model_type: str, rope: dict[str, Any]) -> None:
    """Why it is refused: this is transformers' doing, and not seen with documents up to the turning point."""
    config = turned(model_type, rope)
    model = build_random(config, dtype=torch.float32, seed=0)
    attention.install(model, "sdpa")
    packed = PackedCausalLM(model, choose_head("reference", "cpu")[1]).eval()

    def short_one_beside(length: int) -> torch.Tensor:
        rng = np.random.default_rng(0)
        examples = [
            TokenizedExample(rng.integers(3, 99, n, dtype=np.int32), np.ones(n, np.float32)) for n in (8, length)
        ]
        probe = Documents(tuple(examples))
        row = collate([merge(probe.packs)], probe, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8)
        return packed.hidden_states(row)[0, :8]

    torch.testing.assert_close(short_one_beside(12), short_one_beside(16))
    assert (short_one_beside(12) - short_one_beside(40)).abs().max() > 1e-4
    assert turning_point(config) == (rope["rope_type"], 16)
    refuse_shared_turns(config, 16, is_alone=False)
    refuse_shared_turns(config, 40, is_alone=True)
    with pytest.raises(ConfigError, match=r"40 tokens.*beyond 16: set data\.seq_len=16"):
        refuse_shared_turns(config, 40, is_alone=False)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "gpt_neox", "opt"])
def test_other_rotary_embeddings_have_no_turning_point(model_type: str) -> None:
    assert turning_point(tiny_config(model_type)) is None


@torch.no_grad()
def test_padding_longer_than_the_table_of_positions_does_not_matter() -> None:
    """GPT-2 learns 256 positions here; a row with little in it is padded to 512 tokens."""
    model = build_random(tiny_config("gpt2"), dtype=torch.float32, seed=0)
    attention.install(model, "sdpa")
    packed = PackedCausalLM(model, choose_head("reference", "cpu")[1]).eval()
    probe = Documents((TokenizedExample(np.arange(3, 12, dtype=np.int32), np.ones(9, np.float32)),))
    rows = [collate(probe.packs, probe, packing="best_fit", pad_token_id=0, pad_to_multiple_of=n) for n in (8, 512)]
    short, long = (packed.hidden_states(row)[0, :9] for row in rows)
    torch.testing.assert_close(short, long)

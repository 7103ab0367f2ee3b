"""What the recipe may ask of the engines, and that getting something else is never silent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError
from torch import nn

from sft_dist.config.auto import Facts, choose
from sft_dist.config.schema import ParallelSection, Recipe
from sft_dist.estimate import memory
from sft_dist.parallel import zero
from sft_dist.parallel.zero import assert_partitioned, configuration

CPU = torch.device("cpu")
HERE = torch.device(get_accelerator().device_name())  # decided when DeepSpeed is imported


@pytest.mark.parametrize(
    ("strategy", "offload"),
    [("ddp", "optimizer"), ("fsdp2", "params"), ("zero1", "params"), ("zero2", "params")],
)
def test_offload_that_an_engine_cannot_do_is_refused(strategy: str, offload: str) -> None:
    with pytest.raises(
        ValidationError, match=rf"parallel\.offload={offload} needs parallel\.strategy=zero.*{strategy}"
    ):
        ParallelSection.model_validate({"strategy": strategy, "offload": offload})


@pytest.mark.parametrize(("offload", "strategy"), [("none", "ddp"), ("optimizer", "zero2"), ("params", "zero3")])
def test_auto_takes_an_engine_that_can_offload(offload: str, strategy: str) -> None:
    facts = Facts(1000, 1000, 8, 2, 10_000, 100, world_size=2, device="cpu", memory_bytes=2**30)
    recipe = Recipe.model_validate(
        {"model": {"path": "x"}, "data": {"sources": [{"path": "d.json"}]}, "parallel": {"offload": offload}}
    )
    assert choose(recipe, facts).strategy == strategy


def made(stage: int, ranks: int, moved: int) -> Any:
    """What DeepSpeed gives back for a model of one 10 x 10 matrix."""
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        dp_world_size=ranks,
        module=nn.Linear(10, 10, bias=False),
        optimizer=SimpleNamespace(single_partition_of_fp32_groups=[torch.zeros(moved)]),
    )


def test_the_estimate_counts_with_what_deepspeed_is_told() -> None:
    settings = configuration(3, nn.Linear(10, 10), CPU, torch.float32, "none")["zero_optimization"]
    assert settings["stage3_prefetch_bucket_size"] == zero.PREFETCH_ELEMENTS == memory.ZERO3_PREFETCH_ELEMENTS
    assert settings["stage3_max_live_parameters"] == zero.LIVE_ELEMENTS == memory.ZERO3_LIVE_ELEMENTS
    assert settings["sub_group_size"] == zero.MOVED_ELEMENTS == memory.ZERO3_MOVED_ELEMENTS
    assert zero.BUCKET_ELEMENTS * 4 == memory.ZERO_BUCKET_BYTES
    assert zero.BUCKET_SHARE == memory.ZERO_BUCKET_SHARE


def test_obtained_partition_is_accepted() -> None:
    assert_partitioned(made(2, 2, 50), 2, 2, HERE)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (made(1, 2, 50), "became"),
        (made(2, 1, 50), "became"),
        (made(2, 2, 100), "moves 100 of 100 weights"),
        (made(2, 2, 40), "moves 40 of 100 weights"),
    ],
    ids=["stage", "ranks", "replicas", "too few"],
)
def test_other_parallelism_than_asked_for_is_an_error(found: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert_partitioned(found, 2, 2, HERE)


def test_only_vectors_stay_whole_under_stage_3() -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(5))
    settings = configuration(3, model, CPU, torch.float32, "params")["zero_optimization"]
    assert settings["stage3_param_persistence_threshold"] == 7
    assert settings["offload_param"] == settings["offload_optimizer"] == {"device": "cpu", "pin_memory": False}

"""What `auto` becomes: sensible step counts on small data, multiples everywhere, and what was fixed stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sft_dist.config.auto import Facts, cadence, choose
from sft_dist.config.schema import Recipe

SMALL = Facts(
    num_parameters=260_000, num_trained=260_000, hidden_size=64, num_layers=5, num_train_tokens=170_000,
    num_train_examples=990, world_size=1, device="cpu", memory_bytes=24 * 2**30,
)  # fmt: skip
EIGHT_B = replace(SMALL, num_parameters=8 * 10**9, num_trained=8 * 10**9, hidden_size=4096, num_layers=32,
                  num_train_tokens=10**9, world_size=8, device="cuda", memory_bytes=80 * 2**30)  # fmt: skip


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"path": "x"}, "data": {"sources": [{"path": "d.json"}]} | sections.pop("data", {})} | sections
    )


def test_small_data_gets_many_steps() -> None:
    chosen = choose(recipe(data={"seq_len": 512}), SMALL)
    slots = chosen.packs_per_micro_batch * 512 * (chosen.micro_batches_per_step or 0)
    assert 100 <= 3 * SMALL.num_train_tokens / slots <= 400


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_has_a_micro_batch(world_size: int) -> None:
    chosen = choose(recipe(data={"seq_len": 512}), replace(SMALL, world_size=world_size, num_train_tokens=10**7))
    assert (chosen.micro_batches_per_step or 0) >= world_size


@pytest.mark.parametrize("packs", [1, 3, 8, 12])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_fixed_step_is_divided_without_rest(packs: int, world_size: int) -> None:
    fixed = recipe(data={"seq_len": 512}, batch={"tokens_per_step": packs * 512})
    chosen = choose(fixed, replace(SMALL, world_size=world_size))
    assert chosen.packs_per_micro_batch * (chosen.micro_batches_per_step or 0) == packs


def test_a_large_model_is_sharded_on_many_gpus_and_replicated_when_small() -> None:
    assert choose(recipe(), EIGHT_B).strategy == "fsdp2"
    assert choose(recipe(), replace(SMALL, world_size=8)).strategy == "ddp"


def test_bfloat16_on_gpus_only() -> None:
    assert [choose(recipe(), facts).compute for facts in (SMALL, EIGHT_B)] == ["float32", "bfloat16"]


def test_learning_rate_falls_with_size_and_rises_for_adapters() -> None:
    full = [choose(recipe(), facts).lr for facts in (SMALL, EIGHT_B)]
    assert full == [2e-3, 1.1e-5]
    assert choose(recipe(tuning={"method": "lora"}), EIGHT_B).lr == pytest.approx(1.1e-4, rel=0.05)


def test_what_the_recipe_says_wins() -> None:
    asked = recipe(optim={"lr": 0.5}, parallel={"strategy": "fsdp2"}, memory={"activation_checkpointing": "full"})
    chosen = choose(asked, SMALL)
    assert (chosen.lr, chosen.strategy, chosen.activation_checkpointing) == (0.5, "fsdp2", "full")


def test_cadence() -> None:
    assert [cadence("auto", 100, 5), cadence("auto", 3, 5), cadence(7, 100, 5)] == [20, 1, 7]

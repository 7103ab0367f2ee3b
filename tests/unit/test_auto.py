"""What `auto` becomes: sensible step counts on small data, multiples everywhere, and what was fixed stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sft_dist.config.auto import Facts, _activation_bytes, cadence, choose
from sft_dist.config.schema import Recipe, TuningSection
from sft_dist.estimate.activations import layer_activation_bytes
from sft_dist.estimate.architecture import derive
from sft_dist.estimate.layout import Layout
from sft_dist.estimate.tuning import tuned

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


@pytest.mark.parametrize(
    ("facts", "asked", "why"),
    [
        (SMALL, {}, "one process has nobody to share with: 4.0 MiB of weights, gradients and moments in 24.0 GiB"),
        (replace(SMALL, world_size=8), {}, "replicas are fastest and fit"),
        (EIGHT_B, {}, "119.2 GiB of weights, gradients and moments in 80.0 GiB per process, 149% > 60%; sharded 19%"),
        (replace(EIGHT_B, world_size=2), {}, "sharded 75% each; still more than that: add processes"),
        (SMALL, {"strategy": "zero1"}, "as the recipe says"),
        (SMALL, {"offload": "params"}, "the engine for parallel.offload=params"),
        (replace(SMALL, world_size=4), {"dp_replicate": 2}, "parallel.dp_replicate=2 is a mesh of it"),
    ],
)
def test_the_strategy_comes_with_its_reason(facts: Facts, asked: dict[str, Any], why: str) -> None:
    assert why in choose(recipe(parallel=asked), facts).strategy_reason


@pytest.mark.parametrize(("device", "compute"), [("cuda", 2), ("cpu", 4)])
def test_activations_are_what_the_estimate_counts(device: str, compute: int) -> None:
    """Of replicas that train all weights; the estimate's own count is compared with what autograd saves."""
    for hidden, inner, layers, keys in ((4096, 14336, 32, 8), (896, 4864, 24, 2), (8192, 28672, 80, 8)):
        architecture = derive(
            {"model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
             "num_attention_heads": hidden // 64, "num_key_value_heads": keys, "vocab_size": 1000}, "x"
        )  # fmt: skip
        layout = Layout("ddp", 8, device, compute, 4, 1000, 1000, 1, False)
        counted = layers * layer_activation_bytes(architecture, tuned(architecture, TuningSection()), layout) / 1000
        facts = replace(EIGHT_B, hidden_size=hidden, intermediate_size=inner, num_layers=layers, device=device)
        assert _activation_bytes(recipe(), facts) == pytest.approx(counted, rel=0.06)

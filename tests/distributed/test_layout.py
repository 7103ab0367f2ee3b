"""The layout certificate passes on every engine, and fails on each fault that such engines have had elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from layout_worker import FAULTS, FAULTS_OF_FOUR, METHODS, TWO
from tiny_run import command, write_recipe

from sft_dist.layout_certificate import TOLERANCES

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("layout_worker.py")
SOUND = [f"ddp-none-{m}-1" for m in ("full", "lora")]
SOUND += [f"{s}-{o}-{m}-2" for s, o in TWO for m in ("full", "lora")] + [f"fsdp2-none-{m}-4" for m in ("full", "lora")]
SOUND += [f"{s}-{how}" for s in ("ddp", "fsdp2", "zero3") for how in ("bfloat16", "selective", "lora-full")]
SOUND += [f"{s}-{m}-bfloat16" for s in ("ddp", "fsdp2", "zero3") for m in METHODS]
SOUND += [*(f"{s}-sequence" for s in ("ddp", "fsdp2", "zero3")), "hsdp-sequence"]
# Which figure has to tell of a fault.
TELLS = {
    "not exchanged": "gradient norm",
    "not clipped": "of updates",
    "clipped to the half": "of updates",
    "mean of means": "loss: of one step",
    "replicas are not added up": "gradient norm",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, over the launches of one, two and four processes."""
    folder, merged = tmp_path_factory.mktemp("layout"), []
    for world_size in (1, 2, 4):
        run_ranks(WORKER, world_size, folder, [str(folder)])
        for rank in range(world_size):
            merged.append(json.loads((folder / f"found-{world_size}-{rank}.json").read_text()))
    return merged


@pytest.mark.parametrize("case", SOUND)
def test_sound_engines_pass(found: list[dict[str, Any]], case: str) -> None:
    results = [rank["sound"][case] for rank in found if case in rank["sound"]]
    assert results
    for figures in results:
        assert isinstance(figures, dict), figures
        assert figures == results[0]  # every rank knows the worst
        assert set(figures) == {
            "loss: of one step", "gradient norm", "direction: of updates", "length: of updates", "ranks: unequal"
        }  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS, "loop: mean of means", *FAULTS_OF_FOUR])
def test_every_fault_is_caught_on_every_rank(found: list[dict[str, Any]], fault: str) -> None:
    refusals = [rank["faults"][fault] for rank in found if fault in rank["faults"]]
    assert len(refusals) == (4 if fault in FAULTS_OF_FOUR else 2)
    for refusal in refusals:
        assert isinstance(refusal, str), f"missed: {refusal}"
        assert refusal == refusals[0]
        assert refusal.startswith("layout certificate: ")
    told = next((figure for words, figure in TELLS.items() if words in fault), None)
    assert told is None or told in refusals[0]


def test_the_runs_own_state_and_random_numbers_are_untouched(found: list[dict[str, Any]]) -> None:
    ranks = [rank["untouched"] for rank in found if "untouched" in rank]
    assert ranks == [{"state": True, "random": True}] * 2


@pytest.mark.parametrize("engine", [f"{s}-{o}" for s, o in [*TWO, ("zero3", "none")]])
def test_steps_after_a_rehearsal_are_those_without_one(found: list[dict[str, Any]], engine: str) -> None:
    assert [rank["discarded"][engine] for rank in found if "discarded" in rank] == [True, True]


def test_the_verb_proves_the_layout_of_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, parallel={"strategy": "fsdp2"})
    said = command("certify", str(recipe), "--layout", "--nproc", "2")
    assert "llama, fsdp2 on 2 process(es): as the recipe says" in said
    assert said.count("  passed  ") == len(next(iter(TOLERANCES.values())))
    said = command("certify", str(recipe), "parallel.dp_replicate=2", "--layout", "--nproc", "2", code=2)
    assert "parallel.dp_replicate=2 on 2 process(es) leaves shards of one" in said

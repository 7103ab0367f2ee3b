"""Any engine continues at any number of ranks what it saved at any other, on the same global batches.

Losses agree to 1e-6 relative with one run on one rank, and the state after loading is the state that was saved, bit for
bit. Nothing is converted: checkpoints hold whole tensors by name, whichever engine wrote them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from elastic_matrix import STEPS, WORLDS
from harness import asked_for, cells
from lives import Life, live, run_script
from tiny_run import lines, write_recipe

pytestmark = pytest.mark.slow

CASES = [f"{engine}-{method}" for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for method in ("full", "lora")]
DEFAULT = ("ddp-full", "fsdp2-full", "zero3-full")
Found = dict[str, dict[str, Any]]


def reference_case(case: str) -> str:
    return "ddp-" + case.split("-")[1]


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("matrix")
    asked = asked_for(request)
    needed = dict.fromkeys(["fsdp2-full", *asked, *map(reference_case, asked)])
    run_script(Path(__file__).with_name("elastic_matrix.py"), folder, *needed)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", cells(CASES, DEFAULT))
def test_saved_and_loaded_on_one_two_and_four_ranks(matrix: Found, case: str) -> None:
    reference = matrix[f"{reference_case(case)}-0-1"]["losses"]
    assert len(reference) == 3
    for saved in WORLDS:
        for loaded in WORLDS:
            cell = matrix[f"{case}-{saved}-{loaded}"]
            assert cell["digest"] == matrix[f"{case}-0-{saved}"]["digest"], (saved, loaded)
            assert cell["losses"] == pytest.approx(reference, rel=1e-6), (saved, loaded)


def test_states_are_not_trivially_equal(matrix: Found) -> None:
    """Sums differ in the last bits between numbers of ranks, so the digests have something to tell apart."""
    assert len({matrix[f"fsdp2-full-0-{ranks}"]["digest"] for ranks in WORLDS}) > 1
    assert STEPS > 3


MOVED: dict[str, dict[str, Any]] = {
    "fsdp2-full": {"parallel": {"strategy": "fsdp2"}},
    "fsdp2-long": {"parallel": {"strategy": "fsdp2"}, "optim": {"max_steps": 50, "lr": 1e-3}},
    "ddp-lora": {"parallel": {"strategy": "ddp"}, "tuning": {"method": "lora", "rank": 3, "dropout": 0.2}},
    "zero1-full": {"parallel": {"strategy": "zero1"}},
    "zero2-lora": {"parallel": {"strategy": "zero2"}, "tuning": {"method": "lora", "rank": 3, "dropout": 0.2}},
    "zero3-full": {"parallel": {"strategy": "zero3"}},
}


MOVED_BY_DEFAULT = ("fsdp2-full",)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs, each from 2 ranks to 1 to 4 in the middle of its epochs; and on one rank throughout."""
    folder = tmp_path_factory.mktemp("moved")
    lives: list[Life] = []
    shared: dict[str, Any] = {
        "data": {"seq_len": 256},
        "batch": {"tokens_per_micro_batch": 256, "tokens_per_step": 1024},
        "optim": {"max_steps": 12, "lr": 1e-3},
        "eval": {"generate": 0, "every_steps": 12},
    }
    asked = asked_for(request, "name")
    for method in dict.fromkeys(name.split("-")[1] for name in asked):
        changes = next(value for name, value in MOVED.items() if name.endswith(method))
        recipe = write_recipe(folder, f"one-{method}", **shared | changes | {"parallel": {"strategy": "ddp"}})
        lives.append((1, [str(recipe)]))
    for name in asked:
        recipe = str(write_recipe(folder, name, **shared | MOVED[name]))
        lives += [(2, [recipe, "optim.stop_after_step=3"]), (1, [recipe, "optim.stop_after_step=7"]), (4, [recipe])]
    live(lives, folder)
    return folder


@pytest.mark.parametrize("name", cells(MOVED, MOVED_BY_DEFAULT))
def test_a_run_moves_from_two_ranks_to_one_to_four(runs: Path, name: str) -> None:
    one, moved = lines(runs / f"one-{name.split('-')[1]}", "step"), lines(runs / name, "step")
    assert len(one) == MOVED[name].get("optim", {}).get("max_steps", 12) and {line["attempt"] for line in moved} == {
        1,
        2,
        3,
    }
    for key in ("batch_digest", "num_tokens", "num_loss_tokens", "lr"):
        assert [line[key] for line in moved] == [line[key] for line in one], key
    assert len({line["batch_digest"] for line in one}) > 6
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in one], rel=1e-6)

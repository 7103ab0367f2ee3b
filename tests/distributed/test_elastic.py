"""`run.deterministic: elastic`: every bit of a run is the same on 1, 2, 4 and 8 ranks, and when they change midway.

Real runs through the worker's own `main`. 99 tokens and rank 3 do not divide by the ranks: some shards are shorter,
and some are empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import cells
from lives import Life, live
from tiny_run import lines, trajectory, weights, write_recipe

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora-dropout": {"tuning": {"method": "lora", "rank": 3, "dropout": 0.2}},
    "full-bfloat16": {"precision": {"compute": "bfloat16"}},
}
# Steps of 11 examples have a number of micro-batches that no world size has to divide: last rounds are filled.
BATCHES: dict[str, dict[str, Any]] = {
    "full": {"tokens_per_micro_batch": 256, "tokens_per_step": 2048},
    "lora-dropout": {"tokens_per_micro_batch": 256, "tokens_per_step": 1024},
    "full-bfloat16": {"tokens_per_micro_batch": 256, "tokens_per_step": "auto", "examples_per_step": 11},
}
MAX_NORM = {"full": 1.8, "lora-dropout": 1.6, "full-bfloat16": 1.6}
STEPS = 7


def elastic_recipe(folder: Path, name: str, case: str, deterministic: Any = "elastic") -> Path:
    return write_recipe(
        folder,
        name,
        run={"deterministic": deterministic},
        data={"seq_len": 256},
        batch=BATCHES[case],
        optim={"max_steps": STEPS, "max_grad_norm": MAX_NORM[case]},
        parallel={"strategy": "auto" if deterministic == "elastic" else "fsdp2"},
        checkpoint={"every_steps": 2},
        eval={"generate": 0, "every_steps": 3},
        **METHODS[case],
    )


def found(run_dir: Path) -> tuple[Any, ...]:
    """Everything that must be equal: the steps, the evaluations, the final weights."""
    evaluations = [(line["step"], line["eval_loss"]) for line in lines(run_dir, "eval")]
    return trajectory(run_dir), evaluations, weights(run_dir)


@pytest.fixture(
    scope="module",
    params=cells(METHODS, ["full"]),
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one case: `1`, `2`, `4` ranks throughout, `moved` from 2 to 1 to 4, and `plain` fsdp2 on 1 and 4."""
    folder = tmp_path_factory.mktemp(request.param)
    lives: list[Life] = []
    for ranks in (1, 2, 4):
        lives.append((ranks, [str(elastic_recipe(folder, str(ranks), request.param))]))
    moved = str(elastic_recipe(folder, "moved", request.param))
    lives += [(2, [moved, "optim.stop_after_step=2"]), (1, [moved, "optim.stop_after_step=5"]), (4, [moved])]
    for ranks in (1, 4):
        lives.append((ranks, [str(elastic_recipe(folder, f"plain-{ranks}", request.param, deterministic=False))]))
    live(lives, folder)
    return folder


def test_every_bit_is_the_same_at_any_number_of_ranks(runs: Path) -> None:
    expected = found(runs / "1")
    assert len(expected[0]) == STEPS and len(expected[1]) == 4
    for name in ("2", "4", "moved"):
        assert found(runs / name) == expected, name


def test_without_the_mode_the_bits_differ(runs: Path) -> None:
    """Else the test above would prove nothing. The batches are the same, the losses equal to rounding."""
    one, four = (trajectory(runs / f"plain-{ranks}") for ranks in (1, 4))
    assert one != four
    assert weights(runs / "plain-1") != weights(runs / "plain-4")
    assert [step[-1] for step in one] == [step[-1] for step in four] == [step[-1] for step in trajectory(runs / "1")]


def test_clipping_was_on_in_some_steps_and_off_in_others(runs: Path) -> None:
    norms = [line["grad_norm"] for line in lines(runs / "1", "step")]
    case = max((name for name in MAX_NORM if runs.name.startswith(name)), key=len)
    assert min(norms) < MAX_NORM[case] < max(norms), norms

"""`sft-dist replay` on real run folders: the batch of any step, and its loss again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import command, lines, train, write_recipe

from sft_dist.replay import as_json, rebuild, rerun

pytestmark = pytest.mark.slow


def replay(run_dir: Path, *arguments: str, code: int = 0) -> str:
    return command("replay", str(run_dir), *arguments, code=code)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on two shards; checkpoints at 9 and 12 are left."""
    folder = tmp_path_factory.mktemp("replay")
    train(write_recipe(folder, parallel={"strategy": "fsdp2"}), "--nproc", "2")
    return folder / "run"


def replayed(run_dir: Path, step: int, *, loss: bool = False) -> dict[str, Any]:
    """What `--json` prints, without the seconds of another process."""
    found = rebuild(run_dir, step, lambda text: None)
    value: dict[str, Any] = json.loads(as_json(found, rerun(found) if loss else None))
    return value


def test_every_step_is_rebuilt_with_the_tokens_that_were_trained(run_dir: Path) -> None:
    for line in lines(run_dir, "step")[::4]:
        found = replayed(run_dir, line["step"])
        assert found["same"] is True
        assert (found["num_tokens"], found["num_loss_tokens"]) == (line["num_tokens"], line["num_loss_tokens"])
        examples = [example for pack in found["packs"] for example in pack["examples"]]
        assert sum(example["num_tokens"] for example in examples) == line["num_tokens"]
        assert all(example["id"].startswith(str(run_dir.parent / "data.json")) for example in examples)
        assert all(len(example["learned"]) == 1 for example in examples)


@pytest.mark.parametrize("step", [1, 10])
def test_a_step_whose_first_weights_are_there_has_its_loss_again(run_dir: Path, step: int) -> None:
    loss = replayed(run_dir, step, loss=True)["loss"]
    assert loss["exact"] and loss["weights_step"] == step - 1
    assert loss["replayed"] == pytest.approx(loss["recorded"], rel=1e-6)


def test_a_loss_with_older_weights_is_called_inexact(run_dir: Path) -> None:
    loss = replayed(run_dir, 12, loss=True)["loss"]
    assert not loss["exact"] and loss["weights_step"] == 9
    assert "weights of step 9, the step began with those of step 11" in loss["why_not"]


def test_the_terminal_shows_documents_and_what_is_learned(run_dir: Path) -> None:
    shown = replay(run_dir, "--step", "10", "--loss")
    assert "micro-batch 1 of 2, step 10" in shown and "⟦" in shown
    assert "the same as in metrics.jsonl" in shown and "weights of step 9, as the step began" in shown


def test_other_tokens_or_another_loss_than_recorded_end_in_65(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    kept = metrics.read_text()
    tenth = next(line for line in lines(run_dir, "step") if line["step"] == 10)
    try:
        metrics.write_text(kept.replace(tenth["batch_digest"], "0" * 64))
        assert "metrics.jsonl says 0000" in replay(run_dir, "--step", "10", code=65)
        metrics.write_text(kept.replace(repr(tenth["loss"]), repr(tenth["loss"] * 1.001)))
        assert "with the weights it began with" in replay(run_dir, "--step", "10", "--loss", code=65)
    finally:
        metrics.write_text(kept)


def test_a_step_outside_the_plan_and_no_run_folder_are_told(run_dir: Path) -> None:
    assert "has steps 1 to 12" in replay(run_dir, "--step", "13", code=2)
    assert "it is no run folder" in replay(run_dir.parent, "--step", "1", code=65)


def test_lora_with_dropout_has_its_loss_again(tmp_path: Path) -> None:
    lora = {"method": "lora", "rank": 4, "dropout": 0.1}
    train(write_recipe(tmp_path, tuning=lora, optim={"lr": 1e-2, "max_steps": 4}, checkpoint={"every_steps": 3}))
    loss = replayed(tmp_path / "run", 4, loss=True)["loss"]
    assert loss["exact"] and loss["replayed"] == pytest.approx(loss["recorded"], rel=1e-6)


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_a_step_of_every_engine_has_its_loss_again(tmp_path: Path, strategy: str) -> None:
    """Run in one process from the checkpoint that two ranks wrote."""
    changes = {"optim": {"max_steps": 4}, "eval": {"generate": 0, "every_steps": 9}}
    train(write_recipe(tmp_path, parallel={"strategy": strategy}, **changes), "--nproc", "2")
    found = replayed(tmp_path / "run", 4, loss=True)
    assert found["same"] and found["loss"]["exact"] and found["loss"]["weights_step"] == 3
    assert found["loss"]["replayed"] == pytest.approx(found["loss"]["recorded"], rel=1e-6)

"""What a run leaves behind, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import command, lines, train, trajectory, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manifest import read_manifest, write_manifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(write_recipe(folder), "log.trackers=[tensorboard]")
    return folder / "run"


def test_folder_has_what_the_interface_promises(finished: Path) -> None:
    for name in ("config.yaml", "fingerprint.json", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-00000009", "step-00000012"]
    assert (finished / "logs/attempt_0001/exit_code").read_text().strip() == "0"
    assert any((finished / "tensorboard").iterdir())


def test_metrics_have_one_complete_line_for_every_step(finished: Path) -> None:
    steps = lines(finished, "step")
    assert [record["step"] for record in steps] == list(range(1, 13))
    fields = {
        "kind", "step", "attempt", "loss", "grad_norm", "lr", "num_tokens", "num_loss_tokens", "batch_digest",
        "step_seconds", "tokens_per_second", "mfu", "peak_memory_gib",
    }  # fmt: skip
    assert all(record.keys() == fields for record in steps)
    assert all(math.isfinite(record["loss"]) and record["num_loss_tokens"] > 0 for record in steps)


def test_loss_falls(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["eval_loss_last"] < summary["eval_loss_first"]


def test_export_loads_in_stock_transformers_with_template_and_stop_token(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 7 twice."}], tokenize=False, add_generation_prompt=True
    )
    assert "Say 7 twice." in text
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits).all()


def test_finished_run_says_so_and_exits_0(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert "is finished" in train(finished.parent / "run.yaml", "log.trackers=[tensorboard]")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_changed_recipe_is_refused_by_key_and_both_values(finished: Path) -> None:
    printed = train(finished.parent / "run.yaml", "optim.lr=0.5", code=2)
    assert "optim.lr=0.5" in printed
    assert "0.001" in printed
    assert "Traceback" not in printed


def test_changed_data_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, "optim.stop_after_step=1", code=75)
    data = tmp_path / "data.json"
    data.write_text(data.read_text().replace("10 10", "10 11"))
    assert "data.train" in train(recipe, code=2)


def test_nothing_to_train_exits_65_with_counts(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    printed = train(recipe, "data.seq_len=16", "batch.tokens_per_micro_batch=16", "batch.tokens_per_step=32", code=65)
    assert "60" in printed
    assert "Traceback" not in printed


def test_padded_and_unpacked_rows_train_too(tmp_path: Path) -> None:
    for packing in ("padded", "none"):
        train(write_recipe(tmp_path, packing, data={"packing": packing}, optim={"max_steps": 3}))
        assert len(trajectory(tmp_path / packing)) == 3


def test_early_stopping_exports_the_best_checkpoint(tmp_path: Path) -> None:
    changes = {"eval": {"every_steps": 1, "early_stopping": 2}, "optim": {"lr": 2.0, "schedule": "constant"}}
    printed = train(write_recipe(tmp_path, **changes))
    assert "early stopping" in printed
    scored = {record["step"]: record["eval_loss"] for record in lines(tmp_path / "run", "eval") if record["step"]}
    best = min(scored, key=scored.__getitem__)
    assert f"exporting step {best}" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["exported_step"], summary["eval_loss_exported"]) == (best, scored[best])
    assert f"(exported: step {best} with {scored[best]:.4f})" in printed
    assert len(scored) < 12


def test_a_best_checkpoint_that_was_spoiled_is_not_exported(tmp_path: Path) -> None:
    changes = {
        "eval": {"every_steps": 1, "early_stopping": 99},
        "optim": {"lr": 2.0, "schedule": "constant"},
        "checkpoint": {"keep": 99},
    }
    recipe = write_recipe(tmp_path, **changes)
    train(recipe, "optim.stop_after_step=11", code=75)
    scored = {record["step"]: record["eval_loss"] for record in lines(tmp_path / "run", "eval") if record["step"]}
    best, second = sorted(scored, key=scored.__getitem__)[:2]
    assert best < 11
    shard = next((tmp_path / "run" / "checkpoints" / f"step-{best:08d}").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x40
    shard.write_bytes(content)
    printed = train(recipe)
    assert f"checkpoint of step {best} is bad: {shard.name}: altered" in printed
    assert f"exporting step {second}," in printed


def test_a_checkpoint_of_another_run_is_not_continued(tmp_path: Path) -> None:
    """Both of one recipe but for the learning rate, which the checkpoint alone would not show."""
    for name, lr in (("one", 1e-3), ("other", 1e-2)):
        train(write_recipe(tmp_path, name, optim={"lr": lr}), "optim.stop_after_step=6", code=75)
    ours, theirs = (tmp_path / name / "checkpoints" / "step-00000006" for name in ("one", "other"))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    assert "00000006: manifest.json: of another run" in command("checkpoint", "verify", str(tmp_path / "one"), code=65)
    printed = train(tmp_path / "one.yaml")
    assert "checkpoint of step 6 is bad: manifest.json: of another run" in printed
    assert "resuming after step 3" in printed


def test_never_resuming_starts_anew_and_puts_the_earlier_run_aside(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, "optim.stop_after_step=6", code=75)
    printed = train(recipe, "checkpoint.resume=never", "optim.stop_after_step=3", code=75)
    aside = tmp_path / "run" / "earlier" / "before_attempt_0002"
    assert str(aside) in printed and "run with checkpoint.resume=auto to continue" in printed
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    train(recipe)
    assert [line["step"] for line in lines(tmp_path / "run", "step")] == list(range(1, 13))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12


def test_early_stopping_turned_on_late_exports_the_best_that_was_saved(tmp_path: Path) -> None:
    changes = {
        "eval": {"every_steps": 1},
        "optim": {"lr": 0.5, "schedule": "constant"},
        "checkpoint": {"every_steps": 99},
    }
    recipe = write_recipe(tmp_path, **changes)
    train(recipe, "optim.stop_after_step=7", code=75)
    printed = train(recipe, "eval.early_stopping=1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exported_step"] >= 7, printed


def test_an_adapter_is_not_continued_on_other_base_weights(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, "optim.max_steps=2")
    base = tmp_path / "run" / "export"
    adapter = write_recipe(tmp_path, "adapter", tuning={"method": "lora", "rank": 2}, model={"init": "pretrained"})
    settings = (f"model.path={base}", "model.config=null", "model.tokenizer=null")
    train(adapter, *settings, "optim.stop_after_step=2", code=75)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    printed = train(adapter, *settings, code=2)
    assert "frozen weights (the weights of" in printed and "Traceback" not in printed


def test_tokens_and_losses_are_accounted_to_their_sources(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, optim={"epochs": 2, "max_steps": None})
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": f"Say {n} once.", "output": f"{n}"} for n in range(100, 130)]))
    sources = [str(tmp_path / "data.json"), str(other)]
    train(recipe, f"data.sources.1.path={other}", "data.sources.1.weight=2.0", "--nproc", "2")
    steps, evals = lines(tmp_path / "run", "step"), lines(tmp_path / "run", "eval")
    assert all(sum(line["tokens_by_source"].values()) == line["num_tokens"] for line in steps)
    assert all(sum(line["loss_tokens_by_source"].values()) == line["num_loss_tokens"] for line in steps)
    report = json.loads((tmp_path / "run" / "prepare_report.json").read_text())
    assert [source["copies"] for source in report["sources"]] == [1.0, 2.0]
    trained = sum(line["tokens_by_source"].get(sources[1], 0) for line in steps)
    assert 0.85 < trained / (2 * 2 * report["sources"][1]["tokens"]) <= 1.0  # two epochs, twice, less what is held out
    for line in evals:
        low, high = sorted(line["by_source"].values())
        assert low <= line["eval_loss"] <= high
    assert "<h3>Mix</h3>" in (tmp_path / "run" / "report.html").read_text()


def test_a_resume_elsewhere_is_told_and_not_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint={"every_steps": 1})
    train(recipe, "optim.stop_after_step=1", code=75)
    (newest,) = folders(tmp_path / "run")
    manifest = read_manifest(newest)
    kept = dict(manifest.versions)
    assert kept["torch"] == torch.__version__ and kept["attention kernel"] == "sdpa" and int(kept["threads"]) > 0
    assert "bits may differ" not in train(recipe, "optim.stop_after_step=2", code=75)
    newest = folders(tmp_path / "run")[-1]
    older = replace(read_manifest(newest), versions=kept | {"numpy": "1.0", "head kernel": "another"})
    (newest / "manifest.json").unlink()
    write_manifest(newest, older)
    printed = train(recipe, "optim.stop_after_step=3", code=75)
    assert f"numpy 1.0 -> {kept['numpy']}, head kernel another -> {kept['head kernel']}; bits may differ" in printed

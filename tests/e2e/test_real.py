"""Real instruction data, a real tokenizer and real pretrained weights: full and LoRA, one and two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny_run import lines, train
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


def write(shared: Path, folder: Path, source: str, **changes: dict[str, Any]) -> Path:
    """A recipe on the pretrained 260 K story teller of the shared folder."""
    recipe: dict[str, Any] = {
        "run": {"name": "real", "dir": str(folder / "run")},
        "model": {"path": str(shared / "models/stories260K")},
        "data": {
            "sources": [{"path": str(shared / "data/instruct" / source)}],
            "chat_template": "alpaca",
            "seq_len": 512,
            "eval_fraction": 0.1,
        },
        "batch": {"tokens_per_micro_batch": 1024, "tokens_per_step": 2048},
        "optim": {"max_steps": 40},
        "eval": {"every_steps": 40, "generate": 4, "max_new_tokens": 40},
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    path = folder / "real.yaml"
    path.write_text(json.dumps(recipe))
    return path


def check_learned(run_dir: Path, factor: float) -> None:
    """Validation loss fell below `factor` of its start, and what the model says changed."""
    first, last = lines(run_dir, "eval")[0], lines(run_dir, "eval")[-1]
    assert last["eval_loss"] < factor * first["eval_loss"]
    steps = lines(run_dir, "step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    before, after = ([s["answer"] for s in samples if s["step"] == step] for step in (0, last["step"]))
    assert before != after
    assert sum(map(len, after)) < sum(map(len, before)), "stories run on, answers end"


def test_full_fine_tune_on_alpaca_records_with_two_processes(shared: Path, tmp_path: Path) -> None:
    train(write(shared, tmp_path, "rasbt_instruction_data.json"), "--nproc", "2")
    check_learned(tmp_path / "run", factor=0.75)
    assert torch.isfinite(
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")(torch.tensor([[1, 5]])).logits
    ).all()


def test_lora_on_alpaca_records_with_one_process(shared: Path, tmp_path: Path) -> None:
    changes = {"tuning": {"method": "lora", "rank": 8}, "optim": {"max_steps": 30}}
    train(write(shared, tmp_path, "rasbt_instruction_data.json", **changes))
    check_learned(tmp_path / "run", factor=0.85)
    assert not list((tmp_path / "run/export").glob("model*.safetensors"))
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/export")
    assert torch.isfinite(adapted(torch.tensor([[1, 5]])).logits).all()


def test_lora_shards_on_multi_turn_messages_with_two_processes(shared: Path, tmp_path: Path) -> None:
    changes = {
        "tuning": {"method": "lora", "rank": 8},
        "parallel": {"strategy": "fsdp2"},
        "data": {"chat_template": "chatml", "long_examples": "truncate"},
        "optim": {"max_steps": 20},
        "eval": {"every_steps": 20, "generate": 2, "max_new_tokens": 20},
    }
    train(write(shared, tmp_path, "pt_mt_bench_messages.jsonl", **changes), "--nproc", "2")
    first, last = lines(tmp_path / "run", "eval")[0], lines(tmp_path / "run", "eval")[-1]
    assert last["eval_loss"] < first["eval_loss"]

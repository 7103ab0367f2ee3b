"""Whole runs of the newer methods and optimizers through the command line: killed, resumed, exported, merged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import environment, kill_after, lines, train, trajectory, write_recipe
from torch import nn
from transformers import AutoModelForCausalLM

from sft_dist.config.loader import load_resolved
from sft_dist.models.load import load_model
from sft_dist.models.quantise import dequantise, quantise

pytestmark = pytest.mark.slow

ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "qlora-shards-2": (
        {
            "tuning": {"method": "qlora", "rank": 4},
            "optim": {"lora_plus_ratio": 4, "neftune_alpha": 5, "max_steps": 8},
            "parallel": {"strategy": "fsdp2"},
        },
        2,
    ),
    "prefix-adafactor-1": (
        {"tuning": {"method": "prefix", "virtual_tokens": 4}, "optim": {"name": "adafactor", "max_steps": 8}}, 1
    ),
    "rounded-shards-2": (
        {
            "precision": {"compute": "bfloat16", "master": "bfloat16", "stochastic_rounding": True},
            "optim": {"max_steps": 8},
            "parallel": {"strategy": "fsdp2"},
        },
        2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=CASES.keys())
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(straight, killed and continued, what the restart printed) of one case."""
    changes, nproc = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    changes = changes | {"model": {"config": ARCHITECTURE}, "eval": {"every_steps": 4}}
    recipes = {name: write_recipe(folder, name, **changes) for name in ("straight", "killed")}
    train(recipes["straight"], "--nproc", str(nproc))
    kill_after(recipes["killed"], folder / "killed", step=5, nproc=nproc)
    printed = train(recipes["killed"], "--nproc", str(nproc))
    return folder / "straight", folder / "killed", printed


def test_killed_run_continues_bit_identically(runs: tuple[Path, Path, str]) -> None:
    straight, killed, printed = runs
    assert "resuming after step" in printed  # 3, or 6 where the kill came late
    assert len(trajectory(straight)) == 8
    assert trajectory(killed) == trajectory(straight)
    assert exported(killed) == exported(straight)
    evaluated = [[line["eval_loss"] for line in lines(run, "eval")] for run in (straight, killed)]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 3


def exported(run_dir: Path) -> dict[str, bytes]:
    """Exported tensors as bytes; bfloat16 ones seen as numbers of 16 bits."""
    (path,) = (run_dir / "export").glob("*model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in load_file(path).items()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 40)[None]).logits.float()


def test_the_merged_export_is_the_adapter_on_the_decoded_base(runs: tuple[Path, Path, str], tmp_path: Path) -> None:
    straight, _, _ = runs
    recipe = load_resolved(straight / "config.yaml")
    command = [
        sys.executable,
        "-m",
        "sft_dist",
        "checkpoint",
        "export",
        str(straight),
        "--merge",
        "--out",
        str(tmp_path / "merged"),
    ]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=200)
    if recipe.tuning.method != "qlora":
        assert done.returncode == 2 and "--merge" in done.stderr and recipe.tuning.method in done.stderr
        return
    assert done.returncode == 0, done.stderr
    base = load_model(recipe.model, dtype=torch.float32, seed=recipe.run.seed, vocab_size=0)
    plain = dequantise(quantise(base, torch.float32), torch.float32)
    expected = logits(PeftModel.from_pretrained(plain, straight / "export"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

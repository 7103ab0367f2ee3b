"""Every recipe that ships loads, means the same after it was written out and read again, and fits where it says.

The architectures of real models lie in tests/fixtures/architectures as their public config.json has them, so nothing is
fetched here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from sft_dist.cli.main import main
from sft_dist.config.loader import dump_recipe, load_recipe, load_resolved
from sft_dist.config.shipped import CHECKOUT, find_shipped
from sft_dist.estimate.architecture import read
from sft_dist.estimate.compare import GIB, estimate
from sft_dist.estimate.hardware import find_device

RECIPES = sorted((CHECKOUT / "configs").glob("*.yaml"))
ARCHITECTURES = Path(__file__).resolve().parents[1] / "fixtures" / "architectures"
HEAD = re.compile(
    r"#   world size: (?P<world>\d+)\n"
    r"#   hardware:   (?P<gpus>\d+) x (?P<gpu>[\w-]+)(?: \((?P<nodes>\d+) machines of 8\))?\n"
    r"#   estimate:   (?P<gib>\d+) GiB per GPU "
    r"\(sft-dist estimate (?P<path>\S+) --gpus (?P=gpus) --gpu-type (?P=gpu)\)\n"
    r"#   from hub:   (?P<model>[^ ,]+)"
)


@dataclass(frozen=True)
class Stated:
    """What the head of a recipe for a real model promises."""

    path: Path
    world_size: int
    gpu: str
    gib: int
    model: str


def stated(path: Path) -> Stated:
    found = HEAD.search(path.read_text())
    assert found, f"{path.name} does not state world size, hardware, estimate and model"
    assert found["world"] == found["gpus"] and found["path"] == f"configs/{path.name}"
    assert int(found["world"]) == 8 * int(found["nodes"] or 1) or found["nodes"] is None
    return Stated(path, int(found["world"]), found["gpu"], int(found["gib"]), found["model"])


REAL = [path for path in RECIPES if not path.name.startswith(("alpaca", "quickstart"))]


def test_there_are_recipes() -> None:
    assert {"alpaca_full.yaml", "alpaca_lora.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_loads(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe([path])
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_resolved(copy) == recipe
    assert recipe.run.dir.startswith("runs/")


def test_shipped_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(["configs/alpaca_lora.yaml"]).tuning.method == "lora"
    own = tmp_path / "configs" / "alpaca_lora.yaml"
    own.parent.mkdir()
    own.write_text("model: {path: own}\ndata: {sources: [{path: x}]}\n")
    assert load_recipe(["configs/alpaca_lora.yaml"]).model.path == "own"
    assert find_shipped("configs/none.yaml") == Path("configs/none.yaml")


PUBLISHED = {  # billions of parameters, from the models' own pages
    "meta-llama/Llama-3.2-1B": 1.24, "meta-llama/Llama-3.1-8B": 8.03, "meta-llama/Llama-3.1-70B": 70.6,
    "Qwen/Qwen2.5-0.5B": 0.49, "Qwen/Qwen2.5-32B": 32.8, "Qwen/Qwen2.5-72B": 72.7,
    "Qwen/Qwen3-4B-Base": 4.02, "Qwen/Qwen3-8B-Base": 8.19,
    "mistralai/Mistral-7B-v0.3": 7.25, "google/gemma-3-1b-it": 1.0,
    "microsoft/Phi-3.5-mini-instruct": 3.82, "microsoft/phi-4": 14.7,
}  # fmt: skip


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_a_recipe_for_a_real_model_fits_where_it_says(path: Path) -> None:
    """With the strategy it would run, at the peak that its head names; on the architecture of the published model."""
    head, recipe = stated(path), load_recipe([path])
    assert recipe.model.path == head.model
    local = recipe.model.model_copy(update={"path": str(ARCHITECTURES / head.model)})
    assert read(local).num_parameters / 1e9 == pytest.approx(PUBLISHED[head.model], rel=0.01)
    found = estimate(
        recipe.model_copy(update={"model": local}), find_device(head.gpu, head.world_size), head.world_size
    )
    planned = found.option(found.choices.strategy)
    assert planned.fits and planned.strategy == found.recommended
    assert planned.peak / GIB == pytest.approx(head.gib, abs=1)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_a_recipe_for_a_real_model_checks_and_dry_runs_at_its_world_size(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    head = stated(path)
    assert main(["config", "check", str(path), "--json", "--nproc", str(head.world_size)]) == 0
    world = json.loads(capsys.readouterr().out)["world"]
    assert world.startswith(f"{head.world_size} rank(s) share") and "stay empty" not in world
    assert main(["train", str(path), "--dry-run", "--nproc", str(head.world_size)]) == 0
    printed = capsys.readouterr().out
    assert head.model in printed and "sft_dist.train" in printed


@pytest.mark.parametrize("path", [path for path in REAL if "nodes:" in path.read_text()], ids=lambda path: path.name)
def test_a_recipe_for_several_machines_is_submitted_whole(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = stated(path)
    assert head.world_size == 8 * load_recipe([path]).cluster.nodes
    assert main(["submit", str(path), "cluster.target=slurm", "cluster.partition=gpus", "--dry-run"]) == 0
    line = capsys.readouterr().out
    assert f"--nodes={head.world_size // 8}" in line and "--partition=gpus" in line


def test_every_family_and_size_has_a_recipe() -> None:
    names = {path.name for path in REAL}
    for family in ("llama3", "qwen2.5", "qwen3", "mistral", "gemma3", "phi"):
        assert any(name.startswith(family) for name in names), family
    worlds = {stated(path).world_size for path in REAL}
    assert {1, 8} <= worlds and max(worlds) > 8
    assert {load_recipe([path]).tuning.method for path in REAL} >= {"full", "lora", "qlora"}


def test_ranks_that_do_not_divide_a_step_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    path = CHECKOUT / "configs" / "qwen3-8b_full.yaml"
    assert main(["config", "check", str(path), "--nproc", "5"]) == 0
    assert "5 rank(s) share 8 micro-batches of 16,384 tokens in 2 round(s), 2 of 10 places stay empty" in (
        capsys.readouterr().out
    )
    assert main(["config", "check", str(path), "--nproc", "0"]) == 2
    assert main(["config", "check", str(path), "parallel.sequence=4", "--nproc", "6"]) == 2
    assert "6 process(es) cannot form groups of 4" in capsys.readouterr().err
    assert main(["config", "check", str(path), "parallel.sequence=4", "--nproc", "8"]) == 0
    assert "2 group(s) of 4 ranks share 8 micro-batches" in capsys.readouterr().out

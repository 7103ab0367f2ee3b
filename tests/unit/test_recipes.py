"""Every recipe that ships loads, and means the same after it was written out and read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.config.loader import dump_recipe, load_recipe, load_resolved
from sft_dist.config.shipped import CHECKOUT, find_shipped

RECIPES = sorted((CHECKOUT / "configs").glob("*.yaml"))


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

"""What may change at a resume and what may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.identity import check_recipe, identity
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError


def recipe(run_dir: Path, **sections: Any) -> Recipe:
    base = {"run": {"dir": str(run_dir)}, "model": {"path": "x"}, "data": {"sources": [{"path": "d.json"}]}}
    return Recipe.model_validate(base | sections)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    (tmp_path / "fingerprint.json").write_text(json.dumps({"recipe": identity(recipe(tmp_path))}))
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {"optim": {"stop_after_step": 5}},
        {"eval": {"every_steps": 3}},
        {"checkpoint": {"keep": 5}},
        {"log": {"trackers": ["tensorboard"]}},
        {"parallel": {"strategy": "fsdp2"}},
    ],
    ids=str,
)
def test_cadence_and_place_may_change(started: Path, change: dict[str, Any]) -> None:
    check_recipe(recipe(started, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": {"lr": 0.5}}, ["optim.lr=0.5", "auto"]),
        ({"tuning": {"method": "lora"}}, ["tuning.method=lora", "full"]),
        ({"data": {"sources": [{"path": "other.json"}]}}, ["data.sources.0.path=other.json", "d.json"]),
    ],
    ids=["lr", "method", "source"],
)
def test_what_defines_the_numbers_may_not(started: Path, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_recipe(recipe(started, **change))
    assert all(word in str(caught.value) for word in [*words, str(started)])


def test_a_new_folder_accepts_anything(tmp_path: Path) -> None:
    check_recipe(recipe(tmp_path, optim={"lr": 0.5}))

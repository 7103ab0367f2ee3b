"""Runs killed while a checkpoint is being written in the background continue bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from background_kills import DEATHS
from lives import run_script
from tiny_run import lines, trajectory, weights
from torch import Tensor

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manifest import fault, read_manifest
from sft_dist.checkpoint.shards import empty_tensors, read_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("background")
    run_script(Path(__file__).with_name("background_kills.py"), folder)
    return folder


@pytest.mark.parametrize("name", [f"{point}-{rank}".replace(" ", "-") for point, rank, _ in DEATHS])
def test_killed_while_saving_the_run_ends_as_if_it_was_not(place: Path, name: str) -> None:
    assert trajectory(place / name) == trajectory(place / "straight")
    assert weights(place / name) == weights(place / "straight")
    assert {line["attempt"] for line in lines(place / name, "step")} == {1, 2}
    begun = min(line["step"] for line in lines(place / name, "step") if line["attempt"] == 2) - 1
    assert begun == (6 if name.startswith("after-rename") else 4), begun


def test_saving_in_the_background_changes_no_bit(place: Path) -> None:
    assert trajectory(place / "waited") == trajectory(place / "straight")
    for run in ("waited", "straight"):
        assert len(folders(place / run)) == 2
        assert [fault(folder) for folder in folders(place / run)] == [None, None]
    for waited, straight in zip(folders(place / "waited"), folders(place / "straight"), strict=True):
        found, expected = state(straight), state(waited)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), straight


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint. (The order of the metadata in a file's head is not the same from run to run.)"""
    tensors = empty_tensors(read_manifest(folder), "")
    read_shards(folder, tensors)
    return tensors

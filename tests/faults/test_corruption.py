"""R-8: whatever differs from what was committed is found, named, set aside, and the checkpoint before it is used.

Real checkpoints of a small model, in one process. The seeds are in the ids: run one case again by its id.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sft_dist.checkpoint import shards
from sft_dist.checkpoint.catalog import folders, set_aside
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.manifest import MANIFEST_NAME, folder_step
from sft_dist.errors import CheckpointError


def tensors(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {f"model.{name}": torch.randn(17, 9, generator=draw) for name in "abc"}


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints of steps 1, 2 and 3, of several files each."""
    run_dir = tmp_path_factory.mktemp("committed")
    limit, shards.FILE_BYTES = shards.FILE_BYTES, 600
    try:
        manager = CheckpointManager(run_dir, keep=3)
        for step in (1, 2, 3):
            manager.save(step, tensors(step), {"step": step})
    finally:
        shards.FILE_BYTES = limit
    assert len(list(folders(run_dir)[-1].iterdir())) == 4
    return run_dir


@pytest.fixture
def run_dir(committed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(committed, tmp_path / "run"))


def pick(source: random.Random, folder: Path) -> Path:
    return source.choice(sorted(folder.iterdir()))


def expect_fallback(run_dir: Path, damaged: Path, to_step: int = 2) -> None:
    """The newest good one is `to_step`, its tensors are right, and one notice names the file of the bad one."""
    notices: list[str] = []
    manager = CheckpointManager(run_dir, keep=3, notice=notices.append)
    newest = manager.newest_good()
    assert newest is not None and folder_step(newest) == to_step
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    assert manager.load(newest, found) == {"step": to_step}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(to_step).items())
    (notice,) = notices
    assert notice.startswith(f"checkpoint of step 3 is bad: {damaged.name}: "), notice
    assert [path.name for path in set_aside(run_dir)] == ["step-00000003.bad-1"]
    assert "set aside as step-00000003.bad-1" in notice


@pytest.mark.parametrize("seed", range(100))
def test_a_flipped_bit(run_dir: Path, seed: int) -> None:
    source = random.Random(f"flip {seed}")
    path = pick(source, folders(run_dir)[-1])
    data = bytearray(path.read_bytes())
    bit = source.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    expect_fallback(run_dir, path)


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_file(run_dir: Path, seed: int) -> None:
    source = random.Random(f"cut {seed}")
    path = pick(source, folders(run_dir)[-1])
    data = path.read_bytes()
    path.write_bytes(data[: source.randrange(len(data))])
    expect_fallback(run_dir, path)


@pytest.mark.parametrize("seed", range(20))
def test_a_page_of_zeros(run_dir: Path, seed: int) -> None:
    """What a file system leaves after a power cut: the right size, and holes."""
    source = random.Random(f"zeros {seed}")
    path = pick(source, folders(run_dir)[-1])
    data = bytearray(path.read_bytes())
    start = source.randrange(0, len(data) - 64)
    data[start : start + 64] = bytes(64)
    assert data != path.read_bytes()
    path.write_bytes(data)
    expect_fallback(run_dir, path)


@pytest.mark.parametrize("seed", range(20))
def test_a_removed_file(run_dir: Path, seed: int) -> None:
    path = pick(random.Random(f"remove {seed}"), folders(run_dir)[-1])
    path.unlink()
    expect_fallback(run_dir, path)


@pytest.mark.parametrize("seed", range(20))
def test_a_file_of_another_checkpoint(run_dir: Path, seed: int) -> None:
    source = random.Random(f"swap {seed}")
    path = pick(source, folders(run_dir)[-1])
    shutil.copyfile(folders(run_dir)[source.randrange(2)] / path.name, path)
    expect_fallback(run_dir, path)


@pytest.mark.parametrize("seed", range(5))
def test_a_file_that_nobody_wrote(run_dir: Path, seed: int) -> None:
    """A shard of another world size, which the reader of torch would have taken in."""
    source = random.Random(f"extra {seed}")
    newest = folders(run_dir)[-1]
    whole = source.choice([path for path in newest.iterdir() if path.name != MANIFEST_NAME])
    extra = newest / f"shard-{source.randrange(2, 9):05d}-model-00001-of-00001.safetensors"
    shutil.copyfile(whole, extra)
    expect_fallback(run_dir, extra)


def test_a_whole_checkpoint_under_another_ones_name(run_dir: Path) -> None:
    oldest, _, newest = folders(run_dir)
    shutil.rmtree(newest)
    shutil.copytree(oldest, newest)
    expect_fallback(run_dir, newest / MANIFEST_NAME)


def test_with_all_of_them_bad_nothing_starts_from_nothing(run_dir: Path) -> None:
    for path in folders(run_dir):
        (path / MANIFEST_NAME).unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint is bad") as error:
            CheckpointManager(run_dir, notice=lambda text: None).newest_good()
        assert error.value.exit_code == 65

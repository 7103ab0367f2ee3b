"""The commit protocol in one process: nothing half-written, nothing overwritten, errors with room and remedy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sft_dist.checkpoint import disk
from sft_dist.checkpoint.catalog import find, folders, list_checkpoints
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.shards import spread
from sft_dist.errors import CheckpointError, NonFiniteError, StorageError

Usage = namedtuple("Usage", "total used free")


def tensors(value: float, size: int = 10) -> dict[str, Tensor]:
    return {
        "model.w": torch.full((size,), float(value)),
        "optim.w.exp_avg": torch.full((size,), float(value)).bfloat16(),
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_state_comes_back_bit_for_bit_with_its_meta(tmp_path: Path) -> None:
    odd = {"model.w": torch.tensor([-0.0, 1e-45, 3.4e38, 0.1]), "model.b": torch.tensor([[0.1]]).bfloat16()}
    manager = CheckpointManager(tmp_path)
    path = manager.save(3, odd, {"loss": 1 / 3})
    loaded = {name: torch.ones_like(tensor) for name, tensor in odd.items()}
    assert manager.load(path, loaded) == {"loss": 1 / 3}
    for name, tensor in odd.items():
        assert torch.equal(tensor.view(torch.uint8), loaded[name].view(torch.uint8)), name


def test_parameters_that_require_gradients_are_saved_and_filled(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, {"model.w": parameter}, {})
    target = torch.nn.Parameter(torch.zeros(3))
    manager.load(path, {"model.w": target})
    assert torch.equal(target, parameter)


def test_nothing_saved_yet_is_none(tmp_path: Path) -> None:
    assert CheckpointManager(tmp_path).newest_good() is None


def test_a_good_step_is_not_written_again(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, tensors(1), {"try": 1})
    assert CheckpointManager(tmp_path).save(1, tensors(2), {"try": 2}) == path
    assert manager.load(path, tensors(0)) == {"try": 1}


def test_a_bad_step_is_set_aside_and_written_again(tmp_path: Path) -> None:
    notices: list[str] = []
    CheckpointManager(tmp_path).save(1, tensors(1), {"try": 1})
    (folders(tmp_path)[0] / "manifest.json").unlink()
    manager = CheckpointManager(tmp_path, notice=notices.append)
    path = manager.save(1, tensors(2), {"try": 2})
    assert manager.load(path, tensors(0)) == {"try": 2}
    assert [notice.partition(" (")[0] for notice in notices] == [
        "checkpoint of step 1 is bad: manifest.json: cannot be read"
    ]


def test_what_this_manager_has_committed_itself_is_proven_before_it_is_read(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, tensors(1), {})
    for _ in range(2):  # what was proven is proven once more the next time
        assert manager.newest_good() == path
        manager.load(path, tensors(0))
    shard = next(path.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x40
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: altered"):
        manager.load(path, tensors(0))


def test_a_checkpoint_of_another_run_is_bad(tmp_path: Path) -> None:
    notices: list[str] = []
    for step, run in enumerate(("one", "other", None), 1):
        path = CheckpointManager(tmp_path / str(run), run=run).save(step, tensors(step), {})
        if run != "one":
            shutil.copytree(path, tmp_path / "one/checkpoints" / path.name)
    manager = CheckpointManager(tmp_path / "one", run="one", notice=notices.append)
    assert manager.newest_good() == tmp_path / "one/checkpoints/step-00000001"
    assert "step 3 is bad: manifest.json: of another run (None, this one is one)" in notices[0]
    assert "step 2 is bad: manifest.json: of another run (other, this one is one)" in notices[1]
    before_names = CheckpointManager(tmp_path / "other", notice=notices.append)
    assert before_names.newest_good() and len(notices) == 2  # such a run cannot tell


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-00000001"])
def test_the_sticky_bit_does_not_close_a_folder_to_others(tmp_path: Path, place: str) -> None:
    """Who may not replace a checkpoint may add one; but not where the folder of checkpoints is kept by it."""
    CheckpointManager(tmp_path).save(1, tensors(1), {})
    tmp_path.chmod(0o1777)
    assert CheckpointManager(tmp_path).newest_good()
    (tmp_path / place).chmod(0o1777)
    with pytest.raises(CheckpointError, match="anyone on this machine may change it"):
        CheckpointManager(tmp_path).newest_good()


def test_a_checkpoint_that_this_machine_does_not_see_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank on another node than rank 0, which sees it: the folder gets its name after the third look."""
    path = CheckpointManager(tmp_path).save(1, tensors(1), {})
    hidden, looks = path.rename(path.with_name("not-yet")), []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            hidden.rename(path)

    manager = CheckpointManager(tmp_path)
    monkeypatch.setattr(manager.ranks, "from_main", lambda value: [path.name] if value == [] else True)
    monkeypatch.setattr(disk.wait_to_see, "__defaults__", (pause,))
    assert manager.newest_good() == path and len(looks) == 3


def test_one_that_never_comes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "VISIBLE_SECONDS", 0.0)
    disk.wait_to_see(tmp_path / "step" / "manifest.json", lambda seconds: pytest.fail("waits on"))


def test_what_killed_saves_left_behind_is_cleared(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save(1, tensors(1), {})
    (tmp_path / "checkpoints" / ".tmp-dead").mkdir()
    CheckpointManager(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 40, 60))
    with pytest.raises(StorageError, match=r"needs 0\.0 MiB, has 0\.0 MiB free: make room or move run\.dir"):
        manager.save(1, tensors(1), {})
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_the_older_state(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(small_disk)
    first = manager.save(1, tensors(1), {})
    monkeypatch.setattr("sft_dist.checkpoint.manager.check_space", lambda folder, size: None)
    with pytest.raises(StorageError, match=r"No space left on device.*free: make room or move run\.dir") as error:
        manager.save(2, tensors(2, size=1_000_000), {})
    assert error.value.exit_code == 74
    assert list((small_disk / "checkpoints").iterdir()) == [first]
    assert manager.load(first, tensors(0)) == {}
    assert manager.save(2, tensors(2), {}).name == "step-00000002"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_state_is_never_committed(tmp_path: Path, value: float) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(NonFiniteError, match=r"optim\.w\.exp_avg holds a NaN or infinity"):
        manager.save(1, tensors(1) | {"optim.w.exp_avg": torch.tensor([0.0, value])}, {})
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model.w": torch.zeros(11)}, r"model\.w is float32\[10\] in the checkpoint and float32\[11\] in this run"),
        ({"model.w": torch.zeros(10).double()}, r"model\.w is float32\[10\] in the checkpoint and float64\[10\]"),
        ({"model.x": torch.zeros(1)}, r"model\.x is absent in the checkpoint and float32\[1\] in this run"),
    ],
    ids=["shape", "dtype", "name"],
)
def test_other_tensors_than_the_saved_ones_are_refused(tmp_path: Path, changed: dict[str, Tensor], words: str) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, tensors(1), {})
    with pytest.raises(CheckpointError, match=words):
        manager.load(path, tensors(0) | changed)


def test_load_proves_what_another_process_wrote(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path).save(1, tensors(1), {})
    (shard,) = path.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match=f"{shard.name}: altered"):
        CheckpointManager(tmp_path).load(path, tensors(0))


def test_catalog_lists_proves_and_finds_without_changing_anything(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=3)
    for step in (1, 2, 3):
        manager.save(step, tensors(step), {})
    (shard,) = (folders(tmp_path)[2]).glob("shard-*")
    shard.unlink()
    assert [c.fault for c in list_checkpoints(tmp_path)] == [None, None, None]
    assert [c.fault for c in list_checkpoints(tmp_path, proven=True)] == [None, None, f"{shard.name}: missing"]
    assert find(tmp_path).name == "step-00000002"
    assert find(tmp_path, 1).name == "step-00000001"
    with pytest.raises(CheckpointError, match=r"shard-.*missing"):
        find(tmp_path, 3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; there are: 1, 2, 3"):
        find(tmp_path, 9)
    assert len(folders(tmp_path)) == 3


def test_files_are_bounded_by_size_and_the_same_on_every_rank() -> None:
    sizes = {"a": torch.empty(10), "b": torch.empty(10), "c": torch.empty(100), "d": torch.empty(1)}
    assert spread(sizes, limit_bytes=80) == {"a": 1, "b": 1, "c": 2, "d": 3}


SAVE = """
import sys, torch
from sft_dist.checkpoint.manager import CheckpointManager
manager = CheckpointManager(sys.argv[1])
print("marker", file=open(sys.argv[1] + "/start", "w"))
manager.save(1, {"model.w": torch.ones(10)}, {})
"""


def test_everything_is_durable_before_the_rename_and_the_rename_after_it(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-y",
        "-s",
        "300",
        "-e",
        "trace=fsync,fdatasync,rename,renameat,renameat2",
        "-o",
        str(trace),
    ]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    subprocess.run([*command, sys.executable, "-c", SAVE, str(run_dir)], check=True, capture_output=True)
    calls = []
    for line in trace.read_text().splitlines():
        if match := re.search(r"(fsync|rename\w*)\((.*)\) += 0$", line):
            places = [Path(p).name for p in re.findall(r'[<"]([^>"]+)[>"]', match[2]) if "/checkpoints" in p]
            calls.append((match[1], *[re.sub(r"\.tmp-\w+", "TMP", place) for place in places]))
    calls = [call for call in calls if len(call) > 1]
    shard = "shard-00001-model-00001-of-00001.safetensors"
    manifest = calls.index(("fsync", "manifest.json"))
    rename = calls.index(("rename", "TMP", "step-00000001"))
    assert calls.index(("fsync", shard)) < manifest < calls.index(("fsync", "TMP")) < rename
    assert ("fsync", "checkpoints") in calls[rename:]

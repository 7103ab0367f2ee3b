"""Saving in the background, in one process: what is committed, when, and what errors become."""

from __future__ import annotations

import errno
import gc
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sft_dist.checkpoint import background
from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.host_copy import HostCopy
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.errors import NonFiniteError, StorageError


def tensors(value: float) -> dict[str, Tensor]:
    return {"model.w": torch.full((100, 3), value), "optim.w.exp_avg": torch.full((100, 3), value)}


def names(run_dir: Path) -> list[str]:
    return [path.name for path in folders(run_dir)]


def leftovers(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".tmp-*"))


class Gate:
    """Holds the writing thread at a fail point until it is opened."""

    def __init__(self, point: str) -> None:
        self.point, self.reached, self.opened = point, threading.Event(), threading.Event()

    def __call__(self, name: str) -> None:
        if name == self.point:
            self.reached.set()
            assert self.opened.wait(30)


def test_the_state_at_the_save_is_committed_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    gate = Gate("before write")
    manager = CheckpointManager(tmp_path, fail_point=gate)
    saver, state = BackgroundSaver(manager), tensors(1.0)
    saver.begin(1, state, {"step": 1})
    assert gate.reached.wait(30)
    saver.wait_for_copy()
    for tensor in state.values():
        tensor.fill_(2.0)  # the next step
    assert not saver.is_written
    gate.opened.set()
    saver.commit()
    assert names(tmp_path) == ["step-00000001"]
    loaded = tensors(0.0)
    assert CheckpointManager(tmp_path).load(folders(tmp_path)[0], loaded) == {"step": 1}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1.0).items())


def test_a_save_takes_as_long_as_writing_and_committing_it_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the steps between them, of which the cadence of saves and the time limit would learn wrongly."""
    now = 0.0

    def write_for(seconds: float) -> Callable[[str], None]:
        def spend(name: str) -> None:
            nonlocal now
            now += seconds * (name == "before write") + 0.5 * (name == "before rename")

        return spend

    monkeypatch.setattr(background, "time", SimpleNamespace(monotonic=lambda: now))
    saver = BackgroundSaver(CheckpointManager(tmp_path, fail_point=write_for(3.0)))
    saver.begin(1, tensors(1.0), {})
    while not saver.is_written:
        threading.Event().wait(0.01)
    now += 100.0  # a long step
    saver.commit()
    assert saver.slowest_seconds == 3.5
    waiting = BackgroundSaver(CheckpointManager(tmp_path, fail_point=write_for(7.0)))
    waiting.try_save(2, tensors(2.0), {})
    assert waiting.slowest_seconds == 7.5


def test_what_is_not_copied_yet_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, updated, take = threading.Event(), threading.Event(), HostCopy.take

    def take_late(self: HostCopy, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert copying.wait(30)
        return take(self, originals)

    def update() -> None:
        saver.wait_for_copy()
        state["model.w"].fill_(2.0)
        updated.set()

    monkeypatch.setattr(HostCopy, "take", take_late)
    saver, state = BackgroundSaver(CheckpointManager(tmp_path)), tensors(1.0)
    saver.begin(1, state, {})
    threading.Thread(target=update).start()
    assert not updated.wait(0.1)
    copying.set()
    assert updated.wait(30)
    saver.commit()
    loaded = tensors(0.0)
    CheckpointManager(tmp_path).load(folders(tmp_path)[0], loaded)
    assert torch.equal(loaded["model.w"], tensors(1.0)["model.w"])


def test_copies_are_not_copied_again_nor_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fit", "take"):
        monkeypatch.setattr(HostCopy, name, lambda *_: pytest.fail("copied once more"))
    gate = Gate("before write")
    saver, state = BackgroundSaver(CheckpointManager(tmp_path, fail_point=gate)), tensors(1.0)
    held = weakref.ref(state["model.w"])
    saver.begin(1, state, {"step": 1}, are_copies=True)
    del state
    saver.wait_for_copy()
    assert gate.reached.wait(30) and not saver.is_written
    gate.opened.set()
    saver.commit()
    loaded = tensors(0.0)
    assert CheckpointManager(tmp_path).load(folders(tmp_path)[0], loaded) == {"step": 1}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1.0).items())
    assert held() is None


def test_copies_of_a_save_that_failed_are_not_kept(tmp_path: Path) -> None:
    def full(name: str) -> None:
        if name == "before write":
            raise StorageError("no room")

    saver, state = BackgroundSaver(CheckpointManager(tmp_path, fail_point=full)), tensors(1.0)
    held = weakref.ref(state["model.w"])
    gc.disable()  # what only a search for cycles would free stays beside the next state
    try:
        saver.begin(1, state, {"step": 1}, are_copies=True)
        del state
        saver.commit()
        assert held() is None
    finally:
        gc.enable()
    assert not names(tmp_path) and not leftovers(tmp_path)


def test_the_copying_thread_moves_to_the_gpu_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, so with a stream that only says what it was asked for, in which order."""
    asked: list[str] = []

    class Stream:
        device = "GPU 3"

        def wait_event(self, event: str) -> None:
            asked.append(f"behind {event}")

        def synchronize(self) -> None:
            asked.append(f"wait, {copy.tensors['model.w'][0, 0]:g} is copied")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        asked.append("copy")
        yield

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(f"to {device}"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    copy, state = HostCopy(), tensors(7.0)
    copy.fit(state)
    copy._stream, copy._done = Stream(), "the update"  # type: ignore[assignment]
    copy.take(state)
    assert asked == ["to GPU 3", "behind the update", "copy", "wait, 7 is copied"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_copy_is_of_what_was_queued_before_the_save(tmp_path: Path) -> None:
    """The thread copies while the GPU is still at work; what is queued after `wait_for_copy` comes too late for it."""
    state = {"model.w": torch.zeros(4096, 1024, device="cuda"), "optim.w.step_size": torch.zeros(3, device="cuda")}
    busy = torch.ones(4096, 4096, device="cuda")
    saver = BackgroundSaver(CheckpointManager(tmp_path))
    for step in (1, 2, 3):
        for tensor in state.values():
            busy @= busy / 4096
            tensor.fill_(step)
        saver.begin(step, state, {})
        saver.wait_for_copy()
        for tensor in state.values():
            tensor.fill_(-1)
    saver.save(4, state, {})
    loaded = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    CheckpointManager(tmp_path).load(folders(tmp_path)[0], loaded)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert all(bool((tensor == 3).all()) for tensor in loaded.values())


def test_what_one_rank_alone_has_met_ends_it_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: HostCopy, originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise MemoryError("no room for the copy")

    monkeypatch.setattr(HostCopy, "take", take)
    saver = BackgroundSaver(CheckpointManager(tmp_path))
    saver.begin(1, tensors(1.0), {})
    saver.wait_for_copy()
    with pytest.raises(MemoryError, match="no room for the copy"):
        while not saver.is_written:
            threading.Event().wait(0.001)


def test_what_cannot_be_deleted_is_told_and_costs_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    told: list[str] = []
    saver = BackgroundSaver(CheckpointManager(tmp_path, keep=1, notice=told.append))
    saver.save(1, tensors(1.0), {})
    monkeypatch.setattr(shutil, "rmtree", refuse)
    saver.begin(2, tensors(2.0), {})
    saver.close()
    assert names(tmp_path) == ["step-00000002"] and len(leftovers(tmp_path)) == 1
    assert len(told) == 1 and told[0].startswith("warning: old checkpoints were not deleted: "), told
    assert "Read-only file system" in told[0]


def test_a_later_boundary_commits_what_is_written(tmp_path: Path) -> None:
    saver = BackgroundSaver(CheckpointManager(tmp_path))
    saver.begin(1, tensors(1.0), {})
    assert names(tmp_path) == []  # never by the thread
    while not saver.is_written:
        threading.Event().wait(0.001)
    assert names(tmp_path) == []
    saver.commit()
    assert names(tmp_path) == ["step-00000001"] and not leftovers(tmp_path)
    assert not saver.is_written


def test_the_next_save_commits_the_one_before_and_old_ones_go(tmp_path: Path) -> None:
    saver = BackgroundSaver(CheckpointManager(tmp_path, keep=2))
    for step in (1, 2, 3, 4):
        saver.begin(step, tensors(step), {}, also_keep=1)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    saver.save(5, tensors(5.0), {})
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_process_that_ends_meanwhile_leaves_nothing_loadable(tmp_path: Path) -> None:
    gate = Gate("after write")
    saver = BackgroundSaver(CheckpointManager(tmp_path, fail_point=gate))
    saver.begin(1, tensors(1.0), {})
    assert gate.reached.wait(30)
    assert names(tmp_path) == [] and len(leftovers(tmp_path)) == 1
    assert CheckpointManager(tmp_path).newest_good() is None  # what the next attempt finds
    assert not leftovers(tmp_path)
    gate.opened.set()


def test_nonfinite_state_is_found_at_the_next_boundary_and_never_committed(tmp_path: Path) -> None:
    saver, poisoned = BackgroundSaver(CheckpointManager(tmp_path)), tensors(2.0)
    saver.save(1, tensors(1.0), {})
    poisoned["optim.w.exp_avg"][7, 1] = float("inf")
    saver.begin(2, poisoned, {})
    with pytest.raises(NonFiniteError, match=r"optim\.w\.exp_avg holds a NaN or infinity: nothing was saved"):
        saver.commit()
    assert names(tmp_path) == ["step-00000001"] and not leftovers(tmp_path)
    saver.save(3, tensors(3.0), {})  # and the saver is free again
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_disk_that_refuses_the_thread_gives_the_same_line_as_a_save_that_is_waited_for(tmp_path: Path) -> None:
    def lose(name: str) -> None:
        if name == "before write":
            for folder in filter(Path.is_dir, leftovers(tmp_path)):
                folder.rmdir()
                folder.write_text("a file where the folder was")

    told: list[str] = []
    for save in ("try_save", "begin"):
        manager = CheckpointManager(tmp_path, fail_point=lose, notice=told.append)
        saver = BackgroundSaver(manager)
        for step in (1, 2, 3):
            with pytest.raises(StorageError, match="3 saves in a row") if step == 3 else nullcontext():
                getattr(saver, save)(step, tensors(1.0), {})
                saver.commit()
        for file in leftovers(tmp_path):
            file.unlink()
    plain = [re.sub(r"tmp-\w+|[\d.]+ \w?i?B", "", line) for line in told]
    assert len(told) == 4 and plain[:2] == plain[2:], told
    assert "step 1 was not saved" in told[0] and "cannot be written" in told[0]
    assert names(tmp_path) == []


def test_another_set_of_tensors_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    saver = BackgroundSaver(CheckpointManager(tmp_path))
    saver.begin(1, tensors(1.0), {})
    saver.begin(2, {"model.v": torch.ones(2, dtype=torch.bfloat16)}, {})
    saver.commit()
    loaded = {"model.v": torch.zeros(2, dtype=torch.bfloat16)}
    CheckpointManager(tmp_path).load(folders(tmp_path)[1], loaded)
    assert loaded["model.v"].tolist() == [1, 1]

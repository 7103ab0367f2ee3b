"""What decides prepared rows decides their cache's name; what does not leaves it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_dist import inputs
from sft_dist.data import cache
from sft_dist.resilience import watchdog
from sft_dist.resilience.heartbeat import Heart, Heartbeats
from tests.preparing import byte_tokenizer, make_recipe, records, write_lines


@pytest.mark.parametrize(("file", "is_other"), [("token_masks.py", True), ("splits.py", True), ("packing.py", False)])
def test_one_byte_of_the_code_that_makes_rows_is_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, is_other: bool
) -> None:
    code = shutil.copytree(Path(cache.__file__).parent, tmp_path / "data", ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(cache, "__file__", str(code / "cache.py"))
    before = cache.code_digest.__wrapped__()
    assert before == cache.code_digest()
    changed = bytearray((code / file).read_bytes())
    changed[-2] ^= 1
    (code / file).write_bytes(changed)
    assert (cache.code_digest.__wrapped__() != before) == is_other


@pytest.mark.parametrize(("asked", "is_other"), [("ignore", False), ("together", True), ("drop", True)])
def test_the_library_that_finds_near_duplicates_names_what_it_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, is_other: bool
) -> None:
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(3)), near_duplicates=asked)
    before = cache.cache_name(recipe, byte_tokenizer(), "", {})
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99" if name == "rensa" else version(name))
    assert (cache.cache_name(recipe, byte_tokenizer(), "", {}) != before) == is_other


class Scripted:
    """A clock whose sleeps are what the holder of a lock does meanwhile, one after another."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self.now, self._steps = 0.0, list(steps)
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self._steps.pop(0)()


def nothing() -> None:
    """The holder hangs, or is at something that it does not tell."""


def test_who_waits_is_alive_as_long_as_the_holder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, heard, told = tmp_path / "lock", list[float](), list[str]()
    with ExitStack() as holder:
        goes_on = holder.enter_context(cache.only_one(lock, nothing))
        os.utime(lock, (1, 1))

        def again() -> None:
            goes_on()
            os.utime(lock, (2 + len(heard),) * 2)  # the clock of a file system may be coarser than this test is fast

        clock = Scripted(*[nothing] * 5, goes_on, nothing, again, nothing, nothing, holder.close)
        monkeypatch.setattr(cache, "time", clock)
        with cache.only_one(lock, lambda: told.append("waits"), lambda: heard.append(len(clock.slept))):
            pass
    assert told == ["waits"] and heard == [6, 8]
    assert clock.slept == [0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1, 1, 1, 1]


def test_a_holder_dates_its_lock_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, dated = Scripted(), list[float]()
    monkeypatch.setattr(cache, "time", clock)
    monkeypatch.setattr(cache, "os", SimpleNamespace(utime=lambda file: dated.append(clock.now)))
    with cache.only_one(tmp_path / "lock", nothing) as goes_on:
        for tenth in range(31):
            clock.now = tenth / 10
            goes_on()
    assert dated == [0, 1, 2, 3]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_rank_that_waits_three_hours_is_judged_by_who_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """The watchdog of a run whose ranks only wait: silent only where the process that prepares is."""
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(40)))
    monkeypatch.setattr(inputs, "load_tokenizer", lambda model: byte_tokenizer())
    entry = inputs.read_inputs(recipe, lambda line: None).data.folder
    shutil.rmtree(entry)
    lock, shared, found = entry.with_suffix(".lock"), Heartbeats(1), list[bool]()
    monkeypatch.setattr(inputs, "heart", lambda: Heart(shared.memory, 0))
    judge, beats = watchdog.Watchdog("auto", 0.0), iter(range(1, 20_000))
    with ExitStack() as holder:
        holder.enter_context(cache.only_one(lock, nothing))

        def works() -> None:
            if not hangs:
                os.utime(lock, (next(beats),) * 2)
            found.append(judge.finds_hang({0: shared.read(0)}, clock.now))

        clock = Scripted(*[works] * 3 * 3600, holder.close)
        monkeypatch.setattr(cache, "time", clock)
        inputs.read_inputs(recipe, lambda line: None)
    shared.close()
    assert any(found) == hangs and len(found) == 3 * 3600

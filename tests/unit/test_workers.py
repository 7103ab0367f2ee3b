"""Workers start light, answer in order, and never outlive who started them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import worker_actions
from preparing import byte_tokenizer, make_recipe, records, write_lines

from sft_dist.data.prepare import rules_of
from sft_dist.data.shards import ShardCache, chunks
from sft_dist.data.sources import Rejects
from sft_dist.data.templates import resolve_template
from sft_dist.data.workers import Workers
from sft_dist.errors import BadRecord, DataError

HEAVY = {"torch", "transformers", "datasets", "pandas", "huggingface_hub", "numba"}
CALLER = """
import worker_actions
from sft_dist.data.workers import Workers
with Workers(worker_actions.stuck, 2) as workers:
    list(workers.map(enumerate("abc")))
"""


def shard_cache(folder: Path) -> tuple[ShardCache, object]:
    """A cache, and the task of its first shard."""
    source = write_lines(folder / "a.jsonl", records(50))
    recipe, tokenizer = make_recipe(folder, source), byte_tokenizer()
    rules = rules_of(recipe, tokenizer, resolve_template("chatml", tokenizer))
    cache = ShardCache(folder / "shards", rules, "0" * 64)
    chunk = next(chunks(recipe.data.sources[0], Rejects()))
    return cache, cache.task(chunk)


def test_a_worker_makes_shards_without_torch(tmp_path: Path) -> None:
    cache, task = shard_cache(tmp_path)
    with Workers(worker_actions.Loaded(cache.make), 1, cache.expect_many) as workers:
        [(_, loaded)] = workers.map([(0, task)])
    assert cache.read(task.name) is not None
    assert "sft_dist" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("num", [0, 2])
def test_answers_come_in_order_and_errors_in_their_place(num: int) -> None:
    tasks = [(key, None if key == 3 else 2 * key) for key in range(20)]
    with Workers(worker_actions.doubled, num) as workers:
        assert list(workers.map(tasks)) == [(key, None if key == 3 else 4 * key) for key in range(20)]
        answers = workers.map(enumerate([2, 4, 5, 6]))
        assert [next(answers), next(answers)] == [(0, 4), (1, 8)]
        with pytest.raises(BadRecord, match="5 is odd"):
            next(answers)


def test_workers_are_forked_by_one_thread_and_hold_nothing_of_each_other(tmp_path: Path) -> None:
    cache, _ = shard_cache(tmp_path)
    with Workers(worker_actions.surroundings, 3, cache.expect_many) as workers:
        found = [result for _, result in workers.map(enumerate(repeat("x", 12)))]
    assert {one["threads"] for one in found} == {1}
    assert {one["sockets"] for one in found} == {1}
    assert os.getpid() not in {one["pid"] for one in found}


def test_a_worker_that_is_killed_is_told() -> None:
    with Workers(worker_actions.killed, 2) as workers:
        for _ in range(2):  # the second time it is known to be dead
            with pytest.raises(DataError, match=r"died with exit code -9 \(-9: often too little memory\); lower data"):
                list(workers.map(enumerate("ab")))


def test_what_ends_before_there_are_workers_is_told() -> None:
    told = pytest.raises(DataError, match="died with exit code 3 ")
    with Workers(worker_actions.doubled, 2, partial(sys.exit, 3)) as workers, told:
        list(workers.map(enumerate([2, 4])))


@pytest.mark.parametrize("victim", ["caller", "server"])
def test_nobody_outlives_who_started_him(victim: str) -> None:
    """The caller is killed; or the process that workers are forks of, and then the caller ends."""
    here = Path(worker_actions.__file__).parent
    paths = os.pathsep.join([str(here), *sys.path])
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER], env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
    )
    with caller:
        assert caller.stderr is not None
        told = [tuple(map(int, caller.stderr.readline().split())) for _ in range(2)]
        server = told[0][1]
        assert told[1][1] == server != caller.pid
        watched = [os.pidfd_open(pid) for pid in (told[0][0], told[1][0], server)]
        if victim == "server":
            os.kill(server, 9)
        caller.kill()
    for one in watched:
        assert select.select([one], [], [], 20.0)[0], "it still runs"
        os.close(one)

"""Held-out splits: exact counts per source, duplicates on one side, independent of order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.splits import EVAL, TEST, TRAIN, content_key, draw_splits, hang_together
from sft_dist.types import Conversation, Message, TokenizedExample


def draw(contents: list[str], eval_fraction: float, test_fraction: float, seed: int = 0, sources=None) -> list[int]:
    keys = [
        content_key(Conversation((Message("user", text), Message("assistant", "a")), source="f", id=f"f:{i}"))
        for i, text in enumerate(contents)
    ]
    places = np.zeros(len(keys), np.int64) if sources is None else np.array(sources)
    named = np.array(keys, np.uint64)
    return draw_splits(named, named, places, eval_fraction, test_fraction, seed).tolist()


@given(st.lists(st.tuples(st.sampled_from(["user", 'a"b']), st.text(), st.booleans()), min_size=1, max_size=3))
def test_a_content_key_is_a_hash_of_json(turns):
    """Written by hand because it is faster; no two conversations may come out alike."""
    extra = {"tool_calls": [{"b": 1, "a": "é"}]}
    talk = Conversation(tuple(Message(role, text, extra=extra if calls else {}) for role, text, calls in turns))
    said = [[[role, text, extra if calls else {}] for role, text, calls in turns], []]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()
    assert content_key(talk) == int.from_bytes(digest[:8], "little")


@given(
    st.lists(st.text(max_size=2), max_size=60),
    st.sampled_from([0.0, 0.02, 0.5, 0.99]),
    st.sampled_from([0.0, 0.1, 0.99]),
    st.integers(0, 3),
)
def test_duplicates_stay_together_and_counts_are_exact(
    contents: list[str], part: float, test: float, seed: int
) -> None:
    sides: dict[str, set[int]] = {}
    for content, split in zip(contents, draw(contents, part, test, seed), strict=True):
        sides.setdefault(content, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    unique = len(sides)
    count = Counter(next(iter(found)) for found in sides.values())
    assert count[TRAIN] >= min(unique, 1)
    assert count[EVAL] == (0 if part == 0 else max(0, min(max(1, round(part * unique)), unique - 1)))
    assert test > 0 or count[TEST] == 0


def test_each_source_gives_its_share_and_keeps_some() -> None:
    names = [f"{source} {i}" for source, num in enumerate((100, 20, 1)) for i in range(num)]
    sources = [0] * 100 + [1] * 20 + [2]
    splits = draw(names, 0.1, 0.05, sources=sources)
    held = Counter(zip(sources, splits, strict=True))
    assert [held[source, EVAL] for source in range(3)] == [10, 2, 0]
    assert [held[source, TEST] for source in range(3)] == [5, 1, 0]


def test_a_content_of_two_sources_belongs_to_the_first() -> None:
    shared = [f"both {i}" for i in range(50)]
    splits = draw(shared + shared, 0.2, 0.0, sources=[0] * 50 + [1] * 50)
    assert splits[:50] == splits[50:] and splits[:50].count(EVAL) == 10


def test_small_sets_keep_something_to_evaluate_and_something_to_train() -> None:
    assert draw([], 0.02, 0.0) == []
    assert draw(["a"], 0.02, 0.0) == [TRAIN]
    assert sorted(draw(["a", "b"], 0.02, 0.0)) == [TRAIN, EVAL]
    assert sorted(draw(["a", "b"], 0.02, 0.5)) == [TRAIN, EVAL]
    assert sorted(draw(["a", "b", "c"], 0.02, 0.02)) == [TRAIN, EVAL, TEST]
    assert sorted(draw(["a", "b", "c"], 0.02, 0.0, sources=[0, 1, 2])) == [TRAIN, TRAIN, EVAL]


def test_order_does_not_matter_and_the_seed_does() -> None:
    contents = [str(i) for i in range(200)]
    forward = dict(zip(contents, draw(contents, 0.1, 0.1), strict=True))
    backward = dict(zip(contents[::-1], draw(contents[::-1], 0.1, 0.1), strict=True))
    other = dict(zip(contents, draw(contents, 0.1, 0.1, seed=1), strict=True))
    assert forward == backward != other
    assert Counter(forward.values()) == {TRAIN: 160, EVAL: 20, TEST: 20}


def test_adding_rows_moves_few_others() -> None:
    contents = [str(i) for i in range(1000)]
    before = draw(contents, 0.1, 0.0)
    after = draw([*contents, *(f"new {i}" for i in range(10))], 0.1, 0.0)[:1000]
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 10


def test_content_is_what_is_said() -> None:
    said = Conversation((Message("user", "q"), Message("assistant", "a")))
    assert content_key(said) == content_key(
        Conversation((Message("user", "q", 0.5), said.messages[1]), (), "other", "x:1")
    )
    called = Message("assistant", "a", extra={"tool_calls": [{"function": {"name": "f"}}]})
    tokens = TokenizedExample(np.arange(3, dtype=np.int32), np.ones(3, np.float32))
    others = [
        Conversation((Message("system", "q"), said.messages[1])),
        Conversation(said.messages, ({"name": "f"},)),
        Conversation((said.messages[0], called)),
        Conversation((Message("user", "qa"), Message("assistant", ""))),
        tokens,
    ]
    assert len({content_key(said), *map(content_key, others)}) == 6


def connected(num: int, edges) -> list[int]:
    """The plain way: go on from each row until nothing is new."""
    names = []
    for row in range(num):
        reached = {row}
        while more := {j for edge in edges for j in edge if set(edge) & reached} - reached:
            reached |= more
        names.append(min(reached))
    return names


@given(st.data())
def test_what_hangs_together_is_what_steps_connect(data) -> None:
    num = data.draw(st.integers(1, 14))
    contents, units = (data.draw(st.lists(st.integers(0, 9), min_size=num, max_size=num)) for _ in range(2))
    pairs = data.draw(st.lists(st.tuples(*[st.integers(0, num - 1)] * 2), max_size=4))
    rows = range(num)
    alike = [(i, j) for i in rows for j in rows if contents[i] == contents[j] or units[i] == units[j]]
    given = [np.array(keys, np.uint64) for keys in (contents, units)]
    found = hang_together(*given, np.array(pairs, np.int64).reshape(-1, 2))
    groups = connected(num, [*alike, *pairs])
    least = {group: min(contents[row] for row in rows if groups[row] == group) for group in groups}
    assert found.tolist() == [least[group] for group in groups]


def test_a_long_chain_hangs_together() -> None:
    """Each record shares one content with the next: the longest way for the rounds."""
    num = 5000
    names = np.random.default_rng(0).permutation(2 * num).astype(np.uint64)
    contents, units = np.concatenate([names[:num], names[1 : num + 1]]), np.tile(np.arange(num, dtype=np.uint64), 2)
    assert set(hang_together(contents, units).tolist()) == {int(names[: num + 1].min())}


def of_groups(sizes: list[int], eval_fraction: float, test_fraction: float = 0.0, seed: int = 0) -> list[int]:
    """Contents in each split, drawn from groups of these sizes; each group is on one side."""
    contents = np.random.default_rng(seed).permutation(sum(sizes)).astype(np.uint64)
    number = np.repeat(np.arange(len(sizes)), sizes)
    groups = hang_together(contents, number.astype(np.uint64))
    splits = draw_splits(contents, groups, np.zeros(len(contents), int), eval_fraction, test_fraction, seed)
    assert all(len(set(splits[number == group])) == 1 for group in range(len(sizes)))
    return [int((splits == split).sum()) for split in (TRAIN, EVAL, TEST)]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.sampled_from([0.02, 0.1, 0.4]), st.integers(0, 5))
def test_groups_are_drawn_whole_and_shares_are_rounded_to_them(sizes: list[int], part: float, seed: int) -> None:
    trained, held, tested = of_groups(sizes, part, part, seed)
    share = round(part * sum(sizes))
    assert trained and held
    assert max(held, tested) <= max(1.5 * share, sorted(sizes)[:3][-1])  # where there is no share: a small group each
    if max(sizes) <= share / 4:
        assert abs(held - share) <= max(sizes) / 2


def test_a_group_larger_than_its_share_is_never_held_out() -> None:
    """60 % of all are near-duplicates of each other: two per cent of the seeds would hold all of them out."""
    held = [of_groups([60, *[1] * 40], 0.1, seed=seed)[1] for seed in range(30)]
    assert held == [10] * 30
    assert {of_groups([60, 40], 0.1, seed=seed)[1] for seed in range(5)} == {40}  # one at least: the smallest


def test_large_groups_are_drawn_as_often_as_small_ones() -> None:
    """A group is named by its smallest key: names themselves would put the large ones first."""
    large = [of_large(seed) for seed in range(40)]
    assert 0.35 < np.mean(large) < 0.65


def of_large(seed: int) -> float:
    """Share of rows in large groups among those held out; half of all rows are."""
    sizes = [10] * 40 + [1] * 400
    number = np.repeat(np.arange(len(sizes)), sizes)
    contents = np.random.default_rng(seed).integers(0, 2**63, len(number)).astype(np.uint64)
    groups = hang_together(contents, number.astype(np.uint64))
    splits = draw_splits(contents, groups, np.zeros(len(contents), int), 0.25, 0.0, seed)
    return float(np.mean(number[splits == EVAL] < 40))


def test_groups_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    contents, units = rng.permutation(600).astype(np.uint64), np.repeat(np.arange(200), 3).astype(np.uint64)
    shuffled = rng.permutation(600)
    forward = draw_splits(contents, hang_together(contents, units), np.zeros(600, int), 0.1, 0.1, 0)
    other = draw_splits(
        contents[shuffled], hang_together(contents[shuffled], units[shuffled]), np.zeros(600, int), 0.1, 0.1, 0
    )
    assert (forward[shuffled] == other).all() and (forward == EVAL).sum() == 60

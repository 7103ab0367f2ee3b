"""Held-out splits: exact counts per source, duplicates on one side, independent of order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.splits import EVAL, TEST, TRAIN, content_key, draw_splits
from sft_dist.types import Conversation, Message, TokenizedExample


def draw(contents: list[str], eval_fraction: float, test_fraction: float, seed: int = 0, sources=None) -> list[int]:
    keys = [
        content_key(Conversation((Message("user", text), Message("assistant", "a")), source="f", id=f"f:{i}"))
        for i, text in enumerate(contents)
    ]
    places = np.zeros(len(keys), np.int64) if sources is None else np.array(sources)
    return draw_splits(np.array(keys, np.uint64), places, eval_fraction, test_fraction, seed).tolist()


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

"""Held-out splits: exact counts, duplicates on one side, independent of order."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.splits import assign_split, assign_splits, content_key
from sft_dist.types import Conversation, Message


def conversations(contents: list[str]) -> list[Conversation]:
    return [
        Conversation((Message("user", text), Message("assistant", "a")), source="f", id=f"f:{i}")
        for i, text in enumerate(contents)
    ]


@given(
    st.lists(st.text(max_size=2), max_size=60),
    st.sampled_from([0.0, 0.02, 0.5, 0.99]),
    st.sampled_from([0.0, 0.1, 0.99]),
    st.integers(0, 3),
)
def test_duplicates_stay_together_and_counts_are_exact(
    contents: list[str], part: float, test: float, seed: int
) -> None:
    splits = assign_splits(conversations(contents), part, test, seed)
    sides: dict[str, set[str]] = {}
    for content, split in zip(contents, splits, strict=True):
        sides.setdefault(content, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    unique = len(sides)
    count = Counter(next(iter(found)) for found in sides.values())
    assert count["train"] >= min(unique, 1)
    assert count["eval"] == (0 if part == 0 else max(0, min(max(1, round(part * unique)), unique - 1)))
    assert test > 0 or count["test"] == 0


def test_small_sets_keep_something_to_evaluate_and_something_to_train() -> None:
    assert assign_splits([], 0.02, 0.0, 0) == []
    assert assign_splits(conversations(["a"]), 0.02, 0.0, 0) == ["train"]
    assert sorted(assign_splits(conversations(["a", "b"]), 0.02, 0.0, 0)) == ["eval", "train"]
    assert sorted(assign_splits(conversations(["a", "b"]), 0.02, 0.5, 0)) == ["eval", "train"]
    assert sorted(assign_splits(conversations(["a", "b", "c"]), 0.02, 0.02, 0)) == ["eval", "test", "train"]


def test_order_does_not_matter_and_the_seed_does() -> None:
    contents = [str(i) for i in range(200)]
    forward = dict(zip(contents, assign_splits(conversations(contents), 0.1, 0.1, 0), strict=True))
    backward = dict(zip(contents[::-1], assign_splits(conversations(contents[::-1]), 0.1, 0.1, 0), strict=True))
    other = dict(zip(contents, assign_splits(conversations(contents), 0.1, 0.1, 1), strict=True))
    assert forward == backward != other
    assert Counter(forward.values()) == {"train": 160, "eval": 20, "test": 20}


def test_adding_rows_moves_few_others() -> None:
    contents = [str(i) for i in range(1000)]
    before = assign_splits(conversations(contents), 0.1, 0.0, 0)
    after = assign_splits(conversations([*contents, *(f"new {i}" for i in range(10))]), 0.1, 0.0, 0)[:1000]
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 10


def test_content_is_what_is_said() -> None:
    said = Conversation((Message("user", "q"), Message("assistant", "a")))
    assert content_key(said) == content_key(
        Conversation((Message("user", "q", 0.5), said.messages[1]), (), "other", "x:1")
    )
    called = Message("assistant", "a", extra={"tool_calls": [{"function": {"name": "f"}}]})
    others = [
        Conversation((Message("system", "q"), said.messages[1])),
        Conversation(said.messages, ({"name": "f"},)),
        Conversation((said.messages[0], called)),
        Conversation((Message("user", "qa"), Message("assistant", ""))),
    ]
    assert len({content_key(said), *map(content_key, others)}) == 5


def test_one_at_a_time_the_fractions_hold_on_average() -> None:
    count = Counter(assign_split(c, 0.2, 0.1, 0) for c in conversations([str(i) for i in range(3000)]))
    assert abs(count["eval"] - 600) < 90 and abs(count["test"] - 300) < 70

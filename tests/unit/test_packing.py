"""Packs hold what they may, once each; best fit is best fit, and fast."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.packing import PACKINGS, pack_best_fit

CAPACITY = 64
lengths_lists = st.lists(st.integers(1, CAPACITY), max_size=300)


def chat_lengths(num: int, capacity: int) -> np.ndarray:
    """A realistic mix: log-normal with median 400 tokens, sigma 1."""
    drawn = np.random.default_rng(0).lognormal(np.log(400), 1.0, num)
    return np.clip(drawn, 1, capacity).astype(np.int64)


def best_fit_decreasing_by_definition(lengths: list[int], capacity: int) -> list[int]:
    """Free tokens of each pack of textbook BFD, ascending; quadratic."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


def fewest_packs(lengths: tuple[int, ...], spaces: tuple[int, ...], capacity: int) -> int:
    """The optimum by exhaustive search; `spaces` are the free tokens of the packs opened so far."""
    if not lengths:
        return len(spaces)
    first, rest = lengths[0], lengths[1:]
    opened = {tuple(sorted((*spaces, capacity - first)))}
    joined = {
        tuple(sorted((*spaces[:at], space - first, *spaces[at + 1 :])))
        for at, space in enumerate(spaces)
        if space >= first
    }
    return min(fewest_packs(rest, choice, capacity) for choice in opened | joined)


@pytest.mark.parametrize("name", PACKINGS)
@given(lengths=lengths_lists)
def test_every_document_once_and_no_pack_over_capacity(name, lengths):
    packs = PACKINGS[name](np.array(lengths, dtype=np.int64), CAPACITY)
    assert sorted(index for pack in packs for index in pack.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= CAPACITY for pack in packs)


@given(lengths=lengths_lists)
def test_packs_are_as_full_as_textbook_best_fit_decreasing_makes_them(lengths):
    packs = pack_best_fit(np.array(lengths, dtype=np.int64), CAPACITY)
    spaces = sorted(CAPACITY - sum(lengths[index] for index in pack) for pack in packs)
    assert spaces == best_fit_decreasing_by_definition(lengths, CAPACITY)


@given(lengths=lengths_lists)
def test_never_two_packs_that_would_fit_into_one(lengths):
    """So at most one pack is half empty: under twice the lower bound tokens / capacity, on any input."""
    packs = pack_best_fit(np.array(lengths, dtype=np.int64), CAPACITY)
    fills = sorted(sum(lengths[index] for index in pack) for pack in packs)
    assert len(packs) >= -(-sum(lengths) // CAPACITY)
    assert len(fills) < 2 or fills[0] + fills[1] > CAPACITY


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_within_the_proven_bound_of_the_optimum(lengths):
    """At most 11/9 of the optimum plus one (Johnson, 1973); the optimum by trying everything."""
    packs = len(pack_best_fit(np.array(lengths, dtype=np.int64), 12))
    assert packs <= 11 / 9 * fewest_packs(tuple(sorted(lengths, reverse=True)), (), 12) + 1


@given(lengths=lengths_lists)
def test_documents_keep_their_order_inside_a_pack(lengths):
    packs = pack_best_fit(np.array(lengths, dtype=np.int64), CAPACITY)
    assert all(pack.tolist() == sorted(pack.tolist()) for pack in packs)


@pytest.mark.parametrize("capacity", [2048, 8192, 32768])
def test_realistic_mix_wastes_under_one_percent(capacity):
    lengths = chat_lengths(20_000, capacity)
    packs = pack_best_fit(lengths, capacity)
    assert lengths.sum() / (len(packs) * capacity) >= 0.99


def test_one_window_packs_within_a_second_and_a_half():
    """About 0.1 s where this was written; the bound leaves room for a busy machine."""
    lengths = chat_lengths(131_072, 8192)
    start = time.perf_counter()
    pack_best_fit(lengths, 8192)
    assert time.perf_counter() - start < 1.5


def test_by_length_puts_like_beside_like():
    lengths = np.array([3, 9, 1, 9, 5])
    assert [int(pack[0]) for pack in PACKINGS["padded"](lengths, 10)] == [1, 3, 4, 0, 2]


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("lengths", [[5, 11], [5, 0]], ids=["too-long", "empty"])
def test_impossible_lengths_are_refused(name, lengths):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.10"):
        PACKINGS[name](np.array(lengths), 10)

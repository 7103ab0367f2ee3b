"""Packs hold what they may, once each; best fit is best fit, and fast."""

import time

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import compiled
from sft_dist.data.packing import (
    PACKINGS,
    best_fit_compiled,
    best_fit_reference,
    count_best_fit,
    count_compiled,
    count_reference,
    join,
    pack_best_fit,
)

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


@st.composite
def documents(draw) -> tuple[np.ndarray, int]:
    """Lengths and a capacity; words of the bit sets are 64 integers wide, their summary's 4096."""
    capacity = draw(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 4095, 4096, 4097, 70_000]))
    longest = draw(st.integers(1, capacity))
    return np.array(draw(st.lists(st.integers(1, longest), max_size=200)), dtype=np.int64), capacity


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


@given(given=documents())
def test_machine_code_packs_exactly_as_the_reference(given):
    expected, packs = best_fit_reference(*given), best_fit_compiled(*given)
    assert packs.members.tolist() == expected.members.tolist()
    assert packs.offsets.tolist() == expected.offsets.tolist()


@pytest.mark.parametrize("capacity", [8192, 32768])
def test_machine_code_packs_a_window_exactly_as_the_reference(capacity):
    lengths = chat_lengths(131_072, capacity)
    expected, packs = best_fit_reference(lengths, capacity), best_fit_compiled(lengths, capacity)
    assert np.array_equal(packs.members, expected.members) and np.array_equal(packs.offsets, expected.offsets)
    assert count_compiled(lengths, len(lengths), capacity).tolist() == [len(packs)]


@pytest.mark.parametrize("count", [count_reference, count_compiled, count_best_fit])
@given(given=documents(), group=st.integers(1, 70))
def test_counting_packs_is_packing_and_counting(count, given, group):
    lengths, capacity = given
    starts = range(0, len(lengths), group)
    expected = [len(pack_best_fit(lengths[at : at + group], capacity)) for at in starts]
    assert count(lengths, group, capacity).tolist() == expected


@pytest.mark.parametrize("group", [1, 37, 1000])
def test_groups_are_counted_independently(group):
    lengths = np.random.default_rng(group).integers(1, CAPACITY + 1, 3000)
    assert np.array_equal(count_compiled(lengths, group, CAPACITY), count_reference(lengths, group, CAPACITY))


def test_one_window_packs_at_millions_of_documents_a_second():
    """60 to 90 million on two quiet cores, 6 on a crowded one; the reference in Python does not come near."""
    lengths = chat_lengths(131_072, 8192)
    pack_best_fit(lengths, 8192)  # compiles
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        pack_best_fit(lengths, 8192)
        seconds.append(time.perf_counter() - start)
    assert len(lengths) / min(seconds) >= 2e6


def test_without_a_writable_place_functions_are_compiled_and_not_cached(monkeypatch):
    njit, options_seen = numba.njit, []

    def on_a_read_only_machine(function, **options):
        options_seen.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'twice': no locator available for file")
        return njit(function, **options)

    monkeypatch.setattr(numba, "njit", on_a_read_only_machine)
    assert compiled._jit(lambda number: 2 * number)(21) == 42
    assert options_seen == [{"cache": True, "nogil": True}, {"nogil": True}]


@given(lengths=lengths_lists, data=st.data())
def test_packs_can_be_cut_reordered_and_joined(lengths, data):
    packs = pack_best_fit(np.array(lengths, dtype=np.int64), CAPACITY)
    as_lists = [pack.tolist() for pack in packs]
    cut = data.draw(st.integers(0, len(packs)))
    halves = [packs.slice(0, cut), packs.slice(cut, len(packs))]
    assert [pack.tolist() for pack in halves[0]] == as_lists[:cut]
    assert [pack.tolist() for pack in halves[1]] == as_lists[cut:]
    assert [pack.tolist() for pack in join(halves)] == as_lists
    order = data.draw(st.permutations(range(len(packs))))
    assert [pack.tolist() for pack in packs.take(np.array(order, dtype=np.int64))] == [as_lists[at] for at in order]


def test_by_length_puts_like_beside_like():
    lengths = np.array([3, 9, 1, 9, 5])
    assert [int(pack[0]) for pack in PACKINGS["padded"](lengths, 10)] == [1, 3, 4, 0, 2]


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("lengths", [[5, 11], [5, 0]], ids=["too-long", "empty"])
def test_impossible_lengths_are_refused(name, lengths):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.10"):
        PACKINGS[name](np.array(lengths), 10)

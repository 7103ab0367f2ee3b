"""The shuffle is a bijection, a function of its key alone, and mixes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.permutation import derive_key, permute, walk_compiled, walk_reference


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_index_comes_exactly_once(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@given(n=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_one_index_alone_equals_its_place_in_a_batch(n, key, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    together = permute(np.array(indices), n, key)
    assert [int(permute(np.array([index]), n, key)[0]) for index in indices] == together.tolist()
    assert together.min() >= 0 and together.max() < n


@given(n=st.integers(1025, 2**63), key=st.integers(0, 2**64 - 1), data=st.data())
def test_machine_code_walks_exactly_as_the_reference(n, key, data):
    values = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=40)), dtype=np.uint64)
    assert walk_compiled(values, n, key).tolist() == walk_reference(values, n, key).tolist()


@pytest.mark.parametrize("n", [257, 4096, 4097, 100_003])
def test_all_of_a_range_at_once_is_a_bijection_either_way(n):
    everything = np.arange(n, dtype=np.uint64)
    for walk in (walk_reference, walk_compiled):
        assert np.array_equal(np.sort(walk(everything, n, 5)), everything)


def test_golden_order():
    """Any change here changes every plan: runs could not be resumed across it."""
    key = derive_key("golden", 0)
    assert permute(np.arange(10), 10, key).tolist() == [7, 9, 3, 5, 4, 6, 2, 8, 0, 1]
    assert permute(np.arange(5), 10**9, key).tolist() == [819870740, 320565390, 771419661, 708414320, 395274372]


def test_empty_range():
    assert permute(np.arange(0), 0, 1).tolist() == []


def test_index_outside_is_refused():
    with pytest.raises(ValueError, match=r"outside \[0, 10\)"):
        permute(np.array([10]), 10, 1)


@pytest.mark.parametrize("n", [3, 7, 300])
def test_positions_are_close_to_uniform_over_keys(n):
    """Where index 0 lands over 4,000 keys: chi-square per degree of freedom near 1."""
    landed = np.bincount([int(permute(np.zeros(1, int), n, derive_key(k))[0]) for k in range(4000)], minlength=n)
    expected = 4000 / n
    assert ((landed - expected) ** 2 / expected).sum() / (n - 1) < 2.5


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(100_000), 100_000, 7)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_keys_separate_types_and_boundaries():
    inputs = [("a", "bc"), ("ab", "c"), ("abc",), (1,), ("1",), ()]
    assert len({derive_key(*parts) for parts in inputs}) == len(inputs)


def test_key_is_the_same_in_every_process():
    assert derive_key("examples", 0, 1) == 12853465162498262275

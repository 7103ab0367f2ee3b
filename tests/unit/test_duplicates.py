"""Near-duplicates: sketches find what comparing all pairs finds, in linear time."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.duplicates import NEAR, clusters, groups_of_equal, jaccard, near_pairs, pieces, sketch


def found_in(texts, threshold=NEAR):
    return clusters(near_pairs(sketch(texts), texts.__getitem__, threshold))


def compared(texts, threshold=NEAR):
    """Every pair, exactly."""
    sets = [pieces(text) for text in texts]
    return clusters((i, j) for i, j in combinations(range(len(texts)), 2) if jaccard(sets[i], sets[j]) >= threshold)


def test_pieces_by_hand():
    assert len(pieces("abcdef")) == 2 and len(pieces("ab")) == len(pieces("")) == 1
    assert (pieces("Two  words\n") == pieces("two words")).all()
    assert len(pieces("aaaaaaaaa")) == 1


def test_jaccard_by_hand():
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4])) == 0.5


def test_a_changed_word_in_a_long_text_is_a_near_duplicate():
    long = "The quick brown fox jumps over the lazy dog while the cat looks on from the old wall. " * 2
    texts = [f"{long}It rains.", f"{long}It snows.", "Something else entirely, about planets and their moons."]
    assert found_in(texts) == [[0, 1]]


def test_a_thousand_copies_are_one_cluster_and_few_pairs():
    texts = ["the same text again and again"] * 1000
    pairs = near_pairs(sketch(texts), texts.__getitem__)
    assert clusters(pairs) == [list(range(1000))]
    assert len(pairs) < 2000


def test_none_and_one_text():
    assert found_in([]) == found_in(["alone"]) == []


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda pair: pair[0] != pair[1])))
def test_clusters_are_the_connected_components(pairs):
    found = clusters(pairs)
    assert sorted(row for rows in found for row in rows) == sorted({row for pair in pairs for row in pair})
    home = {row: number for number, rows in enumerate(found) for row in rows}
    assert all(home[i] == home[j] for i, j in pairs)
    for rows in found:  # nothing is joined that no pair joins
        reached = {rows[0]}
        while more := {j for pair in pairs for j in pair if set(pair) & reached} - reached:
            reached |= more
        assert reached == set(rows)


def test_groups_of_equal_keys():
    assert groups_of_equal(np.array([5, 7, 5, 9, 7, 5], np.uint64)) == [[0, 2, 5], [1, 4]]
    assert groups_of_equal(np.array([], np.uint64)) == []


@pytest.mark.parametrize("name", ["rasbt_instruction_examples.json", "lf_alpaca_zh_demo.json"])
@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_real_sets_give_what_comparing_all_pairs_gives(shared, name, threshold):
    rows = json.loads((shared / "data" / "instruct" / name).read_text(encoding="utf-8"))[-450:]
    texts = [f"{row['instruction']}\n{row.get('input', '')}\n{row['output']}" for row in rows]
    expected = compared(texts, threshold)
    assert expected and found_in(texts, threshold) == expected

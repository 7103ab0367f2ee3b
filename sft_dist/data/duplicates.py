"""Near-duplicates among many texts: MinHash sketches find the candidates, exact Jaccard similarity decides.

    sketches = sketches_of(batches, N)                    uint32[N, 128], 512 bytes a text, made in batches
    pairs = near_pairs(sketches, texts.__getitem__)       (i, j, similarity) with similarity at or above the threshold
    clusters(pairs)                                       sets of rows that hang together

A text is the set of its overlapping 5-character pieces, case and spacing aside, so that every script is treated alike.
Sketches are cut into 25 bands of 5 values; texts with an equal band are candidates (Broder, 1997; Leskovec, Rajaraman
and Ullman, Mining of Massive Datasets, chapter 3). Two texts of similarity 0.8 share no band once in 20,000 times.
Inside a bucket each text is compared with the first one and with its neighbour, so a thousand copies of one text cost
a thousand comparisons, not half a million. MinHash is the library `rensa` (Rust); pieces are hashed by numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

NEAR = 0.8  # Jaccard similarity of two texts that say the same with a few words changed
_PIECE = 5  # characters
_NUM_HASHES, _BANDS, _BAND_ROWS = 128, 25, 5  # rensa is fastest at powers of two; the last three values vote only
_SLACK = 0.15  # a sketch is off by more once in 10,000 times
_SEED = 0
_SKETCHED_AT_ONCE = 100  # the library gives numbers of Python, forty bytes each
_COMPARED_AT_ONCE = 1 << 11
_TEXTS_KEPT = 4096  # piece sets of candidates, kept for the next comparison


class Pair(NamedTuple):
    """Texts `first < second` and the Jaccard similarity of their pieces."""

    first: int
    second: int
    similarity: float


def pieces(text: str) -> np.ndarray:
    """64-bit hashes of the text's overlapping pieces, sorted, each once: uint64[K]; a short text is one piece."""
    letters = np.frombuffer(" ".join(text.casefold().split()).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    if len(letters) < _PIECE:
        letters = np.concatenate([letters, np.zeros(_PIECE - len(letters), np.uint64)])
    hashes = np.zeros(len(letters) - _PIECE + 1, np.uint64)
    for at in range(_PIECE):
        hashes = (hashes ^ letters[at : at + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def sketch(texts: Iterable[str]) -> np.ndarray:
    """MinHash sketches of a batch of texts: uint32[N, 128]."""
    from rensa import RMinHash  # type: ignore[import-untyped]

    sets = [pieces(text) for text in texts]
    if not sets:
        return np.zeros((0, _NUM_HASHES), np.uint32)
    offsets = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, _NUM_HASHES, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def sketches_of(batches: Iterable[Iterable[str]], num: int) -> np.ndarray:
    """The sketches of `num` texts that come some at a time: uint32[num, 128]."""
    sketches = np.zeros((num, _NUM_HASHES), np.uint32)
    at = 0
    for batch in batches:
        texts = iter(batch)
        while len(some := sketch(islice(texts, _SKETCHED_AT_ONCE))):
            sketches[at : at + len(some)] = some
            at += len(some)
    return sketches


def near_pairs(sketches: np.ndarray, text_of: Callable[[int], str], threshold: float = NEAR) -> list[Pair]:
    """Pairs that join every cluster of near-duplicates, in order. `text_of(i)` gives text i again, to be compared."""
    candidates = _likely(sketches, _candidates(sketches), threshold - _SLACK)
    del sketches
    pieces_of = lru_cache(maxsize=_TEXTS_KEPT)(lambda row: pieces(text_of(row)))
    found = []
    for at in range(0, len(candidates), _COMPARED_AT_ONCE):
        for i, j in candidates[at : at + _COMPARED_AT_ONCE].tolist():
            similarity = jaccard(pieces_of(i), pieces_of(j))
            if similarity >= threshold:
                found.append(Pair(i, j, similarity))
    return found


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Common over all pieces of two sorted sets."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def clusters(pairs: Iterable[tuple[int, int] | Pair]) -> list[list[int]]:
    """Rows that hang together by pairs, each cluster in order, the largest first."""
    parent: dict[int, int] = {}
    for pair in pairs:
        roots = [_root(parent, row) for row in pair[:2]]
        parent[max(roots)] = min(roots)
    members: dict[int, list[int]] = {}
    for row in sorted(parent):
        members.setdefault(_root(parent, row), []).append(row)
    return sorted(members.values(), key=lambda rows: (-len(rows), rows))


def groups_of_equal(keys: Sequence[int] | np.ndarray) -> list[list[int]]:
    """Rows with the same key, for keys that come more than once; the largest group first."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = np.asarray(keys)[order]
    cuts = np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1
    groups = [group.tolist() for group in np.split(order, cuts) if len(group) > 1]
    return sorted(groups, key=lambda rows: (-len(rows), rows))


def _candidates(sketches: np.ndarray) -> np.ndarray:
    """Pairs (first < second) that share a band, each once and in order: int64[C, 2].

    A pair is held as one number, and those of a band are merged at once: near-duplicates share most of their bands.
    """
    num = len(sketches)
    found = np.zeros(0, np.int64)
    for band in range(_BANDS):
        keys = _band_keys(sketches[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS])
        order = np.argsort(keys, kind="stable")
        rest = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1  # those that are not the first of their bucket
        del keys
        begins = np.diff(rest, prepend=-1) != 1
        leader = order[(rest - 1)[begins]][np.cumsum(begins) - 1]
        found = np.union1d(found, np.concatenate([leader, order[rest - 1]]) * num + np.tile(order[rest], 2))
    return np.stack(np.divmod(found, max(num, 1)), axis=1)


def _band_keys(values: np.ndarray) -> np.ndarray:
    """One number for each row of uint32[N, 5]: uint64[N]. Rows that have one by accident are compared in full later."""
    keys = np.zeros(len(values), np.uint64)
    for column in values.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _likely(sketches: np.ndarray, pairs: np.ndarray, least: float) -> np.ndarray:
    """Those of `pairs` int64[C, 2] whose sketches agree in a share of `least`."""
    likely = np.zeros(len(pairs), dtype=bool)
    for at in range(0, len(pairs), _COMPARED_AT_ONCE):
        first, second = pairs[at : at + _COMPARED_AT_ONCE].T
        likely[at : at + _COMPARED_AT_ONCE] = (sketches[first] == sketches[second]).mean(axis=1) >= least
    return pairs[likely]


def _root(parent: dict[int, int], row: int) -> int:
    """Union-find with path halving."""
    parent.setdefault(row, row)
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row

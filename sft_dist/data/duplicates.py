"""Near-duplicates among many texts: MinHash sketches find the candidates, exact Jaccard similarity decides.

    sketches = sketch(texts)                              uint32[N, 128], 512 bytes a text, made in batches
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
from typing import NamedTuple

import numpy as np

NEAR = 0.8  # Jaccard similarity of two texts that say the same with a few words changed
_PIECE = 5  # characters
_NUM_HASHES, _BANDS, _BAND_ROWS = 128, 25, 5  # rensa is fastest at powers of two; the last three values vote only
_SLACK = 0.15  # a sketch is off by more once in 10,000 times
_SEED = 0
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


def near_pairs(sketches: np.ndarray, text_of: Callable[[int], str], threshold: float = NEAR) -> list[Pair]:
    """Pairs that join every cluster of near-duplicates, in order. `text_of(i)` gives text i again, to be compared."""
    candidates = _candidates(sketches)
    first, second = candidates[:, 0], candidates[:, 1]
    likely = np.zeros(len(candidates), dtype=bool)
    for at in range(0, len(candidates), 1 << 16):
        some = slice(at, at + (1 << 16))
        likely[some] = (sketches[first[some]] == sketches[second[some]]).mean(axis=1) >= threshold - _SLACK
    pieces_of = lru_cache(maxsize=_TEXTS_KEPT)(lambda row: pieces(text_of(row)))
    compared = (Pair(i, j, jaccard(pieces_of(i), pieces_of(j))) for i, j in candidates[likely].tolist())
    return [pair for pair in compared if pair.similarity >= threshold]


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
    """Pairs (first < second) that share a band, each once: int64[C, 2]."""
    found = [np.zeros((0, 2), np.int64)]
    for band in range(_BANDS):
        keys = np.ascontiguousarray(sketches[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS])
        _, bucket = np.unique(keys.view(f"V{keys.itemsize * _BAND_ROWS}").ravel(), return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        is_first = np.diff(bucket[order], prepend=-1) != 0
        leader = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        rest = np.flatnonzero(~is_first)
        found.append(np.stack([leader[rest], order[rest]], axis=1))
        found.append(np.stack([order[rest - 1], order[rest]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _root(parent: dict[int, int], row: int) -> int:
    """Union-find with path halving."""
    parent.setdefault(row, row)
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row

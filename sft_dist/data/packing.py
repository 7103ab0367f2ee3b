"""Lengths in, packs out: which documents share one sequence of at most `capacity` tokens.

    lengths int[N], capacity -> [indices of pack 0, indices of pack 1, ...]; every index exactly once

`best_fit` is best-fit decreasing: the longest document first, each into the fullest pack that still has room. Two
observations make it fast in plain Python:

- "the smallest free space >= length" is a successor search in a set of small integers. A Python int is that set: bit r
  is on while some pack has r tokens free, so `mask >> length` and its lowest bit answer the question.
- Documents of equal length come one after another, and a pack chosen by one of them is again the best fit for the
  next, until it is full. So whole groups of packs are filled at once: the work is per (length, free space) met, not
  per document.

Ties go to the pack touched last, documents inside a pack stay in the order given: a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit decreasing (Johnson, 1973; at most 11/9 of the optimal number of packs plus one).

    `lengths`: int[N] with 1 <= length <= capacity, in tokens. Returns one int64 array of indices per pack.
    """
    lengths = _checked(lengths, capacity)
    values, counts = np.unique(lengths, return_counts=True)
    pack_of_ranked = _fill(values[::-1].tolist(), counts[::-1].tolist(), capacity)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[np.argsort(-lengths, kind="stable")] = pack_of_ranked
    return _group(pack_of)


def pack_alone(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """One document per pack, in the order given."""
    return [np.array([index]) for index in range(len(_checked(lengths, capacity)))]


def pack_by_length(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """One document per pack, longest first, so that neighbours waste little padding as rows of one batch."""
    return [np.array([index]) for index in np.argsort(-_checked(lengths, capacity), kind="stable")]


Packing = Callable[[np.ndarray, int], list[np.ndarray]]
PACKINGS: dict[str, Packing] = {"best_fit": pack_best_fit, "none": pack_alone, "padded": pack_by_length}


def _fill(lengths: list[int], counts: list[int], capacity: int) -> list[int]:
    """The pack of each document, documents ranked by decreasing length and given as distinct lengths with counts."""
    pack_of: list[int] = []
    packs_with_space: dict[int, list[int]] = {}  # free tokens -> packs
    mask = 0  # bit r is on while packs_with_space[r] is not empty
    num_packs = 0
    for length, count in zip(lengths, counts, strict=True):
        while count:
            fitting = mask >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = space // length
            wanted = -(-count // each)
            if fitting:
                candidates = packs_with_space[space]
                chosen = candidates[-wanted:]
                del candidates[-wanted:]
                if not candidates:
                    mask ^= 1 << space
            else:
                chosen = list(range(num_packs, num_packs + wanted))
                num_packs += wanted
            placed = min(count, len(chosen) * each)
            in_last = placed - (len(chosen) - 1) * each
            pack_of += [pack for pack in chosen[:-1] for _ in range(each)]
            pack_of += [chosen[-1]] * in_last
            for packs, left in ((chosen[:-1], space - each * length), (chosen[-1:], space - in_last * length)):
                if packs and left:
                    packs_with_space.setdefault(left, []).extend(packs)
                    mask |= 1 << left
            count -= placed
    return pack_of


def _group(pack_of: np.ndarray) -> list[np.ndarray]:
    """Indices by pack, ascending inside each; packs are numbered without gaps."""
    members = np.argsort(pack_of, kind="stable")
    ends = np.cumsum(np.bincount(pack_of)).tolist()
    return [members[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _checked(lengths: np.ndarray, capacity: int) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths {lengths.min()}..{lengths.max()} must lie in 1..{capacity} (the capacity of a pack)")
    return lengths

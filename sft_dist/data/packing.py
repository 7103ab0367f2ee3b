"""Lengths in, packs out: which documents share one sequence of at most `capacity` tokens.

    lengths int[N], capacity -> Packs: every index exactly once
    count_best_fit(lengths, group=131_072, capacity=8192) -> how many packs each group makes, without making them

`best_fit` is best-fit decreasing: the longest document first, each into the fullest pack that still has room. "The
smallest free space >= length" is a successor search in a set of small integers. A Python int is that set: bit r is on
while some pack has r tokens free, so `mask >> length` and its lowest bit answer the question. `best_fit_reference` is
just that; `data.compiled` does the same on machine words, about 50 times faster, and takes over from a few thousand
documents on.

Ties go to the pack touched last, documents inside a pack stay in the order given: a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_FEW = 4096  # documents; up to here the reference is done before numba would be imported


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Pack p is `members[offsets[p]:offsets[p + 1]]`."""

    members: np.ndarray  # int64[N], the packs one after another
    offsets: np.ndarray  # int64[P + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.members[start:end] for start, end in pairwise(self.offsets.tolist()))

    def slice(self, first: int, last: int) -> Packs:
        """Packs first..last-1."""
        offsets = self.offsets[first : last + 1]
        return Packs(self.members[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, order: np.ndarray) -> Packs:
        """The packs numbered `order` int64[K], in that order."""
        sizes = np.diff(self.offsets)[order]
        offsets = _offsets_of(sizes)
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[order] - offsets[:-1], sizes)
        return Packs(self.members[places], offsets)


def join(packs: list[Packs]) -> Packs:
    """Several lists of packs as one."""
    if len(packs) == 1:
        return packs[0]
    sizes = np.concatenate([np.diff(some.offsets) for some in packs])
    return Packs(np.concatenate([some.members for some in packs]), _offsets_of(sizes))


def pack_best_fit(lengths: np.ndarray, capacity: int) -> Packs:
    """Best-fit decreasing (Johnson, 1973; at most 11/9 of the optimal number of packs plus one).

    `lengths`: integers [N] with 1 <= length <= capacity, in tokens.
    """
    pack = best_fit_reference if len(lengths) <= _FEW else best_fit_compiled
    return pack(lengths, capacity)


def pack_alone(lengths: np.ndarray, capacity: int) -> Packs:
    """One document per pack, in the order given."""
    num = len(_checked(lengths, capacity))
    return Packs(np.arange(num), np.arange(num + 1))


def pack_by_length(lengths: np.ndarray, capacity: int) -> Packs:
    """One document per pack, longest first, so that neighbours waste little padding as rows of one batch."""
    lengths = _checked(lengths, capacity)
    return Packs(np.argsort(-lengths, kind="stable"), np.arange(len(lengths) + 1))


Packing = Callable[[np.ndarray, int], Packs]
PACKINGS: dict[str, Packing] = {"best_fit": pack_best_fit, "none": pack_alone, "padded": pack_by_length}


def best_fit_reference(lengths: np.ndarray, capacity: int) -> Packs:
    """`pack_best_fit` to be read, and for few documents."""
    lengths = _checked(lengths, capacity)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    packs_with_space: dict[int, list[int]] = {}  # free tokens -> packs, the one touched last at the end
    mask = 0  # bit r is on while packs_with_space[r] is not empty
    num_packs = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = mask >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with_space[space].pop()
            if not packs_with_space[space]:
                mask ^= 1 << space
        else:
            space, pack = capacity, num_packs
            num_packs += 1
        if space > length:
            packs_with_space.setdefault(space - length, []).append(pack)
            mask |= 1 << space - length
        pack_of[index] = pack
    members = np.argsort(pack_of, kind="stable")
    return Packs(members, _offsets_of(np.bincount(pack_of, minlength=num_packs)))


def best_fit_compiled(lengths: np.ndarray, capacity: int) -> Packs:
    """The packs of `best_fit_reference` from machine code."""
    from sft_dist.data import compiled

    return Packs(*compiled.best_fit(_checked(lengths, capacity), capacity))


def count_best_fit(lengths: np.ndarray, group: int, capacity: int) -> np.ndarray:
    """How many packs `pack_best_fit` makes of each run of `group` documents: int64[ceil(N / group)]."""
    count = count_reference if len(lengths) <= _FEW else count_compiled
    return count(lengths, group, capacity)


def count_reference(lengths: np.ndarray, group: int, capacity: int) -> np.ndarray:
    """`count_best_fit` by packing."""
    starts = range(0, len(lengths), group)
    return np.array([len(best_fit_reference(lengths[at : at + group], capacity)) for at in starts], dtype=np.int64)


def count_compiled(lengths: np.ndarray, group: int, capacity: int) -> np.ndarray:
    """The numbers of `count_reference` from counts alone, in machine code."""
    from sft_dist.data import compiled

    return compiled.count_best_fit(_checked(lengths, capacity), group, capacity)


def _offsets_of(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _checked(lengths: np.ndarray, capacity: int) -> np.ndarray:
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths {lengths.min()}..{lengths.max()} must lie in 1..{capacity} (the capacity of a pack)")
    return lengths

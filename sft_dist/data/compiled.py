"""The planner's inner loops as machine code: permuting indices, counting packs, filling packs.

    from sft_dist.data import compiled          # imports numba (0.2 s): only callers with many examples do so
    compiled.permute(values, n, ...)            # values of `permutation.permute`, the readable form
    compiled.best_fit(lengths, capacity)        # packs of `packing.best_fit_reference`, the readable form
    compiled.count_best_fit(lengths, ...)       # only how many packs, several times faster

Every function has a reference in plain Python or NumPy that returns the same integers, and a test that says so. Only
integers are used and every tie is decided by the order of the input, so results are the same on every machine.
Compiled code is kept in numba's cache (beside this file, or in the user's cache where an install is read-only, or
where NUMBA_CACHE_DIR says); the first process of a machine spends a few seconds compiling. The GIL is released.

The packers search sets of small integers ("which free spaces exist?") for the smallest member not below a number. A
set is one bit per integer in 64-bit words, and a summary with one bit per word: a search reads a few words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_ONE = np.uint64(1)
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)  # every 6-bit window of it is different: the product below names the bit
_BIT_OF_PRODUCT = np.zeros(64, dtype=np.int64)
for _bit in range(64):
    _BIT_OF_PRODUCT[(int(_DE_BRUIJN) << _bit & (1 << 64) - 1) >> 58] = _bit


def _jit(function: Callable[..., Any]) -> Any:
    """Compile at the first call, or load from the cache where there is a writable place for one."""
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError as error:
        if "cannot cache" not in str(error):  # "no locator available": an install and a home that are read-only
            raise
        return numba.njit(function, nogil=True)


@_jit
def permute(values: np.ndarray, n: int, high_bits: int, low_bits: int, round_keys: np.ndarray) -> None:
    """Send each of `values` uint64[K] through the network in place, again and again until it is below `n`.

    `outside` lists the places not below `n` yet. Neither loop branches on a value, so the first is vectorised and the
    second never mispredicts: 5 ns per value against 10 for walking each value to its end.
    """
    shift = np.uint64(low_bits)
    high_mask = np.uint32((1 << high_bits) - 1)
    low_mask = np.uint32((1 << low_bits) - 1)
    outside = np.empty(len(values), dtype=np.int64)
    walking = values.copy()
    num_outside = _feistel(walking, n, shift, high_mask, low_mask, round_keys, outside)
    values[:] = walking
    places = outside[:num_outside].copy()
    while len(places):
        walking = values[places]
        num_outside = _feistel(walking, n, shift, high_mask, low_mask, round_keys, outside)
        values[places] = walking
        places = places[outside[:num_outside]]


@numba.njit
def _feistel(values, n, shift, high_mask, low_mask, round_keys, outside):  # type: ignore[no-untyped-def]
    """One pass in place; fills `outside` with the places where the result is not below `n`, returns their number."""
    key_0, key_1, key_2 = round_keys[0], round_keys[1], round_keys[2]
    key_3, key_4, key_5 = round_keys[3], round_keys[4], round_keys[5]
    for place in range(len(values)):
        high = np.uint32(values[place] >> shift)
        low = np.uint32(values[place]) & low_mask
        high ^= _mix(low, key_0) & high_mask
        low ^= _mix(high, key_1) & low_mask
        high ^= _mix(low, key_2) & high_mask
        low ^= _mix(high, key_3) & low_mask
        high ^= _mix(low, key_4) & high_mask
        low ^= _mix(high, key_5) & low_mask
        values[place] = np.uint64(high) << shift | np.uint64(low)
    num_outside = 0
    for place in range(len(values)):
        outside[num_outside] = place
        num_outside += values[place] >= n
    return num_outside


@numba.njit
def _mix(value, key):  # type: ignore[no-untyped-def]
    mixed = np.uint32(value + key)
    mixed = np.uint32(np.uint32(mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x7FEB352D))
    mixed = np.uint32(np.uint32(mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(mixed ^ (mixed >> np.uint32(16)))


@_jit
def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Members int64[N] and offsets int64[P + 1] of the packs of `packing.best_fit_reference`."""
    ranked = _longest_first(lengths, capacity)
    words, summary = _empty_set(capacity)
    top = np.full(capacity + 1, -1, dtype=np.int32)  # free tokens -> pack touched last
    below = np.empty(len(lengths), dtype=np.int32)  # pack -> the one touched before it with equal space
    pack_of = np.empty(len(lengths), dtype=np.int32)
    num_packs = 0
    place = 0
    while place < len(ranked):
        length = lengths[ranked[place]]
        space = _successor(words, summary, length)
        if space < 0:
            space, pack = capacity, num_packs
            num_packs += 1
        else:
            pack = top[space]
            top[space] = below[pack]
            if top[space] < 0:
                _remove(words, summary, space)
        # No pack has a space from `length` to below this one's, so it stays the best fit for documents of equal length.
        while place < len(ranked) and space >= length and lengths[ranked[place]] == length:
            pack_of[ranked[place]] = pack
            space -= length
            place += 1
        if space > 0:
            below[pack] = top[space]
            top[space] = pack
            if below[pack] < 0:
                _add(words, summary, space)
    return _group(pack_of, num_packs)


@_jit
def count_best_fit(lengths: np.ndarray, group: int, capacity: int) -> np.ndarray:
    """How many packs `best_fit` makes of each run of `group` documents: int64[ceil(N / group)].

    Works on counts alone: all packs of equal space take documents of equal length at once.
    """
    words, summary = _empty_set(capacity)
    ranks, ranks_summary = _empty_set(capacity)  # capacity - length of the documents at hand: ascending = longest first
    num_with_space = np.zeros(capacity + 1, dtype=np.int32)
    num_with_rank = np.zeros(capacity + 1, dtype=np.int32)
    num_packs = np.zeros(-(-len(lengths) // group), dtype=np.int64)
    for number in range(len(num_packs)):
        for place in range(number * group, min(len(lengths), (number + 1) * group)):
            rank = capacity - lengths[place]
            if num_with_rank[rank] == 0:
                _add(ranks, ranks_summary, rank)
            num_with_rank[rank] += 1
        rank = _successor(ranks, ranks_summary, 0)
        while rank >= 0:
            length, waiting = capacity - rank, num_with_rank[rank]
            num_with_rank[rank] = 0
            _remove(ranks, ranks_summary, rank)
            while waiting > 0:
                space = _successor(words, summary, length)
                if space < 0:
                    space = capacity
                    each = space // length
                    chosen = -(-waiting // each)
                    num_packs[number] += chosen
                else:
                    each = space // length
                    chosen = min(num_with_space[space], -(-waiting // each))
                    num_with_space[space] -= chosen
                    if num_with_space[space] == 0:
                        _remove(words, summary, space)
                placed = min(waiting, chosen * each)
                in_last = placed - (chosen - 1) * each
                _give_back(words, summary, num_with_space, space - each * length, chosen - 1)
                _give_back(words, summary, num_with_space, space - in_last * length, 1)
                waiting -= placed
            rank = _successor(ranks, ranks_summary, rank)
        space = _successor(words, summary, 0)
        while space >= 0:
            num_with_space[space] = 0
            _remove(words, summary, space)
            space = _successor(words, summary, space)
    return num_packs


@numba.njit
def _give_back(words, summary, num_with_space, space, num_packs):  # type: ignore[no-untyped-def]
    if space > 0 and num_packs > 0:
        if num_with_space[space] == 0:
            _add(words, summary, space)
        num_with_space[space] += num_packs


@numba.njit
def _longest_first(lengths, capacity):  # type: ignore[no-untyped-def]
    """Indices by decreasing length, ties in the order given: a counting sort."""
    starts = np.zeros(capacity + 2, dtype=np.int32)  # of capacity - length
    for length in lengths:
        starts[capacity - length + 1] += 1
    for rank in range(capacity + 1):
        starts[rank + 1] += starts[rank]
    ranked = np.empty(len(lengths), dtype=np.int32)
    for index in range(len(lengths)):
        rank = capacity - lengths[index]
        ranked[starts[rank]] = index
        starts[rank] += 1
    return ranked


@numba.njit
def _group(pack_of, num_packs):  # type: ignore[no-untyped-def]
    """Indices by pack, ascending inside each, and where each pack starts."""
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    for pack in pack_of:
        offsets[pack + 1] += 1
    for pack in range(num_packs):
        offsets[pack + 1] += offsets[pack]
    nexts = offsets[:-1].copy()
    members = np.empty(len(pack_of), dtype=np.int64)
    for index in range(len(pack_of)):
        pack = pack_of[index]
        members[nexts[pack]] = index
        nexts[pack] += 1
    return members, offsets


@numba.njit
def _empty_set(largest):  # type: ignore[no-untyped-def]
    """Words and summary of a set that can hold 0..largest."""
    num_words = (largest >> 6) + 1
    return np.zeros(num_words, dtype=np.uint64), np.zeros((num_words >> 6) + 1, dtype=np.uint64)


@numba.njit
def _add(words, summary, member):  # type: ignore[no-untyped-def]
    word = member >> 6
    words[word] |= _ONE << np.uint64(member & 63)
    summary[word >> 6] |= _ONE << np.uint64(word & 63)


@numba.njit
def _remove(words, summary, member):  # type: ignore[no-untyped-def]
    word = member >> 6
    words[word] &= ~(_ONE << np.uint64(member & 63))
    if words[word] == 0:
        summary[word >> 6] &= ~(_ONE << np.uint64(word & 63))


@numba.njit
def _successor(words, summary, start):  # type: ignore[no-untyped-def]
    """The smallest member that is at least `start`; -1 when there is none."""
    word = start >> 6
    bits = words[word] >> np.uint64(start & 63)
    if bits != 0:
        return start + _lowest(bits)
    word += 1
    block = word >> 6
    if block == len(summary):
        return -1
    bits = summary[block] >> np.uint64(word & 63) << np.uint64(word & 63)
    while bits == 0:
        block += 1
        if block == len(summary):
            return -1
        bits = summary[block]
    word = (block << 6) + _lowest(bits)
    return (word << 6) + _lowest(words[word])


@numba.njit
def _lowest(bits):  # type: ignore[no-untyped-def]
    """The number of the lowest bit that is on."""
    return _BIT_OF_PRODUCT[((bits & (~bits + _ONE)) * _DE_BRUIJN) >> np.uint64(58)]

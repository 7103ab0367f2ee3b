"""A shuffle that is a formula: position -> example, for any position, with nothing stored.

    derive_key("order", seed, epoch) -> 64-bit key -> permute(positions, n, key) -> examples

A balanced Feistel network (Luby and Rackoff, 1988) is a bijection on [0, 4**h). Values that fall outside [0, n) are
sent through again until they land inside (cycle walking; Black and Rogaway, 2002), which keeps it a bijection on
[0, n); a handful of examples is ordered by hash instead. So the example at position k of any epoch costs O(1), every
example comes exactly once, and resuming needs no generator state. Only 64-bit integer arithmetic is used, which is the
same on every machine.
"""

from __future__ import annotations

import hashlib

import numpy as np

_NUM_ROUNDS = 6  # four are the theoretical minimum; two more hide the weakness of a cheap round function
_SMALL = 256  # up to here sorting hashed positions is as cheap, and reaches every order, which small networks do not


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and words, the same in every process (Python's own `hash` is salted).

    Parts are typed and length-prefixed before SHA-256, so `("a", "bc")` and `("ab", "c")`, `1` and `"1"` differ.
    """
    digest = hashlib.sha256()
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little")


def permute(indices: np.ndarray, n: int, key: int) -> np.ndarray:
    """Map each index of [0, n) to its image under the bijection chosen by `key`.

    `indices`: integers [K], each in [0, n). Returns int64[K]. `permute(np.arange(n), n, key)` is a shuffled range.
    """
    values = np.asarray(indices).astype(np.uint64)
    if values.size and int(values.max()) >= n:
        raise ValueError(f"index {int(values.max())} is outside [0, {n})")
    round_keys = [derive_key("round", key, number) for number in range(_NUM_ROUNDS)]
    if n <= _SMALL:
        hashed = _mix(_mix(np.arange(n, dtype=np.uint64), round_keys[0]), round_keys[1])
        return np.argsort(hashed, kind="stable")[values.astype(np.int64)]
    half_bits = ((n - 1).bit_length() + 1) // 2
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    """One pass through the network on [0, 4**half_bits); uint64[K] -> uint64[K]."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right, round_key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) on `values + key`, modulo 2**64."""
    mixed = values + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

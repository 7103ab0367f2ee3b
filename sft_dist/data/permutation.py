"""A shuffle that is a formula: position -> example, for any position, with nothing stored.

    derive_key("order", seed, epoch) -> 64-bit key -> permute(positions, n, key) -> examples

A Feistel network (Luby and Rackoff, 1988) is a bijection on [0, 2**b); with halves of unequal width (Schneier and
Kelsey, 1996) any b will do, so the domain is less than twice n. Values that fall outside [0, n) are sent through again
until they land inside (cycle walking; Black and Rogaway, 2002), which keeps it a bijection on [0, n); a handful of
examples is ordered by hash instead. So the example at position k of any epoch costs O(1), every example comes exactly
once, and resuming needs no generator state. Only integer arithmetic is used, which is the same on every machine.
"""

from __future__ import annotations

import hashlib

import numpy as np

_NUM_ROUNDS = 6  # four are the theoretical minimum; two more hide the weakness of a cheap round function
_SMALL = 1024  # up to here sorting hashed positions is as cheap, and reaches every order, which small networks do not
_FEW = 4096  # up to here NumPy is done before numba would be imported


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
    values = np.array(indices, dtype=np.uint64)
    if values.size and int(values.max()) >= n:
        raise ValueError(f"index {int(values.max())} is outside [0, {n})")
    if n <= _SMALL:
        return np.argsort(mix64(np.arange(n, dtype=np.uint64), key), kind="stable")[values.astype(np.int64)]
    walk = walk_reference if values.size <= _FEW else walk_compiled
    return walk(values, n, key).astype(np.int64)


def walk_reference(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """Images of uint64[K] under the network on at least [0, n), cycle walking included."""
    high_bits, low_bits = _halves(n)
    round_keys = _round_keys(key)
    values = values.copy()
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], high_bits, low_bits, round_keys)
        outside = outside[values[outside] >= n]
    return values


def walk_compiled(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """The values of `walk_reference`, about 6 times faster."""
    from sft_dist.data import compiled

    values = values.copy()
    compiled.permute(values, np.uint64(n), *_halves(n), _round_keys(key))
    return values


def _halves(n: int) -> tuple[int, int]:
    """Widths of the two halves of the smallest domain 2**b that holds [0, n)."""
    bits = (n - 1).bit_length()
    return bits // 2, bits - bits // 2


def _round_keys(key: int) -> np.ndarray:
    return np.array([derive_key("round", key, number) & 0xFFFFFFFF for number in range(_NUM_ROUNDS)], dtype=np.uint32)


def _feistel(values: np.ndarray, high_bits: int, low_bits: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass through the network on [0, 2**(high_bits + low_bits)); uint64[K] -> uint64[K]."""
    high_mask, low_mask = np.uint32((1 << high_bits) - 1), np.uint32((1 << low_bits) - 1)
    high = (values >> np.uint64(low_bits)).astype(np.uint32)
    low = values.astype(np.uint32) & low_mask
    for high_key, low_key in round_keys.reshape(-1, 2):
        high = high ^ (_mix(low, high_key) & high_mask)
        low = low ^ (_mix(high, low_key) & low_mask)
    return (high.astype(np.uint64) << np.uint64(low_bits)) | low.astype(np.uint64)


def _mix(values: np.ndarray, key: np.uint32) -> np.ndarray:
    """The 32-bit hash `lowbias32` (Wellons, 2018) of `values + key`, modulo 2**32."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x846CA68B)
    return mixed ^ (mixed >> np.uint32(16))


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """64 bits for each of uint64[K] `values`: the finaliser of splitmix64 (Steele, Lea and Flood, 2014), twice."""
    mixed = values
    for number in range(2):
        mixed = mixed + np.uint64(derive_key("round", key, number))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed

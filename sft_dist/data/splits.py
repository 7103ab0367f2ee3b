"""Which conversations are held out: a function of their content and a seed.

Exact duplicates always fall on one side, the order of the file does not matter, and the counts are exact: of each
source, the contents with the smallest keyed hashes are held out. Adding rows therefore moves only few others.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import numpy as np

from sft_dist.data.permutation import derive_key
from sft_dist.types import Conversation, TokenizedExample

_quoted = json.encoder.encode_basestring_ascii
TRAIN, EVAL, TEST = range(3)


def content_key(given: Conversation | TokenizedExample) -> int:
    """64 bits that depend on what is said, not on the file, the place or loss weights."""
    if isinstance(given, TokenizedExample):
        return _hash(given.input_ids.astype("<i4").tobytes())
    said = ", ".join(
        f"[{_quoted(m.role)}, {_quoted(m.content)}, {json.dumps(dict(m.extra), sort_keys=True) if m.extra else '{}'}]"
        for m in given.messages
    )  # as json.dumps would write it, only faster
    tools = json.dumps(given.tools, sort_keys=True) if given.tools else "[]"
    return _hash(f"[[{said}], {tools}]".encode())


def draw_splits(
    contents: np.ndarray, sources: np.ndarray, eval_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """The split of each row: int8[N] of TRAIN, EVAL, TEST.

    `contents` uint64[N] are content keys, `sources` int[N] tell which source a row stands in. Each source gives its
    fractions of its different contents, and keeps one at least; a content that stands in several belongs to the first.
    A fraction above 0 holds out at least one content of all, as long as one is left to train on (evaluation comes
    first).
    """
    unique, first, row_content = np.unique(contents, return_index=True, return_inverse=True)
    owner = sources[first]
    keyed = unique ^ np.uint64(derive_key("split", seed))  # contents are hashes already: the key only turns the order
    order = np.lexsort((keyed, owner))
    splits = np.zeros(len(unique), dtype=np.int8)
    edges = np.searchsorted(owner[order], [*np.unique(owner), np.iinfo(np.int64).max])
    for start, end in pairwise(edges.tolist()):
        num_eval, num_test = _shares(end - start, eval_fraction, test_fraction)
        splits[order[start : start + num_test]] = TEST
        splits[order[start + num_test : start + num_test + num_eval]] = EVAL
    if eval_fraction > 0:
        _at_least_one(splits, order, EVAL, instead_of=TEST)
    if test_fraction > 0:
        _at_least_one(splits, order, TEST)
    return splits[row_content]


def _shares(num: int, eval_fraction: float, test_fraction: float) -> tuple[int, int]:
    """How many of `num` contents are held out for evaluation and for test."""
    num_eval = min(round(eval_fraction * num), max(num - 1, 0))
    return num_eval, min(round(test_fraction * num), max(num - 1 - num_eval, 0))


def _at_least_one(splits: np.ndarray, order: np.ndarray, split: int, instead_of: int | None = None) -> None:
    """Small sets round down to nothing: take a content that would be trained, if another one is left for that."""
    trained, other = (order[splits[order] == taken] for taken in (TRAIN, instead_of))
    given = trained if len(trained) > 1 else other
    if split not in splits and len(given):
        splits[given[0]] = split


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")

"""Which conversations are held out: a function of their content and a seed.

    groups = hang_together(contents, units, pairs)       what may not be torn apart: uint64[N]
    draw_splits(contents, groups, sources, 0.02, 0, 0)   int8[N] of TRAIN, EVAL, TEST

Rows hang together when they say the same, when they come from one record (its forms, the threads of a tree, pieces of
a long conversation), and when a pair joins them (near-duplicates, where they are looked for); so do rows that a chain
of such steps connects. Groups are drawn whole: of each source, those with the smallest keyed hashes, up to its share.
The hash is that of the smallest content key in the group, so neither files, places, their order nor the number of
workers matters. Rows that are added elsewhere move only few others: those at the edge of a share.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np

from sft_dist.data.permutation import derive_key, mix64
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


def question_key(given: Conversation | TokenizedExample) -> int:
    """64 bits that depend on what is asked: all that is said before the last message."""
    return content_key(replace(given, messages=given.messages[:-1]) if isinstance(given, Conversation) else given)


def hang_together(contents: np.ndarray, units: np.ndarray, pairs: np.ndarray | None = None) -> np.ndarray:
    """The group of each row, named by the smallest content key in it: uint64[N].

    `contents` uint64[N] are content keys; `units` uint64[N] are equal for rows of one record; `pairs` int64[P, 2] are
    rows that are to stay together whatever they say.
    """
    unique, place = np.unique(contents, return_inverse=True)
    order = np.argsort(units, kind="stable")
    same = np.flatnonzero(units[order[1:]] == units[order[:-1]])
    edges = np.stack([place[order[same]], place[order[same + 1]]], axis=1)
    del order, same
    if pairs is not None:
        edges = np.concatenate([edges, place[pairs]])
    return unique[_connected(len(unique), edges[edges[:, 0] != edges[:, 1]])][place]


def draw_splits(
    contents: np.ndarray, groups: np.ndarray, sources: np.ndarray, eval_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """The split of each row: int8[N] of TRAIN, EVAL, TEST.

    `contents` uint64[N] are content keys, `groups` uint64[N] what hangs together (rows of equal content do), `sources`
    int[N] tell which source a row stands in. Each source gives its fractions of its different contents, rounded to
    whole groups, none of which is larger than its share, and keeps one group at least; a group that stands in several
    belongs to the first. A fraction above 0 holds out at least one group of all, then the smallest, as long as one is
    left to train on (evaluation comes first).
    """
    names, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group[np.unique(contents, return_index=True)[1]], minlength=len(names))
    owner = np.full(len(names), np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(owner, group, sources)
    order = np.lexsort((mix64(names, derive_key("split", seed)), owner))  # mixed: large groups have small names
    splits = np.zeros(len(names), dtype=np.int8)
    edges = np.searchsorted(owner[order], [*np.unique(owner), np.iinfo(np.int64).max])
    del names, owner
    for start, end in pairwise(edges.tolist()):
        own = order[start:end]
        splits[own] = _of_source(sizes[own], eval_fraction, test_fraction)
    if eval_fraction > 0:
        _at_least_one(splits, order, sizes, EVAL, instead_of=TEST)
    if test_fraction > 0:
        _at_least_one(splits, order, sizes, TEST)
    return splits[group]


def _connected(num: int, edges: np.ndarray) -> np.ndarray:
    """The smallest number that each of `num` is connected with by `edges` int64[E, 2]: int64[num].

    Each root that an edge joins to a smaller one goes below it, then all paths are cut short, until no edge joins two
    roots (after Zhang, Azad and Hu, 2020, FastSV). Two or three rounds as a rule.
    """
    root = np.arange(num)
    while True:
        ends = root[edges]
        ends = ends[ends[:, 0] != ends[:, 1]]
        if not len(ends):
            return root
        np.minimum.at(root, ends.max(axis=1), ends.min(axis=1))
        while not np.array_equal(shorter := root[root], root):
            root = shorter


def _of_source(sizes: np.ndarray, eval_fraction: float, test_fraction: float) -> np.ndarray:
    """The splits of a source's groups, in the order in which they are drawn: int8[G]."""
    num = int(sizes.sum())
    num_eval = min(round(eval_fraction * num), max(num - 1, 0))
    num_test = min(round(test_fraction * num), max(num - 1 - num_eval, 0))
    splits = np.zeros(len(sizes), dtype=np.int8)
    for split, share in ((TEST, num_test), (EVAL, num_eval)):
        fits = (splits == TRAIN) & (sizes <= share)
        middle = np.cumsum(np.where(fits, sizes, 0))  # of each group, were all that fit laid in a row, and doubled
        middle *= 2
        middle -= sizes
        splits[fits & (middle < 2 * share)] = split
    if not (splits == TRAIN).any():
        splits[-1] = TRAIN
    return splits


def _at_least_one(
    splits: np.ndarray, order: np.ndarray, sizes: np.ndarray, split: int, instead_of: int | None = None
) -> None:
    """Small sets round down to nothing: take the smallest group that would be trained, if another is left for that."""
    trained, other = (order[splits[order] == taken] for taken in (TRAIN, instead_of))
    given = trained if len(trained) > 1 else other
    if split not in splits and len(given):
        splits[given[np.argmin(sizes[given])]] = split


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")

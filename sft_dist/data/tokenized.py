"""Rows that were tokenised elsewhere: `input_ids`, and which of them are learned.

    labels            the same ids, -100 where nothing is learned (not shifted: as Hugging Face models take them)
    loss_weights      a number from 0 up for each token
    attention_mask    0 where a token is padding, which is dropped; alone it means that every other token is learned

They must come from the tokenizer of this run: nothing here can see whether they do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sft_dist.data.fields import Value
from sft_dist.data.messages import MAX_WEIGHT
from sft_dist.data.strict_json import kind_of
from sft_dist.errors import BadRecord
from sft_dist.types import IGNORE_INDEX, TokenizedExample


def is_tokenized(value: Value) -> bool:
    return "input_ids" in value


def read_tokenized(value: Value, source: str, id: str) -> TokenizedExample:
    """The example that a tokenised row is. Raises BadRecord."""
    ids = _numbers(value, "input_ids", "iu")
    if not len(ids) or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise BadRecord("field 'input_ids' must hold token numbers, from 0 up, at least one")
    given = {key: _numbers(value, key, kinds) for key, kinds in _BESIDE.items() if value.get(key) is not None}
    for key, numbers in given.items():
        if len(numbers) != len(ids):
            raise BadRecord(f"field {key!r} has {len(numbers)} items, 'input_ids' {len(ids)}")
    is_real = _is_real(given.get("attention_mask", np.ones(len(ids), np.int64)))
    weights = _weights(ids, given, is_real)[is_real].astype(np.float32)
    return TokenizedExample(ids[is_real].astype(np.int32), weights, source, id, _runs(weights > 0))


_BESIDE = {"labels": "iu", "loss_weights": "iuf", "attention_mask": "iu"}  # field -> kinds of numpy's numbers in it


def _numbers(value: Value, key: str, kinds: str) -> np.ndarray:
    """The list `value[key]` as an array."""
    given = value.get(key)
    if not isinstance(given, list):
        raise BadRecord(f"field {key!r} must be a list of numbers, it is {kind_of(given)}")
    try:
        numbers: np.ndarray[Any, Any] = np.array(given) if given else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        numbers = np.array([None])
    if numbers.ndim != 1 or numbers.dtype.kind not in kinds:
        what = "numbers" if "f" in kinds else "whole numbers"
        raise BadRecord(f"field {key!r} must be a list of {what}")
    return numbers


def _is_real(mask: np.ndarray) -> np.ndarray:
    """Which tokens are no padding. Padding stands at one end: a hole is something that packing could not keep."""
    places = np.flatnonzero(mask)
    if not len(places) or ((mask != 0) & (mask != 1)).any() or places[-1] - places[0] + 1 != len(places):
        raise BadRecord("field 'attention_mask' must be 1 for one run of tokens and 0 around it")
    return mask == 1


def _weights(ids: np.ndarray, given: dict[str, np.ndarray], is_real: np.ndarray) -> np.ndarray:
    if {"labels", "loss_weights"} <= given.keys():
        raise BadRecord("both 'labels' and 'loss_weights' say what is learned: keep one")
    if "loss_weights" in given:
        weights = given["loss_weights"].astype(np.float64)
        if not ((weights >= 0) & (weights <= MAX_WEIGHT)).all():
            raise BadRecord(f"field 'loss_weights' must hold numbers from 0 to {MAX_WEIGHT:,}")
        return weights
    if "labels" in given:
        labels = given["labels"]
        other = np.flatnonzero((labels != IGNORE_INDEX) & (labels != ids) & is_real)
        if len(other):
            at = int(other[0])
            raise BadRecord(
                f"label {at} is {labels[at]}, its token is {ids[at]}: "
                f"labels must be {IGNORE_INDEX} or the token itself, not shifted"
            )
        return labels != IGNORE_INDEX
    if "attention_mask" in given:
        return np.ones(len(ids))
    raise BadRecord("'input_ids' alone do not say what is learned: give labels, loss_weights or attention_mask")


def _runs(learned: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The ranges [start, end) that are learned."""
    edges = np.flatnonzero(np.diff(learned.astype(np.int8), prepend=0, append=0))
    return tuple((int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True))

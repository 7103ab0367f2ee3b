"""From spans of characters to tokens: which tokens a span covers, their weights, the ranges of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sft_dist.data.supervision import Span

_ORIGIN = np.zeros(1, dtype=np.int64)


def token_ranges(encoding: Any, num_characters: int, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The tokens [first, end) that cover at least one character of each span.

    Asks the native encoding for the edges of a span alone. Some tokenizers report tokens without the white space they
    hold; where a span begins or ends in such a gap, all offsets are looked at.
    """
    ranges = []
    for span in spans:
        first = encoding.char_to_token(span.start)
        end = len(encoding) if span.end >= num_characters else encoding.char_to_token(span.end)
        if first is None or end is None or span.end <= span.start:
            return ranges_by_offsets(encoding.offsets, spans)
        if end < len(encoding) and encoding.token_to_chars(end)[0] < span.end:
            end += 1  # a token that reaches over the end
        ranges.append((first, end))
    return ranges


def ranges_by_offsets(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The same from all tokens' characters [start, end): the reference. A gap belongs to the token behind it."""
    edges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = edges[:, 1]
    starts = np.minimum(edges[:, 0], np.concatenate([_ORIGIN, np.maximum.accumulate(ends)[:-1]])[: len(ends)])
    covered = [np.flatnonzero((starts < span.end) & (ends > span.start)) for span in spans]
    return [(int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else (0, 0) for tokens in covered]


def token_weights(num_tokens: int, ranges: Sequence[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """float32[num_tokens]: the largest weight among the spans that a token is in, 0 for none."""
    weights = np.zeros(num_tokens, dtype=np.float32)
    if len(spans) == 1:
        weights[slice(*ranges[0])] = max(spans[0].weight, 0.0)
        return weights
    for (first, end), span in zip(ranges, spans, strict=True):
        np.maximum(weights[first:end], np.float32(span.weight), out=weights[first:end])
    return weights


def token_answers(ranges: Sequence[tuple[int, int]], spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
    """The token range [start, end) of each learned answer, in order."""
    found: dict[int, tuple[int, int]] = {}
    for (first, end), span in zip(ranges, spans, strict=True):
        if span.answer is not None and span.weight > 0 and end > first:
            found[span.answer] = found[span.answer][0] if span.answer in found else first, end
    return tuple(found.values())

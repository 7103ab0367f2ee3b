"""Conversations that `long_examples: split` cut, put together again: they are judged by all they say, not by piece.

wholes = Wholes(corpus)
wholes.first_rows()       int64[W]: the row of each conversation, or of its first piece; the others follow it
wholes.example(row)       the conversation that begins there, as it was before it was cut
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from sft_dist.types import TokenizedExample

if TYPE_CHECKING:
    from sft_dist.data.store import Corpus

LATER_PIECE = "/([2-9]|[1-9][0-9]+)$"  # how `tokenise.fit` names them


class Wholes:
    """Which rows of a corpus belong together: one bit of knowledge for each row."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._goes_on = pc.match_substring_regex(corpus.texts("place"), LATER_PIECE).to_numpy()

    def first_rows(self) -> np.ndarray:
        """The row with which each conversation begins, in order: int64[W]."""
        return np.flatnonzero(~self._goes_on)

    def is_first(self, rows: np.ndarray) -> np.ndarray:
        """Whether a conversation begins with each of `rows`: bool[K]."""
        return ~self._goes_on[rows]

    def rows_from(self, row: int) -> range:
        """The rows of the conversation that begins with `row`."""
        end = row + 1
        while end < len(self._goes_on) and self._goes_on[end]:
            end += 1
        return range(row, end)

    def example(self, row: int) -> TokenizedExample:
        """The conversation that begins with `row`, under the id of its first piece."""
        return joined([self._corpus.example(piece) for piece in self.rows_from(row)])


def joined(pieces: Sequence[TokenizedExample]) -> TokenizedExample:
    """The example that was cut into `pieces`, but for tokens without a target that no piece holds.

    A piece begins with the last token of the one before it. An answer goes on where one ends with that token and the
    next begins with it.
    """
    first, *later = pieces
    ids, weights, answers, end = [first.input_ids], [first.loss_weights], list(first.answers), len(first.input_ids)
    for piece in later:
        for start, stop in piece.answers:
            if start == 0 and answers and answers[-1][1] == end:
                answers[-1] = (answers[-1][0], end - 1 + stop)
            else:
                answers.append((end - 1 + max(start, 1), end - 1 + stop))
        ids.append(piece.input_ids[1:])
        weights.append(piece.loss_weights[1:])
        end += len(piece.input_ids) - 1
    if not later:
        return first
    return replace(first, input_ids=np.concatenate(ids), loss_weights=np.concatenate(weights), answers=tuple(answers))

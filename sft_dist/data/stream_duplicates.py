"""How much of a stream repeats what came before, counted against the last million examples of it.

All of a stream cannot be remembered; eight bytes of each of the last `SEGMENTS` segments' examples can. They are on
disk with the segments, so an interrupted reading counts what an uninterrupted one would.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np

from sft_dist.data.store import CORPUS, Corpus
from sft_dist.data.stream_store import segment_folder

SEGMENTS = 64  # of 16,384 examples and a little more


class Repetitions:
    """The contents of the segments before `number`."""

    def __init__(self, folder: Path, number: int) -> None:
        before = (segment_folder(folder, at) / CORPUS for at in range(max(0, number - SEGMENTS), number))
        self._contents = deque((np.unique(Corpus(path).column("content")) for path in before), SEGMENTS)

    def count(self, contents: np.ndarray, sources: np.ndarray, num_sources: int) -> np.ndarray:
        """Rows of the next segment whose content came before, by source: int64[num_sources].

        `contents` uint64[N], `sources` int[N].
        """
        repeated = np.ones(len(contents), bool)
        unique, first = np.unique(contents, return_index=True)
        known = np.zeros(len(unique), bool)
        for earlier in self._contents:
            known |= np.isin(unique, earlier, assume_unique=True)
        repeated[first[~known]] = False
        self._contents.append(unique)
        return np.bincount(sources[repeated], minlength=num_sources)

"""How much of a stream repeats what came before, or what is held out.

    Repetitions(folder, number).count(...)     against the last million examples of it
    overlap_notice(folder, "eval", contents)   held-out examples among all that was read so far

All of a stream cannot be remembered; eight bytes of each of the last `SEGMENTS` segments' examples can. They are on
disk with the segments, so an interrupted reading counts what an uninterrupted one would.
"""

from __future__ import annotations

from collections import deque
from itertools import count
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


def overlap_notice(folder: Path, split: str, contents: np.ndarray) -> str:
    """How many of the different `contents` uint64[N] of a held-out split stand in the segments that are there."""
    unique = np.unique(contents)
    trained, num_read = np.zeros(len(unique), bool), 0
    for number in count():
        if not segment_folder(folder, number).exists():
            break
        streamed = Corpus(segment_folder(folder, number) / CORPUS).column("content")
        trained |= np.isin(unique, streamed)
        num_read += len(streamed)
    shared = int(trained.sum())
    return (
        f"{'warning: ' if shared else ''}{shared:,} of {len(unique):,} {split} examples are among the {num_read:,} "
        "streamed so far, compared by content"
    )

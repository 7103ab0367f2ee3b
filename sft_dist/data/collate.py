"""Packs in, one `PackedBatch` out. The label shift happens here, inside each document.

    documents   [a0 a1 a2] [b0 b1]  + padding document [p p p]      T rounded up to a multiple
    labels      [a1 a2  .] [b1  .]                     [. . .]      . is IGNORE_INDEX, also where the weight is 0
    positions   [ 0  1  2] [ 0  1]                     [0 0 0]      padding may be longer than any document may be
    cu_seqlens   0          3       5                          8

The last token of a document has no label, so nothing predicts across a boundary. `padded` builds the classic [B, S]
rectangle from the same documents with the same labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sft_dist.types import IGNORE_INDEX, Pack, PackedBatch, StepPlan


class Documents(Protocol):
    """What collate reads of a `TokenStore`."""

    def token_ids(self, index: int) -> np.ndarray: ...  # int32[L]

    def loss_weights(self, index: int) -> np.ndarray: ...  # float32[L]


def collate(
    micro_batch: Sequence[Pack], store: Documents, *, packing: str, pad_token_id: int, pad_to_multiple_of: int
) -> PackedBatch:
    """One micro-batch as CPU tensors: [1, T], or [B, S] under `packing="padded"`.

    T (or S) is the smallest multiple of `pad_to_multiple_of` that holds the documents. An empty micro-batch becomes one
    padding document without labels, so that a rank without work still takes part in every collective.
    """
    examples = [example for pack in micro_batch for example in pack.example_ids]
    given = [(store.token_ids(example), store.loss_weights(example)) for example in examples]
    padding = _Padding(pad_token_id, pad_to_multiple_of)
    return _padded([_shift([one]) for one in given], padding) if packing == "padded" else _packed(given, padding)


def batch_digest(step: StepPlan, store: Documents) -> str:
    """SHA-256 over the step's token ids in plan order as int32 little-endian, padding left out.

    Equal digests mean the same tokens in the same order, whatever the world size.
    """
    digest = hashlib.sha256()
    for pack in step.packs:
        for example in pack.example_ids:
            digest.update(store.token_ids(example).astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Document:
    """One document, or padding, with its labels already shifted: three arrays [L]."""

    input_ids: np.ndarray  # int64
    labels: np.ndarray  # int64
    loss_weights: np.ndarray  # float32

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class _Padding:
    token_id: int
    multiple: int

    def document(self, length: int) -> _Document:
        """`length` tokens that teach nothing."""
        ignored = np.full(length, IGNORE_INDEX, dtype=np.int64)
        return _Document(np.full(length, self.token_id, dtype=np.int64), ignored, np.zeros(length, dtype=np.float32))

    def missing(self, length: int) -> int:
        """How many tokens `length` lacks to the next multiple; a whole multiple when it is 0."""
        return -length % self.multiple if length else self.multiple


def _shift(documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Document:
    """(tokens, weights) of documents in a row: each position learns the next token of its document, with that token's
    weight; the last of a document learns nothing. All at once: a hundred short ones take no longer than one long."""
    input_ids, weights = (np.concatenate(column) for column in zip(*documents, strict=True))
    targets = np.append(weights[1:], np.float32(0.0))
    targets[np.cumsum([len(ids) for ids, _ in documents]) - 1] = 0.0
    labels = np.where(targets > 0, np.append(input_ids[1:], 0), IGNORE_INDEX)
    return _Document(input_ids.astype(np.int64), labels.astype(np.int64), targets)


def _packed(documents: list[tuple[np.ndarray, np.ndarray]], padding: _Padding) -> PackedBatch:
    lengths = [len(input_ids) for input_ids, _ in documents]
    num_tokens = sum(lengths)
    segments = [_shift(documents)] if documents else []
    if missing := padding.missing(num_tokens):
        segments.append(padding.document(missing))
        lengths.append(missing)
    row, starts = _join(segments), np.cumsum([0, *lengths])
    positions = np.arange(len(row)) - np.repeat(starts[:-1], lengths)
    positions[num_tokens:] = (
        0  # as many as a row holds would leave a learned table, or turn `longrope` for all documents
    )
    return PackedBatch(
        input_ids=torch.from_numpy(row.input_ids)[None],
        labels=torch.from_numpy(row.labels)[None],
        loss_weights=torch.from_numpy(row.loss_weights)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=max(lengths),
        num_tokens=num_tokens,
        num_loss_tokens=int(np.count_nonzero(row.labels != IGNORE_INDEX)),
    )


def _padded(documents: list[_Document], padding: _Padding) -> PackedBatch:
    longest = max(map(len, documents), default=0)
    width = longest + padding.missing(longest)
    rows = [_join([document, padding.document(width - len(document))]) for document in documents]
    rows = rows or [padding.document(width)]
    positions = torch.arange(width).expand(len(rows), width).contiguous()
    lengths = torch.tensor([len(document) for document in documents] or [width])
    labels = np.stack([row.labels for row in rows])
    return PackedBatch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(np.stack([row.loss_weights for row in rows])),
        position_ids=positions,
        cu_seqlens=None,
        max_seqlen=width,
        num_tokens=sum(map(len, documents)),
        num_loss_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
        attention_mask=(positions < lengths[:, None]).long(),  # a row of padding sees itself: no softmax over nothing
    )


def _join(parts: Sequence[_Document]) -> _Document:
    return _Document(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        loss_weights=np.concatenate([part.loss_weights for part in parts]),
    )

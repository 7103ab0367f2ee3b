"""What a micro-batch teaches: exactly the next token inside each document, and nothing across an edge."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.collate import batch_digest, collate
from sft_dist.types import IGNORE_INDEX, Pack, PackedBatch, StepPlan

PAD = 99


@dataclass
class Lists:
    """A store of plain lists: rows of (tokens, weights)."""

    rows: list[tuple[list[int], list[float]]]

    def token_ids(self, index):
        return np.array(self.rows[index][0], dtype=np.int32)

    def loss_weights(self, index):
        return np.array(self.rows[index][1], dtype=np.float32)


def make_pack(*example_ids: int) -> Pack:
    return Pack(example_ids=example_ids, num_tokens=0, num_loss_tokens=0, loss_weight_sum=0.0, cost=0.0)


def collated(rows, *, multiple=1, packing="best_fit") -> PackedBatch:
    packs = [make_pack(index) for index in range(len(rows))]
    return collate(packs, Lists(rows), packing=packing, pad_token_id=PAD, pad_to_multiple_of=multiple)


documents = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=12).map(
        lambda tokens: ([token for token, _ in tokens], [weight for _, weight in tokens])
    ),
    min_size=1,
    max_size=6,
)
TWO = [([10, 11, 12], [0.0, 1.0, 1.0]), ([20, 21], [1.0, 0.5])]


def test_by_hand():
    batch = collated(TWO, multiple=8)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, PAD, PAD, PAD]]
    assert batch.labels.tolist() == [[11, 12, IGNORE_INDEX, 21] + [IGNORE_INDEX] * 4]
    assert batch.loss_weights.tolist() == [[1.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_loss_tokens) == (3, 5, 3)
    assert batch.attention_mask is None


def test_padded_by_hand():
    batch = collated(TWO, multiple=4, packing="padded")
    assert batch.input_ids.tolist() == [[10, 11, 12, PAD], [20, 21, PAD, PAD]]
    assert batch.labels.tolist() == [[11, 12, IGNORE_INDEX, IGNORE_INDEX], [21] + [IGNORE_INDEX] * 3]
    assert batch.loss_weights.tolist() == [[1.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.cu_seqlens is None
    assert (batch.max_seqlen, batch.num_tokens, batch.num_loss_tokens) == (4, 5, 3)


@given(rows=documents, multiple=st.integers(1, 16))
def test_each_document_learns_its_own_next_tokens_only(rows, multiple):
    batch = collated(rows, multiple=multiple)
    edges = batch.cu_seqlens.tolist()
    for (tokens, weights), start, end in zip(rows, edges, edges[1:], strict=False):
        assert batch.input_ids[0, start:end].tolist() == tokens
        assert batch.position_ids[0, start:end].tolist() == list(range(len(tokens)))
        expected = [token if weight > 0 else IGNORE_INDEX for token, weight in zip(tokens, weights, strict=True)][1:]
        assert batch.labels[0, start:end].tolist() == [*expected, IGNORE_INDEX]
        assert batch.loss_weights[0, start:end].tolist() == [*weights[1:], 0.0]


@given(rows=documents, multiple=st.integers(1, 16), packing=st.sampled_from(["best_fit", "padded"]))
def test_counts_and_shapes_agree(rows, multiple, packing):
    batch = collated(rows, multiple=multiple, packing=packing)
    assert batch.num_loss_tokens == int((batch.labels != IGNORE_INDEX).sum()) == int((batch.loss_weights > 0).sum())
    assert batch.num_tokens == sum(len(tokens) for tokens, _ in rows)
    assert batch.input_ids.shape == batch.labels.shape == batch.loss_weights.shape == batch.position_ids.shape
    assert batch.input_ids.shape[-1] % multiple == 0
    assert [batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype] == [torch.int64] * 3
    assert batch.loss_weights.dtype == torch.float32
    if packing == "best_fit":
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens[-1] == batch.input_ids.shape[1]
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())


@given(rows=documents)
def test_padded_and_packed_teach_the_same(rows):
    def taught(batch):
        on = batch.labels != IGNORE_INDEX
        columns = (batch.input_ids, batch.position_ids, batch.labels, batch.loss_weights)
        return [column[on].tolist() for column in columns]

    assert taught(collated(rows)) == taught(collated(rows, packing="padded"))


def test_padding_is_a_document_of_its_own_without_labels():
    batch = collated([([1, 2, 3], [0.0, 1.0, 1.0])], multiple=16)
    assert batch.cu_seqlens.tolist() == [0, 3, 16]
    assert batch.input_ids[0, 3:].tolist() == [PAD] * 13
    assert set(batch.labels[0, 3:].tolist()) == {IGNORE_INDEX}
    assert batch.max_seqlen == 13
    assert batch.position_ids[0, 3:].tolist() == [0] * 13, "an architecture may know fewer positions than a row has"


@pytest.mark.parametrize("packing", ["best_fit", "none", "padded"])
def test_an_empty_micro_batch_is_one_padding_document(packing):
    batch = collate([], Lists([]), packing=packing, pad_token_id=PAD, pad_to_multiple_of=8)
    assert batch.input_ids.tolist() == [[PAD] * 8]
    assert batch.labels.tolist() == [[IGNORE_INDEX] * 8]
    assert batch.position_ids.tolist() == [list(range(8)) if packing == "padded" else [0] * 8]
    assert (batch.num_tokens, batch.num_loss_tokens, batch.max_seqlen) == (0, 0, 8)
    if packing == "padded":
        assert batch.cu_seqlens is None
        assert batch.attention_mask.tolist() == [[1] * 8]
    else:
        assert batch.cu_seqlens.tolist() == [0, 8]
        assert batch.attention_mask is None


def test_digest_is_the_hash_of_tokens_in_plan_order():
    step = StepPlan(step=1, epoch=0, micro_batches=((make_pack(1), make_pack(0)), (make_pack(1),)))
    tokens = np.array([20, 21, 10, 11, 12, 20, 21], dtype="<i4")
    assert batch_digest(step, Lists(TWO)) == hashlib.sha256(tokens.tobytes()).hexdigest()

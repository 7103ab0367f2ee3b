"""Cutting a row, drawing the mask of the whole row, and what `parallel.sequence` refuses. The exchange itself is tested
with processes, in tests/distributed/test_sequence.py."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_config
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoConfig

from sft_dist.certify import Documents, merge
from sft_dist.config.auto import Facts, choose, refuse_uneven
from sft_dist.config.schema import Recipe
from sft_dist.data.collate import collate
from sft_dist.errors import ConfigError
from sft_dist.observe.header import batch_equation
from sft_dist.parallel.sequence import RowDropout, SequenceGroup, refuse_what_cannot_be_cut, share_dropout
from sft_dist.types import IGNORE_INDEX, PackedBatch, TokenizedExample

OF_TOKENS = ("input_ids", "labels", "loss_weights", "position_ids")


def row(lengths: tuple[int, ...], multiple: int, packing: str = "best_fit") -> PackedBatch:
    """Documents whose second half is learned, as the loader would hand them over; none for an empty micro-batch."""
    rng = np.random.default_rng(0)
    weights = [(np.arange(length) >= length // 2).astype(np.float32) for length in lengths]
    probe = Documents(
        tuple(TokenizedExample(rng.integers(1, 99, len(weight), dtype=np.int32), weight) for weight in weights)
    )
    packs = [merge(probe.packs)] if lengths and packing == "best_fit" else probe.packs
    return collate(packs, probe, packing=packing, pad_token_id=0, pad_to_multiple_of=multiple)


def groups(size: int) -> list[SequenceGroup]:
    return [SequenceGroup(size, index) for index in range(size)]


@pytest.mark.parametrize("lengths", [(9, 4, 30, 2, 7), (3,), (1, 1), ()], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4, 16])
def test_slices_laid_end_to_end_are_the_row(lengths: tuple[int, ...], size: int) -> None:
    whole = row(lengths, SequenceGroup(size).pad_multiple(8))
    slices = [group.cut(whole) for group in groups(size)]
    for name in OF_TOKENS:
        assert torch.equal(torch.cat([getattr(part, name) for part in slices], dim=1), getattr(whole, name)), name
    assert {part.input_ids.shape[1] for part in slices} == {whole.input_ids.shape[1] // size}
    assert sum(part.num_tokens for part in slices) == whole.num_tokens
    assert sum(part.num_loss_tokens for part in slices) == whole.num_loss_tokens
    for part in slices:
        assert part.num_loss_tokens == int((part.labels != IGNORE_INDEX).sum())
        assert part.cu_seqlens is whole.cu_seqlens
        assert part.max_seqlen == whole.max_seqlen


def test_a_group_of_one_holds_the_row_itself() -> None:
    whole = row((9, 4), 8)
    assert SequenceGroup().cut(whole) is whole
    assert SequenceGroup().across is None
    assert SequenceGroup().pad_multiple(8) == 8


def test_the_label_of_a_slices_last_token_is_the_next_slices_first_token() -> None:
    first, second = (group.cut(row((16,), 8)) for group in groups(2))
    assert first.labels[0, -1] == second.input_ids[0, 0]
    assert second.position_ids[0, 0] == 8


@pytest.mark.parametrize(
    ("batch", "size"), [(row((9,), 8), 3), (row((9, 4), 8, "padded"), 2)], ids=["uneven", "padded"]
)
def test_what_cannot_be_cut_is_an_error(batch: PackedBatch, size: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of {size} tokens"):
        SequenceGroup(size).cut(batch)


def test_the_field_list_of_the_test_is_complete() -> None:
    """A new field of PackedBatch has to be thought of in `cut`."""
    known = {*OF_TOKENS, "cu_seqlens", "max_seqlen", "num_tokens", "num_loss_tokens", "attention_mask"}
    assert {field.name for field in fields(PackedBatch)} == known


@pytest.mark.parametrize("size", [2, 4])
def test_slices_drop_what_the_row_would_drop(size: int) -> None:
    x = torch.randn(1, 24, 16)
    torch.manual_seed(7)
    expected = F.dropout(x, 0.3)
    found: list[Tensor] = []
    for group, part in zip(groups(size), x.chunk(size, dim=1), strict=True):
        torch.manual_seed(7)
        found.append(RowDropout(0.3, group)(part))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert torch.equal(torch.cat(found, dim=1) == 0, expected == 0)
    assert 0.2 < (expected == 0).float().mean() < 0.4


def test_dropout_modules_are_exchanged_where_rows_are_cut() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0)), "b": nn.Linear(2, 2)})
    share_dropout(model, SequenceGroup())
    assert not any(isinstance(module, RowDropout) for module in model.modules())
    share_dropout(model, SequenceGroup(2, 1))
    assert [type(module) for module in model["a"]] == [RowDropout, nn.Dropout]
    x = torch.randn(1, 4, 3)
    assert model["a"].eval()(x) is x


@pytest.mark.parametrize(("size", "words"), [(3, "does not divide the 4 attention heads of llama"), (8, "divisor")])
def test_heads_that_cannot_be_dealt_are_refused(size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        refuse_what_cannot_be_cut(tiny_config("llama"), size)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "attention_dropout"),
        ("phi3", "embd_pdrop"),
        ("gpt_neox", "hidden_dropout"),
        ("mixtral", "router_jitter_noise"),
    ],
)
def test_random_numbers_of_the_architecture_are_refused(model_type: str, name: str) -> None:
    config = AutoConfig.for_model(model_type, num_attention_heads=4, hidden_size=32, pad_token_id=0)
    setattr(config, name, 0.0)
    refuse_what_cannot_be_cut(config, 2)
    setattr(config, name, 0.1)
    with pytest.raises(ConfigError, match=rf"parallel\.sequence=2: {model_type} has {name}=0\.1"):
        refuse_what_cannot_be_cut(config, 2)


def test_dropout_of_a_head_that_is_not_there_is_no_matter() -> None:
    config = tiny_config("llama")
    config.classifier_dropout, config.summary_first_dropout = 0.1, 0.1
    refuse_what_cannot_be_cut(config, 2)


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"path": "x"}, "data": {"sources": [{"path": "d.json"}]} | sections.pop("data", {})} | sections
    )


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"packing": "padded"}),
        ("tuning", {"method": "prefix"}),
        ("tuning", {"method": "prompt"}),
        ("optim", {"neftune_alpha": 5.0}),
        ("run", {"deterministic": "elastic"}),
    ],
    ids=str,
)
def test_what_needs_whole_rows_is_refused_with_the_way_out(section: str, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    recipe(**{section: values})
    asked = rf"(?=.*parallel\.sequence=2)(?=.*{section}\.{name}={value}).*set .*parallel\.sequence=1"
    with pytest.raises(ValidationError, match=asked):
        recipe(**{section: values}, parallel={"sequence": 2})


def test_processes_that_form_no_groups_are_refused() -> None:
    refuse_uneven(recipe(parallel={"sequence": 2}), 4)
    with pytest.raises(ConfigError, match=r"parallel\.sequence=4: 6 process\(es\) cannot form groups of 4; start 8"):
        refuse_uneven(recipe(parallel={"sequence": 4}), 6)


def test_auto_counts_groups_and_the_slices_memory() -> None:
    facts = Facts(10**9, 10**9, 4096, 32, 10**9, 10**6, world_size=8, device="cuda", memory_bytes=80 * 2**30)
    long = {"seq_len": 32768}
    assert choose(recipe(data=long), facts).activation_checkpointing == "full"
    whole, cut = (choose(recipe(data=long, parallel={"sequence": k}), facts) for k in (1, 8))
    assert whole.micro_batches_per_step == 16  # of 32,768 tokens
    assert cut.activation_checkpointing == "none"
    assert cut.micro_batches_per_step * cut.packs_per_micro_batch == 16  # no more slots for fewer groups


def test_the_header_counts_groups() -> None:
    assert batch_equation(2, 512, 8, 4, 2) == (
        "2 x 512 tokens per group x 4 accumulation x 2 group(s) of 2 processes = 8,192 token slots per step"
    )

"""Virtual tokens in packed rows: what stock PEFT computes one document at a time, for every document of the row."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_config
from peft import PeftModel
from torch import Tensor

from sft_dist.certify import Builder, Documents, certify, locate, probe_documents
from sft_dist.config.schema import TuningSection
from sft_dist.data.collate import collate
from sft_dist.errors import CertificateError
from sft_dist.evaluate.generation import stock_attention
from sft_dist.models import attention, virtual_tokens
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, carries_virtual_tokens
from sft_dist.types import PackedBatch, TokenizedExample
from sft_kernels import choose_head

HEAD = choose_head("reference", "cpu")[1]
DOCUMENTS = probe_documents(128, 0)
KINDS = [("prompt", "best_fit"), ("prompt", "none"), ("prompt", "padded"), ("prefix", "best_fit"), ("prefix", "none")]


def models(kind: str, packing: str, architecture: str) -> tuple[PackedCausalLM, PeftModel]:
    """Ours, and stock PEFT around stock attention, with the same weights far from their small beginnings."""
    base = build_random(tiny_config(architecture), dtype=torch.float32, seed=0)
    tuned = apply_tuning(base, TuningSection.model_validate({"method": kind, "virtual_tokens": 3}), seed=0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    stock = copy.deepcopy(tuned)
    stock.get_base_model().set_attn_implementation("eager")
    if packing != "padded":
        attention.install(base, "sdpa")
    return PackedCausalLM(tuned, HEAD).eval(), stock.eval()


def stock_hidden(stock: PeftModel, ids: Tensor) -> Tensor:
    """[L, D] of one document through PEFT, its virtual tokens left out."""
    found = stock(input_ids=ids[None], output_hidden_states=True, use_cache=True)
    return found.hidden_states[-1][0, -len(ids) :]


@pytest.mark.parametrize(("kind", "packing"), KINDS)
@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gemma3_text"])
@torch.no_grad()
def test_every_document_has_what_peft_gives_it_alone(kind: str, packing: str, architecture: str) -> None:
    ours, stock = models(kind, packing, architecture)
    batch = Builder(collate, packing)(DOCUMENTS)
    hidden = ours.hidden_states(batch)
    assert hidden.shape[:2] == batch.input_ids.shape
    for example, place in zip(DOCUMENTS.examples, locate(batch, DOCUMENTS), strict=True):
        expected = stock_hidden(stock, torch.from_numpy(example.input_ids).long())
        torch.testing.assert_close(hidden[place], expected, rtol=1e-5, atol=2e-5)


def only_the_first(batch: PackedBatch, num: int) -> virtual_tokens.Layout:
    """The mistake that packing invites: one set of virtual tokens at the head of the row."""
    made = RIGHT(batch, num)
    own = torch.arange(batch.input_ids.shape[1]) + num
    everything = torch.arange(num + batch.input_ids.shape[1])
    edges = made.batch.cu_seqlens.clone()  # type: ignore[union-attr]
    edges[1:] = batch.cu_seqlens[1:] + num  # type: ignore[index]
    positions = torch.cat([torch.arange(num), batch.position_ids[0]])[None]
    widened = PackedBatch(**{f: getattr(made.batch, f) for f in PackedBatch.__slots__} | {
        "cu_seqlens": edges, "position_ids": positions,
    })  # fmt: skip
    return virtual_tokens.Layout(widened, everything, own)


RIGHT = virtual_tokens.Layout.of


def certificate(ours: PackedCausalLM) -> Any:
    with torch.no_grad():
        return certify(
            ours.hidden_states, ours.model.base_model.config, head=HEAD, backend="sdpa", packing="best_fit",
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_certificate_sees_documents_without_their_virtual_tokens(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = models(kind, "best_fit", "qwen2")
    assert all(check.passed for check in certificate(ours))
    monkeypatch.setattr(virtual_tokens.Layout, "of", staticmethod(only_the_first))
    with pytest.raises(CertificateError, match="alone: hidden states"):
        certificate(ours)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_gradients_are_the_sum_over_documents(kind: str) -> None:
    ours, stock = models(kind, "best_fit", "qwen2")
    ours(Builder(collate, "best_fit")(DOCUMENTS)).backward()
    for example in DOCUMENTS.examples:
        ids = torch.from_numpy(example.input_ids).long()
        weights = torch.from_numpy(example.loss_weights[1:])
        logits = stock(input_ids=ids[None]).logits[0, -len(ids) : -1]
        (torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none") * weights).sum().backward()
    (mine,) = [p.grad for p in ours.parameters() if p.requires_grad]
    (theirs,) = [p.grad for p in stock.parameters() if p.requires_grad]
    assert mine is not None and theirs is not None
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_documents_of_one_token_and_padding_have_their_places() -> None:
    batch = collate(Documents(DOCUMENTS.examples[:2]).packs, DOCUMENTS, packing="best_fit", pad_token_id=0,
                    pad_to_multiple_of=8)  # fmt: skip
    made = RIGHT(batch, 2)
    edges = batch.cu_seqlens.tolist()  # type: ignore[union-attr]
    assert made.batch.cu_seqlens.tolist() == [edge + 2 * n for n, edge in enumerate(edges)]  # type: ignore[union-attr]
    row = torch.arange(100, 100 + batch.input_ids.shape[1])
    widened = made.widen(torch.tensor([-2, -1]), row, dim=0)
    for start, end, first, last in zip(edges, edges[1:], made.batch.cu_seqlens[:-1], made.batch.cu_seqlens[1:],
                                       strict=False):  # fmt: skip
        assert widened[first:last].tolist() == [-2, -1, *row[start:end].tolist()]
        own = range(2, end - start + 2) if start < batch.num_tokens else [2] * (end - start)
        assert made.batch.position_ids[0, first:last].tolist() == [0, 1, *own]
    assert torch.equal(widened[made.own], row)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@torch.no_grad()
def test_generation_sees_the_virtual_tokens(kind: str) -> None:
    """Greedy answers of PEFT's `generate`, token by token those of the packed forward."""
    ours, _ = models(kind, "best_fit", "qwen2")
    lm = ours.model.get_base_model()
    ids = DOCUMENTS.examples[3].input_ids[:12].tolist()
    expected = list(ids)
    for _ in range(6):
        document = Documents(
            (TokenizedExample(np.array(expected, dtype=np.int32), np.ones(len(expected), np.float32)),)
        )
        hidden = ours.hidden_states(Builder(collate, "none")(document))
        expected.append(int(lm.get_output_embeddings()(hidden[0, len(expected) - 1]).argmax()))
    with stock_attention(lm):
        prompt = torch.tensor([ids])
        found = ours.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
    assert found[0].tolist() == expected
    assert carries_virtual_tokens(ours) and not carries_virtual_tokens(lm)

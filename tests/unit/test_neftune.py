"""Noise on embeddings: bounded by the document's own length, packed or padded, drawn from the step's seed, never in
evaluation."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_config

from sft_dist.certify import Builder, Documents, locate, probe_documents
from sft_dist.data.collate import collate
from sft_dist.models import attention
from sft_dist.models.entry import document_lengths, neftune_noise
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM
from sft_kernels import choose_head

DOCUMENTS = probe_documents(128, 0)
ALPHA, WIDTH = 5.0, 32


@pytest.mark.parametrize("packing", ["best_fit", "none", "padded"])
def test_the_bound_is_that_of_each_document(packing: str) -> None:
    batch = Builder(collate, packing)(DOCUMENTS)
    lengths = document_lengths(batch)
    assert lengths.shape == batch.input_ids.shape
    embedded = torch.zeros(*batch.input_ids.shape, WIDTH)
    noises = torch.stack([neftune_noise(batch, embedded, ALPHA) for _ in range(40)])
    for example, place in zip(DOCUMENTS.examples, locate(batch, DOCUMENTS), strict=True):
        bound = ALPHA / (len(example.input_ids) * WIDTH) ** 0.5
        found = noises[(slice(None), *place)]
        assert (lengths[place] == len(example.input_ids)).all()
        assert 0.97 * bound < found.abs().max() <= bound
        assert found.mean().abs() < 4 * bound / (3 * found.numel()) ** 0.5


def packed(alpha: float | None) -> PackedCausalLM:
    model = build_random(tiny_config("qwen2"), dtype=torch.float32, seed=0)
    attention.install(model, "sdpa")
    return PackedCausalLM(model, choose_head("reference", "cpu")[1], neftune_alpha=alpha)


@torch.no_grad()
def test_it_is_a_function_of_the_seed_and_absent_in_evaluation() -> None:
    batch = Builder(collate, "best_fit")(Documents(DOCUMENTS.examples[:3]))
    noisy, plain = packed(ALPHA).train(), packed(None).train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(noisy(batch).item())
    assert losses[0] == losses[1] != losses[2]
    assert plain(batch).item() not in losses
    assert noisy.eval()(batch).item() == plain.eval()(batch).item()

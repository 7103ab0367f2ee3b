"""The certificate passes on architectures that can be packed, refuses those that cannot, and catches every mutation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import NOT_PACKABLE, PACKABLE, tiny_config
from torch import Tensor

from sft_dist import certify as module
from sft_dist.certify import Check, certify
from sft_dist.data.collate import collate
from sft_dist.errors import CertificateError, ConfigError
from sft_dist.models import attention
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM
from sft_dist.types import IGNORE_INDEX, PackedBatch
from sft_kernels import choose_head

CPU = torch.device("cpu")
HEAD = choose_head("reference", CPU)[1]


def run(model_type: str, packing: str = "best_fit", make_batch: Callable[..., PackedBatch] = collate) -> list[Check]:
    config = tiny_config(model_type)
    model = build_random(config, dtype=torch.float32, seed=0)
    model.config.use_cache = False
    backend = None if packing == "padded" else "sdpa"
    if backend:
        attention.install(model, backend)
    packed = PackedCausalLM(model, HEAD).eval()

    @torch.no_grad()
    def hidden(batch: PackedBatch) -> Tensor:
        return packed.hidden_states(batch)

    return certify(
        hidden,
        config,
        head=HEAD,
        backend=backend,
        packing=packing,
        device=CPU,
        dtype=torch.float32,
        make_batch=make_batch,
    )


@pytest.mark.parametrize("packing", ["best_fit", "none", "padded"])
@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_equals_unpacked(model_type: str, packing: str) -> None:
    """Loss to 1e-6 relative, every gradient to 1e-5 by norm, hidden states unmoved: the limits are in the checks."""
    checks = {check.name.split(":")[0]: check for check in run(model_type, packing)}
    assert checks.keys() == {"layout", "boundaries", "alone", "loss", "gradients"}
    assert checks["loss"].limit == 1e-6
    assert checks["gradients"].limit == 1e-5
    assert all(check.passed for check in checks.values())


@pytest.mark.parametrize("model_type", NOT_PACKABLE)
def test_architectures_that_leak_are_refused_with_the_way_out(model_type: str) -> None:
    with pytest.raises((CertificateError, ConfigError), match="packing=padded"):
        run(model_type)


@pytest.mark.parametrize("model_type", NOT_PACKABLE)
def test_the_way_out_works(model_type: str) -> None:
    assert all(check.passed for check in run(model_type, "padded"))


def positions_run_on(batch: PackedBatch) -> PackedBatch:
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


def one_segment(batch: PackedBatch) -> PackedBatch:
    total = batch.input_ids.shape[1]
    return replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), max_seqlen=total)


def mask_shifted_by_one(batch: PackedBatch) -> PackedBatch:
    labels = torch.roll(batch.labels, 1, dims=1)
    return replace(batch, labels=labels, loss_weights=(labels != IGNORE_INDEX).float())


def label_across_an_edge(batch: PackedBatch) -> PackedBatch:
    edge = int(batch.cu_seqlens[1])
    labels, weights = batch.labels.clone(), batch.loss_weights.clone()
    labels[0, edge - 1], weights[0, edge - 1] = batch.input_ids[0, edge], 1.0
    return replace(batch, labels=labels, loss_weights=weights, num_loss_tokens=batch.num_loss_tokens + 1)


def count_off_by_one(batch: PackedBatch) -> PackedBatch:
    return replace(batch, num_loss_tokens=batch.num_loss_tokens - 1)


MUTATIONS = [positions_run_on, one_segment, mask_shifted_by_one, label_across_an_edge, count_off_by_one]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_each_mutation_of_the_batch_is_caught(mutate: Callable[[PackedBatch], PackedBatch]) -> None:
    with pytest.raises((CertificateError, IndexError)):
        run("llama", make_batch=lambda *args, **kwargs: mutate(collate(*args, **kwargs)))


def test_attention_that_ignores_segments_is_caught_by_the_model_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain_causal(*args: Any, segments: attention.Segments, **kwargs: Any) -> Tensor:
        whole_row = attention.Segments.of(torch.tensor([0, len(segments.inverse)]))
        return attention.sdpa_segments(*args, segments=whole_row, **kwargs)

    monkeypatch.setitem(attention.BACKENDS, "sdpa", plain_causal)
    with pytest.raises(CertificateError, match="boundaries"):
        run("llama")


def test_attention_that_ignores_the_window_is_caught_by_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.sdpa_segments
    monkeypatch.setitem(attention.BACKENDS, "sdpa", lambda *a, **k: original(*a, **k | {"window": None}))
    with pytest.raises(CertificateError, match="loss"):
        run("mistral")


def test_loss_that_forgets_the_logit_scale_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.models.packed.logit_transform", lambda config: (1.0, None))
    with pytest.raises(CertificateError, match="loss"):
        run("granite")


def test_refusal_is_one_line_with_figure_and_remedy() -> None:
    config = tiny_config("llama")
    text = module.refusal(Check("boundaries: hidden states", 0.5, 1e-5), config, "sdpa", "best_fit", "set it to padded")
    assert "\n" not in text
    assert all(word in text for word in ("5.0e-01", "1e-05", "llama", "sdpa", "set it to padded"))

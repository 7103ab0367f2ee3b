"""The start-up certificate with every attention backend on this device, and proof that it can fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Qwen2Config

from gpu_parts.bench import Place, Row, reason
from sft_dist.certify import certify
from sft_dist.data.collate import collate
from sft_dist.errors import CertificateError
from sft_dist.models import attention
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM
from sft_dist.types import Pack, PackedBatch
from sft_kernels import choose_head


def certificates(place: Place) -> Iterator[Row]:
    """Each backend in bf16 (and the two that know it in float32), then once with the boundaries removed."""
    for dtype in (torch.bfloat16, torch.float32):
        for name in attention.BACKENDS:
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            obstacle = attention.unavailable_reason(name, config(place), place.device, dtype)
            yield Row("certificate", what, obstacle, "n/a") if obstacle else one(place, name, dtype, what)
    yield mutation(place)


def one(place: Place, backend: str, dtype: torch.dtype, what: str) -> Row:
    """Pass or fail of one backend, with the worst check."""
    try:
        checks = run(place, backend, dtype)
    except Exception as error:  # also what is not a CertificateError: a backend that breaks is a failed certificate
        return Row("certificate", what, reason(error), "FAIL")
    return Row("certificate", what, "; ".join(f"{c.name.split(':')[0]} {c.figure:.1e}" for c in checks), "ok")


def mutation(place: Place) -> Row:
    """The same certificate must refuse batches whose documents are not kept apart."""
    backend = attention.choose_backend("auto", config(place), place.device, torch.bfloat16).name
    try:
        run(place, backend, torch.bfloat16, make_batch=without_boundaries)
    except CertificateError as error:
        return Row("certificate", f"{backend}, boundaries removed", f"refused: {error}"[:110], "ok")
    return Row("certificate", f"{backend}, boundaries removed", "passed a leaking batch", "FAIL")


def without_boundaries(packs: Sequence[Pack], store: Any, **options: Any) -> PackedBatch:
    """The batch with one segment instead of many; ids, labels and positions untouched."""
    batch = collate(packs, store, **options)
    if batch.cu_seqlens is None or len(batch.cu_seqlens) <= 2:
        return batch
    return Leaky.of(batch)


class Leaky(PackedBatch):
    """Says where documents lie, but on the device lets them see each other."""

    @classmethod
    def of(cls, batch: PackedBatch) -> Leaky:
        return cls(**{name: getattr(batch, name) for name in PackedBatch.__slots__})

    def to(self, device: torch.device | str) -> PackedBatch:
        moved = super().to(device)
        assert moved.cu_seqlens is not None
        edges = moved.cu_seqlens[[0, -1]]
        return replace(moved, cu_seqlens=edges, max_seqlen=int(edges[-1]))


def run(place: Place, backend: str, dtype: torch.dtype, **options: Any) -> list[Any]:
    """The certificate of a small random model of Qwen2.5's architecture in `dtype`."""
    model = build_random(config(place), dtype=dtype, seed=0).to(place.device).eval()
    attention.install(model, backend)
    _, head, _ = choose_head("auto", place.device)
    packed = PackedCausalLM(model, head)
    with torch.no_grad():
        return certify(
            packed.hidden_states, model.config, head=head, backend=backend, packing="best_fit", device=place.device,
            dtype=dtype, **options,
        )  # fmt: skip


def config(place: Place) -> Qwen2Config:
    """Qwen2.5-0.5B's layer shape, four layers."""
    return Qwen2Config(
        vocab_size=4096, hidden_size=place.size(896, 64), intermediate_size=place.size(4864, 128), num_hidden_layers=4,
        num_attention_heads=place.size(14, 4), num_key_value_heads=2, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip

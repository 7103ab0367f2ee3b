"""Grouped segments, kernel choice, and the refusal to guess."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sft_dist.errors import ConfigError
from sft_dist.models.attention import BACKENDS, Segments, choose_backend, sdpa_segments, segment_attention

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.sampled_from([None, 1, 4, 16]))
def test_groups_equal_one_document_at_a_time(lengths: list[int], window: int | None) -> None:
    torch.manual_seed(0)
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q = torch.randn(1, 4, edges[-1], 8)
    k, v = torch.randn(2, 1, 2, edges[-1], 8)
    segments = Segments.of(torch.tensor(edges, dtype=torch.int32))
    out = sdpa_segments(q, k, v, segments=segments, scale=0.3, window=window, softcap=None, sinks=None, dropout=0.0)
    for start, end in pairwise(edges):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        mask = (distance >= 0) & (distance < (window or end))
        alone = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[:, start:end], alone.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_without_segments_it_refuses_instead_of_attending_across_documents() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        segment_attention(sdpa_segments, torch.nn.Identity(), q, q, q, None)


def test_a_cpu_gets_sdpa_and_the_reason_for_each_other_kernel() -> None:
    choice = choose_backend("auto", tiny_config("llama"), CPU, torch.float32)
    assert choice.name == "sdpa"
    assert all(name in choice.reason for name in BACKENDS if name != "sdpa")


@pytest.mark.parametrize("name", ["flash", "varlen", "flex"])
def test_a_kernel_that_cannot_run_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.attention={name}.*auto"):
        choose_backend(name, tiny_config("llama"), CPU, torch.float32)


@pytest.mark.parametrize(
    ("model_type", "dtype", "expected"),
    [
        ("llama", torch.float32, "flex"),
        ("llama", torch.bfloat16, "varlen"),
        ("gemma2", torch.bfloat16, "flex"),
        ("gpt_oss", torch.bfloat16, "sdpa"),
    ],
)
def test_the_choice_on_cuda_without_flash_attn(model_type: str, dtype: torch.dtype, expected: str) -> None:
    """Dispatch only, no device needed: features of the architecture decide."""
    pytest.importorskip("torch.nn.attention.varlen")
    assert choose_backend("auto", tiny_config(model_type), torch.device("cuda"), dtype).name == expected


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_asked_for_its_deterministic_backward(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dispatch only: what its function is called with."""
    asked: dict[str, object] = {}

    def flash_attn_varlen_func(q: Tensor, *_: object, **named: object) -> Tensor:
        asked.update(named)
        return q

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q = torch.zeros(1, 2, 4, 8)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    out = BACKENDS["flash"](q, q, q, cu_seqlens=ends, max_seqlen=4, scale=1.0, window=None, softcap=None, dropout=0.0)
    assert out.shape == (1, 4, 2, 8) and asked["deterministic"] is deterministic and asked["causal"] is True

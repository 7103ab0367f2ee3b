"""Segment-aware attention: documents packed in one row never see each other.

Reaches any model of transformers through its public attention interface, one name per kernel. The batch carries
explicit `cu_seqlens`, so nothing is inferred from position ids and nothing is recomputed per layer. Which kernel runs
is one choice made at start-up (`choose_backend`); a kernel that lacks a feature of the architecture (soft cap,
attention sinks) is refused there, not in the middle of a run.

Shapes: query [1, Hq, T, D], key and value [1, Hk, T, D] as transformers hands them; output [1, T, Hq, D].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from sft_dist.errors import ConfigError
from sft_dist.models.virtual_tokens import Prefix

Kernel = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """Which attention kernel runs and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Segments:
    """How the documents of one row are gathered into a few dense batches, computed once per row for all layers.

    Documents of like length are right-padded together: under a causal mask no real position sees the padding behind it.
    """

    groups: tuple[tuple[Tensor, int, int], ...]  # (token index int64[n * length], n documents, length)
    inverse: Tensor  # int64[T]: where each token of the row stands in the groups' outputs, laid end to end

    @staticmethod
    def of(cu_seqlens: Tensor) -> Segments:
        """From the edges int32[N + 1] of a row's documents. Lengths share a group up to the next power of two.

        Waits for the device when the edges are not on the CPU.
        """
        device, edges = cu_seqlens.device, cu_seqlens.tolist()
        spans: dict[int, list[tuple[int, int]]] = {}
        for start, end in pairwise(edges):
            spans.setdefault((end - start - 1).bit_length(), []).append((start, end))
        groups, inverse, offset = [], torch.empty(edges[-1], dtype=torch.int64), 0
        for members in spans.values():
            starts, ends = torch.tensor(members).T
            length = int((ends - starts).max())
            steps = torch.arange(length)
            index = torch.minimum(starts[:, None] + steps, ends[:, None] - 1)  # padding repeats the last token
            real = starts[:, None] + steps < ends[:, None]
            inverse[index[real]] = (offset + torch.arange(index.numel()).view_as(index))[real]
            groups.append((index.flatten().to(device), len(members), length))
            offset += index.numel()
        return Segments(tuple(groups), inverse.to(device))


def sdpa_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    **_: Any,
) -> Tensor:
    """Scaled-dot-product attention per group of documents. [1, H, T, D] -> [1, T, Hq, D].

    The reference, and the CPU's fast path: it costs the sum of squared document lengths instead of the row's square.
    """
    pieces = []
    for index, num_documents, length in segments.groups:
        q, k, v = (_gather(t, index, num_documents, length) for t in (query, key, value))
        if softcap is None and sinks is None:
            mask = None if window is None or length <= window else _window_mask(length, window, query.device)
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            out = _eager(q, k, v, scale=scale, window=window, softcap=softcap, sinks=sinks, dropout=dropout)
        pieces.append(out.transpose(1, 2).flatten(0, 1))  # [n * length, Hq, D]
    return torch.cat(pieces).index_select(0, segments.inverse)[None]


def _gather(t: Tensor, index: Tensor, num_documents: int, length: int) -> Tensor:
    """[1, H, T, D] -> [n, H, length, D], one document a row."""
    return t[0].index_select(1, index).unflatten(1, (num_documents, length)).transpose(0, 1)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    **_: Any,
) -> Tensor:
    """torch.nn.attention.varlen (the FlashAttention built into PyTorch), CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))  # [T, H, D]
    k, v = _repeat_kv(k, q.shape[1]), _repeat_kv(v, q.shape[1])  # torch 2.11 has no enable_gqa
    left = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(left, 0))
    assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
    return out[None]


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
    **_: Any,
) -> Tensor:
    """flash-attn's varlen kernel, CUDA only. Understands grouped heads, windows and soft caps."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    left = -1 if window is None else window - 1
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # PyTorch's own kernels ask by themselves
    )
    return out.unsqueeze(0)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    **_: Any,
) -> Tensor:
    """FlexAttention with a document mask, CUDA only (its CPU kernel has no backward)."""
    from torch.nn.attention.flex_attention import create_block_mask

    total = query.shape[2]
    document = torch.searchsorted(
        cu_seqlens[1:], torch.arange(total, device=query.device, dtype=cu_seqlens.dtype), right=True
    )

    def visible(_batch: Tensor, _head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx)
        return seen if window is None else seen & (q_idx - kv_idx < window)

    def capped(score: Tensor, *_indices: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    mask = create_block_mask(visible, None, None, total, total, device=query.device)
    out = _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


BACKENDS: dict[str, Kernel] = {"flash": flash, "varlen": varlen, "flex": flex, "sdpa": sdpa_segments}

# Names under which transformers knows the kernels. None contains "flash", "sdpa" or "flex": transformers gives those
# words a meaning of their own (it would build masks or refuse float32).
INTERFACE_NAMES = {
    "flash": "sft_segment_fa",
    "varlen": "sft_segment_vl",
    "flex": "sft_segment_fx",
    "sdpa": "sft_segment_sd",
}
SLICED = "_sliced"  # is added to the name of a kernel that works on slices: both kinds can live in one process


def unavailable_reason(name: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `name` cannot run this architecture here, or None. Features are read from the architecture's config."""
    text = config.get_text_config()
    softcap, sinks = getattr(text, "attn_logit_softcapping", None), text.model_type == "gpt_oss"
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs CUDA, the device is {device.type}"
    if sinks:
        return "has no attention sinks"
    if name in ("flash", "varlen") and dtype not in (torch.float16, torch.bfloat16):
        return f"needs bfloat16, precision.compute is {dtype}".replace("torch.", "")
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "package flash-attn is not installed"
    if name == "varlen" and softcap is not None:
        return "has no soft cap"
    if name == "varlen" and text.to_dict().get("attention_dropout"):
        return "has no attention dropout"
    if name == "flex" and text.to_dict().get("attention_dropout"):
        return "has no attention dropout"
    return None


def choose_backend(requested: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """The requested kernel, or with `auto` the first that can run. Raises ConfigError when a request cannot be met."""
    if requested != "auto":
        reason = unavailable_reason(requested, config, device, dtype)
        if reason:
            raise ConfigError(f"model.attention={requested}: {reason}; use model.attention=auto")
        return BackendChoice(requested, "asked for")
    passed_over: list[str] = []
    for name in BACKENDS:
        reason = unavailable_reason(name, config, device, dtype)
        if reason is None:
            return BackendChoice(name, "; ".join(passed_over) or "first choice")
        passed_over.append(f"{name} {reason}")
    raise AssertionError("sdpa is always available")


def install(model: nn.Module, backend: str, across: Callable[[Kernel], Kernel] | None = None) -> None:
    """Make every attention layer of `model` call `backend` with the batch's explicit segments.

    `across` turns the kernel for whole rows into one for a rank's slice of them (sequence parallel).
    Raises ConfigError for architectures that cannot change their attention (Falcon, OPT: code of their own).
    """
    name, kernel = INTERFACE_NAMES[backend], BACKENDS[backend]
    if across is not None:
        name, kernel = name + SLICED, across(kernel)
    AttentionInterface.register(name, partial(segment_attention, kernel))
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
    except ValueError as error:
        raise ConfigError(
            f"model: this architecture does not take another attention ({error}); use data.packing=padded"
        ) from error
    if model.config._attn_implementation != name:  # type: ignore[union-attr]
        raise ConfigError("model: this architecture ignores the attention interface; use data.packing=padded")


def segment_attention(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    segments: Segments | None = None,
    prefix: Prefix | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer. Refuses to run without explicit segments: a silent plain-causal
    fallback is the bug this module exists to rule out."""
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(  # a batch without segments is our mistake; an architecture that keeps them back is refused
            f"{type(module).__name__}: segment attention was called without cu_seqlens; pass a PackedBatch"
        )
    if not getattr(module, "is_causal", True):
        raise RuntimeError(f"{type(module).__name__}: only causal attention can be packed")
    query, key = query.to(value.dtype), key.to(value.dtype)  # norms on q and k leave float32 behind under autocast
    if prefix is not None:
        query, key, value = prefix.widen(module.layer_idx, query, key, value)  # type: ignore[arg-type]
    out = kernel(
        query,
        key,
        value,
        cu_seqlens=cu_seq_lens_q,
        segments=segments,
        max_seqlen=max_length_q,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout if module.training else 0.0,
    )
    return (out if prefix is None else prefix.narrow(out)).contiguous(), None


@cache
def _compiled_flex() -> Any:
    """FlexAttention is only fast compiled; compile once per process."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _repeat_kv(t: Tensor, num_heads: int) -> Tensor:
    """[T, Hk, D] -> [T, Hq, D], each key head serving Hq / Hk query heads."""
    return t if t.shape[1] == num_heads else t.repeat_interleave(num_heads // t.shape[1], dim=1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length]: position i sees itself and the window - 1 before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Plain attention for what SDPA lacks: soft caps (Gemma 2), learned sinks (gpt-oss). [n, H, L, D] -> the same."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = q.shape[2]
    scores = scores.masked_fill(~_window_mask(length, window or length, q.device), float("-inf"))
    if sinks is not None:  # a sink takes part in the softmax and contributes no value
        sink = sinks.float().reshape(1, -1, 1, 1).expand(q.shape[0], q.shape[1], length, 1)
        probabilities = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probabilities = scores.softmax(dim=-1)
    return F.dropout(probabilities.to(v.dtype), dropout, training=dropout > 0) @ v

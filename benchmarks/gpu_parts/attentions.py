"""Segment attention: every backend right against float64, then times against PyTorch's dense masked attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from gpu_parts.bench import Place, Row, difference, judged, race, reason, timing_row
from sft_dist.models import attention

LENGTHS = (1, 2, 17, 300, 700, 1028)
TOY_LENGTHS = (1, 2, 5, 8)
LIMITS = {"out": 1e-2, "dQ": 2e-2, "dK": 2e-2, "dV": 2e-2}
HEADS = ((14, 2, 64), (32, 8, 128))  # query heads, key/value heads, head width: Qwen2.5-0.5B, Llama-3 8B
WINDOW = 128


def correctness(place: Place) -> Iterator[Row]:
    """bf16 outputs and gradients of each backend, grouped heads, with and without a window, against float64."""
    lengths = TOY_LENGTHS if place.rehearsal else LENGTHS
    obstacles = {name: obstacle(name, place) for name in attention.BACKENDS}
    yield from (Row("attention right", name, why, "n/a") for name, why in obstacles.items() if why)
    for query_heads, kv_heads, width in HEADS:
        given = tensors(sum(lengths), query_heads, kv_heads, width, place.device)
        for window in (None, place.size(WINDOW, 4)):
            right = run("sdpa", [t.double() for t in given], lengths, window)
            for name in (name for name, why in obstacles.items() if not why):
                what = f"{name}, {query_heads}/{kv_heads} x {width}{f', window {window}' if window else ''}"
                try:
                    figures = map(difference, run(name, given, lengths, window), right)
                    yield judged("attention right", what, dict(zip(LIMITS, figures, strict=True)), LIMITS)
                except Exception as error:  # the other backends are still to be checked
                    yield Row("attention right", what, reason(error), "FAIL")


def obstacle(name: str, place: Place) -> str | None:
    """Why a backend cannot run plain bf16 attention here, or None."""
    return attention.unavailable_reason(name, LlamaConfig(), place.device, torch.bfloat16)


def speed(place: Place) -> Iterator[Row]:
    """Forward and backward of 8192 tokens as one document, eight, and a chat mix; the 8B head shape."""
    total = place.size(8192, 64)
    mixes = {"1 document": (total,), "8 documents": (total // 8,) * 8, "chat mix": chat_mix(total)}
    for label, lengths in mixes.items():
        given = tensors(total, *HEADS[1], place.device)
        contestants: dict[str, Callable[[], object]] = {
            name: partial(run, name, given, lengths, None) for name in attention.BACKENDS if not obstacle(name, place)
        }
        ours = next(iter(contestants))  # what `auto` takes
        contestants["plain torch, dense mask"] = partial(run_dense, given, dense_mask(lengths, place.device))
        yield timing_row("attention speed", f"{total} tokens, {label}", race(contestants, place), ours)


def tensors(tokens: int, query_heads: int, kv_heads: int, width: int, device: torch.device) -> list[Tensor]:
    """q, k, v as transformers hands them, [1, H, T, D], and the gradient of the output, [1, T, Hq, D]; bf16."""
    g = torch.Generator().manual_seed(0)
    shapes = [(1, h, tokens, width) for h in (query_heads, kv_heads, kv_heads)] + [(1, tokens, query_heads, width)]
    return [torch.randn(shape, generator=g).to(device, torch.bfloat16) for shape in shapes]


def run(name: str, given: list[Tensor], lengths: tuple[int, ...], window: int | None) -> list[Tensor]:
    """Output and gradients of q, k, v through one backend."""
    q, k, v = (t.detach().requires_grad_() for t in given[:3])
    edges, segments = boundaries(lengths, q.device)
    out = attention.BACKENDS[name](
        q, k, v, cu_seqlens=edges, segments=segments, max_seqlen=max(lengths),
        scale=q.shape[-1] ** -0.5, window=window, softcap=None, sinks=None, dropout=0.0,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


@cache
def boundaries(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, attention.Segments]:
    """Made once per pack for all layers, as the loader and the model do."""
    edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return edges, attention.Segments.of(edges)


def run_dense(given: list[Tensor], mask: Tensor) -> list[Tensor]:
    """What a packed row costs when the boundaries are given as a [T, T] mask."""
    q, k, v = (t.detach().requires_grad_() for t in given[:3])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


def dense_mask(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Block-diagonal causal bool mask [T, T]."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return (document[:, None] == document[None, :]).tril()


def chat_mix(total: int) -> tuple[int, ...]:
    """Log-normal document lengths (median 400) that fill `total`, seeded."""
    g = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(1, int(400 * torch.exp(torch.randn((), generator=g))))))
    return tuple(lengths)

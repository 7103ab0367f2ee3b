"""The loss head: right against float64, then time and memory against plain PyTorch, Liger and TRL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_parts.bench import Place, Row, difference, judged, race, timing_row
from sft_kernels import HEADS, choose_head, head_plain, head_triton

LIMITS = {torch.bfloat16: {"loss": 1e-3, "dX": 1e-2, "dW": 1e-2}, torch.float32: {"loss": 1e-5, "dX": 1e-4, "dW": 1e-4}}


class Problem(NamedTuple):
    """One head's input, the count as the host knows it."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    loss_weights: Tensor
    num_loss_tokens: int


def correctness(place: Place) -> Iterator[Row]:
    """Every head, both dtypes, partly and fully supervised, several chunks; values and gradients against float64."""
    tokens, width, vocabulary = place.size(2048, 24), place.size(896, 32), place.size(151_936, 300)
    obstacle = head_triton.unavailable_reason()
    heads = {name: head for name, head in HEADS.items() if name != "triton" or obstacle is None}
    if obstacle:
        yield Row("head right", "triton", obstacle, "n/a")
    for dtype, limits in LIMITS.items():
        for share, options in ((0.35, {}), (1.0, {"logit_scale": 0.5, "softcap": 20.0})):
            given = problem(tokens, width, vocabulary, share, dtype, place.device)
            wide = given._replace(hidden=given.hidden.double(), weight=given.weight.double())
            right = call(head_plain.supervised_loss, wide, **options)
            for name, head in heads.items():
                found = call(head, given, chunk_rows=max(1, tokens // 3), **options)
                figures = dict(zip(("loss", "dX", "dW"), map(difference, found, right), strict=True))
                what = f"{name}, {str(dtype).removeprefix('torch.')}, p={share}{', softcap, scale' if options else ''}"
                yield judged("head right", what, figures, limits)


def speed(place: Place) -> Iterator[Row]:
    """8192 tokens, a 150k vocabulary, bf16: a 0.5B model's width and an 8B model's, trained and frozen."""
    name, chosen, _ = choose_head("auto", place.device)
    tokens, vocabulary = place.size(8192, 64), place.size(151_936, 512)
    for width in (place.size(896, 32), place.size(4096, 64)):
        for share, frozen in ((0.35, False), (1.0, False), (0.35, True)):
            given = problem(tokens, width, vocabulary, share, torch.bfloat16, place.device)
            given.weight.requires_grad_(not frozen)
            contestants: dict[str, Callable[[], object]] = {
                name: partial(call, chosen, given),
                "plain torch": partial(call, head_plain.supervised_loss, given),
                "liger": partial(call, liger, given),
                "trl": partial(call, trl, given),
            }
            if name != "reference":
                contestants["reference"] = partial(call, HEADS["reference"], given)
            what = f"{tokens} x {width} x {vocabulary}, p={share}{', frozen' if frozen else ''}"
            yield timing_row("head speed", what, race(contestants, place), name)


def problem(
    tokens: int, width: int, vocabulary: int, share: float, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Logits have a standard deviation of about one, as a trained head's."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g, device=device).mul_(width**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=g, device=device)
    labels[torch.rand(tokens, generator=g, device=device) >= share] = -100
    return Problem(hidden, weight, labels, torch.ones(tokens, device=device), int((labels != -100).sum()))


def call(head: Callable[..., Tensor], given: Problem, **options: object) -> tuple[Tensor, ...]:
    """(loss, dX, dW) of one forward and backward; no dW for a frozen weight."""
    hidden, weight = (t.detach().requires_grad_(t.requires_grad) for t in (given.hidden, given.weight))
    count = given.num_loss_tokens
    loss = head(hidden, weight, given.labels, given.loss_weights, num_loss_tokens=count, **options)
    (loss / count).backward()
    return tuple(t for t in (loss.detach(), hidden.grad, weight.grad) if t is not None)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, *, num_loss_tokens: int) -> Tensor:
    """Liger's fused linear cross entropy with its defaults; knows no token weights."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    made: Tensor | tuple[Tensor, ...] = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
    return made[0] if isinstance(made, tuple) else made


def trl(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, *, num_loss_tokens: int) -> Tensor:
    """TRL's fused LM head as its SFTTrainer calls it on a Triton device: supervised rows only, found with a sync."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    mask = labels != -100
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden[mask], weight, None, labels[mask], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
        ("log_probs", "entropy", "is_top1"),
    )  # fmt: skip
    return -log_probs.sum()

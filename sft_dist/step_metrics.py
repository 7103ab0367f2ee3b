"""One line of metrics.jsonl: what a step did, how fast, and what came and was learned from each source."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sft_dist.data.loader import LoadedStep
from sft_dist.data.stream_store import AnyStore
from sft_dist.observe.perf import peak_flops, peak_memory_gib, step_flops
from sft_dist.parts import Parts
from sft_dist.types import StepMetrics, StepResult


def measure(
    parts: Parts, loaded: LoadedStep, result: StepResult, lr: float, attempt: int, seconds: float
) -> StepMetrics:
    """One line of metrics.jsonl; counts are global."""
    step, place, train = loaded.step, parts.place, parts.inputs.data.train
    peak = peak_flops(place.device)
    examples = np.array([example for pack in step.packs for example in pack.example_ids])
    squares = int((train.lengths[examples].astype(np.int64) ** 2).sum())
    flops = step_flops(parts.shape, step.num_tokens, squares, step.num_loss_tokens)
    return StepMetrics(
        step=step.step,
        attempt=attempt,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        num_tokens=step.num_tokens,
        num_loss_tokens=step.num_loss_tokens,
        batch_digest=loaded.digest,
        step_seconds=seconds,
        tokens_per_second=step.num_tokens / seconds,
        mfu=None if peak is None else flops / (seconds * place.world_size * peak),
        peak_memory_gib=peak_memory_gib(place.device),
        tokens_by_source=sum_by_source(train, examples, train.lengths.__getitem__),
        loss_tokens_by_source=sum_by_source(train, examples, train.loss_tokens_of),
    )


def sum_by_source(
    store: AnyStore, examples: np.ndarray, numbers: Callable[[np.ndarray], np.ndarray]
) -> dict[str, int] | None:
    """Source of the recipe -> sum of the `numbers` of its examples among int[K] `examples`; None where there is but
    one source."""
    if len(store.sources) < 2:
        return None
    sums = np.bincount(store.source_of(examples), weights=numbers(examples), minlength=len(store.sources))
    return {name: int(total) for name, total in zip(store.sources, sums, strict=True) if total}

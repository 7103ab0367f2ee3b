"""One line of metrics.jsonl: what a step did, how fast, and from which sources its tokens came."""

from __future__ import annotations

import numpy as np

from sft_dist.data.loader import LoadedStep
from sft_dist.data.stream_store import AnyStore
from sft_dist.observe.perf import peak_flops, peak_memory_gib, step_flops
from sft_dist.parts import Parts
from sft_dist.types import StepMetrics, StepPlan, StepResult


def measure(
    parts: Parts, loaded: LoadedStep, result: StepResult, lr: float, attempt: int, seconds: float
) -> StepMetrics:
    """One line of metrics.jsonl; counts are global."""
    step, place = loaded.step, parts.place
    peak = peak_flops(place.device)
    examples = np.array([example for pack in step.packs for example in pack.example_ids])
    squares = int((parts.inputs.data.train.lengths[examples].astype(np.int64) ** 2).sum())
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
        tokens_by_source=tokens_by_source(parts.inputs.data.train, step),
    )


def tokens_by_source(store: AnyStore, step: StepPlan) -> dict[str, int] | None:
    """Source of the recipe -> tokens of it in this step; None where there is but one."""
    if len(store.sources) < 2:
        return None
    examples = np.array([example for pack in step.packs for example in pack.example_ids])
    counts = np.bincount(store.source_of(examples), weights=store.lengths[examples], minlength=len(store.sources))
    return {name: int(count) for name, count in zip(store.sources, counts, strict=True) if count}

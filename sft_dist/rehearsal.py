"""Step 0: the most expensive micro-batch of the plan goes through the real engine before anything is trained.

    build -> rehearse (forward and backward, as many rounds as memory cares about; nothing is updated)
          -> out of memory: fewer packs per micro-batch and more micro-batches, the same global batch; then activation
             checkpointing; build anew -> ... -> it fits, or one line says what does not

What was chosen stands in the header and in the run's record. Gradients are dropped afterwards and random numbers put
back: weights, moments and the first step are the bits that they would have been without it.

Every rank rehearses the same micro-batch, so ranks run out of memory together. Where only some do (another process on
their GPU), replicas still agree, as they rehearse without talking; shards cannot, and the run ends with that line.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from sft_dist.config.auto import Choices
from sft_dist.data.plan import PackPlan
from sft_dist.data.stream_plan import StreamPlan
from sft_dist.errors import ConfigError
from sft_dist.observe.perf import peak_memory_gib
from sft_dist.parts import Parts
from sft_dist.types import Pack

STEPS_LOOKED_AT = 2_000  # of a longer plan, evenly spread: the fullest of so many micro-batches is full
VERDICT_SECONDS = 120.0  # a rank that ran out of memory waits so long for the others to say whether they did

MicroBatch = tuple[Pack, ...]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Parts that fit, and what the header says of it."""

    parts: Parts
    told: str


def fit(build: Callable[[Choices | None], Parts], *, resumed: bool, say: Callable[[str], None]) -> Fitted:
    """Build and rehearse until it fits. `build(None)` chooses, `build(choices)` takes what it is given; a resumed run
    keeps its plan. Raises ConfigError, on all ranks alike, when nothing that may be changed helps."""
    changes: list[str] = []
    parts = build(None)
    while True:
        worst = worst_micro_batch(parts.train.plan)
        slots, started = sum(pack.num_tokens for pack in worst), time.perf_counter()
        if fits_in_memory(parts, worst):
            seconds = time.perf_counter() - started
            told = f"worst micro-batch of {slots:,} tokens fits: {seconds:.1f} s, {peak(parts)} at the peak"
            return Fitted(parts, "; ".join([told, *changes]))
        choices, place = parts.choices, parts.place
        smaller = back_off(choices, may_change_plan=not resumed)
        if smaller is None:
            raise ConfigError(refusal(parts, slots))
        changes.append(describe(choices, smaller))
        say(f"out of memory in a micro-batch of {slots:,} tokens: {changes[-1]}")
        parts.close()
        del parts
        release(place.device)
        parts = build(smaller)


def fits_in_memory(parts: Parts, worst: MicroBatch) -> bool:
    """Forward and backward on every rank. Leaves no gradient behind where they fit."""
    device = parts.place.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        rehearse(parts, worst)
        failed = None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = str(error).strip().splitlines()[0]
    return agree(failed)


def rehearse(parts: Parts, worst: MicroBatch) -> None:
    """Run `worst` on this rank; twice where steps accumulate, as the second pass has the first one's gradients beside
    it. Replicas do not exchange gradients: the buffers for that are there already."""
    engine, place = parts.engine, parts.place
    batch = parts.train.loader.batch_of(worst)
    rounds = 1 if most_rounds(parts) == 1 else 2
    with torch.random.fork_rng(devices=[place.device] if place.device.type == "cuda" else []):
        for round_ in range(rounds):
            with engine.accumulate(round_ == rounds - 1 and engine.name != "ddp"):
                engine.forward(batch.to(place.device)).backward()
    engine.discard_gradients()


def most_rounds(parts: Parts) -> int:
    """Micro-batches of a step on one rank."""
    number = parts.choices.micro_batches_per_step
    groups = parts.place.world_size // parts.sequence.size
    return 2 if number is None else -(-number // groups)


def worst_micro_batch(plan: PackPlan | StreamPlan) -> MicroBatch:
    """The micro-batch with the most token slots; of those the one whose documents cost most. Of a stream, which cannot
    be looked through, that of its first step."""
    count = 1 if isinstance(plan, StreamPlan) else min(plan.num_steps, STEPS_LOOKED_AT)
    steps = sorted({1 + round(i * (plan.num_steps - 1) / max(1, count - 1)) for i in range(count)})
    found = (micro_batch for number in steps for micro_batch in plan.step(number).micro_batches)
    return max(found, key=lambda packs: (_slots(plan, packs), sum(pack.cost for pack in packs)))


def _slots(plan: PackPlan | StreamPlan, packs: MicroBatch) -> int:
    """Places of the micro-batch; those of a padded one are as long as its longest row."""
    if plan.spec.packing == "padded":
        return len(packs) * max(pack.num_tokens for pack in packs)
    return sum(pack.num_tokens for pack in packs)


def back_off(choices: Choices, *, may_change_plan: bool) -> Choices | None:
    """The next smaller choice: half as many packs at once (the largest number that divides them), then checkpointing.
    The packs of a step stay the same. None when there is nothing left."""
    packs = choices.packs_per_micro_batch
    if may_change_plan and packs > 1:
        fewer = max(k for k in range(1, packs // 2 + 1) if packs % k == 0)
        number = choices.micro_batches_per_step
        return replace(
            choices,
            packs_per_micro_batch=fewer,
            micro_batches_per_step=None if number is None else number * (packs // fewer),
        )
    if choices.activation_checkpointing != "full":
        return replace(choices, activation_checkpointing="full")
    return None


def describe(before: Choices, after: Choices) -> str:
    """What changed, in the recipe's words."""
    if before.packs_per_micro_batch != after.packs_per_micro_batch:
        return (
            f"{before.packs_per_micro_batch} -> {after.packs_per_micro_batch} pack(s) per micro-batch and as many more "
            "micro-batches, the same global batch"
        )
    return f"activation checkpointing {before.activation_checkpointing} -> full"


def refusal(parts: Parts, slots: int) -> str:
    """What does not fit, and what else could be done."""
    others = {"ddp": "parallel.strategy=fsdp2 or ", "fsdp2": "more processes, parallel.offload=params or "}
    return (
        f"out of memory: one micro-batch of {slots:,} tokens does not fit under {parts.choices.strategy} on "
        f"{parts.place.world_size} process(es) even with activation checkpointing; set "
        f"{others.get(parts.choices.strategy, '')}a smaller data.seq_len or tuning.method=lora"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError on GPUs; on CPUs, where an address-space limit is set, the allocator's own words."""
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def agree(failed: str | None) -> bool:
    """Whether it fitted on every rank. Raises ConfigError where a rank that did not is left waiting by the others."""
    count = torch.tensor([0.0 if failed is None else 1.0])
    work = dist.all_reduce(count, async_op=True)
    try:
        work.wait(timeout=timedelta(seconds=VERDICT_SECONDS))
    except RuntimeError as error:
        raise ConfigError(
            f"out of memory on rank {dist.get_rank()} but not on all ({failed}): another process uses that device, "
            "or its memory is smaller; free it, or set a smaller batch.tokens_per_micro_batch"
        ) from error
    return bool(count == 0)


def release(device: torch.device) -> None:
    """Give back what an engine that is gone held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak(parts: Parts) -> str:
    """Peak of memory on the fullest rank."""
    highest = torch.tensor([peak_memory_gib(parts.place.device)])
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return f"{highest.item():.2f} GiB"

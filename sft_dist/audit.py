"""What a run was trained on, proven from its folder: every planned example once per epoch, or a list of what was not.

    audit(run_dir)
      metrics.jsonl       every step from 1 to the last once, with the token counts and the token digest of the plan's
      checkpoints         the ledger in each equals the one of the plan up to its step
      plan                every example exactly once in each finished epoch, at most once in the one that is running

Nothing is believed that can be computed again: the data come from the cache or are prepared anew, and must have the
fingerprint that the run recorded. No model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manifest import read_manifest
from sft_dist.data.collate import batch_digest
from sft_dist.data.ledger import START, fold
from sft_dist.data.plan import PackPlan
from sft_dist.data.stream_plan import StreamPlan
from sft_dist.data.stream_store import AnyStore
from sft_dist.errors import CheckpointError
from sft_dist.fingerprint import reopen
from sft_dist.observe.metrics import read_metrics
from sft_dist.types import StepPlan

MAX_LISTED = 20
STEPS = ("step", "skipped")  # kinds of lines that stand for a step of the plan


@dataclass(frozen=True, slots=True)
class Epoch:
    """How often the examples of one epoch were trained."""

    number: int  # 0-based
    finished: bool
    examples: int
    trained_once: int
    missed: tuple[int, ...]  # example ids, the first of them; none while the epoch is running
    repeated: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """The findings; `faults` is empty when the run is proven."""

    steps: int
    planned_steps: int
    tokens: int
    epochs: tuple[Epoch, ...]
    checkpoints: tuple[int, ...]  # steps whose ledger was compared
    ledger: str
    faults: tuple[str, ...]


def audit(run_dir: Path, notice: Callable[[str], None], progress: Callable[[int, int], None]) -> Audit:
    """Prove the run in `run_dir`. Raises CheckpointError when it is no run folder, DataError when its data changed."""
    inputs, _, plan = reopen(run_dir, notice)
    written = read_metrics(run_dir)
    if damaged := [number for number, line in enumerate(written, 1) if not _is_sound(line)]:
        raise CheckpointError(f"{run_dir / 'metrics.jsonl'}: line {damaged[0]} is altered")
    lines = [line for line in written if line["kind"] in STEPS]
    ledgers = {manifest.step: manifest.meta.get("ledger") for manifest in map(read_manifest, folders(run_dir))}
    return prove(plan, inputs.data.train, lines, ledgers, progress)


def prove(
    plan: PackPlan | StreamPlan,
    store: AnyStore,
    lines: list[dict[str, Any]],
    ledgers: Mapping[int, str | None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Compare what was written (step lines, ledgers by checkpointed step) with what the plan says."""
    faults = list(_gaps(lines))
    counts: dict[int, np.ndarray] = {}
    ledger, tokens, last = START, 0, None
    for number, line in enumerate(lines, 1):
        if not 1 <= line["step"] <= plan.num_steps:
            faults.append(f"step {line['step']}: the plan has steps 1 to {plan.num_steps}")
            continue
        last = plan.step(line["step"])
        ledger, tokens = fold(ledger, last), tokens + last.num_tokens
        faults += _differences(line, last, store)
        examples = [example for pack in last.packs for example in pack.example_ids]
        if line.get("kind") == "skipped":
            faults.append(f"step {last.step}: was skipped, its {len(examples)} examples were not trained")
            examples = []
        counts[last.epoch] = _counted(counts.get(last.epoch), plan.num_examples, examples)
        if ledgers.get(last.step, ledger) != ledger:
            faults.append(f"checkpoint of step {last.step}: its ledger differs from the one of the plan")
        progress(number, len(lines))
    ahead = [step for step in ledgers if step > len(lines)]
    faults += [f"checkpoint of step {step}: metrics.jsonl ends at step {len(lines)}" for step in ahead]
    epochs = tuple(_epoch(number, count, plan, last) for number, count in sorted(counts.items()))
    faults += [fault for epoch in epochs for fault in _cover_faults(epoch, store)]
    compared = tuple(sorted(step for step in ledgers if step <= len(lines)))
    return Audit(len(lines), plan.num_steps, tokens, epochs, compared, ledger, tuple(faults))


def _counted(count: np.ndarray | None, num_examples: int, examples: list[int]) -> np.ndarray:
    """How often each example was trained, `examples` once more: int32[num_examples]; streams grow as they are read."""
    known = np.zeros(0, np.int32) if count is None else count
    if len(known) < num_examples:
        known = np.concatenate([known, np.zeros(num_examples - len(known), np.int32)])
    np.add.at(known, examples, 1)
    return known


def _is_sound(line: Any) -> bool:
    """Whether a line of metrics.jsonl has what is compared."""
    if not isinstance(line, dict) or line.get("kind") not in (*STEPS, "eval"):
        return False
    counts = ("step", "num_tokens", "num_loss_tokens") if line["kind"] in STEPS else ("step",)
    has_digest = line["kind"] == "eval" or isinstance(line.get("batch_digest"), str)
    return has_digest and all(type(line.get(name)) is int for name in counts)


def _gaps(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Steps that are missing from metrics.jsonl, or stand in it twice."""
    for expected, line in enumerate(lines, 1):
        if line["step"] != expected:
            yield f"metrics.jsonl: line {expected} of its steps is step {line['step']}"
            return


def _differences(line: Mapping[str, Any], step: StepPlan, store: AnyStore) -> Iterator[str]:
    """What a step recorded beside what the plan and the data give."""
    planned = {
        "num_tokens": step.num_tokens,
        "num_loss_tokens": step.num_loss_tokens,
        "batch_digest": batch_digest(step, store),
    }
    for key, value in planned.items():
        if line[key] != value:
            yield f"step {step.step}: {key} was {line[key]}, the plan gives {value}"


def _epoch(number: int, count: np.ndarray, plan: PackPlan | StreamPlan, last: StepPlan | None) -> Epoch:
    finished = last is not None and (last.epoch > number or plan.ends_epoch(last.step))
    return Epoch(
        number=number,
        finished=finished,
        examples=len(count),
        trained_once=int(np.count_nonzero(count == 1)),
        missed=tuple(np.flatnonzero(count == 0).tolist()) if finished else (),
        repeated=tuple(np.flatnonzero(count > 1).tolist()),
    )


def _cover_faults(epoch: Epoch, store: AnyStore) -> Iterator[str]:
    for what, examples in (("never", epoch.missed), ("more than once", epoch.repeated)):
        for example in examples[:MAX_LISTED]:
            yield f"epoch {epoch.number + 1}: {store.example(example).id} was trained {what}"
        if len(examples) > MAX_LISTED:
            yield f"epoch {epoch.number + 1}: {len(examples) - MAX_LISTED:,} more were trained {what}"


def as_json(found: Audit) -> str:
    """The findings with lists cut to what a person reads."""
    epochs = [
        {
            "epoch": epoch.number + 1,
            "finished": epoch.finished,
            "examples": epoch.examples,
            "trained_once": epoch.trained_once,
            "missed": len(epoch.missed),
            "repeated": len(epoch.repeated),
        }
        for epoch in found.epochs
    ]
    values = {
        "proven": not found.faults,
        "steps": found.steps,
        "planned_steps": found.planned_steps,
        "tokens": found.tokens,
        "epochs": epochs,
        "checkpoints": list(found.checkpoints),
        "ledger": found.ledger,
        "faults": list(found.faults),
    }
    return json.dumps(values, indent=2)

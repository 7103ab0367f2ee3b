"""One step of a finished or running run, rebuilt from its folder without a GPU: which examples, which tokens learned.

    rebuild(run_dir, step)   config.yaml + fingerprint.json + data cache -> the step's micro-batches, packs and examples
    rerun(replayed)          the forward pass on the CPU with the newest weights at or before the step -> its loss

The plan is a pure function of data, recipe and choices, so nothing has to be recorded to show a batch again; the digest
of its tokens is compared with the one in metrics.jsonl. The loss is that of the step only when the weights are those of
the step before: the initial ones for step 1, else a checkpoint at exactly step - 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_dist.checkpoint.catalog import folders, prove
from sft_dist.checkpoint.manifest import folder_step, read_manifest
from sft_dist.checkpoint.shards import empty_tensors, read_shards
from sft_dist.config.auto import Choices
from sft_dist.data.collate import batch_digest, collate
from sft_dist.data.inspect import ExampleView, PackView, view_example, view_packs
from sft_dist.errors import ConfigError
from sft_dist.fingerprint import reopen
from sft_dist.inputs import Inputs, pad_token_id
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning_plain
from sft_dist.models.load import DTYPES, load_model
from sft_dist.models.packed import PackedCausalLM, pick_head
from sft_dist.models.vocabulary import num_added
from sft_dist.observe.metrics import read_metrics
from sft_dist.parallel.runtime import seed_for
from sft_dist.parts import PAD_MULTIPLE_CPU
from sft_dist.types import StepPlan

WEIGHTS = "model."
CPU, COMPUTE = torch.device("cpu"), "float32"


@dataclass(frozen=True, slots=True)
class Replayed:
    """A step as it was planned, and what was written when it was trained."""

    run_dir: Path
    inputs: Inputs
    choices: Choices
    step: StepPlan
    packs: tuple[PackView, ...]
    examples: dict[int, ExampleView]  # by row
    digest: str  # of the rebuilt tokens
    recorded: dict[str, Any] | None  # the step's line of metrics.jsonl; None: not trained (yet)

    @property
    def is_same(self) -> bool | None:
        """Whether the rebuilt tokens are those that were trained; None where nothing was recorded."""
        return None if self.recorded is None else self.recorded["batch_digest"] == self.digest


@dataclass(frozen=True, slots=True)
class Rerun:
    """The loss of a step's batch under the weights after `weights_step` steps."""

    loss: float
    weights_step: int
    is_exact: bool  # the weights are those the step began with, and the run computed in this dtype
    why_not: str  # what differs from the run; empty when exact


def rebuild(run_dir: Path, number: int, notice: Callable[[str], None]) -> Replayed:
    """Step `number` of the run in `run_dir`. Raises CheckpointError when that is no run folder, DataError when its data
    changed, ConfigError for a step outside the plan."""
    inputs, choices, plan = reopen(run_dir, notice)
    if not 1 <= number <= plan.num_steps:
        raise ConfigError(f"--step {number}: the plan of {run_dir} has steps 1 to {plan.num_steps}")
    step, store = plan.step(number), inputs.data.train
    rows = [row for pack in step.packs for row in pack.example_ids]
    lines = [line for line in read_metrics(run_dir) if line["kind"] == "step" and line["step"] == number]
    return Replayed(
        run_dir=run_dir,
        inputs=inputs,
        choices=choices,
        step=step,
        packs=tuple(view_packs(step, store.lengths, inputs.recipe.data.seq_len)),
        examples={row: view_example(store.example(row), row=row, tokenizer=inputs.tokenizer) for row in rows},
        digest=batch_digest(step, store),
        recorded=lines[-1] if lines else None,
    )


def rerun(replayed: Replayed) -> Rerun:
    """The forward pass of the whole global batch on the CPU in float32, with the dropout of the run."""
    recipe, step, choices = replayed.inputs.recipe, replayed.step, replayed.choices
    checkpoint = newest_before(replayed.run_dir, step.step)
    packed = _model(replayed, checkpoint)
    divisor, total = step.loss_weight_sum, torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for index, micro_batch in enumerate(step.micro_batches):
            torch.manual_seed(seed_for(recipe.run.seed, step.step, index))
            batch = collate(
                micro_batch,
                replayed.inputs.data.train,
                packing=recipe.data.packing,
                pad_token_id=pad_token_id(replayed.inputs.tokenizer),
                pad_to_multiple_of=PAD_MULTIPLE_CPU,
            )
            total += packed(batch)
    weights_step = 0 if checkpoint is None else folder_step(checkpoint) or 0
    differs = []
    if weights_step != step.step - 1:
        differs.append(f"weights of step {weights_step}, the step began with those of step {step.step - 1}")
    if choices.compute != COMPUTE:
        differs.append(f"computed in {COMPUTE}, the run in {choices.compute}")
    return Rerun(total.item() / divisor, weights_step, not differs, "; ".join(differs))


def newest_before(run_dir: Path, step: int) -> Path | None:
    """The newest good checkpoint of a step before `step`; None: the initial weights."""
    earlier = [path for path in folders(run_dir) if (folder_step(path) or 0) < step]
    return next((path for path in reversed(earlier) if prove(path) is None), None)


def _model(replayed: Replayed, checkpoint: Path | None) -> PackedCausalLM:
    """The run's model with the weights of `checkpoint`."""
    recipe, tokenizer = replayed.inputs.recipe, replayed.inputs.tokenizer
    master, compute = DTYPES[recipe.precision.master], DTYPES[replayed.choices.compute]
    base = master if recipe.tuning.method == "full" else compute
    sizes = {"vocab_size": len(tokenizer), "num_added": num_added(tokenizer)}
    model = load_model(recipe.model, dtype=base, seed=recipe.run.seed, **sizes)
    if recipe.data.packing != "padded":
        backend = attention.choose_backend("auto", model.config, CPU, DTYPES[COMPUTE])
        attention.install(model, backend.name)
    tuned = apply_tuning_plain(model, recipe.tuning, recipe.run.seed, compute)
    if checkpoint is not None:
        _fill(tuned, checkpoint)
    head = pick_head("reference", CPU)[1]
    return PackedCausalLM(tuned.float(), head, neftune_alpha=recipe.optim.neftune_alpha).train()


def _fill(model: torch.nn.Module, checkpoint: Path) -> None:
    """Put the trained weights of a proven checkpoint into `model`."""
    tensors = empty_tensors(read_manifest(checkpoint), WEIGHTS)
    read_shards(checkpoint, tensors)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name.removeprefix(WEIGHTS)].data = tensor


def as_json(replayed: Replayed, found: Rerun | None) -> str:
    """Everything, as one JSON value."""
    step, recorded = replayed.step, replayed.recorded
    packs = [
        pack.as_dict() | {"examples": [replayed.examples[row].as_dict() for row in pack.rows]}
        for pack in replayed.packs
    ]
    values: dict[str, Any] = {
        "step": step.step,
        "epoch": step.epoch + 1,
        "micro_batches": len(step.micro_batches),
        "num_tokens": step.num_tokens,
        "num_loss_tokens": step.num_loss_tokens,
        "loss_weight_sum": step.loss_weight_sum,
        "batch_digest": replayed.digest,
        "recorded_digest": None if recorded is None else recorded["batch_digest"],
        "same": replayed.is_same,
        "packs": packs,
    }
    if found is not None:
        values["loss"] = {
            "replayed": found.loss,
            "recorded": None if recorded is None else recorded["loss"],
            "weights_step": found.weights_step,
            "exact": found.is_exact,
            "why_not": found.why_not,
        }
    return json.dumps(values, indent=2, ensure_ascii=False)

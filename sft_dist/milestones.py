"""What happens between steps: evaluate, write samples, check answers, save, and finish the run.

Each function is called on one visible line of the loop, on all ranks, and returns values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.export import export_model, package_of, probe_limit
from sft_dist.checkpoint.export_certificate import Certificate, Probe, probe_ids
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.manifest import folder_step, step_name
from sft_dist.checkpoint.rebuild import base_of
from sft_dist.checkpoint.weights import live_weights
from sft_dist.data.ledger import START
from sft_dist.errors import CheckpointError
from sft_dist.evaluate.generation import Prompt, generate, prompts_from_store, stock_attention
from sft_dist.evaluate.heldout import Measured, heldout_loss
from sft_dist.evaluate.metrics import exact_match
from sft_dist.inputs import words_of
from sft_dist.job import Job
from sft_dist.models.adapters import is_adapter
from sft_dist.models.load import DTYPES
from sft_dist.models.packed import causal_lm
from sft_dist.observe.metrics import MetricsLog, best_step, read_metrics
from sft_dist.observe.report import write_report
from sft_dist.observe.run_files import append_lines, read_lines, write_json
from sft_dist.optim import set_step
from sft_dist.parallel.engine import Engine, global_numel
from sft_dist.parallel.messages import broadcast_json, gather_json
from sft_dist.parts import Parts

GENERATION_BATCH = 32


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: all of its state that is no tensor."""

    step: int = 0  # the last finished one
    ledger: str = START  # over every example trained so far
    skipped: tuple[int, ...] = ()  # steps that applied no update: their loss or gradient norm was no number


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer beside the reference."""

    id: str
    prompt: str
    reference: str
    answer: str
    match: bool


def evaluate(parts: Parts, step: int, run_dir: Path, log: MetricsLog | None) -> list[float]:
    """Validation loss of the held-out split (none without one), and sample answers."""
    write_samples(parts, step, run_dir)
    if not parts.heldout:
        return []
    measured = {
        name: heldout_loss(parts.engine, split.loader, split.plan.num_steps, parts.place.device)
        for name, split in parts.heldout.items()
    }
    whole = sum(measured.values(), start=Measured.nothing())
    by_source = {"by_source": {name: found.loss for name, found in measured.items()}} if len(measured) > 1 else {}
    if log is not None:
        log.evaluation(step, whole.loss, whole.num_loss_tokens, **by_source)
    return [whole.loss]


def write_samples(parts: Parts, step: int, run_dir: Path) -> None:
    """Append `eval.generate` answers to samples.jsonl: the same held-out prompts at every evaluation."""
    prompts = heldout_prompts(parts, parts.recipe.eval.generate)
    if not prompts or not (parts.place.is_main or parts.engine.shards_parameters):
        return
    answers = answer(parts, prompts)
    if parts.place.is_main:
        append_lines(run_dir / "samples.jsonl", [{"step": step, **asdict(a)} for a in answers])


def check_answers(parts: Parts, phase: str, run_dir: Path) -> float | None:
    """Share of `eval.exact_match` held-out answers that are exactly right; each is written to exact_match.jsonl.

    `phase` is before or after. None when the recipe does not ask for it, or the data were too few to hold any out.
    """
    num, data = parts.recipe.eval.exact_match, parts.inputs.data
    if not num or (data.test or data.eval) is None:
        return None
    prompts = heldout_prompts(parts, num)
    place = parts.place
    if parts.engine.shards_parameters:  # sharded ranks run the same forwards
        answers = answer(parts, prompts)
    else:
        mine = answer(parts, prompts[place.rank :: place.world_size])
        answers = [Answer(**a) for part in gather_json([asdict(a) for a in mine]) for a in part]
    if place.is_main:
        append_lines(run_dir / "exact_match.jsonl", [{"phase": phase, **asdict(a)} for a in answers])
    return sum(a.match for a in answers) / len(answers)


def heldout_prompts(parts: Parts, num: int) -> list[Prompt]:
    """Questions of the test split, else of the validation split, else (nothing is held out) of training."""
    data, tokenizer = parts.inputs.data, parts.inputs.tokenizer
    store = data.test or data.eval or data.train
    return prompts_from_store(store, tokenizer, num, parts.recipe.run.seed, data.template.stop_strings(tokenizer))


def answer(parts: Parts, prompts: Sequence[Prompt]) -> list[Answer]:
    """Greedy answers to `prompts` from the model as it is now."""
    template, tokenizer = parts.inputs.data.template, parts.inputs.tokenizer
    with parts.engine.evaluating():
        texts = generate(
            parts.engine.packed,
            tokenizer,
            prompts,
            max_new_tokens=parts.recipe.eval.max_new_tokens,
            stop_token_ids=template.stop_token_ids(tokenizer),
            stop_strings=template.stop_strings(tokenizer),
            batch_size=GENERATION_BATCH,
            synced=parts.engine.shards_parameters,
        )
    return [
        Answer(p.id, p.text, p.reference, text, exact_match(text, p.reference))
        for p, text in zip(prompts, texts, strict=True)
    ]


def save(parts: Parts, saver: BackgroundSaver, position: Position, run_dir: Path, *, may_fail: bool) -> None:
    """Commit the state at `position`; with early stopping the best checkpoint so far stays too.

    A save that `may_fail` is left out when the disk refuses it, with a notice; the third in a row raises StorageError.
    It goes on in the background, unless checkpoint.async=false.
    """
    best = best_step(read_metrics(run_dir)) if parts.recipe.eval.early_stopping else None
    meta = {**asdict(position), "plan": parts.train.plan.digest_up_to(position.step)}
    engine = parts.engine
    behind = partial(saver.begin, are_copies=engine.shows_copies)
    tolerant = behind if parts.recipe.checkpoint.background else saver.try_save
    write = tolerant if may_fail else saver.save
    saver.close()  # before a state that may be a copy exists: never two at once
    write(position.step, engine.state(), meta, also_keep=best)


def load(parts: Parts, manager: CheckpointManager, folder: Path) -> Position:
    """Make the state in a checkpoint folder the run's; returns where it was taken."""
    tensors = parts.engine.state()
    meta = manager.load(folder, tensors)
    now = parts.train.plan.digest_up_to(meta["step"])
    if meta["plan"] != now:
        raise CheckpointError(
            f"{folder}: the data up to step {meta['step']} are not those it was trained on (plan {meta['plan'][:16]}, "
            f"today {now[:16]}): restore them, or choose another run.dir"
        )
    parts.engine.adopt(tensors)
    done = Position(meta["step"], meta["ledger"], tuple(meta.get("skipped", ())))
    set_step(parts.engine.optimizer, done.step - len(done.skipped))
    return done


def restore_best(parts: Parts, manager: CheckpointManager, job: Job) -> int | None:
    """With early stopping, go back to the weights with the lowest validation loss before they are exported.

    Of those that were saved (an evaluation before the key was turned on may have no checkpoint) and are good still.
    Returns their step; None where the last weights are the ones to export.
    """
    saved = {folder_step(path) for path in folders(job.run_dir)} if parts.recipe.eval.early_stopping else set()
    lowest = lambda: broadcast_json(best_step(x for x in read_metrics(job.run_dir) if x["step"] in saved))  # noqa: E731
    while (best := lowest()) is not None and not manager.is_good(manager.folder / step_name(best)):
        saved.remove(best)
    if best is None:
        return None
    load(parts, manager, manager.folder / step_name(best))
    job.console.say(f"exporting step {best}, the lowest validation loss")
    return int(best)


def export(parts: Parts, run_dir: Path) -> Certificate | None:
    """Write RUN_DIR/export: a Hugging Face folder, or a PEFT adapter folder. All ranks; rank 0 gets the certificate."""
    recipe, tokenizer = parts.recipe, parts.inputs.tokenizer
    compute = DTYPES[parts.choices.compute]
    base = None
    if is_adapter(parts.engine.model):
        base = base_of(recipe, tokenizer, compute, sum(map(global_numel, parts.engine.model.parameters())))
    return export_model(
        package_of(parts.engine.model, words_of(parts.inputs), base, recipe.model.trust_remote_code),
        live_weights(parts.engine, DTYPES[recipe.precision.master]),
        run_dir / "export",
        trained_probe(parts.engine, parts.place.device, probe_limit(compute, parts.place.device.type)),
    )


def trained_probe(engine: Engine, device: torch.device, limit: float) -> Probe:
    """What the model answers now, under its engine but with the architecture's own attention. Collective."""
    lm = causal_lm(engine.model)
    ids = probe_ids(lm.config.get_text_config().vocab_size)
    with engine.evaluating(), stock_attention(lm):
        logits = engine.packed.logits(ids.to(device)).float().cpu()  # type: ignore[operator]
        return Probe(ids, logits, lm.config._attn_implementation, limit)


def finish(run_dir: Path, exported: int | None) -> dict[str, Any]:
    """Write summary.json from metrics.jsonl, and the report. `exported`: an earlier step's weights were. Rank 0."""
    lines = read_metrics(run_dir)
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]
    seconds = sum(line["step_seconds"] for line in steps)
    tokens = sum(line["num_tokens"] for line in steps)
    summary: dict[str, Any] = {
        "finished": True,
        "steps": steps[-1]["step"],
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "num_tokens": tokens,
        "num_loss_tokens": sum(line["num_loss_tokens"] for line in steps),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    if evals:
        summary |= {"eval_loss_first": evals[0]["eval_loss"], "eval_loss_last": evals[-1]["eval_loss"]}
    if exported is not None:
        at_export = [line["eval_loss"] for line in evals if line["step"] == exported]
        summary |= {"exported_step": exported, "eval_loss_exported": at_export[-1]}
    summary |= {f"exact_match_{phase}": share for phase, share in exact_shares(run_dir).items()}
    write_json(run_dir / "summary.json", summary)
    write_report(run_dir)
    return summary


def exact_shares(run_dir: Path) -> dict[str, float]:
    """Phase -> share of exact answers, from exact_match.jsonl."""
    matches: dict[str, list[bool]] = {}
    for record in read_lines(run_dir / "exact_match.jsonl"):
        matches.setdefault(record["phase"], []).append(record["match"])
    return {phase: sum(found) / len(found) for phase, found in matches.items()}


def describe(summary: dict[str, Any], run_dir: Path) -> str:
    """The closing lines a user reads."""
    text = f"done: {summary['steps']} steps, loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}"
    if "eval_loss_first" in summary:
        text += f", validation loss {summary['eval_loss_first']:.4f} -> {summary['eval_loss_last']:.4f}"
    if "exported_step" in summary:
        text += f" (exported: step {summary['exported_step']} with {summary['eval_loss_exported']:.4f})"
    if "exact_match_after" in summary:
        text += f", exact match {summary.get('exact_match_before', math.nan):.1%} -> {summary['exact_match_after']:.1%}"
    text += f", {summary['tokens_per_second']:,.0f} tokens/s"
    return f"{text}\nmodel: {run_dir / 'export'}   report: {run_dir / 'report.html'}"

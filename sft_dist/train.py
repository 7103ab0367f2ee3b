"""A training run, from its parts to the export: build them, resume, step until done.

The only mutable state is {trained weights, optimizer moments, the step}. Batches, learning rate and seeds are functions
of the step, so resuming is: load tensors, continue at step + 1.

Launchers start a rank as `python -m sft_dist.train`; what it does before it comes here is in `worker`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports: the worker first binds its life to its launcher's
    import runpy

    runpy.run_module("sft_dist.worker", run_name="__main__")

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from sft_dist import milestones
from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.hub_push import push
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.manifest import read_manifest
from sft_dist.config.auto import FEW_STEPS, cadence
from sft_dist.config.identity import read_fingerprint
from sft_dist.data.ledger import fold
from sft_dist.data.loader import LoadedStep
from sft_dist.errors import EXIT_DONE, EXIT_STOPPED, NonFiniteError
from sft_dist.inputs import Inputs
from sft_dist.job import Job
from sft_dist.layout_certificate import certify_layout
from sft_dist.milestones import Position
from sft_dist.models.packed import causal_lm
from sft_dist.nonfinite import skip_or_stop
from sft_dist.observe.header import certificate_line
from sft_dist.observe.metrics import read_metrics, rises, roll_back
from sft_dist.optim import lr_at, set_lr
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.messages import broadcast_json
from sft_dist.parallel.runtime import Runtime, seed_for
from sft_dist.parts import Parts, build_parts
from sft_dist.rehearsal import fit
from sft_dist.resilience.corruption import audit, baseline
from sft_dist.resilience.run_folder import append_event, attempt_dir
from sft_dist.resilience.unsaved import Unsaved
from sft_dist.run_header import header_rows
from sft_dist.step_metrics import measure
from sft_dist.surroundings import surroundings, warning_of_changes
from sft_dist.types import StepResult


def train_step(
    engine: Engine,
    loaded: LoadedStep,
    *,
    lr: float,
    max_norm: float,
    seed: int,
    device: torch.device,
    stop: bool,
    written: bool = False,
    overdue: bool = False,
    may_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step. The loss is the sum over the global batch divided once by its global weight. `may_update`
    returns once the weights may change."""
    losses = sum_gradients(engine, loaded, seed, device)
    grad_norm = engine.clip_grad_norm(max_norm)

    flags = losses.new_tensor([float(stop), float(written), float(overdue)])
    verdict = torch.cat([losses, flags, grad_norm.double()[None]])
    dist.all_reduce(verdict)  # one for all ranks, also where only one of them met a NaN or was asked to stop
    loss_sum = verdict[: len(loaded.step.micro_batches)].sum()  # in the plan's order, whoever computed them
    loss, stops, writes, asks, norms = torch.cat([loss_sum[None], verdict[-4:]]).tolist()  # one wait for the device
    result = StepResult(
        losses=losses,
        loss=loss / loaded.step.loss_weight_sum,
        grad_norm=norms / dist.get_world_size(),  # equal on all ranks: exact
        stop=stops > 0,
        written=writes == dist.get_world_size(),
        overdue=asks > 0,
    )
    if result.is_finite:
        set_lr(engine.optimizer, lr)
        may_update()
        engine.optimizer.step()
        engine.optimizer.zero_grad(set_to_none=True)
    else:
        engine.discard_gradients()
    return result


def sum_gradients(engine: Engine, loaded: LoadedStep, seed: int, device: torch.device) -> torch.Tensor:
    """Gradients of the step's loss into the parameters. Returns float64 [micro-batches, filled rounds included]: the
    loss sums of those this rank computed, zeros elsewhere."""
    losses = torch.zeros(len(loaded.batches) * dist.get_world_size(), dtype=torch.float64, device=device)
    for round_, (index, batch) in enumerate(zip(loaded.indices, loaded.batches, strict=True)):
        torch.manual_seed(
            seed_for(seed, loaded.step.step, index)
        )  # dropout depends on the micro-batch, not on the rank
        with engine.accumulate(round_ == len(loaded.batches) - 1):
            micro_sum = engine.forward(batch.to(device))
            (micro_sum / loaded.step.loss_weight_sum).backward()
        losses[index] = micro_sum.detach()
    return losses


def loop(parts: Parts, job: Job, saver: BackgroundSaver, done: Position) -> bool:
    """The steps behind `done` to the end of the plan. False when asked to stop before it; the state is saved then."""
    recipe, num_steps = parts.recipe, parts.train.plan.num_steps
    patience = recipe.eval.early_stopping
    evaluate_every = cadence(recipe.eval.every_steps, num_steps, parts=5)
    save_every = evaluate_every if patience else cadence(recipe.checkpoint.every_steps, num_steps, parts=1)
    log_every = cadence(recipe.log.every_steps, num_steps, parts=20)
    stop_after = recipe.optim.stop_after_step or num_steps
    losses = broadcast_json([x["eval_loss"] for x in read_metrics(job.run_dir) if x["kind"] == "eval"])
    first, audit_every = done.step + 1, recipe.resilience.audit_every
    at_start = baseline(parts.engine) if audit_every else None
    unsaved = Unsaved(asks=parts.place.is_main and recipe.checkpoint.every_steps == "auto")  # rank 0's for all
    job.console.start(done.step, num_steps)
    for step in range(first, num_steps + 1):
        if patience and rises(losses, patience):
            job.console.say(f"early stopping: validation loss did not improve in {patience} evaluations")
            return True
        if step > stop_after:
            return False
        started = time.perf_counter()
        job.beat(step, "data")
        loaded = parts.train.loader.step(step)
        if at_start and audit_every and step % audit_every == 0:
            audit(parts.engine, at_start, parts.train.loader.micro_batch(step, 0).to(parts.place.device), step)
        job.beat(step, "train")
        lr = lr_at(step, parts.choices.lr, num_steps, recipe.optim.schedule, recipe.optim.warmup_fraction)
        result = train_step(
            parts.engine,
            loaded,
            lr=lr,
            max_norm=recipe.optim.max_grad_norm,
            seed=recipe.run.seed,
            device=parts.place.device,
            stop=bool(job.stop),
            written=saver.is_written,
            overdue=unsaved.is_due(saver.slowest_seconds),
            may_update=saver.wait_for_copy,
        )
        if result.written:
            saver.commit()  # before anything about this step can end the run
        metrics = measure(parts, loaded, result, lr, job.attempt, time.perf_counter() - started)
        again = partial(sum_gradients, parts.engine, loaded, recipe.run.seed, parts.place.device)
        skipped = skip_or_stop(parts, job, loaded, result, done.skipped, again)
        job.record(metrics, loaded.step, num_steps, due=step % log_every == 0 or step in (first, num_steps))
        done = Position(step, fold(done.ledger, loaded.step), skipped)
        job.saves_take(saver.slowest_seconds)

        is_last, stopping = step == num_steps, result.stop or step == stop_after
        if is_last or step % evaluate_every == 0:
            job.beat(step, "evaluate")
            losses += milestones.evaluate(parts, step, job.run_dir, job.log)
        if is_last or stopping or step % save_every == 0 or result.overdue:
            job.beat(step, "save")
            unsaved.begin_anew()
            leaves = is_last or stopping
            milestones.save(parts, saver, done, job.run_dir, may_fail=not leaves)
        if stopping and not is_last:
            return False
    return True


def train(inputs: Inputs, job: Job, place: Runtime) -> int:
    """Build, resume, step, finish. Returns the exit code; every rank takes the same path."""
    resumed = broadcast_json(read_fingerprint(job.run_dir) is not None)
    fitted = fit(partial(build_parts, inputs, place, job.run_dir), resumed=resumed, say=job.console.say)
    parts = fitted.parts
    try:
        wished = inputs.recipe.checkpoint
        manager = CheckpointManager(
            job.run_dir,
            wished.keep,
            run=parts.fingerprint["run"],
            notice=job.console.say,
            ready=job.settle,
            fence=job.check_lease,
            trusts_all=wished.trust_world_writable,
            versions=surroundings(parts),
        )
        rows = [*header_rows(parts, job.attempt), ("layout", prove_layout(parts)), ("rehearsal", fitted.told)]
        done = resume(parts, job, manager)
        job.open_records(inputs.recipe, parts.fingerprint, inputs.data.report_now().shown(), rows)
        dist.barrier()
        num_steps = parts.train.plan.num_steps
        if num_steps < FEW_STEPS:
            job.console.say(
                f"warning: only {num_steps} optimizer steps; lower batch.tokens_per_step or raise optim.epochs"
            )
        if done.step == 0:
            job.beat(0, "evaluate")
            milestones.check_answers(parts, "before", job.run_dir)
            milestones.evaluate(parts, 0, job.run_dir, job.log)
        saver = BackgroundSaver(manager)
        try:
            finished = loop(parts, job, saver, done)
        except NonFiniteError:  # on all ranks alike, and the save under way is of a step before it
            saver.close()
            raise
        saver.close()
        job.console.stop()
        if inputs.recipe.data.streams:
            job.write_report(inputs.data.report_now().shown())
        job.beat(num_steps, "finish")
        return conclude(parts, job, manager) if finished else pause(parts, job)
    finally:
        parts.close()


def pause(parts: Parts, job: Job) -> int:
    """Say how to go on with a run that was asked to stop; its state is saved. Returns the exit code."""
    anew = parts.recipe.checkpoint.resume == "never"
    how = "with checkpoint.resume=auto" if anew else "the same command"
    why = f" ({job.stop.reason})" if job.stop.reason else ""
    job.console.say(f"stopped with a checkpoint{why}; run {how} to continue")
    if parts.place.is_main:
        append_event(attempt_dir(job.run_dir, job.attempt), "stopped", reason=job.stop.reason)
    return EXIT_STOPPED


def conclude(parts: Parts, job: Job, manager: CheckpointManager) -> int:
    """Export the weights, and write down how the run went. Returns the exit code."""
    recipe = parts.recipe
    exported = milestones.restore_best(parts, manager, job)
    milestones.check_answers(parts, "after", job.run_dir)
    certificate = milestones.export(parts, job.run_dir)
    if certificate is not None:
        job.console.say(f"export       {certificate.line()}")
    if parts.place.is_main:
        job.console.say(milestones.describe(milestones.finish(job.run_dir, exported), job.run_dir))
        if recipe.hub.push_to:
            steps = f"{recipe.run.name}, {parts.train.plan.num_steps} steps"
            job.console.say(push(job.run_dir / "export", recipe.hub, steps))
    return EXIT_DONE


def prove_layout(parts: Parts) -> str:
    """The layout certificate of this run, for the header. Raises CertificateError."""
    config = causal_lm(parts.engine.model).config
    checks = certify_layout(parts.recipe, parts.choices, config, parts.place, train_step, sequence=parts.sequence)
    return certificate_line([(c.name, c.figure, c.limit) for c in checks])


def resume(parts: Parts, job: Job, manager: CheckpointManager) -> Position:
    """Load the newest good checkpoint into `parts`; returns where it was taken, the start for a new run."""
    newest, done = manager.newest_good(), Position()
    if newest is not None:
        done = milestones.load(parts, manager, newest)
        job.console.say(f"resuming after step {done.step} from {newest}")
        if told := warning_of_changes(read_manifest(newest).versions, manager.versions):
            job.console.say(told)
    elif read_fingerprint(job.run_dir) is not None:
        job.console.say("an earlier attempt left no checkpoint: starting at step 0")
    if parts.place.is_main:
        roll_back(job.run_dir, done.step, attempt_dir(job.run_dir, job.attempt))
    dist.barrier()
    return done

"""A training run, from recipe to export: build the parts, resume, step until done. One rank of it.

    sft-dist train R.yaml key=value --nproc 2               starts the ranks itself
    torchrun --nproc-per-node 2 -m sft_dist.train R.yaml    or accelerate, deepspeed: this module is the worker

The only mutable state is {trained weights, optimizer moments, the step}. Batches, learning rate and seeds are functions
of the step, so resuming is: load tensors, continue at step + 1.
"""

from __future__ import annotations

import signal

from sft_dist.resilience.orphan import die_with_ancestors
from sft_dist.resilience.stacks import answer_with_stacks

if __name__ == "__main__":
    die_with_ancestors()  # before the slow imports: a launcher killed meanwhile must not leave this process behind
    answer_with_stacks()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop listens: Ctrl-C ends it without a traceback

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sft_dist import milestones
from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.disk import explain, is_storage_failure
from sft_dist.checkpoint.hub_push import check_hub, push
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.config.auto import FEW_STEPS, cadence, refuse_uneven
from sft_dist.config.elastic import ELASTIC, check_world
from sft_dist.config.environment import check_launcher
from sft_dist.config.identity import check_recipe, read_fingerprint
from sft_dist.config.loader import adoptions, load_recipe, load_resolved
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.config.srun import adopt_srun
from sft_dist.data.ledger import fold
from sft_dist.data.loader import LoadedStep
from sft_dist.data.stream_store import AnyStore
from sft_dist.errors import EXIT_DONE, EXIT_STOPPED, NonFiniteError, SftError
from sft_dist.job import Job
from sft_dist.layout_certificate import certify_layout
from sft_dist.milestones import Position
from sft_dist.models.packed import causal_lm
from sft_dist.nonfinite import skip_or_stop
from sft_dist.observe.header import certificate_line
from sft_dist.observe.metrics import read_metrics, rises, roll_back
from sft_dist.observe.perf import peak_flops, peak_memory_gib, step_flops
from sft_dist.observe.trackers import check_trackers
from sft_dist.optim import lr_at, set_lr
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.messages import broadcast_json
from sft_dist.parallel.runtime import Runtime, read_place, runtime, seed_for
from sft_dist.parts import Inputs, Parts, build_parts, header_rows, read_inputs
from sft_dist.rehearsal import fit
from sft_dist.resilience.corruption import audit, baseline
from sft_dist.resilience.ending import letting_go, run_and_end
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.lease import LEASE_VARIABLE
from sft_dist.resilience.orphan import launcher_commands
from sft_dist.resilience.run_folder import append_event, attempt_dir, claim, put_aside, write_exit_code
from sft_dist.resilience.time_limit import end_time
from sft_dist.types import StepMetrics, StepPlan, StepResult

LONGEST_UNSAVED_SECONDS = 1800.0  # with checkpoint.every_steps=auto, however many steps a run has


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
    result = StepResult(
        loss=loss_sum.item() / loaded.step.loss_weight_sum,
        grad_norm=verdict[-1].item() / dist.get_world_size(),  # equal on all ranks: exact
        stop=verdict[-4].item() > 0,
        written=verdict[-3].item() == dist.get_world_size(),
        overdue=verdict[-2].item() > 0,
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
    save_every = evaluate_every if patience else cadence(recipe.checkpoint.every_steps, num_steps, parts=5)
    log_every = cadence(recipe.log.every_steps, num_steps, parts=20)
    stop_after = recipe.optim.stop_after_step or num_steps
    losses = broadcast_json([x["eval_loss"] for x in read_metrics(job.run_dir) if x["kind"] == "eval"])
    first, audit_every = done.step + 1, recipe.resilience.audit_every
    at_start = baseline(parts.engine) if audit_every else None
    by_clock = parts.place.is_main and recipe.checkpoint.every_steps == "auto"  # rank 0's decides for all
    saved_at = time.monotonic()
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
            overdue=by_clock and time.monotonic() - saved_at > LONGEST_UNSAVED_SECONDS,
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
            saved_at = time.monotonic()
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
            notice=job.console.say,
            ready=job.settle,
            fence=job.check_lease,
            trusts_all=wished.trust_world_writable,
        )
        rows = [*header_rows(parts, job.attempt), ("layout", prove_layout(parts)), ("rehearsal", fitted.told)]
        done = resume(parts, job, manager)
        job.open_records(inputs.recipe, parts.fingerprint, inputs.data.report_now().as_dict(), rows)
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
            job.write_report(inputs.data.report_now().as_dict())
        job.beat(num_steps, "finish")
        if not finished:
            anew = inputs.recipe.checkpoint.resume == "never"
            how = "with checkpoint.resume=auto" if anew else "the same command"
            why = f" ({job.stop.reason})" if job.stop.reason else ""
            job.console.say(f"stopped with a checkpoint{why}; run {how} to continue")
            if place.is_main:
                append_event(attempt_dir(job.run_dir, job.attempt), "stopped", reason=job.stop.reason)
            return EXIT_STOPPED
        exported = milestones.restore_best(parts, manager, job)
        milestones.check_answers(parts, "after", job.run_dir)
        certificate = milestones.export(parts, job.run_dir)
        if certificate is not None:
            job.console.say(f"export       {certificate.line()}")
        if place.is_main:
            job.console.say(milestones.describe(milestones.finish(job.run_dir, exported), job.run_dir))
            if inputs.recipe.hub.push_to:
                job.console.say(
                    push(job.run_dir / "export", inputs.recipe.hub, f"{inputs.recipe.run.name}, {num_steps} steps")
                )
        return EXIT_DONE
    finally:
        parts.close()


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
    elif read_fingerprint(job.run_dir) is not None:
        job.console.say("an earlier attempt left no checkpoint: starting at step 0")
    if parts.place.is_main:
        roll_back(job.run_dir, done.step, attempt_dir(job.run_dir, job.attempt))
    dist.barrier()
    return done


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


def main(argv: Sequence[str] | None = None) -> int:
    """The worker: `--resolved RUN_DIR/config.yaml` from our launcher, else recipes and settings as users write them.

    Returns 0 on an orderly end; the code itself (75 for "run again to continue") goes to logs/attempt_N/exit_code,
    because torchrun would turn any other into 1.
    """
    adopt_srun(os.environ)
    is_main = read_place()[0] == 0
    try:
        code, folder = run_worker(sys.argv[1:] if argv is None else argv)
        if is_main:
            write_exit_code(folder, code)
        return 0
    except SftError as error:
        if is_main:
            print(f"sft-dist: error: {error}", file=sys.stderr, flush=True)
            write_exit_code(None, error.exit_code)
        return error.exit_code


def run_worker(argv: Sequence[str]) -> tuple[int, Path | None]:
    """Everything of one rank: (exit code, the attempt's folder on rank 0)."""
    is_main = read_place()[0] == 0
    notice = print if is_main else lambda text: None
    recipe, adopted = check_launcher(read_recipe(argv), launchers=launcher_commands())
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # adopted; transformers would load empty weights on all but rank 0
    refuse_uneven(recipe, read_place()[1])  # before the data are prepared
    for line in [*told(argv), *adopted]:
        notice(line)
    elastic = recipe.run.deterministic == ELASTIC
    if elastic:
        check_world(read_place()[1])
    run_dir, anew = Path(recipe.run.dir), recipe.checkpoint.resume == "never"
    if not anew:
        check_recipe(recipe)
    if not anew and (run_dir / "summary.json").exists():
        notice(f"the run in {run_dir} is finished: {run_dir / 'export'}; choose another run.dir to train anew")
        return EXIT_DONE, None
    check_trackers(recipe)
    check_hub(recipe.hub)
    heart().beat(0, "prepare")
    inputs = read_inputs(recipe, notice)
    heart().beat(0, "build")
    with ExitStack() as stack:
        stack.callback(inputs.data.close)
        place = stack.enter_context(runtime(num_threads=1 if elastic else None))
        attempt = broadcast_json(take_attempt(run_dir, stack) if place.is_main else None)
        if anew and place.is_main and (aside := put_aside(run_dir, attempt)):
            notice(f"checkpoint.resume=never: what earlier attempts left is in {aside}")
        job = stack.enter_context(Job(run_dir, attempt, place.rank))
        job.mind_the_end(end_time(recipe.resilience.end_time, os.environ), recipe.resilience.end_margin_seconds)
        folder = attempt_dir(run_dir, attempt) if place.is_main else None
        try:
            with letting_go(), failing_storage(run_dir):
                return train(inputs, job, place), folder
        except SftError as error:
            if folder is not None:
                write_exit_code(folder, error.exit_code)
            raise


@contextmanager
def failing_storage(run_dir: Path) -> Iterator[None]:
    """A disk that is full, fails or went away, wherever the run meets it, ends it with one line and 74."""
    try:
        yield
    except OSError as error:
        if not is_storage_failure(error):
            raise
        raise explain(Path(error.filename or run_dir), error) from error


def read_recipe(argv: Sequence[str]) -> Recipe:
    """The resolved recipe of a run folder, or recipes with settings as on the command line."""
    if argv[:1] == ["--resolved"]:
        return load_resolved(argv[1])
    return load_recipe(*split_arguments(argv))


def told(argv: Sequence[str]) -> list[str]:
    """What the recipe took from other programs' files; our launcher has told it already."""
    return [] if argv[:1] == ["--resolved"] else adoptions(*split_arguments(argv))


def take_attempt(run_dir: Path, stack: ExitStack) -> int:
    """Number of this attempt. Our launcher has claimed the folder already; other launchers leave that to rank 0."""
    if "SFT_ATTEMPT" in os.environ:
        return int(os.environ["SFT_ATTEMPT"])
    claimed = claim(run_dir, sys.argv)
    stack.callback(claimed.lock.release)
    stack.enter_context(claimed.lock.lease.kept())
    os.environ[LEASE_VARIABLE] = claimed.lock.lease.token
    return claimed.attempt


if __name__ == "__main__":
    run_and_end(main)

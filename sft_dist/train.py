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

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sft_dist import milestones
from sft_dist.checkpoint.disk import explain, is_storage_failure
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.config.auto import FEW_STEPS, cadence
from sft_dist.config.environment import check_launcher
from sft_dist.config.identity import check_recipe, read_fingerprint
from sft_dist.config.loader import load_recipe, load_resolved
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.data.ledger import fold
from sft_dist.data.loader import LoadedStep
from sft_dist.data.store import TokenStore
from sft_dist.errors import EXIT_DONE, EXIT_STOPPED, NonFiniteError, SftError
from sft_dist.job import Job
from sft_dist.milestones import Position
from sft_dist.observe.metrics import read_metrics, rises, roll_back
from sft_dist.observe.perf import peak_flops, peak_memory_gib, step_flops
from sft_dist.optim import lr_at, set_lr
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.messages import broadcast_json
from sft_dist.parallel.runtime import Runtime, read_place, runtime, seed_for
from sft_dist.parts import Inputs, Parts, build_parts, header_rows, read_inputs
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.lease import LEASE_VARIABLE
from sft_dist.resilience.orphan import launcher_commands
from sft_dist.resilience.run_folder import attempt_dir, claim, put_aside, write_exit_code
from sft_dist.resilience.time_limit import end_time
from sft_dist.types import StepMetrics, StepPlan


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step found out, equal on every rank."""

    loss: float
    grad_norm: float
    stop: bool


def train_step(
    engine: Engine,
    loaded: LoadedStep,
    *,
    lr: float,
    max_norm: float,
    seed: int,
    device: torch.device,
    stop: bool,
) -> StepResult:
    """One optimizer step. The loss is the sum over the global batch divided once by its global weight."""
    divisor = loaded.step.loss_weight_sum
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for round_, (index, batch) in enumerate(zip(loaded.indices, loaded.batches, strict=True)):
        torch.manual_seed(
            seed_for(seed, loaded.step.step, index)
        )  # dropout depends on the micro-batch, not on the rank
        with engine.accumulate(round_ == len(loaded.batches) - 1):
            micro_sum = engine.forward(batch.to(device))
            (micro_sum / divisor).backward()
        loss_sum += micro_sum.detach()
    grad_norm = engine.clip_grad_norm(max_norm)

    verdict = torch.stack([loss_sum, torch.tensor(float(stop), dtype=torch.float64, device=device)])
    dist.all_reduce(verdict)  # one verdict for all ranks: the loss, and whether anyone was asked to stop
    result = StepResult(verdict[0].item() / divisor, grad_norm.item(), verdict[1].item() > 0)
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        set_lr(engine.optimizer, lr)
        engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    return result


def loop(parts: Parts, job: Job, manager: CheckpointManager, done: Position) -> bool:
    """The steps behind `done` to the end of the plan. False when asked to stop before it; the state is saved then."""
    recipe, num_steps = parts.recipe, parts.train.plan.num_steps
    patience = recipe.eval.early_stopping
    evaluate_every = cadence(recipe.eval.every_steps, num_steps, parts=5)
    save_every = evaluate_every if patience else cadence(recipe.checkpoint.every_steps, num_steps, parts=5)
    log_every = cadence(recipe.log.every_steps, num_steps, parts=20)
    stop_after = recipe.optim.stop_after_step or num_steps
    losses = broadcast_json([x["eval_loss"] for x in read_metrics(job.run_dir) if x["kind"] == "eval"])
    ledger = done.ledger
    job.console.start(done.step, num_steps)
    for step in range(done.step + 1, num_steps + 1):
        if patience and rises(losses, patience):
            job.console.say(f"early stopping: validation loss did not improve in {patience} evaluations")
            return True
        if step > stop_after:
            return False
        started = time.perf_counter()
        job.beat(step, "data")
        loaded = parts.train.loader.step(step)
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
        )
        metrics = measure(parts, loaded, result, lr, job.attempt, time.perf_counter() - started)
        refuse_nonfinite(metrics, loaded)
        job.record(metrics, num_steps, due=step % log_every == 0 or step in (done.step + 1, num_steps))
        ledger = fold(ledger, loaded.step)

        is_last, stopping = step == num_steps, result.stop or step == stop_after
        if is_last or step % evaluate_every == 0:
            job.beat(step, "evaluate")
            losses += milestones.evaluate(parts, step, job.run_dir, job.log)
        if is_last or stopping or step % save_every == 0:
            job.beat(step, "save")
            leaves = is_last or stopping
            milestones.save(parts, manager, Position(step, ledger), job.run_dir, may_fail=not leaves)
        if stopping and not is_last:
            return False
    return True


def train(inputs: Inputs, job: Job, place: Runtime) -> int:
    """Build, resume, step, finish. Returns the exit code; every rank takes the same path."""
    parts = build_parts(inputs, place, job.run_dir)
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
        done = resume(parts, job, manager)
        job.open_records(
            inputs.recipe, parts.fingerprint, inputs.data.report.as_dict(), header_rows(parts, job.attempt)
        )
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
        finished = loop(parts, job, manager, done)
        job.console.stop()
        job.beat(num_steps, "finish")
        if not finished:
            anew = inputs.recipe.checkpoint.resume == "never"
            how = "with checkpoint.resume=auto" if anew else "the same command"
            why = f" ({job.stop.reason})" if job.stop.reason else ""
            job.console.say(f"stopped with a checkpoint{why}; run {how} to continue")
            return EXIT_STOPPED
        exported = milestones.restore_best(parts, manager, job)
        milestones.check_answers(parts, "after", job.run_dir)
        milestones.export(parts, job.run_dir)
        if place.is_main:
            job.console.say(milestones.describe(milestones.finish(job.run_dir, exported), job.run_dir))
        return EXIT_DONE
    finally:
        parts.close()


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
    lengths = parts.inputs.data.train.lengths
    squares = sum(int(lengths[i]) ** 2 for pack in step.packs for i in pack.example_ids)
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


def tokens_by_source(store: TokenStore, step: StepPlan) -> dict[str, int] | None:
    """Source of the recipe -> tokens of it in this step; None where there is but one."""
    if len(store.sources) < 2:
        return None
    examples = np.array([example for pack in step.packs for example in pack.example_ids])
    counts = np.bincount(store.source_of(examples), weights=store.lengths[examples], minlength=len(store.sources))
    return {name: int(count) for name, count in zip(store.sources, counts, strict=True) if count}


def refuse_nonfinite(metrics: StepMetrics, loaded: LoadedStep) -> None:
    """Stop on NaN or infinity; the update of this step was not applied."""
    if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
        examples = [i for pack in loaded.step.packs for i in pack.example_ids]
        raise NonFiniteError(
            f"step {metrics.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}; no update was applied. "
            f"Examples of the step: {examples[:20]}. Lower optim.lr, or inspect them with `sft-dist data inspect`"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The worker: `--resolved RUN_DIR/config.yaml` from our launcher, else recipes and settings as users write them.

    Returns 0 on an orderly end; the code itself (75 for "run again to continue") goes to logs/attempt_N/exit_code,
    because torchrun would turn any other into 1.
    """
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
    for line in adopted:
        notice(line)
    run_dir, anew = Path(recipe.run.dir), recipe.checkpoint.resume == "never"
    if not anew:
        check_recipe(recipe)
    if not anew and (run_dir / "summary.json").exists():
        notice(f"the run in {run_dir} is finished: {run_dir / 'export'}; choose another run.dir to train anew")
        return EXIT_DONE, None
    heart().beat(0, "prepare")
    inputs = read_inputs(recipe, notice)
    heart().beat(0, "build")
    with ExitStack() as stack:
        place = stack.enter_context(runtime())
        attempt = broadcast_json(take_attempt(run_dir, stack) if place.is_main else None)
        if anew and place.is_main and (aside := put_aside(run_dir, attempt)):
            notice(f"checkpoint.resume=never: what earlier attempts left is in {aside}")
        job = stack.enter_context(Job(run_dir, attempt, place.rank))
        job.mind_the_end(end_time(recipe.resilience.end_time, os.environ), recipe.resilience.end_margin_seconds)
        folder = attempt_dir(run_dir, attempt) if place.is_main else None
        try:
            with failing_storage(run_dir):
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
    sys.exit(main())

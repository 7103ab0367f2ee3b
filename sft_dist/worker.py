"""The worker: one rank of a run, whoever started it, from its arguments to its exit code.

sft-dist train R.yaml key=value --nproc 2               starts the ranks itself
torchrun --nproc-per-node 2 -m sft_dist.train R.yaml    or accelerate, deepspeed: ends here as well
"""

from __future__ import annotations

from sft_dist.resilience.beginning import begin_as_worker

if __name__ == "__main__":  # `sft-dist train`, where a launcher has started it, does the same
    begin_as_worker()

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sft_dist.checkpoint.disk import explain, is_storage_failure
from sft_dist.checkpoint.hub_push import check_hub
from sft_dist.config.auto import refuse_uneven
from sft_dist.config.elastic import ELASTIC, check_world
from sft_dist.config.environment import check_launcher
from sft_dist.config.identity import check_recipe
from sft_dist.config.loader import adoptions, load_recipe, load_resolved
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.config.srun import adopt_srun
from sft_dist.errors import EXIT_DONE, SftError
from sft_dist.inputs import read_inputs
from sft_dist.job import Job
from sft_dist.observe.trackers import check_trackers
from sft_dist.parallel.messages import broadcast_json
from sft_dist.parallel.runtime import read_place, runtime
from sft_dist.resilience.ending import letting_go, run_and_end
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.lease import LEASE_VARIABLE
from sft_dist.resilience.orphan import launcher_commands
from sft_dist.resilience.run_folder import attempt_dir, claim, put_aside, write_exit_code
from sft_dist.resilience.time_limit import end_time
from sft_dist.train import train


def main(argv: Sequence[str] | None = None) -> int:
    """One rank: `--resolved RUN_DIR/config.yaml` from our launcher, else recipes and settings as users write them.

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
        place = stack.enter_context(runtime(1 if elastic else None, deterministic=bool(recipe.run.deterministic)))
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

"""Whether a Slurm job that has ended starts again: asked by slurm/train.sbatch, on the first node, without torch.

    python -m sft_dist.launch.requeue begin RUN_DIR                          before a run: prints `go`, or a code
    python -m sft_dist.launch.requeue end RUN_DIR CODE [--near-end] [--ended]    after it: prints code and action

    how it ended                                    then
    0, or a mistake, bad data, NaN                  over
    75 near the time limit                          again (Slurm has warned, or the run has left in time by itself)
    75 otherwise: somebody made RUN_DIR/stop        over
    71 hang, 74 storage, a crash                    again, at most resilience.max_restarts times
    77 with nodes that the preflight found bad      the same, without them (cluster.exclude_bad_nodes)
    after SIGTERM (scancel, preemption)             Slurm decides: a requeue would revive a cancelled job

And over with 76 after FRUITLESS_LIMIT endings in a row without a new checkpoint. What is told here is kept in
`RUN_DIR/slurm/endings.jsonl`; counting starts anew with each `sft-dist submit`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_dist.config.cluster import ClusterSection
from sft_dist.config.loader import dump_recipe, load_resolved
from sft_dist.errors import (
    EXIT_DATA,
    EXIT_DONE,
    EXIT_HANG,
    EXIT_HARDWARE,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_USAGE,
)
from sft_dist.launch.restarts import FRUITLESS_LIMIT, newest_step
from sft_dist.launch.submission import ENDINGS, RECIPE, slurm_dir
from sft_dist.resilience.run_folder import BEGUN_ANEW_NAME, STOP_NAME, attempt_dir, last_attempt
from sft_dist.resilience.time_limit import REASON

MAY_PASS = frozenset({EXIT_HANG, EXIT_STORAGE})
OUR_CODES = frozenset({EXIT_DONE, EXIT_USAGE, *range(EXIT_DATA, EXIT_HARDWARE + 1)})


@dataclass(frozen=True, slots=True)
class Ending:
    """How one start of a job ended; `again` says that another one is worth it."""

    submission: str
    job: str
    restart: int
    nodes: str
    code: int
    near_end: bool
    ended: bool
    step: int  # of the newest checkpoint
    again: bool = False
    bad_nodes: tuple[str, ...] = ()  # found by the preflight, where the recipe lets them be left out
    why: str = ""


def judge(ending: Ending, earlier: Sequence[Ending], max_restarts: int) -> Ending:
    """`ending` with code, `again` and `why` filled in, given the `earlier` ones of the same submission."""
    if ending.code == EXIT_DONE:
        return _with(ending, why="done")
    if ending.ended:
        return _with(ending, why="ended from outside: Slurm requeues what it has preempted, and nothing else does")
    may_pass = (
        ending.code not in OUR_CODES
        or ending.code in MAY_PASS
        or (ending.code == EXIT_STOPPED and ending.near_end)
        or (ending.code == EXIT_HARDWARE and bool(ending.bad_nodes))
    )
    if not may_pass:
        return _with(ending, why="stopped on request" if ending.code == EXIT_STOPPED else "would only fail again")
    if _fruitless([*earlier, ending]) >= FRUITLESS_LIMIT:
        return _with(ending, code=EXIT_NO_PROGRESS, why=f"no new checkpoint in {FRUITLESS_LIMIT} starts")
    failures = sum(e.code != EXIT_STOPPED and not e.ended for e in earlier)
    if ending.code != EXIT_STOPPED and failures >= max_restarts:
        return _with(ending, why=f"resilience.max_restarts={max_restarts} reached")
    return _with(ending, again=True, why="goes on after the time limit" if ending.near_end else "may pass")


def _fruitless(endings: Sequence[Ending]) -> int:
    """How many of the last starts in a row brought no checkpoint beyond the start before."""
    count, before = 0, 0
    for ending in endings:
        count = 0 if ending.step > before else count + 1
        before = max(before, ending.step)
    return count


def _with(ending: Ending, **changes: object) -> Ending:
    return Ending(**{**asdict(ending), **changes})


def read_endings(run_dir: Path, submission: str) -> list[Ending]:
    """What earlier starts of this submission told, oldest first."""
    path = slurm_dir(run_dir) / ENDINGS
    lines = path.read_text().splitlines() if path.exists() else []
    found = (json.loads(line) for line in lines)
    return [Ending(**{**e, "bad_nodes": tuple(e["bad_nodes"])}) for e in found if e["submission"] == submission]


def excluded(cluster: ClusterSection, endings: Sequence[Ending]) -> str:
    """Nodes to leave out: the recipe's, and what any start of this submission has found bad."""
    bad = [node for ending in endings for node in ending.bad_nodes]
    return ",".join(dict.fromkeys([*(cluster.exclude or "").split(","), *bad])).strip(",")


def begin(run_dir: Path, environ: Mapping[str, str]) -> str:
    """`go` when this start is worth it; else the code to leave with, as for later jobs of a chain that is done."""
    go_on(run_dir)
    endings = read_endings(run_dir, environ["SFT_SUBMISSION"])
    if not endings or endings[-1].again or endings[-1].ended:
        return "go"
    last = endings[-1]
    print(f"sft-dist: job {last.job} has ended this run ({last.why}): nothing to do", file=sys.stderr)
    return str(last.code)


def left_in_time(run_dir: Path, step: int, stop_after_step: int | None) -> bool:
    """Whether the newest attempt stopped by itself because its time was nearly up (resilience.end_time).

    Rank 0 says why it stopped. It may not know, when another rank was the first to notice: then it was the time, unless
    somebody has made RUN_DIR/stop or the recipe wanted the stop.
    """
    path = attempt_dir(run_dir, last_attempt(run_dir)) / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    reasons = [event.get("reason") for event in events if event["event"] == "stopped"]
    if not reasons or reasons[-1] is not None:
        return bool(reasons) and reasons[-1] == REASON
    return step != stop_after_step and not (run_dir / STOP_NAME).exists()


def go_on(run_dir: Path) -> None:
    """`checkpoint.resume: never` is obeyed once for each submission: a start that has put earlier results aside must
    not be put aside by the next one."""
    path = slurm_dir(run_dir) / RECIPE
    recipe, submitted = load_resolved(path), path.stat().st_mtime_ns
    begun = (run_dir / "logs").glob(f"attempt_*/{BEGUN_ANEW_NAME}")
    if recipe.checkpoint.resume == "never" and any(mark.stat().st_mtime_ns >= submitted for mark in begun):
        checkpoint = recipe.checkpoint.model_copy(update={"resume": "auto"})
        partial = path.with_suffix(".partial")
        partial.write_text(dump_recipe(recipe.model_copy(update={"checkpoint": checkpoint})))
        partial.replace(path)


def end(run_dir: Path, code: int, near_end: bool, ended: bool, environ: Mapping[str, str]) -> tuple[int, str]:
    """Record how this start ended; returns the code to leave with and what train.sbatch is to do."""
    recipe = load_resolved(slurm_dir(run_dir) / RECIPE)
    submission = environ["SFT_SUBMISSION"]
    allowed = recipe.cluster.exclude_bad_nodes
    bad = run_dir / "logs" / f"preflight-{environ['SFT_MEETING']}" / "bad_nodes"  # as sft_dist.preflight writes it
    step = newest_step(run_dir)
    near_end = near_end or (code == EXIT_STOPPED and left_in_time(run_dir, step, recipe.optim.stop_after_step))
    ending = Ending(
        submission=submission,
        job=environ["SLURM_JOB_ID"],
        restart=int(environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=environ.get("SLURM_JOB_NODELIST", ""),
        code=code,
        near_end=near_end,
        ended=ended,
        step=step,
        bad_nodes=tuple(bad.read_text().split()) if allowed and bad.exists() else (),
    )
    earlier = read_endings(run_dir, submission)
    ending = judge(ending, earlier, recipe.resilience.max_restarts)
    with (slurm_dir(run_dir) / ENDINGS).open("a") as file:
        file.write(json.dumps(asdict(ending)) + "\n")
    print(f"sft-dist: ended with {code} after step {ending.step}: {ending.why}", file=sys.stderr)
    if not (ending.again and recipe.cluster.requeue):
        return ending.code, ""
    return ending.code, f"requeue {excluded(recipe.cluster, [*earlier, ending])}"


def main(argv: Sequence[str] | None = None) -> int:
    """The program behind train.sbatch's two questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("when", choices=["begin", "end"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("code", type=int, nargs="?", default=0)
    parser.add_argument("--near-end", action="store_true")
    parser.add_argument("--ended", action="store_true")
    args = parser.parse_args(argv)
    if args.when == "begin":
        print(begin(args.run_dir, os.environ))
        return EXIT_DONE
    code, action = end(args.run_dir, args.code, args.near_end, args.ended, os.environ)
    print(code)
    print(action)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

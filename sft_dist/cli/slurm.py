"""`sft-dist slurm status | logs | cancel | requeue RUN_DIR`: the scheduler's side of a submitted run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_dist.cli.where import explain
from sft_dist.errors import EXIT_DONE, ConfigError
from sft_dist.launch import scheduler
from sft_dist.launch.restarts import newest_step
from sft_dist.launch.submission import ARRAY, ENDINGS, JOBS, slurm_dir
from sft_dist.launch.where import Place
from sft_dist.observe.metrics import read_metrics

_FOLLOW_SECONDS = 0.5
_SILENT = ("id", "ended")  # for programs


def add_parser(subparsers: Any) -> None:
    """Add the verb `slurm` with its four actions."""
    verb = subparsers.add_parser("slurm", help="status, logs, cancel, requeue of a submitted run", description=__doc__)
    actions = verb.add_subparsers(required=True, metavar="ACTION")
    table: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
        "status": (status, "jobs, steps, checkpoints, and where each rank is"),
        "logs": (logs, "what the jobs and the ranks of an attempt have written"),
        "cancel": (cancel, "checkpoint and end, and nothing starts again"),
        "requeue": (requeue, "checkpoint and start again, on other nodes perhaps"),
    }
    for name, (func, text) in table.items():
        parser = actions.add_parser(name, help=text, description=text)
        parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
        parser.set_defaults(func=func)
        if name == "status":
            parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
        if name == "logs":
            parser.add_argument("--attempt", type=int, metavar="N", help="of this attempt (default: the newest)")
            parser.add_argument("--rank", type=int, metavar="R", help="of this rank; without: of the job")
            parser.add_argument("--follow", action="store_true", help="go on until the jobs are over")


def status(args: argparse.Namespace) -> int:
    """The state of every job of the newest submission; where its ranks are, when it runs. Of an array: each member."""
    told = [_describe(record) for job in _jobs(args.run_dir) for record in _records(job)]
    members = {name: _progress(args.run_dir / name) for name in _members(args.run_dir)}
    running = [] if members else [str(one["id"]) for one in told if one["state"] == "RUNNING"]
    places = [place for job in running for place in _places(job, args.run_dir)]
    report = {"jobs": told, **_progress(args.run_dir), "members": members}
    report["ranks"] = [_place_as_json(place) for place in places]
    if args.json:
        print(json.dumps(report, indent=2))
        return EXIT_DONE
    for one in told:
        print(
            "  ".join(f"{key} {value}" for key, value in one.items() if key not in _SILENT and value not in ("", None))
        )
    for name, progress in members.items():
        print(f"{name}: {_told(progress)}")
    if members:
        print(f"ranks of one: sft-dist slurm status {args.run_dir / next(iter(members))}")
        return EXIT_DONE
    print(_told(report))
    for line in explain(places):
        print(line)
    if last := report["last_ending"]:
        print(f"last ending: {last}")
    return EXIT_DONE


def _told(progress: dict[str, Any]) -> str:
    return f"step {progress['step']}, newest checkpoint {progress['checkpoint']}, loss {progress['loss']}"


def logs(args: argparse.Namespace) -> int:
    """The job's output, or a rank's; with --follow as it grows."""
    paths = _log_paths(args.run_dir, args.attempt, args.rank)
    if not paths:
        raise ConfigError(f"{args.run_dir}: nothing was written there yet: see sft-dist slurm status {args.run_dir}")
    offsets = dict.fromkeys(paths, 0)
    while True:
        for path in paths:
            text = path.read_bytes()[offsets[path] :]
            offsets[path] += len(text)
            sys.stdout.buffer.write(text)
        sys.stdout.flush()
        if not args.follow or all(map(_has_ended, _jobs(args.run_dir))):
            return EXIT_DONE
        time.sleep(_FOLLOW_SECONDS)


def cancel(args: argparse.Namespace) -> int:
    """scancel of everything that has not ended, chains included."""
    live = [job for job in _jobs(args.run_dir) if not _has_ended(job)]
    if live:
        scheduler.ask(["scancel", *live])
    print(f"cancelled {', '.join(live)}" if live else "nothing is queued or running")
    return EXIT_DONE


def requeue(args: argparse.Namespace) -> int:
    """scontrol requeue of what runs."""
    live = [job for job in _jobs(args.run_dir) if not _has_ended(job)]
    if not live:
        raise ConfigError(f"{args.run_dir}: no job of this run is queued or running: submit it again")
    for job in live:
        scheduler.ask(["scontrol", "requeue", job])
    print(f"requeued {', '.join(live)}")
    return EXIT_DONE


def _jobs(run_dir: Path) -> list[str]:
    """Ids of the newest submission's jobs, oldest first; of a member of an array the id of its task."""
    path = slurm_dir(run_dir) / JOBS
    if path.is_file():
        notes = [json.loads(line) for line in path.read_text().splitlines()]
        return [note["job"] for note in notes if note["submission"] == notes[-1]["submission"]]
    whole = run_dir.absolute().parent
    if run_dir.name in _members(whole):
        return [f"{job}_{_members(whole).index(run_dir.name)}" for job in _jobs(whole)]
    raise ConfigError(f"{run_dir}: was not submitted (no {path}): sft-dist submit RECIPE.yaml CLUSTER.yaml")


def _members(run_dir: Path) -> list[str]:
    """Folders of an array's runs, in the order of its tasks; none where RUN_DIR is a run itself."""
    path = slurm_dir(run_dir) / ARRAY
    return path.read_text().splitlines() if path.is_file() else []


def _records(job: str) -> list[dict[str, str]]:
    """What Slurm knows of a job, one record for each task of an array."""
    return scheduler.records(job) or [{"JobId": job, "JobState": "UNKNOWN", "Reason": "Slurm has forgotten it"}]


def _has_ended(job: str) -> bool:
    return all(map(scheduler.has_ended, scheduler.records(job)))


def _describe(record: dict[str, str]) -> dict[str, object]:
    """One job as a user wants to see it. `id` is the number that srun knows it by, also for a task of an array."""
    is_task = "ArrayTaskId" in record
    return {
        "job": f"{record['ArrayJobId']}_{record['ArrayTaskId']}" if is_task else record["JobId"],
        "id": record["JobId"],
        "state": record["JobState"],
        "reason": "" if record.get("Reason") in (None, "None") else record["Reason"],
        "restarts": record.get("Restarts", ""),
        "nodes": "" if record.get("NodeList") in (None, "(null)") else record["NodeList"],
        "elapsed": record.get("RunTime", ""),
        "limit": record.get("TimeLimit", ""),
        "ended": scheduler.has_ended(record),
    }


def _progress(run_dir: Path) -> dict[str, object]:
    """How far the run is, from its own files."""
    steps = [line for line in read_metrics(run_dir) if line["kind"] == "step"]
    endings = slurm_dir(run_dir) / ENDINGS
    lines = endings.read_text().splitlines() if endings.exists() else []
    last = json.loads(lines[-1]) if lines else None
    return {
        "step": steps[-1]["step"] if steps else 0,
        "loss": steps[-1]["loss"] if steps else None,
        "checkpoint": newest_step(run_dir),
        "last_ending": last and f"code {last['code']} after step {last['step']} on {last['nodes']}: {last['why']}",
    }


def _places(job: str, run_dir: Path) -> list[Place]:
    """Where the ranks of a running job are: asked on each of its nodes, beside the run."""
    look = [sys.executable, "-m", "sft_dist.launch.where", str(run_dir.absolute())]
    nodes = scheduler.records(job)[0].get("NumNodes", "1")
    each = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]  # srun alone would ask one node
    told = scheduler.ask(["srun", "--overlap", f"--jobid={job}", *each, "--quiet", *look], check=False)
    found = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    return sorted((Place(**{**one, "calls": tuple(one["calls"])}) for one in found), key=lambda place: place.rank)


def _place_as_json(place: Place) -> dict[str, object]:
    return {"rank": place.rank, "host": place.host, "pid": place.pid, "where": str(place)}


def _log_paths(run_dir: Path, attempt: int | None, rank: int | None) -> list[Path]:
    if attempt is None and rank is None:
        whole = run_dir.absolute().parent
        if run_dir.name in _members(whole):
            found = slurm_dir(whole).glob(f"*_{_members(whole).index(run_dir.name)}.out")
        else:
            found = slurm_dir(run_dir).glob("*.out")
        return sorted(found, key=lambda path: path.stat().st_mtime)
    from sft_dist.resilience.run_folder import attempt_dir, last_attempt

    folder = attempt_dir(run_dir, attempt or last_attempt(run_dir))
    return sorted(folder.glob("rank_*.log" if rank is None else f"rank_{rank:05d}.log"))

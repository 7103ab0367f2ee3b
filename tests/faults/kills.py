"""SIGKILL anywhere in a real run, again and again: `python kills.py FOLDER --seed 1 --kills 40 [--cells NAME ...]`.

A cell is one recipe of the matrix {full, LoRA} x {FSDP2, ZeRO-2, ZeRO-3} x {1, 2 ranks} x {accumulation 1, 4} x
{dropout 0, 0.1}. It is trained once untouched and once with a kill in every attempt; the product's launcher restarts
it, and where the launcher itself was killed the same command is given again. Afterwards everything that the run
leaves must be the untouched run's: every loss, gradient norm and learning rate, the evaluations, the bytes of each
checkpoint (weights and moments), the exported weights; and `sft-dist audit` must prove that no example was lost or
repeated.

Half of the kills strike inside a save: at a named point of the commit, or after the k-th shard was made durable. The
others come by a kernel timer at a random moment of a phase. All choices come from the seed and the cell's name; the
line of a cell shows the command that runs it again. Prints one JSON line for each cell and one for the sum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import forked
from killing import kill_me_in
from tiny_run import lines, trajectory, weights, write_recipe

from sft_dist import train
from sft_dist.checkpoint import manager, shards
from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manager import FAIL_POINTS, CheckpointManager
from sft_dist.checkpoint.manifest import RUN_KEY, read_manifest
from sft_dist.resilience.heartbeat import Heart

MATRIX = tuple(
    "-".join(map(str, cell))
    for cell in itertools.product(("full", "lora"), ("fsdp2", "zero2", "zero3"), (1, 2), (1, 4), (0, 0.1))
)
# Every pair of two settings at least once, on as few and as cheap cells as there can be.
QUICK = (
    "full-fsdp2-2-1-0.1", "full-fsdp2-1-4-0", "lora-fsdp2-2-4-0", "lora-fsdp2-1-1-0.1",
    "full-zero2-1-1-0", "lora-zero2-2-4-0.1", "full-zero3-2-4-0.1", "lora-zero3-1-1-0",
)  # fmt: skip
EVERY_STEPS = 2  # between checkpoints
EVERYWHERE = ("before write", "after write")  # all ranks pass these points of the commit, rank 0 alone the others
PHASES = ("build", "evaluate", "data", "train", "train", "train", "save", "save", "finish")
ONCE = ("build", "finish")  # in an attempt
FILE_BYTES = 30_000  # per shard file, so that a save has several
SECONDS = 240


@dataclass(frozen=True, slots=True)
class Kill:
    """`where`: a point of FAIL_POINTS, `shard`, or a phase. `ordinal`: at the how-many-th time in that attempt."""

    where: str
    ordinal: int
    rank: int
    launcher: bool = False  # the launcher dies, and its ranks of it; else the rank
    fraction: float = 0.0  # of the phase's usual duration

    @property
    def in_save(self) -> bool:
        return self.where not in PHASES or self.where == "save"


def choose_kills(source: random.Random, number: int, num_ranks: int) -> list[Kill]:
    """Half at points of a save, half at moments."""
    kills = [_at_point(source, num_ranks) for _ in range((number + 1) // 2)]
    kills += [_at_moment(source, num_ranks) for _ in range(number // 2)]
    source.shuffle(kills)
    return sorted(kills, key=lambda kill: kill.where == "finish")  # an attempt that gets there leaves no steps to kill


def _at_point(source: random.Random, num_ranks: int) -> Kill:
    where = source.choice([*FAIL_POINTS, "shard", "shard"])
    rank = source.randrange(num_ranks) if where in (*EVERYWHERE, "shard") else 0
    ordinal = source.randrange(1, 9 if where == "shard" else 3)
    return Kill(where, ordinal, rank, launcher=source.random() < 0.25)


def _at_moment(source: random.Random, num_ranks: int) -> Kill:
    where = source.choice(PHASES)
    ordinal = 1 if where in ONCE else source.randrange(1, 3)
    return Kill(where, ordinal, source.randrange(num_ranks), fraction=source.random())


def arm(kills: list[Kill], seconds: dict[str, float], rank: int, attempt: int) -> None:
    """Set up the kill of this attempt, if it has one and it is this rank's."""
    shards.FILE_BYTES = FILE_BYTES
    if attempt > len(kills) or kills[attempt - 1].rank != rank:
        return
    kill = kills[attempt - 1]
    count = itertools.count(1)
    if kill.where in FAIL_POINTS:
        train.CheckpointManager = partial(  # type: ignore[misc, assignment]
            CheckpointManager, fail_point=lambda name: name == kill.where and next(count) == kill.ordinal and die(kill)
        )
    elif kill.where == "shard":
        fsync = manager.fsync_path

        def fsync_and_die(path: Path) -> None:
            fsync(path)
            if path.name.startswith("shard-") and next(count) == kill.ordinal:
                die(kill)

        manager.fsync_path = fsync_and_die
    else:
        beat = Heart.beat

        def beat_and_arm(heart: Heart, step: int, phase: str) -> None:
            beat(heart, step, phase)
            if phase == kill.where and next(count) == kill.ordinal:
                kill_me_in(kill.fraction * seconds.get(phase, 0.0))

        Heart.beat = beat_and_arm  # type: ignore[method-assign]


def die(kill: Kill) -> None:
    """SIGKILL to this rank, or to the launcher, which takes its ranks along."""
    os.kill(os.getppid() if kill.launcher else os.getpid(), signal.SIGKILL)
    signal.pause()


def note_beats(path: Path, rank: int, attempt: int) -> None:
    """The untouched run: write down when each phase begins."""
    shards.FILE_BYTES = FILE_BYTES
    beat, file = Heart.beat, path.open("a", buffering=1) if rank == 0 else None

    def beat_and_note(heart: Heart, step: int, phase: str) -> None:
        beat(heart, step, phase)
        if file is not None:
            file.write(f"{phase} {time.monotonic()}\n")

    Heart.beat = beat_and_note  # type: ignore[method-assign]


def phase_seconds(path: Path, ended: float) -> dict[str, float]:
    """Median duration of each phase of the untouched run."""
    beats = [line.split() for line in path.read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for (phase, began), (_, after) in itertools.pairwise([*beats, ["", str(ended)]]):
        found.setdefault(phase, []).append(float(after) - float(began))
    return {phase: median(values) for phase, values in found.items()}


def recipe(folder: Path, name: str, cell: str, num_steps: int, keep: int) -> tuple[Path, int]:
    """(the recipe's file, its number of ranks)."""
    method, strategy, ranks, accumulation, dropout = cell.split("-")
    changes: dict[str, Any] = {
        "parallel": {"strategy": strategy},
        "batch": {"tokens_per_micro_batch": 512, "tokens_per_step": 512 * int(ranks) * int(accumulation)},
        "optim": {"lr": 1e-3, "max_steps": num_steps},
        "checkpoint": {"every_steps": EVERY_STEPS, "keep": keep, "async": True},
        "eval": {"generate": 0, "every_steps": 5},
        "resilience": {"max_restarts": 99},
    }
    if method == "lora":
        changes["tuning"] = {"method": "lora", "rank": 4, "dropout": float(dropout)}
    path = write_recipe(folder, name, **changes)
    if method == "full" and float(dropout):
        written = json.loads(path.read_text())
        written["model"]["config"]["attention_dropout"] = float(dropout)
        path.write_text(json.dumps(written))
    return path, int(ranks)


def run_cell(folder: Path, cell: str, seed: int, number: int) -> dict[str, Any]:
    """Train the cell untouched and with `number` kills; raises AssertionError where they differ."""
    folder.mkdir(parents=True)
    kills = choose_kills(random.Random(f"{seed}:{cell}"), number, int(cell.split("-")[2]))
    num_steps = 2 * EVERY_STEPS * number + 2
    straight, num_ranks = recipe(folder, "straight", cell, num_steps, keep=99)
    beats = folder / "beats.txt"
    code = forked.Forked(straight, num_ranks, folder / "straight.txt", partial(note_beats, beats)).run(SECONDS)
    assert code == 0, (folder / "straight.txt").read_text()
    seconds = phase_seconds(beats, time.monotonic())

    killed, _ = recipe(folder, "killed", cell, num_steps, keep=2)
    log, launches = folder / "killed.txt", 0
    while True:
        launches += 1
        assert launches <= number + 4, log.read_text()
        if forked.Forked(killed, num_ranks, log, partial(arm, kills, seconds)).run(SECONDS) == 0:
            break
    fired = check(folder, number)
    struck = [kill for kill, did in zip(kills, fired, strict=False) if did]
    return {
        "cell": cell,
        "kills": len(struck),
        "in_save": sum(kill.in_save for kill in struck),
        "launcher": sum(kill.launcher for kill in struck),
        "launches": launches,
        "steps": num_steps,
        "struck": [asdict(kill) for kill in struck],
    }


def check(folder: Path, number: int) -> list[bool]:
    """Compare the two runs; returns for each attempt whether its kill struck. No checkpoint may have been found bad."""
    compare(folder)
    attempts = sorted((folder / "killed" / "logs").iterdir())
    logs = "".join(path.read_text() for attempt in attempts for path in attempt.glob("rank_*.log"))
    assert "is bad" not in logs, logs
    return [ended_by_a_kill(path) for path in attempts[:-1]][:number]


def compare(folder: Path) -> None:
    """Everything that FOLDER/killed left against what FOLDER/straight did."""
    straight, killed = folder / "straight", folder / "killed"
    assert trajectory(killed) == trajectory(straight), "the trajectory differs"
    scored = [[(x["step"], x["eval_loss"]) for x in lines(run, "eval")] for run in (straight, killed)]
    assert scored[0] == scored[1], "the evaluations differ"
    assert weights(killed) == weights(straight), "the exported weights differ"
    for path in folders(killed):
        assert state(path) == state(straight / "checkpoints" / path.name), f"{path} differs"
    assert len(folders(killed)) == 2 and not list((killed / "checkpoints").glob(".tmp-*"))
    audited = forked.fork(lambda: forked.command_line(["audit", str(killed)]), folder / "audit.txt").wait()
    assert audited == 0, (folder / "audit.txt").read_text()


def state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds: its position, and of each shard the tensors by name and all bytes of them.

    Not the files' sums: safetensors writes the names in its header in an order that changes from run to run.
    """
    shards = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    sizes = {name: 8 + int.from_bytes(data[:8], "little") for name, data in shards.items()}
    found = {name: (json.loads(data[8 : sizes[name]]), data[sizes[name] :]) for name, data in shards.items()}
    return found | {"meta": {**read_manifest(folder).meta, RUN_KEY: None}}  # drawn for each run


def ended_by_a_kill(attempt: Path) -> bool:
    """A rank's SIGKILL is in the events; the launcher's own leaves no end there."""
    events = [json.loads(line) for line in (attempt / "events.jsonl").read_text().splitlines()]
    ends = [event for event in events if event["event"] == "end"]
    return not ends or -signal.SIGKILL in ends[-1]["returncodes"]


def deal(cells: list[str], number: int) -> dict[str, int]:
    """How many kills each cell gets: a life under FSDP2 costs half of one under ZeRO, so it gets twice as many."""
    turns = [*cells, *(cell for cell in cells if "fsdp2" in cell)]
    dealt = Counter(itertools.islice(itertools.cycle(turns), number))
    return {cell: dealt[cell] for cell in cells if dealt[cell]}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--cells", nargs="*", default=list(QUICK))
    parser.add_argument("--all", action="store_true", help="the whole matrix")
    given = parser.parse_args()
    if any("zero" in cell for cell in given.cells):
        import deepspeed  # noqa: F401  # once, before the forks
    cells = list(MATRIX) if given.all else given.cells
    waiting, seed, done = list(deal(cells, given.kills).items()), given.seed, []
    while waiting:
        cell, number = waiting.pop(0)
        again = f"python tests/faults/kills.py FOLDER --seed {seed} --kills {number} --cells {cell}"
        shutil.rmtree(given.folder / cell, ignore_errors=True)
        started = time.monotonic()
        try:
            done.append(run_cell(given.folder / cell, cell, seed, number))
        except (AssertionError, TimeoutError) as error:
            print(f"{cell}: {error}\nagain: {again}", flush=True)
            return 1
        print(json.dumps(done[-1] | {"seconds": round(time.monotonic() - started, 1), "again": again}), flush=True)
        shutil.rmtree(given.folder / cell)
        missing = given.kills - sum(one["kills"] for one in done)
        if missing > 0 and not waiting:  # a kill may come after the end of what it was meant for
            seed += 1
            waiting = [(cells[seed % len(cells)], missing)]
    print(json.dumps({name: sum(one[name] for one in done) for name in ("kills", "in_save", "launcher", "launches")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

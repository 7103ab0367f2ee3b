"""Random faults for as long as you like: `python soak.py FOLDER --minutes 60 [--seed N]`.

Round after round a run of a random cell of the matrix meets a random mix in its attempts: SIGKILL of a rank or of the
launcher at any moment, each signal in any phase, a rank that sleeps, stops or crashes, a flipped bit, a cut or a lost
file in the newest checkpoint between two launches. Every round ends with the comparison of all bits with the run that
was left alone. The seed is printed, and each round's own seed runs that round again alone (--rounds 1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import forked
import hangs
import kills

from sft_dist.checkpoint.catalog import folders, set_aside
from sft_dist.resilience.heartbeat import Heart

FAULTS = 6  # in a round
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FATES = {**hangs.HANGS, **hangs.CRASHES}
SECONDS = 600


def strike(faults: list[tuple[str, object]], seconds: dict[str, float], rank: int, attempt: int) -> None:
    """Arm the fault of this attempt."""
    if attempt > len(faults):
        kills.arm([], seconds, rank, attempt)
        return
    kind, what = faults[attempt - 1]
    if kind == "kill":
        assert isinstance(what, kills.Kill)
        kills.arm([what], seconds, rank, 1)
        return
    kills.arm([], seconds, rank, attempt)
    step_count = itertools.count(1)
    victim, ordinal, fault = what  # type: ignore[misc]
    if rank != victim:
        return
    beat = Heart.beat

    def beat_and_meet(heart: Heart, step: int, phase: str) -> None:
        beat(heart, step, phase)
        if phase == "train" and next(step_count) == ordinal:
            os.kill(os.getppid(), fault) if kind == "signal" else FATES[fault]()

    Heart.beat = beat_and_meet  # type: ignore[method-assign]


def choose(source: random.Random, num_ranks: int) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for _ in range(FAULTS):
        kind = source.choice(["kill", "kill", "kill", "signal", "fate"])
        if kind == "kill":
            found.append((kind, kills.choose_kills(source, 1, num_ranks)[0]))
        elif kind == "signal":
            found.append((kind, (source.randrange(num_ranks), source.randrange(2, 5), source.choice(SIGNALS))))
        else:
            fates = [name for name in FATES if num_ranks > 1 or name != "in another collective"]
            found.append((kind, (num_ranks - 1, source.randrange(2, 5), source.choice(sorted(fates)))))
    return found


def damage(source: random.Random, run_dir: Path) -> str | None:
    """Spoil the newest checkpoint, sometimes, where an older one is left; what was done."""
    if len(folders(run_dir)) < 2 or source.random() < 0.5:
        return None
    path = source.choice(sorted(folders(run_dir)[-1].iterdir()))
    data = bytearray(path.read_bytes())
    how = source.choice(["flip", "cut", "lose"])
    if how == "flip":
        bit = source.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: source.randrange(len(data))])
    else:
        path.unlink()
    return f"{how} {path.parent.name}/{path.name}"


def run_round(folder: Path, seed: int) -> dict[str, object]:
    source = random.Random(seed)
    cell = source.choice(kills.MATRIX)
    num_steps = 4 * kills.EVERY_STEPS * FAULTS
    faults = choose(source, int(cell.split("-")[2]))
    straight, num_ranks = kills.recipe(folder, "straight", cell, num_steps, keep=99)
    beats = folder / "beats.txt"
    code = forked.Forked(straight, num_ranks, folder / "straight.txt", partial(kills.note_beats, beats)).run(SECONDS)
    assert code == 0, (folder / "straight.txt").read_text()
    seconds = kills.phase_seconds(beats, time.monotonic())
    killed, _ = kills.recipe(folder, "killed", cell, num_steps, keep=2)
    settings, log, damages = ["resilience.hang_seconds=10"], folder / "killed.txt", []
    for launch in itertools.count(1):
        assert launch < 4 * FAULTS, log.read_text()
        code = forked.Forked(killed, num_ranks, log, partial(strike, faults, seconds), settings).run(SECONDS)
        if code == 0:
            break
        damages += [done] if (done := damage(source, folder / "killed")) else []
    bad = len(set_aside(folder / "killed"))
    for path in set_aside(folder / "killed"):
        shutil.rmtree(path)
    kills.compare(folder)
    attempts = len(list((folder / "killed/logs").iterdir()))
    return {
        "seed": seed, "cell": cell, "launches": launch, "attempts": attempts, "damages": damages, "set_aside": bad,
        "faults": [str(fault) for fault in faults],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    given = parser.parse_args()
    import deepspeed  # noqa: F401  # once, before the forks

    print(f"soak: --seed {given.seed}", flush=True)
    deadline, rounds, attempts = time.monotonic() + 60 * given.minutes, 0, 0
    for seed in itertools.count(given.seed):
        if time.monotonic() > deadline or rounds == given.rounds:
            break
        folder = given.folder / f"round-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = run_round(folder, seed)
        print(json.dumps(found), flush=True)
        rounds, attempts = rounds + 1, attempts + int(str(found["attempts"]))
        shutil.rmtree(folder)
    print(f"soak: {rounds} rounds, {attempts} attempts, no differing bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())

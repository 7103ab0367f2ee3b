"""Start a script as N gloo processes that meet through a file, one thread each, and wait for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from line_server import LineServer

ROOT = Path(__file__).resolve().parents[2]
NURSERY = Path(__file__).with_name("nursery.py")
SECONDS = 500
TAIL_CHARACTERS = 2000


def run_ranks(script: Path, world_size: int, folder: Path, arguments: Sequence[str] = ()) -> list[str]:
    """Output of each rank, forked from a process that has imported the libraries. Fails with the output of the
    rank that failed first, as far as the codes tell, and the ends of the others'; leaves no process behind."""
    rendezvous = folder / f"rendezvous-{world_size}"
    outputs = [folder / f"output-{world_size}-{rank}" for rank in range(world_size)]
    ranks = [
        {"environment": environment(rank, world_size, rendezvous), "output": str(output)}
        for rank, output in enumerate(outputs)
    ]
    launch = {"script": str(script), "arguments": list(arguments), "ranks": ranks, "seconds": SECONDS}
    return _checked(
        world_size, _nursery().ask(launch)["codes"], [output.read_text(errors="replace") for output in outputs]
    )


def start_ranks(script: Path, world_size: int, folder: Path, arguments: Sequence[str] = ()) -> list[str]:
    """As `run_ranks`, in processes that begin anew: for what is settled at a process's start, or counts its memory."""
    rendezvous = folder / f"rendezvous-{world_size}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment(rank, world_size, rendezvous),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return _checked(world_size, [process.returncode for process in processes], outputs)


def environment(rank: int, world_size: int, rendezvous: Path) -> dict[str, str]:
    """What a launcher would tell a rank."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "SFT_RENDEZVOUS": f"file://{rendezvous}",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels", ROOT / "tests")),
    }


def _checked(world_size: int, codes: Sequence[int], outputs: list[str]) -> list[str]:
    """`outputs`, where all ranks ended with 0; else the one that most likely failed by itself is told first."""
    if any(codes):
        ranks = sorted(range(world_size), key=lambda rank: (_blamelessness(codes[rank]), rank))
        told = [f"rank {ranks[0]} of {world_size} exited {codes[ranks[0]]}:\n{outputs[ranks[0]]}"]
        told += [
            f"rank {rank} exited {codes[rank]}, its end:\n{outputs[rank][-TAIL_CHARACTERS:]}" for rank in ranks[1:]
        ]
        raise AssertionError("\n".join(told))
    return outputs


def _blamelessness(code: int) -> int:
    """Its own signal, its own code, SIGKILL (as the siblings of a failed rank get it), none."""
    if code < 0:
        return 2 if code == -signal.SIGKILL else 0
    return 1 if code else 3


@cache
def _nursery() -> LineServer:
    """The process that forks ranks: one for all tests of this process."""
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return LineServer(NURSERY, environment(0, 1, Path("unused")) | alone)


def cells(all_cases: Iterable[str], default: Iterable[str]) -> list[object]:
    """Parameters of a test over a matrix: cells that are not in `default` wait in the long suite (`make faults`)."""
    quick = set(default)
    assert quick <= set(all_cases), quick - set(all_cases)
    return [pytest.param(case, marks=() if case in quick else pytest.mark.faults, id=case) for case in all_cases]


def asked_for(request: pytest.FixtureRequest, name: str = "case") -> list[Any]:
    """Which cells the tests of this module will look at in this session: others need not run."""
    mine = (item for item in request.session.items if getattr(item, "module", None) is request.module)
    asked = (item.callspec.params.get(name) for item in mine if hasattr(item, "callspec"))
    return list(dict.fromkeys(case for case in asked if case is not None))

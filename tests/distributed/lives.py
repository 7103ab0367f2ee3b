"""Groups of ranks of any size, one after the other, with torch imported once: `python lives.py FOLDER`.

Each life in FOLDER/lives.json is [number of ranks, [recipe and settings]]: its ranks are forks of this process that
call the worker's `main` as torchrun would have started it. Every rank has to end with 0; what it printed is shown when
it does not. Other scripts give `run_life` another body.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from harness import ROOT

SECONDS = 540
Life = tuple[int, list[str]]


def live(lives: Sequence[Life], folder: Path) -> None:
    """Run all lives in one process of their own; fails with the output of the rank that failed."""
    (folder / "lives.json").write_text(json.dumps(lives))
    run_script(Path(__file__), folder)


def run_script(script: Path, folder: Path, *arguments: str) -> None:
    """`python SCRIPT FOLDER ARGUMENTS` without GPUs; fails with all that it printed."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels", ROOT / "tests")),
    }
    command = [sys.executable, str(script), str(folder), *arguments]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def run_life(name: str, world_size: int, body: Callable[[], int | None], folder: Path, code: int | None = 0) -> str:
    """Fork the ranks and wait for all; when one does not end with `code` the others are killed and this process ends
    with its output; with `code` None the first end of any kind ends all. Returns what rank 0 printed."""
    meeting = Path(tempfile.mkdtemp(dir=folder)) / "rendezvous"
    children = {}
    for rank in range(world_size):
        output = folder / f"{name}-rank-{rank}.txt"
        children[_fork(rank, world_size, body, meeting, output)] = output
    failed: list[Path] = []
    while children:
        pid, status = os.wait()
        output = children.pop(pid)
        if os.waitstatus_to_exitcode(status) != code:
            failed += [output] if code is not None else []
            for other in children:
                os.kill(other, 9)
    if failed:
        sys.exit(f"{name} on {world_size} ranks:\n{failed[0].read_text()}")
    return (folder / f"{name}-rank-0.txt").read_text()


def _fork(rank: int, world_size: int, body: Callable[[], int | None], meeting: Path, output: Path) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        with output.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in numbers.items()}
        os.environ["SFT_RENDEZVOUS"] = f"file://{meeting}"
        code = body() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    from nursery import import_libraries

    import_libraries()
    from sft_dist import worker

    place = Path(sys.argv[1])
    for number, (world_size, words) in enumerate(json.loads((place / "lives.json").read_text())):
        run_life(f"life-{number}", world_size, partial(worker.main, words), place)

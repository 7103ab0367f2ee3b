"""Real runs on any number of ranks, one after the other, with torch imported once: `python lives.py LIVES.json`.

Each life is [number of ranks, [recipe and settings]]: its ranks are forks of this process that call the worker's `main`
as torchrun would have started it. Every rank has to end with 0; what it printed is shown when it does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from harness import ROOT

SECONDS = 300
Life = tuple[int, list[str]]


def live(lives: Sequence[Life], folder: Path) -> None:
    """Run all lives in one process of their own; fails with the output of the rank that failed."""
    listed = folder / "lives.json"
    listed.write_text(json.dumps(lives))
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels")),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(listed)], env=environment, text=True, capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_life(number: int, world_size: int, words: list[str], folder: Path) -> None:
    meeting = Path(tempfile.mkdtemp(dir=folder)) / "rendezvous"
    children = {}
    for rank in range(world_size):
        output = folder / f"life-{number}-rank-{rank}.txt"
        children[_fork(rank, world_size, words, meeting, output)] = output
    failed: list[Path] = []
    while children:
        pid, status = os.wait()
        output = children.pop(pid)
        if status:
            failed.append(output)
            for other in children:
                os.kill(other, 9)
    if failed:
        sys.exit(f"life {number} on {world_size} ranks, {words}:\n{failed[0].read_text()}")


def _fork(rank: int, world_size: int, words: list[str], meeting: Path, output: Path) -> int:
    from sft_dist import train  # before the fork: here it costs seconds once

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
        code = train.main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for number, (world_size, words) in enumerate(json.loads(place.read_text())):
        run_life(number, world_size, words, place.parent)

"""Start a script as N gloo processes that meet through a file, one thread each, and wait for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240


def run_ranks(script: Path, world_size: int, folder: Path, arguments: Sequence[str] = ()) -> list[str]:
    """Output of each rank. Fails with the output of the first rank that did not exit 0; leaves no process behind."""
    rendezvous = folder / f"rendezvous-{world_size}"
    processes = [_start(script, rank, world_size, rendezvous, arguments) for rank in range(world_size)]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {world_size} exited {process.returncode}:\n{output}"
    return outputs


def _start(
    script: Path, rank: int, world_size: int, rendezvous: Path, arguments: Sequence[str]
) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "SFT_RENDEZVOUS": f"file://{rendezvous}",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels", ROOT / "tests")),
    }
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

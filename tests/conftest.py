"""Fixtures of all tests: the shared real data (where there is any) and the command line as users call it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Tests never wait for a model hub, and never believe to be a worker of the launcher that runs them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SFT_NNODES"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets, tokenizers and models beside the checkout; the test is skipped without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"real data is not on this machine ({folder})")
    return folder


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli("config", "check", "r.yaml")`: sft-dist in its own process, in the test's folder unless `cwd`."""

    def run(
        *args: str | Path, cwd: Path | None = None, timeout: float = 240, **env: str
    ) -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
        return subprocess.run(
            [sys.executable, "-m", "sft_dist", *map(str, args)],
            cwd=cwd or tmp_path,
            env=os.environ | {"PYTHONPATH": search} | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run

"""The checkpoints of a run folder as seen from outside: listed and proven, never changed. Imports no torch."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path

from sft_dist.checkpoint.manifest import RUN_KEY, fault, folder_step, read_manifest, step_name
from sft_dist.config.identity import read_fingerprint
from sft_dist.errors import CheckpointError

FOLDER_NAME = "checkpoints"
_SET_ASIDE = re.compile(r"step-\d{8,}\.bad-\d+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed folder. `fault` is None when it is good (or was not asked for)."""

    path: Path
    step: int
    num_bytes: int
    world_size: int
    written: str
    fault: str | None = None


def prove(path: Path) -> str | None:
    """What is wrong with a checkpoint of the run in whose folder it lies; None if it is good. Reads every byte."""
    recorded = read_fingerprint(path.parents[1]) or {}  # one from before runs had names has none
    return fault(path, recorded.get(RUN_KEY))


def folders(run_dir: str | Path) -> list[Path]:
    """Committed checkpoint folders, oldest step first."""
    steps = {path: folder_step(path) for path in (Path(run_dir) / FOLDER_NAME).glob("step-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)


def set_aside(run_dir: str | Path) -> list[Path]:
    """Folders that were found bad and renamed, by name."""
    return sorted(p for p in (Path(run_dir) / FOLDER_NAME).glob("step-*.bad-*") if _SET_ASIDE.fullmatch(p.name))


def open_to_all(run_dir: str | Path) -> Path | None:
    """The first folder or file of the committed state that anyone on the machine may change or replace; None if none.

    The sticky bit keeps others from replacing what is in a folder: enough for the run's, not where a checkpoint may be
    added.
    """
    tops = (Path(run_dir), Path(run_dir) / FOLDER_NAME)
    for path in (*tops, *(inner for folder in folders(run_dir) for inner in (folder, *folder.iterdir()))):
        mode = path.lstat().st_mode
        is_kept = path == tops[0] and mode & stat.S_ISVTX
        if mode & stat.S_IWOTH and not is_kept and not stat.S_ISLNK(mode):
            return path
    return None


def list_checkpoints(run_dir: str | Path, *, proven: bool = False) -> list[Checkpoint]:
    """Every committed checkpoint, oldest first; with `proven` every file is read and compared with its SHA-256.

    Raises CheckpointError when `run_dir` does not exist.
    """
    if not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: no such run folder")
    return [_describe(path, proven) for path in folders(run_dir)]


def find(run_dir: str | Path, step: int | None = None) -> Path:
    """The folder of `step`, else of the newest good one; raises CheckpointError when it is absent or bad."""
    if step is not None:
        path = Path(run_dir) / FOLDER_NAME / step_name(step)
        if not path.is_dir():
            steps = ", ".join(str(folder_step(p)) for p in folders(run_dir)) or "none"
            raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; there are: {steps}")
        if found := prove(path):
            raise CheckpointError(f"{path}: {found}")
        return path
    faults = {}
    for path in reversed(folders(run_dir)):
        if (found := prove(path)) is None:
            return path
        faults[path.name] = found
    told = "; ".join(f"{name}: {text}" for name, text in faults.items())
    raise CheckpointError(f"{run_dir}: " + (f"no good checkpoint ({told})" if faults else "no checkpoint yet"))


def _describe(path: Path, proven: bool) -> Checkpoint:
    step = folder_step(path) or 0
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Checkpoint(path, step, 0, 0, "", str(error).removeprefix(f"{path}/"))
    found = prove(path) if proven else None
    return Checkpoint(path, step, manifest.num_bytes, manifest.world_size, manifest.written, found)

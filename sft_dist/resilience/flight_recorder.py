"""NCCL's own record of the last collectives of each rank, written down when a run hangs on GPUs.

PyTorch keeps it in a ring ("flight recorder") and writes it when a rank's named pipe is written to, by a thread of its
own: so also while the interpreter waits for a kernel that never ends. The files are pickles for PyTorch's analyser
(`python -m torch.distributed.flight_recorder.fr_trace`); we never read them.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

EVENTS = "2000"  # collectives that each rank remembers: some steps of a large model, about 2 MB
DUMP_PREFIX = "nccl_rank_"
_POLL_SECONDS = 0.05


class FlightRecorder:
    """Of the ranks on this machine. Names nothing and makes nothing where there is no NCCL."""

    def __init__(self, attempt_dir: Path) -> None:
        self._dumps = str((attempt_dir / DUMP_PREFIX).absolute())
        # Not in the run folder: some shared file systems have no pipes. A name that nobody can have taken before.
        self._pipes = str(Path(tempfile.gettempdir()) / f"sft-{secrets.token_hex(8)}-")

    @property
    def environment(self) -> dict[str, str]:
        """For the workers, below what the user has set, in the names that PyTorch has from 2.9 on: the older
        TORCH_NCCL_TRACE_BUFFER_SIZE still works, and every rank warns of it at every start."""
        return {
            "TORCH_FR_BUFFER_SIZE": EVENTS,
            "TORCH_FR_DUMP_TEMP_FILE": self._dumps,
            "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": self._pipes,
        }

    def dump(self, ranks: Iterable[int], seconds: float) -> list[Path]:
        """Ask each of `ranks` that has a pipe for its record; the files there are after at most `seconds`."""
        asked = [rank for rank in ranks if _write(Path(f"{self._pipes}{rank}.pipe"))]
        deadline, sizes = time.monotonic() + seconds, [0] * len(asked)
        files = [Path(f"{self._dumps}{rank}") for rank in asked]
        while files and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            before, sizes = sizes, [path.stat().st_size if path.exists() else 0 for path in files]
            if all(sizes) and sizes == before:
                break
        return [path for path in files if path.exists()]

    def close(self) -> None:
        """Remove the pipes."""
        stem = Path(self._pipes)
        for pipe in stem.parent.glob(f"{stem.name}*.pipe"):
            pipe.unlink(missing_ok=True)


def _write(pipe: Path) -> bool:
    """Whether somebody reads there."""
    with suppress(OSError):
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            return os.write(descriptor, b"1") == 1
        finally:
            os.close(descriptor)
    return False

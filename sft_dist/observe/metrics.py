"""metrics.jsonl: one line per step and per evaluation of the kept trajectory, and the optional trackers beside it.

Floats are written by repr, so they read back equal. A resume moves the lines after its step aside.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_dist.durable import fsync_path
from sft_dist.observe.run_files import append_lines, keep_lines, read_lines
from sft_dist.observe.trackers import Trackers
from sft_dist.types import StepMetrics


class MetricsLog:
    """Appends to RUN_DIR/metrics.jsonl, and hands each line to the trackers. One writer: rank 0.

    Lines that a full disk refuses wait in memory, and every later line tries them again; `settle` insists. `fence` is
    called before each line and raises LockedError when the folder has another owner by now.
    """

    def __init__(self, run_dir: Path, trackers: Trackers, fence: Callable[[], None] = lambda: None) -> None:
        self._fence = fence
        self._path, self._waiting = run_dir / "metrics.jsonl", b""
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        fsync_path(run_dir)  # a commit makes no name outside checkpoints/ durable: this file's, nor that folder's own
        self._trackers = trackers

    def step(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        for name in ("tokens_by_source", "loss_tokens_by_source"):
            if values[name] is None:
                del values[name]
        is_update = math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
        if not is_update:  # JSON has no NaN
            values |= {"loss": str(metrics.loss), "grad_norm": str(metrics.grad_norm)}
        self._write({"kind": "step" if is_update else "skipped", **values})

    def evaluation(self, step: int, eval_loss: float, num_loss_tokens: int, **named: Any) -> None:
        self._write({"kind": "eval", "step": step, "eval_loss": eval_loss, "num_loss_tokens": num_loss_tokens, **named})

    def settle(self) -> None:
        """Write what waits; raises OSError."""
        while self._waiting:
            self._waiting = self._waiting[os.write(self._fd, self._waiting) :]

    def sync(self) -> None:
        """Have what is written outlast a power cut; raises OSError."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        self._trackers.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._fence()
        is_first = not self._waiting
        self._waiting += json.dumps(line).encode() + b"\n"
        try:
            self.settle()
        except OSError as error:
            if is_first:
                print(f"sft-dist: warning: {self._path}: cannot be written ({error.strerror})", file=sys.stderr)
        self._trackers.log(line["step"], _numbers(line))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines; an incomplete last line (the writer was killed) is left out."""
    return read_lines(run_dir / "metrics.jsonl")


def roll_back(run_dir: Path, step: int, attempt_dir: Path) -> int:
    """Keep what belongs to steps up to `step`; move later metrics to the attempt's folder. Returns how many moved.

    With `step` 0 everything goes, what was measured before training too: it is measured again.
    """
    rolled = keep_lines(run_dir / "metrics.jsonl", lambda line: 0 < step >= line["step"])
    keep_lines(run_dir / "samples.jsonl", lambda line: 0 < step >= line["step"])
    keep_lines(run_dir / "exact_match.jsonl", lambda line: step > 0 and line["phase"] == "before")
    if rolled:
        append_lines(attempt_dir / "rolled_back.jsonl", rolled)
    return len(rolled)


def rises(losses: list[float], patience: int) -> bool:
    """Early stopping: none of the last `patience` evaluations is better than the best before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def best_step(lines: Iterable[dict[str, Any]]) -> int | None:
    """The step after training started with the lowest finite validation loss."""
    scored = [
        (x["eval_loss"], x["step"])
        for x in lines
        if x["kind"] == "eval" and x["step"] > 0 and math.isfinite(x["eval_loss"])
    ]
    return min(scored)[1] if scored else None


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """`step/loss`, `eval/by_source/NAME` ... -> number."""
    return {
        "/".join(filter(None, (line["kind"], key, name))): number
        for key, value in line.items()
        for name, number in (value.items() if isinstance(value, dict) else [("", value)])
        if isinstance(number, int | float) and key not in ("step", "attempt")
    }

"""One attempt at a run: its folder, console, metrics log, signs of life and stop flag.

Rank 0's console and log write, the others' are silent.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sft_dist.config.loader import dump_recipe
from sft_dist.config.schema import Recipe
from sft_dist.observe.console import Console
from sft_dist.observe.metrics import MetricsLog, read_metrics
from sft_dist.observe.run_files import write_json
from sft_dist.observe.spikes import Spikes
from sft_dist.observe.trackers import Trackers
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.lease import LEASE_VARIABLE, REFRESH_SECONDS, check_ours
from sft_dist.resilience.run_folder import attempt_dir
from sft_dist.resilience.signals import StopFlag
from sft_dist.resilience.time_limit import REASON, TimeLimit
from sft_dist.types import StepMetrics, StepPlan

MAX_LISTED = 20


class Job:
    """Use as a context manager, so that the terminal and the files are given back however the run ends."""

    def __init__(self, run_dir: Path, attempt: int, rank: int) -> None:
        self.run_dir, self.attempt, self.is_main = run_dir, attempt, rank == 0
        relayed = "SFT_RUN_LOCKED" in os.environ  # our own launcher keeps rank 0's output in the log already
        log_file = attempt_dir(run_dir, attempt) / "rank_00000.log" if self.is_main and not relayed else None
        self.console = Console(self.is_main, log_file)
        self._limit = TimeLimit(None, 0.0)
        self.stop = StopFlag([run_dir / "stop"]).install()
        self.log: MetricsLog | None = None
        self._checked = time.monotonic()
        self._seconds: list[float] = []
        self._spikes = Spikes()

    def mind_the_end(self, end: float | None, margin_seconds: float | Literal["auto"]) -> None:
        """Ask for a stop in time when the job ends at `end` (seconds since 1970; None: it does not)."""
        self._limit = TimeLimit(end, margin_seconds)

    def saves_take(self, seconds: float) -> None:
        """How long the slowest save has taken, where the loop does not wait for it and so cannot tell."""
        self._limit.learn("save", seconds)

    def beat(self, step: int, phase: str) -> None:
        """`phase` (one of resilience.heartbeat.PHASES) of `step` begins on this rank."""
        heart().beat(step, phase)
        self._limit.enter(phase)
        if self._limit.is_near:
            self.stop.request(REASON)

    def open_records(
        self, recipe: Recipe, fingerprint: dict[str, Any], report: dict[str, Any], header: list[tuple[str, str]]
    ) -> None:
        """Show the header, write what a new attempt knows, open metrics.jsonl. After a resume has rolled back."""
        if not self.is_main:
            return
        (self.run_dir / "config.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        write_json(self.run_dir / "fingerprint.json", fingerprint)
        self.write_report(report)
        write_json(self.run_dir / "header.json", header)
        self.console.header("sft-dist train", header)
        self._spikes = Spikes(line["loss"] for line in read_metrics(self.run_dir) if line["kind"] == "step")
        self.log = MetricsLog(
            self.run_dir,
            Trackers(self.run_dir, recipe, self.console.say),
            lambda: self.check_lease(REFRESH_SECONDS),  # who was stopped meanwhile may have lost it
        )

    def write_report(self, report: dict[str, Any]) -> None:
        """Write prepare_report.json; what was read of a stream by now is in it."""
        if self.is_main:
            write_json(self.run_dir / "prepare_report.json", report)

    def record(self, metrics: StepMetrics, step: StepPlan, num_steps: int, *, due: bool) -> None:
        """Write one step and move the display; `due` steps get a line where there is no bar, and a loss far above the
        recent ones a warning with its examples."""
        if self.log is None:
            return
        self.log.step(metrics)
        self._seconds = [*self._seconds[-19:], metrics.step_seconds]
        seconds_left = (num_steps - metrics.step) * sum(self._seconds) / len(self._seconds)
        self.console.step(metrics, num_steps, seconds_left, due=due)
        if limit := self._spikes.see(metrics.loss):
            rows = [row for pack in step.packs for row in pack.example_ids]
            more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
            self.console.say(
                f"warning: step {metrics.step}: loss {metrics.loss:.4f} is far above the last (limit {limit:.4f}); "
                f"its examples: {', '.join(map(str, rows[:MAX_LISTED]))}{more}"
            )

    def settle(self) -> None:
        """Have every line of metrics.jsonl on the disk; raises OSError. No checkpoint stands for unwritten steps."""
        if self.log is not None:
            self.log.settle()
            self.log.sync()

    def check_lease(self, every_seconds: float = 0.0) -> None:
        """Raise LockedError when another machine has taken the run folder over since this attempt claimed it; looked at
        where that was not done for so long."""
        if time.monotonic() - self._checked < every_seconds:
            return
        self._checked = time.monotonic()
        if token := os.environ.get(LEASE_VARIABLE):
            check_ours(self.run_dir, token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.restore()
        if self.log is not None:
            self.log.close()
        self.console.__exit__(kind, error, trace)

"""What rank 0 tells the user: a header, plain lines or a progress bar, and a copy of each line in the log."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sft_dist.types import StepMetrics


class Console:
    """Rank 0 speaks; other ranks hold a silent one, so that callers need no branch."""

    def __init__(self, speaks: bool, log_file: Path | None = None) -> None:
        self._rich = RichConsole(file=sys.stdout, highlight=False) if speaks else None
        self._log = log_file.open("a", encoding="utf-8") if log_file else None
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def say(self, text: str) -> None:
        """One plain line."""
        if self._rich:
            self._rich.print(text, markup=False, soft_wrap=True)
        self._keep(text)

    def header(self, title: str, rows: list[tuple[str, str]]) -> None:
        """The facts of the run, two columns."""
        for name, value in rows:
            self._keep(f"{name}: {value}")
        if self._rich and not self._rich.is_terminal:
            for name, value in rows:
                self._rich.print(f"{name:<12} {value}", markup=False, soft_wrap=True)
        elif self._rich:
            self._rich.print(_table(title, rows))

    def start(self, first: int, total: int) -> None:
        """Begin the progress display at step `first` of `total`; a bar only on a terminal."""
        if self._rich and self._rich.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._rich, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("train", total=total, completed=first, note="")

    def step(self, metrics: StepMetrics, num_steps: int, seconds_left: float, *, due: bool) -> None:
        """Move the bar; where there is none, print a line when `due`."""
        note = f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  {metrics.tokens_per_second:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step, note=note)
        elif due:
            self.say(
                f"step {metrics.step}/{num_steps}  {note}  grad norm {metrics.grad_norm:.3f}  "
                f"{_clock(seconds_left)} left"
            )

    def _keep(self, text: str) -> None:
        if self._log:
            print(text, file=self._log, flush=True)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._log:
            self._log.close()


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"

"""What every section shares: where it runs, how it times, the rows it returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """The device, and whether this is a rehearsal with toy sizes (for machines without a GPU)."""

    device: torch.device
    rehearsal: bool

    @property
    def repeats(self) -> int:
        """Rounds of a race: at least five where times mean something."""
        return self.size(5, 1)

    def size(self, real: int, toy: int) -> int:
        return toy if self.rehearsal else real


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the final table. `verdict`: ok, FAIL, info (a measurement), n/a (cannot run here)."""

    section: str
    what: str
    figure: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds as median and minimum; the peak of device memory above what was there before, in GiB (0 on a CPU)."""

    median: float
    least: float
    peak_gib: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms (min {self.least * 1e3:.2f}) {self.peak_gib:.2f} GiB"


def race(contestants: dict[str, Callable[[], object]], place: Place) -> dict[str, Timing | str]:
    """Time all in turn, `place.repeats` rounds after a warm-up. A contestant that raises is out, with its reason."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, float] = dict.fromkeys(contestants, 0.0)
    out: dict[str, str] = {}
    for round_ in range(place.repeats + 1):
        for name, run in contestants.items():
            if name in out:
                continue
            try:
                took, peak = measure(run, place.device)
            except Exception as error:  # a peer that cannot run here is a line of the table, not the end of the check
                out[name] = reason(error)
                continue
            if round_:
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
    timed = {n: Timing(statistics.median(s), min(s), peaks[n]) for n, s in seconds.items() if n not in out}
    return {name: out[name] if name in out else timed[name] for name in contestants}


def measure(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, peak GiB above the start) of one call, finished on the device."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    return took, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0


def timing_row(section: str, what: str, timings: dict[str, Timing | str], ours: str) -> Row:
    """All contestants of one problem; peers with the ratio of medians to ours (above 1: we are faster)."""
    own, cells = timings[ours], []
    for name, timing in timings.items():
        ratio = ""
        if isinstance(timing, Timing) and isinstance(own, Timing) and name != ours:
            ratio = f" = {timing.median / own.median:.2f}x"
        cells.append(f"{name} {timing}{ratio}")
    return Row(section, what, "; ".join(cells), "FAIL" if isinstance(own, str) else "info")


def judged(section: str, what: str, figures: dict[str, float], limits: dict[str, float]) -> Row:
    """A row that fails when any figure is over its limit (or not a number)."""
    good = all(figures[name] <= limit for name, limit in limits.items())
    text = ", ".join(f"{name} {value:.1e} (limit {limits[name]:.0e})" for name, value in figures.items())
    return Row(section, what, text, "ok" if good else "FAIL")


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]

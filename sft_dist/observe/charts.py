"""The pictures of a report: lines of metrics.jsonl and the preparation's histogram in, PNG bytes out.

Figures are objects without pyplot, so drawing leaves no global state behind and works from any thread. Matplotlib is
imported on the first picture.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (10.0, 3.8), (5.0, 2.7)  # inches
DPI = 144
INK, MUTED, GRID = "#1c2024", "#6b7280", "#e5e7eb"
BLUE, ORANGE = "#2563a8", "#c2570c"
MAX_MARKED_RESUMES = 20

Line = dict[str, Any]


def draw_all(lines: Sequence[Line], prepare_report: dict[str, Any] | None) -> dict[str, bytes]:
    """Name -> PNG of every picture that has something to show."""
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]
    pictures: dict[str, bytes] = {}
    if steps or evals:
        pictures["loss"] = draw_losses(steps, evals)
    if steps:
        resumes = _resumes(steps)
        pictures["lr"] = draw_curve(steps, "lr", "learning rate", resumes)
        pictures["grad_norm"] = draw_curve(steps, "grad_norm", "gradient norm before clipping", resumes)
        pictures["throughput"] = draw_curve(steps, "tokens_per_second", "tokens per second", resumes)
    histogram = ((prepare_report or {}).get("splits", {}).get("train") or {}).get("histogram")
    if histogram:
        pictures["lengths"] = draw_histogram(histogram["edges"], histogram["counts"])
    return pictures


def draw_losses(steps: Sequence[Line], evals: Sequence[Line]) -> bytes:
    """Training loss of each step, its running mean, and the validation loss. What is not a number leaves a gap."""
    figure, axes = frame(WIDE, "loss per supervised token")
    numbers, losses = _column(steps, "step"), _column(steps, "loss")
    window = max(1, len(losses) // 40)
    if losses:
        axes.plot(numbers, losses, color=BLUE, alpha=0.35 if window > 1 else 1.0, linewidth=1, label="training")
    if window > 1:
        axes.plot(numbers, running_mean(losses, window), color=BLUE, linewidth=1.8, label=f"mean of {window} steps")
    if evals:
        points = _column(evals, "step"), _column(evals, "eval_loss")
        axes.plot(*points, color=ORANGE, linewidth=1.8, marker="o", markersize=4, label="validation")
    _mark(axes, _resumes(steps))
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return png(figure)


def draw_curve(steps: Sequence[Line], key: str, title: str, resumes: Sequence[int]) -> bytes:
    """One column of the steps."""
    figure, axes = frame(NARROW, title)
    axes.plot(_column(steps, "step"), _column(steps, key), color=BLUE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    _mark(axes, resumes)
    return png(figure)


def draw_histogram(edges: Sequence[int], counts: Sequence[int]) -> bytes:
    """Examples by length."""
    figure, axes = frame(NARROW, "training examples by length in tokens", xlabel="")
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.8)
    return png(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite ones among the last `window` values; NaN where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        finite = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return means


def _resumes(steps: Sequence[Line]) -> list[int]:
    """Steps that began a new attempt."""
    return [after["step"] for before, after in itertools.pairwise(steps) if before["attempt"] != after["attempt"]]


def _column(lines: Sequence[Line], key: str) -> list[float]:
    """Values of `key`; NaN, which is not drawn, for infinity and for None."""
    values = [math.nan if line.get(key) is None else float(line[key]) for line in lines]
    return [value if math.isfinite(value) else math.nan for value in values]


def frame(size: tuple[float, float], title: str, xlabel: str = "step") -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _mark(axes: Axes, resumes: Sequence[int]) -> None:
    """A dotted line where a run was resumed; none when there are so many that they would hide the curve."""
    if 0 < len(resumes) <= MAX_MARKED_RESUMES:
        for number, step in enumerate(resumes):
            axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=":", label="" if number else "resumed")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

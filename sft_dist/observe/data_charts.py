"""The pictures of a data set: a survey's figures in, PNG bytes out.

The pie of tasks has the root verbs inside and their objects outside (Wang et al., 2022, Self-Instruct, figure 2).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft_dist.observe.charts import BLUE, INK, NARROW, frame, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Wedge

_PIE = (6.2, 6.2)  # inches
_MOST_BARS = 12
_SHADES = ("#2563a8", "#c2570c", "#1d7a46", "#7c3f9e", "#a8862a", "#a83232", "#2a8f9e", "#6b7280")


def draw_survey(survey: dict[str, Any]) -> dict[str, bytes]:
    """Name -> PNG of every picture that has something to show. `survey`: `Survey.as_dict()`."""
    pictures = {name: draw_lengths(name, histogram) for name, histogram in survey["lengths"].items()}
    if survey["tasks"]:
        pictures["tasks"] = draw_tasks(survey["tasks"])
    for name in ("scripts", "languages"):
        if survey[name]:
            pictures[name] = draw_bars(name, survey[name])
    return pictures


def draw_lengths(what: str, histogram: dict[str, list[int]]) -> bytes:
    """A histogram without its last bin, which holds all that is longer than the 99th percentile."""
    figure, axes = frame(NARROW, f"{what}, up to the 99th percentile", xlabel="")
    last = 25  # bins are 24, and one more where something is longer
    edges, counts = histogram["edges"][:last], histogram["counts"][: last - 1]
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.8)
    return png(figure)


def draw_bars(title: str, counts: dict[str, int]) -> bytes:
    """The most frequent of `counts` as horizontal bars, on a logarithmic scale: small shares must be seen too."""
    figure, axes = frame(NARROW, f"{title}, rows (logarithmic)", xlabel="")
    shown = list(counts.items())[:_MOST_BARS][::-1]
    axes.barh([str(name) for name, _ in shown], [count for _, count in shown], color=BLUE, alpha=0.8)
    axes.set_xscale("log")
    axes.set_xlim(left=0.7)
    axes.grid(visible=False, axis="y")
    return png(figure)


def draw_tasks(tasks: list[tuple[str, str, int]]) -> bytes:
    """The most frequent tasks: verbs in the inner ring, as wide as their objects in the outer one."""
    objects: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for verb, what, count in tasks:
        objects[verb].append((what, count))
    figure, axes = frame(_PIE, "the most frequent tasks", xlabel="")
    axes.set_axis_off()
    shades = [_SHADES[number % len(_SHADES)] for number in range(len(objects))]
    ring = {"edgecolor": "white", "linewidth": 1.2}
    inner, _ = axes.pie(
        [sum(count for _, count in found) for found in objects.values()],
        radius=0.7,
        colors=shades,
        wedgeprops={**ring, "width": 0.45, "alpha": 0.8},
    )
    outer, _ = axes.pie(
        [count for found in objects.values() for _, count in found],
        radius=1.0,
        colors=[shade for shade, found in zip(shades, objects.values(), strict=True) for _ in found],
        wedgeprops={**ring, "width": 0.3, "alpha": 0.35},
    )
    _write_in(axes, inner, list(objects), radius=0.475, color="white")
    _write_in(axes, outer, [what for found in objects.values() for what, _ in found], radius=0.85, color=INK)
    return png(figure)


def _write_in(axes: Axes, wedges: Sequence[Wedge], names: Sequence[str], radius: float, color: str) -> None:
    """Names in their wedges along the radius, upright on both sides."""
    for wedge, name in zip(wedges, names, strict=True):
        degrees = (wedge.theta1 + wedge.theta2) / 2
        x, y = radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
        turn = degrees - 180 if 90 < degrees < 270 else degrees
        axes.text(
            x, y, name[:14], ha="center", va="center", rotation=turn, rotation_mode="anchor", fontsize=7.5, color=color
        )

"""The learning rate of a step."""

from __future__ import annotations

import math


def lr_at(step: int, peak: float, num_steps: int, schedule: str, warmup_fraction: float) -> float:
    """Learning rate of 1-based `step`: linear warm-up to `peak`, then cosine or linear to zero, or constant."""
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup - 1) / max(1, num_steps - num_warmup)
    return peak * SCHEDULES[schedule](progress)


SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}

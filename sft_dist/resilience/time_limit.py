"""Leave in time: where the end of the job is known, stop while one more step and its checkpoint still fit.

    limit = TimeLimit(end_time("auto", os.environ), margin_seconds=90)
    limit.enter("train")    every phase of the loop, as it begins
    limit.is_near           remaining < 2 x slowest save + 2 x slowest step + slowest evaluation + margin

Nothing has to be sent for that: schedulers are late with their signals (Slurm by half a minute), and some send none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime

from sft_dist.errors import ConfigError

END_VARIABLE = "SLURM_JOB_END_TIME"  # seconds since 1970, set by Slurm 22.05 and later
REASON = "the time limit is near"  # of a stop that this module has asked for
_STEP = ("data", "train")


def end_time(wish: str | float, environ: Mapping[str, str]) -> float | None:
    """When the job ends, in seconds since 1970: `auto` asks the scheduler, `none` and no answer are None.

    Raises ConfigError when the scheduler's answer is no number.
    """
    if wish != "auto":
        return None if wish == "none" else moment(wish)
    told = environ.get(END_VARIABLE, "0")
    if not told.isdigit():
        raise ConfigError(f"{END_VARIABLE}={told}: must be seconds since 1970; set resilience.end_time instead")
    return float(told) or None  # 0: the job has no limit


def moment(text: str | float) -> float:
    """Seconds since 1970 of a number, or of a date and time (local unless it names an offset); raises ValueError."""
    return float(text) if isinstance(text, int | float) else datetime.fromisoformat(text).timestamp()


class TimeLimit:
    """Learns how long steps, saves and evaluations take, and says when the end is near."""

    def __init__(
        self,
        end: float | None,
        margin_seconds: float,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._margin_seconds = clock, margin_seconds
        self._deadline = None if end is None else clock() + end - wall()  # the wall clock may jump later on
        self._slowest = {"step": 0.0, "save": 0.0, "evaluate": 0.0}
        self._began, self._what, self._num_steps = clock(), "", 0

    def enter(self, phase: str) -> None:
        """`phase` of the loop begins, and the one before it has ended."""
        what = "step" if phase in _STEP else phase
        if what == self._what and phase != _STEP[0]:
            return  # a step goes on
        now = self._clock()
        is_first_step = self._what == "step" and self._num_steps == 0  # kernels are compiled in it
        if self._what in self._slowest and not is_first_step:
            self.learn(self._what, now - self._began)
        self._num_steps += self._what == "step"
        self._began, self._what = now, what

    def learn(self, what: str, seconds: float) -> None:
        """A `step`, `save` or `evaluate` has taken so long."""
        self._slowest[what] = max(self._slowest[what], seconds)

    @property
    def is_near(self) -> bool:
        """Whether another step, its evaluation and the save might no longer fit."""
        if self._deadline is None:
            return False
        needed = 2 * self._slowest["save"] + 2 * self._slowest["step"] + self._slowest["evaluate"]
        return self._deadline - self._clock() < needed + self._margin_seconds

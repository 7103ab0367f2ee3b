"""Is the run stuck, and who holds it up? Judged from signs of life alone; nothing is started or ended here.

A run is stuck when no rank has given a sign for longer than its phase may take. One silent rank is no proof (rank 0
alone writes the report), but soon all are: they wait for it in the next collective.

    between steps, in a step     `resilience.hang_seconds`; auto: 10 x the median step, at least 60 s, at most 600 s
    the first step of an attempt at least 30 minutes: kernels are compiled in it
    other phases                 LONGEST_SECONDS, or 10 x the above where that is more

The odd one out is the smallest group of ranks that are in the same step and phase; of equal ones, by their stacks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Literal

from sft_dist.resilience.heartbeat import Beat
from sft_dist.resilience.stacks import Frame

LONGEST_SECONDS = {  # healthy ones must never reach it: tokenising, a download, a long evaluation, a slow disk
    "start": 7200.0,
    "prepare": 7200.0,
    "build": 7200.0,
    "evaluate": 7200.0,
    "save": 1800.0,
    "finish": 7200.0,
}
FIRST_STEP_SECONDS = 1800.0
SHORTEST_SECONDS, LONGEST_STEP_SECONDS, NUM_STEPS = 60.0, 600.0, 10
LONGEST_LOOK_SECONDS = 2.0
_REMEMBERED = 50
_LISTED = 8


def patience_seconds(phase: str, hang_seconds: float | Literal["auto"], step_seconds: Sequence[float]) -> float:
    """How long `phase` may pass without a sign, given the durations of the last steps."""
    if hang_seconds == "auto":
        typical = median(step_seconds) if step_seconds else 0.0
        steady = min(max(NUM_STEPS * typical, SHORTEST_SECONDS), LONGEST_STEP_SECONDS)
    else:
        steady = hang_seconds
    if phase in LONGEST_SECONDS:
        return max(LONGEST_SECONDS[phase], 10 * steady)
    return steady if step_seconds else max(FIRST_STEP_SECONDS, steady)


class Watchdog:
    """Looks at the ranks again and again; remembers when one moved last and how long steps take.

    Its clock adds up looks, and a late look counts LONGEST_LOOK_SECONDS: while the whole job is stopped (a suspended
    Slurm job, a frozen container) the watchdog is too, and that time is nobody's silence.
    """

    def __init__(self, hang_seconds: float | Literal["auto"], now: float) -> None:
        self._hang_seconds = hang_seconds
        self._looked, self._clock, self._moved, self._stepped = now, 0.0, 0.0, 0.0
        self._beats: dict[int, Beat] = {}
        self._num_steps = 0  # finished in this attempt
        self._step_seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def finds_hang(self, beats: Mapping[int, Beat], now: float) -> bool:
        """Take in the running ranks' newest signs at `now` seconds; whether their silence has lasted too long."""
        self._clock += min(now - self._looked, LONGEST_LOOK_SECONDS)
        self._looked = now
        if beats != self._beats:
            self._beats, self._moved = dict(beats), self._clock
            self._learn(max((beat.step - beat.first_step for beat in beats.values()), default=0))
        longest = (patience_seconds(b.phase, self._hang_seconds, self._step_seconds) for b in beats.values())
        return self.silence_seconds > max(longest, default=float("inf"))

    @property
    def silence_seconds(self) -> float:
        """How long no rank has given a sign."""
        return self._clock - self._moved

    def _learn(self, num_steps: int) -> None:
        """Average the time since steps were last seen to finish over those finished since."""
        if num_steps > self._num_steps:
            self._step_seconds.append((self._clock - self._stepped) / (num_steps - self._num_steps))
        if num_steps > self._num_steps or not num_steps:
            self._num_steps, self._stepped = num_steps, self._clock


@dataclass(frozen=True, slots=True)
class Witness:
    """A rank of a stuck run: its last sign, and its main thread's frames, innermost first (none: it did not answer)."""

    rank: int
    beat: Beat
    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        at = f"at {self.frames[0]}" if self.frames else "gave no stack: it is stopped, or stuck in the kernel"
        return f"step {self.beat.step}, {self.beat.phase}, {at}"


def odd_group(witnesses: Sequence[Witness]) -> list[Witness]:
    """The ranks that are elsewhere than the others; empty when all are at the same place.

    Of groups of the same size the one that gave no stack counts as the odd one, then the one that does not wait inside
    torch (who waits there, waits for the others), then the one that is furthest behind.
    """
    for place in (_position, _frames):
        groups = list(_grouped(witnesses, place).values())
        if len(groups) > 1:
            return min(groups, key=lambda g: (len(g), any(w.frames for w in g), all(map(_waits, g)), _behind(g)))
    return []


def accuse(witnesses: Sequence[Witness], silence_seconds: float) -> str:
    """One line for the user: who holds the run up, where it is, and where the others are."""
    odd = odd_group(witnesses)
    others = [w for w in witnesses if w not in odd]
    parts = [f"hang: no sign of life for {silence_seconds:.0f} s"]
    if odd:
        parts.append(f"odd one out is {_ranks(odd)}: {odd[0]}")
    groups = sorted(_grouped(others, lambda w: (_position(w), _frames(w))).values(), key=len, reverse=True)
    parts += [f"{_ranks(group)}: {group[0]}" for group in groups[:2]]
    return "; ".join(parts)


def _position(witness: Witness) -> Hashable:
    return witness.beat.step, witness.beat.phase


def _frames(witness: Witness) -> Hashable:
    return witness.frames


def _waits(witness: Witness) -> bool:
    return bool(witness.frames) and "torch" in PurePath(witness.frames[0].file).parts


def _behind(group: Sequence[Witness]) -> tuple[int, float]:
    return min((w.beat.step, w.beat.seconds) for w in group)


def _grouped(witnesses: Sequence[Witness], key: Callable[[Witness], Hashable]) -> dict[Hashable, list[Witness]]:
    groups: dict[Hashable, list[Witness]] = {}
    for witness in witnesses:
        groups.setdefault(key(witness), []).append(witness)
    return groups


def _ranks(group: Sequence[Witness]) -> str:
    numbers = [str(w.rank) for w in group]
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(numbers[:_LISTED])}{more}"

"""What the nodes of a run tell of themselves, compared: the one that differs from most is the odd one; of two that
differ, the one that is not first. What cannot be blamed on a node (none reaches the first one) is blamed on the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

LARGEST_SKEW_SECONDS = 2.0  # events of several nodes are read side by side; leases and certificates break later
SLOW_GPU = 0.7  # of the median matrix product of all GPUs
SLOW_LINK = 0.4  # of the median link


@dataclass(frozen=True, slots=True)
class Facts:
    """What one node knows of itself. `same` must be equal on all nodes; `faults` are plainly wrong."""

    node: int
    name: str
    same: dict[str, str]
    faults: list[str] = field(default_factory=list)
    clock_seconds: float = 0.0  # ahead of the file server's
    gpu_teraflops: list[float] = field(default_factory=list)  # of each GPU, in a matrix product
    unreachable: str | None = None  # why the first node cannot be reached, or cannot listen
    failed_sum: str | None = None  # what went wrong with the all-reduce
    failed_link: str | None = None  # what went wrong between this node and another one
    gigabytes_per_second: float | None = None  # of the all-reduce; None: it did not come about
    link_gigabytes_per_second: float | None = None  # each way, with the best of a few partners

    @property
    def has_measured(self) -> bool:
        """Whether this node came as far as the tests of the network's speed."""
        return self.failed_sum is not None or self.gigabytes_per_second is not None


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something wrong with a node, in words."""

    name: str
    what: str


def compare(told: Sequence[Facts | None], names: Sequence[str]) -> list[Complaint]:
    """What is wrong, node by node. `told[i]` is None where node i said nothing."""
    present = [facts for facts in told if facts is not None]
    found = [Complaint(name, "said nothing: it did not start, or does not see the run folder")
             for name, facts in zip(names, told, strict=True) if facts is None]  # fmt: skip
    found += [Complaint(facts.name, fault) for facts in present for fault in facts.faults]
    for key in sorted({key for facts in present for key in facts.same}):
        found += _odd(key, [(facts.name, facts.same.get(key, "absent")) for facts in present])
    found += _odd_clocks(present) + _slow_gpus(present) + _slow_links(present) + _unreachable(present, names)
    found += _failed_on(present, "all-reduce", [facts.failed_sum for facts in present], is_explained=bool(found))
    if found:  # a node that dies or is bad takes the links of its partners with it
        return found
    return _failed_on(present, "its link to another node", [facts.failed_link for facts in present])


def _unreachable(present: Sequence[Facts], names: Sequence[str]) -> list[Complaint]:
    """When no other node of several reaches the first one, all for the same reason, it is the first that is bad."""
    lost = [Complaint(facts.name, facts.unreachable) for facts in present if facts.unreachable]
    reasons = {complaint.what.partition(":")[0] for complaint in lost}
    if len(lost) > 1 and len(reasons) == 1 and {c.name for c in lost} == set(names[1:]):
        return [Complaint(names[0], f"no other node reaches it: {lost[0].what}")]
    return lost


def _failed_on(
    present: Sequence[Facts], test: str, failures: Sequence[str | None], *, is_explained: bool = False
) -> list[Complaint]:
    """A test that fails on some nodes only is theirs. One that fails on all follows from what else was found; where
    nothing was, the last node answers for it."""
    failed = [
        Complaint(facts.name, f"{test}: {failure}") for facts, failure in zip(present, failures, strict=True) if failure
    ]
    if len(failed) < len(present):
        return failed
    return [] if is_explained else failed[-1:]


def _odd(key: str, values: Sequence[tuple[str, str]]) -> list[Complaint]:
    """The nodes whose value is not the most frequent one; the first node's, of equally frequent ones."""
    counts = Counter(value for _, value in values)
    right = max(counts, key=lambda value: (counts[value], value == values[0][1]))
    return [Complaint(name, f"{key} is {value}, on the others {right}") for name, value in values if value != right]


def _odd_clocks(present: Sequence[Facts]) -> list[Complaint]:
    middle = _median([facts.clock_seconds for facts in present])
    return [
        Complaint(facts.name, f"clock is {facts.clock_seconds - middle:+.1f} s off: start a time service there")
        for facts in present
        if abs(facts.clock_seconds - middle) > LARGEST_SKEW_SECONDS
    ]


def _slow_gpus(present: Sequence[Facts]) -> list[Complaint]:
    middle = _median([rate for facts in present for rate in facts.gpu_teraflops])
    return [
        Complaint(facts.name, f"GPU {index} does {rate:.0f} teraflops, the others {middle:.0f}: its clock is held down")
        for facts in present
        for index, rate in enumerate(facts.gpu_teraflops)
        if rate < SLOW_GPU * middle
    ]


def _slow_links(present: Sequence[Facts]) -> list[Complaint]:
    rates = {facts.name: facts.link_gigabytes_per_second for facts in present if facts.link_gigabytes_per_second}
    middle = _median(list(rates.values()))
    return [
        Complaint(name, f"its link does {1000 * rate:,.1f} MB/s, others {1000 * middle:,.1f}: look at cable and port")
        for name, rate in rates.items()
        if rate < SLOW_LINK * middle
    ]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


def to_leave_out(complaints: Sequence[Complaint], names: Sequence[str]) -> list[str]:
    """The bad nodes; none where all of several are: that is no node's fault, and others would be no better."""
    bad = list(dict.fromkeys(complaint.name for complaint in complaints))
    return [] if len(bad) == len(names) > 1 else bad

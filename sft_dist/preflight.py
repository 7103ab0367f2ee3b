"""Can these nodes run this together? Asked on every node before ranks start; a bad node is named.

    python -m sft_dist.preflight RECIPE.yaml [key=value ...]    one process on each node, as launch/worker.sh starts it

    each node    facts -> RUN_DIR/logs/preflight-WORD/facts_00000.json    versions, files, disk, GPUs, clock
                 reach the first node by name and port               -> reached_00000.json
                 where all do: all-reduce and links, sums and speeds -> node_00000.json
    first node   compare(all of them) -> complaints, each with a node -> report.json, bad_nodes, in the same folder
    each node    exits 0, or 77 when there are complaints

A node that differs from most is the odd one; of two that differ, the one that is not first. What cannot be blamed on a
node (none reaches the first one) is blamed on the first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_dist.config.loader import load_recipe
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.doctor import BLOCKED, folder
from sft_dist.errors import EXIT_DONE, EXIT_HARDWARE, ConfigError
from sft_dist.estimate.compare import checkpoint_size
from sft_dist.estimate.hardware import GIB
from sft_dist.gpu_health import gpu_faults, gpu_rates, gpus
from sft_dist.launch.nodes import Nodes, read_nodes
from sft_dist.node_network import MEASURE_SECONDS, REACH_SECONDS, REDUCE_SECONDS, measure, reach

REPORT, BAD_NODES = "report.json", "bad_nodes"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "deepspeed")
FACTS_SECONDS = 60.0  # for every node to have told its facts: torch is imported before, from a cold disk
LARGEST_SKEW_SECONDS = 2.0  # events of several nodes are read side by side; leases and certificates break later
SLOW_GPU = 0.7  # of the median matrix product of all GPUs
SLOW_LINK = 0.4  # of the median link
_POLL_SECONDS = 0.05


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


def gather(node: int, name: str, recipe: Recipe, meeting: Path) -> Facts:
    """This node's facts, but for the network; `name` is what the scheduler or the host file calls it."""
    cards = gpus()
    kinds = Counter(f"{card['name']} {card['memory']} MiB {card['max_clock']} MHz" for card in cards)
    listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "none"
    same = {"python": platform.python_version(), "sft_dist": code_digest(), "GPUs": listed}
    same |= {name: _version(name) for name in LIBRARIES}
    same |= {f"view of {path}": look_of(Path(path)) for path in _inputs(recipe)}
    findings = [folder(f"run.dir on {socket.gethostname()}", meeting)]
    faults = [f"{finding.found}: {finding.remedy}" for finding in findings if finding.state == BLOCKED]
    faults += space_faults(recipe, shutil.disk_usage(meeting).free)
    faults += [fault for card in cards for fault in gpu_faults(card)]
    return Facts(node, name, same, faults, clock_ahead(meeting / f"clock_{node:05d}"))


def space_faults(recipe: Recipe, free_bytes: int) -> list[str]:
    """Whether a checkpoint fits where run.dir is, as far as its size can be told without the model."""
    try:
        needed = checkpoint_size(recipe)
    except ConfigError:  # an architecture that only its own code knows
        return []
    if free_bytes >= needed:
        return []
    room = f"{free_bytes / GIB:.1f} GiB free, a checkpoint takes {needed / GIB:.1f} GiB"
    return [f"run.dir={recipe.run.dir}: {room}: make room or move run.dir"]


def code_digest() -> str:
    """Twelve hex digits over every source file of the package."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _inputs(recipe: Recipe) -> list[str]:
    """Paths on disk that every node must see alike."""
    named = [recipe.model.path, recipe.model.tokenizer, *(source.path for source in recipe.data.sources)]
    return [path for path in named if path and Path(path).exists()]


def look_of(path: Path) -> str:
    """Size of a file, or number and size of the files of a folder."""
    if not path.exists():
        return "absent"
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files)} bytes"


def clock_ahead(path: Path) -> float:
    """Seconds that this node's clock is ahead of the one that stamps files, the same for all nodes."""
    path.write_text("")
    return time.time() - path.stat().st_mtime


def check_nodes(recipe: Recipe, nodes: Nodes, names: Sequence[str], say: Callable[[str], None]) -> int:
    """This node's part, and on the first one the verdict, which all leave with."""
    started = time.monotonic()
    meeting = folder_of(Path(recipe.run.dir), nodes.meeting)
    meeting.mkdir(parents=True, exist_ok=True)
    facts = gather(nodes.index, names[nodes.index], recipe, meeting)
    if nodes.are_several:
        facts = explore_network(facts, nodes, meeting)
    facts = replace(facts, gpu_teraflops=gpu_rates())
    _tell(meeting, facts, "node")
    if nodes.index > 0:
        return _await_verdict(meeting)
    told = collect(meeting, nodes.count, "node", MEASURE_SECONDS if facts.has_measured else REDUCE_SECONDS)
    complaints = compare(told, names)
    rate = facts.gigabytes_per_second
    speed = "" if rate is None else f", all-reduce {1000 * rate:,.0f} MB/s"
    seconds = time.monotonic() - started
    for complaint in complaints:
        say(f"sft-dist: preflight: node {complaint.name}: {complaint.what}")
    say(f"sft-dist: preflight: {nodes.count} nodes, {len(complaints)} complaints{speed}, {seconds:.1f} s")
    report = {"nodes": [asdict(one) if one else None for one in told], "complaints": [asdict(c) for c in complaints]}
    (meeting / BAD_NODES).write_text("".join(f"{name}\n" for name in to_leave_out(complaints, names)))
    _put(meeting / REPORT, json.dumps(report, indent=2))
    return EXIT_HARDWARE if complaints else EXIT_DONE


def explore_network(facts: Facts, nodes: Nodes, meeting: Path) -> Facts:
    """`facts` with what the network does, as far as every node has come: nobody waits for one that will not join in."""
    import torch.distributed  # noqa: F401  # so that nobody waits at the reduction for another's slow disk

    _tell(meeting, facts, "facts")
    if None in collect(meeting, nodes.count, "facts", FACTS_SECONDS):
        return facts
    facts = replace(facts, unreachable=reach(nodes))
    _tell(meeting, facts, "reached")
    reached = collect(meeting, nodes.count, "reached", 2 * REACH_SECONDS)
    if not all(one is not None and one.unreachable is None for one in reached):
        return facts
    found = measure(nodes)
    return replace(
        facts,
        failed_sum=found.fault,
        failed_link=found.link_fault,
        gigabytes_per_second=found.all_reduce,
        link_gigabytes_per_second=found.link,
    )


def _await_verdict(meeting: Path) -> int:
    """What the first node has found; 77 when it says nothing."""
    deadline = time.monotonic() + MEASURE_SECONDS + REDUCE_SECONDS
    while not (meeting / REPORT).exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    is_fine = (meeting / REPORT).exists() and not json.loads((meeting / REPORT).read_text())["complaints"]
    return EXIT_DONE if is_fine else EXIT_HARDWARE


def to_leave_out(complaints: Sequence[Complaint], names: Sequence[str]) -> list[str]:
    """The bad nodes; none where all of several are: that is no node's fault, and others would be no better."""
    bad = list(dict.fromkeys(complaint.name for complaint in complaints))
    return [] if len(bad) == len(names) > 1 else bad


def folder_of(run_dir: Path, meeting: str) -> Path:
    """Where the nodes of one launch tell each other."""
    return run_dir / "logs" / f"preflight-{meeting or 'alone'}"


def _tell(meeting: Path, facts: Facts, kind: str) -> None:
    _put(meeting / f"{kind}_{facts.node:05d}.json", json.dumps(asdict(facts)))


def _put(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def collect(meeting: Path, count: int, kind: str, seconds: float) -> list[Facts | None]:
    """What every node has told, waiting for it as long as `seconds`."""
    deadline = time.monotonic() + seconds
    paths = [meeting / f"{kind}_{node:05d}.json" for node in range(count)]
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return [Facts(**json.loads(path.read_text())) if path.exists() else None for path in paths]


def names_of(nodes: Nodes, environ: Mapping[str, Any]) -> list[str]:
    """The nodes' names in order of rank, as the scheduler or launch/ssh.sh gave them."""
    names = str(environ.get("SFT_NODE_NAMES", "")).split()
    return names if len(names) == nodes.count else [f"node {index}" for index in range(nodes.count)]


def main(argv: Sequence[str] | None = None) -> int:
    """The recipe, as `sft-dist train` reads it."""
    recipe = load_recipe(*split_arguments(sys.argv[1:] if argv is None else argv))
    nodes = read_nodes(os.environ)
    names = names_of(nodes, os.environ) if nodes.are_several else [socket.gethostname()]

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        return check_nodes(recipe, nodes, names, say)
    except OSError as error:
        say(f"sft-dist: preflight: node {names[nodes.index]}: run.dir={recipe.run.dir}: {error.strerror or error}")
        if nodes.index > 0:  # to leave now would end the first node before it can say who was silent
            time.sleep(FACTS_SECONDS + REDUCE_SECONDS)
        return EXIT_HARDWARE


if __name__ == "__main__":
    from sft_dist.resilience.ending import run_and_end

    run_and_end(main)

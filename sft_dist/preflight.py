"""Can these nodes run this together? Asked on every node before ranks start; a bad node is named.

python -m sft_dist.preflight RECIPE.yaml [key=value ...]    one process on each node, as launch/worker.sh starts it

each node    facts -> RUN_DIR/logs/preflight-WORD/facts_00000.json    versions, files, disk, GPUs, clock
             reach the first node by name and port               -> reached_00000.json
             where all do: all-reduce and links, sums and speeds -> node_00000.json
first node   node_facts.compare(all of them) -> complaints, each with a node -> report.json, bad_nodes, beside them
each node    exits 0, or 77 when there are complaints
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
from dataclasses import asdict, replace
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
from sft_dist.node_facts import Facts, compare, to_leave_out
from sft_dist.node_network import MEASURE_SECONDS, REACH_SECONDS, REDUCE_SECONDS, measure, reach

REPORT, BAD_NODES = "report.json", "bad_nodes"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "deepspeed")
FACTS_SECONDS = 60.0  # for every node to have told its facts: torch is imported before, from a cold disk
_POLL_SECONDS = 0.05


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

"""Can these nodes run this together? Asked on every node before ranks start; a bad node is named.

    python -m sft_dist.preflight RECIPE.yaml [key=value ...]    one process on each node, as launch/worker.sh starts it

    each node    facts -> RUN_DIR/logs/preflight-WORD/node_00000.json     versions, files, disk, GPUs, clock
                 reach the first node by name and port; all-reduce: right sums, and how fast
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
import subprocess
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
from sft_dist.errors import EXIT_DONE, EXIT_HARDWARE
from sft_dist.launch.nodes import Nodes, read_nodes

REPORT, BAD_NODES = "report.json", "bad_nodes"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "deepspeed")
FACTS_SECONDS = 60.0  # for every node to have told its facts: torch is imported before, from a cold disk
REACH_SECONDS = 8.0
REDUCE_SECONDS = 20.0  # for one all-reduce, the meeting of the ranks included
LARGEST_SKEW_SECONDS = 2.0  # events of several nodes are read side by side; leases and certificates break later
SLOW_FRACTION = 0.7  # of the median matrix product of all GPUs
REDUCE_FLOATS = {"cuda": 1 << 24, "cpu": 1 << 18}  # 64 MiB, 1 MiB: enough to fill the link of either
_POLL_SECONDS = 0.05
_GPU_FIELDS = {  # ours -> nvidia-smi's
    "index": "index",
    "name": "name",
    "memory": "memory.total",
    "max_clock": "clocks.max.sm",
    "ecc": "ecc.errors.uncorrected.volatile.total",
    "hw_slowdown": "clocks_throttle_reasons.hw_slowdown",
    "too_hot": "clocks_throttle_reasons.sw_thermal_slowdown",
}
MATRIX, PRODUCTS = 4096, 20  # of bfloat16, for the speed of a GPU


@dataclass(frozen=True, slots=True)
class Facts:
    """What one node knows of itself. `same` must be equal on all nodes; `faults` are plainly wrong."""

    node: int
    name: str
    same: dict[str, str]
    faults: list[str] = field(default_factory=list)
    clock_seconds: float = 0.0  # ahead of the file server's
    gpu_teraflops: list[float] = field(default_factory=list)  # of each GPU, in a matrix product
    gigabytes_per_second: float | None = None  # of the all-reduce; None: it did not come about


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something wrong with a node, in words."""

    name: str
    what: str


def compare(told: Sequence[Facts | None], names: Sequence[str]) -> list[Complaint]:
    """What is wrong, node by node. `told[i]` is None where node i said nothing."""
    present = [facts for facts in told if facts is not None]
    silent = [Complaint(name, "said nothing: it did not start, or does not see the run folder")
              for name, facts in zip(names, told, strict=True) if facts is None]  # fmt: skip
    found = silent + [Complaint(facts.name, fault) for facts in present for fault in facts.faults]
    for key in sorted({key for facts in present for key in facts.same}):
        found += _odd(key, [(facts.name, facts.same.get(key, "absent")) for facts in present])
    return found + _odd_clocks(present) + _slow_gpus(present)


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
        if rate < SLOW_FRACTION * middle
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
    faults += [fault for card in cards for fault in gpu_faults(card)]
    return Facts(
        node,
        name,
        same,
        faults,
        clock_ahead(meeting / f"clock_{node:05d}"),
    )


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


def gpus() -> list[dict[str, str]]:
    """What the driver says of each GPU; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS.values())}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]


def gpu_faults(card: Mapping[str, str]) -> list[str]:
    """What the driver itself says is wrong with a GPU."""
    name, found = f"GPU {card['index']} ({card['name']})", []
    if card["ecc"].isdecimal() and int(card["ecc"]):
        found.append(f"{name}: {card['ecc']} uncorrected memory errors: reset or replace it")
    if card["hw_slowdown"] == "Active":
        found.append(f"{name}: slowed down by its hardware: look at power and cooling")
    if card["too_hot"] == "Active":
        found.append(f"{name}: slowed down because it is hot: look at cooling")
    return found


def gpu_rates() -> list[float]:
    """Teraflops of each GPU in a bfloat16 matrix product, after one to warm up; empty without one."""
    import torch

    rates = []
    for index in range(torch.cuda.device_count()):
        left = torch.ones((MATRIX, MATRIX), dtype=torch.bfloat16, device=f"cuda:{index}")
        product = left @ left
        torch.cuda.synchronize(index)
        started = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(left, left, out=product)
        torch.cuda.synchronize(index)
        rates.append(2 * MATRIX**3 * PRODUCTS / (time.perf_counter() - started) / 1e12)
    return rates


def reach(nodes: Nodes) -> str | None:
    """Why the first node cannot be reached by its name and port; None when it can. The first node listens meanwhile."""
    deadline = time.monotonic() + REACH_SECONDS
    if nodes.index == 0:
        return _listen(nodes, deadline)
    try:
        socket.getaddrinfo(nodes.address, nodes.port)
    except OSError as error:
        return f"does not know the name {nodes.address}: {error.strerror or error}"
    why = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((nodes.address, nodes.port), timeout=1.0):
                return None
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(_POLL_SECONDS)
    return f"cannot reach {nodes.address} port {nodes.port}: {why}: look at cables, firewalls and cluster.fabric"


def _listen(nodes: Nodes, deadline: float) -> str | None:
    """Until every other node has called, or time is up (they will tell why)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", nodes.port))
        except OSError as error:
            return f"cannot listen on port {nodes.port}: {error.strerror}: set MASTER_PORT to a free one"
        server.listen(nodes.count)
        server.settimeout(0.1)
        called: set[str] = set()
        while len(called) < nodes.count - 1 and time.monotonic() < deadline:
            try:
                connection, address = server.accept()
            except TimeoutError:
                continue
            connection.close()
            called.add(address[0])
    return None


def reduce_rate(nodes: Nodes) -> tuple[float | None, str | None]:
    """(GB/s of an all-reduce over all nodes, None) or (None, what went wrong). On GPU 0 where there are any."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{nodes.address}:{nodes.port}",
            rank=nodes.index,
            world_size=nodes.count,
            timeout=timedelta(seconds=REDUCE_SECONDS),
        )
        count = REDUCE_FLOATS[device.type]
        values = torch.full((count,), float(nodes.index + 1), device=device)
        dist.all_reduce(values)  # the first one builds the connections
        expected = nodes.count * (nodes.count + 1) / 2
        wrong = int((values != expected).sum())
        if wrong:
            return None, f"all-reduce: {wrong} of {count} sums are wrong: suspect memory or network hardware"
        started = time.perf_counter()
        for _ in range(3):
            dist.all_reduce(values.fill_(1.0))
        float(values[0])  # waits for the device
        return 3 * 4 * count / (time.perf_counter() - started) / 1e9, None
    except Exception as error:  # the libraries below raise what they like
        return None, f"all-reduce: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"


def check_nodes(recipe: Recipe, nodes: Nodes, names: Sequence[str], say: Callable[[str], None]) -> int:
    """This node's part, and on the first one the verdict, which all leave with."""
    started = time.monotonic()
    meeting = folder_of(Path(recipe.run.dir), nodes.meeting)
    meeting.mkdir(parents=True, exist_ok=True)
    facts = gather(nodes.index, names[nodes.index], recipe, meeting)
    fault, rate = None, None
    if nodes.are_several:
        import torch.distributed  # noqa: F401  # so that nobody waits at the reduction for another's slow disk

        _tell(meeting, facts, "facts")
        if None not in collect(meeting, nodes.count, "facts", FACTS_SECONDS):
            fault = reach(nodes)
            rate, fault = reduce_rate(nodes) if fault is None else (None, fault)
    facts = replace(
        facts, gpu_teraflops=gpu_rates(), faults=[*facts.faults, *([fault] if fault else [])], gigabytes_per_second=rate
    )
    _tell(meeting, facts, "node")
    if nodes.index > 0:
        return _await_verdict(meeting)
    told = collect(meeting, nodes.count, "node", REDUCE_SECONDS)
    complaints = settle(compare(told, names), names)
    speed = "" if rate is None else f", all-reduce {1000 * rate:,.0f} MB/s"
    seconds = time.monotonic() - started
    for complaint in complaints:
        say(f"sft-dist: preflight: node {complaint.name}: {complaint.what}")
    say(f"sft-dist: preflight: {nodes.count} nodes, {len(complaints)} complaints{speed}, {seconds:.1f} s")
    report = {"nodes": [asdict(one) if one else None for one in told], "complaints": [asdict(c) for c in complaints]}
    (meeting / BAD_NODES).write_text("".join(f"{name}\n" for name in dict.fromkeys(c.name for c in complaints)))
    _put(meeting / REPORT, json.dumps(report, indent=2))
    return EXIT_HARDWARE if complaints else EXIT_DONE


def _await_verdict(meeting: Path) -> int:
    """What the first node has found; 77 when it says nothing."""
    deadline = time.monotonic() + 2 * REDUCE_SECONDS
    while not (meeting / REPORT).exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    is_fine = (meeting / REPORT).exists() and not (meeting / BAD_NODES).read_text()
    return EXIT_DONE if is_fine else EXIT_HARDWARE


def settle(complaints: list[Complaint], names: Sequence[str]) -> list[Complaint]:
    """A failed all-reduce is everybody's complaint: it counts only where nothing else explains it, and then against the
    last node alone; and when no other node reaches the first one, it is the first that is bad."""
    first = names[0]
    others = [name for name in names if name != first]
    lost = [c for c in complaints if c.what.startswith("cannot reach")]
    plain = [c for c in complaints if not c.what.startswith(("all-reduce", "cannot reach"))]
    if len(lost) > 1 and {c.name for c in lost} == set(others):
        lost = [Complaint(first, f"no other node reaches it: {lost[0].what}")]
    if plain or lost:
        return plain + lost
    failed = [c for c in complaints if c.what.startswith("all-reduce")]
    return failed[-1:]


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
    return check_nodes(recipe, nodes, names, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    from sft_dist.resilience.ending import run_and_end

    run_and_end(main)

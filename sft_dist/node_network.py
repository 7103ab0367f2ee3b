"""Can these nodes talk, do their sums come out right, and how fast is each one's link? Every function is called on all.

reach      the first node's name is known and its port answers
measure    an all-reduce over all nodes: right sums, and its speed
           each node with at most three others, in turn, both ways at once: the best of them is its link's speed,
           so a slow one lowers its own figure and not that of the nodes it was paired with
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from sft_dist.launch.nodes import Nodes

REACH_SECONDS = 8.0
REDUCE_SECONDS = 20.0  # for one all-reduce, the meeting of the ranks included
REDUCE_FLOATS = {"cuda": 1 << 24, "cpu": 1 << 18}  # 64 MiB, 1 MiB: enough to fill the link of either
PAIRINGS = 3
MEASURE_SECONDS = (1 + PAIRINGS) * REDUCE_SECONDS  # a node whose partners hang waits for each of them
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes per second / 1e9, and what went wrong; a speed is None where its test did not come about."""

    all_reduce: float | None = None
    link: float | None = None
    fault: str | None = None  # of the all-reduce
    link_fault: str | None = None  # of a test of two nodes: either's, or neither's


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


def measure(nodes: Nodes) -> Measured:
    """The speeds between the nodes, on GPU 0 where there are any."""
    import torch
    import torch.distributed as dist

    from sft_dist.parallel.rendezvous import meet

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    patience = timedelta(seconds=REDUCE_SECONDS)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meet(f"tcp://{nodes.address}:{nodes.port}", nodes.index, nodes.count, patience),
            rank=nodes.index,
            world_size=nodes.count,
            timeout=patience,
        )
        values = torch.full((REDUCE_FLOATS[device.type],), float(nodes.index + 1), device=device)
        dist.all_reduce(values)  # the first one builds the connections
        wrong = int((values != nodes.count * (nodes.count + 1) / 2).sum())
        fault = f"{wrong} of {len(values)} sums are wrong: suspect memory or network hardware" if wrong else None
        seconds = timed(lambda: dist.all_reduce(values.fill_(1.0)), values, times=3)  # the others wait: no way out
        found = Measured(4 * len(values) / seconds / 1e9, fault=fault)
    except Exception as error:  # the libraries below raise what they like
        return Measured(fault=_first_line(error))
    try:
        return replace(found, link=link_rate(nodes, values))
    except Exception as error:
        return replace(found, link_fault=_first_line(error))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def link_rate(nodes: Nodes, values: Any) -> float:
    """GB/s of half of `values` each way between this node and the partner with whom it was fastest."""
    import torch.distributed as dist

    outgoing, incoming = values.chunk(2)
    best = 0.0
    for partner in pairings(nodes.index, nodes.count):

        def exchange(count: int, partner: int = partner) -> None:
            sent, got = outgoing[:count], incoming[:count]
            ways = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, got, partner)]
            for request in dist.batch_isend_irecv(ways):
                request.wait()

        def deliver() -> None:
            exchange(len(outgoing))
            exchange(1)  # a send is done when it lies in a buffer; this comes once the partner has got it

        exchange(1)  # builds the connection, and both begin together
        best = max(best, 4 * len(outgoing) / timed(deliver, incoming) / 1e9)
    return best


def pairings(node: int, count: int) -> Iterator[int]:
    """The partners of `node` in the first PAIRINGS rounds in which all play all; it may rest in one of them."""
    even = count + count % 2
    for round_ in range(min(PAIRINGS, even - 1)):
        last = (round_ * even // 2) % (even - 1)  # who meets the one that does not move round the table
        partner = last if node == even - 1 else even - 1 if node == last else (round_ - node) % (even - 1)
        if partner < count:
            yield partner


def timed(action: Callable[[], object], values: Any, times: int = 1) -> float:
    """Seconds of one of `times` calls; waits for the device of `values`."""
    started = time.perf_counter()
    for _ in range(times):
        action()
    float(values[0])
    return (time.perf_counter() - started) / times

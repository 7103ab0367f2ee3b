"""How long does training stand still for a checkpoint, beside `torch.distributed.checkpoint`?

    python benchmarks/async_save.py [--mib 512] [--repeats 7] [--places /dev/shm /tmp] [--out FILE]

Two gloo ranks hold an FSDP2-like state (fp32 weights and AdamW moments as row shards, `--mib` on each rank) and do
steps: matrix products in place of both passes, a verdict of all ranks, an update of the whole state. All
ways take turns within each repeat, in one pair of processes and on one disk, until a save is written on all ranks.

stall    in which the loop stands still: the call, the wait for the copy before the next update, and for ours the commit
         (manifest, rename, putting the oldest checkpoint away). `async_save` commits nothing.
delay    all that a save costs the loop: time from the call to the end of the step in which the save is over, less as
         many steps without any save. Copying and writing in the background take processor time from the steps.
durable  from the call until the write (ours: the commit) is over. `async_save` neither syncs nor hashes its files.

`async_save` runs in its documented ways: as it is called by default; with a stager that keeps its memory between saves;
with such a stager that copies in a thread of its own, waited for before the update; with a process that writes. Page-
locked memory needs a GPU. The first save of each allocates and is told apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from mixes import header
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.manager import CheckpointManager

RESULT = Path(__file__).parent / "results" / "async_save.md"
RANKS, TENSORS = 2, 48
STEP_SECONDS = 0.5  # of one rank alone: a short step of a state of this size
OURS, DEFAULT, KEPT, THREAD, PROCESS, SYNC = (
    "ours",
    "async_save",
    "async_save, stager kept",
    "async_save, stager kept, copying in a thread",
    "async_save, writing in a process",
    "save (waited for)",
)
GOAL = 0.5


class Steps:
    """The loop around the saves: it does steps, and knows how long one takes without a save."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors, self._square = tensors, torch.randn(400, 400)
        began = time.perf_counter()
        for _ in range(20):
            self._square @ self._square
        self._products = int(20 * STEP_SECONDS / (time.perf_counter() - began))
        self.quiet_seconds = 0.0

    def step(self, done: bool, may_update: Callable[[], object]) -> tuple[bool, float]:
        """(whether all ranks are done, seconds spent in `may_update`)."""
        for _ in range(self._products):
            self._square @ self._square
        verdict = torch.tensor(float(done))
        dist.all_reduce(verdict)
        began = time.perf_counter()
        may_update()
        waited = time.perf_counter() - began
        for tensor in self._tensors.values():
            tensor.to_local().add_(1e-3)
        return verdict.item() == RANKS, waited

    def measure(self) -> None:
        began = time.perf_counter()
        for _ in range(3):
            self.step(False, lambda: None)
        self.quiet_seconds = (time.perf_counter() - began) / 3


@dataclass(slots=True)
class Save:
    """One save by one way: what it returned, and how to go on with it."""

    may_update: Callable[[], object]
    is_written: Callable[[], bool]
    finish: Callable[[], object]  # stands still; once it is written on all ranks
    clear: Callable[[], object] = lambda: None


@dataclass(slots=True)
class Found:
    """Seconds of every save by one way, the slower rank's."""

    stall: list[float] = field(default_factory=list)
    delay: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)


def state(mib: int) -> dict[str, Tensor]:
    """48 DTensors, `mib` MiB of them on this rank."""
    mesh = init_device_mesh("cpu", (RANKS,))
    rows = mib * 2**20 // 4 // TENSORS // 1024
    names = [f"{kind}.{number}" for number in range(TENSORS // 3) for kind in ("model", "exp_avg", "exp_avg_sq")]
    return {name: DTensor.from_local(torch.randn(rows, 1024), mesh, [Shard(0)]) for name in names}


def ours(saver: BackgroundSaver, tensors: dict[str, Tensor], number: int) -> Save:
    saver.begin(number, tensors, {"step": number})
    return Save(saver.wait_for_copy, lambda: saver.is_written, saver.commit, saver.close)


def theirs(folder: Path, tensors: dict[str, Tensor], **options) -> Save:
    response = dcp.async_save(tensors, checkpoint_id=str(folder), **options)
    future = getattr(response, "upload_completion", response)
    staged = getattr(response, "staging_completion", None)
    return Save(staged.result if staged else lambda: None, future.done, future.result, lambda: remove(folder))


def waited_for(folder: Path, tensors: dict[str, Tensor]) -> Save:
    dcp.save(tensors, checkpoint_id=str(folder))
    return Save(lambda: None, lambda: True, lambda: None, lambda: remove(folder))


def remove(folder: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def stager(in_a_thread: bool, shared: bool = False) -> DefaultStager:
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=in_a_thread,
            use_non_blocking_copy=False,
        )
    )


def slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def measure(way: Callable[[], Save], steps: Steps, found: Found) -> None:
    """One save, from a barrier until it is durable on both ranks."""
    dist.barrier()
    steps.measure()
    dist.barrier()
    began = time.perf_counter()
    save = way()
    stall, count, written = time.perf_counter() - began, 0, False
    while not written:
        written, waited = steps.step(save.is_written(), save.may_update)
        stall, count = stall + waited, count + 1
    ending = time.perf_counter()
    save.finish()
    durable = time.perf_counter() - began
    found.stall.append(slowest(stall + time.perf_counter() - ending))
    found.delay.append(slowest(durable - count * steps.quiet_seconds))
    found.durable.append(slowest(durable))
    save.clear()


def run(rank: int, folder: Path, mib: int, repeats: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    tensors = state(mib)
    steps, saver = Steps(tensors), BackgroundSaver(CheckpointManager(folder / "run"))
    group = dist.new_group(backend="gloo")
    kept, thread, process = stager(False), stager(True), stager(False, shared=True)
    options = {
        DEFAULT: {},
        KEPT: {"async_stager": kept},
        THREAD: {"async_stager": thread},
        PROCESS: {"async_stager": process, "async_checkpointer_type": AsyncCheckpointerType.PROCESS},
    }
    ways: dict[str, Callable[[int], Save]] = {OURS: lambda number: ours(saver, tensors, number)}
    for index, (name, more) in enumerate(options.items()):
        ways[name] = lambda number, index=index, more=more: theirs(
            folder / f"{index}-{number}", tensors, process_group=group, **more
        )
    ways[SYNC] = lambda number: waited_for(folder / f"sync-{number}", tensors)
    found = {name: Found() for name in ways}
    for number in range(1, repeats + 2):
        for name, way in ways.items():
            measure(lambda way=way, number=number: way(number), steps, found[name])
    if rank == 0:
        out.write_text(rows(found))
    dist.barrier()
    os._exit(0)


def rows(found: dict[str, Found]) -> str:
    """The table of one place, and the verdict."""
    lines = [
        "| way | stall, ms (smallest, largest) | first stall, ms | delay, ms | durable, s | ours / its stall |",
        "|---|---|---|---|---|---|",
    ]
    mine = found[OURS].stall[1:]
    for name, it in found.items():
        stall = it.stall[1:]
        ratio = statistics.median(a / b for a, b in zip(mine, stall, strict=True))
        lines.append(
            f"| {name} | {milli(statistics.median(stall))} ({milli(min(stall))}, {milli(max(stall))}) "
            f"| {milli(it.stall[0])} | {milli(statistics.median(it.delay[1:]))} "
            f"| {statistics.median(it.durable[1:]):.1f} | {ratio:.2f} |"
        )
    reached = [
        name
        for name in (DEFAULT, KEPT, THREAD, PROCESS)
        if statistics.median(a / b for a, b in zip(mine, found[name].stall[1:], strict=True)) <= GOAL
    ]
    lines += ["", f"At most {GOAL} of the stall of: {'; '.join(reached) or 'none'}.", ""]
    return "\n".join(lines)


def milli(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


def report(tables: dict[str, str], mib: int, repeats: int) -> str:
    lines = header("Saving beside training: how long it stands still", "python benchmarks/async_save.py", ("torch",))
    lines += [
        f"Two gloo ranks, {mib} MiB of state on each, {repeats} saves of each kind in turns; the slower rank counts,",
        "medians. Other work ran on the machine: compare within a table, not across days.",
        "",
        "stall: the loop stands still (the call, the wait for the copy before the next update, our commit). delay: all",
        "that a save costs the loop, the processor time of copying and writing beside it as well. durable: until it is",
        "written, ours synced, hashed and committed. First: the save that allocates.",
        "",
    ]
    for place, table in tables.items():
        lines += [f"## {place}", "", table]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--places", nargs="+", default=["/dev/shm", tempfile.gettempdir()])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    tables = {}
    for place in options.places:
        with tempfile.TemporaryDirectory(dir=place) as name:
            mp.spawn(run, (Path(name), options.mib, options.repeats, Path(name) / "rows.md"), nprocs=RANKS)
            tables["tmpfs" if place == "/dev/shm" else "disk"] = (Path(name) / "rows.md").read_text()
    options.out.write_text(report(tables, options.mib, options.repeats))
    print(options.out.read_text())


if __name__ == "__main__":
    main()

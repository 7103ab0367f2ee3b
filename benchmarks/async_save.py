"""How long does training stand still for a checkpoint, beside `torch.distributed.checkpoint.async_save`?

    python benchmarks/async_save.py [--mib 256] [--repeats 9] [--out FILE]

Two gloo ranks hold an FSDP2-like state (fp32 weights and both AdamW moments as row shards, `--mib` on each rank). The
three ways take turns within each repeat, in one pair of processes and on one disk. Between saves the ranks do steps of
matrix products until the write is over on all of them. Counted as standing still: the call itself and, for ours, the
commit (manifest, rename, deleting the oldest checkpoint). `async_save` commits nothing, and is given the same
safetensors writer; once as it is called by default, once with a stager that keeps its memory between saves.
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
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from mixes import header
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.manager import CheckpointManager

RESULT = Path(__file__).parent / "results" / "async_save.md"
RANKS, TENSORS = 2, 48
OURS, DEFAULT, KEPT = "ours", "async_save", "async_save, stager kept"
GOAL = 0.5


def state(mib: int) -> dict[str, Tensor]:
    """48 DTensors, `mib` MiB of them on this rank."""
    mesh = init_device_mesh("cpu", (RANKS,))
    rows = mib * 2**20 // 4 // TENSORS // 1024
    names = [f"{kind}.{number}" for number in range(TENSORS // 3) for kind in ("model", "exp_avg", "exp_avg_sq")]
    return {name: DTensor.from_local(torch.randn(rows, 1024), mesh, [Shard(0)]) for name in names}


def work(square: Tensor, done: bool) -> bool:
    """A step of some milliseconds, which ends in a verdict of all ranks as every training step does: are all done?"""
    square @ square
    verdict = torch.tensor(float(done))
    dist.all_reduce(verdict)
    return verdict.item() == RANKS


def ours(saver: BackgroundSaver, tensors: dict[str, Tensor], step: int, square: Tensor) -> float:
    begun = time.perf_counter()
    saver.begin(step, tensors, {"step": step})
    copied = time.perf_counter()
    while not work(square, saver.is_written):
        pass
    written = time.perf_counter()
    saver.commit()
    return copied - begun + time.perf_counter() - written


def theirs(
    folder: Path, tensors: dict[str, Tensor], square: Tensor, group: dist.ProcessGroup, stager: DefaultStager | None
) -> float:
    names = dict.fromkeys(tensors, 1)
    begun = time.perf_counter()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=names, save_distributed=True)
    response = dcp.async_save(tensors, storage_writer=writer, process_group=group, async_stager=stager)
    stalled = time.perf_counter() - begun
    future = getattr(response, "upload_completion", response)
    while not work(square, future.done()):
        pass
    future.result()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return stalled


def run(rank: int, folder: Path, mib: int, repeats: int, found: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    tensors, square = state(mib), torch.randn(400, 400)
    saver = BackgroundSaver(CheckpointManager(folder / "run"))
    group = dist.new_group(backend="gloo")
    plain = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    kept = DefaultStager(plain)
    ways: dict[str, Callable[[int], float]] = {
        OURS: lambda step: ours(saver, tensors, step, square),
        DEFAULT: lambda step: theirs(folder / f"a{step}", tensors, square, group, None),
        KEPT: lambda step: theirs(folder / f"b{step}", tensors, square, group, kept),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(1, repeats + 2):
        for name, way in ways.items():
            dist.barrier()
            slowest = torch.tensor(way(step))
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if step > 1:  # the first save of each allocates
                seconds[name].append(float(slowest))
    if rank == 0:
        found.write_text(report(seconds, mib, repeats))
    dist.barrier()
    os._exit(0)


def report(seconds: dict[str, list[float]], mib: int, repeats: int) -> str:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(o / t for o, t in zip(seconds[OURS], seconds[name], strict=True)) for name in seconds
    }
    title = "Asynchronous saving: how long training stands still"
    lines = header(title, "python benchmarks/async_save.py", ("torch",))
    lines += [
        f"Two gloo ranks, {mib} MiB of state on each, {repeats} saves of each kind in turns; the slower rank counts.",
        "Other work ran on the machine: compare within the table, not across days.",
        "",
        "| way | median stall, ms | smallest, largest | ours / it |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        extremes = f"{min(values) * 1e3:.0f}, {max(values) * 1e3:.0f}"
        lines.append(f"| {name} | {median[name] * 1e3:.0f} | {extremes} | {ratios[name]:.2f} |")
    verdict = "reached" if ratios[DEFAULT] <= GOAL else "not reached"
    return "\n".join([*lines, "", f"Goal: at most {GOAL} of `async_save` as it is called by default: {verdict}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        mp.spawn(run, (Path(name), options.mib, options.repeats, options.out), nprocs=RANKS)
    print(options.out.read_text())


if __name__ == "__main__":
    main()

"""One rank of four: HSDP as two replicas of two shards; twenty steps, checkpoints into and out of other layouts.

`python hsdp_worker.py FOLDER CASE...`, cases as zero_worker knows them, or tuning_worker (the optimizers). At four
processes an accumulation of 2 there is one micro-batch on every rank, and 8 is four.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tuning_worker
import zero_worker
from zero_worker import SAVED_AFTER, STEPS, build, resumed, train

from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.fsdp import assert_sharded
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.resilience.ending import run_and_end


def run(case: str, folder: Path, place: Runtime) -> dict[str, object]:
    if case.split("-")[1] != "none":
        return dict(tuning_worker.run(case, folder, place))
    made, rounds = build(case, place), int(case.split("-")[3])
    manager = CheckpointManager(folder / f"{case}-{place.world_size}")
    before = train(made, range(1, SAVED_AFTER + 1), rounds, place)
    path = manager.save(SAVED_AFTER, made.state(), {"step": SAVED_AFTER})
    after = train(made, range(SAVED_AFTER + 1, STEPS + 1), rounds, place)
    found = {"straight": before + after, "after": after}
    if case.startswith("hsdp"):
        found["resumed"] = resumed(case, path, manager, rounds, place)
        for other in ("fsdp2", "ddp"):
            found[other] = resumed(case.replace("hsdp", other), path, manager, rounds, place)
        moved = build(case.replace("hsdp", "ddp"), place)
        tensors = moved.state()
        manager.load(path, tensors)
        back = CheckpointManager(folder / f"{case}-replicas").save(SAVED_AFTER, tensors, {"step": SAVED_AFTER})
        found["from_replicas"] = resumed(case, back, manager, rounds, place)
    figures: dict[str, object] = {
        f"{name}_{figure}": [getattr(result, figure) for result in results]
        for name, results in found.items()
        for figure in ("loss", "grad_norm")
    }
    if case.startswith("hsdp"):
        figures["sums_between_replicas"] = count_sums(made, rounds, place)
        figures["refused"] = refused(made, place)
        zero_worker.export(made, folder / "exports" / case, place)
    return figures


def count_sums(made: Engine, rounds: int, place: Runtime) -> list[int]:
    """All-reduces in the mesh's replica groups during each micro-batch of one more step."""
    counts, real, counted = [], dist.all_reduce, [0]
    mesh = next(iter(made.trained.values())).device_mesh  # type: ignore[attr-defined]
    between = dist.get_process_group_ranks(mesh.get_group("dp_replicate"))

    def counting(*arguments: Any, group: Any = None, **options: Any) -> Any:
        counted[0] += dist.get_process_group_ranks(group) == between
        return real(*arguments, group=group, **options)

    dist.all_reduce = counting
    try:
        loaded = zero_worker.load_step(1, rounds, place)
        for round_, batch in enumerate(loaded.batches):
            counted[0] = 0
            with made.accumulate(round_ == len(loaded.batches) - 1):
                made.forward(batch).backward()
            counts.append(counted[0])
    finally:
        dist.all_reduce = real
        made.optimizer.zero_grad()
    return counts


def refused(made: Engine, place: Runtime) -> list[str]:
    """What the check after building says when another mesh had been asked for."""
    found = []
    for dp_replicate in (1, 2, 4):
        try:
            assert_sharded(made, place, dp_replicate)
        except AssertionError as error:
            found.append(f"{dp_replicate}: {error}")
    return found


def main(folder: Path, cases: list[str]) -> None:
    with runtime() as place:
        torch.set_num_threads(1)
        found = {case: run(case, folder, place) for case in cases}
        if place.is_main:
            (folder / f"found-{place.world_size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1]), sys.argv[2:]))

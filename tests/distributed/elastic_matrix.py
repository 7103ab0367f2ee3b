"""Save on {1, 2, 4} ranks, load on {1, 2, 4}, for engines and methods: `python elastic_matrix.py FOLDER CASE ...`.

Steps are those of the real loop, checkpoints those of the real manager; nothing is converted in between.
FOLDER/found.json gets, for each engine, method, number of ranks that saved (0: one run throughout) and number that
loaded, the losses of the steps after the checkpoint and the digest of all state right after loading it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from lives import run_life
from torch import Tensor
from zero_worker import build, load_step

import sft_dist.parallel.zero  # noqa: F401  DeepSpeed's import costs seconds: once, before the forks
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.optim import set_step
from sft_dist.parallel.engine import Engine, full_tensor
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.train import train_step

WORLDS = (1, 2, 4)
SAVED_AFTER, STEPS = 3, 6
ACCUMULATION = 4  # eight micro-batches a step: eight, four and two on each rank


def steps(made: Engine, first: int, last: int, place: Runtime) -> list[float]:
    return [
        train_step(
            made,
            load_step(step, ACCUMULATION, place),
            lr=1e-3,
            max_norm=1.3,
            seed=5,
            device=place.device,
            stop=False,
        ).loss
        for step in range(first, last + 1)
    ]


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of all names and whole tensors."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(name.encode() + full_tensor(tensor).contiguous().numpy().tobytes())
    return found.hexdigest()


def save(folder: Path, cases: list[str]) -> None:
    """Each engine from the beginning to the checkpoint; on one rank also to the end."""
    found = {}
    with runtime() as place:
        torch.set_num_threads(1)
        for case in cases:
            made = build(case.replace("-", "-none-") + "-0-float32", place)
            steps(made, 1, SAVED_AFTER, place)
            manager = CheckpointManager(folder / f"{case}-{place.world_size}")
            manager.save(SAVED_AFTER, made.state(), {})
            found[f"{case}-0-{place.world_size}"] = {
                "digest": digest(made.state()),
                "losses": steps(made, SAVED_AFTER + 1, STEPS, place),
            }
        if place.is_main:
            (folder / f"saved-{place.world_size}.json").write_text(json.dumps(found))


def load(folder: Path, cases: list[str]) -> None:
    """Each engine from every checkpoint to the end."""
    found = {}
    with runtime() as place:
        torch.set_num_threads(1)
        for case in cases:
            for saved in WORLDS:
                made = build(case.replace("-", "-none-") + "-0-float32", place)
                manager, state = CheckpointManager(folder / f"{case}-{saved}"), made.state()
                path = manager.newest_good()
                assert path is not None
                manager.load(path, state)
                made.adopt(state)
                set_step(made.optimizer, SAVED_AFTER)
                found[f"{case}-{saved}-{place.world_size}"] = {
                    "digest": digest(made.state()),
                    "losses": steps(made, SAVED_AFTER + 1, STEPS, place),
                }
        if place.is_main:
            (folder / f"loaded-{place.world_size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    place, asked = Path(sys.argv[1]), sys.argv[2:]
    for action in (save, load):
        for ranks in WORLDS:
            run_life(f"{action.__name__}-{ranks}", ranks, lambda action=action: action(place, asked), place)
    parts = [json.loads(path.read_text()) for path in sorted(place.glob("*ed-?.json"))]
    (place / "found.json").write_text(json.dumps({key: value for part in parts for key, value in part.items()}))

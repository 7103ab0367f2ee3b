"""One worker's place in the world: rank, device, threads, process group, seeds.

A process group always exists, also for one process, so that nothing above has a second path. Single-node runs that we
start meet through a file, so only loopback listens; under torchrun and its relatives the environment says where.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sft_dist.errors import ConfigError
from sft_dist.parallel.rendezvous import meet

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # where nobody watches
WATCHED_TIMEOUT = timedelta(hours=3)  # under our launcher its watchdog comes first, with every rank's stacks
WATCHED_VARIABLE = "SFT_HEARTBEATS"  # as resilience.heartbeat names it, which must not import torch


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where this process stands. `local_*` counts processes of this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    num_threads: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_place() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) from the launcher's environment, or (0, 1, 0, 1)."""
    environment = os.environ
    rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    local_rank = int(environment.get("LOCAL_RANK", rank))
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", world_size)))
    return rank, world_size, local_rank, local_world_size


@contextmanager
def runtime(num_threads: int | None = None, *, deterministic: bool = False) -> Iterator[Runtime]:
    """Join the process group; leave it at the end. The last reference to a DDP wrapper must be gone before that:
    its reducer would join gloo's thread while holding the interpreter lock and hang.

    `num_threads` None: this process's share of the processors. `deterministic`: only kernels whose bits are the same
    each time; an operation that has none raises RuntimeError."""
    rank, world_size, local_rank, local_world_size = read_place()
    _choose_kernels(deterministic)
    device = _device(local_rank)
    num_threads = _fix_threads(local_world_size, num_threads)
    rendezvous = os.environ.get("SFT_RENDEZVOUS")
    if rendezvous is None and "MASTER_ADDR" not in os.environ:
        if world_size > 1:
            raise ConfigError(
                f"WORLD_SIZE={world_size} but no MASTER_ADDR: "
                f"start workers with sft-dist, torchrun, accelerate or deepspeed"
            )
        store: dist.Store = dist.HashStore()
    else:
        store = meet(rendezvous or "env://", rank, world_size, collective_timeout())
    dist.init_process_group(
        _backend(device),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=collective_timeout(),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Runtime(rank, world_size, local_rank, local_world_size, device, num_threads)
    finally:
        dist.destroy_process_group()


def collective_timeout() -> timedelta:
    """How long a rank waits for the others, in every process group."""
    return WATCHED_TIMEOUT if WATCHED_VARIABLE in os.environ else COLLECTIVE_TIMEOUT


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from its parts, the same in every process and Python version (`hash()` is salted)."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _choose_kernels(deterministic: bool) -> None:
    """Before the first call on a GPU, since cuBLAS reads its variable once."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # A pass over each new tensor, for faults that we do not have.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _backend(device: torch.device) -> str:
    """CPU tensors always travel by gloo; a GPU run adds nccl for its own."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _fix_threads(local_world_size: int, asked: int | None) -> int:
    """The same thread count whatever launched us: launchers set OMP_NUM_THREADS differently, and sums depend on it.
    No more than the cores that a scheduler has left to this process."""
    share = (os.cpu_count() or 1) // local_world_size
    num_threads = asked or max(1, min(share, len(os.sched_getaffinity(0))))
    torch.set_num_threads(num_threads)
    return num_threads

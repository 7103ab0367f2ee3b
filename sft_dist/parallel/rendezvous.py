"""Where the ranks of a run find each other, and the secret that keeps other jobs' ranks out of their keys."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from sft_dist.config.cluster import SECRET_VARIABLE


def meet(method: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store at `method` (`env://`, `tcp://HOST:PORT`, `file://PATH`). Where the launcher has handed over a secret,
    all keys at a port begin with it: who reaches the port without it cannot meet these ranks or overwrite what they
    say. It is no authentication: nothing hides it from who reads the network. A file has its modes, and would keep it.
    """
    store, _, _ = next(dist.rendezvous(method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    secret = None if method.startswith("file:") else os.environ.get(SECRET_VARIABLE)
    return dist.PrefixStore(secret, store) if secret else store

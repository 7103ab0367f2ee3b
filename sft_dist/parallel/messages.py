"""Small facts between ranks as length-limited JSON bytes: nothing pickled travels in a run."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

MAX_BYTES = 64 * 2**20


def broadcast_json(value: Any) -> Any:
    """Rank 0's `value` on every rank (as JSON gives it back: tuples become lists)."""
    payload = _encode(value) if dist.get_rank() == 0 else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([payload.numel()])
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, src=0)
    return _decode(payload)


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank of `group` (None: all ranks)."""
    payload = _encode(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([payload.numel()]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    received = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return [_decode(data[: int(size)]) for data, size in zip(received, sizes, strict=True)]


def _encode(value: Any) -> torch.Tensor:
    data = json.dumps(value).encode()
    if len(data) > MAX_BYTES:
        raise ValueError(f"a message between ranks has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decode(payload: torch.Tensor) -> Any:
    return json.loads(payload.numpy().tobytes())

"""What the ranks of a checkpoint say to each other: small JSON values over a gloo group of their own.

No pickled objects: bytes of JSON travel as uint8 tensors. Every method is collective; without a process group there is
one rank, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sft_dist.errors import (
    CertificateError,
    CheckpointError,
    LockedError,
    NonFiniteError,
    SftError,
    StorageError,
)
from sft_dist.parallel.messages import gather_json
from sft_dist.parallel.runtime import collective_timeout

_KINDS: dict[str, type[SftError]] = {
    kind.__name__: kind for kind in (StorageError, CheckpointError, NonFiniteError, CertificateError, LockedError)
}


class Ranks:
    """Rank, world size, and the three things that ranks do together: tell, gather, agree on an error."""

    def __init__(self) -> None:
        # Rank 0 proves an export alone, seconds for each gigabyte: under a watchdog nobody gives up before it.
        longest = max(collective_timeout(), timedelta(minutes=30))
        self.group = dist.new_group(backend="gloo", timeout=longest) if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group is not None else 0
        self.world_size = dist.get_world_size() if self.group is not None else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        return gather_json(value, self.group)

    def from_main(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; what the others hand in is not read."""
        return self.gather(value if self.is_main else None)[0]

    def _any(self, failed: bool) -> bool:
        """Whether a rank has failed: one message where `gather` takes two, since nearly always none has."""
        if self.world_size == 1:
            return failed
        found = torch.tensor(int(failed))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank: an SftError on any rank is raised on all, naming the first rank that had it."""
        caught: SftError | None = None
        try:
            yield
        except SftError as error:
            caught = error
        if not self._any(caught is not None):
            return
        failures = self.gather(None if caught is None else [type(caught).__name__, str(caught)])
        for rank, failure in enumerate(failures):
            if failure is not None:
                text = failure[1] if self.world_size == 1 else f"rank {rank}: {failure[1]}"
                raise _KINDS.get(failure[0], CheckpointError)(text) from caught

"""Silent corruption: every `resilience.audit_every` steps the ranks prove that they hold and compute the same.

    weights    what every rank holds whole (replicas, gathered copies of ZeRO 1 and 2) has one checksum on all ranks;
               weights that are not trained have the checksum that they had at the start, sharded or not
    computing  all ranks compute the loss of one and the same micro-batch, twice, with their own hands: every bit agrees

The rank in the minority is named, with its host, and the run ends with 77 before the step is taken: nothing wrong is
saved. A bit that falls over in the only copy of a trained weight (fsdp2, zero3) is the same for all ranks, and is not
found here.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sft_dist.errors import HardwareError
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.messages import gather_json
from sft_dist.types import PackedBatch

WORDS_AT_A_TIME = 1 << 22


@dataclass(frozen=True, slots=True)
class Baseline:
    """What may never change on this rank."""

    frozen: int  # checksum of the weights that are not trained, as this rank holds them


def baseline(engine: Engine) -> Baseline:
    """Taken once, before the first step."""
    return Baseline(checksum(_frozen(engine)))


def audit(engine: Engine, started: Baseline, batch: PackedBatch, step: int) -> None:
    """Compare ranks before `step`, on `batch`, which is the same on all of them. Collective; raises HardwareError."""
    whole = [] if engine.shards_parameters else list(engine.model.parameters())
    with engine.evaluating():
        losses = [float(engine.packed(batch)) for _ in range(2)]
    mine = {
        "weights that are not trained": checksum(_frozen(engine)) == started.frozen,
        "the same pass done twice": losses[0] == losses[1],
        "weights": checksum(whole),
        "the loss of one micro-batch": losses[0].hex(),
    }
    found = gather_json([socket.gethostname(), mine])
    for what in mine:
        values = [theirs[what] for _, theirs in found]
        odd = [rank for rank, value in enumerate(values) if value is False] or minority(values)
        if odd:
            named = ", ".join(f"rank {rank} on {found[rank][0]}" for rank in odd)
            raise HardwareError(
                f"step {step}: {named} differs in {what}: a processor or its memory fails there; "
                "run elsewhere to continue from the newest checkpoint"
            )


def minority(values: Sequence[Hashable]) -> list[int]:
    """Numbers of the values that are not the most common one; all of them where there is no such one."""
    counts = Counter(values).most_common(2)
    if len(counts) == 1:
        return []
    usual = None if counts[0][1] == counts[1][1] else counts[0][0]
    return [number for number, value in enumerate(values) if value != usual]


def checksum(tensors: Iterable[Tensor]) -> int:
    """64 bits over all bits of this rank's part of `tensors`; any one that falls over changes it."""
    total = 0
    for tensor in tensors:
        piece = tensor.detach()
        piece = piece.to_local() if isinstance(piece, DTensor) else piece
        octets = piece.contiguous().flatten().view(torch.uint8)
        octets = torch.nn.functional.pad(octets, (0, -len(octets) % 8))
        for words in octets.view(torch.int64).split(WORDS_AT_A_TIME):
            places = torch.arange(1, 2 * len(words), 2, device=words.device)  # odd: no power of two is lost
            total = (total * 31 + int((words * places).sum())) % 2**64
    return total


def _frozen(engine: Engine) -> list[Tensor]:
    return [parameter for parameter in engine.model.parameters() if not parameter.requires_grad]

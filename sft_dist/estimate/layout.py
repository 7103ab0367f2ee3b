"""How a step is spread over ranks: what the estimates of memory and of time are asked about."""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a step is spread. Bytes are per element; tokens are of one micro-batch on one rank."""

    strategy: str
    world_size: int
    device: str  # cuda | cpu
    compute: int
    master: int
    micro_tokens: int
    micro_loss_tokens: int
    rounds: int  # micro-batches of a step on one rank
    checkpointing: bool
    offload: str = "none"
    optimizer: str = "adamw"
    dp_replicate: int = 1  # replicas of the sharded model (fsdp2)
    saves_in_background: bool = False  # checkpoint.async

    @property
    def shards(self) -> int:
        """Ranks that share one replica's state."""
        return self.world_size // self.dp_replicate

    @property
    def autocasts(self) -> bool:
        """FSDP2 and ZeRO-3 gather weights in the compute dtype; the others cast master weights as they are used."""
        return self.strategy not in ("fsdp2", "zero3") and self.compute != FP32

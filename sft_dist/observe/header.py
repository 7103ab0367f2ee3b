"""The run header: what was chosen and why, before the first step."""

from __future__ import annotations

from collections.abc import Sequence


def batch_equation(
    packs_per_micro_batch: int, seq_len: int, micro_batches_per_step: int | None, world_size: int
) -> str:
    """The step in the field's words: per-device batch x accumulation x world size."""
    micro = f"{packs_per_micro_batch} x {seq_len} tokens per device"
    if micro_batches_per_step is None:
        return f"{micro}, as many micro-batches as the step's examples fill, {world_size} process(es)"
    accumulation = -(-micro_batches_per_step // world_size)
    tokens = micro_batches_per_step * packs_per_micro_batch * seq_len
    return f"{micro} x {accumulation} accumulation x {world_size} process(es) = {tokens:,} token slots per step"


def certificate_line(checks: Sequence[tuple[str, float, float]]) -> str:
    """All figures on one line: found and allowed."""
    return "; ".join(f"{name.split(':')[0]} {figure:.1e} <= {limit:.0e}" for name, figure, limit in checks)


def count(number: int) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)

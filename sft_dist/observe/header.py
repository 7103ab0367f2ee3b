"""The run header: what was chosen and why, before the first step."""

from __future__ import annotations

from collections.abc import Sequence


def batch_equation(
    packs_per_micro_batch: int, seq_len: int, micro_batches_per_step: int | None, world_size: int, shared_by: int = 1
) -> str:
    """The step in the field's words: per-device batch x accumulation x world size; groups of `shared_by` processes
    stand for devices under sequence parallel."""
    holder, num_holders = ("device", world_size) if shared_by == 1 else ("group", world_size // shared_by)
    holders = f"{num_holders} {'process(es)' if shared_by == 1 else f'group(s) of {shared_by} processes'}"
    micro = f"{packs_per_micro_batch} x {seq_len} tokens per {holder}"
    if micro_batches_per_step is None:
        return f"{micro}, as many micro-batches as the step's examples fill, {holders}"
    accumulation = -(-micro_batches_per_step // num_holders)
    tokens = micro_batches_per_step * packs_per_micro_batch * seq_len
    return f"{micro} x {accumulation} accumulation x {holders} = {tokens:,} token slots per step"


def certificate_line(checks: Sequence[tuple[str, float, float]]) -> str:
    """All figures on one line: found and allowed."""
    return "; ".join(f"{name.split(':')[0]} {figure:.1e} <= {limit:.0e}" for name, figure, limit in checks)


def count(number: int) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)

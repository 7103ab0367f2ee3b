"""Which loss head runs: one dict of functions, and the choice with its reason for the run header."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sft_kernels import head_reference, head_triton

Head = Callable[..., Tensor]
HEADS: dict[str, Head] = {"reference": head_reference.supervised_loss, "triton": head_triton.supervised_loss}


class KernelUnavailableError(RuntimeError):
    """A kernel was asked for by name on a machine that cannot run it; the message says why."""


def choose_head(requested: str, device: torch.device | str) -> tuple[str, Head, str]:
    """(name, function, reason) for `requested` in auto | reference | triton on `device`.

    `auto` takes Triton on a CUDA device that can run it, the reference elsewhere. Raises KernelUnavailableError when
    a kernel is named that cannot run, ValueError for an unknown name.
    """
    kind = torch.device(device).type
    obstacle = head_triton.unavailable_reason()
    if requested == "auto":
        if kind == "cuda" and obstacle is None:
            return "triton", HEADS["triton"], "CUDA device"
        return "reference", HEADS["reference"], obstacle if kind == "cuda" and obstacle else f"{kind} device"
    if requested not in HEADS:
        raise ValueError(f"head={requested!r} is unknown: use auto, {' or '.join(HEADS)}")
    if requested == "triton" and kind != "cuda" and not head_triton.is_interpreted():
        obstacle = obstacle or f"it needs a CUDA device, not {kind}"
    if requested == "triton" and obstacle:
        raise KernelUnavailableError(f"head=triton: {obstacle}; use head=auto")
    return requested, HEADS[requested], "as requested"

"""Model FLOPs of a packed step and the share of the device's peak they reach (MFU).

Counts required work only: the head over supervised tokens, attention over the documents' own squared lengths, no
padding, no recomputation (`docs/performance.md` derives the formula). Skipped work earns no credit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Dense bf16 peak in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a decoder that decide its FLOPs."""

    num_matrix_parameters: int  # body, without embedding and head
    num_layers: int
    attention_width: int  # query heads x head dim
    hidden_size: int
    vocab_size: int
    trains_all: bool  # full fine-tuning; adapters skip the weight gradients of the frozen base


def step_flops(shape: Shape, num_tokens: int, sum_squared_lengths: int, num_loss_tokens: int) -> float:
    """FLOPs of forward and backward. Full: 6 per weight and token; adapters: 4 (their own matrices are negligible)."""
    factor = 6 if shape.trains_all else 4
    body = factor * shape.num_matrix_parameters * num_tokens
    attention = 6 * shape.num_layers * shape.attention_width * sum_squared_lengths
    head = factor * shape.hidden_size * shape.vocab_size * num_loss_tokens
    return float(body + attention + head)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, None where it is not known (CPUs): then no MFU is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""Seconds of a step: the FLOPs that are executed over what the devices reach, or the bytes that ranks exchange over the
slowest link, whichever takes longer (they overlap).

FLOPs are counted as `observe.perf.step_flops` counts them, plus what activation checkpointing computes again.
"""

from __future__ import annotations

from sft_dist.estimate.architecture import Architecture
from sft_dist.estimate.hardware import Device
from sft_dist.estimate.layout import FP32, Layout
from sft_dist.estimate.tuning import Tuned
from sft_dist.estimate.workload import Workload

# Share of the peak that training reaches. GPUs: published full fine-tunes of 8 B models in bf16 on H100 and H200 reach
# 0.42 to 0.50; models under 1 B reach less. CPUs: of the fastest matrix product, as benchmarks/estimate_check.py
# measures it (0.58 and 0.71 at 1,024 tokens, 0.48 at 256, on a machine in use).
EFFICIENCY = {"cuda": 0.4, "cpu": 0.6}


def step_flops(
    architecture: Architecture,
    tuned: Tuned,
    *,
    num_tokens: float,
    sum_squared_lengths: float,
    num_loss_tokens: float,
    checkpointing: bool = False,
) -> float:
    """Executed FLOPs of forward and backward, over all ranks."""
    a, factor = architecture, 6 if tuned.trains_all else 4
    again = 2 if checkpointing else 0
    body = (factor + again) * a.num_matrix_parameters * num_tokens
    attention = (6 + again) * a.num_layers * a.num_heads * a.head_dim * sum_squared_lengths
    return float(body + attention + factor * a.hidden_size * a.vocab_size * num_loss_tokens)


def step_bytes(tuned: Tuned, layout: Layout) -> tuple[float, float]:
    """Bytes that one rank sends in a step: (among those it shares state with, all ranks or a replica's; between
    replicas of a mesh)."""
    world, rounds = layout.shards, layout.rounds
    share = (world - 1) / world
    gradients, weights = tuned.trained * FP32, tuned.base + tuned.added
    match layout.strategy:
        case "ddp":
            return 2 * share * tuned.trained * layout.master, 0.0
        case "zero1" | "zero2":
            return share * (gradients + tuned.trained * layout.master), 0.0
        case "fsdp2":
            between = 2 * (layout.dp_replicate - 1) / layout.dp_replicate * gradients / world
            return share * rounds * (gradients + 2 * weights * layout.compute), between
        case _:
            return share * rounds * (gradients + 2 * weights * layout.master), 0.0


def step_seconds(
    architecture: Architecture, tuned: Tuned, layout: Layout, work: Workload, device: Device, efficiency: float | None
) -> float:
    """Wall time of a step."""
    flops = step_flops(
        architecture,
        tuned,
        num_tokens=work.step_tokens,
        sum_squared_lengths=work.step_tokens * work.mean_length,
        num_loss_tokens=work.step_tokens * work.supervised,
        checkpointing=layout.checkpointing,
    )
    reached = device.flops * (efficiency or EFFICIENCY[device.kind])
    computing = flops / (layout.world_size * reached)
    within, between = step_bytes(tuned, layout)
    sending = within / device.bandwidth(layout.shards) + between / device.bandwidth(layout.world_size)
    return max(computing, sending)

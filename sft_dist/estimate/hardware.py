"""Devices: memory, speed and links. Data sheet values; `pace` says which share of them training reaches."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass

import numpy as np

from sft_dist.errors import ConfigError

GIB = 2**30
GPUS_PER_NODE = 8
NETWORK_BYTES = 50e9  # per second and GPU between nodes: one 400 Gb/s port each, as DGX and HGX nodes have


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or this machine's CPU as one rank sees it. FLOP/s dense bf16 (CPU: fp32), bytes per second."""

    name: str
    kind: str  # cuda | cpu
    memory: int
    flops: float
    link: float  # to its neighbours of the same machine, one direction

    def bandwidth(self, world_size: int) -> float:
        """Bytes per second on the slowest link that a collective of all ranks crosses."""
        crosses = self.kind == "cuda" and world_size > GPUS_PER_NODE
        return min(self.link, NETWORK_BYTES) if crosses else self.link


GPUS = {
    device.name: device
    for device in (
        Device("B200", "cuda", 180 * GIB, 2250e12, 900e9),
        Device("H200", "cuda", 141 * 10**9, 989e12, 450e9),
        Device("H100", "cuda", 80 * GIB, 989e12, 450e9),
        Device("A100", "cuda", 80 * GIB, 312e12, 300e9),
        Device("A100-40GB", "cuda", 40 * GIB, 312e12, 300e9),
        Device("L40S", "cuda", 48 * 10**9, 362e12, 25e9),
    )
}
CPU_LINK_BYTES = 1e9  # gloo over loopback, per process


def find_device(name: str | None, world_size: int) -> Device:
    """The device called `name`; None: this machine's GPU if it has one that is known, else its CPU."""
    if name is None:
        name = next((key for key in sorted(GPUS, key=len, reverse=True) if key in _gpu_here()), "cpu")
    if name.lower() == "cpu":
        return _this_cpu(world_size)
    device = GPUS.get(name.upper())
    if device is None:
        raise ConfigError(f"--gpu-type {name}: unknown; known are {', '.join(GPUS)} and cpu")
    return device


def _gpu_here() -> str:
    try:
        command = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _this_cpu(world_size: int) -> Device:
    """This machine shared by `world_size` ranks; its speed is measured, in a twentieth of a second."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", "cpu", memory // world_size, matrix_flops() / world_size, CPU_LINK_BYTES)


def matrix_flops(size: int = 512, seconds: float = 0.05) -> float:
    """fp32 FLOP/s of a matrix product on all cores: the fastest of those in `seconds`, whatever else runs here."""
    matrix = np.ones((size, size), np.float32)
    fastest, end = float("inf"), time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        matrix @ matrix
        fastest = min(fastest, time.perf_counter() - begin)
    return 2.0 * size**3 / fastest

"""Document lengths like those people train on, and the head of a result page. Shared by the planning benchmarks."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

import numpy as np


def chat_lengths(num: int, capacity: int, seed: int = 0) -> np.ndarray:
    """Log-normal, median 400 tokens, sigma 1, cut at `capacity`: uint16[num]."""
    drawn = np.random.default_rng(seed).lognormal(np.log(400), 1.0, num)
    return np.clip(drawn, 2, capacity).astype(np.uint16)


def reasoning_lengths(num: int, capacity: int, seed: int = 0) -> np.ndarray:
    """70 % with median 600 tokens, 30 % with median 6000, both log-normal with sigma 1, cut at `capacity`."""
    random = np.random.default_rng(seed)
    medians = np.where(random.random(num) < 0.7, 600, 6000)
    return np.clip(random.lognormal(np.log(medians), 1.0), 2, capacity).astype(np.uint16)


MIXES = {"chat": (chat_lengths, 8192), "reasoning": (reasoning_lengths, 32_768)}


def header(title: str, command: str, packages: tuple[str, ...]) -> list[str]:
    """Title, and what ran where and when."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    where = f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, {versions}"
    return [f"# {title}", "", f"`{command}`, {datetime.date.today()}, {where}.", ""]

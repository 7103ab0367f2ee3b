"""What a worker sets up before anything is computed."""

from __future__ import annotations

import os

import pytest
import torch

from sft_dist.parallel.runtime import runtime


def test_deterministic_kernels_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    target = torch.zeros(4)
    write = lambda: target.put_(torch.tensor([0, 0]), torch.ones(2))  # which of two wins is nobody's promise  # noqa: E731
    with runtime(num_threads=1):
        write()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        with runtime(num_threads=1, deterministic=True):
            with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
                write()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)

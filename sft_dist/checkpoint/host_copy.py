"""A copy of the state in host memory, taken while nothing changes the original."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from sft_dist.parallel.engine import local_part


class HostCopy:
    """The state in host memory (page-locked beside a GPU), laid out over the ranks as the original is.

    On a GPU the copy runs on one stream of its own, behind all work that was queued when `fit` was called. `take` holds
    the originals and waits for that stream, so their memory needs no record of it, and the page-locked one no event.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._stream: torch.cuda.Stream | None = None  # None: the originals are on the host
        self._done: torch.cuda.Event | None = None  # all work that was given to the GPU before `fit`

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Have room for `tensors`, as they are once the GPU has done what it was given until now. Collective."""
        if not _same_layout(self.tensors, tensors):
            self.tensors = {name: self._like(tensor) for name, tensor in tensors.items()}
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._done = torch.cuda.current_stream(device).record_event()

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Overwrite the copy with what `fit` was given; complete when this returns. In any thread."""
        if self._stream is None or self._done is None:
            self._copy(tensors)
            return self.tensors
        # A new thread is on GPU 0, and leaving a stream's context goes back there: in every process of a node that
        # would begin a context of that GPU, hundreds of MB each.
        torch.cuda.set_device(self._stream.device)
        self._stream.wait_event(self._done)
        with torch.cuda.stream(self._stream):
            self._copy(tensors)
        self._stream.synchronize()
        return self.tensors

    def release(self) -> None:
        """Give the memory back, page-locked memory too, which PyTorch would keep for this process."""
        self.tensors = {}
        if self._stream is not None and hasattr(torch.accelerator, "empty_host_cache"):  # not in every PyTorch
            torch.accelerator.empty_host_cache()

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            local_part(self.tensors[name]).copy_(local_part(tensor), non_blocking=True)

    def _like(self, tensor: Tensor) -> Tensor:
        piece = local_part(tensor)
        empty = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
        if not isinstance(tensor, DTensor):
            return empty
        mesh = self._host_mesh(tensor.device_mesh)
        return DTensor.from_local(
            empty, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _host_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The same ranks with CPU tensors: a DTensor moves its piece to the device of its mesh."""
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = init_device_mesh("cpu", tuple(mesh.shape))
        return self._meshes[mesh]


def _same_layout(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return held.keys() == wanted.keys() and all(
        (local_part(held[name]).shape, held[name].dtype) == (local_part(tensor).shape, tensor.dtype)
        for name, tensor in wanted.items()
    )

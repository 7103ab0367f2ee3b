"""A copy of the state in host memory, taken while nothing changes the original."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from sft_dist.parallel.engine import local_part


class HostCopy:
    """The state in host memory (page-locked beside a GPU), laid out over the ranks as the original is."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._done: torch.cuda.Event | None = None  # all work that was given to the GPU before `fit`

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Have room for `tensors`, as they are once the GPU has done what it was given until now. Collective."""
        if not _same_layout(self.tensors, tensors):
            self.tensors = {name: self._like(tensor) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._done = torch.cuda.Event()
            self._done.record()

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Overwrite the copy with what `fit` was given; complete when this returns. In any thread."""
        with self._beside(tensors):
            for name, tensor in tensors.items():
                local_part(self.tensors[name]).copy_(local_part(tensor), non_blocking=True)
            if self._done is not None:
                torch.cuda.current_stream().synchronize()
        return self.tensors

    def _beside(self, tensors: Mapping[str, Tensor]) -> torch.cuda.StreamContext | nullcontext[None]:
        """A stream of its own on the GPU of `tensors`, behind what was recorded; nothing for tensors of the host."""
        if self._done is None:
            return nullcontext()
        device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)
        stream = torch.cuda.Stream(device)
        stream.wait_event(self._done)
        return torch.cuda.stream(stream)

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

"""Tensors to and from a folder of safetensors shards, through torch.distributed.checkpoint without any pickle.

`HuggingFaceStorageWriter(save_distributed=True)` writes `shard-<rank+1>-model-<k>-of-<n>.safetensors`, each with the
offsets of its pieces in the header; the reader puts the pieces together for any other sharding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from sft_dist.checkpoint.disk import explain
from sft_dist.checkpoint.manifest import Manifest, TensorEntry
from sft_dist.checkpoint.ranks import Ranks
from sft_dist.errors import CheckpointError, NonFiniteError

FILE_BYTES = 2 << 30  # a file is built in memory before it is written: this bounds the peak


def write_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write this rank's part of `tensors` into the existing, empty `folder`. Collective.

    Raises StorageError when any rank cannot write.
    """
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=spread(tensors, FILE_BYTES), save_distributed=True
    )
    state = {name: _writable(tensor) for name, tensor in tensors.items()}
    try:
        with _quiet_alone():
            dcp.save(state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.group is None)
    except (CheckpointException, OSError) as error:
        cause = first_cause(error)
        if not isinstance(cause, OSError):
            raise
        raise explain(folder, cause, num_bytes(tensors)) from error


def read_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks | None = None) -> None:
    """Fill `tensors` in place from a proven folder; without `ranks` one process reads alone.

    Raises CheckpointError when the folder does not hold them.
    """
    group = ranks.group if ranks else None
    try:
        with _quiet_alone():
            reader = HuggingFaceStorageReader(str(folder))
            dcp.load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({first_cause(error)})") from error


def shard_pattern(rank: int) -> str:
    """Glob of the files that `rank` writes."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """dtype and global shape of each tensor, for the manifest."""
    return {
        name: TensorEntry(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def empty_tensors(manifest: Manifest, prefix: str) -> dict[str, Tensor]:
    """Full, uninitialised CPU tensors for every name that starts with `prefix`, ready for `read_shards`."""
    return {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in manifest.tensors.items()
        if name.startswith(prefix)
    }


def check_same(folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError naming the first tensor that differs in name, dtype or global shape."""
    wanted = describe_tensors(tensors)
    for name in sorted(wanted.keys() | manifest.tensors.keys()):
        if wanted.get(name) != manifest.tensors.get(name):
            held, needed = _told(manifest.tensors.get(name)), _told(wanted.get(name))
            raise CheckpointError(
                f"{folder}: {name} is {held} in the checkpoint and {needed} in this run: "
                f"restore the recipe that wrote it, or choose another run.dir"
            )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError naming the first tensor that holds a NaN or an infinity on this rank."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(_local(tensor)).all()):
            raise NonFiniteError(f"{name} holds a NaN or infinity: nothing was saved, older checkpoints are untouched")


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors at their global sizes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def spread(tensors: Mapping[str, Tensor], limit_bytes: int) -> dict[str, int]:
    """Tensor name -> file number from 1, filled in order up to `limit_bytes` of global size; the same on all ranks."""
    index, filled, numbers = 1, 0, {}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > limit_bytes:
            index, filled = index + 1, 0
        filled += size
        numbers[name] = index
    return numbers


def first_cause(error: BaseException) -> BaseException:
    """The error of the first rank inside DCP's collective exception, else the error itself."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """DCP warns when there is no process group; one process reading or writing alone is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _writable(tensor: Tensor) -> Tensor:
    """safetensors writes dense memory only; shards are dense already."""
    detached = tensor.detach()
    return detached if isinstance(detached, DTensor) else detached.contiguous()


def _told(entry: TensorEntry | None) -> str:
    return "absent" if entry is None else f"{entry.dtype}{list(entry.shape)}"

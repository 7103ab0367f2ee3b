"""Weights on their way into safetensors files, one tensor at a time.

    live_weights(engine)  ->  {name: Weight}  ->  write_weights(folder)  ->  {name: Written}  ->  weights_fault(folder)

A `Weight` is known before it is read: dtype and global shape are enough for a file's header, so the header goes out
first and each tensor follows as soon as it is gathered. No more than one whole tensor is ever in memory. The library's
own `save_file` wants all tensors of a file at once: 5 GiB of them, and twice that while it serialises. What is written
here it reads back in `weights_fault`, tensor by tensor, against the digest of what was gathered.

Format: https://huggingface.co/docs/safetensors (little-endian length, JSON header, raw data without gaps).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft_dist.parallel.engine import Engine

FILE_BYTES = 5 << 30  # what the hub's own tools cut a model into
INDEX_SUFFIX = ".safetensors.index.json"
_ALIGNMENT = 64  # of the first tensor in a file: kernels may read a mapped file in place
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a model before it is gathered."""

    shape: tuple[int, ...]  # global
    dtype: torch.dtype
    read: Callable[[], Tensor]  # the whole tensor; collective where ranks share it

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Written:
    """What a file holds under a tensor's name."""

    file: str
    dtype: str  # by torch's name without the prefix
    shape: tuple[int, ...]
    sha256: str  # of the elements' bytes as they were gathered


def live_weights(engine: Engine, master: torch.dtype) -> dict[str, Weight]:
    """Every entry of the model's state dict; trained ones in `master`, the dtype they are trained in."""
    return {
        name: Weight(
            tuple(getattr(tensor, "ds_shape", tensor.shape)),  # ZeRO-3 leaves an empty tensor, its shape beside it
            master if tensor.requires_grad else tensor.dtype,
            lambda tensor=tensor: engine.whole(tensor),  # type: ignore[misc]
        )
        for name, tensor in engine.model.state_dict(keep_vars=True).items()
    }


def plain_weights(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Weight]:
    """Tensors that one process holds whole; floating ones to be written in `dtype` (None: their own)."""
    return {
        name: Weight(
            tuple(t.shape),
            dtype if dtype is not None and t.is_floating_point() else t.dtype,
            lambda tensor=t: tensor.detach(),  # type: ignore[misc]
        )
        for name, t in tensors.items()
    }


def write_weights(
    folder: Path, stem: str, weights: Mapping[str, Weight], *, file_bytes: int = FILE_BYTES, writes: bool = True
) -> dict[str, Written]:
    """`STEM.safetensors`, or numbered files of at most `file_bytes` (one tensor at least) with an index.

    Every rank calls and reads each weight in the same order; only the one that `writes` keeps it. When writing fails,
    the rest is still read, so that no rank waits for this one; then OSError is raised.
    """
    files = _files(stem, weights, file_bytes)
    written: dict[str, Written] = {}
    failure: OSError | None = None
    for file, names in files.items():
        part = {name: weights[name] for name in names}
        try:
            if writes and failure is None:
                written |= _write_file(folder / file, part)
                continue
        except _ReadOn as stopped:
            failure, names = stopped.cause, stopped.unread
        for name in names:
            weights[name].read()
    if failure is not None:
        raise failure
    if writes and len(files) > 1:
        index = {
            "metadata": {"total_size": sum(weight.num_bytes for weight in weights.values())},
            "weight_map": {name: entry.file for name, entry in written.items()},
        }
        (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def weights_fault(folder: Path, stem: str, wanted: Mapping[str, Written]) -> str | None:
    """Read every tensor back through the safetensors library; the first difference from `wanted`, None if all agree."""
    try:
        stored = _weight_map(folder, stem)
        if stored.keys() != wanted.keys():
            missing, strange = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
            return f"{(missing or strange)[0]}: {'is missing' if missing else 'does not belong to the model'}"
        for file in sorted(set(stored.values())):
            names = [name for name in stored if stored[name] == file]
            if found := _file_fault(folder / file, {name: wanted[name] for name in names}):
                return found
    except FileNotFoundError as error:
        return f"{Path(error.filename).name if error.filename else error}: is missing"
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        return f"{stem}: cannot be read ({error})"
    return None


def digest(tensor: Tensor) -> str:
    """SHA-256 (hex) of the elements' bytes."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


class _ReadOn(Exception):
    """Writing failed; `unread` are the names of the file that were not gathered yet."""

    def __init__(self, cause: OSError, unread: list[str]) -> None:
        self.cause, self.unread = cause, unread


def _files(stem: str, weights: Mapping[str, Weight], file_bytes: int) -> dict[str, list[str]]:
    """File -> names in the order in which they are written: wide elements first, so that each lies aligned."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, weight in weights.items():
        if parts[-1] and filled + weight.num_bytes > file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += weight.num_bytes
    total = len(parts)
    return {
        f"{stem}-{number:05d}-of-{total:05d}.safetensors" if total > 1 else f"{stem}.safetensors": sorted(
            part, key=lambda name: -weights[name].dtype.itemsize
        )
        for number, part in enumerate(parts, 1)
    }


def _write_file(path: Path, weights: Mapping[str, Weight]) -> dict[str, Written]:
    """One file; raises _ReadOn with what was not gathered when writing fails."""
    unread = list(weights)
    written = {}
    try:
        with path.open("xb") as out:
            out.write(_header(weights))
            while unread:
                name = unread[0]
                tensor = weights[name].read().detach()
                unread.pop(0)
                written[name] = _put(out, path.name, name, weights[name], tensor)
    except OSError as error:
        raise _ReadOn(error, unread) from error
    return written


def _put(out: BinaryIO, file: str, name: str, weight: Weight, tensor: Tensor) -> Written:
    data = tensor.to("cpu", weight.dtype)
    assert tuple(data.shape) == weight.shape, f"{name}: {tuple(data.shape)} was gathered, {weight.shape} announced"
    content = _bytes(data)
    out.write(content)
    return Written(file, str(data.dtype).removeprefix("torch."), weight.shape, hashlib.sha256(content).hexdigest())


def _header(weights: Mapping[str, Weight]) -> bytes:
    """Length and JSON, filled up with spaces so that the data begins aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, weight in weights.items():
        end = start + weight.num_bytes
        entries[name] = {"dtype": _DTYPES[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in memory order, without a copy where they lie densely."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _weight_map(folder: Path, stem: str) -> dict[str, str]:
    """Tensor name -> file, as a reader finds it: by the index, else in the one file."""
    index = folder / f"{stem}{INDEX_SUFFIX}"
    if index.is_file():
        return dict(json.loads(index.read_text())["weight_map"])
    with safe_open(folder / f"{stem}.safetensors", "pt") as stored:
        return dict.fromkeys(stored.keys(), f"{stem}.safetensors")


def _file_fault(path: Path, wanted: Mapping[str, Written]) -> str | None:
    with safe_open(path, "pt") as stored:
        if set(stored.keys()) != wanted.keys():
            return f"{path.name}: holds {len(stored.keys())} tensors, {len(wanted)} were written to it"
        for name in _names(stored.keys()):
            tensor, entry = stored.get_tensor(name), wanted[name]
            found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            if found != (entry.dtype, entry.shape):
                return f"{name}: is {found[0]}{list(found[1])}, the model holds {entry.dtype}{list(entry.shape)}"
            if digest(tensor) != entry.sha256:
                return f"{name}: its values are not the model's"
    return None


def _names(keys: Iterable[str]) -> list[str]:
    return sorted(keys)

"""One rank of the checkpoint tests: `python checkpoint_ranks.py SCENARIO FOLDER`, started by test_checkpoint.py.

Each scenario asserts on every rank; a rank that fails ends with a traceback in its log.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sft_dist.checkpoint.catalog import folders, set_aside
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.manifest import read_manifest
from sft_dist.errors import CheckpointError, NonFiniteError, SftError, StorageError
from sft_dist.resilience.ending import run_and_end
from sft_dist.resilience.run_folder import write_exit_code

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
META = {"loss": 0.1 + 0.2, "plan": "abc"}


def plain_tensors(seed: int) -> dict[str, Tensor]:
    """What a replicated run holds: the same on every rank, fp32 and bf16, one of them not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.wide": torch.randn(64, 33, generator=generator),
        "model.half": torch.randn(17, generator=generator).bfloat16(),
        "optim.wide.exp_avg": torch.randn(33, 64, generator=generator).t(),
        "optim.wide.exp_avg_sq": torch.rand(64, 33, generator=generator) * 1e-30,
    }


def sharded_tensors(seed: int) -> dict[str, Tensor]:
    """Parameters and AdamW moments of a model sharded by FSDP2, with rows that do not divide by the ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1), nn.Linear(1, 3).bfloat16())
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * seed
    optimizer.step()
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optim.{name}.{moment}"] = optimizer.state[parameter][moment]
    assert all(isinstance(tensor, DTensor) for tensor in tensors.values())
    return tensors


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    for name, tensor in full(expected).items():
        assert torch.equal(full(found)[name], tensor), name


def expect(kind: type[SftError], words: str, action: Callable[[], object]) -> None:
    try:
        action()
    except kind as error:
        assert words in str(error), str(error)
        return
    raise AssertionError(f"no {kind.__name__} on rank {RANK}")


def replicated(folder: Path) -> None:
    """Plain tensors: written once over all ranks, read back the same on each, kept to the newest two."""
    manager = CheckpointManager(folder / "replicated", keep=2)
    tensors = plain_tensors(1)
    for step in (1, 2, 3):
        path = manager.save(step, tensors, {"step": step, **META})
    assert [p.name for p in folders(folder / "replicated")] == ["step-00000002", "step-00000003"]
    manifest = read_manifest(path)
    data_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    assert len(manifest.files) == WORLD_SIZE and data_bytes <= manifest.num_bytes < data_bytes + 4096
    loaded = zeros(tensors)
    reopened = CheckpointManager(folder / "replicated")
    assert reopened.load(reopened.newest_good() or "", loaded) == {"step": 3, **META}
    assert_equal(loaded, tensors)


def sharded(folder: Path) -> None:
    """FSDP2 shards: read back the same; also written whole, for other numbers of ranks to compare with."""
    manager = CheckpointManager(folder / "sharded")
    tensors = sharded_tensors(3)
    path = manager.save(5, tensors, META)
    loaded = zeros(tensors)
    assert manager.load(path, loaded) == META
    assert_equal(loaded, tensors)
    whole = full(tensors)
    if RANK == 0:
        save_file({name: t.contiguous() for name, t in whole.items()}, folder / "whole.safetensors")


def resharded(folder: Path) -> None:
    """What another number of ranks wrote, read into this number's shards and into full tensors."""
    expected = load_file(folder / "whole.safetensors")
    manager = CheckpointManager(folder / "sharded")
    path = manager.newest_good()
    assert path is not None and read_manifest(path).world_size != WORLD_SIZE
    for loaded in (zeros(sharded_tensors(4)), zeros(expected)):
        assert manager.load(path, loaded) == META
        assert_equal(loaded, expected)


def agreement(folder: Path) -> None:
    """One rank's trouble is everybody's error, the folder stays clean, and the older checkpoint stays good."""
    run_dir = folder / "agreement"
    manager = CheckpointManager(run_dir)
    tensors = sharded_tensors(1)
    first = manager.save(1, tensors, META)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if RANK == 1:  # the kernel refuses this rank's writes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    expect(StorageError, "File too large", lambda: manager.save(2, tensors, META))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    poisoned = dict(tensors)
    if RANK == 1:
        name = "model.0.weight"
        poisoned[name] = poisoned[name].clone()
        poisoned[name].to_local()[-1] = float("nan")  # type: ignore[attr-defined]
    expect(NonFiniteError, "rank 1: model.0.weight holds a NaN", lambda: manager.save(2, poisoned, META))

    wrong = {name: tensor for name, tensor in tensors.items() if "exp_avg_sq" not in name}
    expect(CheckpointError, "optim.0.bias.exp_avg_sq is float32[5]", lambda: manager.load(first, wrong))
    dist.barrier()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [first.name]
    assert manager.save(2, tensors, META).name == "step-00000002"


def fallback(folder: Path) -> None:
    """A bad newest one is set aside with one notice, the older one serves; with only bad ones nothing starts."""
    run_dir, notices = folder / "fallback", []
    tensors = {step: plain_tensors(step) for step in (1, 2)}
    manager = CheckpointManager(run_dir, notice=notices.append)
    for step, state in tensors.items():
        manager.save(step, state, {"step": step})
    flip_a_byte(folders(run_dir)[1], "shard-00002")
    manager = CheckpointManager(run_dir, notice=notices.append)
    good, loaded = manager.newest_good(), zeros(tensors[1])
    assert good is not None and manager.load(good, loaded) == {"step": 1}
    assert_equal(loaded, tensors[1])
    told = (
        "checkpoint of step 2 is bad: shard-00002-model-00001-of-00001.safetensors: altered "
        "(SHA-256 differs from manifest.json); set aside as step-00000002.bad-1"
    )
    assert notices == ([told] if RANK == 0 else []), notices
    manager.save(2, tensors[2], {"step": 2})  # the run comes by that step again
    assert [path.name for path in set_aside(run_dir)] == ["step-00000002.bad-1"]

    for path in folders(run_dir):
        flip_a_byte(path, "shard-00001")
    for _ in range(2):  # a second start finds them set aside and must not begin from nothing either
        manager = CheckpointManager(run_dir, notice=notices.append)
        expect(CheckpointError, "every checkpoint is bad", manager.newest_good)


def flip_a_byte(folder: Path, shard: str) -> None:
    dist.barrier()
    if RANK == 0:
        (path,) = folder.glob(f"{shard}-*")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()


SCENARIOS = {"all": (replicated, sharded, agreement, fallback), "resharded": (resharded,), "sharded": (sharded,)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["SFT_RENDEZVOUS"], rank=RANK, world_size=WORLD_SIZE)
    for scenario in SCENARIOS[sys.argv[1]]:
        scenario(Path(sys.argv[2]))
        dist.barrier()
    dist.destroy_process_group()
    if RANK == 0:
        write_exit_code(Path(sys.argv[2]) / "logs" / f"attempt_{int(os.environ['SFT_ATTEMPT']):04d}", 0)


if __name__ == "__main__":
    run_and_end(main)

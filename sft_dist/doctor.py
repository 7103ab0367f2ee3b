"""Can training run here? Facts about this machine, each with what to do where something is missing. No network is used.

    examine(run_dir, cache_dir) -> findings

A finding is `ok`, a `note` (training runs, something is lost) or `blocked` (training cannot run). Folders are tried by
doing to them what a run does: write, fsync, rename, lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sft_dist import __version__

GIB = 2**30
OK, NOTE, BLOCKED = "ok", "note", "blocked"
REQUIRED = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numba", "pydantic")
# Optional part -> (module, command that adds it, what is lost without it).
OPTIONAL = {
    "flash-attn": ("flash_attn", "pip install flash-attn --no-build-isolation", "attention uses PyTorch's own kernels"),
    "triton": ("triton", "pip install triton", "the loss head runs in plain PyTorch"),
    "liger-kernel": ("liger_kernel", "pip install liger-kernel", "only benchmarks compare with it"),
    "deepspeed": ("deepspeed", "pip install deepspeed", "parallel.strategy=zero1, zero2, zero3 cannot run"),
    "bitsandbytes": ("bitsandbytes", "pip install bitsandbytes", "no quantised base models"),
    "wandb": ("wandb", "pip install wandb", "log.trackers=[wandb] is refused"),
    "mlflow": ("mlflow", "pip install mlflow-skinny", "log.trackers=[mlflow] is refused"),
    "tensorboard": ("tensorboard", "pip install tensorboard", "log.trackers=[tensorboard] is refused"),
    "s3fs": ("s3fs", "pip install s3fs", "data at s3:// cannot be read"),
    "gcsfs": ("gcsfs", "pip install gcsfs", "data at gs:// cannot be read"),
}
OPEN_FILES = 4096  # shards, mapped stores, sockets and loaders of one rank, with room
SHARED_MEMORY = GIB  # nccl's and gloo's buffers between ranks of a machine
FREE_BYTES = 5 * GIB


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. `remedy` is a command or a setting; empty where nothing is to be done."""

    part: str
    state: str  # ok | note | blocked
    found: str
    remedy: str = ""


def examine(run_dir: Path, cache_dir: Path) -> Iterator[Finding]:
    """All findings, in reading order."""
    yield _python()
    for name in REQUIRED:
        yield _package(name)
    yield from _accelerators()
    yield _processors()
    yield _compiler()
    yield _memory()
    yield _shared_memory()
    yield _open_files()
    yield folder("run.dir", run_dir)
    yield folder("data.cache_dir", cache_dir)
    for name, (module, command, lost) in OPTIONAL.items():
        yield optional(name, module, command, lost)
    yield _slurm()
    yield _token()


def blocking(findings: list[Finding]) -> Finding | None:
    """The first finding that keeps training from running."""
    return next((finding for finding in findings if finding.state == BLOCKED), None)


def _python() -> Finding:
    found = f"{platform.python_version()} in {sys.prefix}, sft_dist {__version__}, {platform.platform()}"
    if sys.platform != "linux":
        return Finding("python", BLOCKED, found, "use Linux: locks and parent-death signals are Linux's")
    return Finding("python", OK, found)


def _package(name: str) -> Finding:
    """A required library: its version, and that it can be imported where importing is cheap."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, BLOCKED, "not installed", f"pip install {name}")
    reason = import_fault(name) if name in ("torch", "safetensors", "pydantic") else None
    if reason:
        return Finding(
            name, BLOCKED, f"{version}, cannot be imported: {reason}", f"pip install --force-reinstall {name}"
        )
    return Finding(name, OK, version)


def _accelerators() -> Iterator[Finding]:
    """GPUs as the driver and as PyTorch see them: it is their difference that surprises."""
    driver = _output("nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader")
    cards = driver.splitlines() if driver else []
    if import_fault("torch") is not None:
        return
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        if cards:
            remedy = "install a CUDA build of torch that the driver supports, and check CUDA_VISIBLE_DEVICES"
            yield Finding("gpu", NOTE, f"{len(cards)} present ({cards[0]}), but torch is {built} and sees none", remedy)
        else:
            yield Finding("gpu", NOTE, f"none; torch is {built}: training runs on the CPU, in float32")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("cuda", OK, f"torch for CUDA {torch.version.cuda}, NCCL {nccl}, driver {_last_field(cards)}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        busy = free < 0.9 * total
        yield Finding(
            f"gpu {index}", NOTE if busy else OK, found, "another process uses it: nvidia-smi" if busy else ""
        )


def _processors() -> Finding:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    return Finding("cpu", OK, f"{usable} of {present} cores usable, {platform.machine()}")


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU: CXX, else the usual names."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compiler() -> Finding:
    found = compiler()
    if found is None:
        return Finding("c++", NOTE, "no compiler: precision.compile=true cannot run on a CPU", "apt-get install g++")
    return Finding("c++", OK, f"{found}, for precision.compile=true on a CPU")


def _memory() -> Finding:
    """What the machine has, or less where a control group says so."""
    words = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(words[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    limited = f", limited to {int(text) / GIB:.1f} GiB by its control group" if text.isdigit() else ""
    return Finding("memory", OK, f"{available / GIB:.1f} of {total / GIB:.1f} GiB available{limited}")


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shm", NOTE, "no /dev/shm", "mount one: NCCL wants it between ranks of a machine")
    size = shutil.disk_usage(place).total
    remedy = "raise it (docker run --shm-size=8g): NCCL needs it" if size < SHARED_MEMORY else ""
    return Finding("shm", NOTE if remedy else OK, f"{size / GIB:.2f} GiB in /dev/shm", remedy)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"ulimit -n {hard}" if soft < OPEN_FILES else ""
    return Finding("open files", NOTE if remedy else OK, f"{soft} (at most {hard})", remedy)


def folder(part: str, path: Path) -> Finding:
    """Whether a run could keep its state in `path`; its nearest existing parent is tried when it is new."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not place.is_dir():
        return Finding(part, BLOCKED, f"{path}: {place} is a file", f"set {part} to a folder")
    kind = file_system(place)
    try:
        _try_out(place)
    except OSError as error:
        remedy = f"set {part} to a folder that can be written and locked"
        return Finding(part, BLOCKED, f"{path}: {error.strerror or error} on {kind}", remedy)
    free = shutil.disk_usage(place).free
    found = f"{path}: {kind}, {free / GIB:.1f} GiB free; write, fsync, rename and lock work"
    if free < FREE_BYTES:
        return Finding(part, NOTE, found, "make room: a checkpoint of a full fine-tune takes 12 bytes per weight")
    return Finding(part, OK, found)


def file_system(place: Path) -> str:
    """Type of the file system that holds `place`."""
    mounts = (line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines())
    around = [(point, kind) for point, kind in mounts if place.is_relative_to(point)]
    return max(around, key=lambda mount: len(mount[0]))[1] if around else "unknown"


def _try_out(place: Path) -> None:
    """What a checkpoint does, in a folder of its own that is gone afterwards. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix=".sft-doctor-", dir=place) as trial:
        written, named = Path(trial, "written"), Path(trial, "named")
        with written.open("wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        written.rename(named)
        descriptor = os.open(trial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def optional(name: str, module: str, command: str, lost: str) -> Finding:
    """Present with its version, or missing with the reason, what is lost, and the command that adds it."""
    if importlib.util.find_spec(module) is None:
        return Finding(name, NOTE, f"not installed: {lost}", command)
    reason = import_fault(module)
    if reason is not None:
        return Finding(name, NOTE, f"cannot be imported ({reason}): {lost}", command)
    brought_by = importlib.metadata.packages_distributions().get(module)
    return Finding(name, OK, importlib.metadata.version(brought_by[0]) if brought_by else "present")


def import_fault(module: str) -> str | None:
    """Why `module` cannot be imported, one line; None when it can. What it prints meanwhile is dropped."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(module)
    except Exception as error:  # an extension may fail in any way while it is imported, and that is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _slurm() -> Finding:
    if shutil.which("sinfo") is None:
        return Finding("slurm", OK, "no sinfo: this machine submits to no Slurm")
    version = _output("sinfo", "--version")
    if version is None:
        return Finding("slurm", NOTE, "sinfo does not answer", "set SLURM_CONF, or submit from a login node")
    return Finding("slurm", OK, version.strip())


def _token() -> Finding:
    """Whether a hub token is there; never what it is."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    kept = Path(os.environ.get("HF_TOKEN_PATH", home / "token"))
    present = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")) or kept.is_file()
    return Finding("hub token", OK, "yes" if present else "no: gated models of the hub need one (hf auth login)")


def _output(*command: str) -> str | None:
    """Standard output; None when the program is absent, fails or takes over 10 seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _last_field(lines: list[str]) -> str:
    return lines[0].rsplit(",", 1)[-1].strip() if lines else "unknown"

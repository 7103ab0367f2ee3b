"""What a real run lets in and out: `python security.py FOLDER [PROMISE ...]`. Prints one line per promise kept.

sockets       while two ranks train, nothing of the job listens outside loopback
secrets       no canary from the environment is in any file or stream of a run that ends, of one that crashes or hangs
umask         what a run writes has the modes that the user's umask gives, for a private and for a shared folder
open folder   checkpoints that anyone may change are refused, until that is allowed
payloads      a pickle in place of any file of a run, its cache or its base model is never loaded
remote code   code beside a model is never run
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked
import torch
from tiny_run import write_recipe
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_dist.resilience.heartbeat import Heart

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "GOOGLE_API_KEY", "AZURE_STORAGE_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "COMET_API_KEY", "NEPTUNE_API_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "CLEARML_API_SECRET_KEY", "GITHUB_TOKEN", "SFT_RUN_SECRET", "DATABASE_URL",
)  # fmt: skip
KNOWN_CODES = {0, 2, 65, 74, 75}
LISTENING = "0A"


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    sections: dict[str, Any] = {
        "optim": {"max_steps": 6},
        "checkpoint": {"every_steps": 2},
        "eval": {"generate": 2, "max_new_tokens": 4, "every_steps": 3},
        "resilience": {"max_restarts": 0},
    }
    return write_recipe(folder, name, **{**sections, **changes})


def at_step(step: int, rank: int, action: Callable[[], None]) -> Callable[[int, int], None]:
    """What `Forked` calls in each rank: `action` at the beginning of the step, on one rank."""

    def before(this: int, attempt: int) -> None:
        beat = Heart.beat

        def beat_and_act(heart: Heart, now: int, phase: str) -> None:
            beat(heart, now, phase)
            if (now, phase, this) == (step, "train", rank):
                action()

        Heart.beat = beat_and_act  # type: ignore[method-assign]

    return before


# ---- sockets


def listening(pids: list[int]) -> Iterator[str]:
    """Addresses at which these processes listen, by /proc."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile: the folder that is being listed is one of them
                if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                    inodes.add(match[1])
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and words[9] in inodes:
                packed = bytes.fromhex(words[1].partition(":")[0])
                ordered = b"".join(packed[i : i + 4][::-1] for i in range(0, len(packed), 4))
                yield socket.inet_ntop(family, ordered)


def sockets(folder: Path) -> None:
    found = folder / "listening.json"

    def look() -> None:
        session = os.getsid(0)
        pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _session(int(p.name)) == session]
        assert len(pids) >= 3
        found.write_text(json.dumps(list(listening(pids))))

    assert forked.Forked(recipe(folder, "sockets"), 2, folder / "log.txt", at_step(3, 0, look)).run() == 0
    addresses = json.loads(found.read_text())
    assert addresses, "no listening socket was found: gloo has some, so the search is broken"
    assert set(addresses) <= {"127.0.0.1", "::1"}, addresses


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


# ---- secrets


def secrets(folder: Path) -> None:
    canaries = {name: f"canary-{name.lower()}-0123456789" for name in SECRETS}
    password = "canary-of-a-url-0123456789"
    os.environ.update(canaries)

    def crash() -> None:  # as libraries do it
        values = " ".join(f"{name}={os.environ[name]}" for name in SECRETS)
        raise RuntimeError(f"planted: GET https://me:{password}@example.com failed; headers and environment: {values}")

    def hang() -> None:
        time.sleep(600)

    try:
        endings: dict[str, Callable[[], None]] = {"ends": lambda: None, "crashes": crash, "hangs": hang}
        codes = {}
        for name, action in endings.items():
            path = recipe(
                folder, name, resilience={"max_restarts": 0, "hang_seconds": 5.0 if name == "hangs" else 60.0}
            )
            codes[name] = forked.Forked(path, 2, folder / f"{name}.txt", at_step(4, 1, action)).run()
    finally:
        for name in canaries:
            del os.environ[name]
    assert codes == {"ends": 0, "crashes": 1, "hangs": 71}, codes
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 50
    for path in files:
        data = path.read_bytes()
        leaked = [canary for canary in (*canaries.values(), password) if canary.encode() in data]
        assert not leaked, f"{path} holds {leaked}"
    crashed = next((folder / "crashes").rglob("rank_00001.log")).read_text()
    told = next(line for line in crashed.splitlines() if line.startswith("RuntimeError: planted"))
    assert told.count("[hidden]") == len(SECRETS) + 1, crashed


# ---- modes


def umask(folder: Path) -> None:
    for mask in (0o077, 0o002):
        before = os.umask(mask)
        try:
            place = folder / f"{mask:o}"
            assert forked.Forked(recipe(place, "run"), 1, place / "log.txt").run() == 0, (place / "log.txt").read_text()
        finally:
            os.umask(before)
        for path in place.rglob("*"):
            mode = stat.S_IMODE(path.lstat().st_mode)
            expected = (0o777 if path.is_dir() else 0o666) & ~mask
            assert mode & ~0o1000 == expected, f"{path}: mode {mode:o}, umask {mask:o} gives {expected:o}"


def open_folder(folder: Path) -> None:
    path, log = recipe(folder, "run"), folder / "log.txt"
    assert forked.Forked(path, 1, log, settings=["optim.stop_after_step=4"]).run() == 75
    shard = next((folder / "run/checkpoints/step-00000004").glob("shard-*"))
    for place in (folder / "run", folder / "run/checkpoints", shard.parent, shard):
        mode = stat.S_IMODE(place.stat().st_mode)
        place.chmod(mode | stat.S_IWOTH)
        log.unlink()
        assert forked.Forked(path, 1, log).run() == 65, log.read_text()
        assert f"{place}: anyone on this machine may change it" in log.read_text()
        assert "chmod -R o-w" in log.read_text() and "Traceback" not in log.read_text()
        place.chmod(mode)
    shard.chmod(0o666)
    assert forked.Forked(path, 1, log, settings=["checkpoint.trust_world_writable=true"]).run() == 0, log.read_text()


# ---- payloads


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def plant(path: Path, payload: Payload, kind: str) -> None:
    """A plain pickle, or the zip archive that torch.save writes."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
        archive.writestr("archive/version", "3\n")


def payloads(folder: Path) -> None:
    marker = folder / "it-ran"
    control = folder / "control"
    plant(control, Payload(marker), "pickle")
    pickle.loads(control.read_bytes())
    assert marker.is_dir(), "the payload does not even work"
    marker.rmdir()
    made = folder / "made"
    log = folder / "log.txt"
    assert forked.Forked(recipe(made, "run"), 1, log, settings=["optim.stop_after_step=4"]).run() == 75
    victims = [p for p in made.rglob("*") if p.is_file() and p.stat().st_size and "logs" not in p.parts]
    assert len(victims) > 20
    at, untold = made.rename(folder / "kept"), []
    for number, victim in enumerate(victims):
        shutil.copytree(at, made, copy_function=shutil.copy2)
        plant(victim, Payload(marker), ("pickle", "archive")[number % 2])
        log.unlink(missing_ok=True)
        code = forked.Forked(made / "run.yaml", 1, log).run()
        assert not marker.exists(), f"{victim}: its payload ran"
        if code not in KNOWN_CODES or "Traceback" in log.read_text():
            untold.append(f"{victim}: {code}\n{log.read_text()}")
        shutil.rmtree(made)
    assert not untold, "\n".join(untold)


def base_model(folder: Path, name: str) -> Path:
    place = folder / name
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def weights_in_pickles(folder: Path) -> None:
    marker = folder / "it-ran"
    for name in ("pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"):
        model = base_model(folder, "model")
        (model / "model.safetensors").unlink()
        plant(model / name, Payload(marker), "archive")
        path = recipe(folder, "run", model={"path": str(model), "init": "pretrained", "config": None})
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        assert forked.Forked(path, 1, log).run() == 2, log.read_text()
        assert not marker.exists() and "Traceback" not in log.read_text(), log.read_text()
        shutil.rmtree(model)


def remote_code(folder: Path) -> None:
    marker = folder / "it-ran"
    model = base_model(folder, "model")
    code = (
        f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import LlamaForCausalLM as Ours, LlamaConfig as Its\n"
    )
    (model / "theirs.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Its", "AutoModelForCausalLM": "theirs.Ours"}
    config["model_type"] = "theirs"
    (model / "config.json").write_text(json.dumps(config))
    path = recipe(folder, "run", model={"path": str(model), "init": "pretrained", "config": None})
    assert forked.Forked(path, 1, folder / "log.txt").run() == 2, (folder / "log.txt").read_text()
    assert not marker.exists() and "Traceback" not in (folder / "log.txt").read_text()


PROMISES = (sockets, secrets, umask, open_folder, payloads, weights_in_pickles, remote_code)


def main(folder: Path, names: list[str]) -> int:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for promise in PROMISES:
        if names and promise.__name__ not in names:
            continue
        place = folder / promise.__name__
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o755)
        started = time.monotonic()
        promise(place)
        print(f"{promise.__name__}: kept ({time.monotonic() - started:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

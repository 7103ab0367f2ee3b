"""The four entries reach the same worker: same losses to the last bit, no orphans, a dead run's folder free at once.

Each entry is killed (SIGKILL of the launcher alone) in the middle of a run and started again with the same command. Its
trajectory, half from before the kill and half from after, must equal that of one uninterrupted `sft-dist train`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import cells
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_dist.resilience.orphan import ancestors

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 120
KILL_AFTER = 55  # steps, with a checkpoint every 40
TRAJECTORY = ("step", "loss", "grad_norm", "lr", "num_tokens", "num_loss_tokens", "batch_digest")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
RECIPE = """
run: {name: entries, seed: 5}
model:
  init: random
  tokenizer: tokenizer
  config: {model_type: llama, vocab_size: 16, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
           num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128}
precision: {compute: float32}
tuning: {method: full}
data: {sources: [{path: data.jsonl}], seq_len: 64, eval_fraction: 0.05, cache_dir: cache}
batch: {tokens_per_micro_batch: 128, tokens_per_step: 512}
optim: {lr: 1e-3, max_steps: %d}
checkpoint: {every_steps: 40}
eval: {every_steps: 1000, generate: 0}
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def local() -> list[str]:
    return ["-m", "sft_dist", "train"]


def torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sft_dist.train"]


def accelerate() -> list[str]:
    ready = ["--config_file", str(ROOT / "launch" / "accelerate" / "ddp.yaml"), "--num_processes", "2"]
    return ["-m", "accelerate.commands.launch", *ready, "-m", "sft_dist.train"]


def deepspeed() -> list[str]:
    port = ["--master_port", str(free_port())]
    return ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", *port, "--module", "sft_dist.train"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a tokenizer and 200 short conversations; runs go below it."""
    folder = tmp_path_factory.mktemp("entries")
    vocabulary = ["<pad>", "</s>", "<user>", "<assistant>", *WORDS, "?", "!"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    with (folder / "data.jsonl").open("w") as file:
        for number in range(200):
            words = [WORDS[(number * (k + 3) + k) % 10] for k in range(2 + number % 17)]
            turns = [("user", " ".join(words) + " ?"), ("assistant", " ".join(reversed(words)))]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE % NUM_STEPS)
    return folder


class Run:
    """One launcher in a process of its own, with everything it starts."""

    def __init__(self, project: Path, name: str, command: list[str], *settings: str, nproc: bool = False) -> None:
        self.run_dir = project / "runs" / name
        words = [
            sys.executable,
            *command,
            "recipe.yaml",
            f"run.dir=runs/{name}",
            *settings,
            *(["--nproc", "2"] * nproc),
        ]
        search = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
        self.output = project / f"{name}.out"
        with self.output.open("a") as out:
            self.process = subprocess.Popen(
                words,
                cwd=project,
                env=os.environ | {"PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""},
                stdout=out,
                stderr=out,
            )

    def wait(self) -> int:
        return self.process.wait(timeout=300)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while num_lines(self.run_dir / "metrics.jsonl") < step:
            assert self.process.poll() is None, self.output.read_text()[-4000:]
            assert time.monotonic() < deadline, self.output.read_text()[-4000:]
            time.sleep(0.02)

    def descendants(self) -> list[int]:
        """Every process below the launcher, workers and launchers in between."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if any(above.pid == self.process.pid for above in ancestors(pid))]

    def clean_up(self) -> None:
        below = self.descendants() if self.process.poll() is None else []
        for pid in [self.process.pid, *below]:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., Run]]:
    """Starts launchers and leaves nothing of them."""
    started: list[Run] = []

    def begin(name: str, command: list[str], *settings: str, **options: Any) -> Run:
        started.append(Run(project, name, command, *settings, **options))
        return started[-1]

    yield begin
    for run in started:
        run.clean_up()


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those that are still there after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if not is_gone(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The step lines of metrics.jsonl, floats as they were written: equal text is equal bits."""
    lines = [json.loads(line, parse_float=str) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def trajectory(run_dir: Path) -> list[tuple[Any, ...]]:
    """What defines a run's numbers."""
    return [tuple(line[key] for key in TRAJECTORY) for line in steps(run_dir)]


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def reference(project: Path) -> Path:
    """The uninterrupted run, by our own launcher."""
    run = Run(project, "reference", local(), nproc=True)
    try:
        assert run.wait() == 0, run.output.read_text()[-4000:]
    finally:
        run.clean_up()
    assert [line[0] for line in trajectory(run.run_dir)] == list(range(1, NUM_STEPS + 1))
    return run.run_dir


ENTRIES = {entry.__name__: entry for entry in (local, torchrun, accelerate, deepspeed)}


@pytest.mark.parametrize("name", cells(ENTRIES, ["torchrun"]))
def test_killed_and_started_again_each_entry_gives_the_same_bits(
    name: str, start: Callable[..., Run], reference: Path
) -> None:
    entry, options = ENTRIES[name], {"nproc": name == "local"}
    first = start(name, entry(), **options)
    first.wait_for_step(KILL_AFTER)
    below = first.descendants()
    assert len(below) >= 2
    first.process.kill()  # the launcher alone
    first.process.wait()
    assert wait_until_gone(below, 5.0) == []

    second = start(name, entry(), **options)  # the folder is free at once
    assert second.wait() == 0, second.output.read_text()[-4000:]
    assert {line["attempt"] for line in steps(second.run_dir)} == {1, 2}
    assert trajectory(second.run_dir) == trajectory(reference)
    assert weights(second.run_dir) == weights(reference)
    assert (second.run_dir / "logs" / "attempt_0002" / "exit_code").read_text() == "0\n"


def test_a_finished_run_says_so_and_is_0(project: Path, start: Callable[..., Run], reference: Path) -> None:
    again = start("reference", local(), nproc=True)
    assert again.wait() == 0, again.output.read_text()[-4000:]
    assert "is finished" in again.output.read_text()


def test_accelerate_told_two_processes_that_starts_one_is_refused(start: Callable[..., Run]) -> None:
    run = start(
        "one-of-two", ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "sft_dist.train"]
    )
    assert run.wait() != 0
    assert "accelerate launch was told to start 2 processes and started 1" in run.output.read_text()


@pytest.mark.parametrize("launcher", cells(["local", "torchrun", "accelerate", "deepspeed"], ["torchrun", "deepspeed"]))
def test_worker_sh_stops_on_a_signal_and_translates_the_exit_code(
    launcher: str, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(f"worker-{launcher}", worker_sh(launcher, monkeypatch))
    run.wait_for_step(20)
    heard = {address for pid in run.descendants() for address in listening(pid)}
    assert heard and heard <= {"127.0.0.1", "::1"}
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.output.read_text()[-4000:]
    assert 20 <= len(steps(run.run_dir)) < NUM_STEPS


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens."""
    owned = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            owned.add(os.readlink(descriptor))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned:
                words = bytes.fromhex(fields[1].partition(":")[0])
                swapped = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, swapped))
    return found


def test_the_ready_accelerate_file_gives_the_steps_of_its_strategy(start: Callable[..., Run]) -> None:
    """launch/accelerate/fsdp2.yaml beside parallel.strategy=fsdp2; no other word of the recipe is said."""
    short = ("optim.max_steps=6", "checkpoint.every_steps=6")
    ready = ["--config_file", str(ROOT / "launch" / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"]
    by_hand = start("ready", ["-m", "accelerate.commands.launch", *ready, "-m", "sft_dist.train"], *short)
    assert by_hand.wait() == 0, by_hand.output.read_text()[-4000:]
    ours = start("fsdp2", local(), "parallel.strategy=fsdp2", *short, nproc=True)
    assert ours.wait() == 0, ours.output.read_text()[-4000:]
    assert "parallel.strategy=fsdp2 taken from ACCELERATE_USE_FSDP" in by_hand.output.read_text()
    assert len(trajectory(by_hand.run_dir)) == 6 and trajectory(by_hand.run_dir) == trajectory(ours.run_dir)


def test_worker_sh_translates_a_refusal(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("wrong", worker_sh("torchrun", monkeypatch), "optim.lrr=1")
    assert run.wait() == 2, run.output.read_text()[-4000:]
    assert "optim.lrr" in run.output.read_text()


def test_sigkill_of_worker_sh_leaves_no_orphan(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("killed-worker", worker_sh("torchrun", monkeypatch))
    run.wait_for_step(5)
    below = run.descendants()
    run.process.kill()
    run.process.wait()
    workers = [pid for pid in below if b"sft_dist.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert wait_until_gone(workers, 5.0) == []
    assert wait_until_gone(below, 30.0) == []  # torchrun notices that its workers are gone


def worker_sh(launcher: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Python's words that become launch/worker.sh with two processes of `launcher`."""
    for name, value in (("SFT_LAUNCHER", launcher), ("SFT_NPROC", "2"), ("SFT_PYTHON", sys.executable)):
        monkeypatch.setenv(name, value)
    return ["-c", "import os, sys; os.execv(sys.argv[1], sys.argv[1:])", str(ROOT / "launch" / "worker.sh")]

"""A complete run small enough for a test: a character tokenizer, sixty records, a random two-layer Llama."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from line_server import LineServer
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240
TRAJECTORY = ("step", "loss", "grad_norm", "lr", "num_tokens", "num_loss_tokens", "batch_digest")
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SFT_RENDEZVOUS",
)


def write_tokenizer(folder: Path) -> Path:
    """One token per character, every printable ASCII character and the newline."""
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, name: str = "run", **changes: dict[str, Any]) -> Path:
    """FOLDER/NAME.yaml for a run into FOLDER/NAME; `changes` are laid over its sections."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.json"
    if not data.exists():
        records = [{"instruction": f"Say {n} twice.", "input": "", "output": f"{n} {n}"} for n in range(10, 70)]
        data.write_text(json.dumps(records))
        write_tokenizer(folder / "tokenizer")
    architecture = {
        "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    recipe: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / name), "seed": 3},
        "model": {"init": "random", "config": architecture, "tokenizer": str(folder / "tokenizer")},
        "precision": {"compute": "float32"},
        "data": {"sources": [{"path": str(data)}], "chat_template": "alpaca", "seq_len": 512, "eval_fraction": 0.1},
        "batch": {"tokens_per_micro_batch": 512, "tokens_per_step": 1024},
        "optim": {"lr": 1e-3, "max_steps": 12},
        "checkpoint": {"every_steps": 3, "async": False},  # there at its step: tests kill and look by the step
        "eval": {"generate": 2, "max_new_tokens": 8, "every_steps": 6},
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, without GPUs and hubs."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return (
        kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | extra
    )


def start(*arguments: str, **extra: str) -> subprocess.Popen[str]:
    """`sft-dist ARGUMENTS` as a process of its own session, output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "sft_dist", *arguments],
        env=environment(**extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def train(recipe: Path, *arguments: str, code: int = 0) -> str:
    """Run to the end; fails unless it exits with `code`. Returns what it printed."""
    return command("train", str(recipe), *arguments, code=code)


def command(*arguments: str, code: int = 0) -> str:
    """`sft-dist ARGUMENTS` to its end, forked from a process that has imported the libraries; fails unless it exits
    with `code`. Returns what it printed."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as file:
        asked = {"words": arguments, "environment": environment(), "output": file.name, "seconds": SECONDS}
        found, output = _server().ask(asked)["code"], file.read()
    assert found == code, output
    return output


@cache
def _server() -> LineServer:
    """One for all tests of this process."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    return LineServer(ROOT / "tests" / "command_server.py", environment(PYTHONPATH=paths))


def kill_after(recipe: Path, run_dir: Path, step: int, nproc: int) -> None:
    """Start the run and SIGKILL its launcher once the line of `step` is in metrics.jsonl and a checkpoint is there."""
    process = start("train", str(recipe), "--nproc", str(nproc))
    deadline = time.monotonic() + SECONDS
    while len(lines(run_dir, "step")) < step or not any((run_dir / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        os.sched_yield()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # returns once every process that holds the pipe is gone


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """metrics.jsonl lines of one kind."""
    text = (run_dir / "metrics.jsonl").read_text() if (run_dir / "metrics.jsonl").exists() else ""
    records = [json.loads(line) for line in text.split("\n")[:-1]]
    return [record for record in records if record["kind"] == kind]


def trajectory(run_dir: Path) -> list[tuple[Any, ...]]:
    """What "the same trajectory" compares, step by step."""
    return [tuple(record[field] for field in TRAJECTORY) for record in lines(run_dir, "step")]


def weights(run_dir: Path) -> dict[str, bytes]:
    """Exported tensors as bytes, by name."""
    (path,) = (run_dir / "export").glob("*model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}

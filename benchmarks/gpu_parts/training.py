"""One bf16 run of a 0.5B-shaped random model through the command line, as a user would start it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpu_parts.bench import Place, Row

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def training(place: Place) -> Iterator[Row]:
    """Generate data, train, read metrics.jsonl: loss, tokens/s, MFU, memory."""
    with tempfile.TemporaryDirectory(prefix="sft-gpu-check-") as folder:
        work = Path(folder)
        records = generate(work, place.size(12_000, 300))
        byte_tokenizer(work / "tokenizer")
        recipe = work / "recipe.json"
        recipe.write_text(json.dumps(recipe_of(work, records, place)))  # JSON is YAML
        launch([sys.executable, "-m", "sft_dist", "train", str(recipe), "--nproc", "1"], work, timeout=420)
        lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    late = steps[len(steps) // 2 :]
    first, last = steps[0]["loss"], statistics.fmean(s["loss"] for s in steps[-3:])
    what = f"{'toy' if place.rehearsal else '0.5B-shaped'} random model, bf16, {len(steps)} steps"
    yield Row("training", what, f"loss {first:.3f} -> {last:.3f}", "ok" if last < 0.7 * first else "FAIL")
    rate = statistics.median(s["tokens_per_second"] for s in late)
    share = sum(s["num_loss_tokens"] for s in late) / sum(s["num_tokens"] for s in late)
    mfu = statistics.median(s["mfu"] or 0.0 for s in late)
    figure = f"{rate:,.0f} tokens/s ({share:.0%} supervised), MFU {mfu:.1%}, {steps[-1]['peak_memory_gib']:.1f} GiB"
    yield Row("training", what, figure, "info")


def generate(work: Path, num_records: int) -> Path:
    """The project's own instruction skills as messages; returns the training file."""
    out = work / "data"
    arguments = ["--out", str(out), "--seed", "0", "--train", str(num_records), "--test", "40"]
    launch([sys.executable, "-m", "sft_dist.generate.skills", *arguments], work, timeout=120)
    return max(out.glob("*.jsonl"), key=lambda path: path.stat().st_size)


def launch(command: list[str], work: Path, timeout: int) -> None:
    """Run to the end from the checkout; raises with the last line of its errors."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        tail = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"{' '.join(command[1:4])} left with {done.returncode}: {''.join(tail)}")


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer that needs no training: one token per byte, and chatml's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0]).save_pretrained(folder)


def recipe_of(work: Path, records: Path, place: Place) -> dict[str, Any]:
    """Qwen2.5-0.5B's shape with random weights; every size that matters is written out."""
    seq_len = place.size(2048, 256)
    shape = {
        "model_type": "qwen2", "vocab_size": place.size(151_936, 512), "hidden_size": place.size(896, 32),
        "intermediate_size": place.size(4864, 64), "num_hidden_layers": place.size(24, 2),
        "num_attention_heads": place.size(14, 2), "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    return {
        "run": {"name": "gpu-check", "dir": str(work / "run")},
        "model": {"init": "random", "config": shape, "tokenizer": str(work / "tokenizer")},
        "precision": {"compute": "float32" if place.rehearsal else "bfloat16"},
        "data": {
            "sources": [{"path": str(records), "format": "messages"}], "chat_template": "chatml", "seq_len": seq_len,
            "cache_dir": str(work / "cache"),
        },
        "batch": {"tokens_per_micro_batch": place.size(8, 2) * seq_len, "tokens_per_step": place.size(16, 4) * seq_len},
        "optim": {"lr": 3e-4 if not place.rehearsal else 1e-2, "max_steps": STEPS, "warmup_fraction": 0.1},
        "eval": {"generate": 0, "every_steps": STEPS},
        "checkpoint": {"every_steps": STEPS},
    }  # fmt: skip

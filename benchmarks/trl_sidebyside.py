"""One fine-tune, twice: this project and TRL's SFTTrainer, on a CPU, end to end.

    python benchmarks/trl_sidebyside.py [--steps 12] [--repeats 3] [--out benchmarks/results/trl_sidebyside.md]

Same weights, same token ids and labels (prepared once, handed to both), packing on for both (`best_fit` here, `bfd`
there), sdpa, fp32, AdamW, constant learning rate, same tokens per step, same number of steps and threads. Every run is
a process of its own, the sides take turns, and peak memory is what the kernel counted for the process. TRL runs
without gradient checkpointing (its default is on, and slower), and its step time leaves out fetching the batch; ours
includes it. At the end a third program, stock transformers, measures the held-out loss of the base model and of both
results: that is the loss parity.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models" / "stories260K"
DATA = SHARED / "data" / "instruct" / "rasbt_instruction_data.json"
RESULT = Path(__file__).parent / "results" / "trl_sidebyside.md"
SEQ_LEN, PACKS, LEARNING_RATE, SEED = 512, 8, 1e-3, 0
WARM_UP_STEPS = 3  # left out of the rates
VERSIONS = ("torch", "transformers", "trl", "accelerate")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)  # what a child process does
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        PARTS[options.part](options)
        return 0
    if not (MODEL.is_dir() and DATA.is_file()):
        print(f"trl_sidebyside: {MODEL} or {DATA} is not on this machine: nothing to compare")
        return 0
    with tempfile.TemporaryDirectory(prefix="sft-trl-") as folder:
        text = compare(Path(folder), options.steps, options.repeats)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    return 0


def compare(work: Path, steps: int, repeats: int) -> str:
    """Prepare, run the sides in turn, judge, and write the page."""
    child("prepare", work, work, steps)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for number in range(repeats):
        for side, results in runs.items():
            folder = work / f"{side}-{number}"
            folder.mkdir()
            used = child(side, work, folder, steps)
            results.append(json.loads((folder / "result.json").read_text()) | used)
            print(f"{side} {number}: {rate(results[-1]['steps'], 'tokens'):,.0f} tokens/s", flush=True)
    child("judge", work, work, steps)
    return page(runs, json.loads((work / "judged.json").read_text()), steps)


def child(part: str, work: Path, run: Path, steps: int) -> dict[str, float]:
    """Run one part in a process of its own; returns its peak resident memory and CPU time, start and end included."""
    command = [sys.executable, __file__, "--part", part, "--work", str(work), "--run", str(run), "--steps", str(steps)]
    log = run / f"{part}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{part} left with {process.returncode}:\n{log.read_text()[-2000:]}")
    return {"peak_mib": usage.ru_maxrss / 1024, "cpu_seconds": usage.ru_utime + usage.ru_stime}


# --- what the children do ---------------------------------------------------------------------------------------------


def prepare_documents(options: argparse.Namespace) -> None:
    """Tokenise once with this project's pipeline; both sides train on exactly these ids and labels."""
    from sft_dist.config.loader import load_recipe
    from sft_dist.data.prepare import prepare
    from sft_dist.models.load import load_tokenizer

    path = options.work / "recipe.yaml"
    path.write_text(json.dumps(recipe(options.work, options.steps)))  # JSON is YAML
    loaded = load_recipe([path])
    data = prepare(loaded, load_tokenizer(loaded.model), notice=print)
    assert data.eval is not None
    documents = {name: [document(e) for e in store] for name, store in (("train", data.train), ("eval", data.eval))}
    (options.work / "documents.json").write_text(json.dumps(documents))


def document(example: Any) -> dict[str, list[int]]:
    """One example as TRL takes it: labels are the ids, -100 where nothing is learned."""
    ids = example.input_ids.tolist()
    labels = [i if w > 0 else -100 for i, w in zip(ids, example.loss_weights.tolist(), strict=True)]
    return {"input_ids": ids, "labels": labels}


def train_ours(options: argparse.Namespace) -> None:
    """`sft-dist train` in this process; the steps are what it wrote to metrics.jsonl."""
    from sft_dist import worker

    run_dir = options.run / "run"
    code = worker.main([str(options.work / "recipe.yaml"), f"run.dir={run_dir}"])
    assert code == 0, code
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [
        {"loss": x["loss"], "seconds": x["step_seconds"], "tokens": x["num_tokens"], "supervised": x["num_loss_tokens"]}
        for x in lines
        if x["kind"] == "step"
    ]
    finish(options.run, steps, run_dir / "export")


def train_trl(options: argparse.Namespace) -> None:
    """SFTTrainer on the same documents; the steps are timed by a callback around each of them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    steps: list[dict[str, float]] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            steps.append({"started": time.perf_counter()})

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps[-1]["seconds"] = time.perf_counter() - steps[-1].pop("started")

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens, supervised = inputs["input_ids"].numel(), int((inputs["labels"][:, 1:] != -100).sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            steps[-1].update(loss=loss.item(), tokens=tokens, supervised=supervised)
            return loss

    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa"),
        args=SFTConfig(
            output_dir=str(options.run / "trainer"), max_steps=options.steps, per_device_train_batch_size=PACKS,
            gradient_accumulation_steps=1, packing=True, packing_strategy="bfd", max_length=SEQ_LEN,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
            max_grad_norm=1.0, gradient_checkpointing=False, use_cpu=True, bf16=False, seed=SEED, save_strategy="no",
            logging_steps=10, report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(json.loads((options.work / "documents.json").read_text())["train"]),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        callbacks=[Timer()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(options.run / "export"))
    finish(options.run, steps, options.run / "export")


def finish(run: Path, steps: list[dict[str, float]], export: Path) -> None:
    (run / "result.json").write_text(json.dumps({"steps": steps, "export": str(export)}))


def judge(options: argparse.Namespace) -> None:
    """Mean held-out loss per supervised token, by stock transformers one document at a time: base and every result."""
    import torch
    from transformers import AutoModelForCausalLM

    documents = json.loads((options.work / "documents.json").read_text())["eval"]
    results = {p.parent.name: json.loads(p.read_text())["export"] for p in sorted(options.work.glob("*/result.json"))}
    judged = {}
    for name, path in {"base": str(MODEL), **results}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        total = count = 0.0
        with torch.no_grad():
            for doc in documents:
                targets = torch.tensor(doc["labels"][1:])
                logits = model(torch.tensor([doc["input_ids"]]), use_cache=False).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
                count += int((targets != -100).sum())
        judged[name] = total / count
    (options.work / "judged.json").write_text(json.dumps(judged))


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prepare": prepare_documents,
    "ours": train_ours,
    "trl": train_trl,
    "judge": judge,
}


def recipe(work: Path, steps: int) -> dict[str, Any]:
    """Our side's recipe; every number that defines the training is TRL's above."""
    return {
        "run": {"name": "sidebyside", "dir": str(work / "unused"), "seed": SEED},
        "model": {"path": str(MODEL)},
        "precision": {"compute": "float32"},
        "data": {
            "sources": [{"path": str(DATA), "format": "alpaca"}], "chat_template": "alpaca", "seq_len": SEQ_LEN,
            "eval_fraction": 0.1, "cache_dir": str(work / "cache"),
        },
        "batch": {"tokens_per_micro_batch": PACKS * SEQ_LEN, "tokens_per_step": PACKS * SEQ_LEN},
        "optim": {"lr": LEARNING_RATE, "schedule": "constant", "warmup_fraction": 0.0, "max_steps": steps},
        "eval": {"generate": 0, "every_steps": steps},
        "checkpoint": {"every_steps": steps},
    }  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def rate(steps: list[dict[str, float]], what: str) -> float:
    """Tokens per second over the steps after the warm-up."""
    late = steps[WARM_UP_STEPS:]
    return sum(s[what] for s in late) / sum(s["seconds"] for s in late)


def page(runs: dict[str, list[dict[str, Any]]], judged: dict[str, float], steps: int) -> str:
    """The result page: ratios of medians, and of the best runs, then the losses."""
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "tokens/s": lambda run: rate(run["steps"], "tokens"),
        "supervised tokens/s": lambda run: rate(run["steps"], "supervised"),
        "peak RSS, MiB": lambda run: run["peak_mib"],
        "CPU seconds of the process": lambda run: run["cpu_seconds"],
    }
    lines = []
    for name, figure in figures.items():
        ours, trl = ([figure(run) for run in runs[side]] for side in ("ours", "trl"))
        best = max if "tokens" in name else min
        medians, bests = ((f(ours), f(trl)) for f in (statistics.median, best))
        cells = [f"{m:,.0f} / {b:,.0f}" for m, b in zip(medians, bests, strict=True)]
        lines.append(
            f"| {name} | {cells[0]} | {cells[1]} | {medians[0] / medians[1]:.2f} / {bests[0] / bests[1]:.2f} |"
        )
    trained = {side: [v for k, v in judged.items() if k.startswith(f"{side}-")] for side in ("ours", "trl")}
    first = {side: results[0]["steps"] for side, results in runs.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    return "\n".join(
        [
            "# End to end beside TRL's SFTTrainer",
            "",
            f"`python benchmarks/trl_sidebyside.py`, {datetime.date.today()}, {os.cpu_count()} cores,",
            f"{platform.machine()}, {versions}.",
            "stories260K, rasbt instruction data (alpaca template), fp32, sdpa, packing on,",
            f"{PACKS} x {SEQ_LEN} tokens a step, {steps} steps, {len(runs['ours'])} interleaved runs,",
            "each in a process of its own. Rates leave out the first",
            f"{WARM_UP_STEPS} steps. A ratio above 1 is good for rates, below 1 for costs.",
            "",
            "| | ours (median / best) | TRL (median / best) | ratio ours : TRL (medians / bests) |",
            "|---|---|---|---|",
            *lines,
            "",
            "Loss parity (the two shuffle and pack differently, so their batches differ):",
            "",
            "| | ours | TRL |",
            "|---|---|---|",
            f"| training loss, step 1 | {first['ours'][0]['loss']:.4f} | {first['trl'][0]['loss']:.4f} |",
            f"| training loss, mean of the last 10 steps | {tail(first['ours']):.4f} | {tail(first['trl']):.4f} |",
            f"| held-out loss before (stock transformers) | {judged['base']:.4f} | {judged['base']:.4f} |",
            f"| held-out loss after (stock transformers) | {trained['ours'][0]:.4f} | {trained['trl'][0]:.4f} |",
            f"| supervised tokens trained | {total(first['ours']):,.0f} | {total(first['trl']):,.0f} |",
            "",
        ]
    )


def tail(steps: list[dict[str, float]]) -> float:
    """Loss per supervised token over the last ten steps."""
    late = steps[-10:]
    return sum(s["loss"] * s["supervised"] for s in late) / sum(s["supervised"] for s in late)


def total(steps: list[dict[str, float]]) -> float:
    return sum(s["supervised"] for s in steps)


if __name__ == "__main__":
    sys.exit(main())

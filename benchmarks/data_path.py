"""From a file of chats to packed batches with loss masks, beside TRL and Axolotl; and how long a loop waits for data.

    pip install --no-deps --target PEERS axolotl==0.19.0 trl==1.9.0 addict colorama posthog  # TRL 1.16: the bench extra
    python benchmarks/data_path.py [--rows 200000] [--repeats 1] [--peers PEERS] [--out benchmarks/results/data_path.md]

Same file, same tokenizer (GPT-2's), same chat template (TRL's `qwen2_5_training`, whose generation tags TRL needs for
its mask), sequences of 2048, packing on both sides, loss on the assistant's tokens only; nothing is cached. The clock
runs from the file to the last batch of one epoch. TRL prepares the way its SFTTrainer does, with one and with two
processes; so do we. Axolotl does what `axolotl preprocess` does (its chat_template strategy), then packs and collates
as its trainer does; it needs an older TRL than the one measured here and has its own in PEERS, before this machine's
packages. Sides take turns, each run a process of its own. The numbers of supervised tokens are compared: a faster
reader that drops something would show. Axolotl finds the answer and its stop token by itself; the template's tags also
hold the line end before and behind, two tokens a chat.

The stall is measured in a run of its own: the share of a step that the loop spends waiting for the next batch while a
step computes for 50 ms.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import resource
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
SHARED = ROOT.parent / "shared" / "data"
RESULT = Path(__file__).parent / "results" / "data_path.md"
TEMPLATE = SHARED / "chat_templates" / "trl" / "qwen2_5_training.jinja"
SEQ_LEN, STEP_SECONDS, STEPS, ROWS_OF_STALL = 2048, 0.05, 100, 20_000
LINE_ENDS = 2  # tokens of each chat inside the template's generation tags and outside of Axolotl's mask
VERSIONS = ("trl", "transformers", "tokenizers", "tiktoken", "datasets", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peers", type=Path, help="folder that Axolotl was installed into with pip --target")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.file)))
        return 0
    if not TEMPLATE.is_file():
        print(f"data_path: {SHARED} is not on this machine: nothing to read")
        return 0
    with tempfile.TemporaryDirectory(prefix="sft-data-") as folder:
        file = Path(folder) / "chats.jsonl"
        write_chats(file, options.rows)
        sides = [name for name in SIDES if options.peers or name not in IN_PEERS]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*sides, "stall")}
        for _ in range(options.repeats):
            for name in sides:
                runs[name].append(run(name, file, options.peers))
        write_chats(file, min(options.rows, ROWS_OF_STALL))
        runs["stall"].append(run("stall", file, None))
    text = report(runs, options)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    return 0


class Clock:
    """Wall-clock and processor seconds since it was made, those of ended child processes included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._used()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._wall, "cpu": self._used() - self._cpu}

    def _used(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)


def write_chats(file: Path, rows: int) -> None:
    """Alpaca records as two-message chats, repeated with a number until there are enough."""
    with gzip.open(SHARED / "instruct" / "alpaca_subset.json.gz") as packed:
        records = [record for record in json.load(packed) if record["output"].strip()]
    with open(file, "w", encoding="utf-8") as out:
        for number in range(rows):
            record = records[number % len(records)]
            asked = f"{record['instruction']} {record['input']} ({number})"
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"].strip()}]
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def run(name: str, file: Path, peers: Path | None) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--part", name, "--file", str(file)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"  # this checkout, in its worker processes too
    if name in IN_PEERS:
        quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "AXOLOTL_IS_PREPROCESS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        env |= quiet | {"PYTHONPATH": os.pathsep.join(map(str, (peers and peers.resolve(), env["PYTHONPATH"])))}
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}: {found}", file=sys.stderr)
    return found


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    path = str(SHARED / "tokenizers" / "gpt2" / "tokenizer.json")
    loaded = PreTrainedTokenizerFast(tokenizer_file=path, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    loaded.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    loaded.chat_template = TEMPLATE.read_text()
    return loaded


def prepare_ours(file: Path, folder: str, words: Any, num_workers: int = 0) -> tuple[Any, Any]:
    """(store, plan) of the file, nothing cached; with no workers everything is done in this process."""
    from sft_dist.config.schema import Recipe
    from sft_dist.data.plan import build_plan
    from sft_dist.data.prepare import prepare

    data = {"sources": [{"path": str(file)}], "chat_template": "auto", "seq_len": SEQ_LEN, "eval_fraction": 0.0}
    recipe = Recipe(model={"path": "none"}, run={"dir": f"{folder}/run"}, data=data | {"workers": num_workers})
    store = prepare(recipe, words, notice=lambda text: None).train
    plan = build_plan(
        lengths=store.lengths,
        num_loss_tokens=store.num_loss_tokens,
        loss_weight_sums=store.loss_weight_sums,
        seq_len=SEQ_LEN,
        packing="best_fit",
        packs_per_micro_batch=4,
        micro_batches_per_step=1,
        examples_per_step=None,
        seed=0,
        epochs=1,
        max_steps=None,
        store_fingerprint=store.fingerprint,
    )
    return store, plan


def open_loader(store: Any, plan: Any) -> Any:
    from sft_dist.data.loader import Loader

    return Loader(store, plan, rank=0, world_size=1, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8)


def ours(file: Path, num_workers: int) -> dict[str, Any]:
    import torch  # noqa: F401 (both sides have paid for their imports when the clock starts)
    import transformers  # noqa: F401

    import sft_dist.data.compiled
    import sft_dist.data.loader
    import sft_dist.data.prepare  # noqa: F401

    words = tokenizer()
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="sft-data-") as folder:
        store, plan = prepare_ours(file, folder, words, num_workers)
        tokens = supervised = 0
        with open_loader(store, plan) as loader:
            for number in range(1, plan.num_steps + 1):
                for batch in loader.step(number).batches:
                    tokens += batch.num_tokens
                    supervised += int((batch.labels != -100).sum())
        return {**clock.read(), "tokens": tokens, "supervised": supervised, "efficiency": plan.efficiency}


def trl(file: Path, num_processes: int) -> dict[str, Any]:
    """SFTTrainer's own preparation and data loader; the model is as small as one can be."""
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sft-data-") as folder:
        settings = SFTConfig(
            output_dir=folder, packing=True, packing_strategy="bfd", max_length=SEQ_LEN, assistant_only_loss=True,
            dataset_num_proc=num_processes, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
            dataloader_num_workers=0, gradient_checkpointing=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        clock = Clock()
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=f"{folder}/cache")
        trainer = SFTTrainer(model, args=settings, train_dataset=rows, processing_class=words)
        tokens = supervised = 0
        for batch in trainer.get_train_dataloader():
            labels = batch["labels"]
            starts = batch["position_ids"] == 0 if "position_ids" in batch else torch.zeros_like(labels, dtype=bool)
            tokens += labels.numel()
            supervised += int(((labels != -100) & ~starts).sum())
        return {**clock.read(), "tokens": tokens, "supervised": supervised}


def axolotl(file: Path, num_processes: int) -> dict[str, Any]:
    """`axolotl preprocess`, its multipack sampler and its collator; a micro-batch of 4 sequences is one row to it."""
    import datasets
    from axolotl.monkeypatch.data.batch_dataset_fetcher import apply_multipack_dataloader_patch
    from axolotl.prompt_strategies import chat_template  # noqa: F401
    from axolotl.utils.collators import BatchSamplerDataCollatorForSeq2Seq
    from axolotl.utils.data.sft import prepare_datasets
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.samplers.multipack import MultipackBatchSampler
    from axolotl.utils.samplers.utils import get_dataset_lengths
    from torch.utils.data import DataLoader, RandomSampler

    datasets.disable_progress_bars()
    apply_multipack_dataloader_patch()
    words = tokenizer()
    source = {
        "path": str(file), "ds_type": "json", "split": "train", "type": "chat_template", "field_messages": "messages",
        "roles_to_train": ["assistant"], "train_on_eos": "turn",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sft-data-") as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        settings = DictDefault(
            sequence_len=SEQ_LEN, sample_packing=True, pad_to_sequence_len=True, micro_batch_size=4, batch_size=4,
            gradient_accumulation_steps=1, num_epochs=1, val_set_size=0.0, seed=0, chat_template="tokenizer_default",
            dataset_prepared_path=f"{folder}/prepared", dataset_num_proc=num_processes, train_on_inputs=False,
            excess_length_strategy="drop", datasets=[source],
        )  # fmt: skip
        clock = Clock()
        rows, _, _, _ = prepare_datasets(settings, words)
        width = 4 * SEQ_LEN
        sampler = MultipackBatchSampler(
            RandomSampler(rows), lengths=get_dataset_lengths(rows), batch_max_len=width, batch_size=1,
            group_size=100_000, bin_size=200, drop_last=False, num_processes=num_processes, mp_start_method="fork",
        )  # fmt: skip
        collate = BatchSamplerDataCollatorForSeq2Seq(words, padding=True, pad_to_multiple_of=width)
        tokens = supervised = 0
        for batch in DataLoader(rows.remove_columns(["length"]), batch_sampler=sampler, collate_fn=collate):
            tokens += batch["labels"].numel()
            supervised += int(((batch["labels"] != -100) & (batch["position_ids"] != 0)).sum())
        return {**clock.read(), "tokens": tokens, "supervised": supervised}


def stall(file: Path) -> dict[str, Any]:
    """Waiting for the next batch as a share of the step, while a step computes for a fixed time."""
    import torch

    torch.set_num_threads(1)  # as in a run: one thread a rank, so that a core is left for the loader's
    with tempfile.TemporaryDirectory(prefix="sft-data-") as folder:
        store, plan = prepare_ours(file, folder, tokenizer())
        with open_loader(store, plan) as loader:
            loader.step(1)
            waited: list[float] = []
            started = time.perf_counter()
            steps = min(STEPS, plan.num_steps - 1)
            matrix = torch.randn(512, 512)
            for number in range(2, steps + 2):
                asked = time.perf_counter()
                loader.step(number)
                waited.append(time.perf_counter() - asked)
                ends = time.perf_counter() + STEP_SECONDS
                while time.perf_counter() < ends:  # compute, as a step does: it lets go of the interpreter's lock
                    matrix = torch.tanh(matrix @ matrix)
            whole = time.perf_counter() - started
            return {"share": sum(waited) / whole, "median": statistics.median(waited) * steps / whole, "steps": steps}


SIDES = {  # part -> what it is, and the part of ours that works with as many processes
    "ours_1": ("sft_dist, one process", "ours_1"),
    "ours_2": ("sft_dist, two workers", "ours_2"),
    "trl_1": ("TRL, dataset_num_proc=1", "ours_1"),
    "trl_2": ("TRL, dataset_num_proc=2", "ours_2"),
    "axolotl_1": ("Axolotl, dataset_num_proc=1", "ours_1"),
    "axolotl_2": ("Axolotl, dataset_num_proc=2", "ours_2"),
}
IN_PEERS = ("axolotl_1", "axolotl_2")
PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ours_1": lambda file: ours(file, 0),
    "ours_2": lambda file: ours(file, 2),
    "trl_1": lambda file: trl(file, 1),
    "trl_2": lambda file: trl(file, 2),
    "axolotl_1": lambda file: axolotl(file, 1),
    "axolotl_2": lambda file: axolotl(file, 2),
    "stall": stall,
}


def report(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    if options.peers:
        found = {one.name: one.version for one in importlib.metadata.distributions(path=[str(options.peers)])}
        versions += f", axolotl {found['axolotl']} with trl {found['trl']}"
    note = (
        "\nAxolotl's mask leaves out two line ends of each chat that the template's tags hold." if options.peers else ""
    )
    sides = [name for name in SIDES if name in runs]
    rates = {name: [r["supervised"] / r["seconds"] for r in runs[name]] for name in sides}
    tokens = {name: runs[name][0]["supervised"] for name in sides}
    same_mask = {tokens[name] + (LINE_ENDS * options.rows if name in IN_PEERS else 0) for name in sides}
    assert len(same_mask) == 1, f"the sides do not supervise the same tokens: {tokens}"
    seconds, cpu = (
        {name: statistics.median(r[what] for r in runs[name]) for name in sides} for what in ("seconds", "cpu")
    )
    table = "\n".join(
        f"| {label} | {seconds[name]:.1f} | {statistics.median(rates[name]):,.0f} | {max(rates[name]):,.0f} | "
        f"{tokens[name]:,} | {seconds[name] / seconds[same]:.2f} x | {cpu[name]:.1f} | {cpu[name] / cpu[same]:.2f} x |"
        for name, (label, same) in ((name, SIDES[name]) for name in sides)
    )
    return f"""# From a file of chats to packed batches

`python benchmarks/data_path.py --rows {options.rows}`, {datetime.date.today()}, {os.cpu_count()} cores,
{platform.machine()}, {versions}.
{options.rows:,} two-message chats, GPT-2 tokenizer, `qwen2_5_training` template, sequences of {SEQ_LEN},
best-fit packing, loss on the assistant's tokens, {options.repeats} interleaved runs, nothing cached. Ratios: a side's
seconds over ours with as many processes; CPU seconds are those of all processes.{note}

| | seconds (median) | supervised tokens/s (median) | best | supervised tokens | over ours | CPU seconds | over ours |
|---|---|---|---|---|---|---|---|
{table}

Waiting for the next batch: {runs["stall"][0]["median"]:.2%} of a step of {STEP_SECONDS * 1000:.0f} ms (median;
{runs["stall"][0]["share"]:.2%} on average), over {runs["stall"][0]["steps"]} steps of 4 x {SEQ_LEN} tokens. On a
machine that others use too, the average counts the times that the process was not running at all.
"""


if __name__ == "__main__":
    sys.exit(main())

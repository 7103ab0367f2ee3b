"""The estimate: parameters equal transformers', activations what autograd keeps, states what processes hold."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from sft_dist.certify import Documents
from sft_dist.cli import main as cli
from sft_dist.config.loader import load_recipe
from sft_dist.config.schema import OptimSection, Recipe, TuningSection
from sft_dist.config.shipped import CHECKOUT
from sft_dist.data.collate import collate
from sft_dist.data.store import write_store
from sft_dist.errors import ConfigError
from sft_dist.estimate.activations import activation_bytes
from sft_dist.estimate.architecture import FAMILIES, Architecture, config_path, derive
from sft_dist.estimate.compare import Estimate, estimate
from sft_dist.estimate.hardware import GIB, GPUS, Device, find_device
from sft_dist.estimate.layout import STRATEGIES, Layout
from sft_dist.estimate.memory import memory, optimizer_bytes, weight_bytes
from sft_dist.estimate.pace import step_flops
from sft_dist.estimate.tuning import tuned
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, pick_head
from sft_dist.models.quantise import quantise, scales
from sft_dist.observe import perf
from sft_dist.optim import build_optimizer
from sft_dist.types import TokenizedExample

EIGHT_B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY = SMALL | {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "head_dim": 16}
ATTENTION_KEEPS_MORE = {"cohere": 0.12}  # its LayerNorm


def small(model_type: str) -> dict[str, Any]:
    """SMALL without what the type does not know."""
    return {k: v for k, v in SMALL.items() if not (k == "head_dim" and model_type == "phi3")}


def recipe_of(architecture: dict[str, Any], *settings: str, seq_len: int = 8192) -> Recipe:
    text = json.dumps(architecture)
    fixed = [f"model.config={text}", "model.init=random", "model.tokenizer=t", f"data.seq_len={seq_len}"]
    return load_recipe([], ["data.sources=[{path: nowhere.json}]", *fixed, *settings])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_have_the_names_and_shapes_of_transformers(model_type: str) -> None:
    values = small(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {t.name: t.shape for t in derive({"model_type": model_type, **values}, "x").tensors} == theirs


def test_a_model_of_a_known_size_is_counted() -> None:
    assert derive(EIGHT_B, "x").num_parameters == 8_030_261_248  # Llama 3.1 8B, as its model card says


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(gate|up)_proj"])
@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_adapters_are_counted_as_peft_makes_them(method: Any, targets: Any, saved: list[str]) -> None:
    tuning = TuningSection(method=method, rank=5, targets=targets, modules_to_save=saved)
    values = small("llama") | {"tie_word_embeddings": False}
    model = apply_tuning(build_random(AutoConfig.for_model("llama", **values), dtype=torch.float32, seed=0), tuning, 0)
    found = tuned(derive({"model_type": "llama", **values}, "x"), tuning)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.base + found.added == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["prompt", "prefix", "bitfit"])
def test_what_other_methods_move_is_counted(method: Any) -> None:
    tuning = TuningSection(method=method, virtual_tokens=7)
    values = small("qwen2")
    model = apply_tuning(build_random(AutoConfig.for_model("qwen2", **values), dtype=torch.float32, seed=0), tuning, 0)
    found = tuned(derive({"model_type": "qwen2", **values}, "x"), tuning)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not found.trains_all


def test_a_base_in_four_bits_takes_what_bitsandbytes_makes_of_it() -> None:
    values = small("llama") | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = build_random(AutoConfig.for_model("llama", **values), dtype=torch.bfloat16, seed=0)
    architecture = derive({"model_type": "llama", **values}, "x")
    found = tuned(architecture, TuningSection(method="qlora", rank=1))
    expected = weight_bytes(found, Layout("ddp", 1, "cuda", 2, 4, 16, 16, 1, False)) - 4 * found.added
    held = quantise(model, torch.bfloat16)
    tensors = [*held.parameters(), *(t for name, t in scales(held) if "absmax" in name)]
    assert expected == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "muon"])
def test_optimizers_keep_what_is_estimated(name: Any) -> None:
    """Within what vectors and small matrices differ in, and Adafactor's rows and columns."""
    values = small("llama") | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = build_random(AutoConfig.for_model("llama", **values), dtype=torch.float32, seed=0)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimSection(name=name), 1e-3)
    optimizer.allocate(model.parameters())
    held = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    counts = tuned(derive({"model_type": "llama", **values}, "x"), TuningSection())
    expected = optimizer_bytes(counts, Layout("ddp", 1, "cuda", 2, 4, 16, 16, 1, False, optimizer=name))
    slack = 0.02 * 8 * counts.trained
    assert expected == pytest.approx(sum(t.numel() * t.element_size() for t in held), abs=slack)


def test_frozen_parameters_are_not_trained() -> None:
    tuning = TuningSection(freeze=["model.embed_tokens.*", "model.layers.0.*"])
    architecture = derive({"model_type": "llama", **small("llama")}, "x")
    frozen = [t for t in architecture.tensors if t.layer == 0 or "embed" in t.name]
    assert tuned(architecture, tuning).trained == architecture.num_parameters - sum(t.numel for t in frozen)


@pytest.mark.parametrize("compute", [4, 2], ids=["fp32", "autocast"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_activations_are_what_autograd_keeps(model_type: str, method: Any, compute: int) -> None:
    architecture, kept = kept_by_autograd(model_type, method, compute, checkpointing=False)
    allowed = ATTENTION_KEEPS_MORE.get(model_type, 0.06)
    assert predicted(architecture, method, compute, False) == pytest.approx(kept, rel=allowed)


@pytest.mark.parametrize("compute", [4, 2], ids=["fp32", "autocast"])
def test_checkpointing_keeps_one_stream_per_layer(compute: int) -> None:
    architecture, kept = kept_by_autograd("llama", "full", compute, checkpointing=True)
    assert predicted(architecture, "full", compute, True) == pytest.approx(kept, rel=0.02)


TOKENS = 448


def predicted(architecture: Architecture, method: Any, compute: int, checkpointing: bool) -> int:
    counts = tuned(architecture, TuningSection(method=method))
    return activation_bytes(architecture, counts, Layout("ddp", 1, "cpu", compute, 4, TOKENS, 0, 1, checkpointing))


def kept_by_autograd(model_type: str, method: Any, compute: int, checkpointing: bool) -> tuple[Architecture, int]:
    """Bytes of all storages that the forward pass saves, weights and their casts left out."""
    values = {k: v for k, v in TINY.items() if not (k == "head_dim" and model_type == "phi3")} | {
        "num_hidden_layers": 3
    }
    base = torch.float32 if method == "full" or compute == 4 else torch.bfloat16
    model = build_random(AutoConfig.for_model(model_type, **values), dtype=base, seed=0)
    model.config.use_cache = False
    attention.install(model.train(), "sdpa")
    network = apply_tuning(model, TuningSection(method=method), 0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cast = torch.bfloat16 if compute == 2 else None
    packed = PackedCausalLM(network, pick_head("reference", torch.device("cpu"))[1], autocast_dtype=cast)
    ids = np.arange(TOKENS, dtype=np.int32).reshape(-1, 64) % 100 + 3
    documents = Documents(tuple(TokenizedExample(row, np.ones(64, np.float32)) for row in ids))
    batch = collate(documents.packs, documents, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8)
    shapes = {edge for p in network.parameters() if p.ndim == 2 for edge in (tuple(p.shape), tuple(p.shape[::-1]))}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tuple(tensor.shape) not in shapes:
            saved[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed.hidden_states(batch)
    architecture = derive({"model_type": model_type, **values}, "x")
    return architecture, sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_predicted_states_are_what_processes_hold(strategy: str) -> None:
    check = load_benchmark()
    case = check.Case(strategy, "full", 2, 1, "small", phases=("step",))
    assert check.predict(case)["step"] == pytest.approx(check.measure(case)["step"], rel=check.LIMIT)


def measured_engines() -> list[tuple[str, int, int, int, float]]:
    """(engine, replicas, ranks, micro-batches, MiB at the peak of a step): the rows of `engine_memory.py`'s result."""
    text = (CHECKOUT / "benchmarks" / "results" / "engine_memory.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    found = []
    for name, ranks, rounds, _, _, peak, _ in rows[2:]:
        strategy, _, mesh = name.partition(" ")
        found.append((strategy, int(mesh.split()[0]) if mesh else 1, int(ranks), int(rounds), float(peak)))
    return found


@pytest.mark.parametrize(("strategy", "replicas", "ranks", "rounds", "peak"), measured_engines())
def test_peaks_are_those_measured_on_one_two_and_four_ranks(
    strategy: str, replicas: int, ranks: int, rounds: int, peak: float
) -> None:
    check = load_benchmark()
    case = check.Case(strategy, "full", ranks, rounds, dp_replicate=replicas)
    assert check.predict(case)["step"] / check.MIB == pytest.approx(peak, rel=check.LIMIT)


def test_stage_3_gathers_and_keeps_weights_in_the_compute_dtype() -> None:
    architecture = derive(EIGHT_B, "x")
    counts = tuned(architecture, TuningSection())
    layout = Layout("zero3", 8, "cuda", 2, 4, 8192, 8192, 1, True)
    parts = memory(architecture, counts, layout).device["loss"]
    assert parts["weights"] == 2 * counts.base // 8 and parts["gathered layers"] == 2 * 10**9
    assert parts["optimizer"] == 12 * counts.base // 8 and "copies for compute" not in parts


def load_benchmark() -> Any:
    """benchmarks/estimate_check.py as a module."""
    path = CHECKOUT / "benchmarks" / "estimate_check.py"
    spec = importlib.util.spec_from_file_location("estimate_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["estimate_check"] = module
    spec.loader.exec_module(module)
    return module


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(STRATEGIES),
    st.sampled_from(["full", "lora"]),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 4]),
    st.booleans(),
)
def test_more_ranks_and_checkpointing_never_cost_memory(
    strategy: str, method: Any, compute: int, rounds: int, checkpointing: bool
) -> None:
    architecture = derive(EIGHT_B, "x")
    counts = tuned(architecture, TuningSection(method=method))
    peaks = [
        memory(architecture, counts, Layout(strategy, n, "cuda", compute, 4, 8192, 8192, rounds, checkpointing)).peak
        for n in (2, 8, 64)
    ]
    assert peaks == sorted(peaks, reverse=True)
    without = memory(architecture, counts, Layout(strategy, 2, "cuda", compute, 4, 8192, 8192, rounds, False)).peak
    assert peaks[0] <= without


def test_flops_are_those_that_training_counts() -> None:
    architecture = derive(EIGHT_B, "x")
    for method in ("full", "lora"):
        shape = perf.Shape(architecture.num_matrix_parameters, 32, 4096, 4096, 128256, method == "full")
        counts = tuned(architecture, TuningSection(method=method))  # type: ignore[arg-type]
        asked = {"num_tokens": 1000, "sum_squared_lengths": 90_000, "num_loss_tokens": 300}
        assert step_flops(architecture, counts, **asked) == perf.step_flops(shape, **asked)


def test_devices_have_the_peaks_that_mfu_is_measured_against() -> None:
    for name, peak in perf.PEAK_FLOPS.items():
        assert GPUS[name].flops == peak


def on(recipe: Recipe, name: str, number: int) -> Estimate:
    return estimate(recipe, GPUS[name], number)


def test_replicas_are_taken_where_they_fit_and_shards_where_they_do_not() -> None:
    one_b = EIGHT_B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    assert on(recipe_of(one_b, seq_len=2048), "H100", 8).recommended == "ddp"
    eight = on(recipe_of(EIGHT_B, "memory.activation_checkpointing=full"), "H100", 8)
    assert eight.recommended == "fsdp2" and "ddp" in eight.reason


def test_what_would_fit_is_computed_and_really_fits() -> None:
    found = on(recipe_of(EIGHT_B), "H100", 1)
    assert found.recommended is None and found.remedies
    texts = [text for text, _ in found.remedies]
    assert any("tuning.method=lora" in text for text in texts) and any("--gpus" in text for text in texts)
    assert all(peak <= 0.92 * GPUS["H100"].memory for _, peak in found.remedies)
    lora = next(text for text in texts if "lora" in text)
    words = [word for word in lora.split() if "=" in word]
    assert on(recipe_of(EIGHT_B, *words), "H100", 1).recommended == "ddp"


def test_long_documents_fit_when_their_rows_are_cut() -> None:
    long = ("memory.activation_checkpointing=full", "batch.tokens_per_micro_batch=1048576")
    whole = on(recipe_of(EIGHT_B, *long, seq_len=1048576), "H100", 8)
    assert whole.recommended is None
    remedy = next(text for text, _ in whole.remedies if "parallel.sequence" in text)
    words = [word for word in remedy.split() if "=" in word]
    cut = on(recipe_of(EIGHT_B, *long, *words, seq_len=1048576), "H100", 8)
    assert cut.recommended == "fsdp2"
    shared_by = int(remedy.split("parallel.sequence=")[1].split()[0])
    kept = [found.option("fsdp2").memory.device["loss"]["activations"] for found in (cut, whole)]
    assert kept[0] * shared_by == pytest.approx(kept[1], rel=1e-6)
    with pytest.raises(ConfigError, match="cannot form groups of 8"):
        on(recipe_of(EIGHT_B, "parallel.sequence=8"), "H100", 4)


def test_accumulating_shards_keeps_sharded_sums() -> None:
    architecture = derive(EIGHT_B, "x")
    counts = tuned(architecture, TuningSection())
    once, often = (
        memory(architecture, counts, Layout("fsdp2", 8, "cuda", 2, 4, 2048, 2048, rounds, True)) for rounds in (1, 2)
    )
    assert often.device["loss"]["gradients"] == 4 * counts.trained // 8
    assert once.device["backward"]["gradients"] < counts.trained


def test_replicas_of_shards_hold_what_one_replica_alone_would() -> None:
    architecture = derive(EIGHT_B, "x")
    counts = tuned(architecture, TuningSection())
    numbers = ("cuda", 2, 4, 2048, 2048, 2, True)
    alone, twice = Layout("fsdp2", 8, *numbers), Layout("fsdp2", 16, *numbers, dp_replicate=2)
    assert memory(architecture, counts, twice).peak == memory(architecture, counts, alone).peak


def test_prepared_data_give_the_steps_of_the_plan(tmp_path: Path) -> None:
    recipe = recipe_of(EIGHT_B, f"data.cache_dir={tmp_path}", "optim.epochs=2", "batch.tokens_per_step=64", seq_len=32)
    recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"tokens_per_micro_batch": 32})})
    assert on(recipe, "H100", 2).work.num_steps is None
    examples = [TokenizedExample(np.full(16, i, np.int32), np.ones(16, np.float32), "n", f"n:{i}") for i in range(40)]
    entry = tmp_path / "entry"
    entry.mkdir()
    write_store(entry / "train", examples, {})
    report = {"seq_len": 32, "sources": [{"role": "sources", "path": "nowhere.json", "weight": 1.0}]}
    (entry / "report.json").write_text(json.dumps(report))
    work = on(recipe, "H100", 2).work
    assert (work.num_steps, work.step_tokens, work.mean_length) == (20, 64, 16.0)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": 64})})
    assert on(other, "H100", 2).work.num_steps is None


def test_hub_ids_are_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"run `hf download owner/name config\.json`"):
        config_path("owner/name", None)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    assert config_path("owner/name", None) == config_path("owner/name", "abc") == snapshot / "config.json"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "mamba2"}, "model_type mamba2 cannot be estimated; known are cohere"),
        (EIGHT_B | {"hidden_size": "big"}, "hidden_size = big: must be a positive integer"),
    ],
)
def test_configs_that_cannot_be_estimated_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        derive(values, "config.json")


def test_devices_are_found_by_name() -> None:
    assert find_device("h100", 8).memory == 80 * GIB
    cpu = find_device("cpu", 2)
    assert isinstance(cpu, Device) and cpu.flops > 0
    with pytest.raises(ConfigError, match="--gpu-type Z80: unknown; known are B200"):
        find_device("Z80", 1)


def test_the_command_answers_in_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"model": {"init": "random", "config": EIGHT_B, "tokenizer": "t"},
                                  "data": {"sources": [{"path": "nowhere.json"}], "seq_len": 2048},
                                  "optim": {"max_steps": 100}}))  # fmt: skip
    words = ["estimate", str(recipe), "--gpus", "8", "--gpu-type", "H200", "--price", "3"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["steps"] == 100
    assert found["cost"] == pytest.approx(found["hours"] * 8 * 3)
    assert {option["strategy"] for option in found["strategies"]} == set(STRATEGIES)
    assert found["planned"] == "fsdp2"  # auto's bound is coarser than the estimate
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert f"take         {found['recommended']}: " in shown and "8.03 B parameters" in shown


def test_it_answers_within_a_second_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, time; begin = time.process_time()\n"
        "from sft_dist.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'\n"
        "print(time.process_time() - begin, file=sys.stderr)"
    )
    words = ["estimate", "configs/quickstart.yaml", f"data.cache_dir={tmp_path}", "--gpus", "8", "--gpu-type", "H100"]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.splitlines()[-1]) < 1.0, time.perf_counter() - begin

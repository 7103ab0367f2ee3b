"""Activations kept selectively, in full or in host memory, and compiled layers: the same loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_config
from pydantic import ValidationError
from torch import Tensor

from sft_dist.certify import Documents
from sft_dist.config.auto import Facts, choose
from sft_dist.config.schema import Recipe, TuningSection
from sft_dist.data.collate import collate
from sft_dist.doctor import compiler
from sft_dist.errors import ConfigError
from sft_dist.models import attention, recompute
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.models.recompute import compile_layers, keep_activations
from sft_dist.types import PackedBatch, TokenizedExample
from sft_kernels import choose_head

FACTS = Facts(1000, 1000, 8, 2, 10_000, 100, world_size=2, device="cpu", memory_bytes=2**30)


def batches() -> list[PackedBatch]:
    """Rows of different lengths: compiled layers meet new shapes."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for lengths in ((5, 17, 30), (40, 3), (9, 9, 21, 2)):
        ids = [torch.randint(0, 128, (length,), generator=generator).int().numpy() for length in lengths]
        documents = Documents(tuple(TokenizedExample(i, (i > 30).astype("float32")) for i in ids))
        rows.append(collate(documents.packs, documents, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8))
    return rows


def network(architecture: str, method: str) -> PackedCausalLM:
    model = build_random(tiny_config(architecture), dtype=torch.float32, seed=0)
    model.config.use_cache = False
    attention.install(model, "sdpa")
    tuned = apply_tuning(model, TuningSection(method=method, rank=2, dropout=0.2 if method == "lora" else 0.0), seed=0)
    return PackedCausalLM(tuned, choose_head("reference", "cpu")[1]).train()


def gradients(packed: PackedCausalLM) -> dict[str, Tensor]:
    packed.zero_grad()
    torch.manual_seed(1)
    loss = torch.stack([packed(batch) for batch in batches()]).sum()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in packed.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("keep", ["selective", "full"])
def test_what_is_computed_again_changes_no_bit(architecture: str, method: str, keep: str) -> None:
    expected = gradients(network(architecture, method))
    packed = network(architecture, method)
    keep_activations(decoder_layers(causal_lm(packed.model)), keep, offload=False, on_gpu=False)
    found = gradients(packed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_full_keeps_the_input_of_each_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that input is what offloading moves, once per layer and pass."""
    moved: list[tuple[int, ...]] = []

    class Counting(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(self.pack, lambda held: held.clone())

        def pack(self, tensor: Tensor) -> Tensor:
            moved.append(tuple(tensor.shape))
            return tensor.clone()

    monkeypatch.setattr(recompute, "save_on_cpu", Counting)
    expected, packed = gradients(network("llama", "full")), network("llama", "full")
    layers = decoder_layers(causal_lm(packed.model))
    keep_activations(layers, "full", offload=True, on_gpu=False)
    found = gradients(packed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    inputs = [shape for shape in moved if len(shape) == 3]
    assert inputs == [(1, b.input_ids.shape[1], 32) for b in batches() for _ in layers]
    assert sum(torch.Size(shape).numel() for shape in moved if len(shape) != 3) == 0  # nothing else of any size


def test_selective_computes_some_products_again_and_full_all() -> None:
    """Counted: matrix products of forward and backward, none < selective < full."""

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += operator.name().split(".")[0] in ("aten::mm", "aten::addmm")
            return operator(*args, **(kwargs or {}))

    counts = {}
    for keep in ("none", "selective", "full"):
        packed = network("llama", "full")
        keep_activations(decoder_layers(causal_lm(packed.model)), keep, offload=False, on_gpu=False)
        with Products() as products:
            gradients(packed)
        counts[keep] = products.count
    extra = counts["full"] - counts["none"]
    assert extra > 0
    assert counts["none"] < counts["selective"] <= counts["none"] + extra / 2


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["none", "full"])
def test_compiled_layers_give_the_same_gradients(keep: str) -> None:
    import torch._dynamo.utils as dynamo

    if compiler() is None:
        pytest.skip("no C++ compiler")
    expected, packed = gradients(network("llama", "full")), network("llama", "full")
    layers = decoder_layers(causal_lm(packed.model))
    before = dynamo.counters["stats"]["calls_captured"]
    compile_layers(layers, causal_lm(packed.model).config._attn_implementation, on_gpu=False)
    keep_activations(layers, keep, offload=False, on_gpu=False)
    found = gradients(packed)
    assert keep == "full" or dynamo.counters["stats"]["calls_captured"] > before
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 2e-6 * max(tensor.norm(), 1e-3), name


def test_compiling_on_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"precision\.compile=true needs a C\+\+ compiler"):
        compile_layers([], None, on_gpu=False)


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "x"}, "data": {"sources": [{"path": "d.json"}]}} | sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"memory": {"activation_offload": True, "activation_checkpointing": "none"}},
            "all that full checkpointing keeps",
        ),
        (
            {"memory": {"activation_offload": True, "activation_checkpointing": "selective"}},
            "all that full checkpointing keeps",
        ),
        (
            {"precision": {"compile": True}, "memory": {"activation_checkpointing": "selective"}},
            r"a compiled layer decides itself",
        ),
        ({"precision": {"compile": True}, "parallel": {"strategy": "zero3"}}, "zero3 gathers the matrices"),
    ],
)
def test_what_cannot_be_combined_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(**sections)


def test_what_auto_becomes_is_asked_too() -> None:
    with pytest.raises(ConfigError, match="zero3 gathers the matrices"):
        choose(recipe(precision={"compile": True}, parallel={"offload": "params"}), FACTS)


def test_offloading_turns_full_checkpointing_on() -> None:
    assert choose(recipe(memory={"activation_offload": True}), FACTS).activation_checkpointing == "full"
    assert choose(recipe(), FACTS).activation_checkpointing == "none"

"""What each tuning method trains and from where it starts; the digest of what it leaves alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from architectures import PACKABLE, SMALL, tiny_config
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from sft_dist.config.schema import TuningSection
from sft_dist.errors import ConfigError
from sft_dist.models.adapters import apply_tuning, frozen_digest
from sft_dist.models.load import build_random
from sft_dist.models.quantise import check_codes, dequantise, move_scales, quantise


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4)).to(dtype)
    layers[0].requires_grad_(False)
    return layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_frozen_weight_counts_and_no_trained_one(dtype: torch.dtype) -> None:
    base = frozen_digest(model(dtype))
    assert base == frozen_digest(model(dtype))
    changed = model(dtype)
    changed[1].weight.data += 1
    assert frozen_digest(changed) == base
    changed[0].weight.data[299, 299] += 0.5
    assert frozen_digest(changed) != base


def test_places_and_types_count() -> None:
    blocks = model(torch.float32)
    first = frozen_digest(blocks)
    blocks[0].weight.data = blocks[0].weight.data.flatten().roll(150 * 300).view(300, 300)
    assert frozen_digest(blocks) != first
    assert frozen_digest(model(torch.bfloat16)) != first


def test_nothing_frozen_has_no_digest() -> None:
    assert frozen_digest(model().requires_grad_(True)) is None


def wide_config(architecture: str) -> PretrainedConfig:
    """Rows of whole 4-bit blocks."""
    return AutoConfig.for_model(architecture, **SMALL | PACKABLE[architecture] | {"hidden_size": 64})


METHODS = ("lora", "rslora", "dora", "qlora", "prefix", "prompt", "bitfit")


def tuned(seed: int = 0, architecture: str = "qwen2", compute: torch.dtype = torch.float32, **tuning: Any) -> nn.Module:
    base = build_random(wide_config(architecture), dtype=compute, seed=1)
    return apply_tuning(base, TuningSection.model_validate({"rank": 3} | tuning), seed, compute)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_a_function_of_seed_and_name_alone(method: str) -> None:
    torch.manual_seed(1)
    first = trained(tuned(method=method))
    torch.manual_seed(2)
    drawn = torch.get_rng_state()
    again, other = trained(tuned(method=method)), trained(tuned(seed=1, method=method))
    assert torch.equal(torch.get_rng_state(), drawn)  # the caller's generator stood still
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    random = [name for name in first if "lora_A" in name or "prompt_encoder" in name]
    assert bool(random) is (method != "bitfit")
    assert not any(torch.equal(first[name], other[name]) for name in random)


def test_adapted_embeddings_start_alike_too() -> None:
    """PEFT draws them from the global generator, which differs between ranks."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(trained(tuned(method="lora", targets=["embed_tokens", "q_proj"])))
    assert any("lora_embedding_B" in name and tensor.any() for name, tensor in found[0].items())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_low_rank_adapter_begins_as_the_base(method: str) -> None:
    ids = torch.arange(1, 20)[None]
    base = build_random(wide_config("qwen2"), dtype=torch.float32, seed=1).eval()
    with torch.no_grad():
        expected = base(input_ids=ids).logits.clone()
        torch.testing.assert_close(tuned(method=method).eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_bitfit_trains_the_biases_and_refuses_models_without() -> None:
    assert {name.rpartition(".")[2] for name in trained(tuned(method="bitfit"))} == {"bias"}
    with pytest.raises(ConfigError, match=r"tuning\.method=bitfit trains biases and llama has none"):
        tuned(method="bitfit", architecture="llama")


def test_a_prompt_starts_as_embeddings_of_the_vocabulary() -> None:
    model = tuned(method="prompt", virtual_tokens=5)
    (prompt,) = trained(model).values()
    words = model.get_base_model().get_input_embeddings().weight
    assert prompt.shape[0] == 5
    assert all(any(torch.equal(row, word) for word in words) for row in prompt)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head", "embed_tokens"]], ids=["one", "both"])
def test_tied_embeddings_stay_one_matrix_when_they_are_saved(saved: list[str]) -> None:
    model = tuned(method="lora", architecture="llama", modules_to_save=saved)
    lm = model.get_base_model()
    entry, head = (m.modules_to_save["default"].weight for m in (lm.get_input_embeddings(), lm.get_output_embeddings()))
    assert entry is head and entry.requires_grad


def test_every_part_of_a_quantised_base_counts() -> None:
    digests = {frozen_digest(tuned(method="qlora")), frozen_digest(tuned(method="lora"))}
    assert frozen_digest(tuned(method="qlora", rank=2)) in digests  # what is trained does not count
    for part in ("codes", "scales", "scales of the scales", "offset", "norm"):
        model = tuned(method="qlora")
        linear = model.base_model.model.model.layers[1].mlp.up_proj.base_layer
        state = linear.weight.quant_state
        if part == "codes":
            linear.weight.data.view(torch.uint8)[3] ^= 1
        elif part == "scales":
            state.absmax[2] += 1
        elif part == "scales of the scales":
            state.state2.absmax[0] *= 1.5
        elif part == "offset":
            state.offset += 0.1
        else:
            model.base_model.model.model.norm.weight.data[0] += 1
        digests.add(frozen_digest(model))
    assert len(digests) == 7


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_dequantising_gives_the_matrices_that_the_codes_stand_for(compute: torch.dtype) -> None:
    base = build_random(wide_config("qwen2"), dtype=compute, seed=1)
    plain = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = quantise(base, compute)
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) == 12  # o_proj's rows are 32 wide
    assert type(model.lm_head) is nn.Linear
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits.float()
        again = dequantise(model, torch.float32).float()
        tolerance = 1e-5 if compute == torch.float32 else 2e-2
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=tolerance)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        matrix, codes = plain[f"model.layers.0.{name}.weight"].float(), again.get_submodule(f"model.layers.0.{name}")
        error = (matrix - codes.weight).norm() / matrix.norm()
        assert 0.08 < error < 0.1  # of sixteen values for normal weights


def test_matrices_that_bitsandbytes_misreads_are_left_alone() -> None:
    """Rows that are no multiple of 64: on processors with AVX-512 it takes the scales of other blocks."""
    from bitsandbytes.functional import quantize_4bit

    config = wide_config("qwen2")
    config.intermediate_size = 96
    model = quantise(build_random(config, dtype=torch.float32, seed=1), torch.float32)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.manual_seed(0)
    weights = torch.randn(64, 128)
    codes, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    check_codes(weights, codes, state)
    state.absmax = state.absmax.flip(0)
    with pytest.raises(ConfigError, match=r"decodes a \[64, 128\] matrix to other values"):
        check_codes(weights, codes, state)
    narrow = tiny_config("qwen2")
    narrow.intermediate_size = 96
    with pytest.raises(ConfigError, match="nothing would be quantised"):
        quantise(build_random(narrow, dtype=torch.float32, seed=1), torch.float32)


def test_scales_go_where_the_codes_will_be() -> None:
    model = tuned(method="qlora")
    move_scales(model, torch.device("meta"))
    states = [module.quant_state for module in model.modules() if getattr(module, "quant_state", None) is not None]
    kept = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    assert len(states) == 12 and all(tensor.device.type == "meta" for tensor in kept)
    assert all(
        module.weight.quant_state is module.quant_state for module in model.modules() if hasattr(module, "quant_state")
    )


def test_without_bitsandbytes_there_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"qlora needs the package bitsandbytes.*sft_dist\[quantised\].*=lora"):
        tuned(method="qlora")

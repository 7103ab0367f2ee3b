"""Tokens that a tokenizer brings along: rows for them, trained or refused; strangers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from peft import PeftModel
from tiny_run import write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sft_dist.config.schema import ModelSection, Recipe
from sft_dist.errors import ConfigError
from sft_dist.models.load import build_random, load_model
from sft_dist.models.speaker import load_speaker
from sft_dist.models.vocabulary import num_added
from sft_dist.network import build_network

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    """Ordinary ids, and two that were added behind them."""
    made = PreTrainedTokenizerFast.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    assert num_added(made) == 0
    made.add_tokens(["<call>", "<result>"], special_tokens=True)
    assert num_added(made) == 2
    return made


def folder(tmp_path: Path, tied: bool, rows: int) -> Path:
    config = tiny_config("llama")
    config.vocab_size, config.tie_word_embeddings = rows, tied
    build_random(config, dtype=torch.float32, seed=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool) -> None:
    size = len(tokenizer)
    path, drawn = folder(tmp_path, tied, size - 2), torch.get_rng_state()
    base = AutoModelForCausalLM.from_pretrained(path)
    model = load_model(ModelSection(path=str(path)), dtype=torch.float32, seed=0, vocab_size=size, num_added=2)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.config.vocab_size == size
    for ours, theirs in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()),
        (base.get_input_embeddings(), base.get_output_embeddings()),
        strict=True,
    ):
        assert torch.equal(ours.weight[:-2], theirs.weight)
        torch.testing.assert_close(ours.weight[-2:], theirs.weight.mean(dim=0).expand(2, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = folder(tmp_path, True, len(tokenizer) - 3)  # an ordinary id has no row
    with pytest.raises(ConfigError, match="use the model's own tokenizer"):
        load_model(ModelSection(path=str(path)), dtype=torch.float32, seed=0, vocab_size=len(tokenizer), num_added=2)


def build(path: Path, tokenizer: PreTrainedTokenizerFast, **tuning: Any) -> Any:
    recipe = Recipe.model_validate(
        {"model": {"path": str(path)}, "data": {"sources": [{"path": "d"}]}, "tuning": {"rank": 2} | tuning}
    )
    return build_network(recipe, torch.float32, CPU, vocab_size=len(tokenizer), num_added=num_added(tokenizer)).model


@pytest.mark.parametrize("method", ["lora", "qlora", "prompt", "bitfit"])
def test_rows_that_nobody_would_train_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, method: str
) -> None:
    path = folder(tmp_path, False, len(tokenizer) - 2)
    config = AutoModelForCausalLM.from_pretrained(path).config
    if method == "bitfit":
        config.attention_bias = True
        build_random(config, dtype=torch.float32, seed=0).save_pretrained(path)
    with pytest.raises(ConfigError, match=rf"has 2 tokens.*={method} would.*modules_to_save=\[embed_tokens, lm_head\]"):
        build(path, tokenizer, method=method)


def test_saved_embeddings_train_them_and_peft_reads_them_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = folder(tmp_path, False, len(tokenizer) - 2)
    build(path, tokenizer, method="full")
    model = build(path, tokenizer, method="lora", modules_to_save=["embed_tokens", "lm_head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    spoken = load_speaker(str(tmp_path / "adapter"), dtype=torch.float32, device=CPU).model
    assert isinstance(spoken, PeftModel)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    again = dict(spoken.named_parameters())
    assert trained and all(torch.equal(parameter, again[name]) for name, parameter in trained.items())

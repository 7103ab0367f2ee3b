"""Answers to held-out prompts: the same alone and in a batch, cut at the stop, and nothing of the model is changed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_dist.data.store import TokenStore, open_store, write_store
from sft_dist.evaluate.generation import Prompt, generate, prompts_from_store
from sft_dist.evaluate.metrics import exact_match
from sft_dist.models import attention
from sft_dist.models.packed import PackedCausalLM
from sft_dist.types import TokenizedExample
from sft_kernels import choose_head

WORDS = ["<pad>", "</s>", "a", "b", "c", *(f"w{number}" for number in range(27))]
EOS = 1
NUM_NEW = 6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Random weights large enough that the answer depends on the whole prompt."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, use_cache=False, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(ids: Sequence[int]) -> Prompt:
    return Prompt(list(ids), reference="", id="x:1", text="")


PROMPTS = [prompt(ids) for ids in ([7, 8, 9], [20], [11, 12, 13, 14, 15, 16, 17, 18, 19], [5, 6], [30, 29, 28, 27, 26])]


def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt] = PROMPTS,
    *,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    batch_size: int = 8,
) -> list[str]:
    return generate(
        model, tokenizer, prompts, max_new_tokens=NUM_NEW, stop_token_ids=stop_ids, stop_strings=stop_strings,
        batch_size=batch_size, synced=False,
    )  # fmt: skip


def greedy(model: LlamaForCausalLM, ids: Sequence[int]) -> list[int]:
    """NUM_NEW tokens, each from a forward over everything so far: no cache, no padding, no `generate`."""
    row = list(ids)
    with torch.no_grad():
        for _ in range(NUM_NEW):
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(ids) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_do_not_depend_on_the_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    expected = [tokenizer.decode(greedy(model, p.ids), skip_special_tokens=True).strip() for p in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert answers(model, tokenizer, batch_size=batch_size) == expected


def test_a_stop_token_ends_the_answer_for_its_row_only(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    full = [greedy(model, p.ids) for p in PROMPTS]
    stop = full[0][2]
    expected = [list(itertools.takewhile(lambda token: token != stop, row)) for row in full]
    assert len(expected[0]) <= 2 and any(len(row) == NUM_NEW for row in expected)
    found = answers(model, tokenizer, stop_ids=[stop])
    assert found == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in expected]


def test_a_stop_text_of_several_tokens_ends_the_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = tokenizer.decode(greedy(model, PROMPTS[0].ids)).split()
    stop = " ".join(words[2:4])
    (found,) = answers(model, tokenizer, PROMPTS[:1], stop_strings=[stop])
    assert found == " ".join(words).split(stop)[0].strip()


def test_segment_attention_is_put_aside_while_generating_and_comes_back(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = answers(model, tokenizer)
    attention.install(model, "sdpa")
    installed = model.config._attn_implementation
    packed = PackedCausalLM(model, choose_head("reference", "cpu")[1]).eval()
    assert answers(packed, tokenizer) == expected
    assert model.config._attn_implementation == installed not in ("sdpa", "eager")
    assert model.config.use_cache is False


def test_attention_and_cache_come_back_after_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.install(model, "sdpa")
    installed = model.config._attn_implementation

    def fail(**_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        answers(model, tokenizer)
    assert (model.config._attn_implementation, model.config.use_cache) == (installed, False)


def test_generating_draws_no_random_number_and_leaves_the_mode_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.get_rng_state()
    answers(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def store(
    folder: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[float]]],
    answers: tuple[tuple[int, int], ...] = (),
) -> TokenStore:
    examples = (
        TokenizedExample(
            np.array(ids, np.int32), np.array(weights, np.float32), "data.jsonl", f"data.jsonl:{number}", answers
        )
        for number, (ids, weights) in enumerate(rows, 1)
    )
    write_store(folder / "store", examples, {})
    return open_store(folder / "store")


def test_a_prompt_is_everything_before_the_last_supervised_span(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    two_turns = ([5, 6, 7, EOS, 8, 9, 10, 11, EOS], [0, 0, 1, 1, 0, 0, 1, 1, 1])
    (found,) = prompts_from_store(store(tmp_path, [two_turns]), tokenizer, 5, seed=0)
    assert found == Prompt([5, 6, 7, EOS, 8, 9], reference="w5 w6", id="data.jsonl:1", text="w0 w1 w2 </s> w3 w4")


@pytest.mark.parametrize("prompt_weight", [0.25, 1.0])
def test_weighted_prompts_are_not_taken_for_the_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt_weight: float
) -> None:
    rows = store(tmp_path, [([5, 6, 7, EOS], [0, prompt_weight, 1, 1])], answers=((2, 4),))
    (found,) = prompts_from_store(rows, tokenizer, 1, seed=0)
    assert (found.ids, found.reference) == ([5, 6], "w2")


def test_a_document_trained_from_its_first_token_is_continued_from_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (found,) = prompts_from_store(store(tmp_path, [([5, 6, 7], [1, 1, 1])]), tokenizer, 1, seed=0)
    assert found.ids == [5]


def test_the_same_prompts_are_chosen_for_the_same_seed_in_store_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = store(tmp_path, [([5 + n % 20, 6, EOS], [0, 1, 1]) for n in range(40)])
    lines = lambda seed, num: [int(p.id.split(":")[1]) for p in prompts_from_store(rows, tokenizer, num, seed)]  # noqa: E731
    assert lines(1, 6) == lines(1, 6) == sorted(lines(1, 6)) and len(lines(1, 6)) == 6
    assert lines(1, 6) != lines(2, 6)
    assert lines(1, 100) == list(range(1, 41)) and lines(1, 0) == []


def test_exact_match_forgives_white_space_only() -> None:
    assert exact_match(" fig\n kiwi ", "fig kiwi")
    assert not exact_match("Fig kiwi", "fig kiwi") and not exact_match("fig kiwi.", "fig kiwi")

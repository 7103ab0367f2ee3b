"""A tokenizer without its wrapper says what the wrapper says, in another process too."""

from __future__ import annotations

import pickle

import pytest
from preparing import byte_tokenizer
from tokenizers import AddedToken, processors

from sft_dist.data.plain_tokenizer import PlainTokenizer

TEXT = "two words<|im_end|> and a <mark>"


@pytest.mark.parametrize("splits", [False, True])
def test_it_agrees_with_its_wrapper(splits: bool) -> None:
    wrapper = byte_tokenizer()
    wrapper.add_tokens([AddedToken("<mark>", special=True), AddedToken("word")])
    wrapper.split_special_tokens = splits
    plain = PlainTokenizer.of(wrapper)
    assert PlainTokenizer.of(plain) is plain
    for one in (plain, pickle.loads(pickle.dumps(plain))):
        assert one.encode(TEXT) == wrapper.encode(TEXT, add_special_tokens=False)
        assert len(one) == len(wrapper)
        assert one.eos_token == wrapper.eos_token
        assert one.special_tokens == wrapper.special_tokens_map
        assert sorted(one.special_texts) == ["<mark>", "<|im_end|>"]
        assert (one.bos_of_texts, one.bos_token_id) == (None, None)
        assert one.backend_tokenizer.encode_special_tokens == splits


def test_it_knows_what_begins_every_text() -> None:
    wrapper = byte_tokenizer()
    wrapper.add_special_tokens({"bos_token": "<s>"})
    first = wrapper.bos_token_id
    wrapper.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", first)])
    plain = PlainTokenizer.of(wrapper)
    assert (plain.bos_of_texts, plain.bos_token_id) == ("<s>", first)
    assert plain.encode("a") == wrapper.encode("a", add_special_tokens=False)

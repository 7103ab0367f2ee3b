"""Exactly one BOS where the tokenizer's own post-processor begins texts with one, never two; the ids are stock's."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

import pytest
from template_cases import BUILTIN, TEMPLATES, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from sft_dist.data.bos import OPENING, bos_of_texts
from sft_dist.data.templates import resolve_template
from sft_dist.types import Conversation, Message, TokenizedExample

LETTERS = bytes_to_unicode()
# Every shared vocabulary: its file, BOS, EOS, and whether its family's tokenizer.json begins texts with BOS.
VOCABULARIES = {
    "gpt2": ("gpt2/tokenizer.json", "<|endoftext|>", "<|endoftext|>", False),
    "gpt_neox": ("gpt_neox/20B_tokenizer.json", "<|endoftext|>", "<|endoftext|>", False),
    "llama2": ("llama2/tokenizer.model", "<s>", "</s>", True),
    "llama3": ("llama3/tokenizer.model", "<|begin_of_text|>", "<|end_of_text|>", True),
    "mistral": ("mistral/tokenizer.model.v1", "<s>", "</s>", True),
    "mistral-v3": ("mistral/mistral_instruct_tokenizer_240323.model.v3", "<s>", "</s>", True),
    "qwen": ("qwen/qwen.tiktoken", None, "<|endoftext|>", False),
    "t5": ("t5/spiece.model", None, "</s>", False),  # its post-processor ends texts with EOS
}
MODELS = ("stories260K", "babyllama_tok105")
SAID = [("user", "A"), ("assistant", "B b"), ("user", "C"), ("assistant", "D.")]
EACH = "{% for m in messages %}\n[{{ m.content }}]{% endfor %}"
TURNS = Conversation(tuple(Message(*turn) for turn in SAID))


@cache
def tokenizer_of(name: str, shared: Path) -> PreTrainedTokenizerFast:
    """The vocabulary (merges do not matter here) under the post-processor that its family ships."""
    if name in MODELS:
        return AutoTokenizer.from_pretrained(shared / "models" / name)
    file, bos, eos, begins = VOCABULARIES[name]
    path = shared / "data/tokenizers" / file
    words = {".json": lambda: [], ".tiktoken": lambda: ranked(path)}.get(
        path.suffix, lambda: ranked(path) if name == "llama3" else pieces(path)
    )()
    core = Tokenizer.from_file(str(path)) if path.suffix == ".json" else byte_pairs(words)
    core.add_special_tokens([token for token in (bos, eos) if token])
    if begins or name == "t5":
        token, form = (bos, f"{bos} $A") if begins else (eos, f"$A {eos}")
        core.post_processor = processors.TemplateProcessing(form, None, [(str(token), core.token_to_id(str(token)))])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, **({"bos_token": bos} if bos else {}))


def byte_pairs(words: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return core


def ranked(path: Path) -> list[str]:
    """A tiktoken file: base64 bytes and rank on each line."""
    words = (base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines())
    return ["".join(LETTERS[byte] for byte in word) for word in words]


def pieces(path: Path) -> list[str]:
    """A sentencepiece file, with a letter for every byte."""
    held = sentencepiece.ModelProto.FromString(path.read_bytes())
    return list(dict.fromkeys([*(piece.piece for piece in held.pieces), *LETTERS.values()]))


@pytest.mark.parametrize("name", [*VOCABULARIES, *MODELS])
def test_templates_over_every_shared_tokenizer(shared: Path, name: str) -> None:
    tokenizer = tokenizer_of(name, shared)
    begins = name in MODELS or VOCABULARIES[name][3]
    assert bos_of_texts(tokenizer) == (tokenizer.bos_token if begins else None)
    assert not tokenizer.add_bos_token  # which is why it is not asked
    public = TEMPLATES if name in ("llama3", "gpt2", "stories260K") else []  # they take seconds; the built-in ones all
    asked_for = [*BUILTIN, *(str(shared / "data/chat_templates" / f"{template}.jinja") for template in public)]
    changed = 0
    for asked in asked_for:
        template = resolve_template(asked, tokenizer)
        changed += template.text.startswith(OPENING)
        ids = template.tokenize(TURNS, tokenizer, loss_on="assistant").input_ids.tolist()
        stock = stock_ids(tokenizer, template.text)
        assert ids[: len(stock)] == stock, asked  # behind it may come the end token that the template leaves out
        if begins:
            first = ids.index(tokenizer.bos_token_id)
            assert first == 0 or "chujiezheng" in asked, asked  # some of which write a line break before it
            assert ids[first + 1] != tokenizer.bos_token_id, asked
        else:
            assert not template.text.startswith(OPENING)
    assert (0 < changed < len(asked_for)) == begins


def stock_ids(tokenizer: PreTrainedTokenizerFast, template: str) -> list[int]:
    turns = [{"role": role, "content": content} for role, content in SAID]
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("name", [*VOCABULARIES, *MODELS])
def test_a_text_without_a_template_is_stocks_and_the_end_token(shared: Path, name: str) -> None:
    tokenizer = tokenizer_of(name, shared)
    example = plain_text(tokenizer, "Some words")
    stock = [token for token in tokenizer("Some words")["input_ids"] if token != tokenizer.eos_token_id]
    assert example.input_ids.tolist() == [*stock, tokenizer.eos_token_id]
    if bos_of_texts(tokenizer):
        assert example.loss_weights.tolist() == [0.0] + [1.0] * (len(stock))


def plain_text(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenizedExample:
    template = resolve_template("chatml", tokenizer)
    return template.tokenize(Conversation((Message("text", text),)), tokenizer, loss_on="assistant")


def test_a_text_that_holds_the_token_itself_gets_no_second() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_bos_token = True
    assert plain_text(tokenizer, "<s>a").input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_template_that_writes_it_for_some_conversations_is_left_as_it_is(tmp_path: Path) -> None:
    """Rows for which it does not are still given one."""
    text = "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + EACH
    (tmp_path / "odd.jinja").write_text(text)
    tokenizer = byte_tokenizer()
    tokenizer.add_bos_token = True
    template = resolve_template(str(tmp_path / "odd.jinja"), tokenizer)
    assert template.text == text
    for turns in (TURNS, Conversation((Message("system", "s"), *TURNS.messages))):
        ids = template.tokenize(turns, tokenizer, loss_on="assistant").input_ids.tolist()
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_white_space_in_front_of_the_first_block_is_still_trimmed(tmp_path: Path) -> None:
    text = "  " + EACH
    (tmp_path / "indented.jinja").write_text(text)
    tokenizer = byte_tokenizer()
    tokenizer.add_bos_token = True
    template = resolve_template(str(tmp_path / "indented.jinja"), tokenizer)
    assert template.text == OPENING + text
    rendered = template.render(TURNS, bos_token="<s>", eos_token="</s>").text
    assert rendered == "<s>[A][B b][C][D.]"

"""Both libraries that tokenise give the same ids and the same tokens under each span, or the quick one stays out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import template_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sft_dist.data import encoder as encoder_module
from sft_dist.data.byte_bpe import LONGEST, _byte_of, byte_bpe_of
from sft_dist.data.encoder import Encoder
from sft_dist.data.sources import Rejects, read_records
from sft_dist.data.supervision import Span
from sft_dist.data.token_masks import ranges_by_offsets
from sft_dist.data.words import SameWords
from sft_dist.errors import DataError

pytest.importorskip("tiktoken", reason="tiktoken is not installed: tokenizers does everything")

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LEARNED_FROM = ["the theory of the other mother's weather; it's 1234 and 12345, isn't it?\n\n  the end\n"] * 9 + [
    "Ελληνικά και русский текст, 漢字 と かな, naïve café déjà 🎉🎉 the"
] * 5


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_backend(kind: str = "gpt2") -> Tokenizer:
    """A byte-level BPE tokenizer that learned a few hundred merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split(QWEN) if kind == "qwen" else pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    backend.train_from_iterator(LEARNED_FROM, trainer)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    return backend


def changed(backend: Tokenizer, change) -> Tokenizer:
    about = json.loads(backend.to_str())
    change(about)
    return Tokenizer.from_str(json.dumps(about))


def encoders(backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, Encoder]:
    """(with tiktoken from the second batch on, without)."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    slow = Encoder(tokenizer)
    monkeypatch.setattr(encoder_module, "_WORTH", 1e-9)
    fast = Encoder(tokenizer)
    fast.encode(["begin"], [[]])
    return fast, slow


def some_spans(text: str) -> list[Span]:
    """Spans of every kind: at the ends, inside, empty."""
    half = len(text) // 2
    return [Span(0, len(text), 1.0), Span(half, len(text), 1.0), Span(half, half + 1, 0.5), Span(half, half, 1.0)]


def assert_same(fast: Encoder, slow: Encoder, texts: list[str]) -> None:
    spans = [some_spans(text) if text else [] for text in texts]
    for text, one, other in zip(texts, fast.encode(texts, spans), slow.encode(texts, spans), strict=True):
        assert one.ids.dtype == np.int32 and one.ids.tolist() == other.ids.tolist(), text
        covered = [[first, end] for first, end in one.ranges if end > first]
        assert covered == [[first, end] for first, end in other.ranges if end > first], text


@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
def test_any_text_comes_out_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = encoders(make_backend(kind), monkeypatch)
    letters = st.sampled_from("the o'sSlLvV 12 .,\n\t\r\u00a0\u2028\u0301e\u017fK漢字かéß🎉👩\u200d")
    pieces = st.one_of(st.text(letters, max_size=12), st.text(max_size=6), st.sampled_from(["<|im_end|>", "  ", "'LL"]))

    @given(st.lists(st.lists(pieces, max_size=6).map("".join), max_size=5))
    @settings(max_examples=60)
    def check(texts: list[str]) -> None:
        usable = [text.encode("utf-8", "ignore").decode() for text in texts]
        assert_same(fast, slow, usable)

    check()
    assert fast._fast is not None and slow._fast is None


@pytest.mark.parametrize(
    "file", ["lf_alpaca_zh_demo.json", "ru_alpaca_seed_tasks.jsonl", "code_alpaca_2k.json", "oasst_en_100_tree.jsonl"]
)
def test_real_rows_come_out_the_same(shared, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = encoders(template_cases.gpt2_tokenizer(shared).backend_tokenizer, monkeypatch)
    records = list(read_records(str(shared / "data/instruct" / file), Rejects("skip")))[:300]
    texts = ["<|im_start|>user\n" + json.dumps(record.value, ensure_ascii=False) + "<|im_end|>\n" for record in records]
    assert fast._fast is not None and len(fast._fast.known(texts)) > 0.95 * len(texts)
    for start in range(0, len(texts), 64):
        assert_same(fast, slow, texts[start : start + 64])


def test_long_texts_and_separators_are_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = encoders(make_backend(), monkeypatch)
    texts = ["a" * (LONGEST + 1), "one\0two", " " * 4000, "", "the end"]
    assert fast._fast is not None and fast._fast.known(texts) == [2, 3, 4]
    assert_same(fast, slow, texts)


def test_words_that_merging_cannot_make_are_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Llama 3: a word of the vocabulary is taken whole, though no merges lead to it."""

    def add_word(about) -> None:
        about["model"]["ignore_merges"] = True
        about["model"]["vocab"]["Ġqxzy"] = len(about["model"]["vocab"]) + 10

    backend = changed(make_backend(), add_word)
    fast, slow = encoders(backend, monkeypatch)
    texts = ["the qxzy word", "the other words", "qxzy", "other qxzyq"]
    assert fast._fast is not None
    assert fast._fast.unsure(fast._fast.encode(texts)).tolist() == [0, 3]
    assert_same(fast, slow, texts)


def rising_ids(about) -> None:
    vocabulary = about["model"]["vocab"]
    first, last = ("".join(pair) for pair in (about["model"]["merges"][0], about["model"]["merges"][-1]))
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]


def added(*tokens: dict):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return lambda about: about["added_tokens"].extend(
        plain | {"id": 700 + number} | token for number, token in enumerate(tokens)
    )


PREMISES = {
    "a space in front": lambda about: about["pre_tokenizer"].update(add_prefix_space=True),
    "no pattern": lambda about: about["pre_tokenizer"].update(use_regex=False),
    "lower case": lambda about: about.update(normalizer={"type": "Lowercase"}),
    "dropout": lambda about: about["model"].update(dropout=0.1),
    "ids that fall": rising_ids,
    "a byte is missing": lambda about: about["model"]["vocab"].pop("!"),
    "a token that takes spaces": added({"content": "<mask>", "lstrip": True}),
    "a token in another": added({"content": "im_end"}),
    "a token that begins another": added({"content": "<|im_end|>\n"}),
    "tokens that overlap": added({"content": "|>#"}),
}


@pytest.mark.parametrize("name", PREMISES)
def test_each_premise_is_looked_at(name: str) -> None:
    assert byte_bpe_of(make_backend()) is not None
    assert byte_bpe_of(changed(make_backend(), PREMISES[name])) is None


@pytest.mark.parametrize(
    "pattern",
    [
        QWEN.replace(r"\p{N}|", r"\p{N}{1,3}+|"),  # possessive in tiktoken, a repetition of a repetition in Oniguruma
        QWEN.replace(r"|\s+(?!\S)", r"|\s+$|\s+(?!\S)"),
        r"\h+|\H",  # hexadecimal digits in one library, white space in the other
        r"(?<word>\p{L}+)|[^\p{L}\g<word>]+",  # tiktoken cannot read it
    ],
)
def test_patterns_that_nobody_compared_are_left_to_the_tokenizer(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    backend.pre_tokenizer = split(pattern)
    assert byte_bpe_of(backend) is None
    assert_same(*encoders(backend, monkeypatch), ["12345678", "the  \n end ", "\n\nface"])


@pytest.mark.parametrize("digits", ["\\p{N}", "\\p{N}{1,3}"])
def test_the_patterns_of_qwen_and_llama_are_known(digits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    backend.pre_tokenizer = split(QWEN.replace(r"\p{N}|", digits + "|"))
    fast, slow = encoders(backend, monkeypatch)
    assert fast._fast is not None
    assert_same(fast, slow, ["1", "12", "123", "1234", "12345678 1234567", "the  \n end ", "٣٤٥٦٧ is 34567"])


@pytest.mark.parametrize("content", ["Ġthe", "Ã©", "é"])
def test_an_added_token_that_spells_one_of_the_vocabulary_is_left_to_the_tokenizer(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the vocabulary it stands for other bytes than its text has."""
    backend = make_backend()
    assert content in backend.get_vocab()
    backend.add_tokens([content])
    assert_same(*encoders(backend, monkeypatch), ["see the end", "café", "Ġthe Ã©", "\u00e9\u00c3"])
    assert byte_bpe_of(backend) is None


def test_an_added_token_that_spells_itself_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    backend.add_tokens(["the"])
    fast, slow = encoders(backend, monkeypatch)
    assert fast._fast is not None
    assert_same(fast, slow, ["see the end", "theory", "the"])


TRIMMING = {
    "byte level": processors.ByteLevel(trim_offsets=True),
    "roberta": processors.RobertaProcessing(("<|im_end|>", 601), ("<|im_start|>", 600), trim_offsets=True),
}


@pytest.mark.parametrize("name", TRIMMING)
@pytest.mark.parametrize("alone", [True, False])
def test_tokens_without_their_white_space_are_left_to_the_tokenizer(
    name: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their library reports other characters than the bytes of tiktoken's tokens."""
    backend = make_backend()
    backend.post_processor = TRIMMING[name] if alone else processors.Sequence([TRIMMING[name]])
    fast, slow = encoders(backend, monkeypatch)
    text = "see the end"
    for spans in ([Span(0, 4, 1.0)], [Span(3, 4, 1.0)], [Span(4, 7, 1.0)]):
        assert fast.encode([text], [spans])[0].ranges == slow.encode([text], [spans])[0].ranges
    assert byte_bpe_of(backend) is None


def test_what_trims_in_front_of_the_model_changes_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch of the pre-tokenizer, as GPT-2 has it, is without effect."""
    backend = make_backend()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    fast, slow = encoders(backend, monkeypatch)
    assert fast._fast is not None
    for start in range(11):
        for end in range(start + 1, 12):
            spans = [Span(start, end, 1.0)]
            assert fast.encode(["see the end"], [spans])[0].ranges == slow.encode(["see the end"], [spans])[0].ranges


def test_other_kinds_of_tokenizers_stay_with_their_library() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert byte_bpe_of(words) is None


def test_a_character_that_two_patterns_see_otherwise_is_not_trusted() -> None:
    """Two patterns stand for two versions of Unicode: one takes é for a letter, the other does not."""
    pattern = r"\p{L}+|[^\p{L}]+"
    other = r"(?:(?!é)\p{L})+|[^\p{L}]+|é"
    words = SameWords(split(pattern), other, nfc=False)
    assert not words.are_same("caf\u00e9") and words.are_same("cafe")
    assert SameWords(split(pattern), pattern, nfc=False).are_same("caf\u00e9")


@pytest.mark.parametrize("ours", [r"\p{N}{1,2}|\D", r"'s|[a-z']|\s", r"\s+|\S"])
def test_patterns_that_cut_otherwise_are_found_out(ours: str) -> None:
    words = SameWords(split(QWEN), ours, nfc=False)
    assert not words.are_same("12 it's")


def test_a_difference_ends_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = encoders(make_backend(), monkeypatch)
    assert fast._fast is not None
    wrong = fast._fast.encode

    def swapped(texts):
        tokens = wrong(texts)
        tokens.ids[-1] += 1
        return tokens

    monkeypatch.setattr(fast._fast, "encode", swapped)
    with pytest.raises(DataError, match="pip uninstall tiktoken"):
        fast.encode(["the weather"], [[]])


def test_a_difference_under_a_span_ends_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = encoders(make_backend(), monkeypatch)
    text, spans = "the weather", [Span(0, 3, 1.0), Span(4, 4, 1.0), Span(4, 11, 1.0)]
    ((ids, (first, *others)),) = slow.encode([text], [spans])
    moved = encoder_module.Encoded(ids, [(first[0], first[1] + 1), *others])
    assert fast.encode([text], [spans])  # a span without characters is in no token, however that is written
    monkeypatch.setattr(encoder_module, "_encoded", lambda *_: [moved])
    with pytest.raises(DataError, match="pip uninstall tiktoken"):
        fast.encode([text], [spans])


def test_it_begins_when_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    monkeypatch.setattr(encoder_module, "_WORTH", 0.1)
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    text = "the weather"
    reference = backend.encode(text, add_special_tokens=False)
    for number in range(20):
        (one,) = encoder.encode([text], [[Span(4, 11, 1.0)]])
        assert one.ids.tolist() == reference.ids
        assert one.ranges == ranges_by_offsets(reference.offsets, [Span(4, 11, 1.0)])
        assert (encoder._fast is None) == (len(text) * (number + 1) < 0.1 * len(backend.get_vocab()))


def test_letters_stand_for_the_bytes_that_the_field_has_them_stand_for() -> None:
    assert _byte_of() == {letter: byte for byte, letter in bytes_to_unicode().items()}

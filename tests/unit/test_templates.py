"""Golden masks: what is under loss, decoded, is the answer and its stop text, character for character."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_cases import (
    BUILTIN,
    CONVERSATIONS,
    NO_SYSTEM,
    TAGGED,
    UNTAGGED,
    byte_tokenizer,
    conversation,
    gpt2_tokenizer,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_dist.data.formats import to_conversations
from sft_dist.data.sources import Rejects, read_records
from sft_dist.data.supervision import Span, Stops
from sft_dist.data.templates import (
    ChatTemplate,
    resolve_template,
    spans,
)
from sft_dist.data.token_masks import ranges_by_offsets, token_answers, token_ranges, token_weights
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, Message, TokenizedExample

BYTES = byte_tokenizer()


def template_of(name: str, shared: Path | None = None) -> ChatTemplate:
    return resolve_template(name if shared is None else str(shared / "data/chat_templates" / f"{name}.jinja"), BYTES)


def said(example: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The decoded pieces under loss."""
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in spans(example.loss_weights)]


def golden(name: str, turns: list[tuple[str, str]]) -> list[str]:
    """What must be under loss, written down without the code under test."""
    write, middle, last = {**UNTAGGED, **BUILTIN}[name]
    answers = [write(content) for role, content in turns if role == "assistant"]
    return [answer + (last if i == len(answers) - 1 else middle) for i, answer in enumerate(answers)]


def check_golden(name: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
    for title, turns in CONVERSATIONS.items():
        if title == "system" and name in NO_SYSTEM:
            with pytest.raises(BadRecord, match=r"file\.json:7.*System role not supported"):
                template.tokenize(conversation(turns), tokenizer, loss_on="assistant")
            continue
        example = template.tokenize(conversation(turns), tokenizer, loss_on="assistant")
        assert said(example, tokenizer) == golden(name, turns), title
        assert example.input_ids.dtype == np.int32 and example.loss_weights.dtype == np.float32
        assert (example.source, example.id) == ("file.json", "file.json:7")


@pytest.mark.parametrize("name", BUILTIN)
def test_golden_builtin(name: str) -> None:
    check_golden(name, template_of(name), BYTES)


@pytest.mark.parametrize("name", UNTAGGED)
def test_golden(shared: Path, name: str) -> None:
    check_golden(name, template_of(name, shared), BYTES)


SPACE_BEHIND_THE_PROMPT = ("chujiezheng/falcon-instruct", "chujiezheng/openchat-3.5", "chujiezheng/vicuna")
OWN_WHITE_SPACE = ("chujiezheng/granite-3.0-instruct", "chujiezheng/qwen2.5-instruct")


@pytest.mark.parametrize("name", [n for n in UNTAGGED if n.startswith("chujiezheng") and n not in OWN_WHITE_SPACE])
def test_golden_condensed(shared: Path, name: str) -> None:
    """The same templates as their authors use them: without line breaks and indentation."""
    template = template_of(name, shared)
    condensed = ChatTemplate(name, template.text.replace("    ", "").replace("\n", ""))
    write, middle, last = UNTAGGED[name]
    turns = CONVERSATIONS["multi"]
    example = condensed.tokenize(conversation(turns), BYTES, loss_on="assistant")
    opening = " " if name in SPACE_BEHIND_THE_PROMPT else ""
    answers = [write("B b") + middle, write("D.\n\n- d") + last.strip("\n")]
    assert said(example, BYTES) == [opening + answer for answer in answers]


# Why the text of an answer does not go on from the generation prompt; the answer alone is learned then.
NO_SUCH_PROMPT = {
    "chujiezheng/llama-2-chat": "it has none",
    "chujiezheng/mistral-instruct": "it has none",
    "trl/deepseekv3": "it opens a thought, which is taken out of what was said",
}


@pytest.mark.parametrize("name", [*BUILTIN, *UNTAGGED])
def test_all_that_follows_the_generation_prompt_is_learned(shared: Path, name: str) -> None:
    """Asked by stock transformers, a model must write what was trained, whatever literals a template puts there."""
    template = template_of(name) if name in BUILTIN else template_of(name, shared)
    if name.startswith("chujiezheng") and name not in OWN_WHITE_SPACE:
        template = ChatTemplate(name, template.text.replace("    ", "").replace("\n", ""))
    for turns in ([("user", "A"), ("assistant", "B")], CONVERSATIONS["multi"], CONVERSATIONS["look-alike"]):
        asked = [{"role": role, "content": content} for role, content in turns[:-1]]
        plain, prompt = (
            BYTES.apply_chat_template(
                asked, chat_template=template.text, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
            )
            for prompt in (False, True)
        )
        example = template.tokenize(conversation(turns), BYTES, loss_on="last_turn")
        text = BYTES.decode(example.input_ids)
        (learned,) = said(example, BYTES)
        goes_on = prompt != plain and text.startswith(prompt + learned)
        assert goes_on == (name not in NO_SUCH_PROMPT), (text, prompt, learned)


@pytest.mark.parametrize("name", BUILTIN)
@given(answers=st.lists(st.text(alphabet="aB <|/>\n\u2028é漢🎉#:[]{}%", min_size=1), min_size=1, max_size=4))
def test_golden_whatever_is_said(name: str, answers: list[str]) -> None:
    answers = [f"{answer}." for answer in answers]
    turns = [turn for answer in answers for turn in (("user", answer[::-1]), ("assistant", answer))]
    example = template_of(name).tokenize(conversation(turns), BYTES, loss_on="assistant")
    assert said(example, BYTES) == golden(name, turns)


@pytest.mark.parametrize("name", BUILTIN)
def test_golden_when_the_tokenizer_does_not_know_the_stop_text(name: str) -> None:
    """The stop text is several tokens then: supervised whole, and generation stops on the text."""
    tokenizer = byte_tokenizer(special=False)
    check_golden(name, template_of(name), tokenizer)
    stop = BUILTIN[name][2]
    assert template_of(name).stop_strings(tokenizer) == ([] if stop == "</s>" else [stop])
    assert template_of(name).stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", [*UNTAGGED, *BUILTIN])
def test_golden_with_gpt2_tokens(shared: Path, name: str) -> None:
    """As above, but a token may begin before the answer; it may then bring along no more than its own characters."""
    tokenizer = gpt2_tokenizer(shared)
    template = template_of(name) if name in BUILTIN else template_of(name, shared)
    for turns in CONVERSATIONS.values():
        if turns is CONVERSATIONS["system"] and name in NO_SYSTEM:
            continue
        example = template.tokenize(conversation(turns), tokenizer, loss_on="assistant")
        pieces, expected = said(example, tokenizer), golden(name, turns)
        starts = [tokenizer.decode(example.input_ids[start]) for start, _ in spans(example.loss_weights)]
        for piece, answer, first in zip(pieces, expected, starts, strict=True):
            assert piece == answer or (piece.endswith(answer) and len(piece) - len(answer) < len(first))


@pytest.mark.parametrize("name", TAGGED)
def test_tagged_templates_agree_with_their_tags_token_for_token(shared: Path, name: str) -> None:
    template = template_of(name, shared)
    for tokenizer in (BYTES, gpt2_tokenizer(shared)):
        for turns in CONVERSATIONS.values():
            if turns is CONVERSATIONS["system"] and name in NO_SYSTEM:
                continue
            theirs = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                chat_template=template.text,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ours = template.tokenize(conversation(turns), tokenizer, loss_on="assistant")
            assert ours.input_ids.tolist() == theirs["input_ids"]
            assert ours.loss_weights.tolist() == theirs["assistant_masks"]


# What the authors' tags hold beyond the rule "answer and stop text", per template: before and behind it.
AROUND_TAGS = {
    "trl/gemma_training": ("", "\n"),
    "trl/gemma3_training": ("", "\n"),
    "trl/phi3_training": ("", "\n"),
    "trl/qwen2_5_training": ("\n", "\n"),
    "trl/qwen3_training": ("<think>\n\n</think>\n\n", "\n"),
}


@pytest.mark.parametrize("name", TAGGED)
def test_tags_and_provenance_differ_only_around_answer_and_stop(shared: Path, name: str) -> None:
    before, behind = AROUND_TAGS.get(name, ("", ""))
    for turns in CONVERSATIONS.values():
        if turns is CONVERSATIONS["system"] and name in NO_SYSTEM:
            continue
        turns = [(role, content.strip()) for role, content in turns]
        tagged = said(template_of(name, shared).tokenize(conversation(turns), BYTES, loss_on="assistant"), BYTES)
        expected = [before + piece + behind for piece in golden(TAGGED[name], turns)]
        if name == "trl/phi3_training":
            expected[-1] += "</s>"
        assert tagged == expected


def test_alpaca_is_stanfords_text() -> None:
    record = Message("user", "Add.\n\n1 and 2", extra={"instruction": "Add.", "input": "1 and 2"})
    with_input = Conversation((record, Message("assistant", "3")))
    assert template_of("alpaca").render(with_input, bos_token=None, eos_token="</s>").text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3</s>"
    )
    without = conversation([("user", "Say hi."), ("assistant", "hi")])
    assert template_of("alpaca").render(without, bos_token=None, eos_token="</s>").text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\nhi</s>"
    )


@pytest.mark.parametrize("name", BUILTIN)
def test_a_generation_prompt_is_the_text_up_to_the_answer(name: str) -> None:
    turns = CONVERSATIONS["system"]
    whole = template_of(name).render(conversation(turns), bos_token="<s>", eos_token="</s>").text
    prompt = template_of(name).render(
        conversation(turns[:-1]), bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )
    assert whole.startswith(prompt.text) and whole.removeprefix(prompt.text).startswith("Bye!")


@pytest.mark.parametrize("name", ["alpaca", "phi3", "llama3"])
def test_builtin_templates_without_a_syntax_for_tools_refuse_them(name: str) -> None:
    plain = conversation(CONVERSATIONS["single"])
    with pytest.raises(BadRecord, match="tools"):
        template_of(name).tokenize(Conversation(plain.messages, ({"name": "f"},)), BYTES, loss_on="assistant")
    called = Message("assistant", "", extra={"tool_calls": [{"function": {"name": "f", "arguments": {}}}]})
    with pytest.raises(BadRecord, match="function calls"):
        template_of(name).tokenize(Conversation((*plain.messages, called)), BYTES, loss_on="assistant")


# --- real records, the tokenizer of a real model ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpaca", "chatml"])
def test_golden_on_real_records(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    records = list(read_records(str(shared / "data/instruct/rasbt_instruction_data.json"), Rejects()))
    conversations = [one for record in records for one in to_conversations(record, "alpaca", {})]
    stop = {"alpaca": tokenizer.eos_token, "chatml": "<|im_end|>"}[name]
    examples = template_of(name).tokenize_batch(conversations, tokenizer, loss_on="assistant")
    assert len(examples) == 1100
    for example, record in zip(examples, records, strict=True):
        assert isinstance(example, TokenizedExample)
        assert [piece.lstrip() for piece in said(example, tokenizer)] == [record.value["output"].strip() + stop]


def test_bos_is_prepended_when_the_tokenizer_wants_it_and_the_template_has_none() -> None:
    tokenizer = byte_tokenizer()
    turns = conversation(CONVERSATIONS["single"])
    plain = template_of("chatml").tokenize(turns, tokenizer, loss_on="assistant")
    wanting = byte_tokenizer()
    wanting.add_bos_token = True
    added = template_of("chatml").tokenize(turns, wanting, loss_on="assistant")
    assert added.input_ids.tolist() == [wanting.bos_token_id, *plain.input_ids.tolist()]
    assert added.loss_weights.tolist() == [0.0, *plain.loss_weights.tolist()]
    own = template_of("llama3").tokenize(turns, wanting, loss_on="assistant")
    assert own.input_ids.tolist().count(wanting.bos_token_id) == 1


# --- what is supervised ----------------------------------------------------------------------------------------------


def pieces(messages: list[Message], **settings: object) -> list[str]:
    settings = {"loss_on": "assistant"} | settings
    return said(template_of("chatml").tokenize(Conversation(tuple(messages)), BYTES, **settings), BYTES)


TWO_ANSWERS = [Message("user", "q"), Message("assistant", "a"), Message("user", "r"), Message("assistant", "b")]


def test_loss_on() -> None:
    assert pieces(TWO_ANSWERS) == ["a<|im_end|>", "b<|im_end|>"]
    assert pieces(TWO_ANSWERS, loss_on="last_turn") == ["b<|im_end|>"]
    assert pieces([*TWO_ANSWERS, Message("assistant", "c")], loss_on="completion") == ["b<|im_end|>", "c<|im_end|>"]
    (everything,) = pieces(TWO_ANSWERS, loss_on="all")
    assert (
        everything
        == template_of("chatml").render(Conversation(tuple(TWO_ANSWERS)), bos_token=None, eos_token="</s>").text
    )


def test_a_messages_own_weight_wins() -> None:
    muted = [*TWO_ANSWERS[:3], Message("assistant", "b", weight=0.0)]
    assert pieces(muted) == ["a<|im_end|>"]
    assert pieces([Message("user", "q", weight=1.0), *TWO_ANSWERS[1:]]) == ["q<|im_end|>", "a<|im_end|>", "b<|im_end|>"]
    halved = Conversation((TWO_ANSWERS[0], Message("assistant", "a", weight=0.5)))
    weights = template_of("chatml").tokenize(halved, BYTES, loss_on="assistant").loss_weights
    assert sorted(set(weights.tolist())) == [0.0, 0.5]


def test_prompt_loss_weight_counts_instructions_not_the_template() -> None:
    messages = [Message("system", "s"), Message("user", "q"), Message("assistant", "a")]
    example = template_of("chatml").tokenize(
        Conversation(tuple(messages)), BYTES, loss_on="assistant", prompt_loss_weight=0.25
    )
    weighted = [BYTES.decode(i) for i, w in zip(example.input_ids, example.loss_weights, strict=True) if w == 0.25]
    assert weighted == ["s", "q"] and said(example, BYTES)[-1] == "a<|im_end|>"


def test_plain_text_is_learned_whole_with_an_end() -> None:
    assert pieces([Message("text", "Once upon a time")]) == ["Once upon a time</s>"]


def test_a_batch_returns_each_refusal_in_its_place() -> None:
    bad = Conversation(
        (Message("user", "q"), Message("assistant", "a")), ({"name": "f"},), "data.json", "data.json:3+40"
    )
    good = conversation(CONVERSATIONS["single"])
    first, second, third = template_of("alpaca").tokenize_batch([good, bad, good], BYTES, loss_on="assistant")
    assert isinstance(second, BadRecord) and (second.file, second.line, second.byte) == ("data.json", 3, 40)
    assert said(first, BYTES) == said(third, BYTES) == ["It is 4.</s>"]


# --- the comparison is able to fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("shift", [-1, 1])
def test_mutation_a_mask_shifted_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str, shift: int) -> None:
    import sft_dist.data.templates as module

    monkeypatch.setattr(module, "token_weights", lambda *args: np.roll(token_weights(*args), shift))
    with pytest.raises(AssertionError):
        check_golden(name, template_of(name), BYTES)


@pytest.mark.parametrize("name", BUILTIN)
def test_mutation_a_dropped_stop_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Stops, "find", lambda *args: None)
    with pytest.raises(AssertionError):
        check_golden(name, template_of(name), BYTES)


# --- names, files, helpers -------------------------------------------------------------------------------------------


def test_auto_is_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="no chat template of its own; set data"):
        resolve_template("auto", tokenizer)
    tokenizer.chat_template = "own"
    assert resolve_template("auto", tokenizer).text == "own"
    tokenizer.chat_template = {"default": "first", "tool_use": "second"}
    assert resolve_template("auto", tokenizer).text == "first"


def test_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean chatml"):
        resolve_template("chatmll", BYTES)
    file = tmp_path / "mine.jinja"
    file.write_bytes("\ufeff{{ messages[0].content }}\r\n".encode())
    assert resolve_template(str(file), BYTES).text == "{{ messages[0].content }}\r\n"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 0"):
        resolve_template(str(file), BYTES)


def test_spans_of_weights() -> None:
    assert spans(np.array([0, 0.5, 1, 0, 1], dtype=np.float32)) == [(1, 3), (4, 5)]
    assert spans(np.zeros(3, dtype=np.float32)) == [] and spans(np.zeros(0, dtype=np.float32)) == []


def test_token_weights_take_the_larger_weight_and_fill_gaps() -> None:
    offsets = [(0, 2), (3, 5), (5, 5), (6, 9)]  # the white space at 2 and 5 is trimmed off, and belongs to what follows
    chosen = [Span(2, 3, 1.0), Span(4, 6, 0.5)]
    weights = token_weights(len(offsets), ranges_by_offsets(offsets, chosen), chosen)
    assert weights.tolist() == [0.0, 1.0, 0.5, 0.5]
    assert token_weights(0, [], []).tolist() == [] and ranges_by_offsets([], [Span(0, 1, 1.0)]) == [(0, 0)]


def test_answers_are_the_tokens_of_each_learned_turn() -> None:
    offsets = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    asked, muted = Span(0, 2, 1.0), Span(0, 2, 0.0, 0)
    pieces = [Span(3, 4, 1.0, 1), Span(5, 6, 1.0, 1), Span(8, 9, 0.5, 3)]
    chosen = [asked, muted, *pieces]
    assert token_answers(ranges_by_offsets(offsets, chosen), chosen) == ((1, 3), (4, 5))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("ab c<|im_end|>\n\u2028é漢🎉\u0301", min_size=1, max_size=40),
    edges=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=4),
)
def test_ranges_from_edges_equal_ranges_from_all_offsets(shared: Path, text: str, edges: list[tuple[int, int]]) -> None:
    chosen = [Span(min(at, len(text) - 1), min(at + length + 1, len(text)), 1.0) for at, length in edges]
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    for tokenizer in (BYTES, gpt2_tokenizer(shared), stories):
        (encoding,) = tokenizer([text], add_special_tokens=False).encodings
        expected = ranges_by_offsets(encoding.offsets, chosen)
        assert token_ranges(encoding, len(text), chosen) == expected, (tokenizer.name_or_path, encoding.offsets)


@pytest.mark.parametrize("loss_on", ["assistant", "all", "last_turn"])
@pytest.mark.parametrize("prompt_loss_weight", [0.0, 1.0])
@pytest.mark.parametrize("name", BUILTIN)
def test_the_last_answer_is_the_last_assistant_turn(name: str, loss_on: str, prompt_loss_weight: float) -> None:
    turns = [Message(role, f"{role} {turn}") for turn in "ab" for role in ("user", "assistant")]
    example = template_of(name).tokenize(
        Conversation((*turns, Message("user", "unanswered"))) if loss_on == "assistant" else Conversation(tuple(turns)),
        BYTES,
        loss_on=loss_on,
        prompt_loss_weight=prompt_loss_weight,
    )
    start, end = example.answers[-1]
    assert BYTES.decode(example.input_ids[start:end], skip_special_tokens=True).strip().startswith("assistant b")
    assert "unanswered" not in BYTES.decode(example.input_ids[start:end])
    assert len(example.answers) == (1 if loss_on == "last_turn" else 2)


def test_stop_token_ids(shared: Path) -> None:
    ids = template_of("trl/gptoss", shared).stop_token_ids(BYTES)
    assert BYTES.convert_ids_to_tokens(ids) == ["<|end|>", "<|return|>", "</s>"]


def test_how_a_model_opens_a_plain_answer(shared: Path) -> None:
    assert template_of("trl/gptoss", shared).bind(BYTES).opening == "<|channel|>final<|message|>"
    assert template_of("chatml").bind(BYTES).opening == ""


def test_thoughts_that_a_template_does_not_know_are_refused() -> None:
    thinking = Message("assistant", "A", extra={"reasoning_content": "lost", "thinking": "lost"})
    with pytest.raises(BadRecord, match="the chat template leaves out the reasoning"):
        template_of("chatml").tokenize(Conversation((Message("user", "Q"), thinking)), BYTES, loss_on="assistant")

"""Turns with reasoning and function calls, templates that drop or hide text: supervised exactly, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from template_cases import byte_tokenizer

from sft_dist.data.openings import generation_prompt, opening
from sft_dist.data.supervision import Stops, message_weights
from sft_dist.data.templates import ChatTemplate, resolve_template, spans
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, Message

BYTES = byte_tokenizer()
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {}}},)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 3}}}
QUESTION, ANSWER = Message("user", "Rain?"), Message("assistant", "No.")
RESULT = Message("tool", "sunny")


def calling(content: str = "", **extra: Any) -> Message:
    return Message("assistant", content, extra={"tool_calls": [CALL], **extra})


def said(template: ChatTemplate, *messages: Message, tools: tuple[Any, ...] = ()) -> list[str]:
    example = template.tokenize(Conversation(messages, tools, "f.json", "f.json:1"), BYTES, loss_on="assistant")
    return [BYTES.decode(example.input_ids[start:end]) for start, end in spans(example.loss_weights)]


def of(text: str) -> ChatTemplate:
    return ChatTemplate("test", text)


@pytest.fixture
def templates(shared: Path) -> Any:
    return lambda name: resolve_template(str(shared / "data/chat_templates/trl" / f"{name}.jinja"), BYTES)


JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "n": 3}}\n</tool_call><|im_end|>'


def test_calls_of_the_builtin_chatml() -> None:
    chatml = resolve_template("chatml", BYTES)
    assert said(chatml, QUESTION, calling(), RESULT, ANSWER, tools=TOOLS) == [JSON_CALL, "No.<|im_end|>"]
    assert said(chatml, QUESTION, calling("Hm."), RESULT, ANSWER, tools=TOOLS)[0] == f"Hm.\n{JSON_CALL}"
    twice = Message("assistant", "", extra={"tool_calls": [CALL, CALL]})
    assert said(chatml, QUESTION, twice, RESULT)[0] == f"{JSON_CALL.removesuffix('<|im_end|>')}\n{JSON_CALL}"


def test_calls_of_qwen(templates: Any) -> None:
    for name in ("qwen2_5", "qwen3"):
        assert said(templates(name), QUESTION, calling(), RESULT, ANSWER, tools=TOOLS) == [JSON_CALL, "No.<|im_end|>"]
    # as the last turn, qwen3 writes an empty think block in front: that is the template's, not the model's
    assert said(templates("qwen3"), QUESTION, calling(), tools=TOOLS) == [JSON_CALL]


def test_calls_of_llama(templates: Any) -> None:
    call = '{"name": "weather", "parameters": {"city": "Köln", "n": 3}}<|eot_id|>'
    assert said(templates("llama3_1"), QUESTION, calling(), RESULT, ANSWER, tools=TOOLS) == [call, "No.<|eot_id|>"]


def test_calls_and_channels_of_gptoss(templates: Any) -> None:
    """A model is asked with `<|start|>assistant`: the channel is its own to name. The tool's turn repeats the
    function's name in a header of its own, which nobody is to learn."""
    final = "<|channel|>final<|message|>No.<|return|>"
    call = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln", "n": 3}<|call|>'
    assert said(templates("gptoss"), QUESTION, calling(), RESULT, ANSWER, tools=TOOLS) == [call, final]
    wondering = said(templates("gptoss"), QUESTION, calling("Hm."), tools=TOOLS)
    assert wondering == [f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{call}"]
    assert said(templates("gptoss"), QUESTION, ANSWER, QUESTION, ANSWER) == [final.replace("return", "end"), final]
    thinking = Message("assistant", "No.", extra={"thinking": "Sun.", "reasoning_content": "Sun."})
    assert said(templates("gptoss"), QUESTION, thinking) == [
        "<|channel|>analysis<|message|>Sun.<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>"
    ]


def test_calls_of_deepseek_take_their_arguments_as_text(templates: Any) -> None:
    (call, answer) = said(templates("deepseekv3"), QUESTION, calling(), RESULT, ANSWER)
    assert call == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Köln", "n": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    )
    assert answer == "No.<｜end▁of▁sentence｜>"


def test_reasoning_is_learned_with_what_opens_it(templates: Any) -> None:
    thinking = Message("assistant", "No.", extra={"reasoning_content": "Sun."})
    expected = ["<think>\nSun.\n</think>\n\nNo.<|im_end|>"]
    assert said(templates("qwen3"), QUESTION, thinking) == expected
    written_out = Message("assistant", "<think>\nSun.\n</think>\n\nNo.")
    assert said(templates("qwen3"), QUESTION, written_out) == expected


def test_reasoning_that_the_template_drops_is_not_learned(templates: Any) -> None:
    thinking = Message("assistant", "<think>\nSun.\n</think>\n\nNo.")
    assert said(templates("qwen3"), QUESTION, thinking, QUESTION, ANSWER) == ["No.<|im_end|>", "No.<|im_end|>"]
    assert said(templates("deepseekv3"), QUESTION, thinking) == ["\n\nNo.<｜end▁of▁sentence｜>"]


def test_an_empty_think_block_is_never_supervised_without_tags(templates: Any) -> None:
    assert said(templates("qwen3"), QUESTION, ANSWER) == ["No.<|im_end|>"]


def test_an_answer_whose_thoughts_are_left_out_does_not_teach_to_leave_them_out(templates: Any) -> None:
    """gpt-oss drops the thoughts of earlier turns; `final` right behind the prompt would be learned there."""
    thinking = Message("assistant", "No.", extra={"thinking": "Sun.", "reasoning_content": "Sun."})
    earlier, last = said(templates("gptoss"), QUESTION, thinking, QUESTION, thinking)
    assert earlier == "No.<|end|>"
    assert last.startswith("<|channel|>analysis<|message|>Sun.<|end|>")


def test_an_opening_is_learned_but_is_not_a_part_of_the_answer(templates: Any) -> None:
    """So questions end, and answers are compared, where the words begin."""
    example = templates("gptoss").tokenize(Conversation((QUESTION, ANSWER)), BYTES, loss_on="assistant")
    assert [BYTES.decode(example.input_ids[slice(*edges)]) for edges in example.answers] == ["No.<|return|>"]


def test_openings() -> None:
    assert generation_prompt("<q></s>", "<q><a>") == "a>", "only where it ends matters"
    assert generation_prompt("<q>", "<q>") == "" and opening("<q><a>: ", "") == ""
    assert opening("<q><a>: ", "<a>") == ": " and opening("<q><a>", "<a>") == opening("<q><b> ", "<a>") == ""
    for block in ("<think>\n\n</think>\n\n", "</think>", "[THINK][/THINK]", "<|channel>thought\n<channel|>"):
        assert opening(f"<q><a>{block}", "<a>") == ""


@pytest.mark.parametrize("asks", ["{% if add_generation_prompt %}<|im_start|>assistant{% endif %}", ""])
def test_a_template_without_a_generation_prompt_has_no_opening(asks: str) -> None:
    template = of(LOOP + "{{ m.content }}<|im_end|>{% endfor %}" + asks)
    assert said(template, QUESTION, ANSWER) == ["\nNo.<|im_end|>" if asks else "No.<|im_end|>"]


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(LOOP + "{{ m.content | e }}<|im_end|>{% endfor %}", "cannot be followed", id="escape"),
        pytest.param(LOOP + "{{ [m.content] }}<|im_end|>{% endfor %}", "cannot be followed", id="representation"),
        pytest.param(
            LOOP + "{{ m.content[:1] ~ (m.content[1:] | safe) }}<|im_end|>{% endfor %}", "cannot be followed", id="half"
        ),
        pytest.param(LOOP + "<|im_end|>{% endfor %}", r"leaves out message 1 \(user\)", id="nothing"),
        pytest.param("{{ messages[0].content }}", r"leaves out message 2 \(assistant\)", id="no-answer"),
        pytest.param("{{ messages[1].content }}</s>", r"leaves out message 1 \(user\)", id="no-question"),
        pytest.param(LOOP + "{{ m.content }}</s>{% endfor %}{{ messages[1].content }}", "two places", id="twice"),
        pytest.param(
            LOOP + "{{ m.content }}</s>{% endfor %}{{ messages[0].content }}{{ messages[1].content }}",
            "two places",
            id="twice-apart",
        ),
        pytest.param(
            LOOP + "{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}</s>{% endgeneration %}{% endfor %}",
            "only a part",
            id="tags-hold-a-part",
        ),
    ],
)
def test_refused_never_guessed(text: str, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        said(of(text), Message("user", "Rain & snow?"), Message("assistant", "Yes & no."))


def test_tools_or_calls_that_a_template_leaves_out_are_refused(templates: Any) -> None:
    with pytest.raises(BadRecord, match="leaves out the tools"):
        said(templates("deepseekv3"), QUESTION, ANSWER, tools=TOOLS)
    with pytest.raises(BadRecord, match="leaves out the function call of message 2"):
        said(templates("phi3"), QUESTION, calling("Hm."))


def test_tags_without_the_stop_get_it_added() -> None:
    text = LOOP + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    assert said(of(text), QUESTION, ANSWER) == ["No.<|im_end|>"]


def test_a_template_without_any_stop_gets_the_end_token() -> None:
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' if not loop.last }}{% endfor %}"
    assert said(of(text), QUESTION, ANSWER) == ["No.</s>"]
    assert of(text).stop_token_ids(BYTES) == [BYTES.eos_token_id]
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no model would learn to stop"):
        of(text).tokenize(Conversation((QUESTION, ANSWER)), endless, loss_on="assistant")


def test_a_template_that_writes_only_some_answers_in_tags_follows_the_rule_for_the_others() -> None:
    text = (
        LOOP + "{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    assert said(of(text), QUESTION, ANSWER, QUESTION, ANSWER) == ["No.<|im_end|>", "No.<|im_end|>\n"]


def test_stop_texts() -> None:
    stops = Stops(["</s>", "<|im_end|>"])
    assert stops.find("x <b>bold</b></s>", 1, 99) == (13, 17), "a known stop is found behind other markers"
    assert stops.find("x <|end|>", 1, 99) == (2, 9), "with no known stop, the first marker"
    assert stops.find("x</s>", 1, 3) is None and Stops([]).find("plain", 0, 5) is None
    assert stops.earliest("<|end|>\n</s>", 0, 99) == (0, 7)


def test_weights_by_role_and_place() -> None:
    messages = [QUESTION, calling(), RESULT, ANSWER]
    assert message_weights(messages, "assistant") == [0, 1, 0, 1]
    assert message_weights(messages, "last_turn") == [0, 0, 0, 1]
    assert message_weights(messages, "completion") == [0, 1, 0, 1]
    assert message_weights([*messages, QUESTION, ANSWER], "completion") == [0, 0, 0, 0, 0, 1]
    assert message_weights([QUESTION, Message("assistant", "a", weight=0.3)], "all") == [1, 0.3]


def test_mutation_without_the_header_rule_a_call_loses_its_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_dist.data.templates import BoundTemplate

    monkeypatch.setattr(BoundTemplate, "_header_end", lambda self, conversation, rendered, turn: turn.start)
    chatml = resolve_template("chatml", BYTES)
    assert said(chatml, QUESTION, calling(), tools=TOOLS) != [JSON_CALL]

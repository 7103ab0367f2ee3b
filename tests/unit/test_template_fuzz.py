"""Whatever is said, by whom and with which tools: what is learned is what the assistant wrote, and all of it.

Users write Greek, tools answer in Cyrillic, the system speaks Hebrew, the assistant Latin: a leak shows as a letter.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_cases import BUILTIN, NO_SYSTEM, TEMPLATES, UNTAGGED, byte_tokenizer

from sft_dist.data.templates import resolve_template, spans
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message, TokenizedExample

BYTES = byte_tokenizer()
FOREIGN = re.compile("[\u0370-\u03ff\u0400-\u04ff\u0590-\u05ff]")
LATIN = re.compile("[a-z]+")
SPACE = " \n\t\u2028"

greek = st.text("αβγδ<|>[]{}:#" + SPACE, min_size=1, max_size=20).map(lambda text: f"ω{text}ω") | st.just("")
hebrew = st.text("אבגד<|>" + SPACE, min_size=1, max_size=12).map(lambda text: f"ש{text}ש") | st.just("")
cyrillic = st.text('бвгд"{}<>' + SPACE, min_size=1, max_size=12).map(lambda text: f"ж{text}ж")
latin = st.text("abcdefgh<|>[]{}:#.%é漢🎉" + SPACE, max_size=24).map(lambda text: f"x{text}y")
values = st.recursive(st.integers(0, 9) | latin, lambda inner: st.lists(inner, max_size=2), max_leaves=3)
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["look", "find"]),
    st.dictionaries(st.sampled_from(["p", "q"]), values, max_size=2),
)
FUNCTIONS = tuple({"type": "function", "function": {"name": n, "description": "β"}} for n in ("look", "find"))


@st.composite
def talks(draw: st.DrawFn, tools: bool = False) -> Conversation:
    messages = [Message("system", draw(hebrew))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(greek)))
        if tools and draw(st.booleans()):
            messages.append(Message("assistant", "", extra={"tool_calls": [draw(calls)]}))
            messages.append(Message("tool", draw(cyrillic), extra={"name": "look"}))
        messages.append(Message("assistant", draw(latin)))
    return Conversation(tuple(messages), FUNCTIONS if tools else (), "f.json", "f.json:1")


def learned(example: TokenizedExample) -> str:
    return " ".join(BYTES.decode(example.input_ids[start:end]) for start, end in spans(example.loss_weights))


def check(talk: Conversation, example: TokenizedExample) -> None:
    """No foreign letter is learned, and of the answers' words none is missing."""
    text = learned(example)
    assert not FOREIGN.search(text), text
    answers = [message.content for message in talk.messages if message.role == "assistant" and message.content]
    wanted = [word for answer in answers for word in LATIN.findall(answer)]
    found = iter(LATIN.findall(text))
    assert all(word in found for word in wanted), (wanted, text)


@pytest.mark.parametrize("name", [*BUILTIN, *TEMPLATES])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(talk=talks())
def test_no_other_voice_is_learned(name: str, shared: Path, talk: Conversation) -> None:
    if name in NO_SYSTEM:
        talk = Conversation(tuple(m for m in talk.messages if m.role != "system"), (), talk.source, talk.id)
    check(talk, template(name, shared).tokenize(talk, BYTES, loss_on="assistant"))


FOLLOW_TOOLS = [
    "chatml",
    "chujiezheng/qwen2.5-instruct",
    "trl/gptoss",
    "trl/llama3_1",
    "trl/llama3_2",
    "trl/qwen2_5",
    "trl/qwen2_5_training",
    "trl/qwen3",
    "trl/qwen3_training",
]
ONLY_CALLS = ["trl/deepseekv3"]  # writes calls and what tools answer, but no signatures
ONLY_SIGNATURES = ["chujiezheng/granite-3.0-instruct"]  # its calls are messages of roles of its own


@pytest.mark.parametrize("name", [*FOLLOW_TOOLS, *ONLY_CALLS])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(talk=talks(tools=True))
def test_calls_are_learned_and_what_tools_answer_is_not(name: str, shared: Path, talk: Conversation) -> None:
    called = [c["function"]["name"] for m in talk.messages for c in m.extra.get("tool_calls", ())]
    if name in ONLY_CALLS:
        talk = Conversation(talk.messages, (), talk.source, talk.id)
    if name in ONLY_CALLS and len(called) > 1:  # it writes the speaker's header before the first call only
        with pytest.raises(BadRecord, match="cannot tell where the header of message"):
            template(name, shared).tokenize(talk, BYTES, loss_on="assistant")
        return
    example = template(name, shared).tokenize(talk, BYTES, loss_on="assistant")
    check(talk, example)
    assert re.findall("look|find", learned(example)) == called


@pytest.mark.parametrize("name", [*BUILTIN, *UNTAGGED])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(talk=talks(), weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3))
def test_a_muted_turn_teaches_nothing(name: str, shared: Path, talk: Conversation, weights: list[float]) -> None:
    """Each assistant turn carries its own weight; the last one that counts decides whether anything is learned."""
    given_weights = iter(weights)
    messages = tuple(
        Message(m.role, m.content, next(given_weights)) if m.role == "assistant" else m
        for m in talk.messages
        if not (name in NO_SYSTEM and m.role == "system")
    )
    example = template(name, shared).tokenize(Conversation(messages, (), "f", "f:1"), BYTES, loss_on="assistant")
    wanted = [m.weight for m in messages if m.role == "assistant" and m.weight]
    assert [float(example.loss_weights[start]) for start, _ in example.answers] == wanted
    assert len(example.answers) == len(wanted)


def template(name: str, shared: Path):
    return resolve_template(name if name in BUILTIN else str(shared / "data/chat_templates" / f"{name}.jinja"), BYTES)


def test_a_template_without_tools_refuses_them() -> None:
    talk = Conversation((Message("user", "α"), Message("assistant", "x")), FUNCTIONS, "f", "f:1")
    with pytest.raises(BadRecord, match="no syntax for tools"):
        resolve_template("phi3", BYTES).tokenize(talk, BYTES, loss_on="assistant")


def test_what_a_template_leaves_out_of_tools_is_refused(shared: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = (Message("user", "α"), Message("assistant", "", extra={"tool_calls": [call]}), Message("tool", "ж"))
    talk = Conversation((*turns, Message("assistant", "x")), FUNCTIONS, "f", "f:1")
    for names, left_out in ((ONLY_CALLS, "the tools"), (ONLY_SIGNATURES, "the function call of message 2")):
        for name in names:
            with pytest.raises(BadRecord, match=f"the chat template leaves out {left_out}"):
                template(name, shared).tokenize(talk, BYTES, loss_on="assistant")


def test_the_lists_are_whole(shared: Path) -> None:
    folder = shared / "data/chat_templates"
    texts = {str(f.relative_to(folder).with_suffix("")): f.read_text(encoding="utf-8") for f in folder.rglob("*.jinja")}
    assert {*TEMPLATES} == texts.keys()
    speak_of_tools = {name for name, text in texts.items() if "tool_calls" in text or "tools" in text}
    assert {*FOLLOW_TOOLS, *ONLY_CALLS, *ONLY_SIGNATURES} == {"chatml"} | speak_of_tools

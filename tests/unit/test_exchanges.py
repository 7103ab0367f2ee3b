"""What was asked and answered comes back from tokens, whatever template stood around it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.builtin_templates import BUILTIN
from sft_dist.data.exchanges import Frame, exchanges, find_frame
from sft_dist.data.templates import ChatTemplate
from sft_dist.types import Conversation, Message
from tests.preparing import byte_tokenizer

TOKENIZER = byte_tokenizer()
WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=30).map(str.strip)


def said(template: str, *texts: str, loss_on: str = "assistant", system: str = ""):
    """The exchanges of a conversation that begins with a user."""
    chat = ChatTemplate(template, BUILTIN[template])
    turns = [Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    messages = (*([Message("system", system)] if system else []), *turns)
    example = chat.tokenize(Conversation(messages), TOKENIZER, loss_on=loss_on)
    return exchanges([example], TOKENIZER, find_frame(chat, TOKENIZER))[0]


@pytest.mark.parametrize("template", BUILTIN)
@given(texts=st.lists(WORDS.filter(bool), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_every_turn_comes_back(template, texts):
    found = said(template, *texts)
    assert [text for one in found for text in (one.question, one.answer)] == texts
    assert all(one.asked and one.stopped for one in found)


@pytest.mark.parametrize("template", BUILTIN)
def test_a_system_prompt_is_no_part_of_the_question(template):
    assert said(template, "who are you?", "a test", system="Be brief.")[0].question == "who are you?"


def test_under_last_turn_the_question_is_the_last_one():
    (one,) = said("chatml", "first", "no", "second", "yes", loss_on="last_turn")
    assert (one.question, one.answer) == ("second", "yes")


def test_frames_of_the_builtin_templates():
    frame = find_frame(ChatTemplate("alpaca", BUILTIN["alpaca"]), TOKENIZER)
    assert frame == Frame("### Instruction:", "### Response:", ("<|im_end|>",))


def test_a_template_that_refuses_the_probe_has_no_frame_and_questions_are_whole():
    chat = ChatTemplate("once", "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}Q: "
        "{{ messages[0].content }} A: {{ messages[1].content }}{{ eos_token }}")  # fmt: skip
    assert find_frame(chat, TOKENIZER) is None
    example = chat.tokenize(
        Conversation((Message("user", "why"), Message("assistant", "so"))), TOKENIZER, loss_on="assistant"
    )
    (one,) = exchanges([example], TOKENIZER, None)[0]
    assert (one.question, one.answer) == ("Q: why A:", "so<|im_end|>")


def test_tool_results_were_asked_by_nobody():
    messages = (Message("user", "how warm?"), Message("assistant", "let me see"), Message("tool", "21"),
        Message("assistant", "21 degrees"))  # fmt: skip
    chat = ChatTemplate("chatml", BUILTIN["chatml"])
    example = chat.tokenize(Conversation(messages), TOKENIZER, loss_on="assistant")
    found = exchanges([example], TOKENIZER, find_frame(chat, TOKENIZER))[0]
    assert [one.asked for one in found] == [True, False]

"""Put together from a skeleton or rendered in full: the same text and the same mask, or no skeleton."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from template_cases import BUILTIN, TEMPLATES, byte_tokenizer

from sft_dist.data import templates
from sft_dist.data.provenance import CONTENT, Looked, Opaque, Traced, derive, letter
from sft_dist.data.skeleton import FEW, learn, shape_of
from sft_dist.data.templates import BoundTemplate, ChatTemplate, resolve_template
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

BYTES = byte_tokenizer()
MARKS = [
    "<|im_end|>",
    "</think>",
    "<think>",
    "</s>",
    "[/INST]",
    "<tool_response>",
    "<<SYS>>",
    "{{ x }}",
    "\n\n",
    "model",
]
words = st.lists(st.sampled_from(MARKS) | st.text("ab é漢\n\t\"'\\<|&", max_size=5), max_size=4).map("".join)
weights = st.none() | st.sampled_from([0.0, 0.5, 1.0])
SHAPES = (("user", "assistant"), ("system", "user", "assistant", "user", "assistant"), ("user", "assistant", "user"))


@st.composite
def talks(draw: st.DrawFn) -> Conversation:
    roles = draw(st.sampled_from(SHAPES))
    return Conversation(tuple(Message(role, draw(words), draw(weights)) for role in roles))


def bound(name: str, shared: Path) -> BoundTemplate:
    path = name if name in BUILTIN else str(shared / "data" / "chat_templates" / f"{name}.jinja")
    return resolve_template(path, BYTES).bind(BYTES)


def agree(template: BoundTemplate, talk: Conversation, loss_on: str = "assistant", prompt: float = 0.0) -> bool:
    """Whether there is a skeleton that fits; if there is, it has to give what a full rendering gives."""
    shape = shape_of(talk)
    assert shape is not None
    skeleton = template._learn(shape, loss_on, prompt)
    filled = skeleton and skeleton.fill(talk.messages)
    try:
        whole = template._supervised(template._render(talk), talk, loss_on, prompt)
    except BadRecord:
        whole = None
    assert not filled or filled == whole
    return bool(filled)


@pytest.mark.parametrize("name", [*BUILTIN, *TEMPLATES])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(talk=talks(), loss_on=st.sampled_from(["assistant", "all", "last_turn"]), prompt=st.sampled_from([0.0, 0.25]))
def test_a_skeleton_gives_what_a_full_rendering_gives(
    name: str, shared: Path, talk: Conversation, loss_on: str, prompt: float
) -> None:
    agree(bound(name, shared), talk, loss_on, prompt)


USUAL = ["chatml", "phi3", "llama3", "alpaca", "trl/qwen2_5_training", "trl/deepseekv3", "trl/qwen3_training"]


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_templates_have_one(name: str, shared: Path) -> None:
    assert agree(bound(name, shared), Conversation((Message("user", "a b"), Message("assistant", " c\n"))))


def test_most_templates_have_one(shared: Path) -> None:
    talk = Conversation((Message("user", "a b"), Message("assistant", "c")))
    names = [*BUILTIN, *TEMPLATES]
    assert (sum(agree(bound(name, shared), talk) for name in names), len(names)) == (32, 37)


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>{% endfor %}"
LOOKS = {
    "upper": "{{ m.content | upper }}",
    "upper method": "{{ m.content.upper() }}",
    "slice": "{{ m.content[:3] }}",
    "length": "{{ m.content }}{{ m.content | length }}",
    "greater": "{{ 'a' if m.content > 'b' else 'c' }}{{ m.content }}",
    "equal": "{{ 'a' if m.content == 'ab' else 'c' }}{{ m.content }}",
    "holds": "{{ 'a' if 'b' in m.content else 'c' }}{{ m.content }}",
    "held": "{{ 'a' if m.content in 'ab a b' else 'c' }}{{ m.content }}",
    "held in a list": "{{ 'a' if m.content in ['ab', 'a'] else 'c' }}{{ m.content }}",
    "held in a mapping": "{{ {'ab': 'c', 'a': 'd'}.get(m.content, 'e') }}{{ m.content }}",
    "subscript": "{{ {'ab': 'c', 'a': 'd'}[m.content] }}{{ m.content }}",
    "test in": "{{ 'x' if m.content is in('ab a') else 'y' }}{{ m.content }}",
    "test lower": "{{ 'x' if m.content is lower else 'y' }}{{ m.content }}",
    "json": "{{ m.content | tojson }}",
    "json cut": "{{ (m.content | tojson)[1:-1] }}",
    "json of a message": "{{ m | tojson }}",
    "joined, then cut": "{% set x = 'a' + m.content %}{{ x.strip() }}",
    "set block": "{% set x %}a{{ m.content }}{% endset %}{{ x[1:] }}",
    "set block tested": "{% set x %}a{{ m.content }}{% endset %}{{ 'l' if x | length > 4 else 's' }}{{ m.content }}",
    "macro": "{% macro f(t) %}{{ 'y' if t == 'a' else 'n' }}{{ t }}{% endmacro %}{{ f(m.content) }}",
    "macro cut": "{% macro f(t) %}{{ t }}{% endmacro %}{{ f(m.content)[1:] }}",
    "filter block": "{% filter upper %}{{ m.content }}{% endfilter %}",
    "letters": "{% for c in m.content %}{{ c }}.{% endfor %}",
    "split": "{{ m.content.split('b')[0] }}",
    "replace": "{{ m.content.replace('a', 'bb') }}",
    "replaced into": "{{ 'x-y'.replace('-', m.content) }}",
    "replaced by filter": "{{ 'xay' | replace('a', m.content) }}",
    "format": "{{ '%s' % m.content }}",
    "format width": "{{ '%5s' % m.content }}",
    "str.format": "{{ '{:>5}'.format(m.content) }}",
    "format filter": "{{ '%.2s' | format(m.content) }}",
    "joined": "{{ ['x', m.content] | join('-') }}",
    "joined by it": "{{ m.content.join(['x', 'y']) }}",
    "twice": "{{ m.content }}{{ m.content }}",
    "trimmed and raw": "{{ m.content | trim }}|{{ m.content }}",
    "strip of letters": "{{ m.content.strip('a') }}",
    "startswith": "{{ 'x' if m.content.startswith('ab') else 'y' }}{{ m.content }}",
    "prefix of": "{{ 'x' if 'abc'.startswith(m.content) else 'y' }}{{ m.content }}",
    "sorted": "{{ [m.content, 'ab'] | sort | first }}{{ m.content }}",
    "max": "{{ [m.content, 'b'] | max }}{{ m.content }}",
    "unique": "{{ ['ab', m.content] | unique | list | length }}{{ m.content }}",
    "grouped": "{{ messages | groupby('content') | length }}{{ m.content }}",
    "selected": "{{ messages | selectattr('content', 'equalto', 'ab') | list | length }}{{ m.content }}",
    "mapped": "{{ messages | map(attribute='content') | join('') | length }}{{ m.content }}",
    "messages compared": "{{ 'x' if m == {'role': 'user', 'content': 'ab'} else 'y' }}{{ m.content }}",
    "changed": "{% if loop.changed(m.content) %}x{% endif %}{{ m.content }}",
    "integer": "{{ m.content | int }}{{ m.content }}",
    "concat compared": "{{ 'x' if m.content ~ 'c' == 'abc' else 'y' }}{{ m.content }}",
    "namespace": "{% set ns = namespace(x='') %}{% set ns.x = ns.x + m.content %}{{ ns.x | trim }}",
    "default": "{{ m.content or 'empty' }}{{ 'x' if not m.content else 'y' }}",
    "word count": "{{ m.content | wordcount }}{{ m.content }}",
    "safe": "{{ m.content | safe }}",
    "escape": "{{ m.content | e }}",
    "pprint": "{{ m.content | pprint }}",
    "indent": "{{ m.content | indent }}",
    "repeated": "{{ m.content * 2 }}",
    "chained": "{{ 'x' if 'a' in m.content in ['ab', 'ba'] else 'y' }}{{ m.content }}",
    "random": "{{ ['a', 'b'] | random }}{{ m.content }}",
    "dictsort": "{{ m | dictsort | last | last }}",
    "items": "{% for k, v in m.items() %}{{ v }}{% endfor %}",
    "values": "{{ m.values() | list | last }}",
    "tagged": "{% generation %}{{ m.content }}{% endgeneration %}",
    "tagged, then cut": "{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x[:2] }}",
}


@pytest.mark.parametrize("body", LOOKS.values(), ids=LOOKS.keys())
@settings(max_examples=25, deadline=None)
@given(talk=talks())
@example(Conversation((Message("user", "ab"), Message("assistant", "a"))))
@example(Conversation((Message("user", ' "b\\ab'), Message("assistant", "ab\n"))))
@example(Conversation((Message("user", "same"), Message("assistant", "same"))))
def test_whatever_a_template_does_with_a_content_it_is_followed_or_refused(body: str, talk: Conversation) -> None:
    agree(ChatTemplate("x", HEAD + body + TAIL).bind(BYTES), talk)


@pytest.mark.parametrize("text", ["{{ ['a', 'b'] | random }}", "{{ strftime_now('%S') }}", "{{ range(9) | random }}"])
def test_what_differs_from_time_to_time_has_none(text: str) -> None:
    template = ChatTemplate("z", HEAD + text + "{{ m.content }}" + TAIL).bind(BYTES)
    assert not any(template._learn((("user", None), ("assistant", None)), "assistant", 0.0) for _ in range(40))


def test_records_come_from_the_skeleton_after_a_few_and_are_compared_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(templates, "CHECKED", 10)
    template = ChatTemplate("x", HEAD + "{{ m.content }}" + TAIL).bind(BYTES)
    rendered: list[int] = []
    whole = template._render
    monkeypatch.setattr(template, "_render", lambda *given, **named: rendered.append(number) or whole(*given, **named))
    for number in range(30):
        talk = Conversation((Message("user", f"q{number}"), Message("assistant", f"a{number}")))
        text, spans = template.supervised_text(talk, "assistant", 0.0)
        assert text.endswith(f"a{number}<|im_end|>") and text[slice(*spans[0][:2])] == f"a{number}<|im_end|>"
    assert [n for n in rendered if n >= 2 * FEW] == [9, 19, 29]


def test_a_wrong_skeleton_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("w", HEAD + "{{ m.content }}" + TAIL).bind(BYTES)
    talk = Conversation((Message("user", "q"), Message("assistant", "a")))
    wrong = ChatTemplate("y", HEAD + "{{ m.content }}." + TAIL).bind(BYTES)
    monkeypatch.setattr(template, "_learn", wrong._learn)
    with pytest.raises(AssertionError, match=r"the skeleton of .* is wrong"):
        for _ in range(FEW):
            template.supervised_text(talk, "assistant", 0.0)


def test_what_is_no_plain_message_has_no_shape() -> None:
    plain = Message("user", "q")
    assert shape_of(Conversation((plain,))) == (("user", None),)
    assert shape_of(Conversation((plain,), tools=({"type": "function"},))) is None
    assert shape_of(Conversation((plain, Message("assistant", "a", extra={"thinking": "t"})))) is None


def test_every_way_to_look_at_a_text_is_closed() -> None:
    """Whatever `str` can do is refused, but for what leaves the text alone."""
    text = Opaque("abc", letter(0, CONTENT) * 3, (0, CONTENT))
    left = {"__new__", "__init__", "__class__", "__doc__", "__getattribute__", "__setattr__", "__delattr__",
            "__init_subclass__", "__subclasshook__", "__str__", "__add__", "__radd__", "__contains__", "__eq__",
            "__ne__", "startswith", "endswith", "strip", "lstrip", "rstrip"}  # fmt: skip
    for name in set(dir(str)) | set(dir(Traced)):
        if name not in left and callable(getattr(Traced, name)):
            with pytest.raises(Looked):
                getattr(text, name)("x")
    for look in (len, hash, repr, list, int, Traced, reversed, lambda x: f"{x:>9}", lambda x: x == text[:1]):
        with pytest.raises(Looked):
            look(text)
    assert learn((("user", None),), lambda talk: None, lambda *given: ("", [])) is None
    assert str(derive("x", Traced("y"))) == "x"

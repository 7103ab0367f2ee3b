"""Templates that would take hours or all memory are refused within seconds; real ones never notice the budget."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from sft_dist.data import render_budget
from sft_dist.data.rendering import render
from sft_dist.data.template_engine import compile_template
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

TALK = Conversation((Message("user", "hello"), Message("assistant", "world")))
SECONDS = 20.0  # a busy machine; each takes about two on a quiet one
BYTES = 2 << 30

BOMBS = {
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a constant times a number": "{{ 'a' * 200000000 }}",
    "a message times a number": "{{ messages[0].content * 200000000 }}",
    "a number times a text": "{{ 200000000 * 'a' }}",
    "a list times a number": "{{ ([0] * 2000000000) | length }}",
    "a doubled text": "{% set n = namespace(s='ab') %}{% for i in range(64) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a joined text": "{% set n = namespace(s='ab') %}{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a doubled list": "{% set n = namespace(l=[0]) %}{% for i in range(64) %}{% set n.l = n.l + n.l %}{% endfor %}",
    "a replaced text": (
        "{% set n = namespace(s='aa') %}{% for i in range(64) %}{% set n.s = n.s | replace('a', 'aa') %}{% endfor %}"
    ),
    "many long texts": (
        "{% set n = namespace(l=[], s='a' * 1000000) %}"
        "{% for i in range(9000) %}{% set n.l = n.l + [n.s ~ i] %}{% endfor %}"
    ),
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a wide number": "{{ '%999999999d' % 1 }}",
    "a wide field": "{{ '{:>999999999}'.format('a') }}",
    "a filter that centres": "{{ 'a' | center(999999999) }}",
    "a filter that indents": "{{ 'a\nb' | indent(999999999) }}",
    "a method that pads": "{{ messages[0].content.ljust(999999999) }}",
    "indented JSON": "{{ messages | tojson(indent=999999999) }}",
    "text out of nothing": "{{ lipsum(n=99999999) }}",
}


@pytest.fixture
def little_memory():
    """No more than two GiB on top of what the process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_soon_and_in_little_memory(name: str, little_memory: None) -> None:
    started = time.process_time()
    with pytest.raises(BadRecord, match="the chat template refuses the conversation"):
        render(compile_template(BOMBS[name]), TALK, {})
    assert time.process_time() - started < SECONDS


def test_the_budget_is_whole_again_for_the_next_conversation() -> None:
    bomb, plain = compile_template(BOMBS["nested loops"]), compile_template("{{ messages[0].content }}")
    with pytest.raises(BadRecord, match="more than 5,000,000 steps"):
        render(bomb, TALK, {})
    assert render(plain, TALK, {}).text == "hello"


def test_steps_are_counted_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget, not a clock: what fits once fits always."""
    loop = compile_template("{% for i in range(100) %}.{% endfor %}")
    for allowed, fits in ((110, True), (109, False)):  # 100 turns and the call of `range`
        monkeypatch.setattr(render_budget, "MAX_STEPS", allowed)
        for _ in range(3):
            try:
                assert render(loop, TALK, {}).text == "." * 100 and fits
            except BadRecord:
                assert not fits


def test_loops_keep_what_they_know() -> None:
    text = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.nextitem.content if not loop.last }} {% else %}none{% endfor %}"
        "{% for key, value in messages[0].items() %}{{ key }} {% endfor %}"
        "{% for x in [] %}{% else %}empty{% endfor %}{% for x in undefined_name %}{% endfor %}"
    )
    assert render(compile_template(text), TALK, {}).text == "1/2TrueFalseworld 2/2FalseTrue role content empty"


def test_a_long_conversation_fits() -> None:
    turns = tuple(Message("assistant" if n % 2 else "user", f"turn {n} " * 40) for n in range(2000))
    text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    assert len(render(compile_template(text), Conversation(turns), {}).text) > 500_000

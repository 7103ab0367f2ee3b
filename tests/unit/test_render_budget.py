"""Templates that would take hours or all memory are refused within seconds; real ones never notice the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import jinja2
import pytest
import template_bombs

from sft_dist.data import render_budget
from sft_dist.data.rendering import render
from sft_dist.data.template_engine import compile_template
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

TALK = Conversation((Message("user", "hello"), Message("assistant", "world")))
SECONDS = 20.0  # a busy machine; on a quiet one the dearest take less than three
MIB = 512  # what a rendering may take


@pytest.fixture(scope="module")
def children() -> Iterator[subprocess.Popen[str]]:
    """A small process that renders what it is told to, each in a child with limits."""
    command = [sys.executable, template_bombs.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("name", template_bombs.BOMBS)
def test_a_bomb_is_refused_soon_and_in_little_memory(name: str, children: subprocess.Popen[str]) -> None:
    assert children.stdin is not None and children.stdout is not None
    print(json.dumps(template_bombs.BOMBS[name]), file=children.stdin, flush=True)
    seconds, mib, refusal = json.loads(children.stdout.readline())
    assert refusal is not None, "accepted"
    assert refusal.startswith(("the chat template refuses the conversation: ", "data.chat_template: ")), refusal
    assert seconds < SECONDS
    assert mib < MIB


def test_the_budget_is_whole_again_for_the_next_conversation() -> None:
    bomb, plain = compile_template(template_bombs.BOMBS["nested loops"]), compile_template("{{ messages[0].content }}")
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


def test_what_real_templates_do_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop body as they have it leaves most of the budget, for about the longest conversation there may be."""
    text = (
        "{% for m in messages %}{% if m.role == 'user' and 'hello' in m.content %}{{ '<' + m.role + '>' }}"
        "{% elif m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}"
        "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
    )
    turns = tuple(Message("assistant" if n % 2 else "user", f"hello {n}") for n in range(8000))
    monkeypatch.setattr(render_budget, "MAX_STEPS", render_budget.MAX_STEPS // 8)
    assert "hello 7998" not in render(compile_template(text), Conversation(turns), {}).text


def test_lists_keep_what_they_were() -> None:
    """Counted filters and operators give what Jinja's own do."""
    text = (
        "{{ [3, 1, 2] | sort | list }}{{ [[1], [2, 3]] | sum(start=[]) }}{{ [1, 2] | sum }}{{ (1, 2) + (3,) }}"
        "{{ [1, 1, 2] | unique | list }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}"
        "{{ 2 in [1, 2] }}{{ [1] == [1] }}{{ [1] < [2] < [3] }}{{ [1, 2, 3][1:] }}{{ 7 - 2 * 2 }}"
        "{{ (1, 2) in {(1, 2): 1} }}"
        "{{ ['a', 'b'] | map('upper') | join('-') }}{{ 'x\ny' | indent(2) }}{{ {'b': 1, 'a': 2} | dictsort }}"
    )
    assert render(compile_template(text), TALK, {}).text == jinja2.Environment().from_string(text).render()

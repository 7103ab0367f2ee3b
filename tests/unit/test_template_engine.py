"""The sandbox: the same text as Hugging Face renders, with the origin of every character."""

from __future__ import annotations

from pathlib import Path

import pytest
from template_cases import CONVERSATIONS, TEMPLATES, conversation
from transformers.utils.chat_template_utils import render_jinja_template

from sft_dist.data.rendering import Rendered, render
from sft_dist.data.template_engine import compile_template
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, Message

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered(template: str, *texts: str) -> Rendered:
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return render(compile_template(template), Conversation(tuple(messages)), TOKENS)


def owned(template: str, *texts: str) -> list[tuple[str, int]]:
    """The pieces of the text with the number of their message, -1 literal, None unknown."""
    result = rendered(template, *texts)
    return [(result.text[r.start : r.end], None if r.is_unknown else r.message) for r in result.runs]


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_hugging_face(shared: Path, name: str, prompt: bool) -> None:
    template = (shared / "data/chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for turns in CONVERSATIONS.values():
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            theirs = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **TOKENS)[
                0
            ][0]
        except Exception as refusal:  # whatever the template raises, ours must refuse too
            with pytest.raises(BadRecord, match="refuses"):
                render(compile_template(template), conversation(turns), TOKENS, add_generation_prompt=prompt)
            assert "System role" in str(refusal)
            continue
        ours = render(compile_template(template), conversation(turns), TOKENS, add_generation_prompt=prompt)
        assert ours.text == theirs
        assert [run.start for run in ours.runs] == [0, *(run.end for run in ours.runs)][:-1]
        assert not any(run.is_unknown for run in ours.runs)


C = "messages[0].content"
FOLLOWED = {
    "plain": (f"{{{{ {C} }}}}", [("aB c", 0)]),
    "plus": (f"{{{{ '<' + {C} + '>' }}}}", [("<", -1), ("aB c", 0), (">", -1)]),
    "tilde": (f"{{{{ '<' ~ {C} ~ bos_token }}}}", [("<", -1), ("aB c", 0), ("<s>", -1)]),
    "percent": (f"{{{{ '<%s> %s%%' % ({C}, 'x') }}}}", [("<", -1), ("aB c", 0), ("> x%", -1)]),
    "percent-named": (f"{{{{ '%(a)s.' % {{'a': {C}}} }}}}", [("aB c", 0), (".", -1)]),
    "format": (f"{{{{ '{{{{}}}} {{0}}-{{x}}'.format({C}, x='y') }}}}", [("{} ", -1), ("aB c", 0), ("-y", -1)]),
    "format-auto": (f"{{{{ '{{}}+{{}}'.format({C}, {C}) }}}}", [("aB c", 0), ("+", -1), ("aB c", 0)]),
    "format-filter": (f"{{{{ '<%s>' | format({C}) }}}}", [("<", -1), ("aB c", 0), (">", -1)]),
    "trim": (f"{{{{ {C} | trim }}}}", [("aB c", 0)]),
    "case": (f"{{{{ {C} | upper }}}}{{{{ {C}.lower() }}}}", [("AB Cab c", 0)]),
    "title": (f"{{{{ {C} | title }}}}", [("Ab C", 0)]),
    "capitalize": (f"{{{{ {C} | capitalize }}}}", [("Ab c", 0)]),
    "replace": (f"{{{{ {C} | replace(' ', '_') }}}}", [("aB", 0), ("_", -1), ("c", 0)]),
    "replace-into-literal": (f"{{{{ '[X]'.replace('X', {C}) }}}}", [("[", -1), ("aB c", 0), ("]", -1)]),
    "join": (f"{{{{ [{C}, 'z'] | join('-') }}}}", [("aB c", 0), ("-z", -1)]),
    "join-attribute": ("{{ messages | join('|', attribute='content') }}", [("aB c", 0), ("|", -1), ("d", 1)]),
    "method-join": (f"{{{{ '-'.join([{C}, 'z']) }}}}", [("aB c", 0), ("-z", -1)]),
    "map": ("{{ messages | map(attribute='content') | join }}", [("aB c", 0), ("d", 1)]),
    "split": (f"{{{{ {C}.split(' ')[-1] }}}}", [("c", 0)]),
    "loop": (f"{{% for x in {C} %}}{{{{ x }}}}{{% endfor %}}", [("aB c", 0)]),
    "first-last": (f"{{{{ {C} | first }}}}{{{{ {C} | reverse }}}}", [("ac Ba", 0)]),
    "macro": (f"{{% macro m(x) %}}({{{{ x }}}}){{% endmacro %}}{{{{ m({C}) }}}}", [("(", -1), ("aB c", 0), (")", -1)]),
    "set-block": (f"{{% set x %}}({{{{ {C} }}}}){{% endset %}}{{{{ x }}}}", [("(", -1), ("aB c", 0), (")", -1)]),
    "filter-block": (f"{{% filter upper %}}{{{{ {C} }}}}{{% endfilter %}}", [("AB C", 0)]),
    "call": (
        f"{{% macro m() %}}({{{{ caller() }}}}){{% endmacro %}}{{% call m() %}}{{{{ {C} }}}}{{% endcall %}}",
        [("(", -1), ("aB c", 0), (")", -1)],
    ),
    "namespace": (f"{{% set n = namespace(t='') %}}{{% set n.t = n.t + {C} %}}{{{{ n.t }}}}", [("aB c", 0)]),
    "conditional": (f"{{{{ {C} if {C} == 'aB c' and 'B' in {C} else 'no' }}}}", [("aB c", 0)]),
    "dict": (f"{{{{ dict(a={C})['a'] }}}}", [("aB c", 0)]),
    "tojson": (f"{{{{ {C} | tojson }}}}", [('"aB c"', 0)]),
    "tojson-object": (f"{{{{ {{'k': {C}}} | tojson }}}}", [('{"k": "aB c"}', 0)]),
    "generation": (f"{{% generation %}}{{{{ {C} }}}}{{% endgeneration %}}", [("aB c", 0)]),
    "default": (f"{{{{ nothing | default({C}) }}}}", [("aB c", 0)]),
    "string": (f"{{{{ {C} | string }}}}", [("aB c", 0)]),
    "indent-adds-unknown-space": (f"{{{{ {C} | indent(2, true) }}}}", [("  ", None), ("aB c", 0)]),
}
LOST = {
    "escape": f"{{{{ {C} | e }}}}",
    "safe": f"{{{{ {C} | safe }}}}",
    "two-messages": "{{ (messages[0].content + messages[1].content) | wordwrap(3) }}",
    "literal-and-text": f"{{{{ ('x' + {C}) | center(12) }}}}",
    "autoescape": f"{{% autoescape true %}}{{{{ {C} }}}}{{% endautoescape %}}",
    "representation": "{{ messages[0] }}",
    "list": f"{{{{ [{C}] }}}}",
    "pprint": "{{ [messages[0].content, 'x'] | pprint }}",
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name: str) -> None:
    template, expected = FOLLOWED[name]
    assert owned(template, "aB c", "d") == expected


@pytest.mark.parametrize("name", LOST)
def test_lost_is_unknown_never_a_guess(name: str) -> None:
    pieces = owned(LOST[name], "aB c", "d")
    assert any(message is None for _, message in pieces)
    assert not any(message is not None and message >= 0 for _, message in pieces)


def test_owners_array() -> None:
    assert rendered("<{{ messages[1].content }}>", "a", "bc").owners.tolist() == [-1, 1, 1, -1]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content._origin + 'x' }}",
        "{% set n = namespace(__x=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    try:
        text = rendered(template, "a").text
    except BadRecord:
        return
    assert text == "", "an unsafe attribute may at most be undefined"


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template: line 2"):
        compile_template("a\n{% if %}")


def test_a_template_that_writes_without_end_is_refused() -> None:
    with pytest.raises(BadRecord, match="at most"):
        rendered("{{ 'x' * (9 * 1024 * 1024) }}", "a")


def test_mutation_plain_constants_would_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the compiler did not trace constants, the test above that finds no unknown text would fail."""
    from sft_dist.data import template_engine

    monkeypatch.setattr(template_engine.provenance, "literal", lambda text: text)
    compile_template.cache_clear()
    try:
        assert owned("<{{ messages[0].content }}>", "a") == [("<", None), ("a", 0), (">", None)]
    finally:
        compile_template.cache_clear()

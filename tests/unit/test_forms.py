"""Files of forms: both shapes, what is left out, what fails with its name, and nothing runs that should not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import SourceSection
from sft_dist.data.formats import to_conversations
from sft_dist.data.forms import Forms, load_forms
from sft_dist.data.records import Record
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation

NLI = {"premise": "It rains.", "hypothesis": "The street is wet.", "label": 0}

OWN = """
forms:
  - name: follows
    prompt: |
      {{ premise }}
      Does it follow that "{{ hypothesis }}"? {{ choices | join(" or ") }}?
    answer: "{{ choices[label] }}"
    choices: [yes, maybe, no]
  - name: write one
    prompt: Write what follows from {{ premise }}
    answer: "{% if label == 0 %}{{ hypothesis }}{% endif %}"
"""

PROMPTSOURCE = """
dataset: super_glue
subset: rte
templates:
  7361: !Template
    answer_choices: yes ||| maybe ||| {{ premise }}
    id: 7361
    jinja: '{{premise}} Is "{{hypothesis}}" true? ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}'
    metadata: !TemplateMetadata
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: is it
    reference: ""
"""


def forms(folder: Path, text: str, name: str = "forms.yaml") -> Forms:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_forms(str(path))


def rendered(given: Forms, value: dict[str, Any], skipped: list[str] | None = None) -> list[tuple[str, str]]:
    reasons = skipped if skipped is not None else []
    record = Record(value, "f.jsonl", 7, 0)
    found = to_conversations(record, "template", {}, given, reasons.append)
    assert [one.id for one in found] == (
        ["f.jsonl:7"] if len(found) == 1 else [f"f.jsonl:7#{k}" for k in range(1, len(found) + 1)]
    )
    pairs = []
    for one in found:
        assert isinstance(one, Conversation)
        asked, answered = one.messages
        assert (asked.role, answered.role) == ("user", "assistant")
        assert type(asked.content) is type(answered.content) is str
        pairs.append((asked.content, answered.content))
    return pairs


def test_one_record_becomes_an_instruction_in_each_form(tmp_path: Path) -> None:
    assert rendered(forms(tmp_path, OWN), NLI) == [
        ('It rains.\nDoes it follow that "The street is wet."? yes or maybe or no?', "yes"),
        ("Write what follows from It rains.", "The street is wet."),
    ]


def test_a_form_that_comes_out_empty_is_left_out_with_the_reason(tmp_path: Path) -> None:
    skipped: list[str] = []
    assert [answer for _, answer in rendered(forms(tmp_path, OWN), NLI | {"label": 2}, skipped)] == ["no"]
    assert skipped == ["form 'write one' leaves the answer empty"]
    with pytest.raises(
        BadRecord, match=r"f\.jsonl:7 .*each of the 1 forms leaves it out; form 'is it' leaves the answer"
    ):
        rendered(forms(tmp_path, PROMPTSOURCE), NLI | {"label": -1})


@pytest.mark.parametrize("label", [-1, -3, 3])
def test_a_label_that_is_no_choice_leaves_the_form_out(tmp_path: Path, label: int) -> None:
    """SNLI and GLUE mark "no gold label" with -1, which is Python's last item."""
    given, reasons = forms(tmp_path, OWN + "\n  - {name: plain, prompt: q, answer: a}"), list[str]()
    assert rendered(given, NLI | {"label": label}, reasons) == [("q", "a")]
    assert reasons == [
        f"form 'follows' asks for choice {label}, it has 0 to 2",
        "form 'write one' leaves the answer empty",
    ]
    alone = forms(tmp_path, OWN)
    with pytest.raises(BadRecord, match=f"each of the 2 forms leaves it out; form 'follows' asks for choice {label},"):
        rendered(alone, NLI | {"label": label})


@pytest.mark.parametrize("asked", ["choices[-1]", "choices[1:][label]", "choices[label | int]"])
def test_choices_have_no_negative_numbers(tmp_path: Path, asked: str) -> None:
    given = forms(tmp_path, f"{{name: f, prompt: q, answer: '{{{{ {asked} }}}}', choices: [x, y]}}")
    with pytest.raises(BadRecord, match="asks for choice -1"):
        rendered(given, {"label": -1})


def test_choices_are_a_list_in_all_else(tmp_path: Path) -> None:
    answer = '{{ choices | join("+") }} {{ choices | last }} {{ choices[1:] | join }} {{ "x" in choices }}'
    given = forms(tmp_path, f"{{name: f, prompt: q, answer: '{answer}', choices: [x, y]}}")
    assert rendered(given, {}) == [("q", "x+y y y True")]


def test_promptsource_is_read_as_data(tmp_path: Path) -> None:
    given = forms(tmp_path, PROMPTSOURCE)
    assert [form.name for form in given.forms] == ["is it"]
    assert rendered(given, NLI | {"label": 2}) == [('It rains. Is "The street is wet." true?', "It rains.")]


def test_a_jinja_file_is_one_form_and_one_mapping_too(tmp_path: Path) -> None:
    text = "Sum up: {{ document }}\n|||\n{{ summary }}"
    value = {"document": "d", "summary": "s"}
    assert rendered(forms(tmp_path, text, "sum.jinja"), value) == [("Sum up: d", "s")]
    one = "prompt: 'Sum up: {{ document }}'\nanswer: '{{ summary }}'"
    assert rendered(forms(tmp_path, one), value) == [("Sum up: d", "s")]
    assert load_forms(str(tmp_path / "sum.jinja")).forms[0].name == "sum"


def test_a_separator_inside_a_field_separates_nothing(tmp_path: Path) -> None:
    value = {"premise": "a ||| b", "hypothesis": ["c ||| d"], "label": 2}
    text = PROMPTSOURCE.replace("{{hypothesis}}", "{{hypothesis[0]}}")
    assert rendered(forms(tmp_path, text), value) == [('a ||| b Is "c ||| d" true?', "a ||| b")]


def test_columns_are_renamed_before(tmp_path: Path) -> None:
    given = forms(tmp_path, "prompt: '{{ document }}'\nanswer: '{{ summary }}'")
    record = Record({"0": "d", "1": "s"}, "f.csv", 1, 0)
    (found,) = to_conversations(record, "template", {"document": 0, "summary": 1}, given)
    assert isinstance(found, Conversation)
    assert [m.content for m in found.messages] == ["d", "s"]


def test_a_random_choice_depends_on_the_record_alone(tmp_path: Path) -> None:
    given = forms(tmp_path, "prompt: '{{ range(1000) | choice }} {{ [1, 2] | random }}'\nanswer: '{{ n }}'")
    first = [rendered(given, {"n": n}) for n in range(20)]
    assert [rendered(given, {"n": n}) for n in range(20)] == first
    assert len({pairs[0][0] for pairs in first}) > 15


def test_the_most_frequent_items(tmp_path: Path) -> None:
    given = forms(tmp_path, "prompt: q\nanswer: \"{{ answers | most_frequent | join(',') }}\"")
    assert rendered(given, {"answers": ["b", "a", "c", "a", "b"]}) == [("q", "b,a")]


FAILING = {
    "missing-field": ("{{ premises }}", "form 'f' fails: UndefinedError: 'premises' is undefined"),
    "missing-in-a-condition": ("{% if premises %}x{% endif %}", "form 'f' fails: UndefinedError"),
    "text-as-a-number": ("{{ premise + 1 }}", "form 'f' fails: TypeError"),
    "python-internals": ("{{ premise.__class__.__mro__ }}", "form 'f' fails: SecurityError"),
    "changes-the-record": ("{{ many.append(1) }}", "form 'f' fails: SecurityError"),
    "endless": ("{% for i in range(10**9) %}x{% endfor %}", "form 'f' fails: TooExpensive"),
    "nested-loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "form 'f' fails: TooExpensive",
    ),
    "memory": ('{{ "a" * 10**9 }}', "form 'f' fails: TooExpensive"),
    "filler-text": ("{{ lipsum() }}", "form 'f' fails: UndefinedError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_form_that_fails_is_named(tmp_path: Path, name: str) -> None:
    prompt, reason = FAILING[name]
    given = forms(tmp_path, f"{{name: f, prompt: '{prompt}', answer: a}}")
    with pytest.raises(BadRecord, match=reason):
        rendered(given, NLI | {"many": [1]})


def test_a_form_has_two_parts(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="form 'sum' renders to 3 parts"):
        rendered(forms(tmp_path, "a ||| b ||| c", "sum.jinja"), {})


REFUSED = {
    "not-yaml": ("forms: [", r"forms\.yaml:1: not a file of forms"),
    "nothing": ("{}", "no forms: expected"),
    "empty-list": ("forms: []", "no forms: expected"),
    "a-text": ("hello", "no forms: expected"),
    "form-is-text": ("forms: [hello]", "form 1 must have prompt and answer"),
    "no-answer": ("forms: [{name: f, prompt: q}]", "form 'f' lacks answer"),
    "unknown-key": ("forms: [{prompt: q, answer: a, anwser: b}]", "form '1' has the unknown key anwser"),
    "number": ("forms: [{prompt: q, answer: 3}]", "form '1': answer must be text, it is 3: put it in quotes"),
    "choices": ("forms: [{prompt: q, answer: a, choices: yes}]", "choices must be a list"),
    "syntax": ("forms: [{prompt: '{{ q', answer: a}]", "form '1': prompt, line 1: "),
    "unknown-filter": ("forms: [{prompt: '{{ q | shout }}', answer: a}]", "No filter named 'shout'"),
    "python-object": ("forms: !!python/object/apply:os.getcwd []", "not a file of forms"),
    "other-tag": ("forms: !Other {}", "not a file of forms"),
    "duplicate-key": ("{prompt: q, prompt: r, answer: a}", "not a file of forms"),
    "no-separator": ("templates: {x: !Template {name: n, jinja: 'q'}}", r"form 'n' has no \|\|\| between"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_holds_no_forms_is_one_line(tmp_path: Path, name: str) -> None:
    text, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=reason) as caught:
        forms(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"data.sources template={tmp_path}")


def test_a_file_of_forms_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_forms(str(tmp_path / "none.yaml"))


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    assert forms(tmp_path, OWN).digest != forms(tmp_path, OWN + "\n").digest


def test_a_template_and_its_format_belong_together() -> None:
    for given in ({"template": "f.yaml"}, {"format": "template"}, {"template": "f.yaml", "format": "alpaca"}):
        with pytest.raises(ValueError, match="belong together"):
            SourceSection.model_validate({"path": "x", **given})
    assert SourceSection(path="x", format="template", template="f.yaml").template == "f.yaml"

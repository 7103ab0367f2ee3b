"""Instruction forms: one labelled record (GLUE, NLI, questions, summaries ...) into several ways to ask for its label.

A file of forms is one of

    forms.yaml     {forms: [{name, prompt, answer, choices?}, ...]}, or one such form; prompt, answer and each of the
                   choices are Jinja texts over the record's fields, `choices` is the list that they render to
    a promptsource file: {templates: {id: !Template {name, jinja: "prompt ||| answer", answer_choices: "a ||| b"}}}
    form.jinja     "prompt ||| answer"

Rendering follows promptsource (Bach et al., 2022): parts are stripped, `|||` inside a field separates nothing, and a
form whose prompt or answer comes out empty is left out for that record, which is how the P3 forms say "not for this
one". So is one that asks for a choice that is not there: many sets mark "no gold label" with -1, which would be
Python's last one. Jinja runs in the sandbox of the chat templates, with its budget of work and memory. A field that a
form asks for and the record lacks is an error, never an empty text. The random `choice` of a form depends on the record
alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.runtime import Context
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sft_dist.data.fields import Turns, Value
from sft_dist.data.render_budget import BUDGET, MAX_TEMPLATE_CHARACTERS
from sft_dist.data.template_engine import TracingEnvironment, metered
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Message

SEPARATOR = "|||"
_PROTECTED = "\ue0f7\ue0f8\ue0f7"  # stands for a separator inside a field while the form is rendered
_RECORD_KEY = "sft_record_key"


@dataclass(frozen=True, slots=True)
class Form:
    """One way to ask. Without `answer`, `prompt` renders to both; `choices_name` is what the form calls its choices."""

    name: str
    prompt: jinja2.Template
    answer: jinja2.Template | None
    choices: tuple[jinja2.Template, ...]
    choices_name: str


@dataclass(frozen=True, slots=True)
class Forms:
    """The forms of a file; `digest` is the SHA-256 of its bytes, hex."""

    forms: tuple[Form, ...]
    digest: str

    def conversations(self, value: Value, skipped: Callable[[str], None]) -> Iterator[Turns]:
        """A conversation for each form that fits the record; `skipped` gets the reason for each that does not.

        Raises BadRecord when a form fails, or none fits.
        """
        protected = _protect(value) | {_RECORD_KEY: _key_of(value)}
        reasons: list[str] = []
        for form in self.forms:
            try:
                yield list(_messages(form, protected)), ()
            except LeftOut as error:
                reasons.append(f"form {form.name!r} {error}")
                skipped(reasons[-1])
        if len(reasons) == len(self.forms):
            raise BadRecord(f"each of the {len(reasons)} forms leaves it out; {reasons[0]}")


class LeftOut(Exception):
    """A form is not for this record; says why."""


class _Choices(list[str]):
    """Choices by their number, from 0 up."""

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int) and not 0 <= place < len(self):
            raise LeftOut(f"asks for choice {int(place)}, it has 0 to {len(self) - 1}")
        found = super().__getitem__(place)
        return _Choices(found) if isinstance(place, slice) else found


def load_forms(path: str) -> Forms:
    """The forms of a file. Raises ConfigError with file, form and reason."""
    file = Path(path)
    try:
        data = file.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.sources template={path}: cannot be read: {error}") from error
    if file.suffix in (".yaml", ".yml"):
        forms = [_read_form(*item, path) for item in _listed(_read_yaml(text, path), path)]
    else:
        forms = [_read_form(file.stem, {"jinja": text}, path)]
    return Forms(tuple(forms), hashlib.sha256(data).hexdigest())


class _Data(SafeConstructor):
    """YAML as data: promptsource's tags are plain mappings."""


def _construct_mapping(constructor: SafeConstructor, node: Any) -> Iterator[dict[Any, Any]]:
    mapping: dict[Any, Any] = {}
    yield mapping
    mapping.update(constructor.construct_mapping(node, deep=True))


for _tag in ("!Template", "!TemplateMetadata"):
    _Data.add_constructor(_tag, _construct_mapping)


def _read_yaml(text: str, path: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Data
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"data.sources template={path}:{line}: not a file of forms: {error.problem}") from error
    except (YAMLError, RecursionError) as error:
        raise ConfigError(f"data.sources template={path}: not a file of forms: {error}") from error


def _listed(read: Any, path: str) -> list[tuple[str, Any]]:
    """(name or "", form) of each form in a file."""
    if isinstance(read, Mapping) and isinstance(read.get("templates"), Mapping) and read["templates"]:
        return [(str(key), form) for key, form in read["templates"].items()]
    if isinstance(read, Mapping) and isinstance(read.get("forms"), list) and read["forms"]:
        return [(f"{number}", form) for number, form in enumerate(read["forms"], 1)]
    if isinstance(read, Mapping) and "prompt" in read:
        return [(Path(path).stem, read)]
    raise ConfigError(
        f"data.sources template={path}: no forms: expected 'forms' (a list of name, prompt, answer), one such form, or "
        "promptsource's 'templates'"
    )


def _read_form(name: str, given: Any, path: str) -> Form:
    """A form of either shape."""
    where = f"data.sources template={path}: form {name}"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must have prompt and answer")
    name = str(given.get("name") or name)
    where = f"data.sources template={path}: form {name!r}"
    if "jinja" in given:
        text, given_choices = given["jinja"], given.get("answer_choices")
        if isinstance(text, str) and SEPARATOR not in text:
            raise ConfigError(f"{where} has no {SEPARATOR} between prompt and answer")
        choices = (_compile(given_choices, where, "answer_choices"),) if given_choices else ()
        return Form(name, _compile(text, where, "jinja"), None, choices, "answer_choices")
    unknown = sorted(map(str, given.keys() - {"name", "prompt", "answer", "choices"}))
    missing = [key for key in ("prompt", "answer") if key not in given]
    if unknown or missing:
        raise ConfigError(f"{where} {'lacks ' + missing[0] if missing else 'has the unknown key ' + unknown[0]}")
    listed = given.get("choices", [])
    if not isinstance(listed, list):
        raise ConfigError(f"{where}: choices must be a list of texts")
    prompt, answer = (_compile(given[key], where, key) for key in ("prompt", "answer"))
    return Form(name, prompt, answer, tuple(_compile(one, where, "choices") for one in listed), "choices")


def _compile(text: Any, where: str, key: str) -> jinja2.Template:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {key} must be text, it is {text!r}: put it in quotes")
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(f"{where}: {key} has {len(text):,} characters, at most {MAX_TEMPLATE_CHARACTERS:,}")
    try:
        return _environment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}: {key}, line {error.lineno}: {error.message}") from error


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = TracingEnvironment(undefined=jinja2.StrictUndefined)
    environment.globals["zip"] = _zip
    filters: dict[str, Callable[..., Any]] = {"choice": _choice, "random": _choice, "most_frequent": _most_frequent}
    environment.filters |= {name: metered(name, function) for name, function in filters.items()}
    return environment


def _zip(*columns: Iterable[Any]) -> list[tuple[Any, ...]]:
    """A list: iterators inside iterators without end would overflow the C stack."""
    return list(BUDGET.counted(zip(*columns, strict=False)))


@jinja2.pass_context
def _choice(context: Context, items: Sequence[Any]) -> Any:
    """One of the items, the same whenever this record meets these items."""
    digest = hashlib.sha256(f"{context[_RECORD_KEY]} {items!r}".encode("utf-8", "surrogatepass")).digest()
    return items[int.from_bytes(digest[:8], "little") % len(items)]


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """The items that come most often, in order of their first place (promptsource's filter)."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


def _messages(form: Form, fields: Mapping[str, Any]) -> Iterator[Message]:
    """Question and answer, of which none is empty."""
    for role, part, text in zip(("user", "assistant"), ("prompt", "answer"), _render(form, fields), strict=True):
        if not text:
            raise LeftOut(f"leaves the {part} empty")
        yield Message(role, text)


def _render(form: Form, fields: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, answer), stripped. Raises LeftOut, or BadRecord that names the form."""
    BUDGET.start()
    try:
        if form.choices:
            fields = {**fields, form.choices_name: _choices(form, fields)}
        asked = _text(form.prompt, fields)
        parts = asked.split(SEPARATOR) if form.answer is None else [asked, _text(form.answer, fields)]
    except LeftOut:
        raise
    except Exception as error:  # a form is a program of somebody else's: it may fail in any way
        raise BadRecord(f"form {form.name!r} fails: {type(error).__name__}: {error}") from error
    if len(parts) > 2:
        raise BadRecord(f"form {form.name!r} renders to {len(parts)} parts; prompt {SEPARATOR} answer are two")
    prompt, answer = [part.replace(_PROTECTED, SEPARATOR).strip() for part in [*parts, ""][:2]]
    return prompt, answer


def _text(template: jinja2.Template, fields: Mapping[str, Any]) -> str:
    """Rendered, and plain: what a form writes is a message's own text, whatever traces the engine left in it."""
    return str.__str__(template.render(fields))


def _choices(form: Form, fields: Mapping[str, Any]) -> _Choices:
    """The choices as texts: a list of templates, or promptsource's one that renders to `a ||| b`."""
    rendered = [_text(choice, fields) for choice in form.choices]
    listed = rendered if form.answer is not None else rendered[0].split(SEPARATOR)
    return _Choices(choice.strip() for choice in listed)


def _protect(value: Any) -> Any:
    """The value with separators in its texts replaced."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PROTECTED)
    if isinstance(value, Mapping):
        return {key: _protect(item) for key, item in value.items()}
    return [_protect(item) for item in value] if isinstance(value, list) else value


def _key_of(value: Value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

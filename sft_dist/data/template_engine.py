"""Chat templates compiled so that text keeps its provenance.

They run in Jinja's immutable sandbox, within a budget of work and memory (`render_budget`), with the settings that
Hugging Face tokenizers use (trimmed blocks, loop controls, generation tags, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`), so the text is the same to the last character. Four things differ, all of them
invisible to the template:

- string constants and template data are compiled into traced literals, so a plain string at run time is *unknown*;
- output, macros, `set` blocks and `~` are joined by `provenance.concat`;
- `%` and `str.format` fill traced values into their places;
- the filters that build new strings keep the shadow, or say that they lost it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_title, make_attrgetter
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from sft_dist.data import provenance
from sft_dist.data.provenance import WATCH, Looked, Opaque, Traced, holds_opaque
from sft_dist.data.render_budget import (
    BUDGET,
    CALL,
    MAX_TEMPLATE_CHARACTERS,
    SHORT_CHARACTERS,
    check_arguments,
    check_binary,
    check_form,
    check_method,
    check_printed,
    count,
    made,
)
from sft_dist.data.template_code import MeteredCode
from sft_dist.data.template_filters import CHECKS, COSTS, FREE, FREE_TESTS, Cost
from sft_dist.errors import ConfigError


@lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """Compile once per text. Raises ConfigError naming the line of a syntax error."""
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(f"data.chat_template: {len(text):,} characters, at most {MAX_TEMPLATE_CHARACTERS:,}")
    environment = TracingEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.chat_template: line {error.lineno}: {error.message}") from error


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: the author's own statement of what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> Traced:
        return provenance.tag(caller())


class _Literals(dict[str, Traced]):
    """The constants of one template, traced at first use."""

    def __missing__(self, text: str) -> Traced:
        return self.setdefault(text, provenance.literal(text))


class TracingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox for chat templates, with provenance."""

    code_generator_class = MeteredCode
    concat = staticmethod(provenance.concat)
    step = staticmethod(BUDGET.step)
    counted = staticmethod(BUDGET.counted)
    intercepted_binops = frozenset(["%", "+", "-", "*", "**"])

    def __init__(self, **settings: Any) -> None:
        super().__init__(optimized=False, **settings)
        self.literals = _Literals()
        filters = {name: _reporting(function) for name, function in self.filters.items()} | _FILTERS
        self.filters = {name: metered(name, filters[name]) for name in filters}
        self.tests = {name: _metered_test(name, test) for name, test in self.tests.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _dict,
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # text out of nothing

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return _percent(left, right)
        if operator == "+" and isinstance(left, Traced) and isinstance(right, str):
            return left + right  # by far the most frequent
        if WATCH.on and operator != "+" and (holds_opaque(left) or holds_opaque(right)):
            raise Looked
        check_binary(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return made(result) if isinstance(result, str) and type(result) is not Traced else result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        BUDGET.step(CALL + (4 * len(args) if len(args) > 8 else 0))
        if args or kwargs:
            check_arguments((*args, *kwargs.values()))
        if isinstance(__obj, _OWN_CODE) or __obj is _Namespace:
            return super().call(__context, __obj, *args, **kwargs)
        if WATCH.on:
            _check_blind(__obj, args, kwargs)
        else:
            _check_operands(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if type(result) is Traced else made(result)

    def call_filter(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """What `map` does to each item."""
        BUDGET.step(2 * CALL)
        return super().call_filter(name, value, *args, **kwargs)

    def call_test(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """What `select` and its like ask of each item."""
        BUDGET.step(CALL)
        return super().call_test(name, value, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) is not Traced:
            self.sought(argument)
        try:
            return obj[argument]  # the sandbox's own first try, without the way there
        except (TypeError, LookupError):
            return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]  # what the sandbox finds after an exception that takes longer than all of this
        if type(obj) is LoopContext and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    @staticmethod
    def text(value: Any) -> str:
        """What `{{ value }}` and `~` write."""
        return value if isinstance(value, Traced) else str(check_printed(value))

    printed = staticmethod(check_printed)

    @staticmethod
    def sought(value: Any) -> Any:
        """What is looked up: it is hashed, or the other one looks at it."""
        if type(value) is Opaque:
            raise Looked
        if type(value) is tuple:
            count(value)
        return value

    @staticmethod
    def searched(value: Any) -> Any:
        """What `in` goes through."""
        if type(value) is not dict and (type(value) is not Traced or str.__len__(value) > SHORT_CHARACTERS):
            count(value)
        return value

    @staticmethod
    def compared(value: Any) -> Any:
        """What a comparison may go through as a whole."""
        count(value)
        return value

    @staticmethod
    def hashed(value: Any) -> Any:
        """The key of a dictionary."""
        if type(value) is tuple:
            count(value)
        return value

    @staticmethod
    def sliced(value: Any) -> Any:
        """What a slice copies a part of. A traced text counts its slices itself."""
        if isinstance(value, (list, tuple)):
            BUDGET.copy(len(value))
        elif isinstance(value, str) and not isinstance(value, Traced):
            made(value)
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `format_map`, sandboxed as always, filling traced values into their places."""
        text, name = getattr(value, "__self__", None), getattr(value, "__name__", None)
        if super().wrap_str_format(value) is None or not isinstance(text, str):
            return None
        formatter = _TracingFormatter(self)
        if name == "format_map":
            return lambda mapping: formatter.vformat(text, (), mapping)
        return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)


_SCOPE = ("_loop_vars", "_block_vars")  # what Jinja hands to calls inside loops, for functions that ask for its context
_DICT_ATTRIBUTES = frozenset(dir(dict))
_LOOP_ATTRIBUTES = frozenset(
    ["index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "previtem", "nextitem"]
)
_OWN_CODE = (jinja2.runtime.Macro, jinja2.runtime.BlockReference)  # compiled with the same guards
_BLIND_FILTERS = ("trim", "join", "first", "last", "length", "count", "default", "d", "string")
_BLIND_TESTS = ("defined", "undefined", "none", "string", "mapping", "number", "integer", "float", "boolean", "true",
                "false", "callable")  # fmt: skip


def _check_blind(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call that could look at an opaque text. Its own methods answer for themselves."""
    if isinstance(getattr(function, "__self__", None), str) and type(function.__self__) is Opaque:
        return
    given = {name: value for name, value in kwargs.items() if name not in _SCOPE}
    if function in _IMPURE or getattr(function, "jinja_pass_arg", None) or holds_opaque((args, given)):
        raise Looked
    _check_operands(function, args, kwargs)


def _check_operands(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Count what a call may go through: its arguments, and what it is a method of where that one is searched."""
    for value in args:
        count(value)
    for name, value in kwargs.items():
        if name not in _SCOPE:
            count(value)
    owner = getattr(function, "__self__", None)
    if isinstance(owner, str):
        check_method(owner, function.__name__, args)
    elif isinstance(owner, (list, tuple, range)):
        count(owner)


def metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts what it goes through and what it makes.

    It refuses opaque texts, too, unless it is known not to look at them.
    """
    is_blind, is_free = name in _BLIND_FILTERS, name in FREE
    cost, check = COSTS.get(name, Cost()), CHECKS.get(name)

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        if WATCH.on and not is_blind and (function.__name__ == "do_random" or holds_opaque((args, kwargs))):
            raise Looked
        if is_free:
            return function(*args, **kwargs)
        for value in args:
            if type(value) is not Traced or str.__len__(value) > SHORT_CHARACTERS:
                cost.count(value)
        for value in kwargs.values():
            cost.count(value)
        if check is not None:
            check(*args, **kwargs)
        result = function(*args, **kwargs)
        return result if type(result) is Traced else made(result)

    return filtered


def _metered_test(name: str, function: Any) -> Callable[..., Any]:
    """A test that counts what it compares. It refuses opaque texts unless it asks for their type alone."""
    is_free = name in FREE_TESTS

    @wraps(function)
    def tested(*args: Any, **kwargs: Any) -> Any:
        if WATCH.on and holds_opaque((args, kwargs)):
            if name in ("sequence", "iterable"):
                return True  # of any text, and of a list that holds one
            if name not in _BLIND_TESTS:
                raise Looked
        if not is_free:
            for value in args:
                count(value)
        return function(*args, **kwargs)

    return tested


class _TracingFormatter(SandboxedFormatter):
    def vformat(self, format_string: str, args: Any, kwargs: Any) -> Traced:
        """Literal parts of the format string keep its origin; each field keeps its own."""
        check_form(format_string, (*args, *kwargs.values()))
        check_arguments((*args, *kwargs.values()))
        parts: list[str] = []
        automatic = itertools.count()
        for text, field, spec, conversion in self.parse(format_string):
            parts.append(provenance.derive(text, format_string))
            if field is not None:
                value, _ = self.get_field(field or str(next(automatic)), args, kwargs)
                value = self.convert_field(value, conversion) if conversion else value
                filled = self.format_field(value, spec or "")
                parts.append(filled if type(filled) is Traced else provenance.derive(filled, value))
        return provenance.concat(parts)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without underscore names, so that a template cannot reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        BUDGET.step(2 * CALL)
        self, items = args[0], dict(*args[1:], **kwargs)
        for name in items:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, items)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store the attribute {name!r}")


def _dict(*pairs: Any, **items: Any) -> dict[Any, Any]:
    return dict(*pairs, **items)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(TracingEnvironment.text(message))


def _strftime_now(form: str) -> Traced:
    check_form(form * 16, ())  # a field may become that much longer, and may state its width
    return provenance.literal(datetime.now().strftime(form))


_IMPURE = (_strftime_now,)

_PERCENT = re.compile(r"%(?:\((?P<key>[^)]*)\))?(?P<form>[#0\- +]*(?:\d+)?(?:\.\d+)?)(?P<kind>[diouxXeEfFgGcrsa%])")


def _percent(form: str, values: Any) -> Traced:
    """`form % values` with each `%s` keeping the origin of its value. `*` widths are not followed."""
    given = values if isinstance(values, tuple) else (values,)
    check_form(form, given)
    check_arguments(given)
    plain = str.__mod__(form, values)
    form = Traced(form)
    parts: list[str] = []
    at = 0
    queue = iter(given)
    for match in _PERCENT.finditer(form):
        parts.append(form[at : match.start()])
        at = match.end()
        if match["kind"] == "%":
            parts.append(form[match.start() : match.start() + 1])
            continue
        value = next(queue, "") if match["key"] is None else values[match["key"]]
        bare = match["kind"] == "s" and not match["form"] and isinstance(value, str)
        parts.append(value if bare else provenance.derive(f"%{match['form']}{match['kind']}" % (value,), value))
    traced = provenance.concat([*parts, form[at:]])
    return traced if traced == plain else provenance.derive(plain, form, values)


def _reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose plain string result belongs as a whole to its only source, or is UNKNOWN.

    `Markup` is left alone: it escapes what is added to it, and must go on doing so.
    """

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        check_arguments((*args, *kwargs.values()))
        result = function(*args, **kwargs)
        return provenance.derive(result, args, kwargs) if type(result) is str else result

    return filtered


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Traced:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return provenance.derive(text, value, data=True)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | None = None) -> Traced:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return Traced(str(d)).join(map(TracingEnvironment.text, items))


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Python's; of lists, which it copies again and again, each copy is counted."""
    items = iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable)
    if not isinstance(start, (list, tuple)):
        return sum(items, start)
    for item in items:
        check_binary("+", start, item)
        start = start + item
    return start


def _title(value: Any) -> Traced:
    return provenance.same_length(do_title(value), Traced(str(value)))


def _format(value: Any, *args: Any, **kwargs: Any) -> Traced:
    if args and kwargs:
        raise jinja2.exceptions.FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return _percent(str(value), kwargs or args)


_FILTERS: dict[str, Callable[..., Any]] = {
    "format": _format,
    "join": _join,
    "sum": _sum,
    "title": _title,
    "tojson": _tojson,
}

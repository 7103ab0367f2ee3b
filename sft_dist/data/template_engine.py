"""Chat templates compiled so that text keeps its provenance.

They run in Jinja's immutable sandbox, within a budget of steps and text (`render_budget`), with the settings that
Hugging Face tokenizers use (trimmed blocks, loop controls, generation tags, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`), so the text is the same to the last character. Four things differ, all of them
invisible to the template:

- string constants and template data are compiled into traced literals, so a plain string at run time is *unknown*;
- output, macros, `set` blocks and `~` are joined by `provenance.concat`;
- `%` and `str.format` fill traced values into their places;
- the filters that build new strings keep the shadow, or say that they lost it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from itertools import count
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_title, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from sft_dist.data import provenance
from sft_dist.data.provenance import WATCH, Looked, Traced, holds_opaque
from sft_dist.data.render_budget import BUDGET, CALL, check_arguments, check_binary, check_form
from sft_dist.errors import ConfigError


@lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """Compile once per text. Raises ConfigError naming the line of a syntax error."""
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


class _TracingCode(CodeGenerator):
    """Compiles constants into traced literals and joins strings with their shadows."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.literals[{node.value!r}]")
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(f"environment.literals[{node.data!r}]")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.literals[{super()._output_const_repr(group)}]"

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Each turn is counted. Jinja takes no new kinds of nodes: one that no template makes stands for the count."""
        node.iter = nodes.MarkSafe(node.iter).set_lineno(node.lineno)
        super().visit_For(node, frame)

    def visit_MarkSafe(self, node: nodes.MarkSafe, frame: Frame) -> None:
        self.write("environment.counted(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """What is looked for in another text may not be opaque: the other one would look at it."""
        if any(operand.op in ("in", "notin") for operand in node.ops):
            sought: list[Any] = [node, *node.ops[:-1]]
            for one in sought:
                one.expr = nodes.MarkSafeIfAutoescape(one.expr).set_lineno(node.lineno)
        super().visit_Compare(node, frame)

    def visit_MarkSafeIfAutoescape(self, node: nodes.MarkSafeIfAutoescape, frame: Frame) -> None:
        self.write("environment.unlooked(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Literals(dict[str, Traced]):
    """The constants of one template, traced at first use."""

    def __missing__(self, text: str) -> Traced:
        return self.setdefault(text, provenance.literal(text))


class TracingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox for chat templates, with provenance."""

    code_generator_class = _TracingCode
    concat = staticmethod(provenance.concat)
    counted = staticmethod(BUDGET.counted)
    unlooked = staticmethod(provenance.unlooked)
    intercepted_binops = frozenset(["%", "+", "*", "**"])

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.literals = _Literals()
        filters = {name: _reporting(function) for name, function in self.filters.items()} | _FILTERS
        self.filters = {name: _blind(filters[name], name in _BLIND_FILTERS) for name in filters}
        self.tests = {name: _blind_test(name, test) for name, test in self.tests.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": lambda *pairs, **items: dict(*pairs, **items),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # text out of nothing

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return _percent(left, right)
        if operator == "+" and type(left) is Traced and isinstance(right, str):
            return left + right  # by far the most frequent
        if WATCH.on and operator != "+" and (holds_opaque(left) or holds_opaque(right)):
            raise Looked
        check_binary(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        BUDGET.step(CALL)
        check_arguments((*args, *kwargs.values()))
        if WATCH.on and not isinstance(__obj, _BLIND_CALLS) and __obj is not _Namespace:
            _check_blind(__obj, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, provenance.unlooked(argument))

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
_BLIND_CALLS = (jinja2.runtime.Macro,)  # they run code that was compiled with the same guards
_BLIND_FILTERS = ("trim", "join", "first", "last", "length", "count", "default", "d", "string")
_BLIND_TESTS = ("defined", "undefined", "none", "string", "mapping", "number", "integer", "float", "boolean", "true",
                "false", "callable")  # fmt: skip


def _check_blind(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call that could look at an opaque text. Its own methods answer for themselves."""
    if isinstance(getattr(function, "__self__", None), str) and type(function.__self__) is provenance.Opaque:
        return
    given = {name: value for name, value in kwargs.items() if name not in _SCOPE}
    if function in _IMPURE or getattr(function, "jinja_pass_arg", None) or holds_opaque((args, given)):
        raise Looked


def _blind(function: Callable[..., Any], is_blind: bool) -> Callable[..., Any]:
    """A filter that refuses opaque texts unless it is known not to look at them."""

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        if WATCH.on and not is_blind and (function.__name__ == "do_random" or holds_opaque((args, kwargs))):
            raise Looked
        return function(*args, **kwargs)

    return filtered


def _blind_test(name: str, function: Any) -> Callable[..., Any]:
    """A test that refuses opaque texts unless it asks for their type alone."""

    @wraps(function)
    def tested(*args: Any, **kwargs: Any) -> Any:
        if WATCH.on and holds_opaque((args, kwargs)):
            if name in ("sequence", "iterable"):
                return True  # of any text, and of a list that holds one
            if name not in _BLIND_TESTS:
                raise Looked
        return function(*args, **kwargs)

    return tested


class _TracingFormatter(SandboxedFormatter):
    def vformat(self, format_string: str, args: Any, kwargs: Any) -> Traced:
        """Literal parts of the format string keep its origin; each field keeps its own."""
        check_form(format_string)
        check_arguments((*args, *kwargs.values()))
        parts: list[str] = []
        automatic = count()
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


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> Traced:
    return provenance.literal(datetime.now().strftime(form))


_IMPURE = (_strftime_now,)

_PERCENT = re.compile(r"%(?:\((?P<key>[^)]*)\))?(?P<form>[#0\- +]*(?:\d+)?(?:\.\d+)?)(?P<kind>[diouxXeEfFgGcrsa%])")


def _percent(form: str, values: Any) -> Traced:
    """`form % values` with each `%s` keeping the origin of its value. `*` widths are not followed."""
    check_form(form)
    check_arguments(values if isinstance(values, tuple) else (values,))
    plain = str.__mod__(form, values)
    form = Traced(form)
    parts: list[str] = []
    at = 0
    queue = iter(values if isinstance(values, tuple) else (values,))
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
    check_arguments((indent,))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return provenance.derive(text, value, data=True)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | None = None) -> Traced:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return Traced(str(d)).join(map(str, items))


def _title(value: Any) -> Traced:
    return provenance.same_length(do_title(value), Traced(str(value)))


def _format(value: Any, *args: Any, **kwargs: Any) -> Traced:
    if args and kwargs:
        raise jinja2.exceptions.FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return _percent(str(value), kwargs or args)


_FILTERS: dict[str, Callable[..., Any]] = {
    "format": _format,
    "join": _join,
    "title": _title,
    "tojson": _tojson,
}

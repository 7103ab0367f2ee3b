"""Templates that would take hours or all memory, and a process that renders each in a child with limits of its own.

python tests/template_bombs.py     a template as JSON per line  ->  [seconds, MiB, refusal or null] per line
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from sft_dist.data.rendering import render
from sft_dist.data.template_engine import compile_template
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, Message

CPU_SECONDS = 30
BYTES = 600 << 20
TALK = Conversation((Message("user", "hello"), Message("assistant", "wörld 🎉")))


def repeated(times: int, body: str) -> str:
    return f"{{% for i in range({times}) %}}{body}{{% endfor %}}"


def gathered(start: str, times: int, body: str) -> str:
    """A loop over a namespace `n`, which outlives its turns."""
    return f"{{% set n = namespace({start}) %}}{repeated(times, body)}"


# fmt: off
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
    "list per value": gathered("x=[]", 400, "{% set n.x = n.x + [[0] * 1000000] %}"),
    "range lists": gathered("x=[]", 400, "{% set n.x = n.x + [range(100000) | list] %}"),
    "sorts": (
        "{% set l = range(100000) | list %}"
        + repeated(300, "{% set x = l | sort(reverse=true) | unique | list %}")
    ),
    "in list": "{% set l = [0] * 1000000 %}" + repeated(2000, "{% if 1 in l %}{% endif %}"),
    "select in": "{% set l = [0] * 1000000 %}{{ range(100000) | select('in', l) | list | length }}",
    "equal lists": (
        "{% set l = [0] * 1000000 %}{% set m = [0] * 1000000 %}"
        + repeated(5000, "{% if l == m %}{% endif %}")
    ),
    "equal texts": (
        "{% set l = 'a' * 8000000 %}{% set m = 'a' * 8000000 %}"
        + repeated(100000, "{% if l == m %}{% endif %}")
    ),
    "eq test": (
        "{% set l = [0] * 1000000 %}{% set m = [0] * 1000000 %}"
        + repeated(5000, "{% if l is eq(m) %}{% endif %}")
    ),
    "in text": "{% set l = 'a' * 8000000 %}" + repeated(100000, "{% if 'aaaab' in l %}{% endif %}"),
    "text count": "{% set l = 'a' * 8000000 %}" + repeated(100000, "{{ l.count('a') }}"),
    "list index": "{% set l = [0] * 1000000 %}" + repeated(5000, "{{ l.count(1) }}"),
    "lower": "{% set l = 'é' * 4000000 %}" + repeated(10000, "{% set x = l | lower %}"),
    "nested shared printed": gathered("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ n.l }}",
    "nested shared equal": (
        gathered("l=[0], m=[0]", 60, "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}")
        + "{{ n.l == n.m }}"
    ),
    "nested shared key": gathered("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ {}[n.l] }}",
    "nested shared dict": gathered("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ {n.l: 1} | length }}",
    "nested shared in dict": gathered("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ n.l in {} }}",
    "nested shared get": gathered("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ {}.get(n.l) }}",
    "nested shared json": gathered("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ n.l | tojson }}",
    "nested shared tilde": gathered("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{% set x = n.l ~ '' %}",
    "nested shared format": gathered("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ '%s' % (n.l,) }}",
    "nested shared join": gathered("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ n.l | join }}",
    "nested shared sort": (
        gathered("l=[0], m=[0]", 60, "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}")
        + "{{ [n.l, n.m] | sort | length }}"
    ),
    "nested shared namespace": gathered("l=[0]", 60, "{% set n.l = namespace(a=n.l, b=n.l) %}") + "{{ n.l }}",
    "nested shared exception": gathered("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ raise_exception(n.l) }}",
    "nested shared autoescape": (
        gathered("l=[0]", 60, "{% set n.l = [n.l, n.l] %}")
        + "{% autoescape true %}{{ n.l }}{% endautoescape %}"
    ),
    "nested shared changed": (
        gathered("l=[0], m=[0]", 60, "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}")
        + "{% for x in [1,2] %}{{ loop.changed(n.l if loop.first else n.m) }}{% endfor %}"
    ),
    "many empty lists": (
        gathered("x=[]", 90000, repeated(90000, "{% set n.x = [n.x, " + ", ".join(["[]"] * 500) + "] %}"))
    ),
    "many dicts": (
        gathered("x=[]", 90000, repeated(90000, "{% set n.x = [n.x, " + ", ".join(["{1: 1}"] * 200) + "] %}"))
    ),
    "chained lists": gathered("x=[]", 90000, repeated(90000, "{% set n.x = [n.x] %}")),
    "chained namespaces": gathered("x=[]", 90000, repeated(90000, "{% set n.x = namespace(a=n.x) %}")),
    "big body": repeated(90000, repeated(90000, "{% if a is defined %}{% endif %}" * 1000)),
    "big body getattr": repeated(90000, repeated(90000, "{% set x = messages[0].content %}" * 1000)),
    "big macro": (
        "{% macro f(n) %}"
        + "{% set x = messages[0].content %}" * 300
        + "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "block twice": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "bytes times": "{{ ('a'.encode() * 999999) | length }}",
    "to_bytes": gathered("x=[]", 5000, "{% set n.x = [n.x, (5).to_bytes(1000000, 'big')] %}"),
    "doubled safe": gathered("s=('ab' | safe)", 64, "{% set n.s = n.s + n.s %}"),
    "doubled tuple": gathered("s=(1,)", 64, "{% set n.s = n.s + n.s %}"),
    "squared number": gathered("x=7", 64, "{% set n.x = n.x * n.x %}"),
    "doubled number": gathered("x=7", 90000, repeated(90000, "{% set n.x = n.x + n.x %}")),
    "minus number": gathered("x=7", 90000, repeated(90000, "{% set n.x = n.x - (0 - n.x) %}")),
    "hex number": "{% set x = ('f' * 8000000) | int(base=16) %}" + repeated(1000, "{% set y = x // 3 %}"),
    "rounds": repeated(90000, "{{ 5 | round(999999, 'ceil') }}"),
    "long output": "{% set s = 'a' * 8000000 %}" + repeated(1000, "{{ s }}"),
    "join with long": "{% set s = 'a' * 8000000 %}{{ s.join(['b'] * 1000) | length }}",
    "safe join": "{% set s = 'a' * 8000000 %}{{ ('' | safe).join([s] * 1000) | length }}",
    "replace nothing": "{{ ('a' * 8000000).replace('', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb') | length }}",
    "safe replace method": "{{ (('a' * 1000000) | safe).replace('a', 'b' * 1000) | length }}",
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(1000000) | length }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) | length }}",
    "indent lines": "{{ ('\n' * 1000000) | indent(1000000, true, true) | length }}",
    "indent text": "{{ ('\n' * 1000000) | indent('a' * 1000000, true, true) | length }}",
    "json indent": "{{ (range(100000) | list) | tojson(indent=1000000) | length }}",
    "json indent text": "{{ (range(100000) | list) | tojson(indent='a' * 100000) | length }}",
    "json separators": "{{ (range(100000) | list) | tojson(separators=('a' * 100000, ':')) | length }}",
    "json loop": "{% set l = [0] * 1000000 %}" + repeated(200, "{% set x = l | tojson %}"),
    "percent fields": "{{ (('%999999s' * 1000) % (('a',) * 1000)) | length }}",
    "percent texts": "{% set s = 'a' * 8000000 %}{{ (('%s' * 1000) % ((s,) * 1000)) | length }}",
    "percent star": "{{ (('%*s' * 1000) % ((999999, 'a') * 1000)) | length }}",
    "percent named": "{% set s = 'a' * 8000000 %}{{ (('%(a)s' * 1000) % {'a': s}) | length }}",
    "format method": "{% set s = 'a' * 8000000 %}{{ ('{0}' * 1000).format(s) | length }}",
    "format map": "{% set s = 'a' * 8000000 %}{{ ('{a}' * 1000).format_map({'a': s}) | length }}",
    "batch": "{% set l = range(100000) | list %}" + repeated(1000, "{% set x = l | batch(1) | list %}"),
    "batch kept": gathered("x=[]", 1000, "{% set n.x = [n.x, range(100000) | batch(1) | list] %}"),
    "batch filled": gathered("x=[]", 1000, "{% set n.x = [n.x, [1] | batch(1000000, 0) | list] %}"),
    "slice": gathered("x=[]", 1000, "{% set n.x = [n.x, [] | slice(1000000) | list] %}"),
    "safe slices": gathered("x=[]", 1000, "{% set n.x = [n.x, (('a' * 8000000) | safe)[1:]] %}"),
    "map center": (
        gathered("x=[]", 1000, "{% set n.x = [n.x, range(100000) | map('string') | map('center', 63) | list] %}")
    ),
    "split": gathered("x=[]", 1000, "{% set n.x = [n.x, ('aa ' * 1000000).split()] %}"),
    "characters": "{{ ('a' * 8000000) | list | length }}",
    "split once": "{{ ('ab ' * 2700000).split(' ') | length }}",
    "dict call": gathered("x=[]", 1000, "{% set n.x = [n.x, dict(range(100000) | batch(2))] %}"),
    "dict copy": "{% set d = {}.fromkeys(range(100000)) %}" + gathered("x=[]", 1000, "{% set n.x = [n.x, d.copy()] %}"),
    "groupby": (
        "{% set l = range(100000) | map('string') | list %}"
        + repeated(100, "{% set x = l | groupby('real') %}")
    ),
    "dictsort": "{% set d = {}.fromkeys(range(100000)) %}" + repeated(100, "{% set x = d | dictsort %}"),
    "sum lists": "{{ ([[0]] * 1000000) | sum(start=[]) | length }}",
    "sum big lists": "{{ ([[0] * 100000] * 100) | sum(start=[]) | length }}",
    "pprint": "{{ range(100000) | list | pprint | length }}",
    "wordwrap": "{{ ('a' * 8000000) | wordwrap(1) | length }}",
    "wordwrap string": "{{ ('a ' * 40000) | wordwrap(1, wrapstring='b' * 1000000) | length }}",
    "striptags": "{{ ('<!---->' * 1000000) | striptags | length }}",
    "urlize": "{{ ('www.a.b((((' * 100000) | urlize | length }}",
    "title": "{% set s = 'a ' * 4000000 %}" + repeated(100, "{% set x = s | title %}"),
    "escape": gathered("x=[]", 100, "{% set n.x = [n.x, ('<' * 8000000) | e] %}"),
    "trim": "{% set s = ' ' * 8000000 %}" + repeated(90000, "{% set x = s | trim %}"),
    "reverse": "{% set s = 'a' * 8000000 %}" + repeated(90000, "{% set x = s | reverse %}"),
    "last of lazy": repeated(90000, "{% set x = (range(100000) | map('string')) | last %}"),
    "loop with condition": repeated(90000, "{% for x in range(100000) if false %}{% endfor %}"),
    "chained maps": gathered("x=[1]", 90000, "{% set n.x = n.x | map('string') %}") + "{{ n.x | list }}",
    "star arguments": (
        "{% macro f() %}{{ varargs | length }}{% endmacro %}{% set l = [0] * 1000000 %}"
        + repeated(90000, "{{ f(*l) }}")
    ),
    "cycler": "{% set l = [0] * 1000000 %}" + gathered("x=[]", 1000, "{% set n.x = [n.x, cycler(*l)] %}"),
    "strftime": "{{ strftime_now('%c' * 1000000) | length }}",
    "strftime width": "{{ strftime_now('%0999999d' * 1000) | length }}",
    "many wide texts": gathered("l=[], s=messages[1].content[-1] * 1000000", 9000, "{% set n.l = [n.l, n.s ~ i] %}"),
    "many short texts": (
        gathered("l=[]", 90000, repeated(90, "{% set n.l = [n.l, messages[1].content[-1] * 60 ~ i] %}"))
    ),
    "tagged texts": gathered(
        "l=[], s='é' * 1000000",
        9000,
        "{% set x %}{% generation %}{{ n.s }}{% endgeneration %}{% endset %}{% set n.l = [n.l, x] %}",
    ),
    "hash collisions": (
        "{{ ["
        + ", ".join(str(i * (2**61 - 1)) for i in range(1, 40000))
        + "] | unique | list | length }}"
    ),
}
# fmt: on


def explode(template: str) -> Any:
    """CPU seconds, MiB beyond what the process had, and the refusal, of one template in a forked child."""
    answers, writes = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_kilobytes("VmSize") * 1024 + BYTES, resource.RLIM_INFINITY))
        os.write(writes, json.dumps(_refusal(template)).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(answers, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer) if answer else (float(CPU_SECONDS), 0.0, "killed by its limits")


def _refusal(template: str) -> tuple[float, float, str | None]:
    started, before, said = time.process_time(), _kilobytes("VmHWM"), None
    try:
        render(compile_template(template), TALK, {"bos_token": "<s>"})
    except (BadRecord, ConfigError) as error:
        said = str(error)[:1000]
    except MemoryError:
        said = "out of memory"
    return time.process_time() - started, (_kilobytes("VmHWM") - before) / 1024, said


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(explode(json.loads(line))), flush=True)

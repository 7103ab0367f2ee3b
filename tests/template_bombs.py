"""Templates that would take hours or all memory, each rendered in a child with limits of its own.

python tests/template_bombs.py     reads names of bombs, answers each by a line: [seconds, MiB, refusal or null]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from sft_dist.data.rendering import render
from sft_dist.data.template_engine import compile_template
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, Message

CPU_SECONDS = 6
BYTES = 600 << 20
TALK = Conversation((Message("user", "hello"), Message("assistant", "wörld 🎉")))


def loop(num: int, body: str) -> str:
    return f"{{% for i in range({num}) %}}{body}{{% endfor %}}"


def grown(first: str, num: int, body: str) -> str:
    """`n`, with what it holds at first, and a loop that makes it larger."""
    return f"{{% set n = namespace({first}) %}}{loop(num, body)}"


ALIKE = [n * (2**61 - 1) for n in range(1, 8000)]  # numbers that all have the same hash
BOMBS = {
    "nested loops": loop(90000, loop(90000, "")),
    "list per value": grown("x=[]", 400, "{% set n.x = n.x + [[0] * 1000000] %}"),
    "range lists": grown("x=[]", 400, "{% set n.x = n.x + [range(100000) | list] %}"),
    "sorts": "{% set l = range(100000) | list %}" + loop(300, "{% set x = l | sort(reverse=true) | unique | list %}"),
    "in list": "{% set l = [0] * 1000000 %}" + loop(2000, "{% if 1 in l %}{% endif %}"),
    "is in": "{% set l = [0] * 1000000 %}" + loop(2000, "{% if 1 is in(l) %}{% endif %}"),
    "select in": "{% set l = [0] * 1000000 %}{{ range(100000) | select('in', l) | list | length }}",
    "equal lists": "{% set l = [0] * 1000000 %}{% set m = [0] * 1000000 %}" + loop(5000, "{% if l == m %}{% endif %}"),
    "less lists": "{% set l = [0] * 1000000 %}{% set m = [0] * 1000000 %}" + loop(5000, "{% if l < m %}{% endif %}"),
    "equal texts": "{% set l = 'a' * 8000000 %}{% set m = 'a' * 8000000 %}"
    + loop(100000, "{% if l == m %}{% endif %}"),
    "eq test": "{% set l = [0] * 1000000 %}{% set m = [0] * 1000000 %}" + loop(5000, "{% if l is eq(m) %}{% endif %}"),
    "in text": "{% set l = 'a' * 8000000 %}" + loop(100000, "{% if 'aaaab' in l %}{% endif %}"),
    "text count": "{% set l = 'a' * 8000000 %}" + loop(100000, "{{ l.count('a') }}"),
    "text find": "{% set l = 'a' * 8000000 %}" + loop(100000, "{{ l.find('aaaaab') }}"),
    "list index": "{% set l = [0] * 1000000 %}" + loop(5000, "{{ l.count(1) }}"),
    "lower": "{% set l = 'é' * 4000000 %}" + loop(10000, "{% set x = l | lower %}"),
    "upper test": "{% set l = 'A' * 8000000 %}" + loop(100000, "{% if l is upper %}{% endif %}"),
    "nested shared printed": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ n.l }}",
    "nested shared equal": grown("l=[0], m=[0]", 60, "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}")
    + "{{ n.l == n.m }}",
    "nested shared key": grown("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ {}[n.l] }}",
    "nested shared dict": grown("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ {n.l: 1} | length }}",
    "nested shared in dict": grown("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ n.l in {} }}",
    "nested shared get": grown("l=(0,)", 60, "{% set n.l = (n.l, n.l) %}") + "{{ {}.get(n.l) }}",
    "nested shared json": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ n.l | tojson }}",
    "nested shared string": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ n.l | string | length }}",
    "nested shared tilde": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{% set x = n.l ~ '' %}",
    "nested shared format": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ '%s' % (n.l,) }}",
    "nested shared percent": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ '{}'.format(n.l) }}",
    "nested shared join": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ n.l | join }}",
    "nested shared sort": grown("l=[0], m=[0]", 60, "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}")
    + "{{ [n.l, n.m] | sort | length }}",
    "nested shared namespace": grown("l=[0]", 60, "{% set n.l = namespace(a=n.l, b=n.l) %}") + "{{ n.l }}",
    "nested shared exception": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}") + "{{ raise_exception(n.l) }}",
    "nested shared autoescape": grown("l=[0]", 60, "{% set n.l = [n.l, n.l] %}")
    + "{% autoescape true %}{{ n.l }}{% endautoescape %}",
    "nested shared changed": grown("l=[0], m=[0]", 60, "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}")
    + "{% for x in [1,2] %}{{ loop.changed(n.l if loop.first else n.m) }}{% endfor %}",
    "many empty lists": grown("x=[]", 90000, loop(90000, "{% set n.x = [n.x, " + ", ".join(["[]"] * 500) + "] %}")),
    "many dicts": grown("x=[]", 90000, loop(90000, "{% set n.x = [n.x, " + ", ".join(["{1: 1}"] * 200) + "] %}")),
    "chained lists": grown("x=[]", 90000, loop(90000, "{% set n.x = [n.x] %}")),
    "chained dicts": grown("x=[]", 90000, loop(90000, "{% set n.x = {1: n.x} %}")),
    "chained namespaces": grown("x=[]", 90000, loop(90000, "{% set n.x = namespace(a=n.x) %}")),
    "big body": loop(90000, loop(90000, "{% if a is defined %}{% endif %}" * 1000)),
    "big body getattr": loop(90000, loop(90000, "{% set x = messages[0].content %}" * 1000)),
    "big body numbers": loop(90000, loop(90000, "{% set x = 1 + j %}" * 1000)).replace(
        "{% set x", "{% set j = 3 %}{% set x"
    ),
    "big macro": "{% macro f(n) %}"
    + "{% set x = messages[0].content %}" * 300
    + "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macro twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "block twice": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "text times": "{{ 'a' * 200000000 }}",
    "bytes times": "{{ ('a'.encode() * 999999) | length }}",
    "to_bytes": grown("x=[]", 5000, "{% set n.x = [n.x, (5).to_bytes(1000000, 'big')] %}"),
    "doubled text": grown("s='ab'", 64, "{% set n.s = n.s + n.s %}"),
    "doubled safe": grown("s=('ab' | safe)", 64, "{% set n.s = n.s + n.s %}"),
    "doubled tuple": grown("s=(1,)", 64, "{% set n.s = n.s + n.s %}"),
    "squared number": grown("x=7", 64, "{% set n.x = n.x * n.x %}"),
    "doubled number": grown("x=7", 90000, loop(90000, "{% set n.x = n.x + n.x %}")),
    "minus number": grown("x=7", 90000, loop(90000, "{% set n.x = n.x - (0 - n.x) %}")),
    "hex number": "{% set x = ('f' * 8000000) | int(base=16) %}" + loop(1000, "{% set y = x // 3 %}"),
    "rounds": loop(90000, "{{ 5 | round(999999, 'ceil') }}"),
    "many joins": "{% set s = 'a' * 8000000 %}{% set x = " + " ~ ".join(["s"] * 1000) + " %}",
    "long output": "{% set s = 'a' * 8000000 %}" + loop(1000, "{{ s }}"),
    "long set block": "{% set s = 'a' * 8000000 %}{% set x %}" + loop(1000, "{{ s }}") + "{% endset %}",
    "joined copies": "{% set s = 'a' * 8000000 %}{{ ([s] * 1000) | join | length }}",
    "method join": "{% set s = 'a' * 8000000 %}{{ ''.join([s] * 1000) | length }}",
    "join with long": "{% set s = 'a' * 8000000 %}{{ s.join(['b'] * 1000) | length }}",
    "safe join": "{% set s = 'a' * 8000000 %}{{ ('' | safe).join([s] * 1000) | length }}",
    "safe join lazily": "{% set s = 'a' * 8000000 %}{{ ('' | safe).join(([s] * 1000) | map('default')) | length }}",
    "replace nothing": "{{ ('a' * 8000000).replace('', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb') | length }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000) | length }}",
    "safe replace": "{{ (('a' * 1000000) | safe) | replace('a', 'b' * 1000) | length }}",
    "safe replace method": "{{ (('a' * 1000000) | safe).replace('a', 'b' * 1000) | length }}",
    "replace loop": grown("s='aa'", 64, "{% set n.s = n.s | replace('a', 'aa') %}"),
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(1000000) | length }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) | length }}",
    "indent lines": "{{ ('\n' * 1000000) | indent(1000000, true, true) | length }}",
    "indent text": "{{ ('\n' * 1000000) | indent('a' * 1000000, true, true) | length }}",
    "json indent": "{{ (range(100000) | list) | tojson(indent=1000000) | length }}",
    "json indent text": "{{ (range(100000) | list) | tojson(indent='a' * 100000) | length }}",
    "json separators": "{{ (range(100000) | list) | tojson(separators=('a' * 100000, ':')) | length }}",
    "json loop": "{% set l = [0] * 1000000 %}" + loop(200, "{% set x = l | tojson %}"),
    "json texts": "{{ (['a' * 8000000] * 1000) | tojson | length }}",
    "percent fields": "{{ (('%999999s' * 1000) % (('a',) * 1000)) | length }}",
    "percent texts": "{% set s = 'a' * 8000000 %}{{ (('%s' * 1000) % ((s,) * 1000)) | length }}",
    "percent star": "{{ (('%*s' * 1000) % ((999999, 'a') * 1000)) | length }}",
    "percent named": "{% set s = 'a' * 8000000 %}{{ (('%(a)s' * 1000) % {'a': s}) | length }}",
    "format filter": "{% set s = 'a' * 8000000 %}{{ ('%(a)s' * 1000) | format(a=s) | length }}",
    "format method": "{% set s = 'a' * 8000000 %}{{ ('{0}' * 1000).format(s) | length }}",
    "format map": "{% set s = 'a' * 8000000 %}{{ ('{a}' * 1000).format_map({'a': s}) | length }}",
    "format widths": "{{ ('{:>999999}' * 1000).format(*(['a'] * 1000)) | length }}",
    "batch": "{% set l = range(100000) | list %}" + loop(1000, "{% set x = l | batch(1) | list %}"),
    "batch kept": grown("x=[]", 1000, "{% set n.x = [n.x, range(100000) | batch(1) | list] %}"),
    "batch filled": grown("x=[]", 1000, "{% set n.x = [n.x, [1] | batch(1000000, 0) | list] %}"),
    "slice": grown("x=[]", 1000, "{% set n.x = [n.x, [] | slice(1000000) | list] %}"),
    "slices": grown("x=[]", 1000, "{% set n.x = [n.x, ([0] * 1000000)[:]] %}"),
    "safe slices": grown("x=[]", 1000, "{% set n.x = [n.x, (('a' * 8000000) | safe)[1:]] %}"),
    "map": grown("x=[]", 1000, "{% set n.x = [n.x, range(100000) | map('string') | list] %}"),
    "map center": grown(
        "x=[]", 1000, "{% set n.x = [n.x, range(100000) | map('string') | map('center', 63) | list] %}"
    ),
    "chars": grown("x=[]", 1000, "{% set n.x = [n.x, ('a' * 1000000) | list] %}"),
    "split": grown("x=[]", 1000, "{% set n.x = [n.x, ('aa ' * 1000000).split()] %}"),
    "splitlines": grown("x=[]", 1000, "{% set n.x = [n.x, ('aa\n' * 1000000).splitlines()] %}"),
    "split once": "{{ ('ab ' * 2700000).split(' ') | length }}",
    "dict of range": grown("x=[]", 1000, "{% set n.x = [n.x, {}.fromkeys(range(100000))] %}"),
    "dict call": grown("x=[]", 1000, "{% set n.x = [n.x, dict(range(100000) | batch(2))] %}"),
    "dict copy": "{% set d = {}.fromkeys(range(100000)) %}" + grown("x=[]", 1000, "{% set n.x = [n.x, d.copy()] %}"),
    "items": "{% set d = {}.fromkeys(range(100000)) %}"
    + grown("x=[]", 1000, "{% set n.x = [n.x, d.items() | list] %}"),
    "groupby": "{% set l = range(100000) | map('string') | list %}" + loop(100, "{% set x = l | groupby('real') %}"),
    "dictsort": "{% set d = {}.fromkeys(range(100000)) %}" + loop(100, "{% set x = d | dictsort %}"),
    "max": "{% set l = range(100000) | list %}" + loop(1000, "{% set x = l | max %}"),
    "sum": "{% set l = range(100000) | list %}" + loop(1000, "{% set x = l | sum %}"),
    "sum lists": "{{ ([[0]] * 1000000) | sum(start=[]) | length }}",
    "sum big lists": "{{ ([[0] * 100000] * 100) | sum(start=[]) | length }}",
    "pprint": "{{ range(100000) | list | pprint | length }}",
    "wordwrap": "{{ ('a' * 8000000) | wordwrap(1) | length }}",
    "wordwrap string": "{{ ('a ' * 40000) | wordwrap(1, wrapstring='b' * 1000000) | length }}",
    "striptags": "{{ ('<!---->' * 1000000) | striptags | length }}",
    "striptags open": "{{ ('<' * 8000000) | striptags | length }}",
    "urlize": "{{ ('www.a.b((((' * 100000) | urlize | length }}",
    "title": "{% set s = 'a ' * 4000000 %}" + loop(100, "{% set x = s | title %}"),
    "urlencode": "{% set s = 'é' * 4000000 %}" + loop(100, "{% set x = s | urlencode %}"),
    "wordcount": "{% set s = 'a ' * 4000000 %}" + loop(100, "{% set x = s | wordcount %}"),
    "escape": grown("x=[]", 100, "{% set n.x = [n.x, ('<' * 8000000) | e] %}"),
    "xmlattr": "{% set d = {'a': '<' * 8000000} %}" + loop(1000, "{% set x = d | xmlattr %}"),
    "truncate": "{% set s = 'a' * 8000000 %}" + loop(90000, "{% set x = s | truncate(5) %}"),
    "trim": "{% set s = ' ' * 8000000 %}" + loop(90000, "{% set x = s | trim %}"),
    "strip": "{% set s = ' ' * 8000000 %}" + loop(90000, "{% set x = s.strip() %}"),
    "reverse": "{% set s = 'a' * 8000000 %}" + loop(90000, "{% set x = s | reverse %}"),
    "last of lazy": loop(90000, "{% set x = range(100000) | map('string') | list | last %}"),
    "loop over lazy": loop(90000, "{% for x in range(100000) | map('string') %}{% endfor %}"),
    "loop with condition": loop(90000, "{% for x in range(100000) if false %}{% endfor %}"),
    "star arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}{% set l = [0] * 1000000 %}"
    + loop(90000, "{{ f(*l) }}"),
    "cycler": "{% set l = [0] * 1000000 %}" + grown("x=[]", 1000, "{% set n.x = [n.x, cycler(*l)] %}"),
    "strftime": "{{ strftime_now('%c' * 1000000) | length }}",
    "strftime width": "{{ strftime_now('%0999999d' * 1000) | length }}",
    "many long texts": grown("l=[], s='a' * 1000000", 9000, "{% set n.l = [n.l, n.s ~ i] %}"),
    "many wide texts": grown("l=[], s=messages[1].content[-1] * 1000000", 9000, "{% set n.l = [n.l, n.s ~ i] %}"),
    "many short texts": grown("l=[]", 90000, loop(90, "{% set n.l = [n.l, messages[1].content[-1] * 60 ~ i] %}")),
    "tagged texts": grown(
        "l=[], s='é' * 1000000",
        9000,
        "{% set x %}{% generation %}{{ n.s }}{% endgeneration %}{% endset %}{% set n.l = [n.l, x] %}",
    ),
    "two thirds": grown("l=[], s='a' * 1000000", 150, "{% set n.l = [n.l, n.s ~ i] %}")
    + grown("m=[]", 90000, loop(90000, "{% set n.m = [n.m, " + ", ".join(["[]"] * 500) + "] %}")).replace(
        "set n = namespace(m=[])", "set n.m = []"
    ),
    "power": "{{ 9 ** 9 ** 9 }}",
    "compile time": "{{ 'a' | center(999999) | wordwrap(1) | title | length }}" * 20,
    "lipsum": "{{ lipsum(n=99999999) }}",
    "wide number": "{{ '%999999999d' % 1 }}",
    "filter block": "{% filter replace('a', 'bbbbbbbbbb') %}" + loop(90000, loop(50, "aaaaaaaaaa")) + "{% endfilter %}",
    "big template": "{# " + "a" * 400000 + " #}",
    "hex constant": "{% set x = 0x" + "f" * 100000 + " %}" + loop(90000, "{% set y = x // 3 %}"),
    "attribute path": "{{ range(100000) | map(attribute='real.' * 100000 ~ 'real') | list | length }}",
    "selectattr path": "{{ range(100000) | selectattr('real.' * 100000 ~ 'real') | list | length }}",
    "sort path": "{{ range(100000) | sort(attribute='real,' * 100000 ~ 'real') | list | length }}",
    "sum path": "{{ range(100000) | sum('real.' * 100000 ~ 'real') }}",
    "join path": "{{ range(100000) | join(attribute='real.' * 100000 ~ 'real') }}",
    "groupby path": "{{ range(100000) | groupby('real.' * 100000 ~ 'real') }}",
    "colliding dict": loop(1000, "{% set x = {" + ", ".join(f"{n}: 1" for n in ALIKE) + "} %}"),
    "colliding computed": grown("l=[]", 5000, "{% set n.l = n.l + [i * 2305843009213693951] %}")
    + loop(1000, "{% set x = {}.fromkeys(n.l) %}"),
    "colliding added": grown(
        "l=[], x=0",
        5000,
        "{% set n.x = 576460752303423487 + n.x %}{% set n.x = 576460752303423488 + n.x %}"
        "{% set n.x = 1152921504606846976 + n.x %}{% set n.l = n.l + [n.x] %}",
    )
    + loop(1000, "{% set x = {}.fromkeys(n.l) %}"),
    "colliding parsed": "{% set l = '"
    + " ".join(map(str, ALIKE))
    + "'.split() | map('int') | list %}"
    + loop(1000, "{% set x = l | unique | list %}"),
    "deep minus": "{{ " + "-" * 100000 + "1 }}",
    "deep lists": "{{ " + "[" * 50000 + "1" + "]" * 50000 + " }}",
    "deep fors 8000": "{% for i in a %}" * 8000 + "{% endfor %}" * 8000,
    "deep filters": "{{ 1" + "|abs" * 60000 + " }}",
    "deep list json": grown("l=[]", 50000, "{% set n.l = [n.l] %}") + "{{ n.l | tojson }}",
    "deep tuple hash": grown("l=(1,)", 50000, "{% set n.l = (n.l,) %}") + "{{ {n.l: 1} | length }}",
    "deep batch": grown("x=[1]", 90000, "{% set n.x = n.x | batch(1) %}") + "{{ n.x | list }}",
    "loop length lazy": loop(
        90000, "{% for x in range(100000) | map('string') %}{% if loop.length %}{% break %}{% endif %}{% endfor %}"
    ),
    "center loop": loop(90000, "{% set x = 'a' | center(999999) %}"),
    "ljust loop": loop(90000, "{% set x = 'a'.ljust(999999) %}"),
    "casefold": "{% set s = 'ß' * 8000000 %}" + loop(900, "{% set x = s.casefold() %}"),
    "wide varargs": "{% macro f() %}{{ kwargs | length }}{% endmacro %}"
    "{% set d = {}.fromkeys(range(100000) | map('string') | list) %}" + loop(90000, "{{ f(**d) }}"),
    "call blocks": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 60
    + "a"
    + "{% endcall %}" * 60,
    "filesize": loop(90000, loop(90000, "{{ 5 | filesizeformat }}")),
    "sort texts": "{% set l = ['a' * 1000000] * 1000 %}" + loop(90000, "{% set x = l | sort %}"),
    "float format": loop(90000, "{{ '%.999999f' % 1.5 }}"),
    "printed ints": "{% set x = 10 ** 18 %}" + loop(90000, loop(900, "{{ x }}")),
    "date": loop(90000, loop(900, "{{ strftime_now('%c') }}")),
    "lstrip chars": "{% set s = 'a' * 4000000 %}{% set c = 'bcdefghijklmnop' * 200000 %}"
    "{{ (s ~ c).strip(c ~ 'a') | length }}",
}


def main() -> None:
    for name in sys.stdin:
        print(json.dumps(explode(BOMBS[name.strip()])), flush=True)


def explode(text: str) -> tuple[float, float, str | None]:
    """CPU seconds, MiB beyond those of the process before, and the refusal, of one template in a forked child."""
    answers, writes = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes() + BYTES, resource.RLIM_INFINITY))
        os.write(writes, json.dumps(refusal(text)).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(answers, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return tuple(json.loads(answer)) if answer else (float(CPU_SECONDS), 0.0, "killed")


def refusal(text: str) -> tuple[float, float, str | None]:
    started, before = time.process_time(), peak_mib()
    try:
        render(compile_template(text), TALK, {"bos_token": "<s>"})
        said = None
    except (BadRecord, ConfigError) as error:
        said = str(error)[:300]
    except MemoryError:
        said = "out of memory"
    return time.process_time() - started, peak_mib() - before, said


def used_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    main()

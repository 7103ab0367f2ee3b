"""A million hostile lines: no crash, no hang, bounded memory, every reject listed, the good ones as they were.

The lines come from a seeded generator that damages good records; an independent reading of each damaged line (the
oracle: the standard library and the rules of docs/data.md) tells what must become of it.
"""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.data.formats import to_conversations
from sft_dist.data.sources import Rejects, read_records
from sft_dist.errors import BadRecord

GIB = 1 << 30


def good(draw: random.Random, number: int) -> dict[str, str]:
    words = ["alpha", "βήτα", "гамма", "丁", "🙂", "line\u2028two", 'tab\tquote"', "back\\slash", "é" * 3]
    text = " ".join(draw.choices(words, k=draw.randint(1, 12)))
    return {"instruction": f"{number} {text}", "output": f"answer {text}"}


def encode(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


# name -> (record -> line, whether the line is still good)
MUTATORS: dict[str, Callable[[dict[str, str], random.Random], bytes]] = {
    "truncated": lambda r, d: encode(r)[: -d.randint(1, 12)],
    "latin-1": lambda r, d: json.dumps(r | {"output": "caf\xe9"}, ensure_ascii=False).encode("latin-1", "replace"),
    "lone continuation byte": lambda r, d: encode(r).replace(b"answer", b"ans\x80wer"),
    "duplicate key": lambda r, d: encode(r)[:-1] + b', "output": "again"}',
    "NaN": lambda r, d: encode(r)[:-1] + b', "score": NaN}',
    "infinity": lambda r, d: encode(r)[:-1] + b', "score": -Infinity}',
    "escaped NUL": lambda r, d: encode(r).replace(b"answer", b"\\u0000answer"),
    "raw NUL": lambda r, d: encode(r).replace(b"answer", b"\0answer"),
    "lone surrogate": lambda r, d: encode(r).replace(b"answer", b"\\ud800answer"),
    "deep": lambda r, d: encode(r)[:-1] + b', "x": ' + b"[" * 200 + b"]" * 200 + b"}",
    "very deep": lambda r, d: b"[" * 100_000,
    "an array": lambda r, d: encode([r]),
    "a number": lambda r, d: b"12",
    "a string": lambda r, d: b'"text"',
    "two values": lambda r, d: encode(r) + b" " + encode(r),
    "a trailing comma": lambda r, d: encode(r)[:-1] + b",}",
    "single quotes": lambda r, d: repr(r).encode(),
    "no answer": lambda r, d: encode({"instruction": r["instruction"]}),
    "an empty answer": lambda r, d: encode(r | {"output": "  "}),
    "an answer that is a number": lambda r, d: encode(r | {"output": 5}),
    "an answer that is a list": lambda r, d: encode(r | {"output": ["a"]}),
    "null": lambda r, d: encode(r | {"output": None}),
    "noise": lambda r, d: d.randbytes(d.randint(1, 60)).replace(b"\n", b"").replace(b"\r", b"") or b"x",
    "a control character": lambda r, d: encode(r).replace(b"answer", b"an\x01swer"),
    "a placeholder": lambda r, d: encode(r | {"output": "I am {{name}}"}),
    "half a line": lambda r, d: encode(r)[d.randint(1, 8) :],
}  # fmt: skip
HARMLESS: dict[str, Callable[[dict[str, str], random.Random], bytes]] = {
    "as it was": lambda r, d: encode(r),
    "escaped": lambda r, d: json.dumps(r, ensure_ascii=True).encode(),
    "spaced": lambda r, d: b"  " + json.dumps(r, indent=None, separators=(" , ", " : ")).encode() + b"\t\r",
    "another key": lambda r, d: encode(r | {"note": "x"}),
    "long": lambda r, d: encode(r | {"output": r["output"] * d.randint(1, 200)}),
}


def write_lines(path: Path, num: int, seed: int) -> tuple[dict[int, str], dict[int, dict[str, str]]]:
    """Write `num` lines; returns (line -> mutator) of the bad ones and (line -> record) of the good ones."""
    draw = random.Random(seed)
    bad: dict[int, str] = {}
    fine: dict[int, dict[str, str]] = {}
    bad_names, fine_names = list(MUTATORS), list(HARMLESS)
    with open(path, "wb") as file:
        for line in range(1, num + 1):
            record = good(draw, line)
            if draw.random() < 0.4:
                name = draw.choice(bad_names)
                if name == "very deep" and draw.random() < 0.99:
                    name = "deep"
                bad[line] = name
                written = MUTATORS[name](record, draw)
            else:
                written = HARMLESS[draw.choice(fine_names)](record, draw)
                fine[line] = record
            file.write(written + b"\n")
    return bad, fine


def test_every_kind_of_damage_is_rejected_at_its_line(tmp_path: Path) -> None:
    check(tmp_path / "hostile.jsonl", 3000)


@pytest.mark.slow
def test_a_million_lines_in_bounded_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    num = int(os.environ.get("SFT_HOSTILE_LINES", "1000000"))
    check(tmp_path / "hostile.jsonl", num, keep=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GIB


def check(path: Path, num: int, *, keep: bool = True) -> None:
    bad, fine = write_lines(path, num, seed=7)
    rejects = Rejects("skip")
    rejected: set[int] = set()
    accepted = 0
    for record in read_records(str(path), rejects):
        rejected |= {one.line for one in rejects.records}
        rejects.records = []  # the caller's to keep; a million of them go to a file
        try:
            (conversation,) = to_conversations(record, "alpaca", {})
        except BadRecord as error:
            assert (error.file, error.line) == (str(path), record.line)
            rejected.add(record.line)
            continue
        assert record.line in fine, (record.line, bad[record.line], record.value)
        assert conversation.messages[0].content == fine[record.line]["instruction"]
        accepted += 1
    rejected |= {one.line for one in rejects.records}
    assert rejected == set(bad)
    assert accepted == len(fine)

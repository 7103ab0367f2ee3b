"""A million hostile lines: no crash, no hang, bounded memory, every reject listed, the good ones as they were.

The lines come from a seeded generator that damages good records; an independent reading of each damaged line (the
oracle: the standard library and the rules of docs/data.md) tells what must become of it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preparing import byte_tokenizer, make_recipe, said

from sft_dist.data import prepare as prepare_module
from sft_dist.data.formats import to_conversations
from sft_dist.data.prepare import REJECTS_FILE, prepare
from sft_dist.data.sources import Rejects, read_records
from sft_dist.errors import BadRecord, DataError

GIB = 1 << 30
Bad = dict[tuple[int, int], str]  # (line, byte) -> mutator
Fine = dict[int, dict[str, str]]  # line -> record


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


def write_lines(path: Path, num: int, seed: int) -> tuple[Bad, Fine]:
    """Write `num` lines; returns the bad ones and the good ones."""
    draw = random.Random(seed)
    bad: Bad = {}
    fine: Fine = {}
    bad_names, fine_names = list(MUTATORS), list(HARMLESS)
    with open(path, "wb") as file:
        for line in range(1, num + 1):
            record = good(draw, line)
            if draw.random() < 0.4:
                name = draw.choice(bad_names)
                if name == "very deep" and draw.random() < 0.99:
                    name = "deep"
                bad[line, file.tell()] = name
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
    check(tmp_path / "hostile.jsonl", num)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GIB


def check(path: Path, num: int) -> None:
    bad, fine = write_lines(path, num, seed=7)
    rejects = Rejects("skip")
    rejected: list[tuple[int, int]] = []
    accepted = 0
    for record in read_records(str(path), rejects):
        rejected += [(one.line, one.byte) for one in rejects.take()]
        try:
            (conversation,) = to_conversations(record, "alpaca", {})
        except BadRecord as error:
            assert (error.file, error.line) == (str(path), record.line)
            rejected.append((error.line, error.byte))
            continue
        assert record.line in fine, (record.line, record.value)
        assert conversation.messages[0].content == fine[record.line]["instruction"]
        accepted += 1
    rejected += [(one.line, one.byte) for one in rejects.take()]
    assert rejected == list(bad)
    assert accepted == len(fine)


@pytest.mark.parametrize("most_held", [1, 7, prepare_module.MOST_REJECTS])
def test_a_preparation_lists_every_reject_at_its_line_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_held: int
) -> None:
    """And the rows are the same however few of them it holds at a time."""
    monkeypatch.setattr(prepare_module, "MOST_REJECTS", most_held)
    bad, fine = write_lines(tmp_path / "hostile.jsonl", 3000, seed=11)
    source = {"path": str(tmp_path / "hostile.jsonl"), "format": "alpaca"}
    recipe = make_recipe(tmp_path, source, seq_len=1 << 17, eval_fraction=0, on_bad_record="skip", max_bad_fraction=1.0)
    data = prepare(recipe, byte_tokenizer(), notice=said)
    listed = [json.loads(line) for line in (data.folder / REJECTS_FILE).read_text().splitlines()]
    assert {one["file"] for one in listed} == {source["path"]}
    places = [(one["line"], one["byte"]) for one in listed]
    assert (sorted(places) if len(bad) > most_held else places) == list(bad), "as long as all are held, in order"
    assert all(one["reason"] for one in listed)
    counts = data.report.sources[0]
    assert (counts.records, counts.rejected, counts.accepted) == (3000, len(bad), len(fine))
    assert [example.id for example in data.train] == [f"{source['path']}:{line}" for line in fine]


RUNS = {"broken": b'{"instruction": "%d", "output": \n', "of no known format": b'{"nothing": "%d"}\n'}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_bad_lines_needs_no_more_memory_the_longer_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Held at a time are as many as that constant says; all of them are listed, or refused by their number."""
    monkeypatch.setattr(prepare_module, "MOST_REJECTS", 200)
    tokenizer, peaks = byte_tokenizer(), []
    read_and_write = prepare_module.write_corpus

    def measured(*given: Any) -> None:
        tracemalloc.start()
        read_and_write(*given)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    for num in (200, 1000, 8000):  # the first loads what is loaded once
        folder = tmp_path / str(num)
        folder.mkdir()
        source = folder / "bad.jsonl"
        source.write_bytes(b"".join(RUNS[kind] % n for n in range(num)) + encode({"instruction": "a", "output": "b"}))
        skipping = {"eval_fraction": 0, "on_bad_record": "skip"}
        with monkeypatch.context() as patched:
            patched.setattr(prepare_module, "write_corpus", measured)
            data = prepare(make_recipe(folder, source, max_bad_fraction=1.0, **skipping), tokenizer, notice=said)
        with open(data.folder / REJECTS_FILE) as listing:
            assert [json.loads(line)["line"] for line in listing] == list(range(1, num + 1))
        assert (len(data.report.rejects), data.report.sources[0].rejected, len(data.train)) == (100, num, 1)
        with pytest.raises(DataError, match=rf"{num:,} of {num + 1:,} records are bad"):
            prepare(make_recipe(folder, source, max_bad_fraction=0.5, **skipping), tokenizer, notice=said)
    assert peaks[2] - peaks[1] < 50 * 7000  # a reject that is held takes some 600 bytes

"""Tables: the same rows from every kind of file, exact cells, and what is not exact named with its line or row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config.schema import SourceSection
from sft_dist.data import tables
from sft_dist.data.formats import to_conversations
from sft_dist.data.sources import Record, Rejects, read_records
from sft_dist.errors import BadRecord, DataError
from sft_dist.types import Conversation

Rows = list[dict[str, Any]]


def read(path: Path, rejects: Rejects | None = None, **settings: Any) -> list[Record]:
    return list(read_records(SourceSection(path=str(path), **settings), rejects or Rejects()))


def cells(path: Path, **settings: Any) -> list[list[str]]:
    return [list(record.value.values()) for record in read(path, **settings)]


def as_cells(separator: str) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return write


def as_lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_table(rows: Rows) -> pa.Table:
    names = dict.fromkeys(key for row in rows for key in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def as_parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(as_table(rows), sink, row_group_size=2)
    return sink.getvalue()


def as_arrow(new: Callable[..., Any]) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        sink, table = io.BytesIO(), as_table(rows)
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return sink.getvalue()

    return write


FLAT: dict[str, Callable[[Rows], bytes]] = {"x.csv": as_cells(","), "x.tsv": as_cells("\t")}
NESTED: dict[str, Callable[[Rows], bytes]] = {
    "x.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "x.jsonl": as_lines,
    "x.ndjson": as_lines,
    "x.parquet": as_parquet,
    "stream.arrow": as_arrow(pa.ipc.new_stream),
    "file.arrow": as_arrow(pa.ipc.new_file),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
KINDS = {
    f"{name}{packing}": (write, pack)
    for name, write in (FLAT | NESTED).items()
    for packing, pack in PACKED.items()
    if not packing or name not in ("x.parquet", "stream.arrow", "file.arrow")
}

ALPACA = [
    {"instruction": "q", "input": "", "output": "a"},
    {"instruction": 'say "hi"', "input": "one,\ttwo\nthree\r\n", "output": "é漢🎉\u2028, \\n"},
    {"instruction": "'q'", "input": '"', "output": '""'},
]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER_CALL = {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"y": "z"}}}
TALKS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [OTHER_CALL], "train": False},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
]


def conversations(path: Path) -> list[Conversation]:
    found = [one for record in read(path) for one in to_conversations(record, "auto", {})]
    return [Conversation(one.messages, one.tools) for one in found if isinstance(one, Conversation)]


@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_give_the_same_conversations(tmp_path: Path, name: str) -> None:
    write, pack = KINDS[name]
    for rows in [ALPACA] if name.split(".")[1] in ("csv", "tsv") else [ALPACA, TALKS]:
        (tmp_path / name).write_bytes(pack(write(rows)))
        (tmp_path / "plain.jsonl").write_bytes(as_lines(rows))
        found = conversations(tmp_path / name)
        assert found == conversations(tmp_path / "plain.jsonl")
        assert len(found) == len(rows)


@pytest.mark.parametrize("name", KINDS)
def test_records_know_their_line_or_row(tmp_path: Path, name: str) -> None:
    write, pack = KINDS[name]
    (tmp_path / name).write_bytes(pack(write(ALPACA)))
    records = read(tmp_path / name)
    assert len({record.id for record in records}) == len(records)
    assert [record.value for record in records] == ALPACA
    if ".csv" in name or ".tsv" in name:
        for record in records:
            before = write(ALPACA)[: record.byte]
            assert before.endswith(b"\r\n")
            assert before.count(b"\n") + 1 == record.line
    elif ".parquet" in name or ".arrow" in name:
        assert [(record.line, record.byte) for record in records] == [(1, 0), (2, 0), (3, 0)]


def test_a_folder_of_all_kinds_is_one_source(tmp_path: Path) -> None:
    for name, (write, pack) in KINDS.items():
        (tmp_path / name).write_bytes(pack(write(ALPACA)))
    assert len(read(tmp_path)) == len(KINDS) * len(ALPACA)


def test_columns_by_number_of_a_table_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("why?\tyes\tsince\nwho?\tme\tso\n")
    columns: dict[str, str | int] = {"question": 0, "answer": 1, "rationale": 2}
    records = read(path, columns=columns)
    assert [record.value for record in records] == [
        {"0": "why?", "1": "yes", "2": "since"},
        {"0": "who?", "1": "me", "2": "so"},
    ]
    (found,) = to_conversations(records[0], "auto", columns)
    assert isinstance(found, Conversation)
    assert [m.content for m in found.messages] == ["why?", "since\nThe answer is yes."]


def test_a_header_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("yes,yes\nno,no\n")
    with pytest.raises(BadRecord, match="two columns are called 'yes'; if this is no header row, number the cells"):
        read(path)


ESCAPED = {r"a\nb": "a\nb", r"a\\nb": r"a\nb", r"\\\n": "\\\n", "\\": "\\", r"\x": r"\x", r"\t\r": "\t\r", "é": "é"}


def test_written_out_escapes(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("a\n" + "\n".join(ESCAPED) + "\n")
    assert cells(tmp_path / "x.tsv", escapes=True) == [[text] for text in ESCAPED.values()]
    assert cells(tmp_path / "x.tsv") == [[text] for text in ESCAPED]


def test_quotes_are_text_when_the_source_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b'a\tb\n"one\ttwo"\r\n"\t""\n\nx\ty')
    assert cells(path, quotes=False) == [['"one', 'two"'], ['"', '""'], ["x", "y"]]
    path.write_bytes(b'a\tb\n"one\ttwo\n')
    with pytest.raises(BadRecord, match=r"x\.tsv:2 .*cells are not quoted here\? set quotes=false"):
        read(path)


BROKEN = {
    "a-quote-never-closed": (b'a,b\nx,y\nz,"w\n', 3, "unexpected end of data"),
    "text-behind-a-quote": (b'a,b\n"x"z,y\n', 2, "expected after"),
    "utf-16": ("a,b\nx,y".encode("utf-16"), 1, "UTF-16"),
    "old-line-ends": (b"a,b\rx,y\rz,w", 1, "new-line character"),
}


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_cannot_be_cut_into_rows_always_stops(tmp_path: Path, name: str, policy: Any) -> None:
    data, line, reason = BROKEN[name]
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(BadRecord, match=reason) as caught:
        read(tmp_path / "x.csv", Rejects(policy))
    assert (caught.value.line, caught.value.byte) == (line, sum(map(len, data.splitlines(True)[: line - 1])))


@pytest.mark.parametrize("settings", [{}, {"quotes": False}])
def test_a_line_without_end_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 64)
    (tmp_path / "x.csv").write_bytes(b"a\n" + b"x" * 1000)
    with pytest.raises(BadRecord, match="line longer than") as caught:
        read(tmp_path / "x.csv", Rejects("skip"), **settings)
    assert (caught.value.line, caught.value.byte) == (2, 2)
    (tmp_path / "x.csv").write_bytes(b'a\n"' + b"x\n" * 1000)
    with pytest.raises(BadRecord, match="field larger than field limit"):
        read(tmp_path / "x.csv", Rejects("skip"))


BAD_ROWS = {
    "too-few": (b"x", "the row has 1 cells, the first one 2"),
    "too-many": (b"x,y,z", "the row has 3 cells, the first one 2"),
    "latin-1": (b"x,caf\xe9", "byte 0xe9 is not UTF-8"),
    "nul": (b"x,a\0b", "NUL character"),
}


@pytest.mark.parametrize("settings", [{}, {"quotes": False}])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_listed_with_its_place(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    bad, reason = BAD_ROWS[name]
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfa,b\nx,y\n" + bad + b"\nz,w\n")
    rejects = Rejects("skip")
    assert [record.value for record in read(tmp_path / "x.csv", rejects, **settings)] == [
        {"a": "x", "b": "y"},
        {"a": "z", "b": "w"},
    ]
    (rejected,) = rejects.records
    assert (rejected.line, rejected.byte) == (3, 11)
    assert reason in rejected.reason


def test_a_bad_cell_of_a_typed_table_spoils_its_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"a\0b", b"fine"])
    table = pa.table({"a": pa.Array.from_buffers(pa.string(), 4, texts.buffers())})
    pq.write_table(table, tmp_path / "x.parquet")
    rejects = Rejects("skip")
    assert [(r.line, r.value["a"]) for r in read(tmp_path / "x.parquet", rejects)] == [(1, "good"), (4, "fine")]
    assert [one.line for one in rejects.records] == [2, 3]
    assert "utf-8" in rejects.records[0].reason
    assert rejects.records[1].reason == "NUL character in a string"


def written(table: pa.Table, path: Path) -> Path:
    """`table` as an Arrow file or as Parquet, by the name."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_date_that_python_does_not_know_spoils_its_row_alone(tmp_path: Path, name: str) -> None:
    """Seconds beyond the year 9999, in a column that nobody asks for."""
    when = pa.array([0, 1 << 50, 1, -(1 << 50)], pa.timestamp("ms" if name == "x.parquet" else "s"))
    rejects = Rejects("skip")
    path = written(pa.table({"text": list("abcd"), "when": when}), tmp_path / name)
    assert [(record.line, record.value["text"]) for record in read(path, rejects)] == [(1, "a"), (3, "c")]
    assert [one.line for one in rejects.records] == [2, 4]
    assert all("the cell of column 'when' cannot be read" in one.reason for one in rejects.records)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str, policy: Any) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "id", "text"])
    with pytest.raises(BadRecord, match=r":1 .*two columns are called 'text': rename one"):
        read(written(table, tmp_path / name), Rejects(policy))


def test_keys_of_maps_are_text(tmp_path: Path) -> None:
    maps = pa.array([[(1, "a\0"), (2, "b")], [(3, "c")]], pa.map_(pa.int32(), pa.string()))
    rejects = Rejects("skip")
    found = read(written(pa.table({"m": maps}), tmp_path / "x.parquet"), rejects)
    assert [record.value for record in found] == [{"m": {"3": "c"}}]
    assert [one.reason for one in rejects.records] == ["NUL character in a string"]


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_a_damaged_table_is_one_line(tmp_path: Path, name: str) -> None:
    data = NESTED[name](ALPACA)
    inside = [data[:8] + b"\xff" * 8 + data[16:]] if name == "x.parquet" else []  # Arrow's answer has several lines
    for damaged in (*inside, data[: len(data) // 2], b"", b"hello, world, this is text", data[:-8] + b"\xff" * 8):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match="broken") as caught:
            read(tmp_path / name, Rejects("skip"))
        assert str(caught.value).startswith(f"{tmp_path / name}: broken ")
        assert "\n" not in str(caught.value)


def test_nulls_are_absent_and_other_types_stay(tmp_path: Path) -> None:
    rows = [
        {"a": None, "b": {"c": None, "d": [{"e": 1, "f": None}]}, "n": 1.5, "when": date(2024, 1, 2)},
        {"a": "x", "b": None, "n": None, "when": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [record.value for record in read(tmp_path / "x.parquet")] == [
        {"b": {"d": [{"e": 1}]}, "n": 1.5, "when": date(2024, 1, 2)},
        {"a": "x"},
    ]


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_typed_tables_are_read_a_batch_at_a_time(tmp_path: Path, name: str) -> None:
    table = pa.table({"instruction": ["a"] * 20_000, "output": [f"{n} {'y' * 1000}" for n in range(20_000)]})
    if name == "x.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=1000, compression="none")
    else:
        new = pa.ipc.new_stream if name == "stream.arrow" else pa.ipc.new_file
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    del table
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in read_records(str(tmp_path / name), Rejects()))
    assert peak < 6 << 20 < (tmp_path / name).stat().st_size


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(CELL, CELL.filter(bool)), max_size=4), st.sampled_from(",\t"))
def test_whatever_python_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], separator: str
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([("a", "b"), *rows])
    path = tmp_path_factory.mktemp("any") / ("x.csv" if separator == "," else "x.tsv")
    path.write_bytes(text.getvalue().encode())
    assert cells(path) == [list(row) for row in rows]


@given(st.binary(max_size=80), st.sampled_from(["x.csv", "x.tsv", "x.parquet", "x.arrow", "x.csv.zst", "x.tsv.gz"]))
def test_arbitrary_bytes_end_in_records_or_in_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    packing = path.suffix if path.suffix in PACKED else ""
    for content in (PACKED[packing](data), PACKED[packing](b"a,b\nx,y\n" + data), data):
        path.write_bytes(content)
        for settings in ({}, {"quotes": False, "escapes": True}):
            try:
                read(path, Rejects("skip"), **settings)
            except DataError as error:
                assert "\n" not in str(error)

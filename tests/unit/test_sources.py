"""Hostile files: stopped with file, line, byte and reason, or listed within a budget; good records always arrive."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import sources
from sft_dist.data.sources import Record, Rejects, read_records, source_files
from sft_dist.errors import BadRecord, ConfigError, DataError

GOOD = b'{"instruction": "a", "output": "b"}'
SKIP_ALL = 1.0


def write(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def read(path: str, rejects: Rejects | None = None) -> list[Record]:
    return list(read_records(path, rejects or Rejects()))


def skipped(path: str) -> tuple[list[Record], list[BadRecord]]:
    rejects = Rejects("skip", SKIP_ALL)
    return read(path, rejects), rejects.records


BAD_LINES = {
    "truncated": (b'{"instruction": "a", "outp', "truncated"),
    "not-json": (b"instruction: a", "invalid JSON at column 1"),
    "latin-1": ('{"output": "caf\xe9"}'.encode("latin-1"), "byte 0xe9 at column 16 is not UTF-8"),
    "overlong-utf8": (b'{"output": "\xc0\xaf"}', "byte 0xc0"),
    "raw-nul": (b'{"output": "a\0b"}', "Invalid control character"),
    "escaped-nul": (rb'{"output": "a\u0000b"}', "NUL character"),
    "lone-surrogate": (rb'{"output": ["x", {"y": "\ud83d!"}]}', r"lone surrogate U\+D83D"),
    "surrogate-in-key": (rb'{"\udc00": 1}', r"lone surrogate U\+DC00"),
    "nan": (b'{"output": NaN}', "NaN is not JSON"),
    "infinity": (b'{"output": [-Infinity]}', "-Infinity is not JSON"),
    "huge-number": (b'{"output": 1e999}', "out of range"),
    "duplicate-key": (b'{"output": "a", "output": "b"}', "duplicate key 'output'"),
    "duplicate-key-deep": (b'{"x": [{"output": "a", "output": "b"}]}', "duplicate key 'output'"),
    "two-values": (GOOD + b" " + GOOD, "something follows"),
    "a-list": (b'["instruction"]', "expected a JSON object, found an array"),
    "a-string": (b'"instruction"', "expected a JSON object, found text"),
    "null": (b"null", "expected a JSON object, found null"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "raw-tab": (b'{"output": "a\tb"}', "Invalid control character"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_stops_with_its_place(tmp_path: Path, name: str) -> None:
    bad, reason = BAD_LINES[name]
    path = write(tmp_path, "x.jsonl", GOOD + b"\n\n" + bad + b"\n" + GOOD + b"\n")
    with pytest.raises(BadRecord, match=reason) as caught:
        read(path)
    assert (caught.value.file, caught.value.line, caught.value.byte) == (path, 3, len(GOOD) + 2)
    assert str(caught.value).startswith(f"{path}:3 (byte {len(GOOD) + 2}): ")


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_skipped_and_listed(tmp_path: Path, name: str) -> None:
    bad, _ = BAD_LINES[name]
    good, listed = skipped(write(tmp_path, "x.jsonl", GOOD + b"\n" + bad + b"\r\n" + GOOD))
    assert [(record.line, record.byte) for record in good] == [(1, 0), (3, len(GOOD) + len(bad) + 3)]
    assert [(error.line, error.byte) for error in listed] == [(2, len(GOOD) + 1)]


IN_ARRAYS = [
    name for name in BAD_LINES if name not in ("truncated", "not-json", "two-values", "deep", "raw-nul", "raw-tab")
]


@pytest.mark.parametrize("name", IN_ARRAYS)
def test_a_bad_element_of_an_array_is_skipped_and_listed(tmp_path: Path, name: str) -> None:
    bad, reason = BAD_LINES[name]
    data = b"[\n" + GOOD + b",\n " + bad + b",\n" + GOOD + b"]\n"
    good, listed = skipped(write(tmp_path, "x.json", data))
    assert [(record.line, record.byte) for record in good] == [(2, 2), (4, data.rindex(GOOD))]
    assert [(error.line, error.byte) for error in listed] == [(3, 5 + len(GOOD))]
    with pytest.raises(BadRecord, match=reason.replace(" at column 16", "")):
        read(str(tmp_path / "x.json"))


BROKEN_FILES = {
    "truncated-array": (b"[" + GOOD + b",\n" + GOOD[:9], 2, "cannot be read on"),
    "array-without-end": (b"[" + GOOD + b",\n" + GOOD + b"\n", 3, "ends early"),
    "trailing-comma": (b"[\n" + GOOD + b",\n]", 2, "expected ',' or ']'"),
    "no-comma": (b"[" + GOOD + b"\n" + GOOD + b"]", 2, "expected ',' or ']'"),
    "text-behind": (b"[" + GOOD + b"]\n]", 2, "something follows"),
    "bare-element": (b"[" + GOOD + b",\nhello]", 2, "cannot be read on"),
    "broken-object": (b'{\n"a": 1,\n', 1, "cannot be read on"),
    "utf-16": ("[]".encode("utf-16"), 1, "UTF-16"),
    "utf-16-le-without-bom": ('{"a"'.encode("utf-16-le"), 1, "UTF-16"),
}


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_cannot_be_cut_into_records_always_stops(tmp_path: Path, name: str, policy: str) -> None:
    data, line, reason = BROKEN_FILES[name]
    with pytest.raises(BadRecord, match=reason) as caught:
        read(write(tmp_path, "x.json", data), Rejects(policy, SKIP_ALL))  # type: ignore[arg-type]
    assert caught.value.line == line


def test_a_truncated_gzip_stops(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n" + bytes(range(256)) * 400)[:-50])
    with pytest.raises(DataError, match="broken gzip"):
        read(str(path), Rejects("skip", SKIP_ALL))
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match="broken gzip"):
        read(str(path))


SHAPES = {
    "lines": ("x.jsonl", GOOD + b"\n" + GOOD + b"\n"),
    "lines-crlf": ("x.jsonl", GOOD + b"\r\n\r\n" + GOOD + b"\r\n"),
    "lines-without-last-newline": ("x.jsonl", GOOD + b"\n" + GOOD),
    "lines-bom": ("x.jsonl", b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD),
    "lines-named-json": ("x.json", GOOD + b"\n" + GOOD),
    "array-on-one-line": ("x.json", b"[" + GOOD + b"," + GOOD + b"]"),
    "array-pretty": ("x.json", b"[\n  " + GOOD + b",\n\n  " + GOOD + b"\n]\n"),
    "array-bom-crlf": ("x.json", b"\xef\xbb\xbf[\r\n" + GOOD + b",\r\n" + GOOD + b"]\r\n"),
    "array-named-jsonl": ("x.jsonl", b"[" + GOOD + b",\n" + GOOD + b"]"),
    "lines-gz": ("x.jsonl.gz", GOOD + b"\n" + GOOD),
    "array-gz": ("x.json.gz", b"[" + GOOD + b"," + GOOD + b"]"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_told_by_content(tmp_path: Path, name: str) -> None:
    file, data = SHAPES[name]
    records = read(write(tmp_path, file, data))
    assert [record.value for record in records] == [json.loads(GOOD)] * 2
    for record in records:
        assert data[record.byte :].startswith(GOOD)
        assert record.line == data[: record.byte].count(b"\n") + 1
    assert len({record.id for record in records}) == 2


def test_places_are_bytes_not_characters(tmp_path: Path) -> None:
    data = '[{"a": "é漢🎉"},\n {"a": "ü"}, {"a": "\xa0"}]'.encode()
    records = read(write(tmp_path, "x.json", data))
    assert [(record.line, record.byte) for record in records] == [
        (1, 1),
        (2, data.index(b'{"a": "\xc3\xbc')),
        (2, data.rindex(b"{")),
    ]
    assert [record.id.rpartition(":")[2] for record in records] == ["1", "2", "2+35"]


def test_one_object_and_no_records(tmp_path: Path) -> None:
    assert [r.value for r in read(write(tmp_path, "x.json", b'{\n "a":\n 1}\n'))] == [{"a": 1}]
    assert read(write(tmp_path, "x.json", GOOD))[0].line == 1
    for empty in (b"", b"\n \n", b"[]", b"\xef\xbb\xbf[ ]\n"):
        assert read(write(tmp_path, "x.json", empty)) == []


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    text = json.dumps({"output": f"a{separator}b"}, ensure_ascii=ord(separator) < 32) + "\n"
    records = read(write(tmp_path, "x.jsonl", text.encode() * 2))
    assert [(r.line, r.value["output"]) for r in records] == [(1, f"a{separator}b"), (2, f"a{separator}b")]


def test_surrogate_pairs_and_written_out_escapes_are_text(tmp_path: Path) -> None:
    (record,) = read(write(tmp_path, "x.jsonl", rb'{"a": "\ud83d\ude00", "b": "\\ud800 \\u0000"}'))
    assert record.value == {"a": "\U0001f600", "b": "\\ud800 \\u0000"}


def test_a_line_without_end_is_listed_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 64)
    good, listed = skipped(write(tmp_path, "x.jsonl", b'{"a": "' + b"x" * 1000 + b'"}\n' + GOOD))
    assert [(r.line, r.byte) for r in good] == [(2, 1010)]
    assert [(e.line, e.byte, e.reason) for e in listed] == [(1, 0, "line longer than 0 MiB")]


def test_files_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["b.jsonl", "a.json", "sub/c.jsonl.gz"]
    for name in names:
        write(tmp_path, name, GOOD)
    write(tmp_path, "README.md", b"text")
    assert [file.name for file in source_files(str(tmp_path))] == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert [file.name for file in source_files(str(tmp_path / "*.json*"))] == ["a.json", "b.jsonl"]
    assert [file.name for file in source_files(str(tmp_path / "**/*.gz"))] == ["c.jsonl.gz"]
    assert len(read(str(tmp_path))) == 3
    for path, reason in [("none.json", "no such file"), ("README.md", "not a kind"), ("*.csv", "no such file or glob")]:
        with pytest.raises(ConfigError, match=reason):
            source_files(str(tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="a directory without"):
        source_files(str(tmp_path / "empty"))


def test_a_budget_of_bad_records() -> None:
    rejects = Rejects("skip", 0.01)
    for line in (4, 9):
        rejects.reject(BadRecord("no", file="f", line=line))
    rejects.finish(200)
    with pytest.raises(
        DataError, match=r"2 of 199 records are bad \(1\.0%\), more than data\.max_bad_fraction=0\.01; .* f:4"
    ):
        rejects.finish(199)
    Rejects("skip", 0.0).finish(0)


@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=9) | st.integers() | st.none(), max_size=3)))
def test_whatever_python_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("any")
    usable = [v for v in values if not any("\0" in str(text) for item in v.items() for text in item)]
    for indent in (None, 1):
        path = write(folder, "x.json", json.dumps(usable, ensure_ascii=bool(indent), indent=indent).encode())
        assert [record.value for record in read(path)] == usable
    path = write(folder, "x.jsonl", b"\n".join(json.dumps(v, ensure_ascii=False).encode() for v in usable))
    assert [record.value for record in read(path)] == usable


@given(st.binary(max_size=60))
def test_arbitrary_bytes_end_in_records_or_in_our_errors(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("x.json", "x.jsonl"):
        for content in (data, b"[" + data, b'{"a": "' + data + b'"}\n'):
            try:
                records, listed = skipped(write(folder, name, content))
            except DataError:
                continue
            assert all(isinstance(record.value, dict) for record in records)
            assert all(error.file and error.line for error in listed)

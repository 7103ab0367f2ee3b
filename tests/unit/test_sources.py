"""Hostile files: stopped with file, line, byte and reason, or listed within a budget; good records always arrive.

From everywhere: packed, in folders and globs, behind URLs, from the hub.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config.schema import SourceSection
from sft_dist.data import files, hub, json_records
from sft_dist.data.sources import (
    Record,
    Rejects,
    pin_notices,
    read_records,
    source_digests,
    source_files,
    source_sizes,
)
from sft_dist.errors import BadRecord, ConfigError, DataError

GOOD = b'{"instruction": "a", "output": "b"}'


def write(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(pack(name, data))
    return str(path)


def pack(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return pa.compress(data, "zstd", asbytes=True) if name.endswith(".zst") else data


def read(path: str | SourceSection, rejects: Rejects | None = None) -> list[Record]:
    return list(read_records(path, rejects or Rejects()))


def skipped(path: str) -> tuple[list[Record], list[BadRecord]]:
    rejects = Rejects("skip")
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
    "deeper-than-needed": (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
    "deep-with-a-flaw-inside": (b'{"a": ' + b"[" * 800 + rb'"\u0000"' + b"]" * 800 + b"}", "nested deeper than 64"),
    "form-feed-alone": (b"\x0c", "invalid JSON at column 1"),
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
    name
    for name in BAD_LINES
    if name not in ("truncated", "not-json", "two-values", "deep", "raw-nul", "raw-tab", "form-feed-alone")
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
        read(write(tmp_path, "x.json", data), Rejects(policy))  # type: ignore[arg-type]
    assert caught.value.line == line


@pytest.mark.parametrize(("name", "reason"), [("x.jsonl.gz", "broken gzip"), ("x.jsonl.zst", "broken zstd")])
def test_a_truncated_or_altered_packed_file_stops(tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(pack(name, GOOD + b"\n" + bytes(range(256)) * 400)[:-50])
    with pytest.raises(DataError, match=reason):
        read(str(path), Rejects("skip"))
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match=reason):
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
    "lines-zst": ("x.jsonl.zst", GOOD + b"\n" + GOOD),
    "array-zst": ("x.json.zst", b"[" + GOOD + b"," + GOOD + b"]"),
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


def test_what_is_wide_or_64_deep_is_no_flaw(tmp_path: Path) -> None:
    deep = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    wide = b'{"a": [' + b"{}, " * 500 + b'{}], "b": "' + b"[" * 500 + b'"}'
    assert len(read(write(tmp_path, "x.jsonl", deep + b"\n" + wide))) == 2


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
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 64)
    good, listed = skipped(write(tmp_path, "x.jsonl", b'{"a": "' + b"x" * 1000 + b'"}\n' + GOOD))
    assert [(r.line, r.byte) for r in good] == [(2, 1010)]
    assert [(e.line, e.byte, e.reason) for e in listed] == [(1, 0, "line longer than 0 MiB")]


def found(path: Path | str) -> list[str]:
    return [Path(file).name for file in source_files(str(path))]


def test_files_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["b.jsonl", "a.json", "sub/c.jsonl.gz"]
    for name in names:
        write(tmp_path, name, GOOD)
    write(tmp_path, "README.md", b"text")
    assert found(tmp_path) == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert found(tmp_path / "*.json*") == ["a.json", "b.jsonl"]
    assert found(tmp_path / "**/*.gz") == ["c.jsonl.gz"]
    assert len(read(str(tmp_path))) == 3
    for path, reason in [("none.json", "no such file"), ("README.md", "not a kind"), ("*.csv", "no such file or glob")]:
        with pytest.raises(ConfigError, match=reason):
            source_files(str(tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="a directory without"):
        source_files(str(tmp_path / "empty"))


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


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_array_is_cut_the_same_wherever_its_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    values = [{"a": "é" * n, "b": [n, {"c": "漢\n🎉"}], "n": 10**n} for n in range(40)]
    path = write(tmp_path, "x.json", b"\xef\xbb\xbf" + json.dumps(values, ensure_ascii=False, indent=1).encode())
    whole = read(path)
    monkeypatch.setattr(json_records, "_WINDOW_BYTES", step)
    assert [record.value for record in whole] == values
    assert read(path) == whole


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_number_that_a_block_cuts_is_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(json_records, "_WINDOW_BYTES", step)
    good, listed = skipped(write(tmp_path, "x.json", b"[1234567890123, " + GOOD + b"]"))
    assert ([r.byte for r in good], [e.reason for e in listed]) == ([16], ["expected a JSON object, found a number"])


def test_an_element_without_end_is_given_up_at_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(json_records, "_WINDOW_BYTES", 1 << 10)
    path = write(tmp_path, "x.json", b"[" + GOOD + b",\n" + b'{"a": "' + b"x" * (1 << 20) + b'"}]')
    with pytest.raises(BadRecord, match="no end of the record") as caught:
        read(path, Rejects("skip"))
    assert caught.value.line == 2


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.jsonl.zst", "x.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    text = "y" * 1000
    if name == "x.csv":
        data = b"instruction,output\n" + f"a,{text}\n".encode() * 40_000
    else:
        rows = [json.dumps({"instruction": "a", "output": text}).encode()] * 40_000
        data = b"\n".join(rows) if "jsonl" in name else b"[" + b",\n".join(rows) + b"]"
    path = write(tmp_path, name, data)
    tracemalloc.start()
    assert sum(1 for _ in read_records(path, Rejects())) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20 < len(data)


@pytest.fixture
def bucket() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("a.jsonl", "sub/b.jsonl.gz", "sub/c.csv.zst", "README.md"):
        rows = b"instruction,output\na,b\n" if ".csv" in name else GOOD
        memory.pipe(f"/bucket/{name}", pack(name, rows))
    yield "memory://bucket"
    memory.store.clear()


def test_urls_are_read_like_paths(bucket: str, tmp_path: Path) -> None:
    for path in (f"{bucket}/a.jsonl", f"{bucket}/sub/b.jsonl.gz", f"{bucket}/sub/*.zst", f"{bucket}/*.jsonl"):
        assert [record.value for record in read(path)] == [json.loads(GOOD)]
    assert [record.file for record in read(bucket)] == [
        f"memory:///bucket/{name}" for name in ("a.jsonl", "sub/b.jsonl.gz", "sub/c.csv.zst")
    ]
    local = write(tmp_path, "x.jsonl", GOOD)
    assert [record.value for record in read(f"file://{local}")] == [json.loads(GOOD)]


def test_urls_that_lead_nowhere_are_one_line(bucket: str) -> None:
    for path, reason in [
        (f"{bucket}/none.jsonl", "no such file or glob"),
        (f"{bucket}/README.md", "not a kind of file"),
        ("nosuch://x/y.jsonl", "nosuch:// is no kind of storage"),
    ]:
        with pytest.raises(ConfigError, match=reason) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_missing_driver_names_the_package_to_install() -> None:
    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed here")
    with pytest.raises(ConfigError, match=r"path=s3://bucket/x\.jsonl: s3:// needs a driver .* pip install s3fs$"):
        read("s3://bucket/x.jsonl")


def test_a_service_that_fails_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("AccessDenied: no\nrequest 7")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: RuntimeError: AccessDenied: no; check the address"):
        read(f"{bucket}/a.jsonl")


def test_digests_and_sizes_follow_the_bytes(bucket: str, tmp_path: Path) -> None:
    local = write(tmp_path, "x.jsonl.gz", GOOD)
    for path in (local, f"{bucket}/a.jsonl", f"{bucket}/sub"):
        source = SourceSection(path=path)
        digests = source_digests(source)
        assert list(digests) == source_files(source) == list(source_sizes(source))
        assert source_digests(source) == digests
    assert source_sizes(SourceSection(path=local)) == {local: len(GOOD)}
    before = source_digests(SourceSection(path=f"{bucket}/a.jsonl"))
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", GOOD + b" ")
    assert source_digests(SourceSection(path=f"{bucket}/a.jsonl")) != before


def test_the_digest_of_an_object_store_is_taken_from_it(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = fsspec.get_filesystem_class("memory")
    monkeypatch.setattr(system, "info", lambda self, path, **_: {"ETag": "abc", "size": 3})
    monkeypatch.setattr(system, "open", None)  # the bytes are not fetched for it
    assert len(files.file_digest(f"{bucket}/a.jsonl")) == 64


def save(rows: list[dict], path: Path, split: str = "") -> None:
    import datasets

    saved = datasets.Dataset.from_list(rows)
    (datasets.DatasetDict(dict.fromkeys(split.split(), saved)) if split else saved).save_to_disk(path)


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": str(n)} for n in range(5)]
    save(rows, tmp_path / "one")
    save(rows, tmp_path / "two", "train other")
    write(tmp_path / "one", "cache-0123.arrow", b"not one of its shards")
    assert [record.value for record in read(str(tmp_path / "one"))] == rows
    for split, folder in [(None, "train"), ("train", "train"), ("other", "other")]:
        (file,) = source_files(SourceSection(path=str(tmp_path / "two"), split=split))
        assert Path(file).parent.name == folder
    with pytest.raises(ConfigError, match="no split 'dev'; it has other, train"):
        source_files(SourceSection(path=str(tmp_path / "two"), split="dev"))


def test_a_saved_folder_whose_list_of_shards_is_damaged(tmp_path: Path) -> None:
    save([{"instruction": "a", "output": "b"}], tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="state\\.json: damaged"):
        source_files(str(tmp_path))


def test_keys_of_the_hub_are_refused_for_files(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", GOOD)
    for key in ("split", "subset", "revision"):
        with pytest.raises(ConfigError, match=f"{key}.* for data sets of the hub"):
            read(SourceSection.model_validate({"path": path, key: "x"}))
        with pytest.raises(ConfigError, match=f"{key}.* for data sets of the hub"):
            read(SourceSection.model_validate({"path": f"file://{path}", key: "x"}))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.load.cache_clear()
    (tmp_path / "org/name").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [json.dumps({"instruction": split, "output": str(n), "system": None}) for n in range(3)]
        (tmp_path / f"org/name/{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_data_sets_of_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real library, which finds the data set in the folder where the hub would be asked."""
    monkeypatch.setattr(files.Path, "exists", lambda self: False)
    monkeypatch.chdir(hub_cache)
    for split, held in [(None, "train"), ("test", "test"), ("test[1:]", "test")]:
        source = SourceSection(path="org/name", split=split, revision="abc")
        records = read(source)
        first = 1 if split == "test[1:]" else 0
        assert [record.value for record in records] == [
            {"instruction": held, "output": str(n)} for n in range(first, 3)
        ]
        name = "org/name@abc" + (f"/{split}" if split else "")
        assert [record.id for record in records] == [f"{name}:{n}" for n in range(1, len(records) + 1)]
        assert list(source_digests(source)) == list(source_sizes(source)) == [name]
        assert source_files(source) == []
    digests = [source_digests(SourceSection(path="org/name", split=s)) for s in ("train", "test", "test[1:]")]
    assert len({next(iter(d.values())) for d in digests}) == 3


def test_a_data_set_of_the_hub_without_a_commit_is_said_to_be_unpinned(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = SourceSection(path=write(tmp_path, "a.jsonl", GOOD))
    pinned, tag, nothing = (SourceSection(path="org/name", revision=r) for r in (commit, "v1.0", None))
    assert pin_notices([pinned, file]) == []
    assert [line.partition(",")[0] for line in pin_notices([tag, nothing, file])] == [
        "data.sources path=org/name: revision=v1.0 is no commit",
        "data.sources path=org/name: revision=not set is no commit",
    ]


def test_a_split_that_the_hub_has_not_is_one_line(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"path=.*Unknown split.*; set split= of the source"):
        hub.load(str(hub_cache / "org/name"), None, "dev", None)


def test_a_data_set_that_cannot_be_had_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"path=nobody/nothing-at-all: .*; there is no such file here either"
    ) as caught:
        read("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


def test_a_loading_script_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def old(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setattr(datasets, "load_dataset", old)
    with pytest.raises(ConfigError, match=r"found name\.py; loading scripts are not run: use a revision"):
        hub.load("org/with-script", None, None, None)


def test_a_path_of_two_words_is_a_file_when_it_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/x.jsonl").write_bytes(GOOD)
    assert [record.file for record in read("org/name")] == ["org/name/x.jsonl"]
    with pytest.raises(ConfigError, match="no such file"):
        read("org/name.jsonl")

"""The token store: prepared examples in one memory-mapped Arrow file, and splits that are lists of its rows.

    write_corpus(folder / "corpus", tables, sources)     every accepted row once, in the order of the sources
    write_split(folder / "train", corpus, rows)          which rows, how often; their lengths and counts
    store = open_store(folder / "train")
    store.lengths                                        int32[N], mapped: what the plan needs
    store.token_ids(7), store.example(7)                 what collate needs, straight from the page cache

A row costs its tokens and some 70 bytes. Loss weights are kept as runs (how many tokens, which weight): a 0/1 mask
costs a few bytes per turn instead of four per token. A split that repeats a row stores its number again, not its
tokens. Every rank of a machine maps the same pages, so memory does not grow with the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sft_dist.data.folder import atomic_folder
from sft_dist.errors import DataError
from sft_dist.types import TokenizedExample

EXAMPLES_FILE = "examples.arrow"
META_FILE = "meta.json"
CORPUS = "corpus"  # the folder beside the splits
ROWS_PER_CHUNK = 16_384  # rows per Arrow record batch: bounds a writer's memory and the number of pieces of a reader
GATHERED = ("lengths", "num_loss_tokens", "loss_weight_sums")

_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "run_lengths": pa.list_(pa.int32()),
    "run_weights": pa.list_(pa.float32()),
    "answer_edges": pa.list_(pa.int32()),  # start, end of each answer
    "lengths": pa.int32(),
    "num_loss_tokens": pa.int32(),
    "loss_weight_sums": pa.float64(),
    "digest": pa.uint64(),  # of tokens and weights
    "content": pa.uint64(),  # of what is said, whatever template and tokenizer
    "source": pa.int32(),  # place in the header's list of files
    "place": pa.string(),  # what follows the file's name in the example's id
    "unit": pa.uint64(),  # equal for rows that no split may tear apart: those of one record
}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How the `datasets` library names a type. It is not imported: it takes longer than all the rest of a worker."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": {pa.float32(): "float32", pa.float64(): "float64"}.get(kind, str(kind)), "_type": "Value"}


_FEATURES = {"info": {"features": {name: _feature(kind) for name, kind in _COLUMNS.items()}}}
SCHEMA = pa.schema(_COLUMNS, {"huggingface": json.dumps(_FEATURES)})  # `datasets.Dataset.from_file` reads the file too


def write_corpus(folder: Path, tables: Iterable[pa.Table], files: Iterable[str]) -> None:
    """Write `tables` (columns of `SCHEMA`) one after another as `folder`, which must not exist yet.

    `files` may grow while the tables are drawn; a row's `source` is its place in it. Memory stays bounded whatever the
    number of rows. Raises StorageError when the disk does.
    """
    with atomic_folder(folder) as temporary:
        path, num_rows = temporary / EXAMPLES_FILE, 0
        with open(path, "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for table in _in_chunks(tables):
                writer.write_table(table)
                num_rows += len(table)
        _write_header(temporary, {"num_rows": num_rows, "num_bytes": path.stat().st_size, "files": list(files)})


def write_split(folder: Path, corpus: Corpus, rows: np.ndarray, meta: Mapping[str, Any]) -> None:
    """Write the split `folder` beside its corpus: int64[N] row numbers in training-example order, and their columns.

    `meta`: anything JSON can hold, found again as `TokenStore.meta`; its `sources` and `source_ends` tell which rows
    of the corpus come from which source of the recipe.
    """
    with atomic_folder(folder) as temporary:
        np.save(temporary / "rows.npy", rows.astype(np.int64))
        for name in GATHERED:
            np.save(temporary / f"{name}.npy", corpus.column(name)[rows])
        fingerprint = _fingerprint(corpus, rows)
        arrays = {name: _checksum(temporary / f"{name}.npy") for name in ("rows", *GATHERED)}
        header = {"num_examples": len(rows), "fingerprint": fingerprint, "checksums": arrays, "meta": dict(meta)}
        _write_header(temporary, header)


def write_store(folder: str | Path, examples: Iterable[TokenizedExample], meta: Mapping[str, Any]) -> None:
    """Write `examples` in the given order as a store of its own: `folder` with its corpus inside."""
    files: dict[str, int] = {}
    with atomic_folder(Path(folder)) as temporary:
        rows = iter(examples)
        chunks = iter(lambda: list(islice(rows, ROWS_PER_CHUNK)), [])
        write_corpus(temporary / CORPUS, (located(to_table(chunk), chunk, files) for chunk in chunks), files)
        corpus = Corpus(temporary / CORPUS)
        write_split(temporary / "split", corpus, np.arange(len(corpus)), meta)
        for path in (temporary / "split").iterdir():
            path.rename(temporary / path.name)
        (temporary / "split").rmdir()


def open_store(folder: str | Path) -> TokenStore:
    """Map a split and its corpus. Raises DataError when a file is missing or was cut off."""
    folder = Path(folder)
    inside = folder / CORPUS
    corpus = Corpus(inside if inside.is_dir() else folder.parent / CORPUS)
    try:
        return TokenStore(folder, corpus)
    except (OSError, ValueError, LookupError) as error:
        raise _damaged(folder, error) from error


class Corpus:
    """All rows of a preparation, mapped. Row numbers count from 0 in the order of the sources."""

    def __init__(self, folder: Path) -> None:
        path = folder / EXAMPLES_FILE
        try:
            header = _read_header(folder)
            num_bytes = path.stat().st_size
        except (OSError, ValueError) as error:
            raise _damaged(folder, error) from error
        if num_bytes != header["num_bytes"]:
            raise DataError(
                f"{path}: {num_bytes} bytes instead of the {header['num_bytes']} written; "
                "delete its folder to prepare the data again"
            )
        try:
            self._table = _map_table(path, header["num_rows"])
        except (OSError, pa.ArrowException) as error:
            raise _damaged(folder, error) from error
        self._folder = folder
        self._files: list[str] = header["files"]
        self._digests = _Numbers(self._table["digest"])
        self._tokens, self._run_lengths, self._run_weights, self._answer_edges = (
            _Ragged(self._table[name]) for name in ("input_ids", "run_lengths", "run_weights", "answer_edges")
        )

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> np.ndarray:
        """A numeric column: [num rows]."""
        return self._table[name].to_numpy()

    def texts(self, name: str) -> pa.ChunkedArray:
        """A column of text, mapped: [num rows]."""
        return self._table[name]

    def token_ids(self, row: int) -> np.ndarray:
        """int32[L], a read-only view of the file."""
        return self._tokens[row]

    def loss_weights(self, row: int) -> np.ndarray:
        """float32[L]."""
        return self._run_weights[row].repeat(self._run_lengths[row])

    def verify(self, row: int) -> None:
        """Raise DataError when the tokens or weights of `row` are not those that were written."""
        digest = _digest(self.token_ids(row), self._run_lengths[row], self._run_weights[row])
        if digest != self._digests[row]:
            raise DataError(
                f"{self._folder / EXAMPLES_FILE}: row {row} was altered on the disk; "
                f"delete {self._folder.parent} to prepare the data again"
            )

    def example(self, row: int) -> TokenizedExample:
        """Row `row` as it was written."""
        self.verify(row)
        source = self._files[self._table["source"][row].as_py()]
        return TokenizedExample(
            input_ids=self.token_ids(row),
            loss_weights=self.loss_weights(row),
            source=source,
            id=source + self._table["place"][row].as_py(),
            answers=tuple((int(start), int(end)) for start, end in self._answer_edges[row].reshape(-1, 2)),
        )


class TokenStore:
    """Random access to the examples of a split; their numbers are the example ids of a plan.

    `rows` int64[N] corpus row of each example, `lengths` int32[N] tokens, `num_loss_tokens` int32[N] targets with
    weight > 0 (a document's first token is never a target), `loss_weight_sums` float64[N] sums of their weights: all
    mapped, and proven by their checksums. `fingerprint`: SHA-256 over all tokens and weights, in order. `sources`: the
    recipe's sources in the order of their rows.
    """

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        header = _read_header(folder)
        self.folder, self.corpus = folder, corpus
        self.fingerprint: str = header["fingerprint"]
        self.meta: dict[str, Any] = header["meta"]
        self.sources: list[str] = self.meta.get("sources", [""])
        self._source_ends = np.array(self.meta.get("source_ends", [len(corpus)]))
        self.rows, self.lengths, self.num_loss_tokens, self.loss_weight_sums = (
            _map_array(folder / f"{name}.npy", header["checksums"][name]) for name in ("rows", *GATHERED)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self.example(index) for index in range(len(self)))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def supervised_share(self) -> float:
        """Targets over tokens, of the whole split; 0 when it is empty."""
        return int(self.num_loss_tokens.sum(dtype=np.int64)) / max(self.num_tokens, 1)

    def token_ids(self, index: int) -> np.ndarray:
        """The tokens of example `index`: int32[L], a read-only view of the file."""
        return self.corpus.token_ids(self._row(index))

    def loss_weights(self, index: int) -> np.ndarray:
        """The weight of each token of example `index` as a target: float32[L]."""
        return self.corpus.loss_weights(self._row(index))

    def example(self, index: int) -> TokenizedExample:
        """Example `index` as it was written."""
        return self.corpus.example(self._row(index))

    def loss_tokens_of(self, indices: np.ndarray) -> np.ndarray:
        """Targets of each example of `indices`: int32[K]."""
        return self.num_loss_tokens[indices]

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Place in `sources` of each example of `indices`: int64[K]."""
        return np.searchsorted(self._source_ends, self.rows[indices], side="right")

    def by_source(self) -> dict[str, TokenStore]:
        """The examples of each source that has any, as stores of their own; itself where there is but one."""
        source_of = self.source_of(np.arange(len(self)))
        present = np.unique(source_of).tolist()
        if len(present) == 1:
            return {self.sources[present[0]]: self}
        return {self.sources[number]: self._only(np.flatnonzero(source_of == number)) for number in present}

    def _only(self, indices: np.ndarray) -> TokenStore:
        part = copy(self)
        for name in ("rows", *GATHERED):
            setattr(part, name, getattr(self, name)[indices])
        part.fingerprint = _fingerprint(self.corpus, part.rows)
        return part

    def verify(self, index: int) -> None:
        """Raise DataError when example `index` is not what was written."""
        self.corpus.verify(self._row(index))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"example {index} is outside 0..{len(self.rows) - 1}")
        return int(self.rows[index])


def _fingerprint(corpus: Corpus, rows: np.ndarray) -> str:
    return hashlib.sha256(corpus.column("digest")[rows].astype("<u8").tobytes()).hexdigest()


class _Numbers:
    """A column of numbers as views, nothing copied: one per Arrow chunk. Memory views give numbers of Python's own, in
    half of numpy's time."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [memoryview(chunk.to_numpy()) for chunk in column.chunks]
        self._starts = _starts(column)

    def __getitem__(self, index: int) -> int:
        number = bisect_right(self._starts, index) - 1
        value: int = self._chunks[number][index - self._starts[number]]
        return value


class _Ragged:
    """A column of lists as views, nothing copied: one (offsets, values) pair per Arrow chunk."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [(memoryview(chunk.offsets.to_numpy()), chunk.values.to_numpy()) for chunk in column.chunks]
        self._starts = _starts(column)

    def __getitem__(self, index: int) -> np.ndarray:
        number = bisect_right(self._starts, index) - 1
        offsets, values = self._chunks[number]
        row = index - self._starts[number]
        return values[offsets[row] : offsets[row + 1]]


def _starts(column: pa.ChunkedArray) -> list[int]:
    """The first row of each chunk, and where the last ends."""
    return list(accumulate(map(len, column.chunks), initial=0))


def count_targets(loss_weights: np.ndarray) -> tuple[int, float]:
    """How many tokens of one document are targets, and the sum of their weights. `loss_weights`: float32[L]."""
    targets = loss_weights[1:]
    return int(np.count_nonzero(targets > 0)), float(targets.sum(dtype=np.float64))


def to_table(examples: Sequence[TokenizedExample], contents: Sequence[int] | None = None) -> pa.Table:
    """Examples as rows without a place yet: the columns of `SCHEMA` up to `content`."""
    runs = _runs([example.loss_weights for example in examples])
    counts = [count_targets(example.loss_weights) for example in examples]
    columns = [
        _lists([example.input_ids for example in examples], np.int32),
        _lists([run_lengths for run_lengths, _ in runs], np.int32),
        _lists([run_weights for _, run_weights in runs], np.float32),
        _lists([np.array(example.answers, np.int32).ravel() for example in examples], np.int32),
        pa.array([len(example.input_ids) for example in examples], pa.int32()),
        pa.array([num for num, _ in counts], pa.int32()),
        pa.array([weight_sum for _, weight_sum in counts], pa.float64()),
        pa.array([_digest(example.input_ids, *run) for example, run in zip(examples, runs, strict=True)], pa.uint64()),
        pa.array(contents or [0] * len(examples), pa.uint64()),
    ]
    return pa.Table.from_arrays(columns, names=SCHEMA.names[: len(columns)])


def located(table: pa.Table, examples: Sequence[TokenizedExample], files: dict[str, int]) -> pa.Table:
    """`table` with the places of `examples`, whose ids begin with their source; new sources are added to `files`."""
    sources = [files.setdefault(example.source, len(files)) for example in examples]
    places = [example.id.removeprefix(example.source) for example in examples]
    return with_places(table, sources, places)


def with_places(
    table: pa.Table, sources: Sequence[int], places: Sequence[str], units: np.ndarray | None = None
) -> pa.Table:
    """`table` with its last three columns. `units` uint64[N]; without them each row stands for itself."""
    with_source = table.append_column("source", pa.array(sources, pa.int32()))
    with_place = with_source.append_column("place", pa.array(places, pa.string()))
    unit = table["content"] if units is None else pa.array(units, pa.uint64())
    return with_place.append_column("unit", unit).cast(SCHEMA)


def _in_chunks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in record batches of about `ROWS_PER_CHUNK`."""
    held: list[pa.Table] = []
    for table in tables:
        if not len(table):  # of bad records alone
            continue
        held.append(table)
        if sum(map(len, held)) >= ROWS_PER_CHUNK:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _digest(input_ids: np.ndarray, run_lengths: np.ndarray, run_weights: np.ndarray) -> int:
    """64 bits over one example's tokens and weights."""
    digest = hashlib.sha256()
    for array, dtype in ((input_ids, "<i4"), (run_lengths, "<i4"), (run_weights, "<f4")):
        digest.update(len(array).to_bytes(8, "little") + array.astype(dtype, copy=False).tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def _runs(rows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Run-length code of each float32[L], L > 0: int32[R] lengths, float32[R] weights. All rows at once."""
    if not rows:
        return []
    weights = np.concatenate(rows)
    row_starts = np.cumsum([0, *map(len, rows)])
    begins = np.append(True, weights[1:] != weights[:-1])
    begins[row_starts[:-1]] = True
    places = np.flatnonzero(begins)
    run_lengths = np.diff(places, append=len(weights)).astype(np.int32)
    run_weights, edges = weights[places], np.searchsorted(places, row_starts).tolist()
    return [(run_lengths[first:last], run_weights[first:last]) for first, last in pairwise(edges)]


def _lists(arrays: list[np.ndarray], dtype: type) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values: np.ndarray = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _map_table(path: Path, num_rows: int) -> pa.Table:
    if not num_rows:  # a file of zero bytes of data cannot be mapped
        return SCHEMA.empty_table()
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _map_array(path: Path, checksum: int) -> np.ndarray:
    if _checksum(path) != checksum:
        raise ValueError(f"{path.name} was altered")
    return np.asarray(np.load(path, mmap_mode="r"))  # a plain view: numpy's own class for mapped files is slow to index


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read in pieces: a gigabyte takes about a second."""
    checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _write_header(folder: Path, header: Mapping[str, Any]) -> None:
    whole = {"digest": _header_digest(header), **header}
    (folder / META_FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_header(folder: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    if header.pop("digest", None) != _header_digest(header):
        raise ValueError(f"{META_FILE} was altered")
    return header


def _header_digest(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"{folder}: no token store ({error}); delete the folder to prepare the data again")

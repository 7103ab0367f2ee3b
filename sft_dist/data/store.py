"""The token store: prepared examples in one Arrow file, memory-mapped, read without copying.

    write_store(folder, examples, meta)        folder/examples.arrow + folder/meta.json, complete or not there
    store = open_store(folder)
    store.lengths                              int32[N]: what the plan needs, in memory
    store.token_ids(7), store.example(7)       what collate needs, straight from the page cache

One row per example. Loss weights are kept as runs (how many tokens, which weight): a 0/1 mask costs a few bytes per
turn instead of four per token. Every rank of a machine maps the same pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from sft_dist.data.folder import atomic_folder
from sft_dist.errors import DataError
from sft_dist.types import TokenizedExample

EXAMPLES_FILE = "examples.arrow"
META_FILE = "meta.json"
ROWS_PER_CHUNK = 4096  # rows per Arrow record batch: bounds the memory of a writer

_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "run_lengths": datasets.List(datasets.Value("int32")),
        "run_weights": datasets.List(datasets.Value("float32")),
        "answer_edges": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "num_loss_tokens": datasets.Value("int32"),
        "loss_weight_sum": datasets.Value("float64"),
        "source": datasets.Value("string"),
        "id": datasets.Value("string"),
    }
)


def write_store(folder: str | Path, examples: Iterable[TokenizedExample], meta: Mapping[str, Any]) -> None:
    """Write `examples` in the given order as the store `folder`, which must not exist yet.

    `meta`: anything JSON can hold, found again as `TokenStore.meta`. Memory stays bounded whatever the number of
    examples. Raises StorageError when the disk does.
    """
    with atomic_folder(Path(folder)) as temporary:
        digest = hashlib.sha256()
        path = temporary / EXAMPLES_FILE
        with ArrowWriter(path=str(path), features=_FEATURES) as writer:
            num_examples = 0
            rows = iter(examples)
            while chunk := list(islice(rows, ROWS_PER_CHUNK)):
                writer.write_table(_to_table(chunk, digest))
                num_examples += len(chunk)
            writer.finalize()
        header = {
            "num_examples": num_examples,
            "num_bytes": path.stat().st_size,
            "fingerprint": digest.hexdigest(),
            "meta": dict(meta),
        }
        (temporary / META_FILE).write_text(json.dumps(header, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_store(folder: str | Path) -> TokenStore:
    """Map a store written by `write_store`. Raises DataError when a file is missing or was cut off."""
    folder = Path(folder)
    path = folder / EXAMPLES_FILE
    try:
        header = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        num_bytes = path.stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no token store ({error}); delete the folder to prepare the data again") from error
    if num_bytes != header["num_bytes"]:
        raise DataError(
            f"{path}: {num_bytes} bytes instead of the {header['num_bytes']} written; "
            "delete its folder to prepare the data again"
        )
    return TokenStore(folder, header)


class TokenStore:
    """Random access to prepared examples; row numbers are the example ids of a plan.

    `lengths` int32[N] tokens, `num_loss_tokens` int32[N] targets with weight > 0 (a document's first token is never a
    target), `loss_weight_sums` float64[N] sums of their weights, `fingerprint` SHA-256 over all tokens and weights.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: str = header["fingerprint"]
        self.meta: dict[str, Any] = header["meta"]
        table = _map_table(folder / EXAMPLES_FILE, header["num_examples"])
        self.lengths: np.ndarray = table["length"].to_numpy()
        self.num_loss_tokens: np.ndarray = table["num_loss_tokens"].to_numpy()
        self.loss_weight_sums: np.ndarray = table["loss_weight_sum"].to_numpy()
        self._tokens = _Ragged(table["input_ids"])
        self._run_lengths = _Ragged(table["run_lengths"])
        self._run_weights = _Ragged(table["run_weights"])
        self._answer_edges = _Ragged(table["answer_edges"])
        self._sources, self._ids = table["source"], table["id"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self.example(index) for index in range(len(self)))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def supervised_share(self) -> float:
        """Targets over tokens, of the whole store; 0 when it is empty."""
        return int(self.num_loss_tokens.sum(dtype=np.int64)) / max(self.num_tokens, 1)

    def token_ids(self, index: int) -> np.ndarray:
        """The tokens of example `index`: int32[L], a read-only view of the file."""
        return self._tokens[index]

    def loss_weights(self, index: int) -> np.ndarray:
        """The weight of each token of example `index` as a target: float32[L]."""
        return np.repeat(self._run_weights[index], self._run_lengths[index])

    def example(self, index: int) -> TokenizedExample:
        """Example `index` as it was written."""
        return TokenizedExample(
            input_ids=self.token_ids(index),
            loss_weights=self.loss_weights(index),
            source=self._sources[index].as_py(),
            id=self._ids[index].as_py(),
            answers=tuple((int(start), int(end)) for start, end in self._answer_edges[index].reshape(-1, 2)),
        )


class _Ragged:
    """A column of lists as numpy views: one (offsets, values) pair per Arrow chunk, nothing copied."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in column.chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in column.chunks])

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._starts[-1]:
            raise IndexError(f"example {index} is outside 0..{self._starts[-1] - 1}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets, values = self._chunks[number]
        row = index - self._starts[number]
        return values[offsets[row] : offsets[row + 1]]


def count_targets(loss_weights: np.ndarray) -> tuple[int, float]:
    """How many tokens of one document are targets, and the sum of their weights. `loss_weights`: float32[L]."""
    targets = loss_weights[1:]
    return int(np.count_nonzero(targets > 0)), float(targets.sum(dtype=np.float64))


def _map_table(path: Path, num_examples: int) -> pa.Table:
    if not num_examples:  # a file of zero bytes of data cannot be mapped
        return _FEATURES.arrow_schema.empty_table()
    return datasets.Dataset.from_file(str(path)).data.table


def _to_table(chunk: list[TokenizedExample], digest: Any) -> pa.Table:
    """One record batch of rows, its content fed to `digest` in order."""
    runs = [_runs(example.loss_weights) for example in chunk]
    for example, (run_lengths, run_weights) in zip(chunk, runs, strict=True):
        for array, dtype in ((example.input_ids, "<i4"), (run_lengths, "<i4"), (run_weights, "<f4")):
            digest.update(len(array).to_bytes(8, "little") + array.astype(dtype).tobytes())
    counts = [count_targets(example.loss_weights) for example in chunk]
    columns = [
        _lists([example.input_ids for example in chunk], np.int32),
        _lists([run_lengths for run_lengths, _ in runs], np.int32),
        _lists([run_weights for _, run_weights in runs], np.float32),
        _lists([np.array(example.answers, np.int32).ravel() for example in chunk], np.int32),
        pa.array([len(example.input_ids) for example in chunk], pa.int32()),
        pa.array([num for num, _ in counts], pa.int32()),
        pa.array([weight_sum for _, weight_sum in counts], pa.float64()),
        pa.array([example.source for example in chunk], pa.string()),
        pa.array([example.id for example in chunk], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=_FEATURES.arrow_schema)


def _runs(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run-length code of float32[L]: int32[R] lengths, float32[R] weights."""
    starts = np.concatenate([[0], np.flatnonzero(weights[1:] != weights[:-1]) + 1])
    return np.diff(np.append(starts, len(weights))).astype(np.int32), weights[starts]


def _lists(arrays: list[np.ndarray], dtype: type) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values: np.ndarray = np.concatenate(arrays).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

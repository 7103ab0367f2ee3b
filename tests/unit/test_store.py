"""What is written comes back, bit for bit, mapped and not copied; half-written stores do not exist."""

import errno
import json
import tracemalloc

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data import store as store_module
from sft_dist.data.folder import atomic_folder, remove_unfinished
from sft_dist.data.store import Corpus, count_targets, open_store, to_table, with_places, write_corpus, write_store
from sft_dist.errors import DataError, StorageError
from sft_dist.types import TokenizedExample

weights = st.sampled_from([0.0, 1.0, np.float32(0.1), 0.5])
tokens = st.integers(0, 2**31 - 1)
rows = st.lists(st.lists(st.tuples(tokens, weights), min_size=1, max_size=30), max_size=20)


def make_example(tokens, weights, number=0) -> TokenizedExample:
    arrays = np.array(tokens, np.int32), np.array(weights, np.float32)
    return TokenizedExample(*arrays, "data.jsonl", f"data.jsonl:{number}", ((1, 3), (4, 5)))


def some_examples(num: int = 3) -> list[TokenizedExample]:
    return [make_example(range(number, number + 5), [0, 0, 1, 1, 1], number) for number in range(num)]


@given(rows=rows)
def test_what_is_written_comes_back(tmp_path_factory, rows):
    examples = [make_example(*zip(*row, strict=True), number) for number, row in enumerate(rows)]
    folder = tmp_path_factory.mktemp("stores") / "store"
    write_store(folder, examples, {"split": "train"})
    store = open_store(folder)
    assert len(store) == len(examples)
    assert store.meta == {"split": "train"}
    assert store.lengths.tolist() == [len(example.input_ids) for example in examples]
    assert store.lengths.dtype == store.num_loss_tokens.dtype == np.int32
    assert store.loss_weight_sums.dtype == np.float64
    for index, (read, written) in enumerate(zip(store, examples, strict=True)):
        assert read.input_ids.tolist() == written.input_ids.tolist()
        assert read.loss_weights.tobytes() == written.loss_weights.tobytes()
        assert (read.source, read.id, read.answers) == (written.source, written.id, written.answers)
        counted = count_targets(written.loss_weights)
        assert (store.num_loss_tokens[index], store.loss_weight_sums[index]) == counted


def test_the_first_token_is_never_a_target():
    assert count_targets(np.array([1, 0, 0.5, 1], np.float32)) == (2, 1.5)
    assert count_targets(np.array([1], np.float32)) == (0, 0.0)


def test_rows_are_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "ROWS_PER_CHUNK", 4)
    write_store(tmp_path / "store", some_examples(11), {})
    store = open_store(tmp_path / "store")
    assert [int(store.token_ids(index)[0]) for index in range(11)] == list(range(11))
    assert store.num_tokens == 55
    assert store.supervised_share == 33 / 55
    for index in (-1, 11):
        with pytest.raises(IndexError, match=r"outside 0\.\.10"):
            store.token_ids(index)


def test_tokens_are_a_view_of_the_file(tmp_path):
    write_store(tmp_path / "store", some_examples(), {})
    ids = open_store(tmp_path / "store").token_ids(1)
    assert not ids.flags.owndata and not ids.flags.writeable


def test_a_mask_costs_bytes_per_turn_not_per_token(tmp_path):
    long = make_example(range(100_000), [0] * 60_000 + [1] * 40_000)
    write_store(tmp_path / "store", [long], {})
    assert (tmp_path / "store" / "corpus" / "examples.arrow").stat().st_size < 4 * 100_000 + 4096


def test_fingerprint_is_content_and_nothing_else(tmp_path, monkeypatch):
    def fingerprint(name, examples, meta):
        write_store(tmp_path / name, examples, meta)
        return open_store(tmp_path / name).fingerprint

    base = fingerprint("base", some_examples(), {})
    assert fingerprint("meta", some_examples(), {"other": 1}) == base
    assert fingerprint("order", some_examples()[::-1], {}) != base
    assert fingerprint("weight", [*some_examples(2), make_example(range(2, 7), [0, 0, 1, 1, 0.5])], {}) != base
    assert fingerprint("edge", [make_example([0, 1], [1, 1]), make_example([2], [1])], {}) != fingerprint(
        "moved", [make_example([0], [1]), make_example([1, 2], [1, 1])], {}
    )
    monkeypatch.setattr(store_module, "ROWS_PER_CHUNK", 1)
    assert fingerprint("chunks", some_examples(), {}) == base


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield from some_examples()
        raise RuntimeError("source went away")

    with pytest.raises(RuntimeError, match="source went away"):
        write_store(tmp_path / "store", broken(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_only_a_temporary_folder(tmp_path):
    (tmp_path / ".tmp-store-0123").mkdir()
    (tmp_path / ".tmp-store-0123" / "examples.arrow").write_bytes(b"half")
    (tmp_path / ".tmp-other-0123").mkdir()
    with pytest.raises(DataError, match="no token store"):
        open_store(tmp_path / "store")
    remove_unfinished(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-other-0123"]


def test_a_cut_off_store_is_refused_with_its_name(tmp_path):
    write_store(tmp_path / "store", some_examples(), {})
    path = tmp_path / "store" / "corpus" / "examples.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"examples\.arrow: \d+ bytes instead of the \d+ written"):
        open_store(tmp_path / "store")


def test_a_full_disk_is_a_storage_error(tmp_path):
    shown = r"store: cannot be written .*No space left.*free space"
    with pytest.raises(StorageError, match=shown), atomic_folder(tmp_path / "store"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_of_the_block_keep_their_type(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "store"):
        (tmp_path / "absent").read_text()


def test_an_existing_store_is_never_overwritten(tmp_path):
    write_store(tmp_path / "store", some_examples(), {})
    with pytest.raises(StorageError, match="cannot be written"):
        write_store(tmp_path / "store", some_examples(1), {})
    assert len(open_store(tmp_path / "store")) == 3


def test_header_is_plain_json(tmp_path):
    write_store(tmp_path / "store", some_examples(), {"template": "chatml"})
    header = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert header["meta"] == {"template": "chatml"}
    assert header["num_examples"] == 3


def test_an_open_corpus_holds_nothing_of_a_row_but_its_file(tmp_path):
    one = TokenizedExample(np.arange(3, dtype=np.int32), np.ones(3, np.float32), source="f", id="f:1")
    table = with_places(to_table([one] * 1000), [0] * 1000, [":1"] * 1000)
    write_corpus(tmp_path / "few", [table], ["f"])
    write_corpus(tmp_path / "many", [table] * 200, ["f"])
    Corpus(tmp_path / "few")  # loads what is loaded once
    tracemalloc.start()
    corpus = Corpus(tmp_path / "many")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(corpus) == 200_000 and corpus.example(199_999).id == "f:1"
    assert held < len(corpus) / 2


def test_the_library_of_data_sets_reads_the_file(tmp_path):
    """Column types and metadata are those that it would write itself."""
    write_store(tmp_path / "store", some_examples(3), {})
    found = datasets.Dataset.from_file(str(tmp_path / "store" / "corpus" / "examples.arrow"))
    assert found["input_ids"][1] == [1, 2, 3, 4, 5]
    assert found.features.arrow_schema == store_module.SCHEMA
    assert found.features.arrow_schema.metadata == store_module.SCHEMA.metadata

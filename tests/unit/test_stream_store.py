"""Streamed sources on disk: what is read does not depend on who reads, how often he stops, or how many help."""

from __future__ import annotations

import gzip
import json
import os
import resource
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import byte_tokenizer, records, said, write_lines

from sft_dist.audit import prove
from sft_dist.config.loader import load_recipe
from sft_dist.config.schema import Recipe, SourceSection
from sft_dist.data import files, hub, shards, stream_duplicates, stream_writer
from sft_dist.data.cache import rules_digest
from sft_dist.data.collate import batch_digest
from sft_dist.data.inspect import view_packs
from sft_dist.data.layout import PlanSpec
from sft_dist.data.ledger import START, fold
from sft_dist.data.prepare import prepare, rules_of
from sft_dist.data.sources import stream_versions
from sft_dist.data.store import CORPUS, Corpus
from sft_dist.data.stream_plan import StreamPlan
from sft_dist.data.stream_store import END_FILE, PROGRESS_FILE, StreamStore, read_end, read_state, segment_folder
from sft_dist.data.stream_writer import Place, Reading, Segments, StreamJob, StreamWriter, tokenised
from sft_dist.data.streams import stream_job
from sft_dist.data.templates import resolve_template
from sft_dist.data.workers import Workers
from sft_dist.errors import BadRecord, ConfigError, DataError

SEGMENT = 700
TOKENIZER = byte_tokenizer()


def stream_recipe(folder: Path, *sources: Path | dict[str, Any], **data: Any) -> Recipe:
    given = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    settings = {"chat_template": "chatml", "seq_len": 256, "eval_fraction": 0.0} | data
    return Recipe(
        model={"path": "unused"},
        run={"dir": str(folder / "runs" / "one")},
        data=settings | {"sources": [source | {"streaming": True} for source in given]},
        optim={"max_steps": 10},
        batch={"examples_per_step": 8},
    )


def job_of(recipe: Recipe, **changes: Any) -> StreamJob:
    template = resolve_template(recipe.data.chat_template, TOKENIZER)
    job = stream_job(recipe, rules_of(recipe, TOKENIZER, template), rules_digest(recipe, TOKENIZER, template.text))
    return replace(job, **({"segment_examples": SEGMENT, "num_workers": 0} | changes))


def make(job: StreamJob, *times: int) -> StreamStore:
    """The store of `job`, written by one writer after another: each makes so many segments, the last all of them."""
    for most in (*times, 1000):
        with Workers(partial(tokenised, job.rules), job.num_workers) as workers:
            segments = Segments(job, workers)
            while most and segments.make():
                most -= 1
    return StreamStore(job.folder, [source.path for source in job.sources], None)


def content(store: StreamStore) -> list[tuple[str, bytes, bytes]]:
    return [(one.id, one.input_ids.tobytes(), one.loss_weights.tobytes()) for one in store]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two sources of several files and kinds, with bad records among them."""
    folder = tmp_path_factory.mktemp("sources")
    for number, num in enumerate((1500, 900, 40)):
        rows: list[Any] = records(num, f"answer {number}-{{}}")
        for place in range(7, num, 97):
            rows[place] = {"instruction": "no answer"}
        lines = write_lines(folder / f"a-{number}.jsonl", rows).read_text().splitlines()
        for place in range(30, num, 301):
            lines.insert(place, "{ no JSON")
        (folder / f"a-{number}.jsonl").write_text("\n".join(lines))
    (folder / "b.json.gz").write_bytes(gzip.compress(json.dumps(records(2600, "b {}")).encode()))
    return [{"path": f"{folder}/a-*.jsonl", "weight": 2.0}, {"path": f"{folder}/b.json.gz"}]


def test_reading_does_not_depend_on_interruptions_or_workers(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    recipes = [stream_recipe(tmp_path / name, *sources, on_bad_record="skip", max_bad_fraction=0.1) for name in "abc"]
    straight = make(job_of(recipes[0]))
    stopped = make(job_of(recipes[1]), 1, 0, 2, 1)
    helped = make(job_of(recipes[2], num_workers=2), 2)
    assert len(straight) > 4 * SEGMENT
    assert content(straight) == content(stopped) == content(helped)
    last = len(straight)
    assert straight.digest_up_to(last) == stopped.digest_up_to(last) == helped.digest_up_to(last)
    reports = [store.report() for store in (straight, stopped, helped)]
    assert reports[0] == reports[1] == reports[2]
    listed = [
        [line for path in sorted(store.folder.glob("segment-*/rejects.jsonl")) for line in path.open()]
        for store in (straight, stopped)
    ]
    assert listed[0] == listed[1]
    assert len(listed[0]) == sum(source["rejected"] for source in reports[0]["sources"]) == 27 + 9


def test_duplicates_of_a_stream_are_counted_in_the_last_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a segment, in the one before, between sources; but not against what was read too long ago."""
    rows = records(1400)
    first = write_lines(tmp_path / "a.jsonl", [*rows, *rows[:10], *rows[1380:]])
    second = write_lines(tmp_path / "b.jsonl", [*records(1400, "b {}"), *rows[5:8], *records(300, "c {}")])
    counted = []
    for most, name in ((64, "all"), (64, "stopped"), (1, "one")):
        monkeypatch.setattr(stream_duplicates, "SEGMENTS", most)
        job = job_of(stream_recipe(tmp_path / name, first, second), segment_examples=100)
        store = make(job, *((1, 2, 1) if name == "stopped" else ()))
        counted.append([source["duplicates"] for source in store.report()["sources"]])
    assert counted[0] == counted[1] == [30, 3]
    assert sum(counted[2]) < 33


def test_a_stream_holds_what_an_indexed_preparation_holds(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    settings: dict[str, Any] = {"on_bad_record": "skip", "max_bad_fraction": 0.1}
    streamed = make(job_of(stream_recipe(tmp_path, *sources, **settings)))
    whole = Recipe(
        model={"path": "unused"},
        run={"dir": str(tmp_path / "runs" / "one")},
        data={"sources": [s | {"weight": 1.0} for s in sources], "chat_template": "chatml", "seq_len": 256,
              "eval_fraction": 0.0} | settings,
    )  # fmt: skip
    indexed = prepare(whole, TOKENIZER, notice=str).train
    assert sorted(content(streamed)) == sorted(
        (one.id, one.input_ids.tobytes(), one.loss_weights.tobytes()) for one in indexed
    )


def test_sources_take_turns_by_weight(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    store = make(job_of(stream_recipe(tmp_path, *sources, on_bad_record="skip", max_bad_fraction=0.1)))
    of = store.source_of(np.arange(len(store)))
    for index in (0, 1500, len(store) - 1):
        assert store.example(index).source.endswith("b.json.gz") == bool(of[index])
    places = np.array([0, 1500, len(store) - 1])
    assert store.loss_tokens_of(places).tolist() == store.numbers(0, len(store)).num_loss_tokens[places].tolist()
    both = of[: 3 * SEGMENT]
    assert 0.5 < np.mean(both == 0) < 0.8  # two to one, by chunks of a thousand records


def test_a_writer_process_stays_ahead_and_the_store_waits_for_it(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "x.jsonl", records(6000))
    job = job_of(stream_recipe(tmp_path, file), segment_examples=500)
    writer, told = StreamWriter(job), list[int]()
    store = StreamStore(job.folder, ["x"], writer, told.append)
    reader = StreamStore(job.folder, ["x"], None)  # another rank
    assert len(reader.numbers(0, 10_000).lengths) == len(store.numbers(0, 10_000).lengths) == 6000
    assert 0 < max(told) <= 6000
    with pytest.raises(IndexError):
        store.token_ids(6000)
    state = read_state(job.folder, (read_end(job.folder) or 0) - 1)
    assert state is not None and state["total"] == 6000
    store.close()


@pytest.mark.parametrize(("writes", "said"), [(True, [100, 200]), (False, [0, 0])])
def test_who_waits_is_alive_and_who_has_the_writer_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool, said: list[int]
) -> None:
    job, told = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(900)))), list[int]()
    make(job, 1)
    store, looks = StreamStore(job.folder, ["x"], StreamWriter(job) if writes else None, told.append), count(1)
    (job.folder / END_FILE).unlink()

    def look(seconds: float) -> None:
        number = next(looks)
        (job.folder / PROGRESS_FILE).write_text(f"1 {number} {100 * number}")
        if number == 2:
            segment_folder(job.folder, 9).mkdir()

    monkeypatch.setattr("sft_dist.data.stream_store.time.sleep", look)
    store._wait(9)
    assert told == said


def test_reading_stops_where_nobody_asks_for_more(tmp_path: Path) -> None:
    job = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(9000))), segment_examples=300)
    with Workers(partial(tokenised, job.rules), 0) as workers:
        segments = Segments(job, workers)
        assert [segments.make(), segments.make()] == [1, 2]
    assert not segment_folder(job.folder, 2).exists()


def test_two_writers_share_one_stream(tmp_path: Path) -> None:
    recipe = stream_recipe(tmp_path / "a", file := write_lines(tmp_path / "x.jsonl", records(6000)))
    job = job_of(recipe)
    with Workers(partial(tokenised, job.rules), 0) as one, Workers(partial(tokenised, job.rules), 0) as two:
        writers = [Segments(job, one), Segments(job, two)]
        while all([one_more.make() for one_more in writers]):  # noqa: C419 (both take their turn)
            pass
    store = StreamStore(job.folder, ["x"], None)
    assert content(store) == content(make(job_of(stream_recipe(tmp_path / "b", file))))


def test_a_bad_record_ends_the_stream_with_its_place(tmp_path: Path) -> None:
    rows: list[Any] = [*records(2500), {"instruction": "x"}, *records(10)]
    job = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", rows)))
    writer = StreamWriter(job)
    with pytest.raises(BadRecord, match=r"x\.jsonl:2501 \(byte \d+\): .*output"):
        StreamStore(job.folder, ["x"], writer).numbers(0, 5000)
    writer.close()


def test_too_many_bad_records_end_the_stream(tmp_path: Path) -> None:
    rows: list[Any] = [*records(2000), *[{"instruction": "x"}] * 500]
    job = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", rows), on_bad_record="skip"))
    with pytest.raises(DataError, match=r"500 of 2,500 records are bad \(20\.0%\)"):
        make(job)


def test_a_source_of_nothing_but_refuse_ends(tmp_path: Path) -> None:
    job = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(3000)), seq_len=8))
    store = make(job)
    assert (len(store), store.report()["sources"][0]["too_long"]) == (0, 3000)


def test_a_file_that_changes_while_it_is_streamed_is_refused_and_is_another_stream_later(tmp_path: Path) -> None:
    recipe = stream_recipe(tmp_path, file := write_lines(tmp_path / "x.jsonl", records(3000)))
    job = job_of(recipe)
    with Workers(partial(tokenised, job.rules), 0) as workers:
        Segments(job, workers).make()
    with open(file, "a") as more:
        more.write(json.dumps(records(1)[0]) + "\n")
    with pytest.raises(DataError, match="changed while it was streamed"):
        make(job)
    assert job_of(recipe).folder != job.folder
    os.utime(file, ns=(1, 1))
    assert len(make(job_of(recipe))) == 3001


def test_an_altered_segment_is_refused(tmp_path: Path) -> None:
    job = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(3000))))
    make(job)
    (segment_folder(job.folder, 1) / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"segment-000001: altered"):
        StreamStore(job.folder, ["x"], None)


def test_a_writer_that_is_killed_is_told(tmp_path: Path) -> None:
    job = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(60_000))))
    writer = StreamWriter(job)
    writer.want(1000)
    writer._process.kill()
    with pytest.raises(DataError, match="died with exit code -9"):
        StreamStore(job.folder, ["x"], writer)


def test_files_behind_urls_and_tables_stream_too(tmp_path: Path) -> None:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records(2000)), tmp_path / "x.parquet", row_group_size=300)
    local = make(job_of(stream_recipe(tmp_path / "a", tmp_path / "x.parquet")), 1)
    with fsspec.open("memory://stream/x.parquet", "wb") as file:
        file.write((tmp_path / "x.parquet").read_bytes())
    remote = make(job_of(stream_recipe(tmp_path / "b", {"path": "memory://stream/x.parquet"})), 1)
    assert [one[1:] for one in content(local)] == [one[1:] for one in content(remote)]
    assert len(local) == 2000


def test_data_sets_of_the_hub_stream_at_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real library, which finds the data set in the folder where the hub would be asked."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "org/name").mkdir(parents=True)
    write_lines(tmp_path / "org/name/train.jsonl", records(1500))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.Path, "exists", lambda self: os.path.exists(self) and str(self) != "org/name")
    with pytest.raises(ConfigError, match=r"streaming reads the hub again .*: set revision= to the 40 digits"):
        stream_versions(SourceSection(path="org/name", streaming=True))
    with pytest.raises(ConfigError, match="set revision="):
        stream_versions(SourceSection(path="org/name", streaming=True, revision="main"))
    job = job_of(stream_recipe(tmp_path, {"path": "org/name", "revision": commit}))
    store = make(job, 1)
    assert len(store) == 1500
    assert store.example(1499).id == f"org/name@{commit}:1500"
    assert hub.stream("org/name", None, None, commit).__class__.__name__ == "IterableDataset"


def test_segments_are_stores_with_proven_rows(tmp_path: Path) -> None:
    store = make(job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(3000)))))
    corpus = Corpus(segment_folder(store.folder, 0) / CORPUS)
    store.verify(len(corpus))
    assert store.token_ids(0).tobytes() == corpus.token_ids(0).tobytes()
    assert store.lengths[3] == len(store.token_ids(3))
    assert store.lengths[np.array([0, len(corpus)])].tolist() == [len(store.token_ids(i)) for i in (0, len(corpus))]
    assert np.asarray(store.lengths).sum() == store.num_tokens


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row | {"score": 1.0} for row in records(40)],
            r"of 40 records \(40 left out by data.filters.score\); lower its min",
        ),
        ([], r"0 records in \S+a\.jsonl: the files are empty"),
    ],
    ids=["score", "empty"],
)
def test_a_stream_without_an_example_is_a_data_error_with_its_counts(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows)
    recipe = stream_recipe(tmp_path, source, filters={"score": {"column": "score", "min": 2.0}}, workers=0)
    for _ in range(2):  # read now, and found as it was read
        with pytest.raises(DataError, match=message):
            prepare(recipe, TOKENIZER, notice=said)


BASE = ["optim.max_steps=5", "batch.tokens_per_step=2048", "data.eval_fraction=0", "data.sources.0.streaming=true"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], None),
        (["data.eval_fraction=0.1"], "data.eval_fraction needs all rows at once"),
        (["data.test_fraction=0.1"], "data.test_fraction needs all rows at once"),
        (["data.near_duplicates=drop"], "data.near_duplicates needs all rows at once"),
        (["data.filters.drop_refusals=true"], "data.filters.drop_refusals needs all rows"),
        (["data.mixture_temperature=2"], "data.mixture_temperature needs all rows"),
        (["data.sources.0.repeat=2"], r"data.sources.0.repeat needs all rows"),
        (["optim.max_steps=null"], "optim.max_steps is missing: nobody knows how long"),
        (["batch.tokens_per_step=auto"], "batch.tokens_per_step=auto depends on the size of the data"),
        (["data.sources.1.path=y.jsonl"], "data.sources.1 is not streamed but others are"),
        (["data.eval_sources.0.path=y.jsonl", "data.eval_sources.0.streaming=true"], "only data.sources are streamed"),
    ],
    ids=str,
)
def test_what_a_stream_cannot_give_is_refused_with_the_remedy(
    tmp_path: Path, changes: list[str], message: str | None
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: gpt2}\ndata: {sources: [{path: x.jsonl}]}\n")
    if message is None:
        assert load_recipe([str(recipe)], [*BASE, *changes]).data.streams
        return
    with pytest.raises(ConfigError, match=message):
        load_recipe([str(recipe)], [*BASE, *changes])


def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    """Of the writer and of a reader, from the first fifth of a stream to its end."""
    job = job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(24_000))), segment_examples=500)
    written, read = [], []
    with Workers(partial(tokenised, job.rules), 0) as workers:
        segments = Segments(job, workers)
        while segments.make():
            written.append(resident())
    store = StreamStore(job.folder, ["x"], None)
    for first in range(0, 24_000, 500):
        for index in range(first, first + len(store.numbers(first, first + 500).lengths)):
            store.verify(index)
        read.append(resident())
    for sizes in (written, read):
        assert len(sizes) > 15
        assert sizes[-1] - sizes[len(sizes) // 5] < 16 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_run_on_a_stream_is_proven_and_shown(tmp_path: Path) -> None:
    """Two passes over a stream: the audit proves each example once in the first; an altered token is told."""
    store = make(job_of(stream_recipe(tmp_path, write_lines(tmp_path / "x.jsonl", records(900)))))
    spec = PlanSpec(
        seq_len=256, packing="best_fit", packs_per_micro_batch=4, micro_batches_per_step=4, examples_per_step=None,
        seed=1, epochs=1, max_steps=25, shuffle=True, store_fingerprint=store.fingerprint, window_examples=200,
    )  # fmt: skip
    plan, ledger, lines, ledgers = StreamPlan(spec, store), START, [], {}
    for step in map(plan.step, range(1, 26)):
        ledger = fold(ledger, step)
        counts = {"num_tokens": step.num_tokens, "num_loss_tokens": step.num_loss_tokens}
        lines.append({"step": step.step, **counts, "batch_digest": batch_digest(step, store)})
        ledgers[step.step] = ledger
    proven = prove(StreamPlan(spec, store), store, lines, ledgers)
    assert not proven.faults
    assert [(epoch.finished, epoch.trained_once) for epoch in proven.epochs[:-1]] == [(True, 900)]
    assert not prove(StreamPlan(spec, store), store, lines[:7], {7: ledgers[7]}).faults
    changed = [*lines[:5], lines[5] | {"batch_digest": lines[4]["batch_digest"]}, *lines[6:]]
    (fault,) = prove(StreamPlan(spec, store), store, changed, {}).faults
    assert fault.startswith("step 6: batch_digest was ")
    (pack, *_) = view_packs(plan.step(9), store.lengths, 256)
    assert pack.lengths == tuple(len(store.token_ids(row)) for row in pack.rows)


@pytest.mark.parametrize("most_held", [1, 3, 4096])
def test_reading_goes_on_behind_any_chunk_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_held: int
) -> None:
    """Bad lines before the first good one, in runs, inside an open chunk, and at the end: none twice, none lost."""
    monkeypatch.setattr(stream_writer, "MOST_REJECTS", most_held)
    monkeypatch.setattr(shards, "_MEAN_RECORDS", 50)
    monkeypatch.setattr(shards, "_MIN_RECORDS", 20)
    good = [json.dumps(row) for row in records(700)]
    bad, unknown = ["{ no JSON"] * 10, ['{"what": 1}'] * 4
    lines = [*bad, *unknown, *bad, *good[:150], *bad, *good[150:300], "{", *good[300:], *bad]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join([*bad, *good[:3], *unknown]))
    recipe = stream_recipe(tmp_path, f"{tmp_path}/*.jsonl", on_bad_record="skip", max_bad_fraction=1.0)
    job = job_of(recipe)

    def read(place: Place) -> list[tuple[Any, ...]]:
        return [
            ([record.id for record in chunk.records], [(one.file, one.line, one.byte) for one in chunk.bad], behind)
            for _, chunk, behind in Reading(job, [place]).chunks()
        ]

    whole = read(Place())
    ids = [place for records_, _, _ in whole for place in records_]
    places = [place for _, bad_, _ in whole for place in bad_]
    assert len(ids) == len(set(ids)) == 707 and len(places) == len(set(places)) == 55
    assert whole[-1][2].records == 762
    assert len([1 for ids_, _, _ in whole if ids_]) > 6
    for number, (_, _, behind) in enumerate(whole, 1):
        assert read(behind) == whole[number:]


def test_evaluation_examples_that_are_streamed_too_are_told(tmp_path: Path) -> None:
    rows = records(300)
    held = write_lines(tmp_path / "e.jsonl", rows[90:110])
    other = write_lines(tmp_path / "t.jsonl", [rows[0] | {"output": "other"}])
    given = {"eval_sources": [{"path": str(held)}], "test_sources": [{"path": str(other)}]}
    recipe = stream_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", rows), **given)
    lines: list[str] = []
    data = prepare(recipe, TOKENIZER, notice=lines.append)
    data.close()
    told = ["warning: 20 of 20 eval examples are among the 300 streamed so far, compared by content",
            "0 of 1 test examples are among the 300 streamed so far, compared by content"]  # fmt: skip
    assert [line for line in lines if "streamed so far" in line] == told == data.report_now().notices[-2:]
    assert not any("streamed so far" in line for line in data.report.notices)

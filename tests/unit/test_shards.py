"""What changed is tokenised again, and nothing else; every way of preparing gives the same rows."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import byte_tokenizer, decoded, make_recipe, records, said, write_lines

from sft_dist.config.schema import SourceSection
from sft_dist.data import cache
from sft_dist.data import shards as shards_module
from sft_dist.data.prepare import PreparedData, prepare
from sft_dist.data.selection import temperate
from sft_dist.data.shards import chunks
from sft_dist.data.sources import Rejects
from sft_dist.data.tokenise import Rules, split, trim
from sft_dist.errors import BadRecord, DataError
from sft_dist.types import TokenizedExample


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples went through the tokenizer, one number per call."""
    calls: list[int] = []
    original = Rules.supervise

    def counting(self, conversations):
        calls.append(len(conversations))
        return original(self, conversations)

    monkeypatch.setattr(Rules, "supervise", counting)
    return calls


def everything(data: PreparedData) -> list[tuple]:
    return [
        (name, row.id, row.input_ids.tolist(), row.loss_weights.tolist(), row.answers)
        for name in ("train", "eval", "test")
        for row in getattr(data, name) or ()
    ]


def fresh(folder: Path, source: Path, tokenizer, **data) -> PreparedData:
    """The same data in a cache of its own."""
    return prepare(make_recipe(folder, source, cache_dir=str(folder / "other"), **data), tokenizer, notice=said)


def change(rows: list[dict[str, str]], kind: str) -> list[dict[str, str]]:
    """About one row in a hundred is different."""
    draw = random.Random(0)
    chosen = set(draw.sample(range(len(rows)), len(rows) // 100))
    changed = [row | {"output": "changed"} if n in chosen else row for n, row in enumerate(rows)]
    inserted = [one for n, row in enumerate(rows) for one in ([row | {"output": "new"}, row] if n in chosen else [row])]
    return {
        "changed": changed,
        "inserted": inserted,
        "removed": [row for n, row in enumerate(rows) if n not in chosen],
        "appended": rows + [row | {"output": "late"} for row in rows[: len(chosen)]],
        "first": [{"instruction": "first", "output": "first"}, *rows],
    }[kind]


@pytest.mark.parametrize("kind", ["changed", "inserted", "removed", "appended", "first"])
def test_one_row_in_a_hundred_costs_one_row_in_a_hundred(tmp_path, tokenizer, tokenised, kind):
    rows = records(6000)
    source = write_lines(tmp_path / "a.jsonl", rows)
    prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    assert sum(tokenised) == 6000
    tokenised.clear()
    write_lines(source, change(rows, kind))
    again = prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    assert sum(tokenised) <= 130
    assert everything(again) == everything(fresh(tmp_path, source, tokenizer))


def test_other_fractions_and_seeds_tokenise_nothing(tmp_path, tokenizer, tokenised):
    source = write_lines(tmp_path / "a.jsonl", records(50))
    prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    tokenised.clear()
    again = prepare(make_recipe(tmp_path, source, eval_fraction=0.5), tokenizer, notice=said)
    assert sum(tokenised) == 0 and len(again.eval) == 25


def test_what_decides_the_tokens_tokenises_all(tmp_path, tokenizer, tokenised):
    source = write_lines(tmp_path / "a.jsonl", records(50))
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    own = {"chat_template": str(template)}
    prepare(make_recipe(tmp_path, source, **own), tokenizer, notice=said)
    for other, changed in ((byte_tokenizer("</s>"), own), (tokenizer, own | {"loss_on": "all"})):
        tokenised.clear()
        prepare(make_recipe(tmp_path, source, **changed), other, notice=said)
        assert sum(tokenised) == 50
    template.write_text(template.read_text() + " ")
    tokenised.clear()
    prepare(make_recipe(tmp_path, source, **own), tokenizer, notice=said)
    assert sum(tokenised) == 50


def test_one_byte_of_the_code_tokenises_all(tmp_path, tokenizer, tokenised, monkeypatch):
    """Another version of the code finds neither the entry nor a shard, and the first one still finds both."""
    source = write_lines(tmp_path / "a.jsonl", records(50))
    digest = cache.code_digest.__wrapped__
    code = shutil.copytree(Path(cache.__file__).parent, tmp_path / "code", ignore=shutil.ignore_patterns("*.pyc"))
    first = prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    (code / "trees.py").write_bytes((code / "trees.py").read_bytes() + b"\n")
    for folder, num_tokenised in ((code, 50), (Path(cache.__file__).parent, 0)):
        monkeypatch.setattr(cache, "__file__", str(folder / "cache.py"))
        monkeypatch.setattr(cache, "code_digest", digest)
        tokenised.clear()
        again = prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
        assert sum(tokenised) == num_tokenised and (again.folder == first.folder) == (not num_tokenised)


def test_an_interrupted_preparation_goes_on_where_it_stopped(tmp_path, tokenizer, tokenised, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", records(6000))
    original, made = shards_module.ShardCache._write, []

    def write(self, name, shard, chunk):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(chunk.records))
        original(self, name, shard, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module.ShardCache, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    assert not list((tmp_path / "runs" / ".sft-cache").glob(".tmp*"))
    tokenised.clear()
    data = prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    assert sum(tokenised) == 6000 - sum(made)
    assert everything(data) == everything(fresh(tmp_path, source, tokenizer))


def test_a_damaged_shard_is_made_again(tmp_path, tokenizer, tokenised):
    source = write_lines(tmp_path / "a.jsonl", records(20))
    first = prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    (shard,) = (path for path in (tmp_path / "runs" / ".sft-cache" / "shards").glob("*/*") if path.name != "anchors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    tokenised.clear()
    again = prepare(make_recipe(tmp_path, source, eval_fraction=0.1), tokenizer, notice=said)
    assert sum(tokenised) == 20
    assert sorted(row[2] for row in everything(first)) == sorted(row[2] for row in everything(again))


@pytest.mark.slow
def test_processes_give_the_same_rows_rejects_and_order(tmp_path, tokenizer):
    rows = [json.dumps(row) for row in records(5000)]
    rows[700], rows[2500] = '{"instruction": "no answer"}', "not json"
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(rows) + "\n")
    skipping = {"on_bad_record": "skip"}
    here = fresh(tmp_path, source, tokenizer, workers=0, **skipping)
    there = prepare(make_recipe(tmp_path, source, workers=2, **skipping), tokenizer, notice=said)
    assert everything(here) == everything(there)
    assert here.report.rejects == there.report.rejects
    assert [bad["line"] for bad in there.report.rejects] == [701, 2501]


def test_a_bad_record_before_an_unreadable_one_is_the_one_that_is_told(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "no answer"}\nnot json\n')
    with pytest.raises(BadRecord, match=r"a\.jsonl:2 "):
        prepare(make_recipe(tmp_path, source), tokenizer, notice=said)


def test_every_reject_is_in_the_file_and_the_first_in_the_report(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in records(10))
    source.write_text(good + "not json\n" * 300)
    data = prepare(make_recipe(tmp_path, source, on_bad_record="skip", max_bad_fraction=1.0), tokenizer, notice=said)
    listed = [json.loads(line) for line in (data.folder / "rejects.jsonl").read_text().splitlines()]
    assert [bad["line"] for bad in listed] == list(range(11, 311))
    assert data.report.rejects == listed[:100]
    assert (data.report.sources[0].rejected, data.report.sources[0].records) == (300, 310)


def test_rejects_of_several_files_are_listed_file_by_file(tmp_path, tokenizer):
    """Also where the first records of the next file are bad: they are read before the chunk of this one ends."""
    good, bad = json.dumps(records(1)[0]) + "\n", "not json\n"
    for name, text in (("a", good + bad), ("b", bad), ("c", bad + good + good + bad)):
        (tmp_path / f"{name}.jsonl").write_text(text)
    skipping = {"on_bad_record": "skip", "max_bad_fraction": 1.0, "eval_fraction": 0.0}
    data = prepare(make_recipe(tmp_path, tmp_path / "*.jsonl", **skipping), tokenizer, notice=said)
    listed = [json.loads(line) for line in (data.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(Path(one["file"]).stem, one["line"]) for one in listed] == [("a", 2), ("b", 1), ("c", 1), ("c", 4)]


@given(st.lists(st.integers(0, 99), max_size=40))
def test_chunks_hold_every_record_once_in_order(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("chunks")
    write_lines(folder / "a.jsonl", [{"instruction": str(text), "output": "x"} for text in texts])
    write_lines(folder / "b.jsonl", [{"instruction": str(text), "output": "y"} for text in texts])
    found = [record for chunk in chunks(SourceSection(path=str(folder)), Rejects()) for record in chunk.records]
    assert [int(record.value["instruction"]) for record in found] == texts * 2
    assert [record.line for record in found] == [*range(1, len(texts) + 1)] * 2


@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=60),
    longest=st.integers(2, 20),
)
def test_pieces_hold_every_target_exactly_once(weights, longest):
    whole = trim(TokenizedExample(np.arange(len(weights), dtype=np.int32), np.array(weights, np.float32)))
    pieces = split(whole, longest)
    targets = [int(i) for piece in pieces for i in piece.input_ids[1:][piece.loss_weights[1:] > 0]]
    assert targets == [i for i in range(1, len(whole.input_ids)) if weights[i] > 0]
    assert all(2 <= len(piece.input_ids) <= longest for piece in pieces)


def test_long_examples_are_split_and_said(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", [{"instruction": "short", "output": "long " * 100}])
    data = prepare(make_recipe(tmp_path, source, long_examples="split", seq_len=128), tokenizer, notice=said)
    assert [row.id for row in data.train] == [f"{source}:1/{n}" for n in range(1, len(data.train) + 1)]
    assert data.report.sources[0].split == 1 and "5 pieces" in data.report.dropped[0]["reason"]
    assert sum(text.count("long") for text in decoded(data.train, tokenizer)) >= 96


def test_truncation_tells_what_it_cuts_off_the_answer(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", [{"instruction": "short", "output": "long " * 100}])
    data = prepare(make_recipe(tmp_path, source, long_examples="truncate"), tokenizer, notice=said)
    assert "of its supervised tokens are cut off" in data.report.dropped[0]["reason"]
    assert data.report.dropped[0]["kind"] == "truncated"


def test_temperature_raises_small_sources_and_keeps_the_total():
    sizes = [9000, 1000]
    assert [float(c) for c in temperate([1.0, 1.0], sizes, 1.0)] == [1.0, 1.0]
    flat = [float(c) * size for c, size in zip(temperate([1.0, 1.0], sizes, 1e9), sizes, strict=True)]
    assert flat == pytest.approx([5000, 5000], rel=1e-3)
    halfway = [float(c) * size for c, size in zip(temperate([1.0, 1.0], sizes, 2.0), sizes, strict=True)]
    assert halfway == pytest.approx([7500, 2500], rel=1e-3)  # square roots of 9 : 1 are 3 : 1
    assert temperate([1.0, 1.0], [10, 0], 2.0)[1] == 0


def test_temperature_reaches_the_mix(tmp_path, tokenizer):
    large = write_lines(tmp_path / "large.jsonl", records(90))
    small = write_lines(tmp_path / "small.jsonl", records(10, answer="small {}"))
    data = prepare(
        make_recipe(tmp_path, large, small, eval_fraction=0.0, mixture_temperature=2.0), tokenizer, notice=said
    )
    texts = decoded(data.train, tokenizer)
    assert sum("small" in text for text in texts) == 25 and len(texts) == 100
    assert [source.copies for source in data.report.sources] == pytest.approx([75 / 90, 2.5], rel=1e-3)


def test_another_way_of_reading_never_takes_rows_of_the_first(tmp_path, tokenizer):
    """Columns, format and forms decide the text as much as the records do."""
    rows = [{"q": f"question {n}", "good": f"good {n}", "bad": f"bad {n}", "text": f"whole {n}"} for n in range(300)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    forms = tmp_path / "forms.yaml"

    def learned(**reading) -> str:
        data = prepare(make_recipe(tmp_path, {"path": str(source)} | reading), tokenizer, notice=said)
        one = data.train.example(0)
        return tokenizer.decode(one.input_ids[one.answers[-1][0] :])

    pair = {"format": "prompt_completion"}
    assert learned(**pair, columns={"prompt": "q", "completion": "good"}).startswith("good ")
    assert learned(**pair, columns={"prompt": "q", "completion": "bad"}).startswith("bad ")
    assert learned(format="text").startswith("whole ")
    for field in ("good", "bad"):
        forms.write_text(f"forms:\n- {{name: one, prompt: '{{{{ q }}}}', answer: '{{{{ {field} }}}}'}}\n")
        assert learned(format="template", template=str(forms)).startswith(f"{field} ")


def test_a_guess_holds_for_the_whole_file_or_is_refused(tmp_path, tokenizer):
    rows = [*records(2), records(1)[0] | {"context": "dropped"}]
    source = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(BadRecord, match=r"a\.jsonl:3 .*which has no 'context'"):
        prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    write_lines(source, [*records(2), {"prompt": "p", "completion": "c"}])
    with pytest.raises(
        BadRecord, match=r"a\.jsonl:3 .*looks like prompt_completion, the file's first record like alpaca"
    ):
        prepare(make_recipe(tmp_path, source), tokenizer, notice=said)


@pytest.mark.parametrize(
    "victim", ["train/rows.npy", "train/loss_weight_sums.npy", "eval/meta.json", "train/meta.json"]
)
def test_a_flipped_bit_in_a_split_is_noticed(tmp_path, tokenizer, victim):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(40)), eval_fraction=0.2)
    first = prepare(recipe, tokenizer, notice=said)
    kept = everything(first)
    path = first.folder / victim
    data = bytearray(path.read_bytes())
    data[-3 if victim.endswith("npy") else data.index(b"num_examples") + 15] ^= 1
    path.write_bytes(bytes(data))
    lines: list[str] = []
    assert everything(prepare(recipe, tokenizer, notice=lines.append)) == kept
    assert "is damaged: preparing the data again" in lines[0]


def test_a_flipped_bit_in_the_corpus_is_never_read(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(40)))
    store = prepare(recipe, tokenizer, notice=said).train
    path = store.corpus._folder / "examples.arrow"
    data = path.read_bytes()
    tokens = store.corpus.token_ids(7).tobytes()
    assert data.count(tokens) == 1
    at = data.index(tokens) + 8
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    altered = prepare(recipe, tokenizer, notice=said).train
    index = altered.rows.tolist().index(7)
    with pytest.raises(DataError, match="row 7 was altered on the disk; delete"):
        altered.example(index)
    with pytest.raises(DataError, match="row 7 was altered"):
        altered.verify(index)

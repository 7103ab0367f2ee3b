"""Sources become stores once; every record is accounted for; one changed byte prepares anew."""

import gc
import gzip
import importlib.metadata
import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import template_cases
from hypothesis import given
from hypothesis import strategies as st
from preparing import byte_tokenizer, decoded, make_recipe, records, said, write_lines
from transformers import PreTrainedTokenizerFast

from sft_dist.data import prepare as prepare_module
from sft_dist.data.cache import code_digest
from sft_dist.data.prepare import prepare
from sft_dist.data.report import PrepareReport
from sft_dist.data.selection import num_copies
from sft_dist.data.tokenise import trim
from sft_dist.errors import BadRecord, ConfigError, DataError
from sft_dist.types import TokenizedExample


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_every_record_is_in_exactly_one_split(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(50)), eval_fraction=0.1, test_fraction=0.2)
    data = prepare(recipe, tokenizer, notice=said)
    assert (len(data.train), len(data.eval), len(data.test)) == (35, 5, 10)
    texts = [text for store in (data.train, data.eval, data.test) for text in decoded(store, tokenizer)]
    assert len(set(texts)) == 50
    assert data.report.sources[0].accepted == data.report.sources[0].records == 50


@pytest.mark.parametrize("frozen_before", [False, True])
def test_what_others_froze_stays_frozen(tmp_path, tokenizer, frozen_before):
    """The garbage collector goes over everything again afterwards, unless somebody else had said otherwise."""
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(3)))
    gc.unfreeze()
    if frozen_before:
        gc.freeze()
    try:
        prepare(recipe, tokenizer, notice=said)
        assert (gc.get_freeze_count() > 0) == frozen_before
    finally:
        gc.unfreeze()


def test_another_tiktoken_prepares_anew_and_none_at_all_prepares(monkeypatch):
    version, digests = importlib.metadata.version, []

    def pretended(name, tiktoken):
        if name == "tiktoken" and tiktoken is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return tiktoken if name == "tiktoken" else version(name)

    for tiktoken in ("0.13.0", "0.14.0", None):
        monkeypatch.setattr("importlib.metadata.version", lambda name, tiktoken=tiktoken: pretended(name, tiktoken))
        digests.append(code_digest.__wrapped__())
    assert len(set(digests)) == 3


def test_a_template_that_begins_some_conversations_with_bos_is_named(tmp_path):
    tokenizer = template_cases.byte_tokenizer()
    tokenizer.add_bos_token = True
    each = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    for name, opening in (("odd", "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}"), ("even", "")):
        (tmp_path / f"{name}.jinja").write_text(opening + each)
        source = write_lines(tmp_path / "a.jsonl", records(3))
        lines: list[str] = []
        recipe = make_recipe(tmp_path, source, chat_template=str(tmp_path / f"{name}.jinja"))
        prepare(recipe, tokenizer, notice=lines.append)
        assert any("begins only some conversations with BOS (<s>)" in line for line in lines) == (name == "odd")


def test_learned_is_the_answer_and_its_stop(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(1)))
    example = prepare(recipe, tokenizer, notice=said).train.example(0)
    assert tokenizer.decode(example.input_ids[example.loss_weights > 0]) == "answer number 0<|im_end|>"
    assert example.id == f"{tmp_path / 'a.jsonl'}:1"


def test_the_dead_suffix_is_trimmed(tmp_path, tokenizer):
    """ChatML writes a line end behind the stop text; nobody learns from it, so it is not stored."""
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(3)))
    for example in prepare(recipe, tokenizer, notice=said).train:
        assert example.loss_weights[-1] == 1.0
        assert tokenizer.decode(example.input_ids).endswith("<|im_end|>")


def test_the_dead_suffix_does_not_make_an_example_too_long(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", records(1))
    length = int(prepare(make_recipe(tmp_path, source), tokenizer, notice=said).train.lengths[0])
    fitting = prepare(make_recipe(tmp_path, source, seq_len=length), tokenizer, notice=said)
    assert (len(fitting.train), fitting.report.sources[0].truncated) == (1, 0)
    with pytest.raises(DataError, match="1 longer than"):
        prepare(make_recipe(tmp_path, source, seq_len=length - 1), tokenizer, notice=said)


@given(weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=20))
def test_trimming_loses_no_target(weights):
    whole = TokenizedExample(np.arange(len(weights), dtype=np.int32), np.array(weights, np.float32))
    short = trim(whole)
    assert short.input_ids.tolist() == whole.input_ids[: len(short.input_ids)].tolist()
    assert not (whole.loss_weights[len(short.input_ids) :] > 0).any()
    assert len(short.input_ids) == 1 or short.loss_weights[-1] > 0


def test_long_examples_are_dropped_and_listed_or_truncated(tmp_path, tokenizer):
    rows = [
        *records(4),
        {"instruction": "short", "output": "long " * 100},
        {"instruction": "long " * 100, "output": "x"},
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    dropping = prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    counts = dropping.report.sources[0]
    assert (counts.records, counts.accepted, counts.too_long, counts.truncated) == (6, 4, 2, 0)
    assert "more than data.seq_len=256" in dropping.report.dropped[0]["reason"]
    lines = source.read_bytes().splitlines(keepends=True)
    places = [(f"{source}:{line}", str(source), line, sum(map(len, lines[: line - 1]))) for line in (5, 6)]
    assert [tuple(row[key] for key in ("id", "file", "line", "byte")) for row in dropping.report.dropped] == places
    listed = (dropping.folder / prepare_module.DROPPED_FILE).read_text().splitlines()
    assert [json.loads(line) for line in listed] == dropping.report.dropped
    truncating = {"long_examples": "truncate", "eval_fraction": 0.0}
    cutting = prepare(make_recipe(tmp_path, source, **truncating), tokenizer, notice=said)
    counts = cutting.report.sources[0]
    assert (counts.accepted, counts.too_long, counts.truncated, counts.no_target) == (5, 0, 1, 1)
    assert cutting.train.lengths.max() == 256
    assert (cutting.train.num_loss_tokens > 0).all()


def test_nothing_trainable_is_an_error_with_the_counts(tmp_path, tokenizer):
    rows = [*records(3, answer="long " * 100), {"instruction": "long " * 100, "output": "b"}]
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=r"0 trainable examples of 4 records \(4 longer than data.seq_len=256"):
        prepare(recipe, tokenizer, notice=said)
    assert not list((tmp_path / "runs" / ".sft-cache").glob("**/*.arrow"))


def test_an_empty_file_is_an_error_with_the_counts(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"0 records in .*a\.jsonl: the files are empty"):
        prepare(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", [])), tokenizer, notice=said)


def test_one_example_trains_without_a_validation_split_and_says_so(tmp_path, tokenizer):
    lines: list[str] = []
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(1)))
    data = prepare(recipe, tokenizer, notice=lines.append)
    assert (len(data.train), data.eval, data.test) == (1, None, None)
    assert sum("no validation split" in line for line in lines) == 1


def test_two_examples_give_one_to_validation(tmp_path, tokenizer):
    data = prepare(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(2))), tokenizer, notice=said)
    assert (len(data.train), len(data.eval)) == (1, 1)


def test_duplicates_are_counted_kept_and_never_on_both_sides(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", records(20) + records(20))
    data = prepare(make_recipe(tmp_path, source, eval_fraction=0.2), tokenizer, notice=said)
    assert data.report.sources[0].duplicates == 20
    assert len(data.train) + len(data.eval) == 40
    assert not set(decoded(data.train, tokenizer)) & set(decoded(data.eval, tokenizer))


def test_pieces_of_one_record_are_no_duplicates(tmp_path, tokenizer):
    long = [{"instruction": "say", "output": "word " * 200}]
    source = write_lines(tmp_path / "a.jsonl", records(5) + long + long)
    data = prepare(make_recipe(tmp_path, source, long_examples="split", eval_fraction=0), tokenizer, notice=said)
    counts = data.report.sources[0]
    assert counts.split == 2 and counts.pieces == counts.accepted - 7 > 4
    assert counts.duplicates == 1


def test_given_evaluation_sets_stand_beside_drawn_ones_and_overlap_is_said(tmp_path, tokenizer):
    extra = write_lines(tmp_path / "e.jsonl", [*records(1), {"instruction": "new", "output": "new"}])
    source = write_lines(tmp_path / "a.jsonl", records(10))
    given = {"eval_sources": [{"path": str(extra)}], "test_sources": [{"path": str(extra)}], "eval_fraction": 0.0}
    lines: list[str] = []
    data = prepare(make_recipe(tmp_path, source, **given), tokenizer, notice=lines.append)
    assert (len(data.train), len(data.eval), len(data.test)) == (10, 2, 2)
    assert any(line.startswith("warning: 1 of 2 eval examples are in train too") for line in lines)


def test_bad_records_stop_with_their_place(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    with pytest.raises(BadRecord, match=r"a\.jsonl:2 \(byte 36\): .*output"):
        prepare(make_recipe(tmp_path, source), tokenizer, notice=said)


def test_bad_records_are_skipped_listed_and_within_a_budget(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in records(8))
    source.write_text(good + '{"instruction": "a"}\nnot json\n')
    skipping = {"on_bad_record": "skip", "max_bad_fraction": 0.2}
    data = prepare(make_recipe(tmp_path, source, **skipping), tokenizer, notice=said)
    counts = data.report.sources[0]
    assert (counts.records, counts.accepted, counts.rejected) == (10, 8, 2)
    assert sorted(bad["line"] for bad in data.report.rejects) == [9, 10]
    with pytest.raises(DataError, match="2 of 10 records are bad"):
        prepare(make_recipe(tmp_path, source, on_bad_record="skip", max_bad_fraction=0.1), tokenizer, notice=said)


def test_a_bad_instance_of_a_task_file_is_one_of_its_instances(tmp_path, tokenizer):
    """Ninety-nine good ones stay, and the budget is a share of the hundred."""
    source = tmp_path / "task.json"
    instances = [{"input": f"question {n}", "output": ["a"] if n != 6 else [" "]} for n in range(100)]
    source.write_text(json.dumps({"Definition": ["answer"], "Instances": instances}))
    with pytest.raises(BadRecord, match=r"task\.json:1 \(byte 0\): instance 7: field 'output' is empty"):
        prepare(make_recipe(tmp_path, source), tokenizer, notice=said)
    told = []
    skipping = {"on_bad_record": "skip", "eval_fraction": 0}
    data = prepare(make_recipe(tmp_path, source, max_bad_fraction=0.01, **skipping), tokenizer, notice=told.append)
    counts = data.report.sources[0]
    assert (counts.records, counts.judged, counts.accepted, counts.rejected, len(data.train)) == (1, 100, 99, 1, 99)
    assert "99 examples from 1 records, 1 bad" in told[0]
    assert [(bad["line"], bad["reason"]) for bad in data.report.rejects] == [(1, "instance 7: field 'output' is empty")]
    with pytest.raises(DataError, match="1 of 100 examples are bad"):
        prepare(make_recipe(tmp_path, source, max_bad_fraction=0.009, **skipping), tokenizer, notice=said)


@given(num=st.integers(0, 200), weight=st.sampled_from([0.1, 0.5, 1.0, 1.3, 2.0, 2.75]), key=st.integers(0, 99))
def test_copies_are_exact(num, weight, key):
    copies = num_copies(num, weight, key)
    assert copies.sum() == int(num * weight + 0.5 + 1e-9)
    assert set(copies.tolist()) <= {int(weight), int(weight) + 1}


def test_weights_repeat_and_thin_out_a_source(tmp_path, tokenizer):
    twice = {"path": str(write_lines(tmp_path / "twice.jsonl", records(10))), "weight": 2.0}
    half = {"path": str(write_lines(tmp_path / "half.jsonl", records(10, answer="half {}"))), "weight": 0.5}
    data = prepare(make_recipe(tmp_path, twice, half, eval_fraction=0.0), tokenizer, notice=said)
    copies = Counter(decoded(data.train, tokenizer))
    assert sorted(copies.values()) == [1] * 5 + [2] * 10


def test_a_second_run_reads_the_cache(tmp_path, tokenizer, monkeypatch):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(5)))
    lines: tuple[list[str], list[str]] = ([], [])
    first = prepare(recipe, tokenizer, notice=lines[0].append)
    monkeypatch.setattr(prepare_module, "_Preparation", None)
    second = prepare(recipe, byte_tokenizer(), notice=lines[1].append)
    assert second.folder == first.folder and first.folder.parent == tmp_path / "runs" / ".sft-cache"
    assert second.train.fingerprint == first.train.fingerprint
    assert second.report == first.report
    assert lines[0] == lines[1]


def test_what_decides_the_result_decides_the_name(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", records(5))

    def name(tokenizer=tokenizer, **data):
        return prepare(make_recipe(tmp_path, source, **data), tokenizer, notice=said).folder.name

    base = name()
    assert base == name()
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    names = [base, name(chat_template=str(template)), name(byte_tokenizer(eos="</s>")), name(seq_len=255)]
    names += [name(loss_on="all"), name(prompt_loss_weight=0.5), name(eval_fraction=0.5), name(test_fraction=0.2)]
    template.write_text(template.read_text() + " ")
    names.append(name(chat_template=str(template)))
    content = source.read_bytes()
    source.write_bytes(content.replace(b"number 3", b"number 8"))
    names.append(name())
    assert len(set(names)) == len(names)
    source.write_bytes(content)
    assert name() == base


def test_a_killed_preparation_is_swept_up(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(5)))
    folder = prepare(recipe, tokenizer, notice=said).folder
    leftover = folder.parent / f".tmp-{folder.name}-0123456789abcdef"
    folder.rename(leftover)
    assert prepare(recipe, tokenizer, notice=said).folder == folder
    assert not leftover.exists()


@pytest.mark.parametrize("victim", ["corpus/examples.arrow", "train/lengths.npy", "eval/meta.json", "report.json"])
def test_a_damaged_entry_is_said_and_made_again(tmp_path, tokenizer, victim):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(5)))
    first = prepare(recipe, tokenizer, notice=said)
    path = first.folder / victim
    path.write_bytes(path.read_bytes()[:-9])
    lines: list[str] = []
    again = prepare(recipe, tokenizer, notice=lines.append)
    assert "is damaged: preparing the data again" in lines[0]
    assert again.train.fingerprint == first.train.fingerprint


def test_the_report_survives_json_and_adds_up(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(40)), eval_fraction=0.1)
    data = prepare(recipe, tokenizer, notice=said)
    data.report.write(tmp_path / "prepare_report.json")
    assert PrepareReport.read(tmp_path / "prepare_report.json") == data.report
    written = json.loads((tmp_path / "prepare_report.json").read_text())
    for name, store in (("train", data.train), ("eval", data.eval)):
        split = written["splits"][name]
        assert split["examples"] == len(store) == sum(split["histogram"]["counts"])
        assert split["tokens"] == store.lengths.sum()
        assert split["lengths"]["max"] == store.lengths.max()
        assert len(split["histogram"]["edges"]) == len(split["histogram"]["counts"]) + 1
        longest = sorted(((-int(length), n) for n, length in enumerate(store.lengths)))[:5]
        assert split["longest"] == [{"id": store.example(n).id, "tokens": -length} for length, n in longest]
        assert sum(split["languages"].values()) == len(store)
    source = written["sources"][0]
    assert source["tokens"] == sum(split["tokens"] for split in written["splits"].values())
    assert 0 < source["supervised_share"] < 1
    assert source["formats"] == ["alpaca"] and source["guessed"]


def test_the_longest_rows_are_named_once_however_often_a_mix_repeats_them(tmp_path, tokenizer):
    rows = [{"instruction": "say", "output": "a " * n} for n in (4, 30, 9, 50, 7, 50, 20)]
    source = {"path": str(write_lines(tmp_path / "a.jsonl", rows)), "weight": 3.0}
    split = prepare(make_recipe(tmp_path, source, eval_fraction=0), tokenizer, notice=said).report.splits["train"]
    assert split.examples == 21
    assert [one["id"].rpartition(":")[2] for one in split.longest] == ["4", "6", "2", "7", "3"]
    assert [one["tokens"] for one in split.longest] == sorted((one["tokens"] for one in split.longest), reverse=True)


def test_languages_are_told_of_a_sample_of_the_rows(tmp_path, tokenizer, monkeypatch):
    texts = {
        "en": ("What is the capital of the country in the north?", "The capital of that country is a small town."),
        "de": ("Was ist die Hauptstadt des Landes im Norden?", "Die Hauptstadt dieses Landes ist eine kleine Stadt."),
    }
    rows = [{"instruction": f"{ask} {n}", "output": told} for ask, told in texts.values() for n in range(30)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    whole = prepare(make_recipe(tmp_path, source, eval_fraction=0), tokenizer, notice=said).report.splits["train"]
    assert whole.languages == {"en": 30, "de": 30}
    monkeypatch.setattr(prepare_module, "LANGUAGE_ROWS", 20)
    some = [
        prepare(make_recipe(tmp_path, source, eval_fraction=0, cache_dir=str(tmp_path / name)), tokenizer, notice=said)
        for name in ("a", "b")
    ]
    shares = [data.report.splits["train"].languages for data in some]
    assert sum(shares[0].values()) == 20 and shares[0].keys() == texts.keys() and shares[0] == shares[1]


def test_files_of_one_folder_may_differ_in_format(tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "a.jsonl", records(3))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with gzip.open(folder / "b.json.gz", "wt") as file:
        json.dump([{"messages": turns}], file)
    seen: list[tuple[int, int]] = []
    data = prepare(
        make_recipe(tmp_path, folder), tokenizer, notice=said, progress=lambda done, total: seen.append((done, total))
    )
    assert data.report.sources[0].formats == ["alpaca", "messages"]
    assert data.report.sources[0].accepted == 4
    assert seen and all(0 <= done <= total for done, total in seen)


def test_no_template_anywhere_is_a_configuration_error(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(1)), chat_template="auto")
    with pytest.raises(ConfigError, match="chat_template"):
        prepare(recipe, tokenizer, notice=said)


def test_splits_depend_on_content_not_on_place(tmp_path, tokenizer):
    """The held-out texts are the same when the file is written in another order."""
    held = []
    for name, rows in (("a", records(30)), ("b", records(30)[::-1])):
        source = write_lines(tmp_path / f"{name}.jsonl", rows)
        data = prepare(make_recipe(tmp_path, source, eval_fraction=0.2), tokenizer, notice=said)
        held.append(decoded(data.eval, tokenizer))
    assert held[0] == held[1]


@pytest.mark.slow
def test_two_processes_at_once_share_the_work(tmp_path):
    """Both get the same store; the slow preparation runs in one of them only."""
    write_lines(tmp_path / "a.jsonl", records(5))
    code = textwrap.dedent(f"""
        import os, sys, time
        from pathlib import Path
        from sft_dist.data import prepare as module
        from tests.preparing import byte_tokenizer, make_recipe
        folder = Path({str(tmp_path)!r})
        original = module._Preparation.write
        def slow(self):
            with open(folder / "prepared", "a") as file:
                file.write("x")
            while len(list(folder.glob("here-*"))) < 2:
                time.sleep(0.05)
            time.sleep(1)  # from there the other needs milliseconds to the lock
            original(self)
        module._Preparation.write = slow
        (folder / f"here-{{os.getpid()}}").touch()
        data = module.prepare(make_recipe(folder, folder / "a.jsonl"), byte_tokenizer(), notice=print)
        print("FINGERPRINT", data.train.fingerprint)
    """)
    root = Path(__file__).resolve().parents[2]
    run = lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)  # noqa: E731
    shown = [process.communicate(timeout=120)[0] for process in [run(), run()]]
    assert (tmp_path / "prepared").read_text() == "x"
    fingerprints = {line for text in shown for line in text.splitlines() if line.startswith("FINGERPRINT")}
    assert len(fingerprints) == 1
    assert sum("another process is preparing this data" in text for text in shown) == 1

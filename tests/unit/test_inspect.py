"""What is shown is what is learned: every token once, the mask exact, nothing of the text lost."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.inspect import PackView, find_rows, html_page, terminal_text, view_example, view_packs
from sft_dist.data.store import open_store, write_store
from sft_dist.types import Pack, StepPlan, TokenizedExample
from tests.preparing import byte_tokenizer

TOKENIZER = byte_tokenizer()


def make_example(text: str, weights: list[float], answers=(), file: str = "folder/a.jsonl") -> TokenizedExample:
    ids = np.array(TOKENIZER.encode(text), dtype=np.int32)
    return TokenizedExample(ids, np.array(weights[: len(ids)], np.float32), file, f"{file}:3", answers)


def make_view(text: str, weights: list[float], answers=()):
    return view_example(make_example(text, weights, answers), row=5, tokenizer=TOKENIZER)


def test_a_view_by_hand():
    view = make_view("ab\ncd", [1, 0, 1, 1, 0.5])
    assert [(piece.text, piece.weight) for piece in view.pieces] == [
        ("a", 0.0),
        ("b", 0.0),
        ("\n", 1.0),
        ("c", 1.0),
        ("d", 0.5),
    ]
    assert view.learned == ("\ncd",)
    assert (view.row, view.id, view.num_tokens, view.num_loss_tokens) == (5, "folder/a.jsonl:3", 5, 3)
    assert view.title == "row 5 · a.jsonl:3 · 5 tokens, 3 learned"


@given(text=st.text(min_size=1, max_size=40), seed=st.integers(0, 99))
def test_pieces_join_to_the_decoded_text(text, seed):
    """Also where several byte tokens make one character."""
    ids = TOKENIZER.encode(text)
    view = make_view(text, np.random.default_rng(seed).integers(0, 2, len(ids)).tolist())
    assert "".join(piece.text for piece in view.pieces) == TOKENIZER.decode(ids) == text


def test_tokens_of_one_character_are_shown_together():
    view = make_view("aé√😀", [0] * 10)
    assert [piece.text for piece in view.pieces] == ["a", "é", "√", "😀"]


def test_terminal_marks_learned_text_and_its_line_ends():
    text = terminal_text(make_view("ab\ncd", [0, 0, 1, 1, 0.5]))
    assert text.plain == "ab⏎\ncd"
    styles = [str(span.style) for span in text.spans]
    assert styles[:2] == ["dim", "dim"]
    assert all("green" in style for style in styles[2:4]) and styles[2] != styles[3]
    assert "yellow" in styles[4] or "gold" in styles[4]


def test_html_is_one_escaped_file():
    page = html_page([make_view("<b>&x", [0, 0, 1, 1, 1])], "a <title>")
    assert "<b>" not in page and "&lt;" in page
    assert "a &lt;title&gt;" in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert page.count('class="learned" title=') == 3


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_examples_are_shown(length):
    view = make_view("ab"[:length], [1.0, 1.0])
    assert view.num_loss_tokens == length - 1


def test_without_colour_brackets_mark_what_is_learned():
    view = make_view("ab\ncdef", [0, 0, 1, 1, 0, 0.5, 0.5], answers=((2, 4), (5, 7)))
    assert terminal_text(view, marks=True).plain == "ab▶1 ⟦⏎\nc⟧d▶2 ⟨0.5 ef⟩"
    assert terminal_text(view).plain == "ab▶1 ⏎\ncd▶2 ef"


def test_control_characters_are_shown_and_never_sent():
    view = make_view("a\x1b[31mb\x07\x9b\x7f", [0] * 4 + [1] * 9)
    for marks in (True, False):
        assert re.sub("[⟦⟧]", "", terminal_text(view, marks).plain) == "a␛[31mb␇\\x9b␡"
    assert "\x1b" not in html_page([view], "t")


@given(text=st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=2, max_size=40), seed=st.integers(0, 99))
def test_marks_change_nothing_else(text, seed):
    weights = np.random.default_rng(seed).choice([0.0, 0.5, 1.0], 400).tolist()
    view = make_view(text.translate(dict.fromkeys(map(ord, "⟦⟧⟨⟩▶⏎\n"))) + ".", weights)
    plain = terminal_text(view, marks=True).plain
    assert re.sub("⟨0.5 |[⟦⟧⟩]", "", plain) == "".join(piece.text for piece in view.pieces)


def test_answers_are_marked_on_the_page():
    page = html_page([make_view("abcd", [0, 0, 1, 1], answers=((2, 4),))], "t")
    assert '<em>▶1</em><span class="learned" title="weight 1">c</span>' in page
    assert "folder/a.jsonl:3" in page


def test_rows_are_found_by_file_and_text(tmp_path):
    texts = ["The Fox", "the dog", "no animal", "FOX again"]
    files = ["a.jsonl", "b.jsonl", "a.jsonl", "b.jsonl"]
    write_store(tmp_path / "s", [make_example(t, [1] * 9, file=f) for t, f in zip(texts, files, strict=True)], {})
    store = open_store(tmp_path / "s")
    assert list(find_rows(store, TOKENIZER, grep="fox")) == [0, 3]
    assert list(find_rows(store, TOKENIZER, source="b.json")) == [1, 3]
    assert list(find_rows(store, TOKENIZER, source="b.json", grep="fox")) == [3]
    assert list(find_rows(store, TOKENIZER, grep="cat")) == []


def test_packs_of_a_step():
    def pack(*rows):
        return Pack(rows, num_tokens=0, num_loss_tokens=4, loss_weight_sum=4.0, cost=1.0)

    plan = StepPlan(step=3, epoch=0, micro_batches=((pack(2, 0), pack(1)), (pack(3),)))
    packs = view_packs(plan, np.array([5, 9, 7, 8]), seq_len=16)
    assert [(one.name, one.rows, one.cu_seqlens) for one in packs] == [
        ("3:0:0", (2, 0), [0, 7, 12]),
        ("3:0:1", (1,), [0, 9]),
        ("3:1:0", (3,), [0, 8]),
    ]
    assert packs[0].title == "pack 3:0:0 · 2 documents, 12 of 16 tokens, 4 learned"


def test_packs_on_the_page_link_to_their_documents():
    pack = PackView(step=1, micro_batch=0, number=0, seq_len=10, num_loss_tokens=3, lengths=(4, 3), rows=(5, 9))
    page = html_page([make_view("abcd", [0, 0, 1, 1])], "t", [pack])
    assert '<a href="#row5" style="flex:4" title="row 5: tokens 0 to 3">' in page
    assert 'id="row5"' in page and '<i style="flex:3"></i>' in page

"""What is shown is what is learned: every token once, the mask exact, nothing of the text lost."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.inspect import html_page, terminal_text, view_example
from sft_dist.types import TokenizedExample
from tests.unit.test_prepare import byte_tokenizer

TOKENIZER = byte_tokenizer()


def make_view(text: str, weights: list[float]):
    ids = np.array(TOKENIZER.encode(text), dtype=np.int32)
    example = TokenizedExample(ids, np.array(weights[: len(ids)], np.float32), "a.jsonl", "a.jsonl:3")
    return view_example(example, row=5, tokenizer=TOKENIZER)


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
    assert (view.row, view.id, view.num_tokens, view.num_loss_tokens) == (5, "a.jsonl:3", 5, 3)


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
    assert not re.search(r"(src|href)=", page)
    assert page.count('class="learned" title=') == 3


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_examples_are_shown(length):
    view = make_view("ab"[:length], [1.0, 1.0])
    assert view.num_loss_tokens == length - 1

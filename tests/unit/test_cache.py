"""What decides prepared rows decides their cache's name; what does not leaves it."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from sft_dist.data import cache
from tests.preparing import byte_tokenizer, make_recipe, records, write_lines


@pytest.mark.parametrize(("file", "is_other"), [("token_masks.py", True), ("splits.py", True), ("packing.py", False)])
def test_one_byte_of_the_code_that_makes_rows_is_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, is_other: bool
) -> None:
    code = shutil.copytree(Path(cache.__file__).parent, tmp_path / "data", ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(cache, "__file__", str(code / "cache.py"))
    before = cache.code_digest.__wrapped__()
    assert before == cache.code_digest()
    changed = bytearray((code / file).read_bytes())
    changed[-2] ^= 1
    (code / file).write_bytes(changed)
    assert (cache.code_digest.__wrapped__() != before) == is_other


@pytest.mark.parametrize(("asked", "is_other"), [("ignore", False), ("together", True), ("drop", True)])
def test_the_library_that_finds_near_duplicates_names_what_it_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, is_other: bool
) -> None:
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(3)), near_duplicates=asked)
    before = cache.cache_name(recipe, byte_tokenizer(), "", {})
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99" if name == "rensa" else version(name))
    assert (cache.cache_name(recipe, byte_tokenizer(), "", {}) != before) == is_other

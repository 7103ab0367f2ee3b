"""Small sources and recipes for the tests of data preparation."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from sft_dist.config.schema import Recipe


def byte_tokenizer(eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """One token per byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def records(num: int, answer: str = "answer number {}") -> list[dict[str, str]]:
    return [{"instruction": f"question {n}", "output": answer.format(n)} for n in range(num)]


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_recipe(folder: Path, *sources, **data) -> Recipe:
    given = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    settings = {"sources": given, "chat_template": "chatml", "seq_len": 256} | data
    return Recipe(model={"path": "unused"}, run={"dir": str(folder / "runs" / "one")}, data=settings)


def said(text: str) -> None:
    """A notice nobody reads."""


def decoded(store, tokenizer) -> list[str]:
    return sorted(tokenizer.decode(example.input_ids) for example in store)

"""A byte-level BPE tokenizer a second time, in tiktoken, which is faster.

    ids of `tokenizers`  ==  ids of tiktoken        for every text that `ByteBpe.knows`

Not believed but shown, each premise on the tokenizer at hand, each character when it first comes:

- *Merging.* Both join neighbours until nothing can be joined: `tokenizers` the pair that stands first in its list,
  tiktoken the pair whose joint token has the lowest id. Call a token reachable when merging its own bytes gives it.
  What is joined has edges that were never joined over, so inside them merging goes as it would alone: only reachable
  tokens ever appear, each from one pair only. With those alone, and ids that rise along the list, both choose the same
  pair at every step. Tokens that only a whole word can be (`ignore_merges`) would come out as a known pair of ids
  instead; a text with such a pair is not given out.
- *Added tokens* cut the text first, in both: none may overlap another, or take white space with it, or be spelled as
  the vocabulary spells other bytes.
- *Words* are cut by one of a few patterns that both libraries read alike, with whatever version of Unicode each of them
  knows (`words.SameWords`).
- *Normalisation* is none, or NFC of texts that are NFC already.
- *Characters* of a token are those of its bytes: a tokenizer that reports tokens without their white space stays out.

And whatever comes out must spell the text, byte for byte.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np

from sft_dist.data.words import SameWords

LONGEST = 1 << 16  # characters of one text: on longer ones a pattern may need a deep stack
SEPARATOR = "\0"  # between texts that are tokenised in one call; data with it is refused
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS, _LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}"
QWEN_PATTERN = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_OTHERS}"  # Qwen 2, 2.5 and 3


@dataclass(frozen=True, slots=True)
class Tokens:
    """Some texts as tokens, one text after another with a separator between them.

    `ids` int32[N]; `starts`, `ends` int64[N]: the bytes [start, end) of each token in the joined texts; `first`,
    `last` int64[texts]: the tokens [first, last) of each text.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def covering(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [first, last) that hold at least one of the bytes [start, end)."""
        return np.searchsorted(self.ends, start, side="right"), np.searchsorted(self.starts, end, side="left")


class ByteBpe:
    """Tokenises in tiktoken what is known to come out as the tokenizer has it.

    `ranks`: bytes of each reachable token -> id; `added`: text of each added token -> id; `whole_words`: the first two
    ids that each word would begin with if it were not a token of its own.
    """

    def __init__(
        self,
        words: SameWords,
        ranks: Mapping[bytes, int],
        added: Mapping[str, int],
        whole_words: Iterable[tuple[int, int]],
        nfc: bool,
    ) -> None:
        from tiktoken import Encoding

        self._words, self._nfc = words, nfc
        self._separator = max(*ranks.values(), *added.values()) + 1
        special = {**added, SEPARATOR: self._separator}
        self._encoding = Encoding("", pat_str=words.pattern, mergeable_ranks=dict(ranks), special_tokens=special)
        self._bytes = [b""] * (self._separator + 1)
        for token, number in [*ranks.items(), *((text.encode(), number) for text, number in special.items())]:
            self._bytes[number] = token
        self._lengths = np.array([len(token) for token in self._bytes], np.int64)
        self._whole_words = np.array([_pair(*pair) for pair in whole_words], np.int64)

    def known(self, texts: Sequence[str]) -> list[int]:
        """Numbers of those that come out as the tokenizer has them."""
        self._words.meet(text for text in texts if not text.isascii())
        return [number for number, text in enumerate(texts) if self.knows(text)]

    def knows(self, text: str) -> bool:
        """Whether `text` comes out as the tokenizer has it."""
        if len(text) > LONGEST or SEPARATOR in text:
            return False
        return text.isascii() or (
            self._words.are_same(text) and not (self._nfc and not unicodedata.is_normalized("NFC", text))
        )

    def encode(self, texts: Sequence[str]) -> Tokens:
        """`texts`, all of them known, in one native call."""
        joined = SEPARATOR.join(texts)
        ids = self._encoding.encode_to_numpy(joined, allowed_special="all")
        spelled = b"".join(map(self._bytes.__getitem__, ids.tolist()))
        assert spelled == joined.encode(), "tiktoken's tokens do not spell the text"
        ends = np.cumsum(self._lengths[ids])
        cuts = np.flatnonzero(ids == self._separator)
        first, last = np.concatenate([[0], cuts + 1]), np.concatenate([cuts, [len(ids)]])
        return Tokens(ids.astype(np.int32), ends - self._lengths[ids], ends, first, last)

    def unsure(self, tokens: Tokens) -> np.ndarray:
        """Numbers of the texts in which a word may be a token of its own: int64[K]."""
        if not len(self._whole_words):
            return np.zeros(0, np.int64)
        places = np.flatnonzero(np.isin(_pair(tokens.ids[:-1].astype(np.int64), tokens.ids[1:]), self._whole_words))
        return np.unique(np.searchsorted(tokens.first, places, side="right") - 1)


def _pair(first: Any, second: Any) -> Any:
    return first << 32 | second


def byte_bpe_of(backend: Any) -> ByteBpe | None:
    """The `tokenizers.Tokenizer` a second time; None where it is another kind of tokenizer, or tiktoken is missing."""
    if find_spec("tiktoken") is None:
        return None
    about = json.loads(backend.to_str())
    model, added = about["model"], {token["content"]: token for token in about["added_tokens"]}
    pattern = _pattern(about["pre_tokenizer"])
    nfc = about["normalizer"] is not None
    if pattern is None or _trims(about["post_processor"]) or (nfc and about["normalizer"] != {"type": "NFC"}):
        return None
    if backend.encode_special_tokens or not _is_byte_bpe(model) or not _are_apart(added.values(), nfc):
        return None
    if any(text in model["vocab"] and not _spells_itself(text) for text in added):
        return None
    words = SameWords(backend.pre_tokenizer, pattern, nfc)
    found = _reachable(_merging(backend, model), model, added)
    if found is None or not words.are_same("".join(map(chr, range(1, 128)))):
        return None
    ranks, whole_words = found
    ids = {text: token["id"] for text, token in added.items()}
    return ByteBpe(words, ranks, ids, whole_words if model.get("ignore_merges") else [], nfc)


def _pattern(pre_tokenizer: Any) -> str | None:
    """What cuts words, of the two usual ways to say it, if it is a pattern that both libraries read alike."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2_PATTERN if pre_tokenizer.get("use_regex", True) else None
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern if pattern in (LLAMA3_PATTERN, QWEN_PATTERN) else None
    return None


def _trims(post_processor: Mapping[str, Any] | None) -> bool:
    """Whether tokens are reported without the white space at their edges."""
    about = post_processor or {}
    return bool(about.get("trim_offsets")) or any(map(_trims, about.get("processors", ())))


def _is_byte_bpe(model: Mapping[str, Any]) -> bool:
    """Whether it is plain BPE whose ids rise along the list of merges."""
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in unusual):
        return False
    vocabulary = model["vocab"]
    merged = ("".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"])
    ids = [vocabulary.get(token, -1) for token in merged]
    return all(before <= after for before, after in pairwise([0, *ids]))


def _are_apart(added: Iterable[Mapping[str, Any]], nfc: bool) -> bool:
    """Whether no added token takes white space along, or begins inside another one or where another one begins."""
    tokens = list(added)
    if any(token[name] for token in tokens for name in ("single_word", "lstrip", "rstrip")):
        return False
    texts = {token["content"] for token in tokens}
    if "" in texts or any(SEPARATOR in text or (nfc and not unicodedata.is_normalized("NFC", text)) for text in texts):
        return False
    beginnings = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    return not any(_overlaps(text, texts, beginnings) for text in texts)


def _spells_itself(added: str) -> bool:
    """Whether the vocabulary, which has a letter for each byte, spells the text `added` as it is. Then that entry is
    the added token. Else it may be other bytes: Ġ is a space there, and é is the byte E9."""
    letters = _byte_of()
    return all(letters.get(letter, -1) == ord(letter) < 128 for letter in added) or not set(added) <= letters.keys()


def _overlaps(text: str, texts: set[str], beginnings: set[str]) -> bool:
    """Whether another of `texts` begins in `text` and reaches over its end, or is a part of it."""
    inside = (text[start:end] for start in range(len(text)) for end in range(start + 1, len(text) + 1))
    tails = (text[start:] for start in range(1, len(text)))
    return any(part in texts for part in inside if part != text) or any(tail in beginnings for tail in tails)


def _merging(backend: Any, model: Mapping[str, Any]) -> Any:
    """The model as it merges, whole words or not."""
    if not model.get("ignore_merges"):
        return backend.model
    copy = type(backend).from_str(backend.to_str()).model
    copy.ignore_merges = False
    return copy


def _byte_of() -> dict[str, int]:
    """Letter of a byte-level vocabulary -> byte: itself where Latin-1 can print it, the others are numbered behind."""
    printed = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = sorted({*range(256)}.difference(printed))
    return {chr(byte): byte for byte in printed} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _reachable(
    merging: Any, model: Mapping[str, Any], added: Mapping[str, Any]
) -> tuple[dict[bytes, int], list[tuple[int, int]]] | None:
    """Ranks of the tokens that merging makes, and how the others begin; None unless all bytes are among the first."""
    byte_of = _byte_of()
    ranks: dict[bytes, int] = {}
    others: list[tuple[int, int]] = []
    for token, number in model["vocab"].items():
        if token in added or not set(token) <= byte_of.keys():
            continue
        made = [part.id for part in merging.tokenize(token)]
        if made == [number]:
            ranks[bytes(byte_of[letter] for letter in token)] = number
        elif len(made) > 1:
            others.append((made[0], made[1]))
    return (ranks, others) if all(bytes([byte]) in ranks for byte in range(256)) else None

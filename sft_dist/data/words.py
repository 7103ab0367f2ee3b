r"""Whether two libraries cut a text into the same words.

Patterns are read by two engines (tiktoken's in Rust, Oniguruma in `tokenizers`), which differ in syntax: `\p{N}{1,3}+`
is one thing here and another there. No look at single characters would find that, so `byte_bpe` lets in only patterns
whose every construct means the same in both: alternatives in order, greedy repetition of classes, `(?!\S)` and
contractions in either case. What is left to differ is which characters are a letter, a digit, a space or the other case
of a letter, by the version of Unicode that each engine knows. That is a property of single characters, so each is
looked at once, when it first comes, in neighbourhoods that give away its class.

tiktoken does not say how it cuts. But a vocabulary that holds what the other library cuts, and each two neighbours
joined, gives it away: a cut inside a word leaves pieces of it, a missing cut a joined pair.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

_BEFORE, _BEHIND = ("", "a", "1", ".", " ", "\n", "'", " '"), ("", "e ")
_AROUND = [*((left, right) for left in _BEFORE for right in _BEHIND), ("'", "l"), ("'", "v"), ("'", "r")]
_UNKNOWABLE = ("Cs", "Cn")  # surrogates, and what no version of Unicode that Python knows has assigned


class SameWords:
    """The characters that a `tokenizers` pre-tokenizer and tiktoken are known to see alike under `pattern`, which both
    must read alike: that is not looked at.

    `nfc`: texts are normalised, so characters that are not assigned yet may still change.
    """

    def __init__(self, pre_tokenizer: Any, pattern: str, nfc: bool) -> None:
        self.pattern = pattern
        self._pre_tokenizer, self._nfc = pre_tokenizer, nfc
        self._same: set[str] = set()
        self._different: set[str] = set()

    def meet(self, texts: Iterable[str]) -> None:
        """Look at the characters of `texts` that are new, all in one go."""
        new = set[str]().union(*texts) - self._same - self._different
        if new:
            self._look_at(sorted(new))

    def are_same(self, text: str) -> bool:
        """Whether all characters of `text` are seen alike."""
        self.meet([text])
        return self._same.issuperset(text)

    def _look_at(self, characters: list[str]) -> None:
        """Sort them into known sets: all at once if they are alike, else the halves."""
        if self._cut_alike(characters):
            self._same.update(characters)
        elif len(characters) == 1:
            self._different.update(characters)
        else:
            middle = len(characters) // 2
            self._look_at(characters[:middle])
            self._look_at(characters[middle:])

    def _cut_alike(self, characters: list[str]) -> bool:
        if any(unicodedata.category(character) in _UNKNOWABLE[: 1 + self._nfc] for character in characters):
            return False
        texts = ["".join(left + character + right for character in characters) for left, right in _AROUND]
        cuts = [self._cuts(text) for text in texts]
        return _cuts_of_tiktoken(texts, self.pattern, cuts) == cuts

    def _cuts(self, text: str) -> list[bytes]:
        return [text[start:end].encode() for _, (start, end) in self._pre_tokenizer.pre_tokenize_str(text)]


def _cuts_of_tiktoken(texts: list[str], pattern: str, expected: list[list[bytes]]) -> list[list[bytes]]:
    """The words of each text, if they are `expected`; else anything but those."""
    from tiktoken import Encoding

    words = [word for cuts in expected for word in cuts]
    joined = [first + second for cuts in expected for first, second in pairwise(cuts)]
    names = list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *words, *joined]))
    ranks = {name: number for number, name in enumerate(names)}
    encoding = Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [[names[number] for number in encoding.encode_ordinary(text)] for text in texts]

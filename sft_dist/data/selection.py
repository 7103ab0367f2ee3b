"""Which rows of the corpus are trained on, which are held out, and how often each comes.

    corpus, origins (which rows come from which source), recipe -> split -> row numbers, repeated as the mix says

Given evaluation and test sources keep their rows, each once; of the others each source gives its fraction, and what is
left is mixed by weight, repetition and temperature. What the recipe asks to
leave out (`data.filters`, near-duplicates) is left out before anything is held out, so that fractions hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from sft_dist.config.schema import DataSection, SourceSection
from sft_dist.data.duplicates import near_pairs, sketches_of
from sft_dist.data.exchanges import Exchange, exchanges, find_frame, text_of
from sft_dist.data.filters import Drop, Filters, drops
from sft_dist.data.permutation import derive_key, permute
from sft_dist.data.splits import EVAL, TEST, TRAIN, draw_splits, hang_together
from sft_dist.data.store import Corpus
from sft_dist.data.templates import ChatTemplate
from sft_dist.data.wholes import Wholes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = {"train": TRAIN, "eval": EVAL, "test": TEST}
ROLES = {"sources": None, "eval_sources": EVAL, "test_sources": TEST}  # key of the recipe -> split it is given to
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Origin:
    """Where rows [first, last) of the corpus come from."""

    role: str
    source: SourceSection
    first: int
    last: int

    @property
    def num_rows(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome: rows by split, and what there is to tell."""

    rows: dict[str, np.ndarray]  # split -> int64, each as often as it comes
    copies: list[float]  # of each example per epoch, by origin
    repeated: list[int]  # rows whose content came before, by origin
    left_out: list[Drop]
    notices: list[str]


class Said:
    """What the rows of a corpus say: questions and answers, read again from their tokens when asked for.

    Pieces of one conversation are read as one where whole conversations are asked for. `alive` is called each time: who
    looks at all rows of a large corpus is long at it.
    """

    def __init__(
        self,
        corpus: Corpus,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerFast,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._corpus, self._tokenizer, self._frame = corpus, tokenizer, find_frame(template, tokenizer)
        self._alive = alive

    def of(self, rows: Iterable[int]) -> list[Sequence[Exchange]]:
        self._alive()
        return list(exchanges(map(self._corpus.example, rows), self._tokenizer, self._frame))

    @cached_property
    def wholes(self) -> Wholes:
        return Wholes(self._corpus)

    def whole(self, row: int) -> Sequence[Exchange]:
        """The conversation that begins with `row`."""
        return self._wholes([row])[0]

    def batches(self, rows: np.ndarray) -> Iterator[list[Sequence[Exchange]]]:
        """The conversations that begin with `rows`, some at a time."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield self._wholes(rows[start : start + _ROWS_AT_ONCE].tolist())

    def _wholes(self, rows: Iterable[int]) -> list[Sequence[Exchange]]:
        self._alive()
        return list(exchanges(map(self.wholes.example, rows), self._tokenizer, self._frame))


def select(corpus: Corpus, origins: Sequence[Origin], data: DataSection, said: Said, seed: int) -> Selection:
    """Route every row of the corpus."""
    contents = corpus.column("content")
    left_out = _left_out(origins, data, said)
    stays = np.ones(len(contents), dtype=bool)
    stays[[drop.row for drop in left_out]] = False
    near = _near(said) if data.near_duplicates == "together" else None
    groups = hang_together(contents, corpus.column("unit"), near)
    split_of = _split_of_rows(contents, groups, stays, origins, data, seed)
    rows = {name: np.flatnonzero(stays & (split_of == split)) for name, split in SPLITS.items()}
    notices = [*_unusable(origins), *_missing_split(rows, groups, origins, data)]
    notices += [*_near_unknown(rows, origins, data), *_overlap(groups, rows)]
    weights, rows["train"] = _mixed(rows["train"], origins, data, seed)
    return Selection(rows, weights, _repeated(contents, origins), left_out, notices)


def num_copies(num_rows: int, weight: float | Fraction, key: int) -> np.ndarray:
    """How often each row of a source comes per epoch: int64[num_rows], in sum `num_rows * weight` rounded half up.

    An exact integer schedule: every row floor(weight) times, and a share of them, chosen by `key`, once more.
    """
    exact = Fraction(str(weight))
    whole, part = divmod(exact, 1)
    extra = (2 * part.numerator * num_rows + part.denominator) // (2 * part.denominator)
    rank = permute(np.arange(num_rows), num_rows, key) if extra else np.arange(num_rows)
    return int(whole) + (rank < extra).astype(np.int64)


def temperate(weights: Sequence[float], sizes: Sequence[int], temperature: float) -> list[Fraction]:
    """Copies per row of each source so that its share of the mix is its weighted size to the power 1 / temperature.

    1 leaves the weights as they are, larger ones raise small sources (Raffel et al., 2020, section 3.5.2; Devlin,
    2019). The mix keeps its total of weighted rows. Sources without rows get 0.
    """
    if temperature == 1.0:
        return [Fraction(str(weight)) for weight in weights]
    mass = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    heat = [m ** (1 / temperature) for m in mass]
    wanted = [sum(mass) * h / max(sum(heat), 1e-300) for h in heat]
    copies = (w / size if size else 0.0 for w, size in zip(wanted, sizes, strict=True))
    return [Fraction(c).limit_denominator(10**6) for c in copies]


def _left_out(origins: Sequence[Origin], data: DataSection, said: Said) -> list[Drop]:
    """Rows that the recipe does not want, but never rows of evaluation sources."""
    asked = data.filters.model_dump(exclude={"score"})
    filters = Filters(**asked, drop_near_duplicates=data.near_duplicates == "drop")
    if filters == Filters():
        return []
    protected = np.zeros(origins[-1].last if origins else 0, dtype=bool)
    for origin in origins:
        protected[origin.first : origin.last] = ROLES[origin.role] is not None
    rows = said.wholes.first_rows()
    found = drops(said.batches(rows), lambda number: said.whole(int(rows[number])), filters, protected[rows])
    return [piece for drop in found for piece in _pieces(drop, rows, said.wholes)]


def _pieces(drop: Drop, rows: np.ndarray, wholes: Wholes) -> Iterator[Drop]:
    """What is left out of the corpus with a conversation: `drop` has its number, `rows` where each begins."""
    like = None if drop.like is None else int(rows[drop.like])
    for row in wholes.rows_from(int(rows[drop.row])):
        yield drop._replace(row=row, like=like)


def _near(said: Said) -> np.ndarray:
    """Rows with which near-duplicates begin, in pairs: int64[P, 2]."""
    rows = said.wholes.first_rows()
    texts = (map(text_of, batch) for batch in said.batches(rows))
    pairs = near_pairs(sketches_of(texts, len(rows)), lambda number: text_of(said.whole(int(rows[number]))))
    return rows[np.array([pair[:2] for pair in pairs], dtype=np.int64).reshape(-1, 2)]


def _split_of_rows(
    contents: np.ndarray,
    groups: np.ndarray,
    stays: np.ndarray,
    origins: Sequence[Origin],
    data: DataSection,
    seed: int,
) -> np.ndarray:
    """The split of each row: int8[N]."""
    given = np.full(len(contents), -1, dtype=np.int8)
    sources = np.zeros(len(contents), dtype=np.int32)
    for number, origin in enumerate(origins):
        sources[origin.first : origin.last] = number
        split = ROLES[origin.role]
        given[origin.first : origin.last] = -1 if split is None else split
    drawn = (given < 0) & stays
    fractions = data.eval_fraction, data.test_fraction
    given[drawn] = draw_splits(contents[drawn], groups[drawn], sources[drawn], *fractions, seed)
    return given


def _mixed(rows: np.ndarray, origins: Sequence[Origin], data: DataSection, seed: int) -> tuple[list[float], np.ndarray]:
    """Copies per epoch of each origin's trained rows, and the rows, each as often as it comes: int64."""
    parts = [_inside(rows, origin) for origin in origins]
    heated = [origin for origin in origins if origin.source.repeat is None]
    sizes = [len(part) for origin, part in zip(origins, parts, strict=True) if origin.source.repeat is None]
    weights = iter(temperate([origin.source.weight for origin in heated], sizes, data.mixture_temperature))
    copies = [Fraction(origin.source.repeat) if origin.source.repeat else next(weights) for origin in origins]
    mixed = [
        np.repeat(part, num_copies(len(part), weight, derive_key("copies", seed, number)))
        for number, (part, weight) in enumerate(zip(parts, copies, strict=True))
    ]
    return [float(weight) for weight in copies], np.concatenate([np.zeros(0, dtype=np.int64), *mixed])


def _repeated(contents: np.ndarray, origins: Sequence[Origin]) -> list[int]:
    """Rows of each source whose content came before, in it or in an earlier source."""
    is_first = np.zeros(len(contents), dtype=bool)
    is_first[np.unique(contents, return_index=True)[1]] = True
    return [int(np.count_nonzero(~is_first[origin.first : origin.last])) for origin in origins]


def _unusable(origins: Sequence[Origin]) -> Iterator[str]:
    """Evaluation sources that somebody named and that hold nothing."""
    for origin in origins:
        if ROLES[origin.role] is not None and not origin.num_rows:
            yield f"warning: data.{origin.role} path={origin.source.path}: no usable example, nothing of it is measured"


def _missing_split(
    rows: dict[str, np.ndarray], groups: np.ndarray, origins: Sequence[Origin], data: DataSection
) -> Iterator[str]:
    """Splits that a fraction asks for and that stay empty, of all sources or of one that is large enough."""
    drawn = [origin for origin in origins if ROLES[origin.role] is None and origin.num_rows]
    asked = {name: fraction for name in ("eval", "test") if (fraction := getattr(data, f"{name}_fraction"))}
    for name, fraction in asked.items() if drawn else ():
        bare = [origin for origin in drawn if not len(_inside(rows[name], origin))]
        if bare == drawn:
            split = "validation" if name == "eval" else name
            yield f"data.{name}_fraction={fraction:g}: no {split} split, {_hang_together(drawn, rows, groups)}"
            continue
        for origin in bare:
            if round(fraction * len(_inside(rows["train"], origin))):
                what = _hang_together([origin], rows, groups)
                yield f"data.{name}_fraction={fraction:g}: nothing of {origin.source.path} is held out, {what}"


def _hang_together(origins: Sequence[Origin], rows: dict[str, np.ndarray], groups: np.ndarray) -> str:
    used = np.concatenate([_inside(rows[name], origin) for name in SPLITS for origin in origins])
    num = len(np.unique(groups[used]))
    if num == len(used):
        return f"{num} example{'s' if num != 1 else ''} cannot be shared out"
    return (
        f"{len(used):,} examples make {num:,} group{'s' if num != 1 else ''} that no split may tear apart (equal ones, "
        "those of one record, near-duplicates)"
    )


def _inside(rows: np.ndarray, origin: Origin) -> np.ndarray:
    return rows[(rows >= origin.first) & (rows < origin.last)]


def _near_unknown(rows: dict[str, np.ndarray], origins: Sequence[Origin], data: DataSection) -> Iterator[str]:
    held_out = np.concatenate([rows["eval"], rows["test"]])
    mixed = (origin for origin in origins if ROLES[origin.role] is None)
    is_drawn = any(len(_inside(held_out, origin)) for origin in mixed)
    if is_drawn and data.near_duplicates == "ignore":
        yield (
            "near-duplicates of held-out examples may be in train, they are not looked for: "
            "data.near_duplicates=together keeps them on one side"
        )


def _overlap(contents: np.ndarray, rows: dict[str, np.ndarray]) -> Iterator[str]:
    """Given evaluation sets may repeat what is trained on; drawn ones cannot. By groups of near-duplicates if any."""
    trained = np.unique(contents[rows["train"]])
    for name in ("eval", "test"):
        held_out = np.unique(contents[rows[name]])
        if shared := int(np.isin(held_out, trained).sum()):
            yield (
                f"warning: {shared:,} of {len(held_out):,} {name} examples are in train too; "
                "data.near_duplicates=drop leaves them out there"
            )

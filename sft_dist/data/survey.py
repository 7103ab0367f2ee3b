"""The quality and coverage of a prepared data set, measured on its stored tokens; nothing is changed or dropped.

    survey(stores, template, tokenizer, seed=0) -> Survey

    store rows --decode--> exchanges --> tasks, lengths, scripts, languages, turns      (coverage)
                                    \\--> signs: short, repetitive, refusal, cut off ...  (quality)
                                     \\-> sketches --> near-duplicates, also across splits (duplicates)

Tokens are all it needs, so it works for every source format and shows what is trained on, not what a file meant. A row
that a mix repeats is looked at once. Of a split with more than 200,000 rows a seeded sample is looked at, and the
survey says so; what is kept of a row is its sketch, 512 bytes, and a few numbers. A conversation that
`long_examples: split` cut is looked at once and whole, where its first piece stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_dist.data.coverage import language_of, script_of, task_of
from sft_dist.data.duplicates import clusters, groups_of_equal, near_pairs, sketch
from sft_dist.data.exchanges import Exchange, Frame, exchanges, find_frame, text_of
from sft_dist.data.permutation import derive_key, permute
from sft_dist.data.quality import CHECKS, signs
from sft_dist.data.store import TokenStore
from sft_dist.data.templates import ChatTemplate
from sft_dist.data.wholes import Wholes
from sft_dist.types import TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_ROWS = 200_000  # of a split
_BATCH = 1000
_LANGUAGE_ROWS = 5000  # of a split: telling a language takes as long as all the rest
_TOP_TASKS, _LISTED_ROWS, _LISTED_CLUSTERS, _LISTED_MEMBERS = 20, 100, 20, 5
_BINS = 24
_PREVIEW = 100  # characters

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A row to look at: `sft-dist data inspect R.yaml --split SPLIT --row ROW`."""

    split: str
    row: int
    id: str
    text: str  # beginning of the question, or of the answer where nobody asked


@dataclass(frozen=True, slots=True)
class Finding:
    """Rows with one sign."""

    about: str
    count: int  # rows
    places: list[Place]  # the first of them


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Clusters of rows that say the same, the largest first."""

    num_clusters: int
    num_rows: int  # in clusters
    clusters: list[list[Place]]  # the first members of the first ones


@dataclass(frozen=True, slots=True)
class Leak:
    """How many rows of a held-out split resemble training rows."""

    split: str
    rows: int  # looked at
    exact: int
    near: int  # the exact ones included
    same_question: int  # whatever the answer
    places: list[Place]  # the first near ones


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything found, JSON-able by `as_dict`. Counts are rows unless said otherwise."""

    looked_at: dict[str, int]  # split -> rows, each once
    examples: dict[str, int]  # split -> examples it holds, with what a mix repeats
    tasks: list[tuple[str, str, int]]  # verb, object, instructions: the most frequent
    num_tasks: int  # different pairs
    num_instructions: int  # by a user
    num_without_task: int  # in which the rule found no verb
    lengths: dict[str, dict[str, list[int]]]  # what -> histogram: edges[B + 1], counts[B]
    answers_per_conversation: dict[int, int]  # learned answers -> conversations
    scripts: dict[str, int]
    languages: dict[str, int]  # of an even sample of at most 5,000 rows of each split
    findings: dict[str, Finding]
    exact: Duplicates
    near: Duplicates
    questions: Duplicates  # the same questions, whatever the answers
    leaks: list[Leak]
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def survey(
    stores: Mapping[str, TokenStore],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    progress: Progress = lambda done, total: None,
    most_rows: int = MOST_ROWS,
) -> Survey:
    """Look at the rows of all splits. `stores`: split -> its store, `train` among them."""
    frame = find_frame(template, tokenizer)
    chosen = {name: sampled_rows(store, most_rows, derive_key("survey", seed)) for name, store in stores.items()}
    wholes = {name: Wholes(store.corpus) for name, store in stores.items()}
    chosen = {name: rows[wholes[name].is_first(stores[name].rows[rows])] for name, rows in chosen.items()}
    look = _Look(stores, wholes, tokenizer, frame)
    total = sum(map(len, chosen.values()))
    for name, rows in chosen.items():
        contents = stores[name].corpus.column("content")[stores[name].rows[rows]]
        every = -(-len(rows) // _LANGUAGE_ROWS)
        for at in range(0, len(rows), _BATCH):
            some = slice(at, at + _BATCH)
            look.add(name, rows[some].tolist(), contents[some].tolist(), every)
            progress(len(look.places), total)
    found = look.result({name: len(store) for name, store in stores.items()})
    notices = [_sampled(found, name) for name, store in stores.items() if len(store) > most_rows]
    if frame is None:
        notices.append(
            f"what template {template.name} writes around questions could not be told: questions are shown with it, "
            "and tasks are those of its first words"
        )
    notices += [_leaked(leak) for leak in found.leaks if leak.near]
    return replace(found, notices=notices)


def sampled_rows(store: TokenStore, most: int, key: int) -> np.ndarray:
    """One example of each different row among all examples of a split, or among a sample of `most`, in order."""
    num = len(store)
    places = np.sort(permute(np.arange(most), num, key)) if num > most else np.arange(num)
    return places[np.sort(np.unique(store.rows[places], return_index=True)[1])]


class _Look:
    """What has been seen so far."""

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        wholes: Mapping[str, Wholes],
        tokenizer: PreTrainedTokenizerFast,
        frame: Frame | None,
    ) -> None:
        self._stores, self._wholes, self._tokenizer, self._frame = stores, wholes, tokenizer, frame
        self._tasks: Counter[tuple[str, str]] = Counter()
        self._num_instructions = 0
        self._lengths: dict[str, list[int]] = {}
        self._scripts: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._signs: dict[str, list[int]] = {name: [] for name in CHECKS}
        self._sketches: list[np.ndarray] = []
        self._contents: list[int] = []
        self._questions: list[int] = []
        self.places: list[tuple[str, int]] = []  # split, row

    def add(self, split: str, rows: Sequence[int], contents: Sequence[int], every: int) -> None:
        """Look at some rows of a split with their content keys, and tell the language of one in `every`."""
        spoken = exchanges((self._whole(split, row) for row in rows), self._tokenizer, self._frame)
        self._sketches.append(sketch(map(text_of, spoken)))
        self._contents += contents
        for row, said in zip(rows, spoken, strict=True):
            self._count(said, len(self.places), with_language=len(self.places) % every == 0)
            self.places.append((split, row))

    def _count(self, said: tuple[Exchange, ...], number: int, with_language: bool) -> None:
        text = text_of(said)
        self._turns[len(said)] += 1
        self._scripts[script_of(text)] += 1
        if with_language:
            self._languages[language_of(text)] += 1
        asked = " ".join(one.question.casefold() for one in said).split()
        self._questions.append(hash(tuple(asked or [number])))  # rows without a question ask nothing alike
        for name in dict.fromkeys(sign for one in said for sign in signs(one)):
            self._signs[name].append(number)
        for one in said:
            for what, length in _lengths(one):
                self._lengths.setdefault(what, []).append(length)
            if one.asked and one.question:
                self._num_instructions += 1
                self._tasks.update(filter(None, [task_of(one.question)]))

    def result(self, num_examples: dict[str, int]) -> Survey:
        near = near_pairs(np.concatenate(self._sketches), lambda number: text_of(self._exchanges(number)))
        near_clusters, exact_clusters = clusters(near), groups_of_equal(np.array(self._contents, np.uint64))
        asked = groups_of_equal(np.array(self._questions))
        looked_at = Counter(split for split, _ in self.places)
        return Survey(
            looked_at=dict(looked_at),
            examples=num_examples,
            tasks=[(*task, count) for task, count in self._tasks.most_common(_TOP_TASKS)],
            num_tasks=len(self._tasks),
            num_instructions=self._num_instructions,
            num_without_task=self._num_instructions - self._tasks.total(),
            lengths={what: _histogram(values) for what, values in self._lengths.items()},
            answers_per_conversation=dict(sorted(self._turns.items())),
            scripts=dict(self._scripts.most_common()),
            languages=dict(self._languages.most_common()),
            findings={
                name: Finding(CHECKS[name][0], len(numbers), self._places(numbers[:_LISTED_ROWS]))
                for name, numbers in self._signs.items()
            },
            exact=self._duplicates(exact_clusters),
            near=self._duplicates(near_clusters),
            questions=self._duplicates(asked),
            leaks=[self._leak(split, exact_clusters, near_clusters, asked) for split in looked_at if split != "train"],
        )

    def _leak(self, split: str, exact: list[list[int]], near: list[list[int]], asked: list[list[int]]) -> Leak:
        crossing = self._crossing(split, near)
        return Leak(
            split,
            rows=sum(of == split for of, _ in self.places),
            exact=len(self._crossing(split, exact)),
            near=len(crossing),
            same_question=len(self._crossing(split, asked)),
            places=self._places(crossing[:_LISTED_ROWS]),
        )

    def _crossing(self, split: str, groups: list[list[int]]) -> list[int]:
        """Rows of `split` that share a group with a training row."""
        shared = (group for group in groups if any(self.places[number][0] == "train" for number in group))
        return sorted(number for group in shared for number in group if self.places[number][0] == split)

    def _duplicates(self, groups: list[list[int]]) -> Duplicates:
        listed = [self._places(group[:_LISTED_MEMBERS]) for group in groups[:_LISTED_CLUSTERS]]
        return Duplicates(len(groups), sum(map(len, groups)), listed)

    def _places(self, numbers: Sequence[int]) -> list[Place]:
        return [self._place(number) for number in numbers]

    def _place(self, number: int) -> Place:
        split, row = self.places[number]
        said = self._exchanges(number)
        text = " ".join(next((text for one in said for text in (one.question, one.answer) if text), "").split())
        return Place(split, row, self._whole(split, row).id, text[:_PREVIEW])

    def _exchanges(self, number: int) -> tuple[Exchange, ...]:
        return exchanges([self._whole(*self.places[number])], self._tokenizer, self._frame)[0]

    def _whole(self, split: str, row: int) -> TokenizedExample:
        return self._wholes[split].example(int(self._stores[split].rows[row]))


def _lengths(one: Exchange) -> Iterator[tuple[str, int]]:
    if one.question:
        yield "question, tokens", one.num_question_tokens
        yield "question, characters", len(one.question)
    yield "answer, tokens", one.num_answer_tokens
    yield "answer, characters", len(one.answer)


def _histogram(values: Sequence[int]) -> dict[str, list[int]]:
    """Bins up to the 99th percentile, and one for all that is longer."""
    most, usual = max(values), int(np.percentile(values, 99))
    edges = np.unique(np.linspace(0, usual + 1, _BINS + 1).astype(np.int64)).tolist()
    edges += [most + 1] * (most > usual)
    return {"edges": edges, "counts": np.histogram(values, edges)[0].tolist()}


def _sampled(found: Survey, split: str) -> str:
    return (
        f"{split}: a seeded sample of {found.looked_at[split]:,} of {found.examples[split]:,} examples was looked at; "
        "duplicates of examples outside it are not seen"
    )


def _leaked(leak: Leak) -> str:
    return (
        f"warning: {leak.near:,} of {leak.rows:,} {leak.split} examples are near-duplicates of training examples "
        f"({leak.exact:,} exact): their loss measures memory"
    )

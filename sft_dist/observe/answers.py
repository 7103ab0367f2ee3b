"""Answers of a run, made ready to show: exact answers by skill, and each sample's first answer beside its last.

exact_match.jsonl  --scores-->           one Score for all, one for each skill
samples.jsonl      --compare_samples-->  one Sample per prompt of the last evaluation
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Score:
    """Exact answers of one skill; a share is None when that phase was not measured."""

    skill: str
    num_before: int
    num_after: int
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt with the first and the last answer to it."""

    id: str
    prompt: str
    reference: str
    before: str | None
    after: str
    matched_before: bool
    matched_after: bool


def scores(records: Sequence[Line]) -> list[Score]:
    """Exact answers by skill, all of them first; skills by name. Empty when nothing was checked."""
    if not records:
        return []
    skill_of = read_skills({record["id"] for record in records})
    skills = sorted(set(skill_of.values()))
    groups = [_score("all", records)]
    for skill in skills:
        groups.append(_score(skill, [record for record in records if skill_of.get(record["id"]) == skill]))
    return groups


def read_skills(ids: Iterable[str]) -> dict[str, str]:
    """Id -> the `skill` that its record names. Ids are `file:line`; JSONL files that still exist are read."""
    wanted: dict[str, dict[int, str]] = defaultdict(dict)
    for record_id in ids:
        if match := re.fullmatch(r"(.+\.jsonl):(\d+)", record_id, re.DOTALL):
            wanted[match[1]][int(match[2])] = record_id
    found = {}
    for file, id_of_line in wanted.items():
        if not Path(file).is_file():
            continue
        for line, text in enumerate(Path(file).read_bytes().split(b"\n"), 1):
            if line in id_of_line and isinstance(skill := _skill(text), str):
                found[id_of_line[line]] = skill
    return found


def compare_samples(records: Sequence[Line]) -> list[Sample]:
    """The answers of the last evaluation, each beside the first one to the same prompt."""
    if not records:
        return []
    first, last = min(record["step"] for record in records), max(record["step"] for record in records)
    earlier = {record["id"]: record for record in records if record["step"] == first != last}
    return [_sample(record, earlier.get(record["id"])) for record in records if record["step"] == last]


def _score(skill: str, records: Sequence[Line]) -> Score:
    matches = {phase: [bool(r["match"]) for r in records if r["phase"] == phase] for phase in ("before", "after")}
    shares = {phase: sum(found) / len(found) if found else None for phase, found in matches.items()}
    return Score(skill, len(matches["before"]), len(matches["after"]), shares["before"], shares["after"])


def _sample(last: Line, first: Line | None) -> Sample:
    return Sample(
        id=last["id"],
        prompt=last["prompt"],
        reference=last["reference"],
        before=None if first is None else first["answer"],
        after=last["answer"],
        matched_before=first is not None and first["match"],
        matched_after=last["match"],
    )


def _skill(line: bytes) -> Any:
    """The `skill` of a record; None for whatever is not an object with one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("skill") if isinstance(record, dict) else None

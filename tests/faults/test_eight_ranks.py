"""`run.deterministic: elastic` on eight ranks: the bits of one, also when a run goes from eight to two to eight."""

from __future__ import annotations

from pathlib import Path

import pytest
from lives import Life, live
from test_elastic import STEPS, elastic_recipe, found

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ["full", "full-bfloat16"])
def test_eight_ranks_give_the_bits_of_one(tmp_path: Path, case: str) -> None:
    one, eight, moved = (str(elastic_recipe(tmp_path, name, case)) for name in ("one", "eight", "moved"))
    lives: list[Life] = [(1, [one]), (8, [eight])]
    lives += [(8, [moved, "optim.stop_after_step=2"]), (2, [moved, "optim.stop_after_step=5"]), (8, [moved])]
    live(lives, tmp_path)
    expected = found(tmp_path / "one")
    assert len(expected[0]) == STEPS
    assert found(tmp_path / "eight") == expected
    assert found(tmp_path / "moved") == expected

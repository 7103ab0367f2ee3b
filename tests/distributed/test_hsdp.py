"""HSDP, two replicas of two shards on four processes, trains what one process trains, and moves between layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import asked_for, cells, run_ranks
from pydantic import ValidationError
from tuning_worker import LOSS_LIMIT, NORM_LIMIT

from sft_dist.config.auto import refuse_uneven
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

WORKER = Path(__file__).with_name("hsdp_worker.py")
CASES = [f"hsdp-none-{method}-{rounds}-float32" for method in ("full", "lora", "qlora") for rounds in (2, 8)]
DEFAULT = ["hsdp-none-full-8-float32"]  # the others: the long suite
OPTIMIZERS = [f"hsdp-full-2-{name}-float32" for name in ("adamw8bit", "adafactor", "muon")]
OPTIMIZERS += ["hsdp-lora-2-plus-float32"]

Found = dict[str, dict[str, Any]]


def recipe(**parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"path": "x"}, "data": {"sources": [{"path": "d.json"}]}, "parallel": parallel}
    )


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """(one process without a wrapper, four processes as 2 x 2)."""
    folder, asked = tmp_path_factory.mktemp("hsdp"), asked_for(request)
    run_ranks(WORKER, 1, folder, [str(folder), *(case.replace("hsdp", "ddp") for case in asked)])
    run_ranks(WORKER, 4, folder, [str(folder), *asked])
    one, four = (json.loads((folder / f"found-{n}.json").read_text()) for n in (1, 4))
    return one, four


@pytest.mark.slow
@pytest.mark.parametrize("case", cells(CASES, DEFAULT))
def test_twenty_steps_are_those_of_one_process(found: tuple[Found, Found], case: str) -> None:
    """The run has exported itself as well: the certificate wants the trainer's logits, bit for bit."""
    one, four = found[0][case.replace("hsdp", "ddp")], found[1][case]
    assert len(four["straight_loss"]) == 20
    for figure in ("straight_loss", "straight_grad_norm"):
        assert four[figure] == pytest.approx(one[figure], rel=1e-6), figure


@pytest.mark.slow
@pytest.mark.parametrize("case", cells(OPTIMIZERS, ()))
def test_every_optimizer_steps_as_in_one_process(found: tuple[Found, Found], case: str) -> None:
    """And resumes to the bit, by the same mesh; replicas continue what it saved."""
    one, four, name = found[0][case.replace("hsdp", "ddp")], found[1][case], case.split("-")[3]
    loss, norm = LOSS_LIMIT.get(name, 1e-6), NORM_LIMIT.get(name, 1e-6)
    assert len(four["straight_loss"]) == 10
    assert four["straight_loss"] == pytest.approx(one["straight_loss"], rel=loss)
    assert four["straight_grad_norm"] == pytest.approx(one["straight_grad_norm"], rel=norm)
    for figure in ("loss", "grad_norm"):
        assert four[f"resumed_{figure}"] == four[f"after_{figure}"]
    assert four["replicas_loss"] == pytest.approx(four["after_loss"], rel=loss)


@pytest.mark.slow
@pytest.mark.parametrize("case", cells(CASES, DEFAULT))
def test_checkpoints_continue_across_layouts(found: tuple[Found, Found], case: str) -> None:
    """By the same mesh bit for bit; by shards and by replicas, and what replicas saved by the mesh, to 1e-6."""
    four = found[1][case]
    for figure in ("loss", "grad_norm"):
        assert len(four[f"after_{figure}"]) == 12
        for same in ("resumed", "from_replicas"):
            assert four[f"{same}_{figure}"] == four[f"after_{figure}"], same
        for other in ("fsdp2", "ddp"):
            assert four[f"{other}_{figure}"] == pytest.approx(four[f"after_{figure}"], rel=1e-6), other


@pytest.mark.slow
@pytest.mark.parametrize("case", cells(CASES, DEFAULT))
def test_replicas_speak_only_in_the_last_micro_batch(found: tuple[Found, Found], case: str) -> None:
    *before, last = found[1][case]["sums_between_replicas"]
    assert len(before) == (0 if "-2-" in case else 3)
    assert not any(before)
    assert last >= (2 if "lora" in case else 3)  # two layers, and the rest where any of it is trained


@pytest.mark.slow
def test_another_mesh_than_asked_for_is_an_error(found: tuple[Found, Found]) -> None:
    for case in found[1].keys() & set(CASES):
        refused = found[1][case]["refused"]
        assert [line[:2] for line in refused] == ["1:", "4:"]
        assert all("fsdp2 put" in line and "on mesh" in line for line in refused)


@pytest.mark.parametrize(
    "parallel",
    [{"strategy": "ddp"}, {"strategy": "zero3"}, {"strategy": "auto", "offload": "optimizer"}],
    ids=["ddp", "zero3", "offload"],
)
def test_only_fsdp2_has_a_mesh(parallel: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"parallel\.dp_replicate=2 with parallel\..*mesh of fsdp2"):
        recipe(dp_replicate=2, **parallel)


def test_replicas_divide_the_processes() -> None:
    refuse_uneven(recipe(dp_replicate=2), 4)
    with pytest.raises(ConfigError, match=r"parallel\.dp_replicate=2: 3 process\(es\) cannot form 2 equal replicas"):
        refuse_uneven(recipe(dp_replicate=2), 3)
    with pytest.raises(ConfigError, match=r"dp_replicate=4 on 4 .* leaves shards of one process"):
        refuse_uneven(recipe(dp_replicate=4), 4)

"""Numbers that go wrong on one rank: all ranks come to one verdict, and it can be looked into afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import run_script
from safetensors.torch import load_file
from tiny_run import lines, trajectory, weights

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("wrong_numbers.py")


def later(name: str) -> object:
    """Four ranks on few cores, and engines whose neighbour is in the default suite: the long one."""
    return pytest.param(name, marks=pytest.mark.faults)


SKIPPING_ZERO = [later("skip-zero1"), later("skip-zero2"), "skip-zero3"]
SKIPPING = ["skip", *SKIPPING_ZERO, later("skip-hsdp")]


def lived(group: str, factory: pytest.TempPathFactory) -> Path:
    """Where a group of wrong_numbers.py has lived; each life has ended with its exit code on every rank."""
    folder = factory.mktemp(f"numbers-{group}")
    run_script(SCRIPT, folder, group)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lived("two", tmp_path_factory)


@pytest.fixture(scope="module")
def place_of_zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lived("zero", tmp_path_factory)


@pytest.fixture(scope="module")
def place_of_hsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lived("hsdp", tmp_path_factory)


@pytest.fixture
def home(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The folder in which the life NAME was lived."""
    group = {"hsdp": "place_of_hsdp", "zero1": "place_of_zero", "zero2": "place_of_zero"}
    return lambda name: request.getfixturevalue(group.get(name.rpartition("-")[2], "place"))


def told(place: Path, name: str) -> str:
    return json.loads((place / "printed.json").read_text())[name]


@pytest.mark.parametrize("name", ["stop", "stop-ddp", later("stop-hsdp")])
def test_one_infinite_gradient_of_one_rank_stops_all_with_a_bundle(home: Callable[[str], Path], name: str) -> None:
    place = home(name)
    folder = place / name / "logs/attempt_0001/nonfinite-step-00000005"
    text = told(place, name)
    assert "error: step 5: loss 4." in text and ("gradient norm inf" in text or "gradient norm nan" in text)
    assert str(folder) in text and "no update was applied" in text
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == 5 and report["grad_norm"] in ("inf", "nan")
    bad = [tensor for tensor, norm in report["gradient_norms"].items() if isinstance(norm, str)]
    assert report["first_nonfinite"] == {"parameter": bad[0]}
    assert len(bad) == 1 and len(report["gradient_norms"]) == len(report["weight_norms"]) > 8
    assert report["config"]["run"]["seed"] == 3 and report["versions"]["torch"] == torch.__version__
    examples = {row for part in report["micro_batches"] for row in part["examples"]}
    tensors = load_file(folder / "batch.safetensors")
    assert examples and {name.partition(".")[0] for name in tensors} == examples
    assert len(lines(place / name, "step")) == 4


def test_the_save_under_way_when_a_run_stops_is_committed(place: Path) -> None:
    (newest,) = folders(place / "stop")
    assert read_manifest(newest).step == 4


@pytest.mark.parametrize("name", ["once", "once-zero3", later("once-hsdp")])
def test_what_is_finite_when_done_again_is_the_machines_fault(home: Callable[[str], Path], name: str) -> None:
    place = home(name)
    text = told(place, name)
    assert re.search(r"done again on the same weights the gradient norm is \d\.\d+, computed on \S+: a processor", text)
    assert not list((place / name).rglob("report.json"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("another-value", [(1, "inf", "nan", 1)]),
        ("another-rank", [(0, "nan", r"\d+\.\d+", 0), (1, r"\d+\.\d+", "nan", 1)]),
    ],
)
def test_what_is_wrong_otherwise_when_done_again_is_the_fault_of_the_rank_named(
    place: Path, name: str, changes: list[tuple[int, str, str, int]]
) -> None:
    lines = [
        rf"the loss sum of micro-batch {number} is {second} and not {first} on rank {rank} \(\S+, cpu\)"
        for number, second, first, rank in changes
    ]
    assert re.search(f"done again on the same weights {'; '.join(lines)}: a processor", told(place, name))
    assert not list((place / name).rglob("report.json"))


@pytest.mark.parametrize("name", ["layer", "layer-recomputed", "layer-zero3"])
def test_the_bundle_names_the_first_layer_that_gave_no_number(place: Path, name: str) -> None:
    report = json.loads((place / name / "logs/attempt_0001/nonfinite-step-00000005/report.json").read_text())
    assert report["first_nonfinite"] == {"layer": "model.layers.1.mlp.up_proj", "micro_batch": 1, "rank": 1}
    assert [part["loss_sum"] == "nan" for part in report["micro_batches"]] == [False, True]


@pytest.mark.parametrize("name", SKIPPING)
def test_skipped_steps_apply_nothing_and_are_checkpointed_state(home: Callable[[str], Path], name: str) -> None:
    place = home(name)
    run = place / name
    assert [line["step"] for line in lines(run, "skipped")] == [5, 8]
    assert [line["step"] for line in lines(run, "step")] == [1, 2, 3, 4, 6, 7, 9, 10, 11, 12]
    assert read_manifest(folders(run)[-1]).meta["skipped"] == [5, 8]
    assert told(place, name).count("the step is skipped") == 2


@pytest.mark.parametrize("name", SKIPPING)
def test_a_resumed_run_goes_on_as_the_one_that_was_not_interrupted(home: Callable[[str], Path], name: str) -> None:
    """Stopped between the two skipped steps: Adam's own count must leave the first one out."""
    place = home(name)
    assert trajectory(place / f"{name}-continued") == trajectory(place / name)
    assert weights(place / f"{name}-continued") == weights(place / name)


@pytest.mark.parametrize("name", SKIPPING_ZERO)
def test_the_bundle_has_every_gradient_under_zero_too(home: Callable[[str], Path], name: str) -> None:
    norms, expected = (gradient_norms(home(run) / run) for run in (name, "skip"))
    assert norms.keys() == expected.keys()
    assert sum(isinstance(norm, str) for norm in norms.values()) == 1
    finite = [key for key in norms if not isinstance(norms[key], str) and not isinstance(expected[key], str)]
    assert len(finite) >= len(norms) - 2
    assert [norms[key] for key in finite] == pytest.approx([expected[key] for key in finite], rel=1e-4)


def gradient_norms(run: Path) -> dict[str, Any]:
    report = json.loads((run / "logs/attempt_0001/nonfinite-step-00000005/report.json").read_text())
    norms: dict[str, Any] = report["gradient_norms"]
    return norms


def test_three_steps_in_a_row_may_be_skipped_and_not_four(place: Path) -> None:
    assert len(lines(place / "three", "skipped")) == 3
    assert "4 steps would be skipped, at most 3 in a row" in told(place, "in-a-row")


def test_an_audit_changes_nothing_and_finds_nothing_in_good_ranks(place: Path) -> None:
    assert len(trajectory(place / "audited")) == 12
    assert trajectory(place / "audited")[:4] == trajectory(place / "in-a-row")[:4]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("flipped", r"differs in weights:"),
        ("frozen", r"rank 1 on \S+ differs in weights that are not trained"),
        ("computed", r"differs in the loss of one micro-batch"),
    ],
)
def test_one_flipped_bit_is_found_at_the_next_audit(place: Path, name: str, what: str) -> None:
    text = told(place, name)
    assert re.search(what, text) and "rank 1 on" in text, text
    step = 6 if name == "computed" else 4
    assert f"error: step {step}: " in text
    assert len(lines(place / name, "step")) == step - 1

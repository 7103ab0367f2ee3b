"""Every tuning method and optimizer trains under every engine what it trains in one process.

The reference is one process without any wrapper, on the same global batches. Measured on two cores over ten steps:
losses differ by 7e-8 and gradient norms by 4e-7 in fp32, a 4-bit base included; Muon orthogonalises in bf16, which
turns such a difference into 2e-6 and 9e-5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import asked_for, cells, run_ranks
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tuning_worker import LIMIT, LOSS_LIMIT, NORM_LIMIT, adapted_base

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("tuning_worker.py")

METHODS = ("dora", "prefix", "prompt", "bitfit")  # qlora: `test_zero.py`
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
CELLS = [(engine, method) for engine in ENGINES for method in METHODS if (engine, method) != ("zero3", "dora")]
METHOD_CASES = [f"{engine}-{method}-{a}-adamw-float32" for engine, method in CELLS for a in (1, 4)]
OPTIMIZER_CASES = [f"{e}-full-1-{o}-float32" for e in ("ddp", "fsdp2") for o in ("adamw8bit", "adafactor", "muon")]
OTHER_CASES = [
    *[f"{engine}-lora-1-plus-float32" for engine in ENGINES],
    *[f"{engine}-full-1-noisy-float32" for engine in ENGINES],
    *[f"{engine}-full-1-rounded-bfloat16" for engine in ("ddp", "fsdp2")],
    *[f"{engine}-{method}-1-adamw-bfloat16" for engine in ("fsdp2", "zero3") for method in ("qlora", "prefix")],
]
CASES = METHOD_CASES + OPTIMIZER_CASES + OTHER_CASES
# Every method on two engines, every optimizer where it is sharded; the others wait in the long suite.
DEFAULT = [
    "ddp-dora-1-adamw-float32", "fsdp2-dora-4-adamw-float32", "fsdp2-prefix-1-adamw-float32",
    "zero3-prefix-4-adamw-float32", "zero2-prompt-1-adamw-float32", "zero3-prompt-1-adamw-float32",
    "fsdp2-bitfit-4-adamw-float32", "zero2-bitfit-1-adamw-float32", "fsdp2-full-1-adamw8bit-float32",
    "fsdp2-full-1-adafactor-float32", "fsdp2-full-1-muon-float32", "zero3-lora-1-plus-float32",
    "ddp-full-1-noisy-float32", "fsdp2-full-1-rounded-bfloat16", "fsdp2-prefix-1-adamw-bfloat16",
]  # fmt: skip
Found = dict[str, dict[str, list[float]]]


def reference_case(case: str) -> str:
    return "ddp-" + case.split("-", 1)[1]


def of(*parts: str, engines: tuple[str, ...] = ENGINES) -> list[object]:
    """The cells whose names hold all `parts`."""
    chosen = [case for case in CASES if all(part in case for part in parts) and case.startswith(engines)]
    return cells(chosen, [case for case in DEFAULT if case in chosen])


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(WORKER, 1, folder, [str(folder), *sorted({reference_case(case) for case in asked_for(request)})])
    return json.loads((folder / "found-1.json").read_text())


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Found, Path]]:
    """Everything that two processes found, and the folder with the exports."""
    folder = tmp_path_factory.mktemp("engines")
    run_ranks(WORKER, 2, folder, [str(folder), *asked_for(request)])
    yield json.loads((folder / "found-2.json").read_text()), folder / "exports"


@pytest.mark.parametrize("case", of())
def test_losses_and_gradient_norms_are_those_of_one_process(
    engines: tuple[Found, Path], reference: Found, case: str
) -> None:
    found, expected = engines[0][case], reference[reference_case(case)]
    _, _, _, optimizer, compute = case.split("-")
    assert len(found["straight_loss"]) == 10
    loss, norm = LOSS_LIMIT.get(optimizer, LIMIT[compute]), NORM_LIMIT.get(optimizer, LIMIT[compute])
    assert found["straight_loss"] == pytest.approx(expected["straight_loss"], rel=loss)
    assert found["straight_grad_norm"] == pytest.approx(expected["straight_grad_norm"], rel=norm)


@pytest.mark.parametrize("case", of("-1-"))
def test_resumed_run_is_bit_identical(engines: tuple[Found, Path], case: str) -> None:
    found = engines[0][case]
    assert len(found["resumed_loss"]) == 6
    assert found["resumed_loss"] == found["after_loss"]
    assert found["resumed_grad_norm"] == found["after_grad_norm"]


@pytest.mark.parametrize("case", of("-1-", engines=ENGINES[1:]))
def test_replicas_continue_what_any_engine_saved(engines: tuple[Found, Path], case: str) -> None:
    """The state of shards, read whole: it fails where what an optimizer keeps depends on how it was cut."""
    found = engines[0][case]
    _, _, _, optimizer, compute = case.split("-")
    limit = LOSS_LIMIT.get(optimizer, LIMIT[compute])
    assert found["replicas_loss"] == pytest.approx(found["after_loss"], rel=limit)


def test_methods_and_settings_change_the_numbers(reference: Found) -> None:
    """No method, optimizer or setting is another one in disguise."""
    last = {case: found["straight_loss"][-1] for case, found in reference.items() if case.endswith("-float32")}
    assert len(set(last.values())) == len(last), last


@pytest.mark.parametrize("case", of("-4-adamw-float32"))
def test_export_reloads_in_stock_libraries_with_the_trainers_logits(engines: tuple[Found, Path], case: str) -> None:
    folder, method = engines[1] / case, case.split("-")[1]
    expected = load_file(folder / "expected.safetensors")["logits"]
    if method == "bitfit":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(adapted_base(method), folder)
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(1, 25)[None]).logits[:, -24:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    rows = [line for line in (ROOT / "docs" / "tuning.md").read_text().splitlines() if line.startswith("| `")]
    named = {tuple(cell.strip(" `") for cell in row.split("|")[1:3]) for row in rows}
    assert {("tuning.method", method) for method in METHODS} <= named
    assert {("optim.name", case.split("-")[3]) for case in OPTIMIZER_CASES} <= named

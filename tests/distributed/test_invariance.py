"""The same global batch gives the same loss and gradients however it is cut over ranks and micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import asked_for, run_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("invariance_worker.py")
CUTS = [(strategy, world_size, size) for strategy in ("ddp", "fsdp2") for world_size in (1, 2) for size in (1, 2, 4)]
# Two replicas of two shards; `test_hsdp.py` has them in the default suite.
CUTS += [pytest.param("hsdp", 4, size, marks=pytest.mark.faults) for size in (1, 2)]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariance")
    for world_size in sorted({1, 2, *asked_for(request, "world_size")}):
        run_ranks(WORKER, world_size, folder, [str(folder)])
    return folder


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("strategy", "world_size", "size"), CUTS)
def test_loss_and_gradients_do_not_depend_on_the_cut(
    results: Path, method: str, strategy: str, world_size: int, size: int
) -> None:
    """Against one process, replicas, micro-batches of four: accumulation here is 8 / (ranks x micro-batch size)."""
    name = f"{strategy}-{method}-{world_size}-{size}"
    loss = json.loads((results / f"losses-{world_size}.json").read_text())[name]
    reference_loss = json.loads((results / "losses-1.json").read_text())[f"ddp-{method}-1-4"]
    assert loss == pytest.approx(reference_loss, rel=1e-6)

    found, reference = (load_file(results / f"{n}.safetensors") for n in (name, f"ddp-{method}-1-4"))
    assert found.keys() == reference.keys()
    floor = 1e-3 * sorted(g.norm().item() for g in reference.values())[len(reference) // 2]
    for key, expected in reference.items():
        assert (found[key] - expected).norm().item() <= 5e-6 * max(expected.norm().item(), floor), key


def test_gradients_are_not_trivially_zero(results: Path) -> None:
    gradients = load_file(results / "fsdp2-full-2-1.safetensors")
    assert len(gradients) > 15
    assert all(gradient.norm() > 0 for gradient in gradients.values())

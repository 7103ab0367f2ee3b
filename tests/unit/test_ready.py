"""Files for launching by hand are those that the schema makes today, and say what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sft_dist.config.loader import load_recipe
from sft_dist.config.schema import ParallelSection
from sft_dist.config.shipped import CHECKOUT
from sft_dist.launch.ready import main, ready_files

LAUNCH = CHECKOUT / "launch"


def test_the_shipped_files_are_current() -> None:
    here = {
        f"{top}/{path.name}": path.read_text()
        for top in ("accelerate", "deepspeed")
        for path in (LAUNCH / top).glob("*")
    }
    assert here == ready_files(), "run: python -m sft_dist.launch.ready"


def test_every_strategy_but_auto_has_a_file() -> None:
    strategies = {name.rpartition("/")[2].partition(".")[0].partition("_")[0] for name in ready_files()}
    schema = ParallelSection.model_json_schema()["properties"]["strategy"]["enum"]
    assert strategies == set(schema) - {"auto"}


@pytest.mark.parametrize("name", [name for name in ready_files() if name.endswith(".json")])
def test_a_deepspeed_file_becomes_its_strategy(name: str) -> None:
    words = [*Path(name).stem.split("_"), "none"]
    settings = ["model.path=gpt2", "data.sources=[{path: x.json}]", f"parallel.deepspeed_config={LAUNCH / name}"]
    parallel = load_recipe([], settings).parallel
    assert (parallel.strategy, parallel.offload) == (words[0], words[1])


def test_accelerate_reads_its_files_and_writing_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ready", str(tmp_path)])
    assert main() == 0
    for name, text in ready_files().items():
        assert (tmp_path / name).read_text() == text
        if name.endswith(".yaml"):
            said = yaml.safe_load(text)
            assert said["distributed_type"] in ("MULTI_GPU", "FSDP") and said["num_machines"] == 1

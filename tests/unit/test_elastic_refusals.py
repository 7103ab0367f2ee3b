"""What `run.deterministic: elastic` cannot be combined with is refused when the recipe is read."""

from __future__ import annotations

import pytest

from sft_dist.config.loader import load_recipe
from sft_dist.errors import ConfigError


@pytest.mark.parametrize(
    "setting", ["parallel.strategy=ddp", "parallel.strategy=zero2", "parallel.offload=optimizer", "parallel.sequence=2"]
)
def test_refused_in_one_line(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}.*set parallel") as caught:
        load_recipe([], ["model.path=x", "data.sources=[{path: x.json}]", "run.deterministic=elastic", setting])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_what_can_be_is_read(strategy: str) -> None:
    words = ["model.path=x", "data.sources=[{path: x.json}]", "run.deterministic=elastic"]
    assert load_recipe([], [*words, f"parallel.strategy={strategy}"]).run.deterministic == "elastic"

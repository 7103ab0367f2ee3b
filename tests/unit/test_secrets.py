"""A key in a recipe is refused where it stands, and not repeated."""

from __future__ import annotations

import string
from pathlib import Path

import pytest

from sft_dist.config.loader import load_recipe
from sft_dist.errors import ConfigError

BASE = ["model.path=gpt2", "data.sources.0.path=d.json"]
BODY = (string.ascii_letters + string.digits)[:36]
KEYS = {
    "password": f"https://me:{BODY}@example.com/d.json",
    "no-user": f"redis://:{BODY}@example.com/d.json",
    "aws-url": f"https://b.s3.amazonaws.com/d.json?X-Amz-Date=1&X-Amz-Signature={BODY}",
    "azure-url": f"https://a.blob.core.windows.net/d.json?sv=1&sig={BODY}",
    "hub": f"hf_{BODY}",
    "github": f"ghp_{BODY}",
    "aws": "AKIA" + "ABCDEFGHIJKLMNOP",
    "api": f"sk-{BODY}",
    "private": "-----BEGIN RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("value", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("key", ["data.sources.0.path", "run.dir", "model.config.note", "data.sources.0.columns.x"])
def test_on_the_command_line(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe([], [*BASE, f"{key}={value}"])
    assert key in str(caught.value) and "into the environment" in str(caught.value)
    assert BODY[:12] not in str(caught.value) and "ABCDEFGH" not in str(caught.value)


def test_in_a_file_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{path: gpt2}}\ndata:\n  sources:\n    - path: https://me:{BODY}@host/x.json\n")
    with pytest.raises(ConfigError, match=rf"{path}:4: data\.sources\.0\.path: holds a password in a URL"):
        load_recipe([path])


@pytest.mark.parametrize(
    "value",
    ["s3://bucket/a:b@c.json", "https://host:8080/x@1/d.json", "hf_model", "org/sk-small", "a@b.c", "runs/sig=1"],
)
def test_what_only_resembles_one_is_taken(value: str) -> None:
    load_recipe([], [*BASE, f"data.sources.0.path={value}"])

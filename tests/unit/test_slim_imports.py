"""A laptop can validate, plan and submit: these modules load fast, and neither torch nor transformers with them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from sft_dist.config.shipped import CHECKOUT

SLIM = ("config", "launch", "data/packing.py", "data/permutation.py", "data/plan.py", "errors.py", "types.py", "cli")
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "accelerate", "peft")

PROBE = """
import importlib, json, sys, time
begin = time.perf_counter()
import sft_dist
seconds, loaded = time.perf_counter() - begin, {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    loaded[name] = [heavy for heavy in json.loads(sys.argv[2]) if heavy in sys.modules]
print(json.dumps({"seconds": seconds, "loaded": loaded}))
"""


def slim_modules() -> list[str]:
    """Dotted names of all modules in SLIM; of the verbs only what is imported before a verb is known."""
    root = CHECKOUT / "sft_dist"
    files = [
        file
        for entry in SLIM
        for file in ([root / entry] if entry.endswith(".py") else sorted((root / entry).glob("*.py")))
    ]
    names = [".".join(file.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    early = {"sft_dist.cli", "sft_dist.cli.main", "sft_dist.cli.arguments", "sft_dist.cli.config", "sft_dist.cli.train"}
    return [name for name in names if not name.startswith("sft_dist.cli") or name in early]


def test_slim_modules_import_no_torch(tmp_path: Path) -> None:
    names = slim_modules()
    assert {"sft_dist.config.loader", "sft_dist.data.plan", "sft_dist.launch.local", "sft_dist.cli.main"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(names), json.dumps(HEAVY)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: heavy for name, heavy in found["loaded"].items() if heavy} == {}
    assert found["seconds"] < 0.3


def test_a_rank_that_adds_no_adapter_imports_no_peft() -> None:
    """With bitsandbytes and torch's compiler, which PEFT imports, it is a fifth of a rank's start."""
    files = (CHECKOUT / "sft_dist").rglob("*.py")
    early = [
        file for file in files if re.search(r"^(from|import) (peft|bitsandbytes)\b", file.read_text(), re.MULTILINE)
    ]
    assert early == []

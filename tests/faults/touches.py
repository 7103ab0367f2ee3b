"""What a run was made from may not change under it: `python touches.py FOLDER`.

A run is stopped after some steps; then each thing that its fingerprint covers is touched in turn, alone. Continuing is
refused with 2, in a line that names the field and both values, and the run folder is not changed by it. Untouched
again, the run goes on to its end. Prints one line per field.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
from tiny_run import write_recipe

from sft_dist.data import plan
from sft_dist.data.packing import join

HASH = r"[0-9a-f]{64}"


def recipe(folder: Path) -> Path:
    template = folder / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return write_recipe(
        folder,
        "run",
        data={"chat_template": str(template)},
        optim={"max_steps": 4},
        checkpoint={"every_steps": 2},
        eval={"generate": 0, "every_steps": 99},
        resilience={"max_restarts": 0},
    )


def edit(path: Path, old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        text = path.read_text()
        assert old in text, (path, old)
        path.write_text(text.replace(old, new, 1))

    return change


def renew_packing(rank: int, attempt: int) -> None:
    """The packing code of another version: it decides otherwise, though no setting says so."""
    pack_window = plan.pack_window

    def pack_otherwise(*given: Any) -> Any:
        packs = pack_window(*given)
        return join([packs.slice(1, len(packs)), packs.slice(0, 1)])

    plan.pack_window = pack_otherwise  # type: ignore[attr-defined]


def snapshot(run_dir: Path) -> dict[str, bytes]:
    """What must stay: everything but the lock, the logs and the resolved recipe that the launcher writes first."""
    files = (path for path in run_dir.rglob("*") if path.is_file() and "logs" not in path.parts)
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in files if p.name not in ("lock", "config.yaml")}


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path, log, run_dir = recipe(folder), folder / "log.txt", folder / "run"
    assert forked.Forked(path, 1, log, settings=["optim.stop_after_step=2"]).run() == 75, log.read_text()
    kept = folder.with_name(folder.name + "-kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    touches: dict[str, tuple[Callable[[], None], list[str], forked.Before, str]] = {
        "data.train": (edit(folder / "data.json", "10 10", "10 11"), [], forked.nothing, HASH),
        "template": (edit(folder / "template.jinja", "assistant: ", "assistant; "), [], forked.nothing, HASH),
        "tokenizer": (edit(folder / "tokenizer/tokenizer.json", '"~": 97', '"\\u00e4": 97'), [], forked.nothing, HASH),
        "plan": (nothing, [], renew_packing, HASH),
        "data.seq_len": (nothing, ["data.seq_len=256"], forked.nothing, r"\d+"),
        "run.seed": (nothing, ["run.seed=4"], forked.nothing, r"\d+"),
        "model.revision": (nothing, [f"model.revision={'0a' * 20}"], forked.nothing, r"\w+"),
        "optim.lr": (nothing, ["optim.lr=0.5"], forked.nothing, r"[\d.]+"),
    }
    for field, (touch, settings, before, value) in touches.items():
        touch()
        state = snapshot(run_dir)
        log.unlink()
        code = forked.Forked(path, 1, log, before, settings).run()
        text = log.read_text()
        assert code == 2, (field, code, text)
        said = re.search(
            rf"^sft-dist: error: (?P<field>[\w. ]+?)( \(.*\))?={value} .*was started with {value}", text, re.M
        )
        assert said and said["field"] == field, (field, text)
        assert "Traceback" not in text and snapshot(run_dir) == state, field
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        print(f"{field}: refused by name with both values", flush=True)
    assert forked.Forked(path, 1, log).run() == 0, log.read_text()
    steps = [
        json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"step",' in line
    ]
    assert steps == [1, 2, 3, 4], steps
    shutil.rmtree(kept)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Rules for the source and for names from outside: no pickle at rest, no class names, no way out of a folder."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sft_dist.checkpoint.manifest import (
    FileEntry,
    Manifest,
    fault,
    is_plain_name,
    read_manifest,
    step_name,
    write_manifest,
)
from sft_dist.config.loader import load_recipe
from sft_dist.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"pickle", "cloudpickle", "dill", "shelve", "joblib"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "marshal.load", "marshal.loads"}
# Between a process and the children it started itself, over their own pipes; nothing of it is ever on disk.
ALLOWED = {"sft_dist/data/workers.py", "sft_dist/data/fork_server.py", "sft_dist/data/stream_writer.py"}

HOSTILE = (
    "..", ".", "../x", "../../etc/passwd", "a/../../x", "/etc/passwd", "//etc/passwd", "/", "a/b", "a/", "/a", "./a",
    "a/.", "a/..", ".hidden", "..hidden", "...", "", "\0", "a\0b", "../\0", "manifest.json", "./manifest.json",
    "~", "~root/x", "$HOME/x", "${HOME}", "`id`", "$(id)", "a;b", "a|b", "a&b", "a\nb", "a\rb", "-rf", "--help",
    "C:\\x", "\\\\host\\share", "..\\x", "a\\..\\b", "file:///etc/passwd", "http://host/x", "s3://b/x",
    "%2e%2e/x", "%2e%2e%2fx", "..%c0%afx", "\u2025/x", "\uff0e\uff0e/x", "a" * 5000, "../" * 40 + "x", "/proc/self/mem",
    "/dev/zero", "nul", "con",
)  # fmt: skip


# What YAML can write, less what is a good name for a run.
IN_RECIPES = [name for name in HOSTILE if not {*"\0\n\r"} & {*name} and name not in ("nul", "con", "manifest.json")]


def risks(path: Path) -> Iterator[str]:
    """What in a module could run code out of a file or a message."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS or called.endswith(("_object", "_object_list")):
                yield called
            values = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if values.get("allow_pickle") or values.get("weights_only") is False:
                yield called


def test_nothing_in_the_source_can_unpickle_a_file() -> None:
    files = [*(ROOT / "sft_dist").rglob("*.py"), *(ROOT / "kernels" / "sft_kernels").rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): set(risks(path)) for path in files}
    assert {path for path, what in found.items() if what} == ALLOWED, found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(out, value)",
        "eval(text)",
        "load(path, weights_only=False)",
    ],
)
def test_the_search_finds_each_kind(tmp_path: Path, line: str) -> None:
    (tmp_path / "module.py").write_text(line)
    assert list(risks(tmp_path / "module.py"))


def test_there_are_fifty_hostile_names() -> None:
    assert len(set(HOSTILE)) >= 50


@pytest.mark.parametrize("name", HOSTILE, ids=[repr(name)[:24] for name in HOSTILE])
def test_a_hostile_name_in_a_manifest_reads_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    """It is refused as a name, or it is a plain one, which is then missing from the folder."""
    folder = tmp_path / step_name(1)
    folder.mkdir()
    for outside in (tmp_path / "x", tmp_path / "b"):
        outside.write_bytes(b"")
    write_manifest(folder, Manifest(1, {name: FileEntry(0, "0" * 64)}, {}, {}, {}, 1, ""))
    if is_plain_name(name):
        assert "/" not in name and name not in (".", "..")
        try:
            assert fault(folder) == f"{name}: missing"
        except OSError as error:
            assert len(name) > 255, error
    else:
        with pytest.raises(CheckpointError, match="not a plain file name"):
            read_manifest(folder)


@pytest.mark.parametrize("name", IN_RECIPES, ids=lambda n: repr(n)[:24])
def test_a_hostile_run_name_is_refused(name: str) -> None:
    """It becomes part of job names and of what trackers show."""
    with pytest.raises(ConfigError, match=r"run\.name"):
        load_recipe([], ["model.path=m", "data.sources.0.path=d", f"run.name={name!r}"])


@pytest.mark.parametrize(
    "key", ["_target_", "class", "__class__", "model._target_", "optim.__reduce__", "data.sources.0._partial_"]
)
def test_a_recipe_names_no_classes(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        load_recipe([], ["model.path=m", "data.sources.0.path=d", f"{key}=os.system"])


@pytest.mark.parametrize("revision", ["main", "v1.0", "a" * 39, "g" * 40, "A" * 40, "a" * 41, ""])
def test_remote_code_needs_a_pinned_commit(revision: str) -> None:
    with pytest.raises(ConfigError, match="40-digit commit"):
        load_recipe(
            [],
            ["model.path=m", "data.sources.0.path=d", "model.trust_remote_code=true", f"model.revision='{revision}'"],
        )


def test_remote_code_with_a_pinned_commit_is_the_users_choice() -> None:
    pinned = f"model.revision='{'0a' * 20}'"
    assert load_recipe(
        [], ["model.path=m", "data.sources.0.path=d", "model.trust_remote_code=true", pinned]
    ).model.trust_remote_code


@pytest.fixture(scope="module")
def audit():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_audit_finds_an_old_pin_an_old_installation_and_a_loose_range(
    audit, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    advisories = [{"package": "jinja2", "fixed": "3.1.6", "id": "CVE-2025-27516", "what": "w"}]
    assert list(audit.faults(advisories, {"jinja2": "3.1.6"}, [Requirement("jinja2>=3.1.6")])) == []
    assert len(list(audit.faults(advisories, {"jinja2": "3.1.5"}, []))) == 1
    assert len(list(audit.faults([], {}, [Requirement("torch>=2.4"), Requirement("jinja2")]))) == 2
    monkeypatch.setattr(audit, "installed", lambda name: "3.0")
    assert len(list(audit.faults(advisories, {}, []))) == 1


def test_the_audit_sees_the_requirements_of_setup_py(audit) -> None:  # type: ignore[no-untyped-def]
    names = {requirement.name for requirement in audit.requirements((ROOT / "setup.py").read_text())}
    assert set(audit.FLOORS) <= names

"""Every way in which a checkpoint folder can differ from what was committed is found, naming the file."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from sft_dist.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    fault,
    folder_step,
    hash_file,
    is_plain_name,
    read_manifest,
    step_name,
    write_manifest,
)
from sft_dist.errors import CheckpointError, StorageError

FILES = {"shard-00001-model-00001-of-00001.safetensors": 3000, "shard-00002-model-00001-of-00001.safetensors": 1}


def make_checkpoint(parent: Path, step: int, seed: int = 0) -> Path:
    """A committed folder with two files of seeded bytes."""
    folder = parent / step_name(step)
    folder.mkdir(parents=True)
    source = random.Random(f"{seed}:{step}")
    for name, size in FILES.items():
        (folder / name).write_bytes(source.randbytes(size))
    manifest = Manifest(
        step=step,
        files={name: hash_file(folder / name) for name in FILES},
        tensors={"model.w": TensorEntry("float32", (3, 5))},
        meta={"loss": 0.1 + 0.2, "plan": "ab"},
        versions={"torch": "2.13.0"},
        world_size=2,
        written="2026-01-31T12:00:00+0000",
    )
    write_manifest(folder, manifest)
    return folder


def test_good_folder_has_no_fault_and_reads_back_equal(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 7)
    assert fault(folder) is None
    manifest = read_manifest(folder)
    assert manifest.meta == {"loss": 0.1 + 0.2, "plan": "ab"}
    assert manifest.tensors == {"model.w": TensorEntry("float32", (3, 5))}
    assert manifest.num_bytes == 3001
    assert manifest.render() == (folder / MANIFEST_NAME).read_text()


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_every_flipped_bit_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, 7)
    path = folder / name
    original = path.read_bytes()
    source = random.Random(name)
    for bit in source.sample(range(8 * len(original)), min(400, 8 * len(original))):
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = fault(folder)
        assert found is not None and found.startswith(f"{name}: altered"), (bit, found)
    path.write_bytes(original)
    assert fault(folder) is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_every_truncation_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, 7)
    path = folder / name
    original = path.read_bytes()
    for size in {0, len(original) // 2, len(original) - 1}:
        path.write_bytes(original[:size])
        assert str(fault(folder)).startswith(f"{name}: "), size


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_a_removed_file_is_found_and_named(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, 7)
    (folder / name).unlink()
    assert str(fault(folder)).startswith(f"{name}: ")


@pytest.mark.parametrize("extra", ["shard-00003-model-00001-of-00001.safetensors", ".hidden", "subfolder"])
def test_an_extra_file_is_found_and_named(tmp_path: Path, extra: str) -> None:
    folder = make_checkpoint(tmp_path, 7)
    if extra == "subfolder":
        (folder / extra).mkdir()
    else:
        (folder / extra).write_bytes(b"")
    assert fault(folder) == f"{extra}: not listed in manifest.json"


@pytest.mark.parametrize("name", FILES)
def test_a_file_swapped_with_that_of_another_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    one, other = make_checkpoint(tmp_path, 7), make_checkpoint(tmp_path, 8)
    first, second = (one / name).read_bytes(), (other / name).read_bytes()
    (one / name).write_bytes(second)
    (other / name).write_bytes(first)
    assert fault(one) == fault(other) == f"{name}: altered (SHA-256 differs from manifest.json)"


def test_a_folder_renamed_to_another_step_is_found(tmp_path: Path) -> None:
    renamed = make_checkpoint(tmp_path, 7).rename(tmp_path / step_name(8))
    assert fault(renamed) == "manifest.json: belongs to step 7, not to step-00000008"


def test_a_link_in_place_of_a_file_is_found(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 7)
    name = next(iter(FILES))
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert fault(folder) == f"{name}: not a regular file"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".hidden", "", "manifest.json", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    assert not is_plain_name(name)
    folder = tmp_path / step_name(1)
    folder.mkdir()
    write_manifest(folder, Manifest(1, {name: FileEntry(0, "")}, {}, {}, {}, 1, ""))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        read_manifest(folder)


def test_an_unreadable_file_is_no_fault_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, 7)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sft_dist.checkpoint.manifest.hash_file", refuse)
    with pytest.raises(StorageError, match="no permission to read"):
        fault(folder)


def test_a_manifest_is_never_overwritten(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 7)
    with pytest.raises(FileExistsError):
        write_manifest(folder, read_manifest(folder))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000100", 100),
        ("step-123456789", 123456789),
        ("step-1", None),
        ("step-00000001.bad-1", None),
        (".tmp-1", None),
    ],
)
def test_only_committed_names_stand_for_a_step(name: str, step: int | None) -> None:
    assert folder_step(Path(os.sep, name)) == step

"""Every state that a power cut may leave of a save, loaded: `python powercut.py FOLDER [--seed 1]`.

strace records what one save asks of the file system, with all bytes: into a folder with two checkpoints a third is
written and the oldest deleted. Replayed whole, the record gives the folder that the save has left, byte for byte: so
nothing is missing in it. Then it is cut after each call. What an fsync had not made durable by then may be there or
not, in any combination: writes to a file (also half of one), and names made, changed and removed in a folder, each
without the others. All combinations of up to 8 such operations are tried, of more: each alone, each alone missing, and
a seeded choice. In every state a reader must find a whole checkpoint: step 2 or 3, and step 3 from the moment on that
the save has returned.

Then the same with a record in which one kind of fsync does nothing. Each time a state must be found in which the
promise is broken: the search can see what it is looking for. Prints one line per record.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from syscalls import SAVED, newest_step, prepare, save_third, struck

from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.manager import CheckpointManager

TRACED = (
    "mkdir,openat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,unlink,unlinkat,rmdir,sendfile,copy_file_range"
)
CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<([^>]*)>)?")
ALL_OF, DRAWN = 8, 40


Tree = dict[str, tuple[dict[str, str], bytes | None]]  # inode -> (entries of a folder, bytes of a file)


@dataclass(frozen=True, slots=True)
class Operation:
    """One change that a call has asked for. `where`: the file or folder whose fsync makes it durable."""

    call: int
    kind: str  # write | link | unlink | move
    where: str
    name: str = ""  # link, unlink, move: in the folder `where`
    to: str = ""  # move: the new name in the same folder
    data: bytes = b""
    offset: int = 0
    is_folder: bool = False


@dataclass(slots=True)
class Record:
    operations: list[Operation] = field(default_factory=list)
    synced: list[tuple[int, str]] = field(default_factory=list)  # (call, file or folder by its inode name)
    calls: int = 0


class Names:
    """Paths as the trace gives them -> names that stay when a folder is renamed: inode numbers, so to say."""

    def __init__(self, root: Path, before: Tree) -> None:
        self._known = {str(root / inode.lstrip("/=")): inode for inode in before}
        self._count = itertools.count()

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def add(self, path: str) -> str:
        self._known[path] = f"#{next(self._count)}"
        return self._known[path]

    def of(self, path: str) -> str:
        return self._known[path]

    def move(self, old: str, new: str) -> None:
        for path in [path for path in self._known if path == old or path.startswith(f"{old}/")]:
            self._known[new + path[len(old) :]] = self._known.pop(path)


def calls_of(text: str) -> Iterator[tuple[str, str, int, str]]:
    """(name, arguments, result, path of the result) of each call that succeeded, in the order in which they ended."""
    waiting: dict[str, str] = {}
    for line in re.sub(r"<((?:\\x[0-9a-f]{2})+)>", lambda path: f"<{_bytes(path[1]).decode()}>", text).splitlines():
        pid, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            waiting[pid] = rest.removesuffix("<unfinished ...>")
            continue
        if rest.startswith("<... "):
            rest = waiting.pop(pid) + rest.partition("resumed>")[2]
        if (match := CALL.fullmatch(rest)) and int(match[3]) >= 0:
            yield match[1], match[2], int(match[3]), match[4] or ""


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


def read_record(text: str, root: Path, before: Tree) -> Record:
    """The record of a trace; raises for a change of the folder that it does not know how to replay."""
    record, names, offsets = Record(), Names(root, before), {}

    def within(path: str) -> bool:
        return path.startswith(f"{root}/") or path == str(root)

    def entry(path: str) -> tuple[str, str]:
        parent, _, name = path.rpartition("/")
        return names.of(parent), name

    for name, arguments, result, opened in calls_of(text):
        strings = [_bytes(x) for x in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)]
        at = re.match(r"(?:\d+|AT_FDCWD)<([^>]*)>", arguments)
        path = at[1] if at else ""
        record.calls += 1
        if name in ("mkdir", "openat", "rename", "rmdir", "unlink", "unlinkat"):
            given = strings[0].decode()
            target = given if given.startswith("/") else f"{path}/{given}"
            if not within(target):
                continue
        elif not within(path) or (name == "writev" and result == 0):  # what was said: nothing
            continue
        if name == "mkdir":
            folder, leaf = entry(target)
            record.operations.append(Operation(record.calls, "link", folder, leaf, names.add(target), is_folder=True))
        elif name == "openat":
            if "O_CREAT" in arguments and "O_EXCL" not in arguments and target in names:
                raise AssertionError(f"written twice: {target}")
            if "O_CREAT" in arguments:
                folder, leaf = entry(target)
                record.operations.append(Operation(record.calls, "link", folder, leaf, names.add(target)))
            offsets[(opened, result)] = 0
        elif name == "write":
            key = (path, int(arguments.partition("<")[0]))
            data = strings[0][:result]
            record.operations.append(
                Operation(record.calls, "write", names.of(path), data=data, offset=offsets.get(key, 0))
            )
            offsets[key] = offsets.get(key, 0) + result
        elif name in ("fsync", "fdatasync"):
            record.synced.append((record.calls, names.of(path)))
        elif name == "rename":
            new = strings[1].decode()
            (folder, leaf), (other, to) = entry(target), entry(new)
            assert folder == other, "moved between folders"
            record.operations.append(Operation(record.calls, "move", folder, leaf, to))
            names.move(target, new)
        elif name in ("rmdir", "unlink", "unlinkat"):
            folder, leaf = entry(target)
            record.operations.append(Operation(record.calls, "unlink", folder, leaf))
        else:
            raise AssertionError(f"{name} of {path} cannot be replayed")
    return record


def read_tree(root: Path) -> Tree:
    """The folder as it is; inodes are named by their paths."""
    tree: Tree = {}
    for path in [root, *sorted(root.rglob("*"))]:
        inode = "/" if path == root else f"={path.relative_to(root)}"
        if path.is_dir():
            tree[inode] = ({p.name: f"={p.relative_to(root)}" for p in sorted(path.iterdir())}, None)
        else:
            tree[inode] = ({}, path.read_bytes())
    return tree


def apply(tree: Tree, operations: Sequence[Operation], torn: int | None = None) -> Tree:
    """`tree` after `operations`; of the write number `torn` among them only the first half came through."""
    made: Tree = {inode: (dict(entries), data) for inode, (entries, data) in tree.items()}
    for number, one in enumerate(operations):
        entries, data = made.setdefault(one.where, ({}, b""))
        if one.kind == "link":
            entries[one.name] = one.to
            made.setdefault(one.to, ({}, None if one.is_folder else b""))
        elif one.kind == "unlink":
            entries.pop(one.name, None)
        elif one.kind == "move":
            if one.name in entries:  # else its own making was lost
                entries[one.to] = entries.pop(one.name)
        else:
            piece = one.data[: len(one.data) // 2] if number == torn else one.data
            held = (data or b"").ljust(one.offset, b"\0")
            made[one.where] = (entries, held[: one.offset] + piece + held[one.offset + len(piece) :])
    return made


def write_tree(tree: Tree, root: Path, inode: str = "/") -> None:
    entries, data = tree[inode]
    if data is not None:
        root.write_bytes(data)
        return
    root.mkdir()
    for name, child in entries.items():
        write_tree(tree, root / name, child)


def visible(tree: Tree, inode: str = "/") -> tuple[object, ...]:
    """What a reader sees of it: two states that look alike are one."""
    entries, data = tree[inode]
    return (data,) if data is not None else tuple((name, visible(tree, entries[name])) for name in sorted(entries))


def states(record: Record, after: int, source: random.Random) -> Iterator[tuple[list[Operation], int | None]]:
    """What may have come through when the power is cut after call number `after`."""
    durable = {
        inode: max((n for n, i in record.synced if i == inode and n <= after), default=0) for _, inode in record.synced
    }
    so_far = [one for one in record.operations if one.call <= after]
    is_loose = [one.call > durable.get(one.where, 0) for one in so_far]
    loose = [number for number, it in enumerate(is_loose) if it]
    for lost in subsets(loose, source):
        yield [one for number, one in enumerate(so_far) if number not in lost], None
    for number in loose:
        if so_far[number].kind == "write":
            yield so_far, number


def subsets(loose: list[int], source: random.Random) -> Iterator[set[int]]:
    if len(loose) <= ALL_OF:
        for size in range(len(loose) + 1):
            yield from map(set, itertools.combinations(loose, size))
        return
    yield from (set(), set(loose))
    for one in loose:
        yield from ({one}, set(loose) - {one})
    for _ in range(DRAWN):
        yield {one for one in loose if source.random() < 0.5}


def cut_everywhere(record: Record, before: Tree, folder: Path, seed: int) -> tuple[int, str | None]:
    """(states looked at, the first in which the promise is broken)."""
    source, seen = random.Random(seed), set()
    for after in range(record.calls + 1):
        allowed = {3} if after == record.calls else {2, 3}
        for operations, torn in states(record, after, source):
            tree = apply(before, operations, torn)
            look = (visible(tree), after == record.calls)
            if look in seen:
                continue
            seen.add(look)
            shutil.rmtree(folder, ignore_errors=True)
            write_tree(tree, folder)
            try:
                found = newest_step(folder, set_aside=True)
            except Exception as error:
                return len(seen), f"call {after}: {error!r}"
            if found not in allowed:
                return len(seen), f"call {after}: step {found}"
    return len(seen), None


def without(record: Record, is_left_out: Callable[[str], bool]) -> Record:
    """The record as it would be if some fsyncs were forgotten."""
    return Record(record.operations, [one for one in record.synced if not is_left_out(one[1])], record.calls)


def save_behind(manager: CheckpointManager) -> int:
    """The third checkpoint by the way of a run: a thread writes it, another deletes the oldest."""
    from syscalls import tensors

    saver = BackgroundSaver(manager)
    saver.begin(3, tensors(3), {"step": 3})
    saver.close()
    return SAVED


def record_of(folder: Path, save: Callable[[CheckpointManager], int]) -> tuple[Record, Tree]:
    """Trace `save`, and prove that the replay of its record is what it has left."""
    run_dir, trace = prepare(folder), folder.with_suffix(".trace")
    before = read_tree(run_dir)
    options = ("-y", "-xx", "-s", "4000000", "-o", str(trace))
    code, said = struck(run_dir, TRACED, save, options)
    assert code == SAVED, said
    record = read_record(trace.read_text(), run_dir, before)
    replayed, left = apply(before, record.operations), read_tree(run_dir)
    assert visible(replayed) == visible(left), "the record does not give what the save has left"
    return record, before


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    ways = {"waited for": save_third, "in the background": save_behind}
    for name, save in ways.items():
        record, before = record_of(given.folder / name.replace(" ", "-"), save)
        number, broken = cut_everywhere(record, before, given.folder / "state", given.seed)
        assert broken is None, broken
        print(f"a save {name}: {record.calls} calls, {number} states, a whole checkpoint in each", flush=True)
    folder_of_all = "=checkpoints"
    moved = next(one.name for one in record.operations if one.kind == "move")
    made = next(one.to for one in record.operations if one.kind == "link" and one.name == moved)
    forgotten = {
        "the files'": lambda inode: inode not in (folder_of_all, made),
        "the new folder's": lambda inode: inode == made,
        "the parent's": lambda inode: inode == folder_of_all,
    }
    for name, is_left_out in forgotten.items():
        number, broken = cut_everywhere(without(record, is_left_out), before, given.folder / "state", given.seed)
        assert broken is not None, f"{name} fsync is not needed?"
        print(f"without {name} fsync the promise is broken, found after {number} states: {broken}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

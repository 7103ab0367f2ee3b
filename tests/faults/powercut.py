"""Every state that a power cut may leave of a save, loaded: `python powercut.py FOLDER [--seed 1]`.

strace records what an attempt asks of the file system until its first save is done, with all bytes. In a folder with
two checkpoints metrics.jsonl is rolled back and gets the next line, a third checkpoint is written, the oldest is
deleted, and more lines follow; or it is the first attempt of a run. Replayed whole, the record gives the folder that
the attempt has left, byte for byte: so nothing is missing in it. Then it is cut after each call. What an fsync had not
made durable by then may be there or not, in any combination: writes to a file (also half of one), and names made,
changed and removed in a folder, each without the others. All combinations of up to 8 such operations are tried, of
more: each alone, each alone missing, and a seeded choice. In every state a reader must find a whole checkpoint, the
newest from before or the new one, which it must be once the save has returned; and in metrics.jsonl each line that it
stands for.

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
from syscalls import SAVED, newest_step, prepare, struck, tensors

from sft_dist.checkpoint.background import BackgroundSaver
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.config.schema import Recipe
from sft_dist.observe.metrics import MetricsLog, read_metrics, roll_back
from sft_dist.observe.trackers import Trackers
from sft_dist.types import StepMetrics

TRACED = (
    "mkdir,openat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,unlink,unlinkat,rmdir,sendfile,copy_file_range"
)
CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<([^>]*)>)?")
ALL_OF, DRAWN = 8, 20
RECIPE = Recipe.model_validate({"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}})


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
    sizes = {inode: len(data or b"") for inode, (_, data) in before.items()}

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
            is_there = target in names and "O_EXCL" not in arguments
            if "O_CREAT" in arguments and is_there and "O_APPEND" not in arguments:
                raise AssertionError(f"written twice: {target}")
            if "O_CREAT" in arguments and not is_there:
                folder, leaf = entry(target)
                record.operations.append(Operation(record.calls, "link", folder, leaf, names.add(target)))
            offsets[(opened, result)] = sizes.get(names.of(target), 0) if "O_APPEND" in arguments else 0
        elif name == "write":
            key = (path, int(arguments.partition("<")[0]))
            data = strings[0][:result]
            record.operations.append(
                Operation(record.calls, "write", names.of(path), data=data, offset=offsets.get(key, 0))
            )
            offsets[key] = sizes[names.of(path)] = offsets.get(key, 0) + result
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


def cut_everywhere(record: Record, before: Tree, way: Way, folder: Path, seed: int) -> tuple[int, str | None]:
    """(states looked at, the first in which the promise is broken)."""
    source, seen = random.Random(seed), set()
    for after in range(record.calls + 1):
        allowed = {way.newest + 1} if after == record.calls else {way.newest, way.newest + 1}
        for operations, torn in states(record, after, source):
            tree = apply(before, operations, torn)
            look = (visible(tree), after == record.calls)
            if look in seen:
                continue
            seen.add(look)
            shutil.rmtree(folder, ignore_errors=True)
            write_tree(tree, folder)
            try:
                found = what_is_left(folder / way.where)
            except Exception as error:
                return len(seen), f"call {after}: {error!r}"
            if found not in allowed:
                return len(seen), f"call {after}: step {found}"
    return len(seen), None


def without(record: Record, is_left_out: Callable[[str], bool]) -> Record:
    """The record as it would be if some fsyncs were forgotten."""
    return Record(record.operations, [one for one in record.synced if not is_left_out(one[1])], record.calls)


@dataclass(frozen=True, slots=True)
class Way:
    """An attempt that goes on after the checkpoint of step `newest` (0: there is none) of the run in `where`."""

    newest: int
    save: Callable[[CheckpointManager, int, MetricsLog], None]
    where: str = "."

    def attempt(self, root: CheckpointManager) -> int:
        """What a run does from its start to its first save and two steps more."""
        run_dir, step = root.run_dir / self.where, self.newest + 1

        def settle() -> None:
            log.settle()
            log.sync()

        manager = CheckpointManager(run_dir, keep=2, ready=settle)
        roll_back(run_dir, self.newest, run_dir)
        log = MetricsLog(run_dir, Trackers(run_dir, RECIPE, print))
        log.step(line(step))
        self.save(manager, step, log)
        log.step(line(step + 2))
        return SAVED


def wait_for_save(manager: CheckpointManager, step: int, log: MetricsLog) -> None:
    manager.save(step, tensors(step), {"step": step})
    log.step(line(step + 1))


def save_behind(manager: CheckpointManager, step: int, log: MetricsLog) -> None:
    """By the way of a run: a thread writes it, another deletes the oldest, and training goes on."""
    saver = BackgroundSaver(manager)
    saver.begin(step, tensors(step), {"step": step})
    log.step(line(step + 1))
    saver.close()


WAYS = {
    "waited for": Way(2, wait_for_save),
    "in the background": Way(2, save_behind),
    "that is a run's first": Way(0, save_behind, "new"),
}


def line(step: int) -> StepMetrics:
    return StepMetrics(step, 1, 1 / step, 1 / 3, 1e-5, 10, 4, "ab", 0.5, 20.0, None, 0.1)


def what_is_left(run_dir: Path) -> int:
    """The step that an attempt goes on after, whose lines are there, in order, without any other."""
    step = newest_step(run_dir, set_aside=True)
    roll_back(run_dir, step, run_dir)
    assert [found["step"] for found in read_metrics(run_dir)] == list(range(1, step + 1)), f"lines of step {step}"
    return step


def prepare_with_metrics(folder: Path) -> Path:
    """Two checkpoints, their lines and a half one, and the empty folder of another run."""
    run_dir = prepare(folder)
    log = MetricsLog(run_dir, Trackers(run_dir, RECIPE, print))
    for step in (1, 2):
        log.step(line(step))
    log.close()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    (run_dir / "new").mkdir()
    return run_dir


def record_of(folder: Path, way: Way) -> tuple[Record, Tree]:
    """Trace an attempt, and prove that the replay of its record is what it has left."""
    run_dir, trace = prepare_with_metrics(folder), folder.with_suffix(".trace")
    before = read_tree(run_dir)
    options = ("-y", "-xx", "-s", "4000000", "-o", str(trace))
    code, said = struck(run_dir, TRACED, way.attempt, options)
    assert code == SAVED, said
    record = read_record(trace.read_text(), run_dir, before)
    replayed, left = apply(before, record.operations), read_tree(run_dir)
    assert visible(replayed) == visible(left), "the record does not give what the attempt has left"
    return record, before


def moved_to(record: Record, name: str) -> str:
    """The name before."""
    return next(one.name for one in record.operations if one.kind == "move" and one.to == name)


def made_as(record: Record, name: str) -> str:
    return next(one.to for one in record.operations if one.kind == "link" and one.name == name)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    records = {name: record_of(given.folder / name.replace(" ", "-"), way) for name, way in WAYS.items()}
    for name, (record, before) in records.items():
        number, broken = cut_everywhere(record, before, WAYS[name], given.folder / "state", given.seed)
        assert broken is None, f"{name}: {broken}"
        print(f"a save {name}: {record.calls} calls, {number} states, a whole checkpoint in each", flush=True)
    behind = "in the background"
    record, before = records[behind]
    folder_of_all, run_folder = "=checkpoints", "/"
    made, metrics = (made_as(record, name) for name in (moved_to(record, "step-00000003"), "metrics.jsonl.tmp"))
    forgotten = {
        "the files'": lambda inode: inode not in (folder_of_all, run_folder, made, metrics),
        "the new folder's": lambda inode: inode == made,
        "the parent's": lambda inode: inode == folder_of_all,
        "the lines'": lambda inode: inode == metrics,
        "the run folder's": lambda inode: inode == run_folder,
    }
    for name, is_left_out in forgotten.items():
        short = without(record, is_left_out)
        number, broken = cut_everywhere(short, before, WAYS[behind], given.folder / "state", given.seed)
        assert broken is not None, f"{name} fsync is not needed?"
        print(f"without {name} fsync the promise is broken, found after {number} states: {broken}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

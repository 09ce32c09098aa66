"""A disk that forgets what was not synced: records what a LocalStore does, and makes the states a power cut may leave.

The model is harsher than ext4, xfs or btrfs: a name in a folder is durable once that folder was fsynced after it, the
content of a file once that file was fsynced; what is not may be there or not, each name on its own and in any order,
and unsynced content may be empty, cut off, zero or whole.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = 0
"""The number of the chain's own folder. Others are numbered in the order they are made; numbers are never reused."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One change of the disk, or a report.

    Kinds: ``name`` gives number ``node`` (None: nobody) the name ``name`` in folder ``folder``; ``sync`` makes
    ``node`` durable, a folder's names or a file's ``content``; ``content`` is what an unsynced file holds;
    ``durable`` reports a snapshot.
    """

    kind: str
    folder: int = ROOT
    name: str = ""
    node: int | None = None
    content: bytes = b""
    step: int = 0


class RecordingOs:
    """The ``os`` module, with a log of everything that changes the folder ``root``. Any thread may call.

    Attributes:
        operations: the log.
        calls: how many calls there were that change the disk or sync it.
        dies_after: from the call after this one on nothing reaches the disk: the process is as good as killed.
            None: it lives.
    """

    def __init__(self, root: Path) -> None:
        self.calls = 0
        self.dies_after: int | None = None
        self.operations: list[Operation] = []
        self.folders = {ROOT}
        self._numbers = {os.stat(root).st_ino: ROOT}
        self._mutex = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def report(self, step: int, snapshot: str) -> None:
        """A snapshot was reported durable."""
        with self._mutex:
            self.operations.append(Operation("durable", name=snapshot, step=step))

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with self._mutex:
            if flags & os.O_CREAT:
                self._change()
            descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
            if flags & os.O_CREAT:
                assert flags & os.O_EXCL, "a file that may exist already is not what this records"
                self._named(path, dir_fd, self._number(os.fstat(descriptor).st_ino, new=True))
            return descriptor

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._mutex:
            self._change()
            os.mkdir(path, mode, dir_fd=dir_fd)
            number = self._number(os.stat(path, dir_fd=dir_fd).st_ino, new=True)
            self.folders.add(number)
            self._named(path, dir_fd, number)

    def link(self, source: Any, target: Any, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool) -> None:
        with self._mutex:
            self._change()
            node = self._look(source, src_dir_fd)
            os.link(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
            self._named(target, dst_dir_fd, node)

    def rename(self, source: Any, target: Any, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        with self._mutex:
            self._change()
            node = self._look(source, src_dir_fd)
            os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self._named(target, dst_dir_fd, node)
            self._named(source, src_dir_fd, None)

    def unlink(self, path: Any, *, dir_fd: int) -> None:
        with self._mutex:
            self._change()
            os.unlink(path, dir_fd=dir_fd)
            self._named(path, dir_fd, None)

    def rmdir(self, path: Any, *, dir_fd: int) -> None:
        with self._mutex:
            self._change()
            os.rmdir(path, dir_fd=dir_fd)
            self._named(path, dir_fd, None)

    def fsync(self, descriptor: int) -> None:
        with self._mutex:
            self._change()
            status = os.fstat(descriptor)
            content = b"" if stat.S_ISDIR(status.st_mode) else Path(f"/proc/self/fd/{descriptor}").read_bytes()
            os.fsync(descriptor)
            if status.st_ino in self._numbers:  # else a folder above the chain
                self.operations.append(Operation("sync", node=self._numbers[status.st_ino], content=content))

    def _change(self) -> None:
        if self.dies_after is not None and self.calls >= self.dies_after:
            raise OSError(errno.EIO, "the process is dead")
        self.calls += 1

    def _look(self, path: Any, dir_fd: int) -> int:
        """The number of a file that is about to get a name, and a note of what it holds."""
        descriptor = os.open(path, os.O_RDONLY, dir_fd=dir_fd)
        try:
            number = self._number(os.fstat(descriptor).st_ino)
            content = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            self.operations.append(Operation("content", node=number, content=content))
            return number
        finally:
            os.close(descriptor)

    def _named(self, path: Any, dir_fd: int | None, node: int | None) -> None:
        assert dir_fd is not None
        assert "/" not in str(path)
        folder = self._number(os.fstat(dir_fd).st_ino)
        self.operations.append(Operation("name", folder, str(path), node))

    def _number(self, inode: int, *, new: bool = False) -> int:
        if new:  # the system reuses inodes
            self._numbers[inode] = 1 + max(self._numbers.values(), default=ROOT)
        return self._numbers[inode]


@dataclass(slots=True)
class Disk:
    """What is durable, and what is not yet, after some operations."""

    folders: set[int]
    names: dict[tuple[int, str], int | None] = field(default_factory=dict)
    """Durable names."""
    pending: dict[tuple[int, str], list[int | None]] = field(default_factory=dict)
    """Names that may be there or not: all they have been since their folder was synced."""
    content: dict[int, bytes] = field(default_factory=dict)
    """Durable content."""
    unsynced: dict[int, bytes] = field(default_factory=dict)
    """Content of files that were never synced."""
    durable: dict[int, str] = field(default_factory=dict)
    """Snapshots reported durable: step to id."""

    def apply(self, operation: Operation) -> None:
        node = operation.node
        if operation.kind == "name":
            self.pending.setdefault((operation.folder, operation.name), []).append(node)
        elif operation.kind == "durable":
            self.durable[operation.step] = operation.name
        elif operation.kind == "content":
            assert node is not None
            if self.content.get(node) != operation.content:
                self.unsynced[node] = operation.content
        elif node in self.folders:
            for place in [place for place in self.pending if place[0] == node]:
                self.names[place] = self.pending.pop(place)[-1]
        else:
            assert node is not None
            self.content[node] = operation.content
            self.unsynced.pop(node, None)

    def after_power_loss(self, how: str, dice: random.Random) -> dict[str, bytes | None]:
        """One state that the disk may be found in: path to content, None for a folder.

        Args:
            how: ``lost``: nothing unsynced is there; ``kept``: every name is, unsynced content cut off; ``mixed``: any.
        """
        names = dict(self.names)
        for place, values in self.pending.items():
            choice = {"lost": names.get(place), "kept": values[-1]}
            names[place] = choice[how] if how in choice else dice.choice([names.get(place), *values])
        return dict(self._walk(ROOT, "", names, how, dice))

    def _walk(
        self, folder: int, prefix: str, names: dict[tuple[int, str], int | None], how: str, dice: random.Random
    ) -> Iterator[tuple[str, bytes | None]]:
        for (parent, name), node in sorted(names.items(), key=lambda item: item[0]):
            if parent != folder or node is None:
                continue
            if node in self.folders:
                yield prefix + name, None
                yield from self._walk(node, f"{prefix}{name}/", names, how, dice)
            elif node in self.unsynced or node not in self.content:
                yield prefix + name, self._mangled(self.unsynced.get(node, b""), how, dice)
            else:
                yield prefix + name, self.content[node]

    @staticmethod
    def _mangled(content: bytes, how: str, dice: random.Random) -> bytes:
        if how != "mixed":
            return content[: len(content) // 2]
        cut = dice.randrange(len(content) + 1)
        return dice.choice(
            [b"", content[:cut], bytes(len(content)), content[:cut] + bytes(len(content) - cut), content]
        )


def lay_out(state: dict[str, bytes | None], folder: Path) -> None:
    """Make a folder of a state."""
    folder.mkdir()
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)

"""A disk that forgets what was not synced, fed by strace: whatever a program writes, in whatever language, is seen.

Two models of what a power cut leaves. ``strict`` is what POSIX promises: a name is there once its folder was synced,
a file's bytes once the file was. ``ordered`` is a journal of names that was written in time, as ext4 and xfs mostly
manage: every name and every truncation is there, and bytes that were not synced are not. Neither tears a write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "open", "openat", "creat", "write", "writev", "pwrite64", "pwritev", "pwritev2", "fsync", "fdatasync", "rename",
    "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "ftruncate",
    "truncate", "fallocate", "lseek",
)  # fmt: skip
"""System calls that the model understands."""
REFUSED = ("mmap", "copy_file_range", "sendfile", "symlink", "symlinkat")
"""Others that can change a file: a program that uses one of them on the folder is not replayed."""
REPORT = "sendto"
"""How the program under test speaks to the harness: seen in its order among the rest."""
STRACE = ("-y", "-xx", "-s", str(1 << 26), "-e", "trace=" + ",".join((*CALLS, *REFUSED, REPORT)))

MODELS = ("strict", "ordered")
ROOT = 0
Tree = dict[str, bytes | None]
"""Path to content; None for a folder."""

_LINE = re.compile(r"(?P<task>\d+) +(?P<name>\w+)\((?P<inside>.*)\) += (?P<result>-?\d+)(?:<(?P<path>[^>]*)>)?")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_PLACE = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>")
_ACKNOWLEDGED = re.compile(rb"ack (\d+)\n")


class UnknownChangeError(Exception):
    """The trace has a change of the folder that the model cannot follow."""


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that succeeded."""

    task: int
    name: str
    inside: str
    """Its arguments, as strace writes them."""
    result: int
    path: str
    """Of the descriptor that it returned."""

    def texts(self) -> list[bytes]:
        """Every string among the arguments."""
        return [_bytes(found) for found in _TEXT.findall(self.inside)]

    def places(self) -> list[str]:
        """The path of every descriptor among the arguments."""
        return [_path(found) for found in _PLACE.findall(self.inside)]

    def number(self, which: int) -> int:
        """An argument that is a number, counted from the end."""
        return int(self.inside.split(", ")[which], 0)


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


def _path(shown: str) -> str:
    return os.fsdecode(_bytes(shown)) if shown.startswith("\\x") else shown


def calls(log: Path) -> Iterator[Call]:
    """The calls of a log that strace wrote with ``STRACE``, in the order in which they ended."""
    begun: dict[str, str] = {}
    with log.open() as lines:
        for line in lines:
            task, _, rest = line.rstrip("\n").partition(" ")
            rest = rest.strip()
            if rest.endswith("<unfinished ...>"):
                begun[task] = rest.removesuffix("<unfinished ...>").rstrip()
                continue
            if resumed := re.match(r"<\.\.\. \w+ resumed>", rest):
                rest = begun.pop(task, "") + rest[resumed.end() :]
            found = _LINE.match(f"{task} {rest}")
            if found is not None and int(found["result"]) >= 0:
                yield Call(int(task), found["name"], found["inside"], int(found["result"]), _path(found["path"] or ""))


@dataclass(slots=True)
class Disk:
    """A folder as it is now, and what of it is on stable storage."""

    root: str
    names: dict[tuple[int, str], int] = field(default_factory=dict)
    """Folder and name to file or folder."""
    content: dict[int, bytearray | None] = field(default_factory=lambda: {ROOT: None})
    """None for a folder."""
    position: dict[int, int] = field(default_factory=dict)
    """Where the next plain write goes: programs write a file through one descriptor at a time."""
    synced_names: dict[tuple[int, str], int] = field(default_factory=dict)
    synced: dict[str, dict[int, bytes]] = field(default_factory=lambda: {model: {} for model in MODELS})
    acknowledged: int = 0

    def apply(self, call: Call) -> bool:
        """Follow one call; whether it changed anything.

        Raises:
            UnknownChangeError: it changed the folder in a way this does not know.
        """
        if call.name == REPORT:
            said = [int(found[1]) for text in call.texts() if (found := _ACKNOWLEDGED.fullmatch(text))]
            self.acknowledged = max([self.acknowledged, *said])
            return bool(said)
        if call.name in REFUSED:
            self._refuse(call)
            return False
        if call.name in ("open", "openat", "creat"):
            return self._open(call)
        if call.name in ("rename", "renameat", "renameat2", "link", "linkat"):
            return self._name_again(call)
        if call.name in ("unlink", "unlinkat", "rmdir"):
            place = self._place(call, 0)
            return place is not None and self.names.pop(place, None) is not None
        if call.name in ("mkdir", "mkdirat"):
            place = self._place(call, 0)
            if place is not None:
                self._make(place, None)
            return place is not None
        return self._bytes_of(call)

    def after_power_loss(self, model: str) -> Tree:
        """What is found when the machine comes back."""
        names = self.synced_names if model == "strict" else self.names
        return dict(self._walk(ROOT, "", names, self.synced[model]))

    def now(self) -> Tree:
        """What every process sees."""
        present = {node: bytes(held) for node, held in self.content.items() if held is not None}
        return dict(self._walk(ROOT, "", self.names, present))

    def _walk(
        self, folder: int, prefix: str, names: dict[tuple[int, str], int], content: dict[int, bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        for (parent, name), node in sorted(names.items()):
            if parent != folder:
                continue
            if self.content[node] is None:
                yield prefix + name, None
                yield from self._walk(node, f"{prefix}{name}/", names, content)
            else:
                yield prefix + name, content.get(node, b"")

    def _bytes_of(self, call: Call) -> bool:
        """Calls on an open file or folder."""
        where = call.places()[0] if call.name != "truncate" else os.fsdecode(call.texts()[0])
        node = self._look(where)
        if node is None:
            return False
        held = self.content[node]
        if call.name in ("fsync", "fdatasync"):
            self._sync(node)
            return True
        if held is None:
            return False  # lseek on a folder: reading it
        if call.name == "lseek":
            self.position[node] = call.result
        elif call.name in ("ftruncate", "truncate"):
            self._resize(node, call.number(-1))
        elif call.name == "fallocate":
            if "KEEP_SIZE" not in call.inside:
                self._resize(node, max(len(held), call.number(-2) + call.number(-1)))
        else:
            explicit = call.name in ("pwrite64", "pwritev", "pwritev2")
            at = call.number(-2 if call.name == "pwritev2" else -1) if explicit else self.position.get(node, 0)
            data = b"".join(call.texts())[: call.result]
            if len(data) != call.result:
                raise UnknownChangeError(f"{call.name}: strace shows {len(data)} of {call.result} bytes")
            held.extend(bytes(max(0, at - len(held))))
            held[at : at + len(data)] = data
            if not explicit:
                self.position[node] = at + len(data)
        return call.name != "lseek"

    def _sync(self, node: int) -> None:
        held = self.content[node]
        if held is not None:
            for model in MODELS:
                self.synced[model][node] = bytes(held)
            return
        for place in [place for place in self.synced_names if place[0] == node]:
            del self.synced_names[place]
        self.synced_names.update({place: child for place, child in self.names.items() if place[0] == node})

    def _resize(self, node: int, size_bytes: int) -> None:
        held = self.content[node]
        assert held is not None
        del held[size_bytes:]
        held.extend(bytes(size_bytes - len(held)))
        durable = self.synced["ordered"]
        durable[node] = durable.get(node, b"")[:size_bytes]

    def _open(self, call: Call) -> bool:
        if "O_TMPFILE" in call.inside and self._look(call.places()[0]) is not None:
            raise UnknownChangeError(f"{call.name}: a file without a name")
        place = self._place(call, 0)
        if place is None:
            return False
        node = self.names.get(place)
        if node is None:
            if call.name != "creat" and "O_CREAT" not in call.inside:
                return False
            self._make(place, bytearray())
            return True
        if self.content[node] is None:
            return False
        emptied = call.name == "creat" or "O_TRUNC" in call.inside
        if emptied:
            self._resize(node, 0)
        if "O_RDONLY" not in call.inside:
            self.position[node] = len(self.content[node] or b"") if "O_APPEND" in call.inside else 0
        return emptied

    def _name_again(self, call: Call) -> bool:
        old, new = self._place(call, 0), self._place(call, 1)
        if old is None and new is None:
            return False
        node = None if old is None else self.names.get(old)
        if node is None or new is None or "RENAME_EXCHANGE" in call.inside or "AT_EMPTY_PATH" in call.inside:
            raise UnknownChangeError(f"{call.name} into or out of the folder: {call.inside[:200]}")
        if old is not None and call.name.startswith("rename"):
            del self.names[old]
        self.names[new] = node
        return True

    def _make(self, place: tuple[int, str], held: bytearray | None) -> None:
        node = len(self.content)
        self.content[node] = held
        self.names[place] = node
        self.position[node] = 0

    def _refuse(self, call: Call) -> None:
        if call.name == "mmap" and ("MAP_SHARED" not in call.inside or "PROT_WRITE" not in call.inside):
            return
        shown = [*call.places(), *(os.fsdecode(text) for text in call.texts())]
        if any(place == self.root or place.startswith(self.root + "/") for place in shown):
            raise UnknownChangeError(f"{call.name} on a file of the folder")

    def _place(self, call: Call, which: int) -> tuple[int, str] | None:
        """The folder and the name that the ``which``-th path among the arguments means; None if it is elsewhere."""
        path = os.fsdecode(call.texts()[which])
        if not path.startswith("/"):
            places = call.places()
            path = os.path.join(places[which] if which < len(places) else os.getcwd(), path)
        parent, _, name = os.path.normpath(path).rpartition("/")
        folder = self._look(parent)
        return None if folder is None else (folder, name)

    def _look(self, path: str) -> int | None:
        """What a path means now; None if it is not in the folder, or has no name any more."""
        if path == self.root:
            return ROOT
        if not path.startswith(self.root + "/"):
            return None
        node: int | None = ROOT
        for name in path[len(self.root) + 1 :].split("/"):
            node = None if node is None else self.names.get((node, name))
        return node


def read_tree(folder: Path) -> Tree:
    """A folder as it is."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def lay_out(tree: Tree, folder: Path) -> None:
    """Make a folder of a tree."""
    folder.mkdir()
    for name, content in sorted(tree.items()):
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)

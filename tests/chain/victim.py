"""A chain for attackers: made once, copied for each of them, looked at afterwards by somebody who never saw it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.errors import CiuicError, CiuicWarning
from ciuic_async.format import layout, merkle
from ciuic_async.format.entry import SnapshotEntry, decode
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.verify import VerifyReport, verify_store

STEPS = 4
SIZE = 1 + STEPS
"""Entries: the key, then one for each snapshot."""


@dataclass(frozen=True)
class Victim:
    """A chain of ``STEPS`` snapshots; the tensor of step n holds n everywhere."""

    path: Path
    key: SigningKey
    """The writer's. Attackers use it only where they stole it."""
    ids: tuple[str, ...]

    def file(self, name: str) -> Path:
        return self.path / name

    def change(self, name: str, edit: Callable[[bytes], bytes]) -> None:
        """Replace what a file holds, past all rules."""
        data = edit(self.file(name).read_bytes())
        self.put(name, data)

    def put(self, name: str, data: bytes) -> None:
        path = self.file(name)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def delete(self, *names: str) -> None:
        for name in names:
            self.file(name).unlink()

    def delete_snapshot(self, snapshot: str) -> None:
        """Every file that belongs to it; the log stays as it is."""
        for path in [path for path in self.path.rglob("*") if path.is_file()]:
            if layout.owner(path.relative_to(self.path).as_posix()) == snapshot:
                path.unlink()

    def copy(self, to: Path) -> Victim:
        shutil.copytree(self.path, to)
        return Victim(to, self.key, self.ids)

    def log(self) -> Log:
        """The log as a tool in the attacker's hands."""
        with SnapshotChain(self.path, create=False) as chain:
            origin = chain.origin
        return Log(LocalStore(self.path), origin)

    def entries(self) -> list[bytes]:
        log = self.log()
        log.refresh()
        return [log.entry_bytes(index) for index in range(len(log))]


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """Somebody else at work: what he remembers is not remembered by the reader of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "away"))
        yield


def make_victim(path: Path) -> Victim:
    """A chain that is well."""
    key, weight = SigningKey.generate(), torch.zeros(2000)
    ids = []
    with Checkpointer(path, {"w": weight}, codec="raw", rng=False, key=key.secret(), every_steps=1) as ckpt:
        for step in range(1, STEPS + 1):
            weight.fill_(step)
            pending = ckpt.step(metrics={"loss": 1 / step})
            assert pending is not None
            ids.append(pending.wait_durable(30).id)
    return Victim(path, key, tuple(ids))


def rewrite(victim: Victim, to: Path, entries: Sequence[bytes], key: SigningKey) -> Victim:
    """The same chain with another history, signed anew: what the holder of a key of the log can always do.

    Args:
        entries: all of them, from the key's on, which must announce ``key``.
    """
    made = victim.copy(to)
    shutil.rmtree(made.path / "log")
    (made.path / "log").mkdir()
    log = made.log()
    announcement, *rest = _with_their_parents(victim.entries(), entries)
    log.append(lambda _: rest, key, announce=lambda: announcement)
    return made


def _with_their_parents(before: Sequence[bytes], entries: Sequence[bytes]) -> list[bytes]:
    """Parents are leaf hashes: whoever changes an entry must change its children too, or anybody sees it."""
    names = {merkle.leaf_hash(data): _snapshot(data) for data in before}
    leaves: dict[str, bytes] = {}
    fitting = []
    for data in entries:
        entry = decode(data, 0)
        if isinstance(entry, SnapshotEntry):
            parent = None if entry.parent is None else leaves.get(names.get(entry.parent) or "")
            data = replace(entry, parent=parent).encode()
            leaves[entry.snapshot] = merkle.leaf_hash(data)
        fitting.append(data)
    return fitting


def _snapshot(data: bytes) -> str | None:
    entry = decode(data, 0)
    return entry.snapshot if isinstance(entry, SnapshotEntry) else None


def verify(path: Path) -> VerifyReport:
    """What somebody finds who has nothing but the folder."""
    store = LocalStore(path)
    try:
        return verify_store(store)
    finally:
        store.close()


def found(report: VerifyReport) -> set[tuple[str, str]]:
    """Kind and place of every problem."""
    return {(problem.kind, problem.where) for problem in report.problems}


def restored(path: Path, key: SigningKey) -> int | str:
    """The step that training goes on from, or the kind of the error that it is refused with.

    What comes back is checked: the tensor of a step holds that step everywhere.
    """
    weight = torch.zeros(2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CiuicWarning)  # of damage that is passed over
        try:
            with Checkpointer(path, {"w": weight}, rng=False, key=key.secret()) as ckpt:
                progress = ckpt.restore()
        except CiuicError as error:
            return error.kind
    assert progress is not None
    assert torch.equal(weight, torch.full((2000,), float(progress.step)))
    return progress.step

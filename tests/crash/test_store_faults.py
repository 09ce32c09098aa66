"""Any single call to a store fails, before it took effect or after: the engine above never depends on which.

A store in memory stands for those whose answers get lost on the way (a bucket, HDFS): what is visible there is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

import ciuic_async
from ciuic_async import KeepLatest
from ciuic_async import chain as chain_module
from ciuic_async.chain import Snapshot, SnapshotChain
from ciuic_async.errors import CiuicError, StoreError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Listed, Unpublished
from ciuic_async.stores.memory import MemoryStore
from tests.crash.faults import LONG, same, spread, state_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 if LONG else 240)]


class FaultyStore:
    """A store whose ``at``-th call fails.

    Args:
        inner: the real one.
        at: counted from 1; None: none fails.
        after: the call takes effect, and only its answer is lost.
    """

    def __init__(self, inner: MemoryStore, at: int | None = None, *, after: bool = False) -> None:
        self.inner = inner
        self.capabilities = inner.capabilities
        self.at = at
        self.after = after
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return self.inner.url

    def call(self, what: str, real: Callable[..., Any], *args: Any) -> Any:
        self.calls.append(what)
        if len(self.calls) != self.at:
            return real(*args)
        if self.after:
            real(*args)
        raise StoreError(f"{what}: no answer", kind="unavailable", where=what)

    def initialize(self) -> None:
        self.call("initialize", self.inner.initialize)

    def read(self, name: str, limit_bytes: int) -> bytes:
        return bytes(self.call(f"read {name}", self.inner.read, name, limit_bytes))

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        self.call(f"read_into {name}", self.inner.read_into, name, offset_bytes, buffer)

    def size(self, name: str) -> int | None:
        size: int | None = self.call(f"size {name}", self.inner.size, name)
        return size

    def list(self, prefix: str = "") -> Iterator[Listed]:
        listed: list[Listed] = self.call(f"list {prefix}", lambda: [*self.inner.list(prefix)])  # type: ignore[valid-type]
        return iter(listed)

    def create(self, name: str, data: Buffer) -> None:
        self.call(f"create {name}", self.inner.create, name, data)

    def overwrite(self, name: str, data: Buffer) -> None:
        self.call(f"overwrite {name}", self.inner.overwrite, name, data)

    def begin(self, name: str) -> Unpublished:
        return _FaultyFile(self, self.call(f"begin {name}", self.inner.begin, name))

    def publish(self, files: Sequence[Unpublished]) -> None:
        inner = [file.inner for file in files if isinstance(file, _FaultyFile)]
        self.call(f"publish {' '.join(file.name for file in files)}", self.inner.publish, inner)

    def delete(self, name: str) -> None:
        self.call(f"delete {name}", self.inner.delete, name)

    def sweep_unpublished(self, older_than_s: float) -> int:
        return int(self.call("sweep", self.inner.sweep_unpublished, older_than_s))

    def now_s(self) -> float:
        return float(self.call("now", self.inner.now_s))

    def lock(self) -> AbstractContextManager[None]:
        return self.inner.lock()

    def close(self) -> None:
        self.inner.close()


class _FaultyFile:
    def __init__(self, store: FaultyStore, inner: Unpublished) -> None:
        self.name = inner.name
        self.inner = inner
        self._store = store

    def write(self, data: Buffer, /) -> None:
        self._store.call(f"write {self.name}", self.inner.write, data)

    def filled(self) -> None:
        self._store.call(f"filled {self.name}", self.inner.filled)

    def fileno(self) -> int:
        return self.inner.fileno()

    def discard(self) -> None:
        self.inner.discard()


class Run:
    """A user's work on one store: make a chain, save twice, drop the older; and what of it was reported done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, *, after: bool) -> None:
        self.store = FaultyStore(MemoryStore(), at, after=after)
        monkeypatch.setattr(chain_module, "resolve_store", lambda url, _options: self.store)
        self.saved: dict[int, Snapshot] = {}
        self.failures: list[CiuicError] = []
        self.chain: SnapshotChain | None = None
        self._attempt(self._open)
        for step in (1, 2):
            self._attempt(self._save, step)
        self._attempt(self._prune)
        self.store.at = None

    def _attempt(self, action: Callable[..., None], *args: Any) -> None:
        if self.chain is None and action != self._open:
            self._attempt(self._open)
        try:
            action(*args)
        except CiuicError as error:
            self.failures.append(error)

    def _open(self) -> None:
        self.chain = SnapshotChain("somewhere")

    def _save(self, step: int) -> None:
        assert self.chain is not None
        self.saved[step] = ciuic_async.save(state_at(step), self.chain)

    def _prune(self) -> None:
        assert self.chain is not None
        self.chain.prune(KeepLatest(1))

    def judge(self) -> None:
        """At most the one call's work failed; all that was reported is there, for this process and for others."""
        assert len(self.failures) <= 1, self.failures
        assert all(error.kind == "unavailable" for error in self.failures), self.failures
        assert self.chain is not None
        for chain in (self.chain, SnapshotChain("somewhere", create=False)):
            report = chain.verify()
            assert report.ok, report.problems
            living = list(chain)
            assert living
            for snapshot in living:
                assert same(snapshot.load(), state_at(_step_of(snapshot)))
            # The newest reported one is there, unless one is newer whose claim took effect and whose answer got lost.
            assert self.saved[max(self.saved)].index <= living[-1].index
            assert self.saved[max(self.saved)].id == living[-1].id or self.failures
        again = ciuic_async.save(state_at(3), self.chain)
        self.chain.prune(KeepLatest(1))
        assert [snapshot.id for snapshot in SnapshotChain("somewhere", create=False)] == [again.id]
        assert same(again.load(), state_at(3))
        report = self.chain.verify()
        assert report.ok, report.problems


def _step_of(snapshot: Snapshot) -> int:
    return int(snapshot.load(only="position")["position"]["step"])


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_one_failed_call_costs_one_piece_of_work_at_most(monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Whichever call fails, before or after it took effect: one clear error at most, and history stays sound."""
    clean = Run(monkeypatch, None, after=False)
    clean.judge()
    assert not clean.failures
    count = len(Run(monkeypatch, None, after=False).store.calls)
    for position in spread(count, 160):
        run = Run(monkeypatch, position, after=after)
        try:
            run.judge()
        except BaseException as error:
            error.add_note(f"call {position} of {count}: {run.store.calls[position - 1]}")
            raise


def test_a_claim_whose_answer_was_lost_is_won(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot was written and the answer lost: the writer recognises its own claim, and nothing is saved twice."""
    calls = Run(monkeypatch, None, after=True).store.calls
    claims = [number for number, call in enumerate(calls, 1) if call.startswith(f"create {layout.SLOTS}/")]
    assert len(claims) == 3
    for position in claims:
        run = Run(monkeypatch, position, after=True)
        assert run.failures == []
        assert run.chain is not None
        assert [fact["kind"] for fact in run.chain.log()] == ["key", "snapshot", "snapshot", "prune"]


def test_an_answer_lost_after_the_claim_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and log head follow from the slot: what fails there is made up for by the next writer."""
    calls = Run(monkeypatch, None, after=True).store.calls
    derived = [
        number
        for number, call in enumerate(calls, 1)
        if call.startswith((f"publish {layout.TILES}/", f"overwrite {layout.LOG_HEAD}", f"write {layout.TILES}/"))
    ]
    assert len(derived) >= 9
    for position in derived:
        for after in (False, True):
            run = Run(monkeypatch, position, after=after)
            assert run.failures == []
            run.judge()

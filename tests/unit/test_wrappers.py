"""Stores that wrap a store: what is tried again, what is counted, what fails on purpose."""

from __future__ import annotations

import pytest

from ciuic_async.errors import CommitConflictError, StoreError
from ciuic_async.format import layout
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.stores.retry import Patience
from ciuic_async.stores.wrappers import Fault, Faulty, Metered, Retrying

NAME = layout.slot(0)


class Plan:
    """Fails the next calls of a method, and remembers which calls there were."""

    def __init__(self, method: str, *faults: Fault) -> None:
        self.calls: list[str] = []
        self._method = method
        self._faults = list(faults)

    def __call__(self, method: str, name: str) -> Fault | None:
        self.calls.append(method)
        return self._faults.pop(0) if method == self._method and self._faults else None


def busy(*, after: bool = False) -> Fault:
    return Fault(StoreError("busy", kind="throttled", where=NAME), after)


@pytest.mark.parametrize("after", [False, True])
def test_every_call_that_may_be_repeated_is(after: bool) -> None:
    """Calls whose request or answer was lost are repeated until they are answered, and happen once as seen later."""
    inside = MemoryStore()
    inside.create(NAME, b"abc")
    buffer = bytearray(2)
    for method, call, expected in (
        ("read", lambda store: store.read(NAME, 3), b"abc"),
        ("read_into", lambda store: store.read_into(NAME, 1, memoryview(buffer)), None),
        ("size", lambda store: store.size(NAME), 3),
        ("list", lambda store: [item.name for item in store.list()], [NAME]),
        ("create", lambda store: store.create(layout.slot(1), b"x"), None),
        ("overwrite", lambda store: store.overwrite(layout.LOG_HEAD, b"x"), None),
        ("delete", lambda store: (store.delete(layout.slot(1)), store.delete(layout.LOG_HEAD))[0], None),
        ("initialize", lambda store: store.initialize(), None),
        ("sweep_unpublished", lambda store: store.sweep_unpublished(0), 0),
    ):
        plan = Plan(method, busy(after=after), busy(after=after))
        assert call(Retrying(Faulty(inside, plan))) == expected  # type: ignore[no-untyped-call]
        assert plan.calls.count(method) >= (1 if method == "create" and after else 3)
    assert buffer == b"bc"
    assert [item.name for item in inside.list()] == [NAME]


def test_a_create_is_judged_by_what_is_there() -> None:
    """Other bytes under the name are a lost race, also where the first answer was an error; the own bytes are won."""
    inside = MemoryStore()
    inside.create(NAME, b"theirs")
    with pytest.raises(CommitConflictError):
        Retrying(Faulty(inside, Plan("create", busy()))).create(NAME, b"mine")
    with pytest.raises(CommitConflictError):
        Retrying(inside).create(NAME, b"longer than theirs")
    Retrying(inside).create(NAME, b"theirs")
    assert inside.read(NAME, 10) == b"theirs"


def test_a_conflict_over_nothing_ends() -> None:
    """A place that says again and again that a name exists which is not there is an error of the place."""
    conflict = Fault(CommitConflictError("exists", where=NAME))
    with pytest.raises(StoreError) as caught:
        Retrying(Faulty(MemoryStore(), Plan("create", *[conflict] * 100)), 0.2).create(NAME, b"x")
    assert caught.value.kind == "throttled"


def test_what_does_not_pass_is_not_repeated() -> None:
    """A refusal passes at once, publishing is never repeated, and the time is bounded."""
    for kind, method in (("access_denied", "read"), ("throttled", "publish")):
        fault = Fault(StoreError("no", kind=kind, where=NAME))
        plan = Plan(method, fault, fault)
        store = Retrying(Faulty(MemoryStore(), plan))
        with pytest.raises(StoreError, match="no"):
            store.read(NAME, 1) if method == "read" else store.publish([store.begin(NAME)])
        assert plan.calls.count(method) == 1
    assert not Patience(0.0).pause()
    with pytest.raises(StoreError, match="busy"):
        Retrying(Faulty(MemoryStore(), Plan("size", *[busy()] * 100)), 0.2).size(NAME)


def test_files_go_through_wrappers() -> None:
    """Unpublished files of the store inside are published through any number of wrappers."""
    inside = MemoryStore()
    store = Metered(Retrying(Faulty(inside, lambda method, name: None)))
    file = store.begin(NAME)
    file.write(b"abc")
    store.publish([file])
    with store.lock():
        assert store.now_s() > 0
    assert inside.read(NAME, 3) == b"abc"
    assert store.capabilities.orders_writers
    assert store.url == inside.url
    assert "Retrying" in repr(store)
    store.close()


def test_a_meter_counts() -> None:
    """Calls, failures and bytes are counted for each method."""
    store = Metered(Faulty(MemoryStore(), Plan("read", busy())))
    store.create(NAME, b"abcd")
    store.overwrite(layout.LOG_HEAD, b"ab")
    with pytest.raises(StoreError):
        store.read(NAME, 10)
    store.read(NAME, 10)
    store.read_into(NAME, 0, memoryview(bytearray(3)))
    meters = store.meters()
    assert (meters["read"].calls, meters["read"].failed, meters["read"].bytes) == (2, 1, 4)
    assert (meters["create"].bytes, meters["overwrite"].bytes, meters["read_into"].bytes) == (4, 2, 3)
    assert meters["read"].busy_s >= 0

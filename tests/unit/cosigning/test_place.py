"""Collecting cosignatures: what the place may do to us."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from ciuic_async.errors import SaveFailedError, StoreError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import note
from ciuic_async.transparency.cosigning import Cosigner
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.witnessing import Witnessing
from tests.witnesses import (
    QUICK,
    WAIT_S,
    Place,
    at_least,
    signers,
)


class Failing(LocalStore):
    """A local store whose overwrites fail while ``broken``."""

    broken = False
    failed = threading.Event()

    def overwrite(self, name: str, data: Buffer) -> None:
        if self.broken:
            self.failed.set()
            raise StoreError(f"{name}: told to fail", where=name)
        super().overwrite(name, data)


def test_a_full_disk_costs_no_cosignature(place: Place, witness: Callable, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[type-arg]
    """What was collected is kept in memory and written when the place works again; the witness is not asked twice."""
    address, server = witness()
    store = Failing(place.folder)
    store.broken = True
    item = Cosigner(store, Log(store, place.origin), [address], at_least(1), pace=QUICK)
    item.notice()
    assert store.failed.wait(WAIT_S)
    assert item.witnessed_size == 0
    store.broken = False
    assert item.wait(len(place.log()), WAIT_S)
    item.close()
    store.close()
    assert server.asked == 1
    assert "told to fail" in caplog.text
    assert signers(place.head(), [address]) == 1


@pytest.mark.damages
def test_a_chain_that_lost_its_newest_entries_is_told_of(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Witnesses signed more than the log has: an error says so, and what they signed stays where it is."""
    address, _ = witness()
    size = len(place.log())
    head = place.store.read(layout.LOG_HEAD, note.LIMIT_BYTES)
    item = cosigner([address], 1)
    assert item.wait(place.add(), WAIT_S)
    item.close()
    for name in (layout.slot(size), layout.tile(0, 0, size + 1), layout.entry_bundle(0, size + 1)):
        place.store.delete(name)
    place.store.overwrite(layout.LOG_HEAD, head)
    again = cosigner([address], 1)
    again.notice()
    assert again.settle(WAIT_S)
    assert "witnesses signed" in caplog.text
    assert place.size(place.witnessed()) == size + 1
    assert "lost its newest entries" in str(again.status()[0].error)


def test_a_witnessed_head_of_another_history_is_replaced(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """Rubbish and unsigned heads under log/witnessed are no reason to stop: they prove nothing."""
    address, _ = witness()
    huge = note.head_text(place.origin, 10**9, bytes(32))
    unsigned = place.key.sign(place.origin, huge).encode()
    for bad, needed in ((b"rubbish", 1), (unsigned, 1), (unsigned, 0)):
        place.store.overwrite(layout.WITNESSED, bad)
        size = place.add()
        item = cosigner([address], needed)
        assert item.wait(size, WAIT_S)
        item.close()
        assert place.size(place.witnessed()) == size


def test_a_log_head_that_was_moved_back_is_no_alarm(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A slow writer put an older head over a newer one: the slots hold all that witnesses signed, so nothing is lost,
    and what was collected for the newer one counts."""
    address, server = witness()
    old = place.store.read(layout.LOG_HEAD, note.LIMIT_BYTES)
    size = place.add()
    first = cosigner([address], 1)
    assert first.wait(size, WAIT_S)
    first.close()
    place.store.overwrite(layout.LOG_HEAD, old)
    second = cosigner([address], 1)
    assert second.wait(size, WAIT_S)
    assert server.asked == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    second.close()
    place.add()


def test_a_place_that_fails_again_is_told_of_again(
    place: Place, witness: Callable, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[type-arg]
    """Once for each time that it fails, also when it fails as before; who waits for witnesses is told why."""
    address, _ = witness()
    store = Failing(place.folder)
    item = Cosigner(store, Log(store, place.origin), [address], at_least(1), pace=QUICK)
    waiting = Witnessing(item, required=True, timeout_s=0.2)
    for _ in range(2):
        store.broken = True
        size = place.add()
        with pytest.raises(SaveFailedError, match="told to fail"):
            waiting.committed(size)
        assert caplog.text.count("told to fail") == 1
        store.broken = False
        assert item.wait(size, WAIT_S)
        assert item.settle(WAIT_S)
        assert item.problem is None
        caplog.clear()
    item.close()
    store.close()

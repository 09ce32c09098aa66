"""Slots: memory of our own that survives this process, is not inherited by fork, and comes back when it is released."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
import torch

from ciuic_async import StoreError, native
from ciuic_async.handoffs import Region
from ciuic_async.staging.budget import SlotPlan
from ciuic_async.staging.device import CpuDevice
from ciuic_async.staging.slots import FREE, HEADER, PAGE_BYTES, STAGED, Slot, SlotPool, out_of_memory

PLAN = SlotPlan(count=2, size_bytes=3 * PAGE_BYTES, windowed=False)


def _file(slot: Slot) -> bytes:
    """What another process would read through the descriptor."""
    return os.pread(slot._fd, 1 << 20, 0)


def test_another_process_can_tell_what_a_slot_holds() -> None:
    """Header, table and payload lie in the memfd: state, step, snapshot and every region."""
    slot = Slot(PAGE_BYTES)
    slot.sequence = 7
    slot.payload()[:5] = torch.arange(5, dtype=torch.uint8)
    regions = [Region(0, 5, 1, ("a",)), Region(4096, 8, 4, ("b",))]
    slot.mark(STAGED, step=12, snapshot="0123456789abcdef0123", regions=regions)
    data = _file(slot)
    magic, version, state, sequence, step, table_at, table_size, payload_at, payload_size, snapshot = (
        HEADER.unpack_from(data)
    )
    assert (magic, version, state, sequence, step) == (b"CIUICSLT", 1, STAGED, 7, 12)
    assert snapshot == b"0123456789abcdef0123"
    assert table_size == 2 * 24
    assert int.from_bytes(data[table_at + 24 : table_at + 32], "little") == 4096
    assert payload_size == slot.size_bytes == PAGE_BYTES
    assert payload_at % PAGE_BYTES == 0
    assert data[payload_at : payload_at + 5] == bytes(range(5))
    slot.mark(FREE)
    assert HEADER.unpack_from(_file(slot))[2] == FREE
    slot.close()


def test_a_table_that_does_not_fit_is_left_out() -> None:
    """More regions than there is room for leave no half table and touch no payload."""
    slot = Slot(PAGE_BYTES)
    slot.payload().fill_(3)
    slot.mark(STAGED, step=None, snapshot="0" * 20, regions=[Region(0, 1, 1, ())] * 1000)
    assert HEADER.unpack_from(_file(slot))[6] == 0
    assert HEADER.unpack_from(_file(slot))[4] == -1
    assert set(bytes(slot.memory)) == {3}
    slot.close()


def test_memory_is_page_aligned_and_read_only() -> None:
    """The writer's view cannot change what was staged."""
    slot = Slot(1)
    assert slot.address % PAGE_BYTES == 0
    assert slot.size_bytes == len(slot.memory) == PAGE_BYTES
    assert slot.memory.readonly
    with pytest.raises(TypeError):
        slot.memory[0] = 1
    slot.close()


def test_a_forked_child_does_not_inherit_slots() -> None:
    """The kernel keeps the mapping out of children ("dc"): a data loader's worker never doubles the memory."""
    slot = Slot(PAGE_BYTES)

    def mapped() -> bool:
        return "memfd:ciuic-slot" in Path("/proc/self/maps").read_text()

    assert mapped()
    flags = re.search(r"memfd:ciuic-slot.*?VmFlags:([^\n]*)", Path("/proc/self/smaps").read_text(), re.DOTALL)
    assert flags is not None
    assert " dc" in flags[1]
    slot.close()
    assert not mapped()


@pytest.mark.parametrize("natively", [True, False])
def test_touching_faults_every_page_in_and_keeps_the_content(natively: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After touch no first use of a page is left for a snapshot to pay."""
    if not natively:
        monkeypatch.setattr(native, "core", None)
    slot = Slot(64 * PAGE_BYTES)
    slot.payload()[PAGE_BYTES] = 9
    slot.touch(CpuDevice())
    found = re.search(r"memfd:ciuic-slot.*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.DOTALL)
    assert found is not None
    assert int(found[1]) * 1024 >= 64 * PAGE_BYTES
    assert slot.payload()[PAGE_BYTES] == 9
    assert slot.touched
    slot.close()


def test_resizing_grows_and_never_shrinks() -> None:
    """A larger payload or table moves; a smaller one changes nothing."""
    slot = Slot(PAGE_BYTES)
    slot.resize(10 * PAGE_BYTES - 1)
    assert slot.size_bytes == 10 * PAGE_BYTES
    slot.payload()[-1] = 5
    slot.resize(PAGE_BYTES)
    assert slot.size_bytes == 10 * PAGE_BYTES
    assert slot.payload()[-1] == 5
    slot.resize(PAGE_BYTES, table_bytes=3 * PAGE_BYTES)
    assert slot.size_bytes == 10 * PAGE_BYTES
    slot.mark(STAGED, regions=[Region(0, 1, 1, ())] * 500)
    assert HEADER.unpack_from(_file(slot))[6] == 500 * 24
    slot.close()


@pytest.mark.usefixtures("no_leaks")
def test_memory_that_cannot_be_had_is_a_store_error() -> None:
    """The message says which option lowers the need; no descriptor stays open."""
    with pytest.raises(StoreError, match="host_memory_bytes") as failure:
        Slot(1 << 60)
    assert failure.value.kind == "out_of_memory"


def test_closing_twice_is_harmless() -> None:
    """close() is idempotent, and a view that still lives stays readable."""
    slot = Slot(PAGE_BYTES)
    view = slot.memory
    slot.close()
    slot.close()
    assert view[0] == 0
    view.release()


# --- the pool ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaks")
def test_a_pool_gives_no_more_than_its_plan() -> None:
    """Two slots at most; a third waits in vain; a released one comes again with a higher number."""
    pool = SlotPool()
    first, second = pool.acquire(PLAN, 0, None), pool.acquire(PLAN, 0, 0.0)
    assert first is not None
    assert second is not None
    assert pool.acquire(PLAN, 0, 0.0) is None
    assert pool.acquire(PLAN, 0, 0.01) is None
    assert pool.held_bytes == 2 * PLAN.size_bytes
    pool.release(first)
    again = pool.acquire(PLAN, 0, 0.0)
    assert again is first
    assert again.sequence == 3
    pool.release(again)
    pool.release(second)
    pool.close()


def test_a_waiting_thread_gets_the_slot_that_is_released() -> None:
    """release() wakes who waits in acquire()."""
    pool = SlotPool()
    slots = [pool.acquire(PLAN, 0, None) for _ in range(2)]
    got: list[Slot | None] = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire(PLAN, 0, 30)))
    thread.start()
    assert slots[0] is not None
    pool.release(slots[0])
    thread.join()
    assert got == [slots[0]]
    pool.close()


def test_trimming_gives_back_what_is_too_much() -> None:
    """When the plan shrinks to one slot, the free one goes."""
    pool = SlotPool()
    slots = [pool.acquire(PLAN, 0, None) for _ in range(2)]
    for slot in slots:
        assert slot is not None
        pool.release(slot)
    kept = pool.acquire(SlotPlan(1, 8 * PAGE_BYTES, False), 0, 0.0)
    pool.trim(SlotPlan(1, 8 * PAGE_BYTES, False))
    assert kept is not None
    assert pool.held_bytes == kept.size_bytes == 8 * PAGE_BYTES
    pool.release(kept)
    pool.close()


@pytest.mark.usefixtures("no_leaks")
def test_a_closed_pool_gives_nothing_and_takes_everything_back() -> None:
    """acquire() gives None; a slot that was in use is closed when it is released."""
    pool = SlotPool()
    slot = pool.acquire(PLAN, 0, None)
    assert slot is not None
    pool.close()
    assert pool.acquire(PLAN, 0, None) is None
    pool.release(slot)
    assert slot._fd == -1


def test_preparing_touches_all_slots_in_the_background() -> None:
    """After prepare, acquire gives touched slots and waits for none that is being touched."""
    pool = SlotPool()
    pool.prepare(PLAN, 0, CpuDevice())
    slots = [pool.acquire(PLAN, 0, 0.0) for _ in range(2)]
    assert all(slot is not None and slot.touched for slot in slots)
    pool.prepare(PLAN, 0, CpuDevice())
    pool.close()


def test_no_memory_for_a_slot_leaves_the_pool_usable() -> None:
    """A plan that is too large fails and is forgotten; a smaller one works."""
    pool = SlotPool()
    for _ in range(3):
        with pytest.raises(StoreError):
            pool.acquire(SlotPlan(2, 1 << 60, False), 0, 0.0)
    assert pool.held_bytes == 0
    assert pool.acquire(PLAN, 0, 0.0) is not None
    pool.close()


def test_what_says_that_memory_is_out() -> None:
    """MemoryError and ENOMEM are told from other errors."""
    assert out_of_memory(MemoryError())
    assert out_of_memory(OSError(12, "x"))
    assert not out_of_memory(OSError(28, "x"))
    assert not out_of_memory(ValueError())

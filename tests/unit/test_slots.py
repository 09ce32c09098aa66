"""Slots: memory of our own that survives this process, is not inherited by fork, and comes back when it is released."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async import IntegrityError, StoreError, native
from ciuic_async.staging.budget import SlotPlan, plan_slots
from ciuic_async.staging.device import CpuDevice
from ciuic_async.staging.retained import Retained
from ciuic_async.staging.slot_header import DURABLE, FILLING, FREE, PAGE_BYTES, STAGED, SlotHeader
from ciuic_async.staging.slots import Slot, SlotPool, out_of_memory

PLAN = SlotPlan(count=2, size_bytes=3 * PAGE_BYTES, windowed=False)


def _file(slot: Slot) -> bytes:
    """What another process would read through the descriptor."""
    return os.pread(slot.descriptor, 1 << 20, 0)


def _header(slot: Slot) -> SlotHeader:
    data = _file(slot)
    return SlotHeader.decode(data, len(data))


def _state(slot: Slot) -> int:
    return int.from_bytes(_file(slot)[12:16], "little")


def test_another_process_can_tell_what_a_slot_holds() -> None:
    """Header, description and payload lie in the memfd: state, step, snapshot, plan and request."""
    slot = Slot(PAGE_BYTES)
    slot.sequence = 7
    slot.payload()[:5] = torch.arange(5, dtype=torch.uint8)
    plan = b"plan"
    for request in (b"request", b"another"):
        slot.mark_staged(12, "0123456789abcdef0123", plan, request)
        data = _file(slot)
        header = SlotHeader.decode(data, len(data))
        assert header == SlotHeader(STAGED, 7, 12, "0123456789abcdef0123", 4, len(request), 2 * PAGE_BYTES, PAGE_BYTES)
        assert data[PAGE_BYTES:].startswith(plan + request)
    assert header.payload_size_bytes == slot.size_bytes == PAGE_BYTES
    assert data[header.payload_at : header.payload_at + 5] == bytes(range(5))
    slot.mark(FREE)
    assert _header(slot) == replace(header, state=FREE)
    slot.close()


def test_a_description_that_does_not_fit_is_left_out() -> None:
    """More than there is room for leaves no half description and touches no payload."""
    slot = Slot(PAGE_BYTES)
    slot.payload().fill_(3)
    slot.mark_staged(None, "0" * 20, b"p" * PAGE_BYTES, b"r")
    assert _header(slot).request_size_bytes == 0
    assert _header(slot).step is None
    assert set(bytes(slot.memory)) == {3}
    slot.close()


@pytest.mark.parametrize(
    "change",
    [
        {"plan_size_bytes": 1 << 62},
        {"request_size_bytes": PAGE_BYTES},
        {"payload_at": 2 * PAGE_BYTES + 1},
        {"payload_size_bytes": 1 << 63},
        {"payload_at": PAGE_BYTES},
    ],
)
def test_a_header_that_leads_outside_of_its_slot_is_refused(change: dict[str, int]) -> None:
    """Whoever maps the memory of a dead process believes no size in it."""
    good = SlotHeader(STAGED, 1, None, "0" * 20, 7, 5, 2 * PAGE_BYTES, PAGE_BYTES)
    assert SlotHeader.decode(good.encode(), 3 * PAGE_BYTES) == good
    with pytest.raises(IntegrityError):
        SlotHeader.decode(replace(good, **change).encode(), 3 * PAGE_BYTES)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="version"):
        SlotHeader.decode(b"X" + good.encode()[1:], 3 * PAGE_BYTES)
    with pytest.raises(IntegrityError, match="shorter"):
        SlotHeader.decode(good.encode()[:-1], 3 * PAGE_BYTES)


def test_a_slot_says_at_every_moment_what_it_is_good_for() -> None:
    """Free, being filled, staged, durable: never staged while its bytes change."""
    pool = SlotPool()
    slot = pool.acquire(PLAN, 0, 0.0)
    assert slot is not None
    assert _state(slot) == FILLING
    slot.mark_staged(1, "0" * 20)
    assert _state(slot) == STAGED
    pool.release(slot, retain=True)
    assert _state(slot) == DURABLE
    again = pool.acquire(replace(PLAN, count=1), 0, 0.0)
    assert again is slot
    assert _state(slot) == FILLING
    pool.release(slot)
    assert _state(slot) == FREE
    pool.close()


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
    slot.resize(PAGE_BYTES, description_bytes=3 * PAGE_BYTES)
    assert slot.size_bytes == 10 * PAGE_BYTES
    slot.mark_staged(None, "0" * 20, b"p" * 2 * PAGE_BYTES, b"r" * PAGE_BYTES)
    assert _header(slot).request_size_bytes == PAGE_BYTES
    slot.close()


def test_a_payload_that_grows_a_little_keeps_its_memory() -> None:
    """A state that is a little larger at every snapshot does not pay for all of its memory each time: the mapping
    stays, what was touched stays touched, and only the new pages are missing. Room to grow is no memory until then."""
    slot = Slot(64 * PAGE_BYTES)
    slot.touch(CpuDevice())
    used = os.fstat(slot.descriptor).st_blocks
    address = slot.address
    slot.payload()[5] = 7
    slot.resize(66 * PAGE_BYTES)
    assert (slot.size_bytes, slot.address, slot.touched) == (66 * PAGE_BYTES, address, False)
    assert len(slot.memory) == len(slot.payload()) == 66 * PAGE_BYTES
    assert os.fstat(slot.descriptor).st_blocks == used
    slot.touch(CpuDevice())
    assert slot.touched
    assert slot.payload()[5] == 7
    slot.mark_staged(None, "0" * 20)
    assert _header(slot).payload_size_bytes == 66 * PAGE_BYTES
    slot.resize(200 * PAGE_BYTES)
    assert not slot.touched
    slot.touch(CpuDevice())
    slot.payload()[-1] = 1
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


def _fork(child: Callable[[], bytes], write_to: int) -> int:
    """Run ``child`` in a forked process that reports through a pipe and touches nothing else of this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist; the child takes no lock of theirs
        child_id = os.fork()
    if child_id == 0:
        try:
            os.write(write_to, child())
        finally:
            os._exit(0)
    return child_id


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """(the child reads here, we write here, we read here, the child writes here)."""
    ends = (*os.pipe(), *os.pipe())
    yield ends
    for end in ends:
        os.close(end)


def test_closing_gives_memory_back_though_a_child_holds_the_descriptor(pipes: tuple[int, int, int, int]) -> None:
    """A data loader's worker that was forked while the slot existed keeps none of its pages."""
    go_read, go_write, report_read, report_write = pipes
    slot = Slot(64 * PAGE_BYTES)
    slot.touch(CpuDevice())
    number = slot._fd

    def sizes() -> bytes:
        before = os.fstat(number)
        os.write(report_write, b"%d,%d;" % (before.st_size, before.st_blocks > 0))
        os.read(go_read, 1)
        after = os.fstat(number)
        return b"%d,%d" % (after.st_size, after.st_blocks)

    child = _fork(sizes, report_write)
    seen = os.read(report_read, 100)
    expected = b"%d,1;" % len(slot._map or b"")
    slot.close()
    os.write(go_write, b".")
    os.waitpid(child, 0)
    assert seen == expected
    assert os.read(report_read, 100) == b"0,0"


def test_a_child_cannot_give_away_its_parents_memory(pipes: tuple[int, int, int, int]) -> None:
    """close() in a forked child ends the child's part only."""
    _, _, report_read, report_write = pipes
    slot = Slot(PAGE_BYTES)
    slot.payload().fill_(5)

    def close() -> bytes:
        slot.close()
        return b"closed"

    os.waitpid(_fork(close, report_write), 0)
    assert os.read(report_read, 100) == b"closed"
    assert set(bytes(slot.memory)) == {5}
    slot.close()


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


@pytest.mark.usefixtures("no_leaks")
def test_preparing_needs_no_thread() -> None:
    """Where no thread can be started prepare() leaves the slots to whoever acquires them, and close() ends."""
    before = threading.stack_size()
    threading.stack_size(1 << 47)  # no address space holds such a stack: the system refuses the thread
    try:
        pool = SlotPool()
        pool.prepare(PLAN, 0, CpuDevice())
    finally:
        threading.stack_size(before)
    slots = [pool.acquire(PLAN, 0, 0.0) for _ in range(2)]
    assert [slot is not None and slot.touched for slot in slots] == [False, False]
    assert pool.acquire(PLAN, 0, 0.0) is None, "nothing is being prepared that would be waited for"
    for slot in slots:
        assert slot is not None
        pool.release(slot)
    pool.close()


@given(
    bound_pages=st.integers(12, 40),
    states=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=20),
)
def test_slots_stay_within_the_bound_however_the_state_changes(
    bound_pages: int, states: list[tuple[int, bool]]
) -> None:
    """With one bound and states that grow and shrink, slots old and new together never exceed it, nor the plan's
    number of slots in use; and when everything was released a slot can always be had."""
    pool = SlotPool()
    in_use: list[Slot] = []
    for state_pages, release in states:
        plan = plan_slots(state_pages * PAGE_BYTES, bound_pages * PAGE_BYTES, PAGE_BYTES)
        if release and in_use:
            pool.release(in_use.pop(0))
        slot = pool.acquire(plan, 0, 0.0)
        if slot is not None:
            in_use.append(slot)
            assert slot.size_bytes >= plan.size_bytes
            assert len(in_use) <= plan.count
        assert slot is not None or in_use, "a slot can be had where none is in use"
        assert pool.held_bytes <= bound_pages * PAGE_BYTES
        pool.trim(plan)
    for slot in in_use:
        pool.release(slot)
    pool.close()


@pytest.mark.usefixtures("no_leaks")
def test_a_slot_that_became_too_large_makes_room_for_two_windows() -> None:
    """One whole slot, then a state that is staged in windows: both windows exist within the bound."""
    pool = SlotPool()
    whole = pool.acquire(SlotPlan(1, 6 * PAGE_BYTES, False), 0, 0.0)
    assert whole is not None
    in_windows = SlotPlan(2, 4 * PAGE_BYTES, True)
    assert pool.acquire(in_windows, 0, 0.0) is None, "6 and 4 pages are more than 8"
    pool.release(whole)
    slots = [pool.acquire(in_windows, 0, 0.0) for _ in range(2)]
    assert [slot is not None and slot.size_bytes for slot in slots] == [4 * PAGE_BYTES] * 2
    assert pool.held_bytes == 8 * PAGE_BYTES
    for slot in slots:
        assert slot is not None
        pool.release(slot)
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


def test_retained_bytes_stay_until_the_slot_is_taken() -> None:
    """What is retained reads as it was, its slot is the last free one to be taken, and then it is gone."""
    pool = SlotPool()
    first, second = pool.acquire(PLAN, PAGE_BYTES, 0), pool.acquire(PLAN, PAGE_BYTES, 0)
    assert first is not None
    assert second is not None
    first.payload()[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    retained = pool.release(first, retain=True)
    pool.release(second)
    assert retained is not None
    assert pool.acquire(PLAN, PAGE_BYTES, 0) is second
    with retained.reading() as memory:
        assert memory is not None
        assert bytes(memory[:4]) == b"\1\2\3\4"
        del memory
    assert pool.acquire(PLAN, PAGE_BYTES, 0) is first
    with retained.reading() as memory:
        assert memory is None
    pool.release(first, retain=True)
    pool.close()


def test_revoking_waits_for_readers() -> None:
    """Nobody reads any more when revoke returns, and whoever comes later finds nothing."""
    retained = Retained(memoryview(bytearray(b"abc")))
    inside, leave = threading.Event(), threading.Event()
    order: list[object] = []

    def read() -> None:
        with retained.reading() as memory:
            inside.set()
            assert leave.wait(60)
            order.append(None if memory is None else bytes(memory))

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(60)
    revoker = threading.Thread(target=lambda: (retained.revoke(), order.append("revoked")))
    revoker.start()
    with retained.reading() as memory:  # before or after the revoker came, this reader gets all or nothing
        assert memory is None or bytes(memory) == b"abc"
    leave.set()
    reader.join()
    revoker.join()
    assert order == [b"abc", "revoked"]
    with retained.reading() as memory:
        assert memory is None

"""The training thread's part of a save: capture -> stage. What remains needs no torch (``persist``)."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ciuic_async.capture.state_tree import Captured
from ciuic_async.errors import CiuicError, SaveFailedError
from ciuic_async.handoffs import StagedWindow
from ciuic_async.staging.budget import SlotPlan, plan_slots
from ciuic_async.staging.device import Devices
from ciuic_async.staging.slots import STAGED, Slot, SlotPool
from ciuic_async.staging.stager import stage, windows

TABLE_ENTRY_BYTES = 24


@dataclass(slots=True)
class WindowQueue:
    """Windows on their way from the training thread to the writer; it holds at most as many as there are slots.

    The writer iterates; the training thread puts. ``abandon`` ends both sides.
    """

    whole: bool
    """The state lies in one window: its memory stays valid until the snapshot is durable."""
    _queue: queue.SimpleQueue[StagedWindow | CiuicError | None] = field(default_factory=queue.SimpleQueue)
    _slots: dict[int, Slot] = field(default_factory=dict)
    writer_failed: bool = False

    def put(self, window: StagedWindow, slot: Slot) -> None:
        self._slots[id(window)] = slot
        self._queue.put(window)

    def end(self) -> None:
        """No further windows."""
        self._queue.put(None)

    def abandon(self, error: CiuicError) -> None:
        """Capturing failed: the writer's iteration raises ``error``."""
        self._queue.put(error)

    def __iter__(self) -> Iterator[StagedWindow]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, CiuicError):
                raise item
            yield item

    def release(self, pool: SlotPool, window: StagedWindow) -> None:
        """Hand the slot of a window back; its memory is invalid from here on."""
        slot = self._slots.pop(id(window), None)
        if slot is not None:
            window.memory.release()
            pool.release(slot)

    def release_all(self, pool: SlotPool) -> None:
        """Hand back everything, also what was never taken."""
        self.writer_failed = True
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, StagedWindow):
                self.release(pool, item)
        for slot in list(self._slots.values()):
            pool.release(slot)
        self._slots.clear()


def slot_plan(captured: Captured, host_memory_bytes: int | None, pool: SlotPool) -> SlotPlan:
    """How many slots of which size this state gets."""
    return plan_slots(
        captured.plan.size_bytes, host_memory_bytes, captured.plan.chunk_size_bytes, held_bytes=pool.held_bytes
    )


def table_bytes(captured: Captured) -> int:
    """Room for the slot's table of regions."""
    return TABLE_ENTRY_BYTES * len(captured.plan.regions)


def stage_windows(
    captured: Captured,
    plan: SlotPlan,
    pool: SlotPool,
    devices: Devices,
    output: WindowQueue,
    *,
    first: Slot,
    timeout_s: float | None,
    mark: Callable[[Slot], None],
) -> None:
    """Copy a captured state into slots, window after window. Blocks; when it returns all is staged.

    Args:
        first: a slot already acquired; owned by ``output`` from the first ``put`` on.
        timeout_s: for each further slot, which the writer must free.
        mark: writes the slot's header.

    Raises:
        SaveFailedError: kind ``busy`` when no slot came free in time.
    """
    slot: Slot | None = first
    try:
        for base, chunks in windows(captured.plan, plan.size_bytes):
            if slot is None:
                slot = None if output.writer_failed else pool.acquire(plan, table_bytes(captured), timeout_s)
            if slot is None or output.writer_failed:
                raise SaveFailedError(
                    "the writer did not free host memory in time"
                    if not output.writer_failed
                    else "the writer failed while the state was being staged",
                    kind="busy",
                )
            slot.touch(devices.for_pinning())
            end = chunks[-1].address + chunks[-1].size_bytes
            stage(captured.sources, slot.payload(), base, end, devices)
            mark(slot)
            output.put(StagedWindow(base, chunks, slot.memory), slot)
            slot = None
    finally:
        if slot is not None:
            pool.release(slot)
    output.end()


__all__ = ["STAGED", "WindowQueue", "slot_plan", "stage_windows", "table_bytes"]

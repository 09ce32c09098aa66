"""The training thread's part of a save: capture -> stage. What remains needs no torch (``persist``)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ciuic_async.capture.state_tree import Captured
from ciuic_async.errors import CiuicError, SaveFailedError
from ciuic_async.handoffs import PlannedChunk, StagedWindow
from ciuic_async.pipeline.workers import OrderedWorkers
from ciuic_async.staging.budget import SlotPlan, plan_slots
from ciuic_async.staging.device import Devices, Pending
from ciuic_async.staging.retained import Retained
from ciuic_async.staging.slots import Slot, SlotPool
from ciuic_async.staging.stager import DigestingCopy, begin, settle, stage, windows


@dataclass(slots=True)
class WindowQueue:
    """Windows on their way from the training thread to the writer; it holds at most as many as there are slots.

    The writer iterates; the training thread puts. ``abandon`` ends both sides.
    """

    whole: bool
    """The state lies in one window: its memory stays valid until the snapshot is durable."""
    _queue: queue.SimpleQueue[StagedWindow | CiuicError | None] = field(default_factory=queue.SimpleQueue)
    _slots: dict[int, Slot] = field(default_factory=dict)
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    writer_done: bool = False

    def put(self, window: StagedWindow, slot: Slot) -> bool:
        """Hand a window and its slot over. False when the writer is gone: the slot stays the caller's."""
        with self._mutex:
            if self.writer_done:
                return False
            self._slots[id(window)] = slot
            self._queue.put(window)
            return True

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
        with self._mutex:
            slot = self._slots.pop(id(window), None)
        if slot is not None:
            window.memory.release()
            pool.release(slot)

    def release_all(self, pool: SlotPool, *, retain: bool = False) -> Retained | None:
        """The writer ends, done or failed: hand back everything, also what was never taken.

        Args:
            retain: the snapshot is durable: where it lies in one window its bytes may still be read (``SlotPool``).
        """
        with self._mutex:
            self.writer_done = True
        retained = None
        if retain and self.whole and len(self._slots) == 1:
            ((_, slot),) = self._slots.items()
            self._slots.clear()
            retained = pool.release(slot, retain=True)
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, StagedWindow):
                self.release(pool, item)
        for slot in list(self._slots.values()):
            pool.release(slot)
        self._slots.clear()
        return retained


def slot_plan(captured: Captured, host_memory_bytes: int | None, pool: SlotPool) -> SlotPlan:
    """How many slots of which size this state gets."""
    return plan_slots(
        captured.plan.size_bytes, host_memory_bytes, captured.plan.chunk_size_bytes, held_bytes=pool.held_bytes
    )


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
    description_bytes: int = 0,
    digester: OrderedWorkers | None = None,
) -> None:
    """Copy a captured state into slots, window after window. Blocks; when it returns all is staged.

    The caller then ends ``output``, or abandons it when this raised.

    Args:
        first: a slot already acquired; owned by ``output`` from the first ``put`` on.
        timeout_s: for each further slot, which the writer must free.
        mark: writes the slot's header.
        description_bytes: room for it in further slots.
        digester: to digest the chunks here too, the caller helping its threads, rather than on the writer's thread.

    Raises:
        SaveFailedError: kind ``staging_timeout`` when no slot came free in time, ``writer_failed`` when the writer gave
            up meanwhile and has reported why.
    """
    slot: Slot | None = first
    try:
        for base, chunks in windows(captured.plan, plan.size_bytes):
            if slot is None and not output.writer_done:
                slot = pool.acquire(plan, description_bytes, timeout_s)
            if output.writer_done:
                raise _writer_failed()
            if slot is None:
                raise SaveFailedError(
                    f"the writer did not free host memory within {timeout_s} s; "
                    "use a faster disk or raise host_memory_bytes",
                    kind="staging_timeout",
                )
            slot.touch(devices.for_pinning())
            end = chunks[-1].address + chunks[-1].size_bytes
            window = StagedWindow(base, chunks, slot.memory)
            what = captured.sources, slot.payload(), base, end, devices
            copy = None if digester is None else DigestingCopy.of(*what)
            if copy is None:
                stage(*what)
            if digester is not None:
                copied = [chunk for chunk in chunks if chunk.region not in captured.left_out]
                found = digester.map(copy or window.digest_of, copied, deadline_s=0.0)
                digests = dict(zip(copied, found, strict=True))
                window = replace(window, digests=tuple(digests.get(chunk, b"") for chunk in chunks))
            mark(slot)
            if not output.put(window, slot):
                raise _writer_failed()
            slot = None
    finally:
        if slot is not None:
            pool.release(slot)


def begin_staging(
    captured: Captured, slot: Slot, devices: Devices, storages: Collection[int]
) -> tuple[tuple[PlannedChunk, ...], list[Pending]]:
    """Copy a captured state into one slot, but for ``storages``, whose copies only begin.

    Args:
        captured: not empty, and no larger than the slot; drop it no earlier than the copies are complete.
        storages: addresses of the storages that stay as they are until the copies' ``order`` or ``wait`` returned.

    Returns:
        All chunks, and what is under way. On a GPU that includes the copies of what may change at once: the current
        stream waits for them, and the host does not. When this raises, no copy is under way.
    """
    ((base, chunks),) = windows(captured.plan, captured.plan.size_bytes)
    slot.touch(devices.for_pinning())
    payload, end = slot.payload(), captured.plan.size_bytes
    later = np.isin(captured.sources.storage_addresses(), list(storages))
    pending = begin(captured.sources.select(~later), payload, base, end, devices)
    try:
        for work in pending:
            work.order()
        pending += begin(captured.sources.select(later), payload, base, end, devices, in_background=True)
    except BaseException:
        settle(pending)
        raise
    return chunks, pending


def _writer_failed() -> SaveFailedError:
    return SaveFailedError("the writer failed while the state was being staged", kind="writer_failed")

"""Slots: memory mappings that hold one staged snapshot (or one window of it).

A slot is a memfd, so that its bytes can outlive this process in another one that holds the descriptor
(``staging.slot_header`` has the layout). Mappings are not inherited by fork: a data loader worker must not double the
memory, nor ever see a half-copied state.

Who may touch the payload: the training thread from ``acquire`` until it hands the slot on, then the writer until it
calls ``release``. ``SlotPool`` is thread-safe.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

from ciuic_async import native
from ciuic_async.errors import StoreError
from ciuic_async.events import logger
from ciuic_async.format.segment import align_up
from ciuic_async.staging.budget import SlotPlan
from ciuic_async.staging.device import Device
from ciuic_async.staging.retained import Retained
from ciuic_async.staging.slot_header import DURABLE, FILLING, FREE, PAGE_BYTES, STAGED, SlotHeader, set_state

HEADROOM_PART = 8
"""A slot's mapping is longer than its payload by this part of it."""

__all__ = ["Holder", "Slot", "SlotPool", "out_of_memory"]


class Holder(Protocol):
    """Somebody else who holds the memory of slots, so that it outlives this process. Must not raise."""

    def hold(self, slot: Slot) -> None:
        """A slot was made: ``slot.descriptor`` is its memory."""

    def let_go(self, slot: Slot) -> None:
        """It is about to be closed."""


class Slot:
    """One mapping. ``memory`` is the payload; ``payload`` the same as a uint8 tensor."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = 0
        self.sequence = 0
        self._maker = os.getpid()
        self._fd = os.memfd_create("ciuic-slot", os.MFD_CLOEXEC)
        self._map: mmap.mmap | None = None
        self._payload_at = 0
        self._description_capacity = 0
        self._plan = b""
        self._pinned: Device | None = None
        self._touched_bytes = 0
        self.retained: Retained | None = None
        try:
            self.resize(size_bytes)
        except BaseException:
            self.close()
            raise

    def resize(self, size_bytes: int, description_bytes: int = PAGE_BYTES) -> None:
        """Grow the payload to ``size_bytes``. Its content is lost, as are views of it. Never shrinks."""
        size_bytes = max(self.size_bytes, align_up(size_bytes, PAGE_BYTES))
        fits = description_bytes <= self._description_capacity
        if size_bytes == self.size_bytes and fits:
            return
        if self._map is not None and fits and self._payload_at + size_bytes <= len(self._map):
            self._unpin()
            self.size_bytes = size_bytes
            return
        self._unmap()
        self._description_capacity = align_up(max(description_bytes, self._description_capacity), PAGE_BYTES)
        self._plan = b""
        self.size_bytes = size_bytes
        self._payload_at = PAGE_BYTES + self._description_capacity
        # What lies behind the payload is no memory until it is touched. A state that holds a list of all losses grows
        # at every snapshot, and finding its memory anew takes several times as long as copying it.
        total = self._payload_at + align_up(size_bytes + size_bytes // HEADROOM_PART, PAGE_BYTES)
        try:
            os.ftruncate(self._fd, 0)  # give the old pages back before asking for new ones
            os.ftruncate(self._fd, total)
            self._map = mmap.mmap(self._fd, total, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            self.size_bytes = 0
            self._touched_bytes = 0
            raise StoreError(
                f"cannot map {total} bytes of host memory for staging: {error}; lower host_memory_bytes",
                kind="out_of_memory",
            ) from error
        with suppress(OSError):
            self._map.madvise(mmap.MADV_DONTFORK)
        self._touched_bytes = 0

    @property
    def address(self) -> int:
        """Where the payload starts in this process."""
        assert self._map is not None
        return int(np.frombuffer(self._map, dtype=np.uint8).ctypes.data) + self._payload_at

    @property
    def memory(self) -> memoryview:
        """The payload, read-only."""
        assert self._map is not None
        return memoryview(self._map)[self._payload_at :][: self.size_bytes].toreadonly()

    def payload(self) -> torch.Tensor:
        """The payload as a writable 1-D uint8 tensor."""
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=self._payload_at, count=self.size_bytes)

    def touch(self, device: Device) -> None:
        """Fault every page in and pin the memory: once, so that no snapshot pays for it. Keeps the content."""
        if self.touched:
            return
        start = self._touched_bytes
        if native.core is not None:
            native.core.touch(self.address + start, self.size_bytes - start)
        else:
            pages = self.payload().numpy()[start::PAGE_BYTES]
            pages |= 0
        self._pinned = device if device.pin(self.payload()) else None
        self._touched_bytes = self.size_bytes

    @property
    def touched(self) -> bool:
        """Whether every page of the payload is there."""
        return self._touched_bytes == self.size_bytes

    def mark(self, state: int) -> None:
        """Change what it says of its state, and nothing else."""
        assert self._map is not None
        set_state(self._map, state)

    def mark_staged(self, step: int | None, snapshot: str, plan: bytes = b"", request: bytes = b"") -> None:
        """Say what it holds, for whoever finds the memory after this process died. The state comes last.

        Args:
            plan, request: the description. Without one, or without room for it, nobody can make use of the memory.
        """
        assert self._map is not None
        if len(plan) + len(request) > self._description_capacity:
            plan = request = b""
        self.mark(FILLING)
        middle = PAGE_BYTES + len(plan)
        if plan is not self._plan:  # snapshots of one structure have the very same plan
            self._map[PAGE_BYTES:middle] = plan
            self._plan = plan
        self._map[middle : middle + len(request)] = request
        head = SlotHeader(
            FILLING, self.sequence, step, snapshot, len(plan), len(request), self._payload_at, self.size_bytes
        ).encode()
        self._map[: len(head)] = head
        self.mark(STAGED)

    @property
    def descriptor(self) -> int:
        """Of its memory; the slot's own, closed with it."""
        return self._fd

    def forget(self) -> None:
        """Its bytes are about to change: whoever read what was retained stops."""
        retained, self.retained = self.retained, None
        if retained is not None:
            retained.revoke()

    def close(self) -> None:
        """Give the memory back. Idempotent; views of the payload must be gone, but for what is retained."""
        self.forget()
        unmapped = self._unmap()
        if self._fd >= 0:
            # Forked children (data loader workers) hold the descriptor too, and would keep every page alive. Where a
            # view still lives its next read would be a SIGBUS; in a child the memory is the parent's to give back.
            if unmapped and os.getpid() == self._maker:
                with suppress(OSError):
                    os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1

    def _unmap(self) -> bool:
        """Remove the mapping; False when a view keeps it alive."""
        if self._map is None:
            return True
        self._unpin()
        mapping, self._map = self._map, None
        try:
            mapping.close()
        except BufferError:  # a view still lives; the mapping goes with it
            return False
        return True

    def _unpin(self) -> None:
        if self._pinned is not None:
            self._pinned.unpin(self.payload())
            self._pinned = None


class SlotPool:
    """The slots of one checkpointer.

    However plans change, slots grow and are made only within ``count * size_bytes`` of the plan at hand: all slots
    together stay within the bound that every plan was made for.
    """

    def __init__(self, holder: Holder | None = None) -> None:
        self._condition = threading.Condition()
        self._holder = holder
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._sequence = 0
        self._closed = False
        self._preparing: threading.Thread | None = None
        self._being_prepared = 0

    @property
    def held_bytes(self) -> int:
        """Payload bytes of all slots."""
        with self._condition:
            return sum(slot.size_bytes for slot in self._slots)

    def prepare(self, plan: SlotPlan, description_bytes: int, device: Device) -> None:
        """Make the slots, and fault in and pin them on a background thread, once. Errors show when one is acquired."""
        with self._condition:
            if self._closed or self._preparing is not None:
                return
            slots: list[Slot] = []
            with suppress(StoreError, OSError):
                while len(slots) < plan.count and (slot := self._take(plan, description_bytes, timeout_s=0.0)):
                    slots.append(slot)
            self._being_prepared = len(slots)
            thread = threading.Thread(target=self._touch, args=(slots, device), name="ciuic-touch", daemon=True)
            try:
                thread.start()
            except (
                RuntimeError
            ) as error:  # no threads left, or the interpreter ends: whoever acquires them touches them
                logger.debug("slots are not prepared: %s", error)
                self._being_prepared = 0
                for slot in slots:
                    self.release(slot)
                return
            self._preparing = thread

    def _touch(self, slots: list[Slot], device: Device) -> None:
        for slot in slots:
            try:
                if not self._closed:
                    slot.touch(device)
            except Exception as error:  # it will be tried again by whoever acquires the slot, and reported then
                logger.debug("a slot could not be prepared: %s", error)
            with self._condition:
                self._being_prepared -= 1
                self.release(slot)

    def acquire(self, plan: SlotPlan, description_bytes: int, timeout_s: float | None) -> Slot | None:
        """A free slot of at least the plan's size, or None after ``timeout_s`` (None waits for ever).

        Raises:
            StoreError: no memory.
        """
        slot = self._take(plan, description_bytes, timeout_s)
        if slot is not None:
            with self._condition:
                self._sequence += 1
                slot.sequence = self._sequence
        return slot

    def _take(self, plan: SlotPlan, description_bytes: int, timeout_s: float | None) -> Slot | None:
        """``acquire`` without a sequence number. Slots being prepared are waited for beside the timeout."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._condition:
            while True:
                if self._closed:
                    return None
                slot = self._reuse_or_make(plan, description_bytes)
                if slot is not None:
                    return slot
                if self._being_prepared:
                    self._condition.wait()
                    continue
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._condition.wait(left)

    def _reuse_or_make(self, plan: SlotPlan, description_bytes: int) -> Slot | None:
        """A slot of at least the plan's size, or None when another must be released first. The lock is held."""
        if len(self._slots) - len(self._free) >= plan.count:
            return None
        size = align_up(plan.size_bytes, PAGE_BYTES)
        bound = plan.count * size
        # The largest last, and of two alike the one whose bytes nobody wants any more.
        free = sorted(self._free, key=lambda slot: (slot.size_bytes, slot.retained is None))

        # The state shrank, or is staged in windows now: a slot that is too large leaves no room for the missing ones.
        while (
            free
            and free[-1].size_bytes > size
            and (missing := plan.count - len(self._slots)) > 0
            and self.held_bytes + missing * size > bound
        ):
            self._drop(free.pop())

        slot = free.pop() if free else None
        growth = size if slot is None else max(size - slot.size_bytes, 0)
        while growth and free and self.held_bytes + growth > bound:
            self._drop(free.pop(0))
        if growth and self.held_bytes + growth > bound:
            return None

        another = slot is None
        if slot is not None and slot.retained and len(self._slots) < plan.count and self.held_bytes + size <= bound:
            another = True  # its bytes may still be of use, and there is room
        if another:
            try:
                fresh = Slot(size)
            except (StoreError, OSError):
                if slot is None:
                    raise
            else:
                self._slots.append(fresh)
                slot = fresh
                if self._holder is not None:
                    self._holder.hold(fresh)
        assert slot is not None
        if slot in self._free:
            self._free.remove(slot)
        slot.forget()
        try:
            slot.resize(size, description_bytes)
        except BaseException:
            self._drop(slot)
            raise
        slot.mark(FILLING)  # before its first byte changes: what it said of its content is no longer so
        return slot

    def release(self, slot: Slot, *, retain: bool = False) -> Retained | None:
        """Hand a slot back. Views of it must be dropped before it is acquired again.

        Args:
            retain: its bytes may still be read until it is acquired again, or the pool closed; of all free slots it is
                the last to be taken.

        Returns:
            The way to read them, if asked for.
        """
        with self._condition:
            if self._closed:
                self._close(slot)
                return None
            slot.mark(DURABLE if retain else FREE)
            if retain:
                for other in self._free:  # one is enough: the parent of the next snapshot
                    other.forget()
                slot.retained = Retained(slot.memory)
            self._free.append(slot)
            self._condition.notify_all()
            return slot.retained

    def trim(self, plan: SlotPlan) -> None:
        """Give back free slots beyond the plan's number: the state grew, and memory has a bound."""
        with self._condition:
            while len(self._slots) > plan.count and self._free:
                self._drop(self._free[-1])

    def close(self) -> None:
        """Give all memory back; slots still in use follow when they are released."""
        with self._condition:
            self._closed = True
            preparing = self._preparing
        if preparing is not None:
            preparing.join()
        with self._condition:
            for slot in self._free:
                self._close(slot)
            self._free.clear()
            self._slots.clear()
            self._condition.notify_all()

    def _drop(self, slot: Slot) -> None:
        with self._condition:
            for slots in (self._slots, self._free):
                if slot in slots:
                    slots.remove(slot)
            self._close(slot)
            self._condition.notify_all()

    def _close(self, slot: Slot) -> None:
        if self._holder is not None:
            self._holder.let_go(slot)
        slot.close()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)

"""A slot's memory as somebody sees it who did not make it."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from contextlib import suppress

from ciuic_async.errors import IntegrityError
from ciuic_async.format.manifest import Manifest
from ciuic_async.handoffs import StagedWindow
from ciuic_async.pipeline.handover import Handover, decode
from ciuic_async.segments.scratch import unmap_pages
from ciuic_async.staging.slot_header import DURABLE, PAGE_BYTES, STAGED, SlotHeader


class HeldSlot:
    """Read-only access to a slot through a descriptor, which stays the caller's.

    Only for slots that nobody writes to: their trainer is dead.
    """

    def __init__(self, header: SlotHeader, memory: memoryview) -> None:
        self.header = header
        self._memory = memory

    def forget(self) -> None:
        """The last use: give the mapping back on a thread of its own, without the GIL.

        The kernel takes a while for it (0.6 GB: 16 ms), for which nobody has to wait. Whoever still has a part of the
        memory sees the same bytes.
        """
        memory, self._memory = self._memory, memoryview(b"")
        with suppress(RuntimeError):  # a limit of the machine: then it goes with the last reference
            threading.Thread(target=unmap_pages, args=(memory,), name="ciuic-unmap", daemon=True).start()

    @classmethod
    def open(cls, descriptor: int) -> HeldSlot | None:
        """What the slot holds; None when that is no whole snapshot, or one that nobody described.

        Raises:
            OSError: it cannot be mapped.
            IntegrityError: it is no slot of this version.
        """
        size = os.fstat(descriptor).st_size
        if size < PAGE_BYTES:
            return None
        # Private: nothing done here reaches the slot. Writable, since torch looks into no other memory in peace.
        memory = memoryview(mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))
        if not any(memory[:PAGE_BYTES]):  # made and never filled
            return None
        header = SlotHeader.decode(memory, size)
        if header.state not in (STAGED, DURABLE) or not header.request_size_bytes:
            return None
        return cls(header, memory)

    def handover(self) -> Handover:
        """The description. Raises IntegrityError."""
        middle = PAGE_BYTES + self.header.plan_size_bytes
        return decode(self._memory[PAGE_BYTES:middle], self._memory[middle : middle + self.header.request_size_bytes])

    def window(self, handover: Handover) -> StagedWindow:
        """The payload: the whole snapshot, but for what the request remembers. Raises IntegrityError."""
        payload = self._memory[self.header.payload_at :][: self.header.payload_size_bytes]
        plan = handover.request.plan
        # Before chunks are counted: a region that claims more than there is would have any number of them.
        if any(region.address + region.size_bytes > len(payload) for region in plan.regions):
            raise IntegrityError(f"staging memory: {len(payload)} bytes are not all of the snapshot", kind="bad_slot")
        return StagedWindow(0, tuple(plan.chunks()), payload)

    def chunks(self, manifest: Manifest) -> Mapping[bytes, memoryview]:
        """By digest the bytes of a manifest's chunks, if it is this snapshot's; whether they are right is to be seen.

        Raises:
            IntegrityError: the description cannot be read.
        """
        handover = self.handover()
        window = self.window(handover)
        listed = list(manifest.chunks())
        if [size for _, size in listed] != [chunk.size_bytes for chunk in window.chunks]:
            return {}
        left_out = handover.request.remembered
        return {
            digest: window.bytes_of(chunk)
            for (digest, _), chunk in zip(listed, window.chunks, strict=True)
            if chunk.region not in left_out
        }

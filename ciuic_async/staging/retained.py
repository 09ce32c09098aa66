"""The bytes of a durable snapshot that still lie in a slot: bases for deltas, for as long as nobody needs the slot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Retained:
    """Read access that its owner can end at any time. Thread-safe.

    Args:
        memory: the slot's payload, read-only. Released by ``revoke``.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory: memoryview | None = memory
        self._readers = 0
        self._changed = threading.Condition()

    @contextmanager
    def reading(self) -> Iterator[memoryview | None]:
        """The bytes while the context lasts, or None when they are gone. Keep it short: ``revoke`` waits for it."""
        with self._changed:
            memory = self._memory
            if memory is not None:
                self._readers += 1
        try:
            yield memory
        finally:
            if memory is not None:
                with self._changed:
                    self._readers -= 1
                    self._changed.notify_all()

    def revoke(self) -> None:
        """End all access: nobody reads the bytes any more when this returns. Idempotent."""
        with self._changed:
            memory, self._memory = self._memory, None
            self._changed.wait_for(lambda: self._readers == 0)
        if memory is not None:
            memory.release()

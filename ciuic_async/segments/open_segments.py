"""Segments that stay open from read to read, a bounded number of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ciuic_async.stores.base import DirectFile, DirectReads


@dataclass(slots=True, eq=False)
class _Open:
    file: DirectFile
    readers: int = 0


class OpenSegments:
    """Opens each segment on first use; the least recently used one is closed when there are more than ``limit``.

    Any thread may call. While more than ``limit`` are being read at one time, as many are open.
    """

    def __init__(self, store: DirectReads, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._mutex = threading.Lock()
        self._files: dict[str, _Open] = {}
        """In order of last use."""

    @contextmanager
    def lease(self, path: str) -> Iterator[DirectFile]:
        """An open segment that stays open for the time of the context. Raises like ``DirectReads.open_direct``."""
        with self._mutex:
            used = self._files.pop(path, None) or _Open(self._store.open_direct(path))
            self._files[path] = used
            used.readers += 1
        try:
            yield used.file
        finally:
            with self._mutex:
                used.readers -= 1
                self._close_some(self._limit)

    def close(self) -> None:
        """Close all; nobody may hold a lease. Idempotent."""
        with self._mutex:
            self._close_some(0)

    def _close_some(self, limit: int) -> None:
        idle = [path for path, used in self._files.items() if not used.readers]
        for path in idle[: max(0, len(self._files) - limit)]:
            self._files.pop(path).file.close()

"""Is a snapshot in the mirror? Asked of the mirror itself: a note of ours that says so may be old, or lie."""

from __future__ import annotations

import threading

from ciuic_async.format import layout
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.mirroring.view import MirrorView
from ciuic_async.pipeline.commit import locator_generations, read_root, resolve
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.transparency.log import Log


class Presence:
    """Looks for snapshots in a mirror. Any thread may call; calls wait for each other.

    Args:
        pair: the chain and its mirror.
        origin: the chain's name.
    """

    def __init__(self, pair: FallbackStore, origin: str) -> None:
        self._mirror = pair.there
        self._view = MirrorView(pair.here, pair.there)
        self._log = Log(self._view, origin, quiet=True)
        self._mutex = threading.Lock()

    def size(self) -> int:
        """Entries of the mirror's log, verified. Errors as ``Log.refresh``."""
        with self._mutex:
            return self._log.refresh().size

    def holds(self, index: int, entry: SnapshotEntry) -> bool:
        """Whether its entry is in the mirror's log, and every file that it needs is there with its size.

        Raises:
            StoreError: the mirror cannot be asked.
            IntegrityError: its log, or what says which files are needed, is damaged.
        """
        with self._mutex:
            if index >= len(self._log):
                self._log.refresh()
            if index >= len(self._log) or self._log.entry_bytes(index) != entry.encode():
                return False
        if self._mirror.size(layout.slot(0)) is None or self._mirror.size(entry.manifest.path) is None:
            return False
        found = resolve(self._view, entry)
        wanted = [(segment.path, segment.size_bytes) for segment in found.segments]
        wanted += [(part.path, part.size_bytes) for part in (*read_root(self._view, entry).parts, entry.manifest)]
        return bool(locator_generations(self._mirror, entry.snapshot)) and all(
            self._mirror.size(name) == size for name, size in wanted
        )

"""How much room a place has, where it can say so."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore


@dataclass(frozen=True, slots=True)
class Room:
    """What this user may still take. ``free_files`` is None where the file system does not count files."""

    free_bytes: int
    total_bytes: int
    free_files: int | None


def room(store: Store) -> Room | None:
    """The room that a local store's file system has, quotas of the folder included where it counts them so.

    None for other places, and where the system does not say. One call of the system; it may hang where the disk does.
    """
    if not isinstance(store, LocalStore):
        return None
    try:
        status = os.statvfs(existing(Path(store.url)))
    except OSError:
        return None
    files = status.f_favail if status.f_files else None
    return Room(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, files)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path

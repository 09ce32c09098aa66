"""How much room a place has, where it can say so."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Room:
    """What this user may still take. ``free_files`` is None where the file system does not count files."""

    free_bytes: int
    total_bytes: int
    free_files: int | None


def room(folder: str | None) -> Room | None:
    """The room that a folder's file system has, its quota included where the file system counts it so.

    None for places that are no folder (None), and where the system does not say. May hang where the disk does.
    """
    if folder is None:
        return None
    try:
        status = os.statvfs(existing(Path(folder)))
    except OSError:
        return None
    files = status.f_favail if status.f_files else None
    return Room(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, files)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises where a folder on the way is closed
        path = path.parent
    return path

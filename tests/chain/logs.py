"""Logs for the tests of this folder: grown fast, in batches, and remembered at every size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ciuic_async.format import entry, layout, merkle
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import slots
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log, LogHead

ORIGIN = "ciuic.dev/chain/" + "7" * 32
COMMON = entry.Common("0" * 20, "2026-01-01T00:00:00.000Z", "host", "test")
BATCH = 4096
"""Entries of one slot: some 600 kB."""


def note_entry(number: int) -> bytes:
    """A small entry that no other number has."""
    return entry.NoteEntry(COMMON, f"entry {number}").encode()


def grow(log: Log, key: SigningKey, size: int) -> None:
    """Append until the log has ``size`` entries. Each call adds one slot, or one for each ``BATCH``."""
    announcement = entry.KeyEntry(COMMON, key.vkey(log.origin)).encode()
    if log.refresh().size == 0:
        # A log of its key alone: `append` always has something to say behind it.
        store = log._store
        content = slots.encode_slot(LogHead(0, merkle.EMPTY_ROOT), [announcement], key, log.origin)
        store.create(layout.slot(0), content)
        log.repair(key)
    while len(log) < size:
        numbers = range(len(log), min(size, len(log) + BATCH))
        batch = [note_entry(number) for number in numbers]
        log.append(lambda _, batch=batch: batch, key, announce=lambda: announcement)  # type: ignore[misc]


@dataclass
class Grown:
    """A log that was looked at while it grew."""

    folder: Path
    key: SigningKey
    log: Log
    store: Store
    sizes: list[int] = field(default_factory=list)
    heads: dict[int, bytes] = field(default_factory=dict)
    """The log head's file at each size."""

    @property
    def vkey(self) -> str:
        return self.key.vkey(ORIGIN)

    def at(self, size: int) -> Path:
        """The folder ``log`` as it was at this size."""
        return self.folder / str(size) / "log"

    def entries(self) -> list[bytes]:
        return [self.log.entry_bytes(index) for index in range(len(self.log))]


def grow_in_steps(folder: Path, sizes: Sequence[int]) -> Grown:
    """A log on disk that stops at each size; files are immutable or replaced whole, so links keep what was there."""
    chain = folder / "chain"
    store = LocalStore(chain)
    store.initialize()
    grown = Grown(folder, SigningKey.generate(), Log(store, ORIGIN), store, list(sizes))
    for size in sizes:
        grow(grown.log, grown.key, size)
        shutil.copytree(chain / "log", grown.at(size), copy_function=os.link)
        grown.heads[size] = (chain / layout.LOG_HEAD).read_bytes()
    return grown

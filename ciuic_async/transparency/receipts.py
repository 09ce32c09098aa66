"""Receipts: for each snapshot the proof that its entry is in a head that a quorum of witnesses signed.

C2SP tlog-proof. Derived files: any key holder makes them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from ciuic_async.errors import FormatVersionError, IntegrityError, NotFoundError
from ciuic_async.format import entry as entries_format
from ciuic_async.format import layout
from ciuic_async.format.entry import Entry, PruneEntry, SnapshotEntry
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note, proof
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import KeyName, Vkey
from ciuic_async.transparency.receipt import LIMIT_BYTES, Receipt

_PER_TURN = 64
_BACK = 1024
"""Entries before the newest head that are looked at for receipts that an earlier process could not write."""


def shown_head(store: Store, log: Log, name: str) -> tuple[bytes, int, bytes]:
    """A signed head as the store shows it in the file ``name``: the whole note, its size and its root.

    Raises:
        NotFoundError: there is no such file.
        IntegrityError: it is damaged, or no key of this log signed it.
    """
    data = store.read(name, note.LIMIT_BYTES)
    known = {(log.origin, key_id): note.parse_vkey(vkey) for key_id, vkey in log.known_keys().items()}
    return data, *note.parse_head(note.verify(data, known, name).text, log.origin, name)


def make_receipt(store: Store, log: Log, index: int) -> bytes | None:
    """A receipt of one entry under the newest head that witnesses signed, if it holds the entry, else the newest.

    None where no head holds it yet. Errors as ``shown_head``.
    """
    with log.lock:
        with suppress(NotFoundError, IntegrityError):  # what witnesses signed can be collected again
            made = _receipt_under(store, log, index, layout.WITNESSED)
            if made is not None:
                return made
        with suppress(NotFoundError):
            return _receipt_under(store, log, index, layout.LOG_HEAD)
    return None


def _receipt_under(store: Store, log: Log, index: int, name: str) -> bytes | None:
    data, size, root = shown_head(store, log, name)
    if not index < size <= len(log):
        return None
    path = log.inclusion(index, size)
    proof.check_inclusion(index, size, log.leaf_hash(index), path, root)
    return Receipt(index, tuple(path), data, log.entry_bytes(index)).encode()


class Receipts:
    """Writes the receipts of the newest witnessed head, a few at a time. Belongs to one thread.

    Args:
        known: the witnesses whose signatures count when an existing receipt is compared with a new one.
    """

    def __init__(self, store: Store, log: Log, known: Mapping[KeyName, Vkey]) -> None:
        self._store = store
        self._log = log
        self._known = known
        self._size = 0
        self._text = ""
        self._note = b""
        self._first: int | None = None
        """The first entry that no earlier head covered."""
        self._next = 0
        self._pruned: set[str] = set()
        self._scanned = 0

    @property
    def behind(self) -> bool:
        """Whether ``catch_up`` has something to do."""
        return self._next < self._size

    def cover(self, size: int, text: str, head_note: bytes) -> None:
        """A quorum signed the head ``text`` of ``size`` entries. One that is smaller than an earlier one is ignored."""
        if size < self._size or size > len(self._log) or head_note == self._note:
            return
        if self._first is None:
            self._first = self._next = self._find_first(size)
        elif text != self._text:
            self._first = self._next  # what an earlier head could not be given in time gets this one's
        else:
            self._next = max(self._first, size - _PER_TURN)  # more signatures: the newest receipts get them too
        self._size, self._text, self._note = size, text, head_note

    def catch_up(self) -> None:
        """Write some of the receipts that are missing or have fewer signatures.

        Raises:
            StoreError: the place failed; the next call goes on.
        """
        if not self.behind:
            return
        end = min(self._size, self._next + _PER_TURN)
        self._scan_prunes()
        for index in range(self._next, end):
            entry = self._entry(index, b'"kind":"snapshot"')
            if isinstance(entry, SnapshotEntry) and entry.snapshot not in self._pruned:
                self._write(index, layout.receipt(entry.snapshot))
            self._next = index + 1

    def _write(self, index: int, name: str) -> None:
        if self._signatures(name) >= self._count(self._note):
            return
        path = tuple(self._log.inclusion(index, self._size))
        self._store.overwrite(name, Receipt(index, path, self._note, self._log.entry_bytes(index)).encode())

    def _scan_prunes(self) -> None:
        """Which snapshots need no receipt any more; each entry is looked at once."""
        if self._next >= self._scanned:
            self._pruned.clear()  # of snapshots that have theirs, or never will
        for index in range(max(self._next, self._scanned), len(self._log)):
            entry = self._entry(index, b'"kind":"prune"')
            if isinstance(entry, PruneEntry):
                self._pruned.update(entry.snapshots)
        self._scanned = len(self._log)

    def _find_first(self, size: int) -> int:
        """Receipts are written in order: those that a process that died did not write are the newest."""
        for index in range(size - 1, max(0, size - _BACK) - 1, -1):
            entry = self._entry(index, b'"kind":"snapshot"')
            if isinstance(entry, SnapshotEntry) and self._store.size(layout.receipt(entry.snapshot)) is not None:
                return index + 1
        return max(0, size - _BACK)

    def _signatures(self, name: str) -> int:
        """How many witnesses signed the head in an existing receipt; -1 where there is no good one."""
        try:
            return self._count(Receipt.decode(self._store.read(name, LIMIT_BYTES), name).head)
        except (NotFoundError, IntegrityError):
            return -1

    def _count(self, head_note: bytes) -> int:
        try:
            parsed = note.parse(head_note, "receipt")
        except IntegrityError:
            return -1
        found = {
            vkey
            for item in parsed.signatures
            if (vkey := self._known.get((item.name, item.key_id))) and vkey.verifies(parsed.text, item.signature)
        }
        return len(found)

    def _entry(self, index: int, kind: bytes) -> Entry | None:
        """An entry if it is of this kind; canonical JSON has exactly these bytes. None too for a later version's."""
        data = self._log.entry_bytes(index)
        if kind not in data:
            return None
        with suppress(FormatVersionError):
            return entries_format.decode(data, index)
        return None

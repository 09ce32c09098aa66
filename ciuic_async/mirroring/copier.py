"""One turn of copying a chain to its mirror (docs/design/006-mirror.md). One thread at a time; nothing here waits.

For each slot the order is that of the commit: what its snapshots need, then the slot's own bytes by create-once, then
tiles and log head. So the mirror's log is at every moment a prefix of the chain's, and whoever reads it alone can check
all of it. How far it is, the mirror itself says; nothing is remembered elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256

from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError, StoreError, UsageError
from ciuic_async.events import logger
from ciuic_async.format import layout
from ciuic_async.format.chain_file import LIMIT_BYTES as CHAIN_FILE_LIMIT_BYTES
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.entry import NoteEntry, PruneEntry, SnapshotEntry
from ciuic_async.format.entry import decode as decode_entry
from ciuic_async.mirroring import evidence
from ciuic_async.mirroring.derived import publish_derived
from ciuic_async.mirroring.sending import Sender, SourceError
from ciuic_async.mirroring.view import MirrorView
from ciuic_async.pipeline.history import is_live, live_snapshots
from ciuic_async.retention import collect
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note, slots
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log, LogHead

HEADS_EVERY = 16
"""Groups of slots after which the mirror gets tiles and a log head in a long first copy."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A slot that the mirror lacks, with the living snapshots in it by index.

    ``frees``: its entries let files go, or say that files were moved.
    """

    name: str
    snapshots: tuple[tuple[int, SnapshotEntry], ...]
    frees: bool


class _PrunedMeanwhileError(Exception):
    """Retention took away what was being copied: look again at what there is to copy."""


class Copier:
    """Copies a chain to its mirror.

    Args:
        local: the chain.
        mirror: where the copy is, or will be.
        chain_file: the bytes of the chain's ``ciuic.json``.
        key: the key that signs this chain here, None where there is none: for heads of a copy under way.
        pause: called often; what it raises ends the turn.
        arrived: told of each snapshot that is whole in the mirror, its entry included.
    """

    def __init__(
        self,
        local: Store,
        mirror: Store,
        chain_file: bytes,
        *,
        key: Callable[[], SigningKey | None] = lambda: None,
        pause: Callable[[], None] = lambda: None,
        arrived: Callable[[int, SnapshotEntry], None] = lambda index, entry: None,
        read_back: bool = False,
    ) -> None:
        self._local = local
        self._mirror = mirror
        self._chain_file = chain_file
        self._key = key
        self._pause = pause
        self._arrived = arrived
        self.origin = ChainFile.decode(chain_file).origin
        self._view = MirrorView(local, mirror)
        self._here = Log(local, self.origin, quiet=True)  # the chain's own object warns
        self._there = Log(self._view, self.origin, quiet=True)
        self._published = Log(mirror, self.origin, quiet=True)  # without the view: to see which files it lacks
        self._sender = Sender(local, mirror, pause=pause, read_back=read_back)
        self._opened = False
        self._looked_back = False
        self._tidied = False
        self._freed = False
        """There are prune entries in the mirror whose files are not deleted there yet."""
        self.lacking: dict[str, str] = {}
        """Living snapshots whose entry is in the mirror or on its way, and whose data is not; and why."""

    @property
    def replicated_size(self) -> int:
        """Entries of the log that are in the mirror, as of the last look."""
        return len(self._there)

    @property
    def log_size(self) -> int:
        """Entries of the chain's log, as of the last look."""
        return len(self._here)

    @property
    def sent_bytes(self) -> int:
        """Bytes of data that were sent by this object."""
        return self._sender.sent_bytes

    def turn(self) -> None:
        """Copy all that the chain has and the mirror lacks.

        Raises:
            StoreError: a place failed. The next turn goes on where this one stopped.
            IntegrityError: kind ``mirror_fork`` or ``mirror_ahead``: the mirror holds another history; evidence was
                kept. Or the chain itself is damaged where its log is.
            UsageError: kind ``mirror_of_another``: nothing was written.
        """
        self._open()
        self.look()
        if not self._looked_back:
            self._look_back()
            self._looked_back = True
        groups = 0
        while self.replicated_size < self.log_size:
            self._pause()
            try:
                self._copy(self._next_group())
            except _PrunedMeanwhileError:
                self._here.refresh()
                continue
            groups += 1
            if groups % HEADS_EVERY == 1:
                self._publish_derived()
            self._here.refresh()
        self._publish_derived()
        self._tidy()

    def look(self) -> None:
        """See how far chain and mirror are, and that they are one history. Raises as ``turn``; writes nothing."""
        try:
            there = self._there.refresh()
        except IntegrityError as error:
            raise self._contradiction(f"its log does not hold: {error}", error.where) from error
        here = self._here.refresh()  # after the mirror: what other nodes copied meanwhile is here by now
        if there.size <= here.size:
            if self._here.root_at(there.size) != there.root:
                raise self._contradiction("it holds other bytes than the chain here", self._first_other_slot())
        elif self._there.root_at(here.size) != here.root:
            raise self._contradiction("it holds other bytes than the chain here", self._first_other_slot())
        else:
            raise IntegrityError(
                f"{self._mirror.url}: the mirror has {there.size} entries, the chain {here.size}: the newest were lost "
                "here, or another copy of this chain is written to. Nothing is copied; opening the chain again with "
                "mirror= brings home what is missing",
                kind="mirror_ahead",
                where=layout.slot(here.size),
            )

    # --- the beginning ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """See that the mirror is of this chain; a new one gets ``ciuic.json``."""
        if self._opened:
            return
        found = read_chain_file(self._mirror)
        if found is None:
            if self._mirror.size(layout.slot(0)) is not None:
                raise self._contradiction(f"it has a log, and no {layout.CHAIN_FILE}", layout.slot(0))
            self._mirror.initialize()
            with suppress(CommitConflictError):
                self._mirror.create(layout.CHAIN_FILE, self._chain_file)
            found = read_chain_file(self._mirror)
        check_same_chain(self._mirror, found, self._chain_file)
        self._opened = True

    def _look_back(self) -> None:
        """Once for each process: what the mirror should have by now and lacks, whoever took it, is sent again."""
        end = self.replicated_size
        there = {file.name: file.size_bytes for folder in _FOLDERS for file in self._mirror.list(folder)}
        names = sorted(name for file in self._local.list(layout.SLOTS) if (name := file.name) not in there)
        for name in names:
            number = layout.slot_number(name)
            if number is not None and number < end:
                self._put_slot(name)
        living = {line.entry.snapshot: line for line in live_snapshots(self._here) if line.index < end}
        missing: set[str] = set()
        for file in (file for folder in _FOLDERS[1:] for file in self._local.list(folder)):
            owner = layout.owner(file.name)
            if owner is not None and there.get(file.name) != file.size_bytes:
                missing.add(owner)
        # A segment of a snapshot that was pruned may be needed by any of those that live.
        for snapshot, line in living.items():
            if snapshot in missing or missing - living.keys():
                self._send(line.entry)

    # --- slots --------------------------------------------------------------------------------------------------------

    def _next_group(self) -> list[_Step]:
        """The next slot; and if data of its snapshots is gone here, those up to the prune entry that says so.

        Their data is copied first, then come all their slots: so there is hardly a moment at which the mirror has the
        entry of a snapshot, no data of it, and no prune entry.
        """
        living = {line.entry.snapshot for line in live_snapshots(self._here)}
        known = {key_id: note.parse_vkey(vkey) for key_id, vkey in self._here.known_keys().items()}
        steps: list[_Step] = []
        owed: set[str] = set()
        at = self.replicated_size
        while at < self.log_size and (not steps or owed):
            name = layout.slot(at)
            slot = slots.check_slot(self._read_slot(name), LogHead(at, self._here.root_at(at)), self.origin, known.get)
            entries = [decode_entry(data, at + number) for number, data in enumerate(slot.entries)]
            snapshots = [(at + n, entry) for n, entry in enumerate(entries) if isinstance(entry, SnapshotEntry)]
            owed |= {entry.snapshot for _, entry in snapshots if entry.snapshot not in living}
            for entry in entries:
                if isinstance(entry, PruneEntry):
                    owed.difference_update(entry.snapshots)
            wanted = tuple((index, entry) for index, entry in snapshots if entry.snapshot in living)
            steps.append(_Step(name, wanted, any(isinstance(entry, PruneEntry | NoteEntry) for entry in entries)))
            at += len(entries)
        return steps

    def _copy(self, steps: list[_Step]) -> None:
        for step in steps:
            for _, entry in step.snapshots:
                self._send(entry)
        if any(step.frees for step in steps):
            self._send_moved()
            self._freed = True
        for step in steps:
            self._put_slot(step.name)
        before = self.replicated_size
        self._there.refresh()
        if self.replicated_size <= before:
            raise StoreError(
                f"{self._mirror.url}: {steps[0].name} was created and cannot be read: is another copy at work on it?",
                kind="copy_lost",
                where=steps[0].name,
            )
        for step in steps:
            for index, entry in step.snapshots:
                if entry.snapshot not in self.lacking:
                    self._arrived(index, entry)

    def _send(self, entry: SnapshotEntry) -> None:
        """A snapshot's data. What is damaged here is told of and left out: the newer ones must not wait for it."""
        try:
            self._sender.snapshot(entry)
            self.lacking.pop(entry.snapshot, None)
        except SourceError as error:
            self._here.refresh()
            if not is_live(self._here, entry.snapshot):
                raise _PrunedMeanwhileError from error
            if entry.snapshot not in self.lacking:
                logger.error("snapshot %s is not replicated, it is damaged here: %s", entry.snapshot, error)
            self.lacking[entry.snapshot] = str(error)

    def _send_moved(self) -> None:
        """Before anything may be deleted there: where retention moved records, the new locators and their segments."""
        moved = {
            layout.owner(file.name)
            for file in self._local.list(layout.LOCATORS)
            if layout.locator_generation(file.name) and self._mirror.size(file.name) is None
        }
        for line in live_snapshots(self._here):
            if line.entry.snapshot in moved and line.index < self.replicated_size:
                self._send(line.entry)

    def _read_slot(self, name: str) -> bytes:
        try:
            return self._local.read(name, slots.LIMIT_BYTES)
        except NotFoundError as error:
            raise IntegrityError(f"{name}: the slot is missing here", kind="slots_missing", where=name) from error

    def _put_slot(self, name: str) -> None:
        """The slot's own bytes, by create-once. After any error the slot itself is looked at."""
        data = self._read_slot(name)
        self._pause()
        failure: StoreError | None = None
        if self._mirror.capabilities.orders_writers or self._slot_there(name) is None:
            try:
                self._mirror.create(name, data)
                return
            except CommitConflictError:
                pass
            except StoreError as error:
                failure = error
        found = self._slot_there(name)
        if found is None:
            raise failure or StoreError(
                f"{self._mirror.url}: {name}: taken, and not there: another copy of the chain is writing it",
                kind="copy_lost",
                where=name,
            )
        if found != data:
            raise self._contradiction("it holds other bytes than the chain here", name)

    def _slot_there(self, name: str) -> bytes | None:
        try:
            return self._mirror.read(name, slots.LIMIT_BYTES)
        except NotFoundError:
            return None
        except IntegrityError as error:
            raise self._contradiction(str(error), name) from error

    def _first_other_slot(self) -> str | None:
        """Where two histories part: from the newest slot here back to one that both have."""
        other = None
        for name in sorted((file.name for file in self._local.list(layout.SLOTS)), reverse=True):
            found = self._slot_there(name)
            if found is None:
                continue
            if found == self._read_slot(name):
                break
            other = name
        return other

    def _contradiction(self, what: str, name: str | None) -> IntegrityError:
        """The mirror is of another history than the chain: the error for it, with what it shows kept as evidence."""
        place = name if name is not None and name.startswith("log/") else layout.LOG_HEAD
        kept = evidence.keep(self._mirror, self.origin, place)
        return IntegrityError(
            f"{self._mirror.url}: {place}: {what}. Two copies of this chain were both written to, or somebody changed "
            f"the mirror{f'; evidence: {kept}' if kept else ''}. Nothing more is copied; compare both with 'ciuic "
            "verify', and give the good one a mirror in a new place",
            kind="mirror_fork",
            where=place,
        )

    # --- derived files, and the end of files --------------------------------------------------------------------------

    def _publish_derived(self) -> None:
        if self.replicated_size:
            self._published.refresh()
            publish_derived(self._here, self._published, self._local, self._mirror, self._key)

    def _tidy(self) -> None:
        """Delete there what prune entries freed: their slots are in the mirror by now.

        Where nobody can say what is still needed, nothing goes, and that is no failure of the copy.
        """
        try:
            if self._freed:
                collect.sweep_copy(self._view, self._there)
                self._freed = False
            if not self._tidied:
                self._tidied = True
                collect.gc(self._view, self._there)
        except IntegrityError as error:
            logger.warning("%s: nothing is deleted in the mirror: %s", self._mirror.url, error)
        for snapshot in [one for one in self.lacking if not is_live(self._here, one)]:
            del self.lacking[snapshot]


_FOLDERS = (layout.SLOTS, layout.SEGMENTS, layout.MANIFESTS, layout.LOCATORS)


def read_chain_file(store: Store) -> bytes | None:
    """``ciuic.json``, or None where there is none."""
    try:
        return store.read(layout.CHAIN_FILE, CHAIN_FILE_LIMIT_BYTES)
    except NotFoundError:
        return None


def check_same_chain(mirror: Store, found: bytes | None, expected: bytes) -> None:
    """Refuse a mirror that is of another chain.

    Raises:
        UsageError: kind ``mirror_of_another``.
        StoreError: what was written a moment ago is not there.
    """
    if found is None:
        raise StoreError(
            f"{mirror.url}: {layout.CHAIN_FILE} was written and is not there", kind="copy_lost", where=layout.CHAIN_FILE
        )
    if sha256(found).digest() != sha256(expected).digest():
        own = ChainFile.decode(expected).origin
        raise UsageError(
            f"{mirror.url}: holds another chain than {own}: a mirror is of one chain. Nothing was written there; give "
            "each chain a place of its own",
            kind="mirror_of_another",
            where=mirror.url,
        )

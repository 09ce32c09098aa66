"""The way home: a chain that was lost here, or its newest entries, is brought back from its mirror.

The log comes first and at once, with manifests and locators: from then on everything can be read, and training goes on
with the same chain. Segments follow behind (``Homing``), those of the newest snapshot first; until they are here they
are read from the mirror, and new snapshots lean on none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from typing import TypeVar

from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError, StoreError
from ciuic_async.events import logger
from ciuic_async.format import layout
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.entry import KeyEntry, SnapshotEntry
from ciuic_async.format.locator import SegmentReference
from ciuic_async.mirroring.copier import check_same_chain, read_chain_file
from ciuic_async.mirroring.derived import publish_derived
from ciuic_async.mirroring.sending import Sender, SourceError
from ciuic_async.pipeline.commit import resolve
from ciuic_async.pipeline.history import live_snapshots, the_line
from ciuic_async.segments.whole import check_segment
from ciuic_async.stores.base import Store
from ciuic_async.stores.fallback import FallbackStore
from ciuic_async.stores.wrappers import Wrapper
from ciuic_async.transparency import note, slots
from ciuic_async.transparency.log import Log, LogHead

T = TypeVar("T")


def bring_home(local: Store, mirror: Store, data: bytes | None, check_pin: Callable[[Log], None]) -> bytes | None:
    """Bring home what the chain here lacks of its log.

    Args:
        local: where the chain is or was.
        mirror: its mirror.
        data: the chain's ``ciuic.json``; None: there is no chain here.
        check_pin: raises if a log is not the one that this user knows.

    Returns:
        ``ciuic.json`` as it is here now; None: neither here nor there is a chain.

    Raises:
        StoreError: there is no chain here, and the mirror cannot be asked. (With a chain here that is logged, and
            training goes on.) Or the mirror has more than the chain here, and broke off: a chain that went on from
            here would be another history.
        UsageError: kind ``mirror_of_another``.
        IntegrityError: the mirror's log does not hold, or contradicts the pin. Nothing was written.
    """
    try:
        found = read_chain_file(mirror)
        if found is None:
            return data
        if data is not None:
            check_same_chain(mirror, found, data)
        there = Log(mirror, ChainFile.decode(found).origin, quiet=True)
        there.refresh()
        _check_first_entry(mirror, there, found)
    except StoreError as error:
        if data is None:
            raise StoreError(
                f"{local.url}: no chain here, and its mirror cannot be asked whether there was one: {error}",
                kind=error.kind,
                where=mirror.url,
            ) from error
        logger.warning("%s: the mirror cannot be read now, training goes on without it: %s", mirror.url, error)
        return data
    except IntegrityError as error:
        if data is None:
            raise
        logger.error("%s: the mirror is damaged: %s", mirror.url, error)  # the copying says so as well
        return data
    if data is None:
        check_pin(there)
        local.initialize()
        with suppress(CommitConflictError):  # another process brings it home at this moment
            local.create(layout.CHAIN_FILE, found)
        check_same_chain(mirror, found, read_chain_file(local) or b"")
    here = Log(local, there.origin, quiet=True)
    here.refresh()
    if len(there) >= len(here) and there.root_at(len(here)) == here.head.root:
        if len(there) > len(here):
            if data is not None:
                check_pin(there)
            _bring_log(local, mirror, here, there)
        if len(here):
            _publish_home(local, mirror, here, there)
    return found


def _publish_home(local: Store, mirror: Store, here: Log, there: Log) -> None:
    """Tiles, head and evidence: who brought the slots home before may have died then.

    All can be made again, so a mirror that falls silent here keeps no chain closed.
    """
    try:
        publish_derived(there, here, _Asked(mirror), local, lambda: None)
    except _SilentError as error:
        logger.warning("%s: what follows from the log did not come home: %s", mirror.url, error)


def _check_first_entry(mirror: Store, there: Log, found: bytes) -> None:
    """Entry 0 pins ``ciuic.json``."""
    if not len(there):
        return
    first = there.entry(0)
    if (
        not isinstance(first, KeyEntry)
        or first.chain is None
        or (first.chain.sha256, first.chain.size_bytes) != (sha256(found).digest(), len(found))
    ):
        raise IntegrityError(
            f"{mirror.url}: {layout.CHAIN_FILE} is not the file that entry 0 pins",
            kind="digest_mismatch",
            where=layout.CHAIN_FILE,
        )


def _bring_log(local: Store, mirror: Store, here: Log, there: Log) -> None:
    lost = len(there) - len(here)
    known = {key_id: note.parse_vkey(vkey) for key_id, vkey in there.known_keys().items()}
    sender = Sender(mirror, local, home=True)
    for line in live_snapshots(there):
        with suppress(SourceError):  # damaged there: what is good of the chain comes home all the same
            sender.descriptions(line.entry)
    at = len(here)
    while at < len(there):
        name = layout.slot(at)
        data = mirror.read(name, slots.LIMIT_BYTES)
        slot = slots.check_slot(data, LogHead(at, there.root_at(at)), there.origin, known.get)
        with suppress(CommitConflictError):
            local.create(name, data)
        at += len(slot.entries)
    here.refresh()
    logger.warning("%s: %d entries were missing here and were brought home from %s", local.url, lost, mirror.url)


class _SilentError(Exception):
    """The mirror failed; not the chain's own place."""


class _Asked(Wrapper):
    """A mirror whose failures can be told from those of the chain's own place."""

    def _call(self, method: str, name: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except StoreError as error:
            raise _SilentError(str(error)) from error


class Homing:
    """Brings segments home that living snapshots need and that are missing here, or were found damaged.

    Args:
        pair: the chain and its mirror.
        log: of the chain here; an object of its own.
        pause, between: called often, and between segments; what they raise ends the turn.
    """

    def __init__(
        self,
        pair: FallbackStore,
        log: Log,
        *,
        pause: Callable[[], None] = lambda: None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._pair = pair
        self._log = log
        self._between = between
        self._sender = Sender(pair.there, pair.here, pause=pause, home=True)
        self._looked = False

    @property
    def brought_bytes(self) -> int:
        """Bytes that this object brought home."""
        return self._sender.sent_bytes

    def turn(self) -> None:
        """Bring home what is missing, as far as it is known to be: by a look at every file once, then by readers.

        Raises:
            StoreError: a place failed; the next turn goes on.
        """
        healed = self._pair.healed
        if self._looked and not healed:
            return
        self._log.refresh()
        on_line = [line.entry for line in the_line(self._log)]
        rest = [line.entry for line in live_snapshots(self._log) if line.entry not in on_line]
        if not self._looked and not healed and not self._lacks([*on_line, *rest]):
            self._looked = True
            return
        for entry in (*on_line, *rest):
            self._between()
            self._bring(entry, healed)
        self._looked = True

    def _lacks(self, entries: list[SnapshotEntry]) -> bool:
        """Whether a snapshot has fewer bytes of segments here than it wrote. A look at the listing, for most chains."""
        sizes: dict[str, int] = {}
        for file in self._pair.here.list(layout.SEGMENTS):
            owner = layout.owner(file.name) or ""
            sizes[owner] = sizes.get(owner, 0) + file.size_bytes
        return any(sizes.get(entry.snapshot, 0) < entry.stored_bytes for entry in entries)

    def _is_whole(self, entry: SnapshotEntry, healed: frozenset[str]) -> bool:
        """Whether all of a snapshot is here, and nothing of it was found damaged: then the mirror is not asked."""
        here = self._pair.here
        try:
            segments = {segment.path: segment.size_bytes for segment in resolve(here, entry).segments}
        except (IntegrityError, NotFoundError):
            return False
        if any(name in segments or layout.owner(name) == entry.snapshot for name in healed):
            return False
        return all(here.size(name) == size_bytes for name, size_bytes in segments.items())

    def _bring(self, entry: SnapshotEntry, healed: frozenset[str]) -> None:
        """One snapshot. What is damaged in the mirror, or gone there, stays away; reading it will say so."""
        here = self._pair.here
        if self._is_whole(entry, healed):
            return
        try:
            for name in healed:
                if layout.owner(name) == entry.snapshot and not name.startswith(layout.SEGMENTS):
                    here.delete(name)  # it is good there, and written again in a moment
            self._sender.descriptions(entry)
            # The snapshot's own segments come last: where they are complete, everything is.
            found = sorted(resolve(here, entry).segments, key=lambda one: layout.owner(one.path) == entry.snapshot)
            for segment in found:
                if segment.path in healed and not _is_good(here, segment):
                    here.delete(segment.path)
                self._sender.segment(segment)
                self._between()
                self._pair.forget_healed(segment.path)
            for name in healed:
                if layout.owner(name) == entry.snapshot:
                    self._pair.forget_healed(name)
        except (SourceError, IntegrityError) as error:
            logger.warning(
                "snapshot %s cannot be brought home from %s: %s", entry.snapshot, self._pair.there.url, error
            )


def _is_good(store: Store, segment: SegmentReference) -> bool:
    try:
        check_segment(store, segment)
    except (IntegrityError, StoreError):
        return False
    return True

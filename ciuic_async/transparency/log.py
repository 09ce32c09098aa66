"""The log of a chain: who writes the next entry, and what the entries are.

A *slot* decides who writes next; it is signed and created once. Tiles, bundles and the log head follow from the slots:
any writer makes again what is missing, behind or damaged, and a reader that finds them damaged replays the slots.

    append   refresh -> build -> sign the proposal -> claim the slot -> tiles and bundles -> log head

Reading is lazy: opening takes the head, the right edge of the tree (at most one partial tile a level) and the bundle
that announces the head's signer; an entry takes its bundle, checked against tiles that are checked up to the root.
Slots past the head are looked for by name, never by listing.

What this module does not know: whether the signer is one that the *caller* trusts. Any key may announce itself.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from ciuic_async.errors import (
    CiuicWarning,
    CommitConflictError,
    IntegrityError,
    NotFoundError,
    UsageError,
)
from ciuic_async.format import entry as entries_format
from ciuic_async.format import layout
from ciuic_async.format.entry import Entry
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note, proof, slots
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.ordering import Ordering, StoreOrdering
from ciuic_async.transparency.slots import LogHead, Slot
from ciuic_async.transparency.tile_files import TileFiles
from ciuic_async.transparency.tiles import WIDTH
from ciuic_async.transparency.view import View

__all__ = ["ATTEMPTS", "Log", "LogHead"]

ATTEMPTS = 100
"""Lost races before ``append`` gives up. Each one means that another writer got through."""

_WAIT_S = 0.002
_MAX_WAIT_S = 0.05

_logger = logging.getLogger("ciuic_async")
# Not the module's own generator: its state belongs to training.
_random = random.SystemRandom()
T = TypeVar("T")


class Log:
    """The log of one chain in a store. Any thread may call; calls wait for each other, but none for a claim.

    Args:
        store: where the chain lives.
        origin: the chain's name (``ciuic.json``), which is the name of its keys.
        ordering: where slots are claimed; None: in the store itself, by its create-once.
        quiet: no warnings of damaged derived files: of a copy that is under way, by who makes it whole.
    """

    def __init__(self, store: Store, origin: str, ordering: Ordering | None = None, *, quiet: bool = False) -> None:
        self._store = store
        self._ordering = ordering or StoreOrdering(store)
        self._last_slot: tuple[str, bytes] | None = None
        """The newest slot that was replayed: it may be in the ordering and not yet in the store."""
        self.origin = origin
        self._lock = threading.RLock()
        self._writer = threading.RLock()
        """Held over an attempt to append, and taken before ``_lock``: appends of this object never race each other."""
        self._view = View.empty(store, origin)
        self._files = TileFiles(
            store, self.entry_bytes, lambda level, index: self._read(lambda view: view.tile(level, index))
        )
        self._published = 0
        """Tiles and bundles up to this size are published: that of the last log head that was verified."""
        self._damaged = False
        """A derived file was found damaged or missing: the next writer checks them all."""
        self._head_file: bytes | None = None
        """The log head's file when it was last found good."""
        self._bad_head_file: bytes | None = None
        self._head_signers: tuple[Vkey, ...] = ()
        self._warned: set[str] = set()
        self._quiet = quiet

    @property
    def lock(self) -> AbstractContextManager[object]:
        """What every call holds; hold it to see one state over several calls. Re-entrant. Not to be held to append."""
        return self._lock

    # --- reading ------------------------------------------------------------------------------------------------------

    def refresh(self) -> LogHead:
        """Read what is new; the view never gets shorter.

        A damaged or missing log head, tile or bundle is passed over by replaying the slots, with one CiuicWarning.

        Raises:
            IntegrityError: a slot is damaged or forged, slots are missing that a signed head covers, or the history is
                not the one seen before (kind ``fork``). The view stays as far as it was verified.
            StoreError: the place failed.
        """
        with self._lock:
            data, head = self._read_head()
            if data is not None and head is not None and head.size > self._view.head.size:
                self._adopt(head, data)
            self._replay()
            self._compare(data, head)
            return self._view.head

    @property
    def head(self) -> LogHead:
        """Size and root as of the last ``refresh`` or ``append``."""
        with self._lock:
            return self._view.head

    def __len__(self) -> int:
        return self.head.size

    def entry_bytes(self, index: int) -> bytes:
        """The bytes of one entry, verified against the root.

        Raises:
            NotFoundError: kind ``no_entry``.
            IntegrityError: it is damaged, and its slot too.
        """
        return self._read(lambda view: view.entry(self._check_index(index)))

    def entry(self, index: int) -> Entry:
        """One entry, verified and parsed. Errors as ``entry_bytes``, and FormatVersionError for a later version's."""
        return entries_format.decode(self.entry_bytes(index), index)

    def leaf_hash(self, index: int) -> bytes:
        """The leaf hash of one entry, verified."""
        return self._read(lambda view: view.tile(0, self._check_index(index) // WIDTH)[index % WIDTH])

    def entries(self, start: int = 0) -> Iterator[tuple[int, Entry]]:
        """(index, entry) from ``start`` to where the log ends when the iteration begins."""
        for index in range(start, len(self)):
            yield index, self.entry(index)

    def reversed_entries(self) -> Iterator[tuple[int, Entry]]:
        """(index, entry) from the newest to the first; reads one bundle at a time."""
        for index in reversed(range(len(self))):
            yield index, self.entry(index)

    def known_keys(self) -> dict[bytes, str]:
        """Every key that the log announces: key ID to verifier key. Reads the whole log once."""

        def collect(view: View) -> dict[bytes, str]:
            view.find_key(b"")  # no key has this ID: all bundles are looked at
            return {key_id: str(vkey) for key_id, vkey in view.keys.items()}

        return self._read(collect)

    @property
    def head_signers(self) -> tuple[str, ...]:
        """The verifier keys whose signatures under the log head hold; empty when there is no good head."""
        with self._lock:
            return tuple(str(vkey) for vkey in self._head_signers)

    @property
    def head_note(self) -> bytes | None:
        """The file of the log head as of the last ``refresh``; None when it was not found good then."""
        with self._lock:
            return self._head_file

    def root_at(self, size: int) -> bytes:
        """The root when the log had ``size`` entries, at most as many as it has."""
        return self._read(lambda view: view.root_at(size))

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The proof that entry ``index`` is in the tree of the first ``size`` entries (None: of all)."""
        size = len(self) if size is None else size
        return self._read(lambda view: proof.make_inclusion(index, size, view.subtree))

    def consistency(self, old_size: int, size: int | None = None) -> list[bytes]:
        """The proof that the log of the first ``size`` entries (None: of all) extends that of ``old_size``."""
        size = len(self) if size is None else size
        return self._read(lambda view: proof.make_consistency(old_size, size, view.subtree))

    # --- writing ------------------------------------------------------------------------------------------------------

    def append(
        self,
        build: Callable[[Log], Sequence[bytes]],
        key: SigningKey,
        *,
        announce: Callable[[], bytes],
        attempts: int = ATTEMPTS,
    ) -> int:
        """Append entries as the next piece of history; durable on return.

        Args:
            build: gives the entries' bytes for the log as it is now; called again after each lost race. What it raises
                passes through; when it gives none, nothing is written. Entries must be the caller's own (run and time):
                a slot that holds exactly the same bytes counts as won.
            key: signs.
            announce: gives the ``key`` entry for ``key``; called when the log does not know it, put before the others.
            attempts: races that may be lost.

        Returns:
            The index of the first entry that ``build`` gave; the log's size when it gave none.

        Raises:
            CommitConflictError: all races were lost, or kind ``slot_differs``; nothing was written.
            StoreError: the claim failed; nothing was written unless the store went away just then. Failures after the
                claim are no error: they are logged, and the next ``append`` makes up for them.
            IntegrityError: as ``refresh``.
            UsageError: an entry is none, too much was given at once, or the place takes one writer (``one_writer``).
        """
        for attempt in range(attempts):
            if attempt:
                time.sleep(_random.uniform(0, min(_MAX_WAIT_S, _WAIT_S * 2**attempt)))
            with self._writer:
                with self._lock:
                    old = self.refresh()
                    self._settle()
                    if old.size > self._published and self._knows(key):
                        # Roll a crashed writer forward before adding to it: at most one slot is ever without its head.
                        self._try_publish(key)
                    given = list(build(self))
                    if not given:
                        return old.size
                    prefix = [] if self._knows(key) else [self._newcomer(key, old, announce)]
                    for data in given:
                        slots.check_entry(data)
                    content = slots.encode_slot(old, [*prefix, *given], key, self.origin)
                    slot = slots.check_slot(content, old, self.origin, self._view.keys.get)  # it can be read
                # Not under the lock that readers need: an etcd that does not answer takes its time.
                if self._ordering.claim(layout.slot(old.size), content) != content:
                    continue
                with self._lock:
                    if self._view.head.size == old.size:  # else a reader has met the slot already
                        self._view.extend(slot)
                    self._try_publish(key)
                    return old.size + len(prefix)
        raise CommitConflictError(
            f"{self._store.url}: {attempts} other writers were first; try again when fewer write", where=layout.SLOTS
        )

    def repair(self, key: SigningKey) -> None:
        """Replay all slots, and make every derived file again that is missing, behind or damaged.

        Needs a key that the log knows. Errors as ``refresh`` and ``publish_derived``.
        """
        with self._writer, self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", CiuicWarning)  # of damage that is repaired in a moment
            self.refresh()
            self._settle()
            if not self._view.in_memory:
                self._rebuild("a repair was asked for")
            self._damaged = True
            self.publish_derived(key)

    def roll_forward(self, key: SigningKey) -> None:
        """Publish what a writer that died left in its slot, if the log knows ``key``. Errors as ``publish_derived``."""
        with self._lock:
            if self.refresh().size > self._published and self._knows(key):
                self._settle()
                self.publish_derived(key)

    def publish_derived(self, key: SigningKey | bytes) -> None:
        """Make tiles, bundles and the log head what the slots imply; idempotent.

        Needs a key that the log knows, or the head itself as another copy of this log has it, of just this size. Any
        writer may be at it at the same time: all write the same bytes.

        Raises:
            StoreError: the place failed; some files may be there, the log head is the last.
        """
        with self._lock, self._store.lock():
            if self._view.head.size == 0 or (self._covered() and not self._damaged):
                return
            while True:
                whole = self._damaged
                self._files.publish(0 if whole else self._published, self._view.head.size, check=whole)
                if whole == self._damaged:  # else a file was found damaged on the way
                    break
            self._publish_head(key)
            self._damaged = False
            self._bad_head_file = None
            self._warned.clear()
            self._published = self._view.head.size
            self._view.forget_published()

    # --- inside: reading ----------------------------------------------------------------------------------------------

    def _read_head(self) -> tuple[bytes | None, LogHead | None]:
        """The log head's file, and what it says, of which nothing is verified. A damaged one is no head."""
        data = b""
        try:
            data = self._store.read(layout.LOG_HEAD, note.LIMIT_BYTES)
            return data, None if data == self._bad_head_file else self._parse_head(data)
        except NotFoundError:
            return None, None
        except IntegrityError as error:
            self._found_damage(str(error), data)
            return data, None

    def _parse_head(self, data: bytes) -> LogHead:
        text = note.parse(data, layout.LOG_HEAD).text
        return LogHead(*note.parse_head(text, self.origin, layout.LOG_HEAD))

    def _head_keys(self, view: View, data: bytes) -> dict[note.KeyName, Vkey]:
        """Of the keys that the log head names, those that ``view`` knows."""
        found = {}
        for item in note.parse(data, layout.LOG_HEAD).signatures:
            if item.name == self.origin and (vkey := view.find_key(item.key_id)) is not None:
                found[item.name, item.key_id] = vkey
        return found

    def _adopt(self, head: LogHead, data: bytes) -> None:
        """Go on to the tree of a head that is ahead of the view, by its tiles.

        Where they are damaged the view stays, and its slots follow.
        """
        old = self._view
        try:
            view = View.load(self._store, self.origin, head)
            same = view.root_at(old.head.size) == old.head.root
            if same:
                view.inherit(old)
            signers = note.verify(data, self._head_keys(view, data), layout.LOG_HEAD).signers
        except (IntegrityError, NotFoundError) as error:
            self._found_damage(str(error), data if error.where == layout.LOG_HEAD else None)
            return
        if not same:
            raise self._fork(head.size, old.head.size)
        self._view = view
        self._accept_head(data, head, signers)

    def _compare(self, data: bytes | None, head: LogHead | None) -> None:
        """Judge the log head against the view, which holds all slots by now."""
        if data == self._head_file and head is not None:
            self._published = head.size
            return
        self._published, self._head_file, self._head_signers = 0, None, ()
        if data is None:
            # First writers that die before their log head leave none: whose key is new cannot write it for others.
            # Later ones write it first of all: where it came between our look at it and at the slots, all is well.
            first = self._view.in_memory and not self._view.slots_by_known
            if self._view.head.size and not first and self._store.size(layout.LOG_HEAD) is None:
                self._found_damage(f"{layout.LOG_HEAD}: the log head is missing", None)
            return
        if head is None:
            return
        keys = self._read(lambda view: self._head_keys(view, data))
        try:
            signers = note.verify(data, keys, layout.LOG_HEAD).signers
        except IntegrityError as error:
            self._found_damage(str(error), data)
            return
        if head.size > self._view.head.size:
            raise IntegrityError(
                f"{layout.LOG_HEAD}: signed for {head.size} entries, but slots or tiles are damaged and give only "
                f"{self._view.head.size}; restore {layout.slot(self._view.head.size)} from a copy",
                kind="slots_missing",
                where=layout.slot(self._view.head.size),
            )
        if self._read(lambda view: view.root_at(head.size)) != head.root:
            raise self._fork(head.size, self._view.head.size)
        self._accept_head(data, head, signers)

    def _accept_head(self, data: bytes, head: LogHead, signers: tuple[Vkey, ...]) -> None:
        self._head_file, self._head_signers, self._published = data, signers, head.size

    def _replay(self) -> None:
        """Extend the view by the slots after it, as far as there are any."""
        while (slot := self._next_slot(view := self._view, self._find_key)) is not None:
            if self._view is view:  # else a bundle was damaged, and the view that was made from slots has this one
                view.extend(slot)

    def _next_slot(self, view: View, find_key: Callable[[bytes], Vkey | None]) -> Slot | None:
        """The slot after a view, verified; None where there is none."""
        name = layout.slot(view.head.size)
        data = self._ordering.read(name)
        if data is None:
            return None
        slot = slots.check_slot(data, view.head, self.origin, find_key)
        if self._last_slot is None or name > self._last_slot[0]:
            self._last_slot = name, data
        return slot

    def _find_key(self, key_id: bytes) -> Vkey | None:
        return self._read(lambda view: view.find_key(key_id))

    def _rebuild(self, reason: str) -> None:
        """Replace the view by one made of slots alone: a derived file is damaged."""
        old = self._view.head
        fresh = View.empty(self._store, self.origin)
        try:
            while (slot := self._next_slot(fresh, fresh.find_key)) is not None:
                fresh.extend(slot)
            if fresh.head.size < old.size:
                raise IntegrityError(
                    f"the slots hold {fresh.head.size} entries, expected at least {old.size}",
                    kind="slots_missing",
                    where=layout.slot(fresh.head.size),
                )
            if fresh.root_at(old.size) != old.root:
                raise self._fork(fresh.head.size, old.size)
        except IntegrityError as error:
            raise IntegrityError(
                f"{reason}; and it cannot be made again: {error}", kind=error.kind, where=error.where
            ) from error
        self._view = fresh
        self._found_damage(reason, None)

    def _read(self, ask: Callable[[View], T]) -> T:
        """Ask the view; when a derived file turns out to be damaged, ask one made of slots."""
        with self._lock:
            try:
                return ask(self._view)
            except (IntegrityError, NotFoundError) as error:
                if self._view.in_memory or error.kind == "no_entry":
                    raise
                self._rebuild(str(error))
                return ask(self._view)

    def _check_index(self, index: int) -> int:
        if not 0 <= index < self._view.head.size:
            raise NotFoundError(
                f"{self._store.url}: no entry {index}, the log has {self._view.head.size}", kind="no_entry"
            )
        return index

    def _found_damage(self, reason: str, bad_head: bytes | None) -> None:
        """Remember that derived files need repair; say so once for each reason."""
        self._damaged = True
        if bad_head is not None:
            self._bad_head_file, self._head_file, self._head_signers = bad_head, None, ()
        if reason not in self._warned and not self._quiet:
            self._warned.add(reason)
            warnings.warn(
                f"{self._store.url}: {reason}. The signed slots are used instead; the next writer repairs it",
                CiuicWarning,
                stacklevel=4,
            )

    def _fork(self, size: int, other_size: int) -> IntegrityError:
        return IntegrityError(
            f"{self._store.url}: two signed histories: {size} entries do not agree with {other_size} seen before; "
            "somebody replaced the log, or two copies of it were both written to",
            kind="fork",
            where=layout.LOG_HEAD,
        )

    # --- inside: writing ----------------------------------------------------------------------------------------------

    def _knows(self, key: SigningKey) -> bool:
        vkey = self._find_key(key.key_id(self.origin))
        if vkey is not None and str(vkey) != key.vkey(self.origin):
            raise UsageError(
                f"{self._store.url}: another key of this log has the same key ID; make a new key", kind="key_id_taken"
            )
        return vkey is not None

    def _newcomer(self, key: SigningKey, old: LogHead, announce: Callable[[], bytes]) -> bytes:
        """The entry that announces a key that the log does not know."""
        if old.size and not self._ordering.orders_writers:
            raise UsageError(
                f"{self._store.url}: this store cannot create a name only once, so a second writer could overwrite "
                "what the first one wrote, and this chain has a writer with another key. Write with that key, or let "
                "it go on as a chain that an etcd orders: run 'ciuic chain fork CHAIN DEST --reason TEXT' with "
                "CIUIC_ORDERING=etcd://host:port/prefix",
                kind="one_writer",
            )
        data = announce()
        if key.key_id(self.origin) not in slots.announced_keys(self.origin, [data]):
            raise UsageError("the entry that announces the signing key does not hold its vkey", kind="bad_entry")
        return data

    def _settle(self) -> None:
        """See that the newest slot is in the store. Those before it are: their successors' writers saw to that."""
        if self._last_slot is not None:
            self._ordering.settle(*self._last_slot)
            self._last_slot = None

    def _try_publish(self, key: SigningKey) -> None:
        """Publish derived files of a slot that is won: from here on nothing may look like a failure."""
        try:
            self.publish_derived(key)
        except Exception as error:
            _logger.warning(
                "%s: entries are durable in their slot, but tiles or log head are not written yet "
                "(the next append does it): %s",
                self._store.url,
                error,
            )

    def _covered(self) -> bool:
        """Whether the log head is at or ahead of the view: another writer published for us."""
        try:
            data = self._store.read(layout.LOG_HEAD, note.LIMIT_BYTES)
            head = self._parse_head(data)
            if data == self._bad_head_file or head.size < self._view.head.size:
                return False
            if head.size > self._view.head.size:
                return True  # signed perhaps by a key announced after our view: the next refresh judges it
            note.verify(data, self._read(lambda view: self._head_keys(view, data)), layout.LOG_HEAD)
            return head == self._view.head
        except (NotFoundError, IntegrityError):
            return False

    def _publish_head(self, key: SigningKey | bytes) -> None:
        """Sign and write the log head, unless another writer wrote one that is as good or ahead."""
        if self._covered():
            return
        head = self._view.head
        text = note.head_text(self.origin, head.size, head.root)
        data = key if isinstance(key, bytes) else key.sign(self.origin, text).encode()
        found = note.verify(data, self._read(lambda view: self._head_keys(view, data)), layout.LOG_HEAD)
        if found.text != text:
            raise self._fork(self._parse_head(data).size, head.size)
        self._store.overwrite(layout.LOG_HEAD, data)
        self._accept_head(data, head, found.signers)

"""Check every file of a log. Only reads; needs as much memory as the log's entries.

What is true is taken from the slots, one after the other from 0. Where one is damaged, the entries it held are taken
from the bundles if a signed log head vouches for them, so that the rest is still checked and the problem names the one
file. Every other file must be exactly what the entries imply.

Tiles and head *behind* the slots are no problem: a writer died in between, and the next one makes up for it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ciuic_async.errors import CiuicError, FormatVersionError, IntegrityError, NotFoundError, StoreError
from ciuic_async.format import entry as entries_format
from ciuic_async.format import layout, merkle
from ciuic_async.format.entry import Entry, KeyEntry
from ciuic_async.stores.base import Store
from ciuic_async.transparency import note, slots, tiles
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.slots import LogHead, Slot
from ciuic_async.transparency.tiles import WIDTH, RightEdge, Tile

_TILE = re.compile(r"log/tile/(entries|[0-9]+)/((?:x[0-9]{3}/)*[0-9]{3})(?:\.p/([0-9]+))?")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a log that is not as it should be. ``where`` is a name in the store, or ``entry <n>``."""

    kind: str
    where: str
    message: str


@dataclass(slots=True)
class LogAudit:
    """What an audit found, and what it verified on the way."""

    problems: list[Problem] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    """From 0 up to the first that cannot be parsed."""
    leaf_hashes: list[bytes] = field(default_factory=list)
    """Of all entries that were verified."""
    keys: dict[bytes, Vkey] = field(default_factory=dict)
    """The keys that the log announces, by key ID."""
    head: LogHead | None = None
    """The log head, if it is signed by a key of the log and right."""
    head_file: bytes = b""
    """The file of that head."""
    written: Counter[Vkey] = field(default_factory=Counter)
    """How many entries each key signed, as far as their slots are good."""


def audit(store: Store, origin: str) -> Iterator[Problem]:
    """All problems of the log ``origin``, every file under ``log/`` checked. Errors as ``audit_log``."""
    yield from audit_log(store, origin).problems


def audit_log(store: Store, origin: str) -> LogAudit:
    """Check every file under ``log/``. A file that cannot be read is a problem; that the place is gone is an error.

    Raises:
        StoreError: the files cannot be listed.
    """
    return _Audit(store, origin).run()


class _Audit:
    """One audit: ``result`` grows by each step."""

    def __init__(self, store: Store, origin: str) -> None:
        self.store = store
        self.origin = origin
        self.result = LogAudit()
        self.edge = RightEdge()
        self.roots = {0: merkle.EMPTY_ROOT}
        """Roots at the sizes between slots, and at the head's."""
        self.raw: list[bytes] = []
        self.hashes: list[list[bytes]] = [[]]
        """All hashes of each level of tiles."""
        self.slots_seen: set[str] = set()
        self.named: set[str] = set()
        """Files that have a problem."""
        self.vouched: list[bytes] = []
        """All entries under the signed head, from bundles: once they were needed, while the slots agree with them."""
        self.newcomers = 0
        """Of the slots, those whose signer is announced in them."""

    def run(self) -> LogAudit:
        # The head before the slots, and the slots after the listing: what writers add meanwhile is then no problem.
        data = self._read(layout.LOG_HEAD, note.LIMIT_BYTES)
        claimed = None if data is None else self._parse_head(data)
        names = [listed.name for listed in self.store.list("log")]
        self._walk_slots(names, data, claimed)
        if data is not None and claimed is not None:
            self._check_head(data, claimed)
        self._check_files(names)
        if self.result.head is not None:
            self._check_missing(self.result.head.size)
        elif data is None and layout.LOG_HEAD not in names and self._had_a_head(names):
            self._problem("missing", layout.LOG_HEAD, "the log head is missing although several slots are claimed")
        self._parse_entries()
        return self.result

    # --- slots --------------------------------------------------------------------------------------------------------

    def _walk_slots(self, names: list[str], head_data: bytes | None, claimed: LogHead | None) -> None:
        """Gather the entries from slot to slot; where one is unusable, from the bundles under a signed head."""
        listed = sorted(number for name in names if (number := layout.slot_number(name)) is not None)
        while True:
            slot = self._next_slot()
            if slot is not None:
                self._add(slot.entries)
                self.result.written[slot.signer] += len(slot.entries)
                continue
            size = len(self.raw)
            following = bisect_right(listed, size)
            later = listed[following] if following < len(listed) else None
            expected = claimed.size if claimed is not None and claimed.size > size else later
            if expected is None:
                return
            name = layout.slot(size)
            if name not in self.slots_seen:
                self._problem(
                    "missing", name, f"the slot is missing, later files say that there are {expected} entries"
                )
            rescued = self._from_bundles(head_data, claimed)
            if not rescued:
                for number in listed[following:]:
                    self._problem("unreachable", layout.slot(number), "cannot be checked: a slot before it is unusable")
                return
            # Up to the next slot that is there; a slot's entries are checked against those that are known by then.
            end = len(rescued) if later is None else min(later, len(rescued))
            self._add(rescued[size:end])

    def _next_slot(self) -> Slot | None:
        """The slot after the entries known so far; None where it is absent or unusable."""
        old = LogHead(len(self.raw), self.edge.root())
        name = layout.slot(old.size)
        data = self._read(name, slots.LIMIT_BYTES)
        if data is None:
            return None
        self.slots_seen.add(name)
        try:
            slot = slots.check_slot(data, old, self.origin, self.result.keys.get)
            self.newcomers += slot.signer.key_id not in self.result.keys
            return slot
        except (IntegrityError, FormatVersionError) as error:
            self._problem(error.kind, name, str(error))
            return None

    def _from_bundles(self, data: bytes | None, claimed: LogHead | None) -> list[bytes]:
        """All entries up to the head's size, if the bundles give its root and a key of theirs signed it; else none."""
        if data is None or claimed is None or claimed.size <= len(self.raw):
            return []
        if self.vouched:  # one look is enough, however many slots are damaged
            return self.vouched
        found = list(self.raw)
        try:
            for index in range(len(self.raw) // WIDTH, -(-claimed.size // WIDTH)):
                width = min(WIDTH, claimed.size - index * WIDTH)
                found[index * WIDTH :] = self._bundle(index, width)
            edge = RightEdge()
            for entry in found:
                edge.append(merkle.leaf_hash(entry))
            if edge.root() != claimed.root:
                return []
            keys = slots.announced_keys(self.origin, found)
            note.verify(data, {(self.origin, key_id): vkey for key_id, vkey in keys.items()}, layout.LOG_HEAD)
        except (IntegrityError, NotFoundError, StoreError):
            return []
        self.vouched = found
        return found

    def _bundle(self, index: int, width: int) -> tuple[bytes, ...]:
        name, full_name = layout.entry_bundle(index, width), layout.entry_bundle(index)
        if width < WIDTH and self.store.size(name) is not None:
            return tiles.decode_bundle(self.store.read(name, tiles.BUNDLE_LIMIT_BYTES), width, name)
        return tiles.decode_bundle(self.store.read(full_name, tiles.BUNDLE_LIMIT_BYTES), WIDTH, full_name)[:width]

    def _add(self, entries: tuple[bytes, ...] | list[bytes]) -> None:
        if self.vouched[len(self.raw) : len(self.raw) + len(entries)] != list(entries):
            self.vouched = []
        for data in entries:
            leaf = merkle.leaf_hash(data)
            self.raw.append(data)
            self.hashes[0].append(leaf)
            for full in self.edge.append(leaf):
                if full.level + 1 == len(self.hashes):
                    self.hashes.append([])
                self.hashes[full.level + 1].append(merkle.root(full.hashes))
        self.roots[len(self.raw)] = self.edge.root()
        for key_id, vkey in slots.announced_keys(self.origin, entries).items():
            self.result.keys.setdefault(key_id, vkey)
        self.result.leaf_hashes = self.hashes[0]

    # --- derived files ------------------------------------------------------------------------------------------------

    def _parse_head(self, data: bytes) -> LogHead | None:
        try:
            text = note.parse(data, layout.LOG_HEAD).text
            return LogHead(*note.parse_head(text, self.origin, layout.LOG_HEAD))
        except IntegrityError as error:
            self._problem(error.kind, layout.LOG_HEAD, str(error))
            return None

    def _check_head(self, data: bytes, claimed: LogHead) -> None:
        known = {(self.origin, key_id): vkey for key_id, vkey in self.result.keys.items()}
        try:
            note.verify(data, known, layout.LOG_HEAD)
        except IntegrityError as error:
            self._problem(error.kind, layout.LOG_HEAD, str(error))
            return
        if claimed.size > len(self.raw):
            self._problem(
                "head_mismatch",
                layout.LOG_HEAD,
                f"signed for {claimed.size} entries, only {len(self.raw)} could be verified",
            )
        elif self._root_at(claimed.size) != claimed.root:
            self._problem(
                "fork",
                layout.LOG_HEAD,
                f"signed for another history: its root at {claimed.size} entries is not that of the slots",
            )
        else:
            self.result.head, self.result.head_file = claimed, data

    def _root_at(self, size: int) -> bytes:
        if size not in self.roots:
            self.roots[size] = merkle.root(self.hashes[0][:size])
        return self.roots[size]

    def _check_files(self, names: list[str]) -> None:
        """Every name under ``log/`` is known, and every tile and bundle holds what the entries imply."""
        for name in names:
            if not layout.is_known(name):
                self._problem("unknown_name", name, "no file of this format has this name")
            elif name.startswith(layout.TILES + "/"):
                self._check_tile(name)
            elif layout.slot_number(name) is not None and name not in self.slots_seen:
                self._check_stray_slot(name)

    def _check_tile(self, name: str) -> None:
        match = _TILE.fullmatch(name)
        assert match is not None  # the name is known, and the only one of this tile
        index = int(match[2].replace("x", "").replace("/", ""))
        width = int(match[3]) if match[3] else WIDTH
        is_bundle = match[1] == "entries"
        level = 0 if is_bundle else int(match[1])
        tile = Tile(level, index, width)
        if tile.end > len(self.raw):
            self._problem(
                "beyond_log", name, f"holds entries up to {tile.end}, {len(self.raw)} could be verified from the slots"
            )
            return
        start = index * WIDTH
        if is_bundle:
            expected = tiles.encode_bundle(self.raw[start : start + width])
        else:
            expected = tiles.encode_tile(self.hashes[level][start : start + width])
        self._check_bytes(name, expected, tile)

    def _check_bytes(self, name: str, expected: bytes, tile: Tile) -> None:
        try:
            found = self.store.read(name, len(expected))
        except NotFoundError:
            superseded = tile.width < WIDTH and self.store.size(self._full_name(name)) is not None
            if not superseded:  # else a writer deleted it since it was listed
                self._problem("missing", name, "was listed and is gone")
        except (IntegrityError, StoreError) as error:
            self._problem(error.kind, name, str(error))
        else:
            if found != expected:
                self._problem(
                    "bundle_damaged" if name.startswith(f"{layout.TILES}/entries/") else "tile_damaged",
                    name,
                    f"{name}: does not hold what the signed entries imply; the file was changed",
                )

    def _check_stray_slot(self, name: str) -> None:
        """A slot that the walk did not meet: at a size between two slots, or after a gap."""
        if name in self.named:
            return
        self._problem("stray_slot", name, "no history leads to this slot: it was moved here, or others are missing")

    def _check_missing(self, size: int) -> None:
        """What a good head implies must be there; a partial file may be replaced by the full one."""
        for tile in tiles.grown(0, size):
            candidates = [tile.name]
            if tile.level == 0:
                candidates.append(layout.entry_bundle(tile.index, tile.width))
            for name in candidates:
                try:
                    present = self.store.size(name) is not None or (
                        tile.width < WIDTH and self.store.size(self._full_name(name)) is not None
                    )
                except CiuicError as error:
                    # Reading a listed file has named it already; a folder in a file's place is not listed.
                    if name not in self.named:
                        self._problem(error.kind, name, str(error))
                    continue
                if not present:
                    self._problem("missing", name, f"the log head for {size} entries needs it")

    def _had_a_head(self, names: list[str]) -> bool:
        """Whether a log head must have been there: a writer that the log knows goes on to the next slot only after it.

        The first writers, each with a key of its own, may all die before they write one; tiles of a log with other
        slots say that writers lived on.
        """
        return len(self.slots_seen) > max(1, self.newcomers) and any(
            name.startswith(layout.TILES + "/") for name in names
        )

    @staticmethod
    def _full_name(name: str) -> str:
        return name.partition(".p/")[0]

    # --- entries ------------------------------------------------------------------------------------------------------

    def _parse_entries(self) -> None:
        readable = True
        for index, data in enumerate(self.raw):
            try:
                entry = entries_format.decode(data, index)
            except (IntegrityError, FormatVersionError) as error:
                self._problem(error.kind, f"entry {index}", str(error))
                readable = False
                continue
            if isinstance(entry, KeyEntry):
                self._check_key(index, entry)
            elif index == 0:
                self._problem("bad_history", "entry 0", "the first entry of a log announces its key, this one does not")
            if readable:
                self.result.entries.append(entry)

    def _check_key(self, index: int, entry: KeyEntry) -> None:
        try:
            name = note.parse_vkey(entry.vkey).name
        except IntegrityError as error:
            if error.kind != "vkey_kind_unknown":  # a later version's key: nothing it signs is accepted here
                self._problem(error.kind, f"entry {index}", str(error))
            return
        if name != self.origin:
            self._problem("bad_history", f"entry {index}", f"announces a key for another log, {name[:120]!r}")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _read(self, name: str, limit_bytes: int) -> bytes | None:
        try:
            return self.store.read(name, limit_bytes)
        except NotFoundError:
            return None
        except (IntegrityError, StoreError) as error:
            self._problem(error.kind, name, str(error))
            self.slots_seen.add(name)  # there is something
            return None

    def _problem(self, kind: str, where: str, message: str) -> None:
        text = message if message.startswith(where) else f"{where}: {message}"
        self.result.problems.append(Problem(kind, where, text))
        self.named.add(where)

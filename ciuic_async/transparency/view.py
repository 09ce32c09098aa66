"""A tree whose root is known: its tiles and entries, each checked against the root before it is given out."""

from __future__ import annotations

from collections import OrderedDict

from ciuic_async.errors import IntegrityError, NotFoundError
from ciuic_async.format import layout, merkle
from ciuic_async.stores.base import Store
from ciuic_async.transparency import tiles
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.slots import LogHead, Slot, announced_keys
from ciuic_async.transparency.tiles import WIDTH, RightEdge

_BUNDLES_KEPT = 4  # at most 16 MiB each, usually 0.2
_TILES_KEPT = 64  # 8 KiB each


class View:
    """A tree whose root is known, and its entries as far as they were needed. Not thread-safe.

    Entries from ``memory_start`` on came from slots and are held in memory, like the tiles that became full by them;
    entries before it are read from bundles and checked. Methods raise IntegrityError or NotFoundError when a derived
    file is damaged or missing.
    """

    def __init__(self, store: Store, origin: str, edge: RightEdge) -> None:
        self.store = store
        self.origin = origin
        self.edge = edge
        self.head = LogHead(edge.size, edge.root())
        self.memory_start = edge.size
        self.memory: list[bytes] = []
        self.slots_by_known = 0
        """Of the slots that it was extended by, those whose signer was known before."""
        self.keys: dict[bytes, Vkey] = {}
        self._full: dict[tuple[int, int], tuple[bytes, ...]] = {}
        self._tiles: OrderedDict[tuple[int, int], tuple[bytes, ...]] = OrderedDict()
        self._bundles: OrderedDict[int, tuple[bytes, ...]] = OrderedDict()
        self._scanned: set[int] = set()

    @classmethod
    def empty(cls, store: Store, origin: str) -> View:
        return cls(store, origin, RightEdge())

    @classmethod
    def load(cls, store: Store, origin: str, head: LogHead) -> View:
        """The tree of a head, from the right edge of its tiles; the edge is checked against the head's root."""
        levels: list[tuple[bytes, ...]] = []
        for tile in tiles.edge_tiles(head.size):
            if tile is None:
                levels.append(())
                continue
            data, name = _read_partial(store, tile.name, tile.full_name, tiles.TILE_LIMIT_BYTES)
            found = tile.width if name == tile.name else WIDTH
            levels.append(tiles.decode_tile(data, found, name)[: tile.width])
        view = cls(store, origin, RightEdge(head.size, levels))
        if view.head.root != head.root:
            raise IntegrityError(
                f"{layout.TILES}: the tiles at the right edge of {head.size} entries give the root "
                f"{view.head.root.hex()[:16]}, the log head says {head.root.hex()[:16]}",
                kind="tile_damaged",
                where=layout.TILES,
            )
        return view

    @property
    def in_memory(self) -> bool:
        """Whether no derived file is needed."""
        return self.memory_start == 0

    def extend(self, slot: Slot) -> None:
        self.slots_by_known += slot.signer.key_id in self.keys
        for data in slot.entries:
            self.memory.append(data)
            for full in self.edge.append(merkle.leaf_hash(data)):
                self._full[full.level, full.index] = full.hashes
        self.head = LogHead(self.edge.size, self.edge.root())
        for key_id, vkey in announced_keys(self.origin, slot.entries).items():
            self.keys.setdefault(key_id, vkey)

    def forget_published(self) -> None:
        """Give back memory once tiles and bundles of the whole tree are published; the last bundle's entries stay."""
        start = self.head.size - self.head.size % WIDTH
        if start > self.memory_start:
            del self.memory[: start - self.memory_start]
            self.memory_start = start
        self._full.clear()

    def tile(self, level: int, index: int) -> tuple[bytes, ...]:
        """The verified hashes of a tile: 256, or those of the partial one at the right edge."""
        place = (level, index)
        if index == self.head.size >> (8 * (level + 1)):
            return tuple(self.edge.levels[level])
        if place in self._full:
            return self._full[place]
        if place not in self._tiles:
            above = self.tile(level + 1, index // WIDTH)[index % WIDTH]
            name = layout.tile(level, index)
            hashes = tiles.decode_tile(self.store.read(name, tiles.TILE_LIMIT_BYTES), WIDTH, name)
            if merkle.root(hashes) != above:
                raise IntegrityError(
                    f"{name}: does not give the hash that the tile above it holds; the file was changed",
                    kind="tile_damaged",
                    where=name,
                )
            self._tiles[place] = hashes
            if len(self._tiles) > _TILES_KEPT:
                self._tiles.popitem(last=False)
        self._tiles.move_to_end(place)
        return self._tiles[place]

    def entry(self, index: int) -> bytes:
        if index >= self.memory_start:
            return self.memory[index - self.memory_start]
        return self.bundle(index // WIDTH)[index % WIDTH]

    def bundle(self, index: int) -> tuple[bytes, ...]:
        """The verified entries of bundle ``index`` that are not in memory."""
        width = min(WIDTH, self.memory_start - index * WIDTH)
        if len(self._bundles.get(index, ())) != width:
            data, name = _read_partial(
                self.store,
                layout.entry_bundle(index, width),
                layout.entry_bundle(index),
                tiles.BUNDLE_LIMIT_BYTES,
            )
            found = tiles.decode_bundle(data, width if name == layout.entry_bundle(index, width) else WIDTH, name)
            entries = found[:width]
            if tuple(map(merkle.leaf_hash, entries)) != self.tile(0, index)[:width]:
                raise IntegrityError(
                    f"{name}: its entries are not those of the log; the file was changed",
                    kind="bundle_damaged",
                    where=name,
                )
            self._bundles[index] = entries
            if len(self._bundles) > _BUNDLES_KEPT:
                self._bundles.popitem(last=False)
        self._bundles.move_to_end(index)
        return self._bundles[index]

    def subtree(self, height: int, index: int) -> bytes:
        """The hash over the leaves ``[index << height, (index + 1) << height)`` (see ``proof.Subtree``)."""
        level, rest = divmod(height, 8)
        start = index << rest
        hashes = self.tile(level, start // WIDTH)[start % WIDTH : start % WIDTH + (1 << rest)]
        return merkle.root(hashes)

    def root_at(self, size: int) -> bytes:
        """The root when the log had ``size`` entries."""
        levels = [
            () if tile is None else self.tile(tile.level, tile.index)[: tile.width] for tile in tiles.edge_tiles(size)
        ]
        return RightEdge(size, levels).root()

    def find_key(self, key_id: bytes) -> Vkey | None:
        """The key that an entry of this tree announced.

        Most logs have one writer, announced by entry 0, and others announce themselves when they come: the first
        bundle is looked at, then all from the newest. A key that is not there costs one pass over the log.
        """
        if key_id in self.keys:
            return self.keys[key_id]
        last = (self.memory_start - 1) // WIDTH
        for index in (0, *range(last, 0, -1)) if self.memory_start else ():
            if index in self._scanned:
                continue
            for found, vkey in announced_keys(self.origin, self.bundle(index)).items():
                self.keys.setdefault(found, vkey)
            self._scanned.add(index)
            if key_id in self.keys:
                return self.keys[key_id]
        return None

    def inherit(self, older: View) -> None:
        """Take over what a view of the same history with fewer entries knows of keys."""
        self.keys.update(older.keys)
        whole = older.memory_start // WIDTH
        self._scanned = {index for index in older._scanned if index < whole}


def _read_partial(store: Store, name: str, full_name: str, limit_bytes: int) -> tuple[bytes, str]:
    """A partial file or, when it was superseded and deleted, the full one; with the name that was read."""
    try:
        return store.read(name, limit_bytes), name
    except NotFoundError:
        if name == full_name:
            raise
        return store.read(full_name, limit_bytes), full_name

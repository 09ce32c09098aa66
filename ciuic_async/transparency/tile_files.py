"""The files that follow from a log's entries: hash tiles and entry bundles, whole and partial.

They hold nothing that the slots do not say: whoever loses them, or finds them damaged, has them made again here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from ciuic_async.errors import CommitConflictError, IntegrityError, NotFoundError
from ciuic_async.format import layout
from ciuic_async.stores.base import Store, Unpublished
from ciuic_async.transparency import tiles
from ciuic_async.transparency.tiles import WIDTH, Tile


class TileFiles:
    """Writes them. Several writers may be at it at the same time: all write the same bytes.

    Args:
        entry_bytes: the entry of an index.
        hashes: those of a tile, by level and index, as many as there are.
    """

    def __init__(
        self, store: Store, entry_bytes: Callable[[int], bytes], hashes: Callable[[int, int], Sequence[bytes]]
    ) -> None:
        self._store = store
        self._entry_bytes = entry_bytes
        self._hashes = hashes

    def publish(self, since: int, size: int, *, check: bool) -> None:
        """Write what the entries from ``since`` to ``size`` changed. Idempotent.

        Args:
            check: read what is there already, partial files of earlier sizes included, and replace what is damaged.

        Raises:
            StoreError: the place failed; some files may be there.
        """
        new: list[tuple[str, bytes]] = []
        superseded: list[Tile] = []
        for tile in tiles.grown(since, size):
            files = list(self._files_of(tile))
            if check:
                for name, data in files:
                    self._put(name, data)
            else:
                new.extend(files)
            if tile.width == WIDTH:
                superseded.append(tile)
        if new:
            self._put_new(new)
        for tile in superseded:
            self._delete_partials(tile)
        if check:
            self._check_partials(size)

    def _files_of(self, tile: Tile) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of a tile and, at level 0, of its bundle."""
        if tile.level == 0:
            first = tile.index * WIDTH
            entries = [self._entry_bytes(index) for index in range(first, first + tile.width)]
            yield layout.entry_bundle(tile.index, tile.width), tiles.encode_bundle(entries)
        hashes = self._hashes(tile.level, tile.index)
        yield tile.name, tiles.encode_tile(hashes[: tile.width])

    def _put_new(self, files: list[tuple[str, bytes]]) -> None:
        """Publish several files at the cost of one; when a name is taken, one by one."""
        unpublished: list[Unpublished] = []
        try:
            for name, data in files:
                unpublished.append(self._store.begin(name))
                unpublished[-1].write(data)
            self._store.publish(unpublished)
        except CommitConflictError:
            for name, data in files:
                self._put(name, data)
        finally:
            for file in unpublished:
                file.discard()

    def _put(self, name: str, data: bytes) -> None:
        """Make a derived file hold ``data``. One that holds something else is damaged, and replaced."""
        try:
            if self._store.read(name, len(data)) == data:
                return
        except NotFoundError:
            with suppress(CommitConflictError):  # another writer was first, with the same bytes
                self._store.create(name, data)
            return
        except IntegrityError:
            pass  # longer than it should be, or not a file
        self._store.overwrite(name, data)

    def _delete_partials(self, tile: Tile) -> None:
        """Drop the partial files that a full tile supersedes. One that a listing misses does no harm."""
        for folder in self._partial_folders(tile):
            for listed in self._store.list(folder):
                if layout.is_known(listed.name):
                    self._store.delete(listed.name)

    def _check_partials(self, size: int) -> None:
        """Replace damaged partial files of earlier sizes, which readers with an old head still look for."""
        for tile in tiles.edge_tiles(size):
            if tile is None:
                continue
            listed = {item.name for folder in self._partial_folders(tile) for item in self._store.list(folder)}
            for width in range(1, tile.width):
                for name, data in self._files_of(Tile(tile.level, tile.index, width)):
                    if name in listed:
                        self._put(name, data)

    @staticmethod
    def _partial_folders(tile: Tile) -> list[str]:
        folders = [f"{tile.full_name}.p"]
        return [*folders, f"{layout.entry_bundle(tile.index)}.p"] if tile.level == 0 else folders

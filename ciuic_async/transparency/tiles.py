"""Which tiles a tree of a given size has, and their bytes (C2SP tlog-tiles). Pure functions.

A *hash* at level l is the root of 256^l leaves; a tile holds 256 of them, the last one of a level fewer (a *partial*
tile). An *entry bundle* holds the entries whose leaf hashes its level-0 tile holds.

The *right edge* of a tree, the hashes of the partial tile of every level, is all that is needed to know its root and
to append: at most 255 hashes a level, one level for each factor of 256 in size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ciuic_async.errors import IntegrityError
from ciuic_async.format import layout, merkle

WIDTH = 256
HASH_BYTES = 32
TILE_LIMIT_BYTES = WIDTH * HASH_BYTES
MAX_ENTRY_BYTES = 65535
BUNDLE_LIMIT_BYTES = WIDTH * (2 + MAX_ENTRY_BYTES)


@dataclass(frozen=True, slots=True)
class Tile:
    """A hash tile by place; ``width`` below 256 is a partial one."""

    level: int
    index: int
    width: int = WIDTH

    @property
    def name(self) -> str:
        return layout.tile(self.level, self.index, self.width)

    @property
    def full_name(self) -> str:
        """The name of the full tile at this place."""
        return layout.tile(self.level, self.index)

    @property
    def end(self) -> int:
        """The size that a tree must have for this tile to be in it."""
        return (self.index * WIDTH + self.width) << (8 * self.level)


def grown(old_size: int, new_size: int) -> Iterator[Tile]:
    """The tiles of a tree of ``new_size`` that one of ``old_size`` does not have, lowest level first.

    Full tiles, and of each level the partial one at the right edge; ``old_size`` 0 gives all tiles of a tree. Entry
    bundles are the places at level 0.
    """
    level = 0
    while (new_count := new_size >> (8 * level)) > 0:
        old_count = old_size >> (8 * level)
        if new_count > old_count:
            for index in range(old_count // WIDTH, new_count // WIDTH):
                yield Tile(level, index)
            if new_count % WIDTH:
                yield Tile(level, new_count // WIDTH, new_count % WIDTH)
        level += 1


def edge_tiles(size: int) -> list[Tile | None]:
    """The partial tile of each level, lowest first; None where a level's hashes are a multiple of 256."""
    result: list[Tile | None] = []
    while (count := size >> (8 * len(result))) > 0:
        result.append(Tile(len(result), count // WIDTH, count % WIDTH) if count % WIDTH else None)
    return result


def encode_tile(hashes: Sequence[bytes]) -> bytes:
    """The bytes of a tile: its hashes, one after the other."""
    return b"".join(hashes)


def decode_tile(data: bytes, width: int, what: str) -> tuple[bytes, ...]:
    """The hashes of a tile of exactly ``width``.

    Raises:
        IntegrityError: kind ``tile_malformed``.
    """
    if len(data) != width * HASH_BYTES:
        raise IntegrityError(
            f"{what}: {len(data)} bytes, expected {width * HASH_BYTES}", kind="tile_malformed", where=what
        )
    return tuple(data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES))


def encode_bundle(entries: Iterable[bytes]) -> bytes:
    """Each entry behind its big-endian 16-bit length. Entries are at most 65535 bytes (OverflowError)."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def decode_bundle(data: bytes, count: int | None, what: str) -> tuple[bytes, ...]:
    """The entries of a bundle, ``count`` of them unless that is None; every byte must belong to one.

    Raises:
        IntegrityError: kind ``bundle_malformed``.
    """
    entries: list[bytes] = []
    start = 0
    while start < len(data):
        end = start + 2 + int.from_bytes(data[start : start + 2], "big")
        if start + 2 > len(data) or end > len(data):
            raise IntegrityError(
                f"{what}: entry {len(entries)} of the bundle ends at byte {end}, the bundle at {len(data)}: truncated",
                kind="bundle_malformed",
                where=what,
            )
        entries.append(data[start + 2 : end])
        start = end
    if count is not None and len(entries) != count:
        raise IntegrityError(f"{what}: {len(entries)} entries, expected {count}", kind="bundle_malformed", where=what)
    return tuple(entries)


@dataclass(frozen=True, slots=True)
class FullTile:
    """A tile that became full, with its 256 hashes."""

    level: int
    index: int
    hashes: tuple[bytes, ...]


class RightEdge:
    """The right edge of a growing tree. Not thread-safe.

    ``levels[l]`` holds the hashes of the partial tile of level l, lists of 0 to 255.
    """

    def __init__(self, size: int = 0, levels: Iterable[Iterable[bytes]] = ()) -> None:
        self.size = size
        self.levels = [list(level) for level in levels]

    def append(self, leaf_hash: bytes) -> list[FullTile]:
        """Add one leaf; the tiles that became full by it, lowest level first."""
        full: list[FullTile] = []
        self.size += 1
        level, current = 0, leaf_hash
        while True:
            if level == len(self.levels):
                self.levels.append([])
            hashes = self.levels[level]
            hashes.append(current)
            if len(hashes) < WIDTH:
                return full
            full.append(FullTile(level, (self.size >> (8 * (level + 1))) - 1, tuple(hashes)))
            current = merkle.root(hashes)
            hashes.clear()
            level += 1

    def root(self) -> bytes:
        """The Merkle tree head: perfect subtrees fold from the right (RFC 6962, section 2.1)."""
        stack: list[tuple[int, bytes]] = []  # (height, hash), heights strictly falling
        for level in reversed(range(len(self.levels))):
            for current in self.levels[level]:
                height = 8 * level
                while stack and stack[-1][0] == height:
                    current = merkle.node_hash(stack.pop()[1], current)
                    height += 1
                stack.append((height, current))
        if not stack:
            return merkle.EMPTY_ROOT
        result = stack.pop()[1]
        while stack:
            result = merkle.node_hash(stack.pop()[1], result)
        return result

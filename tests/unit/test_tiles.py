"""Which tiles a tree has, and their bytes."""

from __future__ import annotations

from collections import Counter

import pytest

from ciuic_async.errors import IntegrityError
from ciuic_async.format import merkle
from ciuic_async.transparency import tiles
from ciuic_async.transparency.tiles import RightEdge, Tile


def test_the_specifications_example_of_70000() -> None:
    """A tree of 70000 has the tiles that C2SP tlog-tiles says: 273 full + .p/112, 1 full + .p/17, .p/1."""
    found = list(tiles.grown(0, 70000))
    full = Counter(tile.level for tile in found if tile.width == 256)
    assert full == {0: 273, 1: 1}
    assert [tile for tile in found if tile.width < 256] == [Tile(0, 273, 112), Tile(1, 1, 17), Tile(2, 0, 1)]
    assert [tile for tile in tiles.edge_tiles(70000) if tile] == [Tile(0, 273, 112), Tile(1, 1, 17), Tile(2, 0, 1)]
    assert [tile.name for tile in found[-2:]] == ["log/tile/1/001.p/17", "log/tile/2/000.p/1"]


@pytest.mark.parametrize("size", [1, 255, 256, 257, 511, 512, 65535, 65536, 65537, 65792])
def test_growth_in_steps_gives_all_full_tiles_and_the_last_edge(size: int) -> None:
    """Growing in two steps gives the tiles of growing at once, and no tile twice."""
    whole = set(tiles.grown(0, size))
    for middle in (1, size // 2, size - 1):
        steps = [*tiles.grown(0, middle), *tiles.grown(middle, size)]
        assert len(steps) == len(set(steps))
        assert whole <= set(steps)
        assert all(tile.width < 256 for tile in set(steps) - whole)


def test_the_right_edge_gives_the_root_and_the_full_tiles_of_every_size() -> None:
    """For every size to 600, and around 65536, the right edge's root is the plain RFC 6962 root."""
    leaves = [merkle.leaf_hash(b"%d" % number) for number in range(66000)]
    edge = RightEdge()
    assert edge.root() == merkle.EMPTY_ROOT
    full = {}
    for number, leaf in enumerate(leaves):
        for tile in edge.append(leaf):
            full[tile.level, tile.index] = tile.hashes
        size = number + 1
        if size <= 600 or size in (65535, 65536, 65537, 66000):
            assert edge.root() == merkle.root(leaves[:size])
            assert RightEdge(size, edge.levels).root() == edge.root()
    assert full[0, 3] == tuple(leaves[768:1024])
    assert full[1, 0] == tuple(merkle.root(leaves[start : start + 256]) for start in range(0, 65536, 256))
    assert len(full) == 258


@pytest.mark.parametrize("entries", [[], [b""], [b"a", b"", b"x" * 65535]])
def test_bundles_round_trip(entries: list[bytes]) -> None:
    """Entries come back from a bundle as they went in, up to the longest."""
    data = tiles.encode_bundle(entries)
    assert tiles.decode_bundle(data, len(entries), "bundle") == tuple(entries)


def test_malformed_bundles_and_tiles_are_refused() -> None:
    """Cut, overlong or miscounted bundles and tiles are IntegrityErrors; 65536 bytes in one entry cannot be coded."""
    data = tiles.encode_bundle([b"abc", b"de"])
    for end in range(1, len(data)):
        with pytest.raises(IntegrityError):
            tiles.decode_bundle(data[:end], 2, "bundle")
    for malformed, count in ((data + b"\0", 2), (data, 1), (data, 3)):
        with pytest.raises(IntegrityError):
            tiles.decode_bundle(malformed, count, "bundle")
    for malformed in (b"", bytes(31), bytes(33), bytes(64)):
        with pytest.raises(IntegrityError):
            tiles.decode_tile(malformed, 1, "tile")
    with pytest.raises(OverflowError):
        tiles.encode_bundle([bytes(65536)])

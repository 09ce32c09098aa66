"""What is too large for the format is refused before it is written, and before a reader works on it."""

from __future__ import annotations

from itertools import product

import pytest

from ciuic_async.errors import IntegrityError, UsageError
from ciuic_async.format import manifest
from ciuic_async.format.digest import digest

SNAPSHOT = "0123456789abcdef0123"


def test_a_part_beyond_its_limit_is_not_written() -> None:
    """The largest part is named in a root; one byte more is an error that says what to do."""
    made = manifest.Manifest(SNAPSHOT, "dict", (), (), ())
    tree = made.chunk_tree()
    largest = bytes(manifest.PART_LIMIT_BYTES)
    (written,) = manifest.with_root(made, [largest], tree, 0).parts
    assert len(written[1]) == manifest.PART_LIMIT_BYTES
    with pytest.raises(UsageError, match="split it into several names") as caught:
        manifest.with_root(made, [largest + b"x"], tree, 0)
    assert caught.value.kind == "state_too_large"


def test_a_root_beyond_its_limit_is_not_written() -> None:
    """An epoch or batch that fills more than the root may hold is an error, and the largest that fits is read back."""
    bare = manifest.Manifest(SNAPSHOT, "dict", (), (), (), manifest.Progress(batch=""))
    room = manifest.ROOT_LIMIT_BYTES - len(manifest.encode(bare).root[1])
    fits = manifest.Manifest(SNAPSHOT, "dict", (), (), (), manifest.Progress(batch="b" * room))
    name, data = manifest.encode(fits).root
    assert len(data) == manifest.ROOT_LIMIT_BYTES, name
    assert manifest.decode_root(data, SNAPSHOT).progress.batch == "b" * room
    with pytest.raises(UsageError, match="epoch or batch") as caught:
        manifest.encode(manifest.Manifest(SNAPSHOT, "dict", (), (), (), manifest.Progress(batch="b" * (room + 1))))
    assert caught.value.kind == "state_too_large"


def _quartered(dimensions: int) -> manifest.Manifest:
    """A tensor cut in two along every dimension, as a reader finds it."""
    shards = tuple(
        manifest.Shard(corner, (1,) * dimensions, 64, digest(bytes(corner)))
        for corner in product((0, 1), repeat=dimensions)
    )
    tensor = manifest.StoredTensor(("t",), "uint8", (2,) * dimensions, "cpu", shards)
    encoded = manifest.encode(manifest.Manifest(SNAPSHOT, "dict", (), (), (tensor,)))
    root = manifest.decode_root(encoded.root[1], SNAPSHOT)
    return manifest.assemble(root, [data for _, data in encoded.parts])


def test_a_tensor_is_cut_along_few_dimensions() -> None:
    """Shards that cover are read when they cut six dimensions, and refused when they cut seven."""
    assert len(_quartered(manifest.MAX_SPLIT_DIMENSIONS).tensors[0].shards) == 64
    with pytest.raises(IntegrityError, match="too many") as caught:
        _quartered(manifest.MAX_SPLIT_DIMENSIONS + 1)
    assert caught.value.kind == "malformed"

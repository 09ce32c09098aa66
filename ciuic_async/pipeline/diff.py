"""What differs between two snapshots: by digests, so that hardly a byte of a tensor is read. Imports no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ciuic_async.format.digest import digest
from ciuic_async.format.manifest import Manifest, Node, Path, StoredTensor, dotted, volume
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.pipeline.commit import Resolved
from ciuic_async.stores.base import Store

_DICTS = ("dict", "ordered_dict", "default_dict")
_SEQUENCES = ("tuple", "set", "frozenset", "deque", "namedtuple")
_REFERENCES = ("tensor", "numpy.array", "json", "str", "bytes", "bytearray")
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Change:
    """One path whose value is another: what it is in the one snapshot, and in the other."""

    path: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Difference:
    """How the second of two snapshots differs from the first. Paths are dotted.

    Attributes:
        added, removed: what only the second, or only the first has.
        changed: values and tensors that both have, not alike. A tensor of which only bytes differ says so.
        same: how many are alike, bit for bit.
        shared_bytes: of the second's tensors, in chunks that the first has too.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[Change, ...]
    same: int
    shared_bytes: int


def diff(store: Store, first: Resolved, second: Resolved) -> Difference:
    """Compare contents. Small tensors that share a chunk are read, all others are compared by their digests.

    Raises:
        IntegrityError: damage.
    """
    before, after = _Leaves(store, first), _Leaves(store, second)
    old, new = dict(before.all()), dict(after.all())
    changed = [
        Change(dotted(path), *_texts(old[path], new[path])) for path in new if path in old and old[path] != new[path]
    ]
    known = first.manifest.distinct_chunks()
    return Difference(
        tuple(dotted(path) for path in new if path not in old),
        tuple(dotted(path) for path in old if path not in new),
        tuple(changed),
        sum(1 for path in new if old.get(path) == new[path]),
        sum(size for chunk, size in second.manifest.chunks() if chunk in known),
    )


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One value: what a person reads, and what decides whether two are alike."""

    text: str
    content: bytes
    """As short as a digest however much it stands for: a manifest may name one tensor a million times."""


class _Leaves:
    """The values of one snapshot by path."""

    def __init__(self, store: Store, resolved: Resolved) -> None:
        self._store = store
        self._resolved = resolved
        self._manifest: Manifest = resolved.manifest
        self._packed = self._read_packed()
        self._contents: dict[int, bytes] = {}

    def all(self) -> Iterator[tuple[Path, _Leaf]]:
        for tree in self._manifest.trees:
            root: Path = (tree.section,) if tree.section != "state" else ()
            yield from self._walk(tree.node, root if tree.key is None else (*root, _step(tree.key)))

    def _walk(self, node: Node, path: Path) -> Iterator[tuple[Path, _Leaf]]:
        """Depth first, without recursion: how deep a manifest nests is its writer's choice."""
        stack = [(node, path)]
        while stack:
            node, path = stack.pop()
            children = _children(node)
            if children:
                stack += [(child, (*path, step)) for step, child in reversed(children)]
            else:
                yield path, self._leaf(node)

    def _leaf(self, node: Node) -> _Leaf:
        name = next((name for name in _REFERENCES if isinstance(node, dict) and type(node.get(name)) is int), None)
        if name is None or not 0 <= node[name] < len(self._manifest.tensors):
            text = json.dumps(node, ensure_ascii=False)
            return _Leaf(_plain(node, text), digest(text.encode("utf-8", "surrogatepass")))
        index = node[name]
        stored = self._manifest.tensors[index]
        about = json.dumps({**node, name: None}, sort_keys=True)  # the number itself says nothing
        view = node["view"] if isinstance(node.get("view"), dict) else {}
        text = _short(f"{view.get('dtype', stored.dtype)} {view.get('shape', list(stored.shape))}")
        if index not in self._contents:
            self._contents[index] = digest(self._content(index, stored))
        return _Leaf(text, digest(f"{stored.dtype} {stored.shape} {about} ".encode() + self._contents[index]))

    def _content(self, index: int, stored: StoredTensor) -> bytes:
        return b"".join(
            f"{shard.offsets} {shard.sizes} {shard.chunk_size_bytes} ".encode()
            + (shard.digests if shard.pack is None else self._packed[index, number])
            for number, shard in enumerate(stored.shards)
        )

    def _read_packed(self) -> dict[tuple[int, int], bytes]:
        """The digest of every shard that shares a chunk with others."""
        manifest, where = self._manifest, self._resolved.locator
        of_pack: dict[int, list[tuple[int, int, int, int]]] = {}
        for index, stored in enumerate(manifest.tensors):
            for number, shard in enumerate(stored.shards):
                if shard.pack is not None:
                    size = volume(shard.sizes) * stored.item_size_bytes
                    of_pack.setdefault(shard.pack[0], []).append((index, number, shard.pack[1], size))
        found: dict[tuple[int, int], bytes] = {}
        sizes = manifest.distinct_chunks()
        with chunk_reader(self._store, where=where, sizes=sizes) as reader:
            for pack_number, shards in of_pack.items():
                pack = manifest.packs[pack_number]
                data = memoryview(reader.read_chunk(pack.digest, pack.size_bytes, where.chunks[pack.digest]))
                for index, number, offset, size in shards:
                    found[index, number] = digest(data[offset : offset + size])
        return found


def _children(node: Node) -> list[tuple[str | int, Node]]:
    """The items of a container that is not empty."""
    if isinstance(node, list):
        return list(enumerate(node))
    if isinstance(node, dict):
        for tag in _DICTS:
            if isinstance(node.get(tag), list):
                return [(_step(pair[0]), pair[1]) for pair in node[tag] if isinstance(pair, list) and len(pair) == 2]
        for tag in _SEQUENCES:
            if isinstance(node.get(tag), list):
                return list(enumerate(node[tag]))
    return []


def _step(key: Node) -> str | int:
    return key if isinstance(key, str | int) else json.dumps(key)


def _plain(node: Node, text: str) -> str:
    """A plain value for people."""
    if isinstance(node, dict) and isinstance(node.get("float"), str):
        with suppress(ValueError, struct.error):  # not eight bytes in hex: nobody has checked the node
            return repr(struct.unpack(">d", bytes.fromhex(node["float"]))[0])
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _texts(before: _Leaf, after: _Leaf) -> tuple[str, str]:
    if before.text != after.text:
        return before.text, after.text
    return before.text, "other bytes"


def as_json(difference: Difference) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "added": list(difference.added),
        "removed": list(difference.removed),
        "changed": [{"path": one.path, "before": one.before, "after": one.after} for one in difference.changed],
        "same": difference.same,
        "shared_bytes": difference.shared_bytes,
    }

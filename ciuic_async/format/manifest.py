"""Manifests: the content of one snapshot as plain data (docs/format.md, section 3).

A manifest is a root and one or more parts. ``encode`` splits, ``decode_root`` and ``assemble`` put together again and
check everything that can be checked without the chunks themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from typing import Any

from ciuic_async.errors import UsageError
from ciuic_async.format import dtypes, jsontext, layout, merkle
from ciuic_async.format.chain_file import KNOWN_FEATURES
from ciuic_async.format.digest import DIGEST_SIZE_BYTES
from ciuic_async.format.entry import ChunkTree, FileReference
from ciuic_async.format.fields import Fields, check_array, check_integer, malformed
from ciuic_async.format.jsontext import Hole
from ciuic_async.format.segment import ITEM_SIZES_BYTES, MAX_CHUNK_BYTES

ROOT_SCHEMA = "ciuic.dev/manifest/v1"
PART_SCHEMA = "ciuic.dev/manifest-part/v1"
ROOT_LIMIT_BYTES = 1 << 20
PART_LIMIT_BYTES = 64 << 20
PART_TARGET_BYTES = 32 << 20  # a part is closed when it reaches this size
MAX_DIMENSIONS = 64
MAX_TENSOR_BYTES = 2**53 - 1
MAX_SPLIT_DIMENSIONS = 6  # dimensions of one tensor along which shards are cut: bounds the check for overlaps
MAX_SHARD_CORNERS = 1 << 20  # shards of one tensor, times two for each such dimension
PACK_LIMIT_BYTES = 64 << 10  # tensors below this size are packed
PACK_ALIGNMENT_BYTES = 16

SECTION_STATE = "state"
SECTION_RNG = "rng"
TOP_DICT = "dict"
TOP_SINGLE = "single"

Path = tuple[str | int, ...]
Node = Any  # a value node: JSON as docs/format.md section 2 defines it


@dataclass(frozen=True, slots=True)
class Shard:
    """The box of a tensor that one rank holds; offsets and sizes in elements.

    Either ``digests`` (32 bytes a chunk, concatenated) with ``chunk_size_bytes``, or ``pack`` = (index, offset in
    bytes).
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    chunk_size_bytes: int = 0
    digests: bytes = b""
    pack: tuple[int, int] | None = None

    def chunk_digests(self) -> Iterator[bytes]:
        for start in range(0, len(self.digests), DIGEST_SIZE_BYTES):
            yield self.digests[start : start + DIGEST_SIZE_BYTES]


@dataclass(frozen=True, slots=True)
class Mesh:
    """The device mesh a distributed tensor was spread over: size and name of each dimension."""

    shape: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One storage. ``path`` is where it was first met in the state; ``shape`` is global; ``mesh`` if distributed."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    device: str
    shards: tuple[Shard, ...]
    mesh: Mesh | None = None

    @property
    def item_size_bytes(self) -> int:
        return dtypes.ITEM_SIZE_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return volume(self.shape) * self.item_size_bytes


@dataclass(frozen=True, slots=True)
class Pack:
    """Several small shards in one chunk."""

    item_size_bytes: int
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Tree:
    """One top-level item of the state. ``key`` is its key's node; None when the state is no dict."""

    section: str
    key: Node
    node: Node


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stood, and how it was configured, as value nodes."""

    step: Node = None
    epoch: Node = None
    batch: Node = None
    config: Node = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole content of one snapshot."""

    snapshot: str
    top: str
    trees: tuple[Tree, ...]
    packs: tuple[Pack, ...]
    tensors: tuple[StoredTensor, ...]
    progress: Progress = Progress()
    environment: dict[str, str] = field(default_factory=dict)
    world: int = 1
    features_required: tuple[str, ...] = ()
    features_optional: tuple[str, ...] = ()

    @property
    def raw_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """(digest, raw size in bytes) of every chunk in manifest order, repeats included."""
        for pack in self.packs:
            yield pack.digest, pack.size_bytes
        for tensor in self.tensors:
            for shard in tensor.shards:
                if shard.pack is None:
                    size = volume(shard.sizes) * tensor.item_size_bytes
                    for number, chunk in enumerate(shard.chunk_digests()):
                        yield chunk, min(shard.chunk_size_bytes, size - number * shard.chunk_size_bytes)

    def distinct_chunks(self) -> dict[bytes, int]:
        """Raw size of every distinct chunk, in manifest order: the order of a locator's rows."""
        return dict(self.chunks())

    def chunk_tree(self) -> ChunkTree:
        return chunk_tree([chunk for chunk, _ in self.chunks()])


def chunk_tree(digests: Sequence[bytes]) -> ChunkTree:
    """The tree over the digests of all chunks, in manifest order."""
    return ChunkTree(merkle.root(map(merkle.leaf_hash, digests)), len(digests))


def volume(sizes: Sequence[int]) -> int:
    """Number of elements of a box."""
    result = 1
    for size in sizes:
        result *= size
    return result


def dotted(path: Path) -> str:
    """A path for messages and patterns: ``model.layers.0.weight``."""
    return ".".join(str(item) for item in path) or "(the state itself)"


def _shown(path: Path) -> str:
    """A hostile path for a message: short, and without characters that a terminal would obey."""
    text = dotted(path)[:200]
    return text if text.isprintable() else repr(text)


# --- encoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EncodedManifest:
    """The files of a manifest: (name, bytes) of the parts and of the root, which refers to them."""

    parts: tuple[tuple[str, bytes], ...]
    root: tuple[str, bytes]

    @property
    def reference(self) -> FileReference:
        return _reference(*self.root)


def encode(manifest: Manifest, *, part_target_bytes: int = PART_TARGET_BYTES) -> EncodedManifest:
    """Split into parts of about ``part_target_bytes`` and a root.

    Raises:
        UsageError: one top-level name's tree alone exceeds a part, or the root its limit (kind ``state_too_large``); or
            a node holds what the format's JSON cannot, such as a depth above 400 (kind ``unsupported_value``). Nothing
            was written.
    """
    try:
        return _encode(manifest, part_target_bytes)
    except ValueError as error:
        raise UsageError(f"the state cannot be described: {error}", kind="unsupported_value") from error


def _encode(manifest: Manifest, part_target_bytes: int) -> EncodedManifest:
    whole = encode_part(manifest.snapshot, 0, _body(manifest))
    if len(whole) <= part_target_bytes:
        parts = [whole]
    else:
        bodies = _part_bodies(manifest, part_target_bytes)
        parts = [encode_part(manifest.snapshot, number, body) for number, body in enumerate(bodies)]
    return with_root(manifest, parts, manifest.chunk_tree(), manifest.raw_bytes)


def encode_part(snapshot: str, number: int, body: dict[str, Any]) -> bytes:
    """One part: ``body`` holds its trees, packs and tensors as JSON."""
    return jsontext.encode(part_json(snapshot, number, body))


def part_json(snapshot: str | Hole, number: int, body: dict[str, Any]) -> dict[str, Any]:
    """A part as JSON."""
    return {"schema": PART_SCHEMA, "snapshot": snapshot, "part": number, "rank": 0} | body


def with_root(manifest: Manifest, parts: Sequence[bytes], chunks: ChunkTree, raw_bytes: int) -> EncodedManifest:
    """Name the parts, and describe them in a root.

    Args:
        manifest: of which only what a root says is looked at: its trees, packs and tensors may be left out.
        parts: the encoded parts.
        chunks, raw_bytes: of the whole manifest.

    Raises:
        UsageError: a part or the root is too large (kind ``state_too_large``).
        ValueError: the progress holds what the format's JSON cannot.
    """
    names_and_bytes = []
    for number, data in enumerate(parts):
        if len(data) > PART_LIMIT_BYTES:
            raise UsageError(
                f"the state's structure needs {len(data)} bytes of manifest in one part, at most {PART_LIMIT_BYTES} "
                "fit: too many values under one top-level name; split it into several names or store numbers as "
                "tensors",
                kind="state_too_large",
            )
        names_and_bytes.append((layout.manifest_part(manifest.snapshot, number), data))
    root = jsontext.encode(
        {
            "schema": ROOT_SCHEMA,
            "snapshot": manifest.snapshot,
            "features_required": list(manifest.features_required),
            "features_optional": list(manifest.features_optional),
            "world": manifest.world,
            "top": manifest.top,
            "parts": [_reference(name, data).to_json() for name, data in names_and_bytes],
            "chunks": chunks.to_json(),
            "raw_bytes": raw_bytes,
            "progress": {
                "step": manifest.progress.step,
                "epoch": manifest.progress.epoch,
                "batch": manifest.progress.batch,
            },
            "environment": dict(manifest.environment),
        }
        | ({} if manifest.progress.config is None else {"config": manifest.progress.config})
    )
    if len(root) > ROOT_LIMIT_BYTES:
        raise UsageError(
            f"the manifest's root needs {len(root)} bytes, at most {ROOT_LIMIT_BYTES} fit: epoch or batch is too large",
            kind="state_too_large",
        )
    return EncodedManifest(tuple(names_and_bytes), (layout.manifest_root(manifest.snapshot), root))


def _body(manifest: Manifest) -> dict[str, list[Any]]:
    return {
        "trees": [tree_json(tree) for tree in manifest.trees],
        "packs": [pack_json(pack.item_size_bytes, pack.size_bytes, pack.digest.hex()) for pack in manifest.packs],
        "tensors": [_tensor_json(tensor) for tensor in manifest.tensors],
    }


def _part_bodies(manifest: Manifest, part_target_bytes: int) -> Iterator[dict[str, Any]]:
    """Cut trees, packs and tensors into pieces, in order, by the size of their JSON."""
    body: dict[str, Any] = {"trees": [], "packs": [], "tensors": []}
    size = 0
    for name, items in _body(manifest).items():
        for item in items:
            item_size = len(jsontext.encode(item))
            if size and size + item_size > part_target_bytes:
                yield body
                body, size = {"trees": [], "packs": [], "tensors": []}, 0
            body[name].append(item)
            size += item_size
    yield body


def tree_json(tree: Tree) -> dict[str, Any]:
    """A tree as a part lists it."""
    return {"section": tree.section, "key": tree.key, "node": tree.node}


def pack_json(item_size_bytes: int, size_bytes: int, digest: str | Hole) -> dict[str, Any]:
    """A pack as a part lists it."""
    return {"item_size_bytes": item_size_bytes, "size_bytes": size_bytes, "digest": digest}


def shard_json(
    offsets: Sequence[int],
    sizes: Sequence[int],
    pack: tuple[int, int] | None,
    chunk_size_bytes: int,
    digests: str | Hole,
) -> dict[str, Any]:
    """A shard as a tensor lists it; ``digests`` in hex, without meaning for one in a pack."""
    item: dict[str, Any] = {"offsets": list(offsets), "sizes": list(sizes)}
    if pack is not None:
        return item | {"pack": list(pack)}
    return item | {"chunk_size_bytes": chunk_size_bytes, "digests": digests}


def tensor_json(path: Path, dtype: str, shape: Sequence[int], device: str, shards: list[Any]) -> dict[str, Any]:
    """A tensor without a mesh as a part lists it."""
    return {"path": list(path), "dtype": dtype, "shape": list(shape), "device": device, "shards": shards}


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    shards = [
        shard_json(shard.offsets, shard.sizes, shard.pack, shard.chunk_size_bytes, shard.digests.hex())
        for shard in tensor.shards
    ]
    body = tensor_json(tensor.path, tensor.dtype, tensor.shape, tensor.device, shards)
    if tensor.mesh is not None:
        body["mesh"] = {"shape": list(tensor.mesh.shape), "names": list(tensor.mesh.names)}
    return body


def _reference(name: str, data: bytes) -> FileReference:
    return FileReference(name, sha256(data).digest(), len(data))


# --- decoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManifestRoot:
    """What the root file says."""

    snapshot: str
    top: str
    world: int
    parts: tuple[FileReference, ...]
    chunks: ChunkTree
    raw_bytes: int
    progress: Progress
    environment: dict[str, str]
    features_required: tuple[str, ...]
    features_optional: tuple[str, ...]


def decode_root(data: bytes, snapshot: str) -> ManifestRoot:
    """Parse a root whose SHA-256 the caller has checked."""
    what = layout.manifest_root(snapshot)
    fields = Fields(jsontext.decode(data, what=what, limit_bytes=ROOT_LIMIT_BYTES), what)
    fields.schema(ROOT_SCHEMA)
    if fields.string("snapshot") != snapshot:
        raise malformed(what, f"manifest of another snapshot, {fields.string('snapshot')[:40]!r}")
    required, optional = fields.features(KNOWN_FEATURES)
    top = fields.string("top")
    if top not in (TOP_DICT, TOP_SINGLE):
        raise malformed(what, f"field 'top': unknown value {top[:80]!r}")
    parts = tuple(
        FileReference.from_fields(Fields(item, f"{what}: parts"), prefix=f"{layout.MANIFESTS}/{snapshot}")
        for item in fields.array("parts")
    )
    if [part.path for part in parts] != [layout.manifest_part(snapshot, n) for n in range(len(parts))] or not parts:
        raise malformed(what, "parts are not numbered 0, 1, 2, ...")
    position = fields.object("progress")
    config = fields.raw("config") if "config" in fields else None
    progress = Progress(position.raw("step"), position.raw("epoch"), position.raw("batch"), config)
    position.done()
    environment = fields.raw("environment")
    if not (isinstance(environment, dict) and all(isinstance(value, str) for value in environment.values())):
        raise malformed(what, "field 'environment': expected strings only")
    root = ManifestRoot(
        snapshot=snapshot,
        top=top,
        world=fields.integer("world", low=1, high=1 << 20),
        parts=parts,
        chunks=ChunkTree.from_fields(fields.object("chunks")),
        raw_bytes=fields.integer("raw_bytes"),
        progress=progress,
        environment=environment,
        features_required=required,
        features_optional=optional,
    )
    fields.done()
    return root


def assemble(root: ManifestRoot, parts: Iterable[bytes]) -> Manifest:
    """Parse all parts (whose SHA-256 the caller has checked), one after the other, and check what they say together."""
    trees: list[Tree] = []
    packs: list[Pack] = []
    tensors: list[StoredTensor] = []
    for number, (reference, data) in enumerate(zip(root.parts, parts, strict=True)):
        what = reference.path
        fields = Fields(jsontext.decode(data, what=what, limit_bytes=PART_LIMIT_BYTES), what)
        fields.schema(PART_SCHEMA)
        if fields.string("snapshot") != root.snapshot or fields.integer("part") != number:
            raise malformed(what, "part of another manifest")
        fields.integer("rank", high=root.world - 1)
        trees += [_tree(item, what) for item in fields.array("trees")]
        packs += [_pack(item, what) for item in fields.array("packs")]
        tensors += [_tensor(item, what) for item in fields.array("tensors")]
        fields.done()
    manifest = Manifest(
        root.snapshot,
        root.top,
        tuple(trees),
        tuple(packs),
        tuple(tensors),
        root.progress,
        root.environment,
        root.world,
        root.features_required,
        root.features_optional,
    )
    _check_together(manifest, root)
    return manifest


def _tree(item: object, what: str) -> Tree:
    fields = Fields(item, f"{what}: trees")
    section = fields.string("section")
    if section not in (SECTION_STATE, SECTION_RNG):
        raise malformed(what, f"unknown section {section[:80]!r}")
    tree = Tree(section, fields.raw("key"), fields.raw("node"))
    fields.done()
    return tree


def _pack(item: object, what: str) -> Pack:
    fields = Fields(item, f"{what}: packs")
    pack = Pack(
        fields.integer("item_size_bytes", low=1, high=16),
        fields.integer("size_bytes", low=1, high=MAX_CHUNK_BYTES),
        fields.hex("digest", DIGEST_SIZE_BYTES),
    )
    fields.done()
    if pack.item_size_bytes not in ITEM_SIZES_BYTES or pack.size_bytes % pack.item_size_bytes:
        raise malformed(what, f"pack of {pack.size_bytes} bytes with items of {pack.item_size_bytes} bytes")
    return pack


def _tensor(item: object, what: str) -> StoredTensor:
    fields = Fields(item, f"{what}: tensors")
    path = tuple(fields.array("path"))
    for part in path:
        if type(part) is not str:
            check_integer(part, f"{what}: path", low=-(2**53) + 1)
    where = f"{what}: tensor {_shown(path)}"
    dtype = fields.string("dtype")
    item_size = dtypes.item_size_bytes(dtype, where)
    shape = fields.integers("shape")
    if len(shape) > MAX_DIMENSIONS or volume([max(size, 1) for size in shape]) * item_size > MAX_TENSOR_BYTES:
        raise malformed(where, f"shape {list(shape)[:8]} is too large")
    shards = tuple(_shard(shard, shape, item_size, where) for shard in fields.array("shards"))
    _check_cover(shape, shards, where)
    mesh = _mesh(fields.object("mesh")) if "mesh" in fields else None
    tensor = StoredTensor(path, dtype, shape, fields.string("device"), shards, mesh)
    fields.done()
    return tensor


def _mesh(fields: Fields) -> Mesh:
    mesh = Mesh(fields.integers("shape", low=1), fields.strings("names"))
    if len(mesh.shape) != len(mesh.names) or len(mesh.shape) > MAX_DIMENSIONS:
        raise malformed(fields.what, "a mesh has one name for each dimension")
    fields.done()
    return mesh


def _shard(item: object, shape: tuple[int, ...], item_size: int, where: str) -> Shard:
    fields = Fields(item, where)
    offsets, sizes = fields.integers("offsets"), fields.integers("sizes")
    if len(offsets) != len(shape) or len(sizes) != len(shape):
        raise malformed(where, "a shard has another number of dimensions than its tensor")
    if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
        raise malformed(where, "a shard lies outside its tensor")
    if "pack" in fields:
        pair = check_array(fields.raw("pack"), where)
        if len(pair) != 2:
            raise malformed(where, "field 'pack': expected [pack, offset]")
        pack = (check_integer(pair[0], where), check_integer(pair[1], where))
        if pack[1] % PACK_ALIGNMENT_BYTES:
            raise malformed(where, f"offset {pack[1]} in a pack is no multiple of {PACK_ALIGNMENT_BYTES}")
        shard = Shard(offsets, sizes, pack=pack)
    else:
        chunk_size = fields.integer("chunk_size_bytes", low=16, high=MAX_CHUNK_BYTES)
        digests = fields.hex("digests")
        if chunk_size % 16:
            raise malformed(where, f"chunk size {chunk_size} is no multiple of 16")
        expected = -(-volume(sizes) * item_size // chunk_size)
        if len(digests) != expected * DIGEST_SIZE_BYTES:
            raise malformed(where, f"{len(digests)} bytes of digests, expected {expected} digests")
        shard = Shard(offsets, sizes, chunk_size, digests)
    fields.done()
    return shard


def _check_cover(shape: tuple[int, ...], shards: tuple[Shard, ...], where: str) -> None:
    """Shards must neither overlap nor leave holes.

    The boxes add up to the tensor exactly when their corners do, counted +1 and -1 by turns along every axis: the
    corners are the mixed derivative of a box's indicator function, which determines it. Unlike comparing pairs this
    stays linear in the number of shards, which is hostile.
    """
    if len(shards) == 1 and shards[0].sizes == shape:
        return  # it lies inside the tensor, so it is the tensor: nearly all are like that
    boxes = [(shard.offsets, shard.sizes) for shard in shards if volume(shard.sizes)]
    if sum(volume(sizes) for _, sizes in boxes) != volume(shape):
        raise malformed(where, f"shards of {len(boxes)} boxes leave holes or overlap")
    split = [axis for axis, whole in enumerate(shape) if any(sizes[axis] != whole for _, sizes in boxes)]
    if len(split) > MAX_SPLIT_DIMENSIONS or len(boxes) << len(split) > MAX_SHARD_CORNERS:
        raise malformed(where, f"{len(boxes)} shards along {len(split)} dimensions are too many")
    corners: Counter[tuple[int, ...]] = Counter()
    tensor = [((0,) * len(shape), shape)] if boxes else []
    for weight, group in ((1, boxes), (-1, tensor)):
        for offsets, sizes in group:
            for upper in product((0, 1), repeat=len(split)):
                corner = tuple(offsets[axis] + at * sizes[axis] for axis, at in zip(split, upper, strict=True))
                corners[corner] += weight * (-1) ** sum(upper)
    if any(corners.values()):
        raise malformed(where, "shards overlap and leave holes")


def _check_together(manifest: Manifest, root: ManifestRoot) -> None:
    what = layout.manifest_root(root.snapshot)
    for tensor in manifest.tensors:
        for shard in tensor.shards:
            if shard.pack is not None:
                number, offset = shard.pack
                size = volume(shard.sizes) * tensor.item_size_bytes
                if number >= len(manifest.packs) or offset + size > manifest.packs[number].size_bytes:
                    raise malformed(what, f"tensor {_shown(tensor.path)} lies outside its pack")
    if manifest.chunk_tree() != root.chunks:
        raise malformed(what, "the chunk tree does not match the chunks")
    if manifest.raw_bytes != root.raw_bytes:
        raise malformed(what, f"raw_bytes is {root.raw_bytes}, the tensors have {manifest.raw_bytes}")
    states = [tree for tree in manifest.trees if tree.section == SECTION_STATE]
    if root.top == TOP_SINGLE and len(states) != 1:
        raise malformed(what, f"{len(states)} trees where one is expected")
    sizes: dict[bytes, int] = {}
    for chunk, size in manifest.chunks():
        if sizes.setdefault(chunk, size) != size:
            raise malformed(what, f"chunk {chunk.hex()[:16]} is said to have two sizes")

"""The manifest of a plan whose chunks are digested.

A training run takes many snapshots of one structure. What stays the same of their manifest is encoded once and kept
with the plan (``CapturePlan.memo``): for 20,000 tensors that is megabytes of JSON against a few digests. The bytes are
those that ``manifest.encode`` gives of the same content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

from ciuic_async.errors import UsageError
from ciuic_async.format import dtypes, jsontext, manifest
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, Buffer
from ciuic_async.format.entry import ChunkTree
from ciuic_async.format.jsontext import Hole
from ciuic_async.format.manifest import (
    PART_TARGET_BYTES,
    EncodedManifest,
    Manifest,
    Node,
    Pack,
    Progress,
    Shard,
    StoredTensor,
)
from ciuic_async.handoffs import CapturePlan, PlannedTensor


@dataclass(frozen=True, slots=True)
class Description:
    """A manifest's files, and what an entry and a locator say of it."""

    encoded: EncodedManifest
    distinct: dict[bytes, int]
    """Raw size of every distinct chunk, in manifest order: the order of a locator's rows."""
    chunks: ChunkTree
    raw_bytes: int


def describe(
    plan: CapturePlan,
    snapshot: str,
    digests: Sequence[Buffer],
    progress: Progress,
    environment: dict[str, str],
) -> Description:
    """Encode the manifest of a snapshot. Called on the writer thread alone, as it fills the plan's memo.

    Args:
        digests: of every region its chunks' digests, concatenated.

    Raises:
        UsageError: like ``manifest.encode``.
    """
    try:
        return _describe(plan, snapshot, digests, progress, environment)
    except ValueError as error:
        raise UsageError(f"the state cannot be described: {error}", kind="unsupported_value") from error


def _describe(
    plan: CapturePlan,
    snapshot: str,
    digests: Sequence[Buffer],
    progress: Progress,
    environment: dict[str, str],
) -> Description:
    chunk_digests, sizes = _chunks(plan, digests)
    tree = manifest.chunk_tree(chunk_digests)
    distinct = dict(zip(chunk_digests, sizes, strict=True))
    head = Manifest(snapshot, plan.top, (), (), (), progress, environment)
    part = _only_part(plan, snapshot, digests)
    if part is None:
        whole = full_manifest(plan, snapshot, digests, progress, environment)
        encoded = manifest.encode(whole, part_target_bytes=PART_TARGET_BYTES)
    else:
        encoded = manifest.with_root(head, [part], tree, plan.memo.raw_bytes)
    return Description(encoded, distinct, tree, plan.memo.raw_bytes)


def _chunks(plan: CapturePlan, digests: Sequence[Buffer]) -> tuple[list[bytes], list[int]]:
    """Digest and size of every chunk in manifest order, which is the order of addresses."""
    chunk_digests, sizes = [], []
    for region, joined in zip(plan.regions, map(bytes, digests), strict=True):
        chunk_digests += [joined[at : at + DIGEST_SIZE_BYTES] for at in range(0, len(joined), DIGEST_SIZE_BYTES)]
        whole, rest = divmod(region.size_bytes, plan.chunk_size_bytes)
        sizes += [plan.chunk_size_bytes] * whole + [rest] * (rest > 0)
    return chunk_digests, sizes


def _only_part(plan: CapturePlan, snapshot: str, digests: Sequence[Buffer]) -> bytes | None:
    """The manifest's only part; None when it is so large that it may have to be split."""
    memo = plan.memo
    if memo.part is None:
        memo.part = _template(plan)
        memo.raw_bytes = sum(
            manifest.volume(tensor.shape) * dtypes.ITEM_SIZE_BYTES[tensor.dtype] for tensor in plan.tensors
        )
    if sum(map(len, memo.part.pieces)) > PART_TARGET_BYTES:
        return None
    memo.texts = tuple(_texts(plan.values, memo.values, memo.texts))
    memo.values = plan.values
    texts = [*memo.texts, jsontext.encode(snapshot), *(b'"%b"' % bytes(joined).hex().encode() for joined in digests)]
    part = memo.part.fill(texts)
    return part if len(part) <= PART_TARGET_BYTES else None


def _texts(values: tuple[Node, ...], known: tuple[Node, ...], texts: tuple[bytes, ...]) -> list[bytes]:
    """JSON of ``values``; most are the very nodes that are ``known`` from the snapshot before."""
    if len(values) != len(known):
        return [jsontext.encode(value) for value in values]
    if all(map(is_, values, known)):
        return list(texts)
    return [
        text if value is old else jsontext.encode(value) for value, old, text in zip(values, known, texts, strict=True)
    ]


def _template(plan: CapturePlan) -> jsontext.Template:
    """The manifest as one part. Holes: the plan's values, then the snapshot's id, then the digests of each region."""
    snapshot = Hole(len(plan.values))
    regions = [Hole(snapshot.number + 1 + number) for number in range(len(plan.regions))]
    packs = [
        manifest.pack_json(region.item_size_bytes, region.size_bytes, hole)
        for region, hole in zip(plan.regions[: plan.pack_count], regions, strict=False)
    ]
    tensors = (_tensor_json(tensor, plan.chunk_size_bytes, regions) for tensor in plan.tensors)
    trees = [manifest.tree_json(tree) for tree in plan.forms]
    all_tensors = Hole(snapshot.number + 1 + len(regions))
    body = {"trees": trees, "packs": packs, "tensors": all_tensors}
    part = jsontext.encode_template(manifest.part_json(snapshot, 0, body))
    return part.insert(all_tensors.number, jsontext.encode_list_template(tensors))


def _tensor_json(tensor: PlannedTensor, chunk_size_bytes: int, regions: list[Hole]) -> dict[str, Node]:
    offset = tensor.pack_offset_bytes
    shard = manifest.shard_json(
        (0,) * len(tensor.shape),
        tensor.shape,
        None if offset is None else (tensor.region, offset),
        chunk_size_bytes,
        regions[tensor.region] if tensor.region >= 0 else "",
    )
    return manifest.tensor_json(tensor.path, tensor.dtype, tensor.shape, tensor.device, [shard])


def full_manifest(
    plan: CapturePlan,
    snapshot: str,
    digests: Sequence[Buffer],
    progress: Progress,
    environment: dict[str, str],
) -> Manifest:
    """The manifest as values: what ``describe`` encodes."""
    packs = tuple(
        Pack(region.item_size_bytes, region.size_bytes, bytes(digests[number]))
        for number, region in enumerate(plan.regions[: plan.pack_count])
    )
    tensors = []
    for tensor in plan.tensors:
        zeros = (0,) * len(tensor.shape)
        if tensor.pack_offset_bytes is not None:
            shard = Shard(zeros, tensor.shape, pack=(tensor.region, tensor.pack_offset_bytes))
        else:
            content = bytes(digests[tensor.region]) if tensor.region >= 0 else b""
            shard = Shard(zeros, tensor.shape, plan.chunk_size_bytes, content)
        tensors.append(StoredTensor(tensor.path, tensor.dtype, tensor.shape, tensor.device, (shard,)))
    return Manifest(snapshot, plan.top, plan.trees, packs, tuple(tensors), progress, environment)

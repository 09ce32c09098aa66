"""A snapshot's plan and request as bytes beside its payload: all that another process needs to make it durable.

Read by the keeper of the same version on the same machine (docs/design/003-keeper.md), so this is no format that lasts.
Still nothing in it is executed, and what does not parse is an ``IntegrityError``.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from ciuic_async.format import jsontext, layout
from ciuic_async.format.digest import Buffer
from ciuic_async.format.entry import Position
from ciuic_async.format.fields import Fields, check_array, check_hex, check_integer, malformed
from ciuic_async.format.jsontext import MAX_SAFE_INTEGER, Hole
from ciuic_async.format.manifest import Node, Progress, Tree
from ciuic_async.format.segment import ITEM_SIZES_BYTES, MAX_CHUNK_BYTES
from ciuic_async.handoffs import CapturePlan, PlannedTensor, Region
from ciuic_async.pipeline.persist import SaveRequest
from ciuic_async.version import ENGINE

_WHAT = "staging memory"
_LIMIT_BYTES = 1 << 40  # the memory is there already
_LEAST_CHUNK_BYTES = 1 << 16  # of a chain: bounds how many chunks a payload can have
_NO_REGION = -1  # of a tensor without bytes
_HOLE = "hole"  # no value node has this tag


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a snapshot came from.

    ``parent`` and ``leaf_hash`` are the snapshot's that training was restored from, or that was durable last; None for
    none. Snapshots of the same run in the log from index ``since`` on came after it.
    """

    parent: str | None
    leaf_hash: bytes | None
    since: int


@dataclass(frozen=True, slots=True)
class Handover:
    """A snapshot that somebody else is to finish. ``request`` has no parent yet."""

    request: SaveRequest
    lineage: Lineage


def encode_plan(plan: CapturePlan) -> bytes:
    """The part that snapshots of one structure share: everything but ``plan.values``."""
    body = jsontext.encode_template(
        {
            "engine": ENGINE,
            "top": plan.top,
            "chunk_size_bytes": plan.chunk_size_bytes,
            "pack_count": plan.pack_count,
            "trees": [[tree.section, tree.key, tree.node] for tree in plan.forms],
            "tensors": [
                [list(t.path), t.dtype, list(t.shape), t.device, t.region, t.pack_offset_bytes] for t in plan.tensors
            ],
            "regions": [[r.address, r.size_bytes, r.item_size_bytes, list(r.path), r.frozen] for r in plan.regions],
        }
    )
    return body.fill([b'{"%s":%d}' % (_HOLE.encode(), number) for number in range(len(plan.values))])


def encode_request(request: SaveRequest, lineage: Lineage) -> bytes:
    """The part that each snapshot has of its own. ``request.parent`` is not looked at."""
    return jsontext.encode(
        {
            "snapshot": request.snapshot,
            "step": request.step,
            "epoch": request.epoch,
            "batch": request.batch,
            "progress": list(astuple(request.progress)),
            "metrics": [list(metric) for metric in request.metrics],
            "tags": list(request.tags),
            "environment": request.environment,
            "values": list(request.plan.values),
            "remembered": [[region, digests.hex()] for region, digests in request.remembered.items()],
            "parent": lineage.parent,
            "leaf_hash": None if lineage.leaf_hash is None else lineage.leaf_hash.hex(),
            "since": lineage.since,
        }
    )


def decode(plan: Buffer, request: Buffer) -> Handover:
    """What ``encode_plan`` and ``encode_request`` wrote.

    Raises:
        IntegrityError: they did not, or a trainer of another version did (kind ``other_version``).
    """
    try:
        return _decode(_parsed(plan), _parsed(request))
    except (TypeError, ValueError, AttributeError) as error:
        raise malformed(_WHAT, f"no description of a snapshot: {error}") from error


def _parsed(data: Buffer) -> Fields:
    return Fields(jsontext.decode(bytes(data), what=_WHAT, limit_bytes=_LIMIT_BYTES), _WHAT)


def _decode(shared: Fields, own: Fields) -> Handover:
    engine = shared.string("engine")
    if engine != ENGINE:
        error = malformed(_WHAT, f"written by {engine[:80]}, this is {ENGINE}")
        error.kind = "other_version"
        raise error
    values = tuple(own.array("values"))
    regions = tuple(_region(item) for item in shared.array("regions"))
    plan = CapturePlan(
        top=shared.string("top"),
        forms=tuple(_tree(item, len(values)) for item in shared.array("trees")),
        tensors=tuple(_tensor(item, len(regions)) for item in shared.array("tensors")),
        regions=regions,
        pack_count=shared.integer("pack_count", high=len(regions)),
        chunk_size_bytes=shared.integer("chunk_size_bytes", low=_LEAST_CHUNK_BYTES, high=MAX_CHUNK_BYTES),
        values=values,
    )
    shared.done()
    step, epoch, batch, config = own.array("progress")
    request = SaveRequest(
        snapshot=own.matching("snapshot", layout.ID),
        plan=plan,
        step=None if own.raw("step") is None else own.integer("step"),
        epoch=_position(own, "epoch"),
        batch=_position(own, "batch"),
        progress=Progress(step, epoch, batch, config),
        metrics=tuple((_text(name), _text(value)) for name, value in own.array("metrics")),
        tags=own.strings("tags"),
        environment={name: _text(value) for name, value in own.raw("environment").items()},
        remembered=dict(_remembered(item, len(regions)) for item in own.array("remembered")),
    )
    lineage = Lineage(
        None if own.raw("parent") is None else own.string("parent"),
        None if own.raw("leaf_hash") is None else own.hex("leaf_hash", 32),
        own.integer("since"),
    )
    own.done()
    return Handover(request, lineage)


def _tree(item: object, value_count: int) -> Tree:
    section, key, node = check_array(item, _WHAT)
    return Tree(_text(section), key, _with_holes(node, value_count))


def _tensor(item: object, region_count: int) -> PlannedTensor:
    path, dtype, shape, device, region, offset = check_array(item, _WHAT)
    return PlannedTensor(
        _path(path),
        _text(dtype),
        tuple(check_integer(size, _WHAT) for size in check_array(shape, _WHAT)),
        _text(device),
        check_integer(region, _WHAT, low=_NO_REGION, high=region_count - 1),
        None if offset is None else check_integer(offset, _WHAT),
    )


def _region(item: object) -> Region:
    address, size, item_size, path, frozen = check_array(item, _WHAT)
    if item_size not in ITEM_SIZES_BYTES or not isinstance(frozen, bool):
        raise malformed(_WHAT, "a region of no known items")
    item_size = check_integer(item_size, _WHAT)
    return Region(check_integer(address, _WHAT), check_integer(size, _WHAT), item_size, _path(path), frozen)


def _remembered(item: object, region_count: int) -> tuple[int, bytes]:
    region, digests = check_array(item, _WHAT)
    return check_integer(region, _WHAT, high=region_count - 1), check_hex(digests, _WHAT)


def _path(items: object) -> tuple[str | int, ...]:
    return tuple(
        item if isinstance(item, str) else check_integer(item, _WHAT, low=-MAX_SAFE_INTEGER)
        for item in check_array(items, _WHAT)
    )


def _position(fields: Fields, name: str) -> Position:
    value = fields.raw(name)
    return value if value is None or isinstance(value, str) else fields.integer(name, low=-MAX_SAFE_INTEGER)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise malformed(_WHAT, f"expected a string, found {type(value).__name__}")
    return value


def _with_holes(node: Any, value_count: int) -> Node:
    """The node with holes again where they were; without recursion, since what is nested is as deep as values are."""
    root = [node]
    stack: list[Any] = [root]
    while stack:
        container = stack.pop()
        items = enumerate(container) if isinstance(container, list) else list(container.items())
        for place, item in items:
            if isinstance(item, dict) and item.keys() == {_HOLE}:
                container[place] = Hole(check_integer(item[_HOLE], _WHAT, high=value_count - 1))
            elif isinstance(item, list | dict):
                stack.append(item)
    return root[0]

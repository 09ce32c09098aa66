"""Entries: one line of history each (docs/format.md, section 6). Canonical JSON, at most 65535 bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ciuic_async.errors import IntegrityError, UsageError
from ciuic_async.format import jsontext, layout
from ciuic_async.format.fields import Fields, malformed

SCHEMA = "ciuic.dev/entry/v1"
LIMIT_BYTES = 65535
MAX_METRICS = 32

Position = int | str | None
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|nan|-?inf")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileReference:
    """A file by name, SHA-256 and exact size."""

    path: str
    sha256: bytes
    size_bytes: int

    def to_json(self) -> dict[str, jsontext.Json]:
        return {"path": self.path, "sha256": self.sha256.hex(), "size": self.size_bytes}

    @classmethod
    def from_fields(cls, fields: Fields, prefix: str) -> FileReference:
        path = fields.string("path")
        if path != layout.CHAIN_FILE or prefix:
            layout.check_reference(path, prefix, fields.what)
        reference = cls(path, fields.hex("sha256", 32), fields.integer("size"))
        fields.done()
        return reference


@dataclass(frozen=True, slots=True)
class ChunkTree:
    """RFC 6962 tree over the chunk digests of a snapshot, in manifest order."""

    root: bytes
    count: int

    def to_json(self) -> dict[str, jsontext.Json]:
        return {"alg": "rfc6962-sha256", "root": self.root.hex(), "count": self.count}

    @classmethod
    def from_fields(cls, fields: Fields) -> ChunkTree:
        if fields.string("alg") != "rfc6962-sha256":
            raise malformed(fields.what, f"unknown chunk tree {fields.string('alg')[:80]!r}")
        tree = cls(fields.hex("root", 32), fields.integer("count"))
        fields.done()
        return tree


@dataclass(frozen=True, slots=True)
class Common:
    """What every entry says of its origin."""

    run: str
    created: str
    host: str
    engine: str

    def to_json(self, kind: str) -> dict[str, jsontext.Json]:
        return {
            "schema": SCHEMA,
            "kind": kind,
            "run": self.run,
            "created": self.created,
            "host": self.host,
            "engine": self.engine,
        }


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """A snapshot became part of history. ``metrics`` are (name, shortest decimal), sorted by name."""

    common: Common
    snapshot: str
    parent: bytes | None
    step: int | None
    epoch: Position
    batch: Position
    tags: tuple[str, ...]
    metrics: tuple[tuple[str, str], ...]
    manifest: FileReference
    chunks: ChunkTree
    raw_bytes: int
    stored_bytes: int
    rank: int = 0
    world: int = 1

    def encode(self) -> bytes:
        return _checked(
            self.common.to_json("snapshot")
            | {
                "snapshot": self.snapshot,
                "parent": None if self.parent is None else self.parent.hex(),
                "step": self.step,
                "epoch": self.epoch,
                "batch": self.batch,
                "tags": list(self.tags),
                "metrics": [list(pair) for pair in self.metrics],
                "manifest": self.manifest.to_json(),
                "chunks": self.chunks.to_json(),
                "raw_bytes": self.raw_bytes,
                "stored_bytes": self.stored_bytes,
                "rank": self.rank,
                "world": self.world,
            }
        )


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key announces itself. Entry 0 also pins ``ciuic.json``.

    Attributes:
        previous: in entry 0 of a chain that goes on where another ended: that one's last log head, the whole note.
    """

    common: Common
    vkey: str
    chain: FileReference | None = None
    previous: str | None = None

    def encode(self) -> bytes:
        body = self.common.to_json("key") | {"vkey": self.vkey}
        if self.chain is not None:
            body["chain"] = self.chain.to_json()
        if self.previous is not None:
            body["previous"] = self.previous
        return _checked(body)


@dataclass(frozen=True, slots=True)
class PruneEntry:
    """Snapshots that retention may delete from now on."""

    common: Common
    snapshots: tuple[str, ...]
    policy: str

    def encode(self) -> bytes:
        return _checked(self.common.to_json("prune") | {"snapshots": list(self.snapshots), "policy": self.policy})


@dataclass(frozen=True, slots=True)
class RollbackEntry:
    """History goes on from an earlier snapshot, named by the leaf hash of its entry."""

    common: Common
    target: bytes
    reason: str

    def encode(self) -> bytes:
        return _checked(self.common.to_json("rollback") | {"target": self.target.hex(), "reason": self.reason})


@dataclass(frozen=True, slots=True)
class TagEntry:
    """A snapshot has a name from now on; None: nothing has it any more."""

    common: Common
    name: str
    snapshot: str | None

    def encode(self) -> bytes:
        return _checked(self.common.to_json("tag") | {"name": self.name, "snapshot": self.snapshot})


@dataclass(frozen=True, slots=True)
class NoteEntry:
    """A remark for people."""

    common: Common
    text: str

    def encode(self) -> bytes:
        return _checked(self.common.to_json("note") | {"text": self.text})


@dataclass(frozen=True, slots=True)
class OtherEntry:
    """An entry of a kind that this version only keeps and shows."""

    common: Common
    kind: str
    fields: dict[str, jsontext.Json] = field(default_factory=dict)


Entry = SnapshotEntry | KeyEntry | PruneEntry | RollbackEntry | TagEntry | NoteEntry | OtherEntry
_KINDS: dict[type[object], str] = {
    SnapshotEntry: "snapshot",
    KeyEntry: "key",
    PruneEntry: "prune",
    RollbackEntry: "rollback",
    TagEntry: "tag",
    NoteEntry: "note",
}


def kind_of(entry: Entry) -> str:
    """The ``kind`` that the entry's bytes hold."""
    return entry.kind if isinstance(entry, OtherEntry) else _KINDS[type(entry)]


def decode(data: bytes, index: int) -> Entry:
    """Parse the entry at ``index`` of the log.

    Raises:
        IntegrityError: the bytes are no entry. Unknown kinds are no error (``OtherEntry``).
    """
    what = f"entry {index}"
    value = jsontext.decode(data, what=what, limit_bytes=LIMIT_BYTES)
    fields = Fields(value, what)
    fields.schema(SCHEMA)
    common = Common(
        fields.matching("run", layout.ID),
        _time(fields, "created"),
        fields.string("host"),
        fields.string("engine"),
    )
    kind = fields.string("kind")
    entry: Entry
    if kind == "snapshot":
        entry = _decode_snapshot(common, fields)
    elif kind == "key":
        chain = fields.object("chain") if "chain" in fields else None
        entry = KeyEntry(
            common,
            fields.string("vkey"),
            None if chain is None else FileReference.from_fields(chain, prefix=""),
            fields.string("previous") if "previous" in fields else None,
        )
    elif kind == "prune":
        snapshots = fields.strings("snapshots")
        if not all(layout.ID.fullmatch(item) for item in snapshots):
            raise malformed(what, "field 'snapshots': not all are snapshot ids")
        entry = PruneEntry(common, snapshots, fields.string("policy"))
    elif kind == "rollback":
        entry = RollbackEntry(common, fields.hex("target", 32), fields.string("reason"))
    elif kind == "tag":
        snapshot = fields.raw("snapshot")
        named = None if snapshot is None else fields.matching("snapshot", layout.ID)
        entry = TagEntry(common, fields.string("name"), named)
    elif kind == "note":
        entry = NoteEntry(common, fields.string("text"))
    else:
        assert isinstance(value, dict)
        return OtherEntry(common, kind, value)
    fields.done()
    return entry


def _decode_snapshot(common: Common, fields: Fields) -> SnapshotEntry:
    parent = fields.raw("parent")
    step = fields.raw("step")
    metrics = []
    for pair in fields.array("metrics"):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, str) for item in pair)):
            raise malformed(fields.what, "field 'metrics': expected pairs of strings")
        if not _NUMBER.fullmatch(pair[1]):
            raise malformed(fields.what, f"field 'metrics': {pair[1][:80]!r} is no number")
        metrics.append((pair[0], pair[1]))
    if len(metrics) > MAX_METRICS or [name for name, _ in metrics] != sorted({name for name, _ in metrics}):
        raise malformed(fields.what, f"field 'metrics': expected at most {MAX_METRICS} sorted, distinct names")
    snapshot = fields.matching("snapshot", layout.ID)
    manifest = FileReference.from_fields(fields.object("manifest"), prefix=f"{layout.MANIFESTS}/{snapshot}")
    if manifest.path != layout.manifest_root(snapshot):
        raise malformed(fields.what, f"field 'manifest': {manifest.path} is no manifest's root")
    return SnapshotEntry(
        common=common,
        snapshot=snapshot,
        parent=None if parent is None else bytes.fromhex(fields.matching("parent", _HASH)),
        step=None if step is None else fields.integer("step"),
        epoch=_position(fields, "epoch"),
        batch=_position(fields, "batch"),
        tags=fields.strings("tags"),
        metrics=tuple(metrics),
        manifest=manifest,
        chunks=ChunkTree.from_fields(fields.object("chunks")),
        raw_bytes=fields.integer("raw_bytes"),
        stored_bytes=fields.integer("stored_bytes"),
        rank=fields.integer("rank"),
        world=fields.integer("world", low=1),
    )


def _time(fields: Fields, name: str) -> str:
    value = fields.matching(name, _TIME)
    try:
        datetime.fromisoformat(value)
    except ValueError:
        raise malformed(fields.what, f"field {name!r}: {value} is no time") from None
    return value


def _position(fields: Fields, name: str) -> Position:
    value = fields.raw(name)
    if value is None or isinstance(value, str):
        return value
    return fields.integer(name, low=-jsontext.MAX_SAFE_INTEGER)


def timestamp(seconds: float) -> str:
    """UTC with milliseconds, e.g. ``2026-11-22T06:31:14.123Z``."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _checked(body: dict[str, jsontext.Json]) -> bytes:
    try:
        data = jsontext.encode(body)
    except ValueError as error:
        raise UsageError(f"a log entry cannot hold this: {error}", kind="unsupported_value") from error
    if len(data) > LIMIT_BYTES:
        raise UsageError(f"a log entry of {len(data)} bytes, at most {LIMIT_BYTES} fit; shorten tags or metric names")
    assert decode(data, 0) is not None  # what is written can be read: checked on both paths
    return data


def as_error(index: int, message: str) -> IntegrityError:
    """The error for an entry that contradicts history."""
    return IntegrityError(f"entry {index}: {message}", kind="bad_history", where=f"entry {index}")

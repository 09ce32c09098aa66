"""The recipe of ``golden/v1``: one small file of every kind, from inputs written down here.

``python tests/format/make_golden.py`` writes them. They are written once for a format version and never again: a reader
of any later version must still understand these bytes.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from ciuic_async.format import entry, jsontext, layout, manifest, segment
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import ChunkLocation, Locator, SegmentReference

SNAPSHOT = "0123456789abcdef0123"
RUN = "fedcba9876543210fedc"
FOLDER = Path(__file__).parent / "golden" / "v1"

WEIGHT = bytes(range(256))  # float32, 8 x 8, stored as planes
BIAS = bytes(range(24))  # float32, 6, in the pack
SCALE = bytes(range(100, 104))  # float32, scalar, in the pack behind the bias
PACK = BIAS.ljust(32, b"\0") + SCALE
HALVES = (bytes(64), bytes(range(64)))  # int64, 16, in two shards, stored raw
COMMON = entry.Common(RUN, "2026-11-22T06:31:14.123Z", "node-3", "ciuic_async/1.0.0")


def chain_file() -> ChainFile:
    return ChainFile(origin="ciuic.dev/chain/" + "0f" * 16, features_optional=("golden",))


def planes(raw: bytes, item_size_bytes: int) -> bytes:
    """Byte 0 of every item, then byte 1, and so on."""
    return b"".join(raw[number::item_size_bytes] for number in range(item_size_bytes))


def records() -> list[tuple[segment.RecordHeader, bytes]]:
    """Header and payload of every record, in file order."""
    raw = [
        (segment.RecordHeader(segment.CODEC_RAW, len(data), len(data), digest(data), item), data)
        for data, item in ((PACK, 4), (HALVES[0], 8), (HALVES[1], 8))
    ]
    plane_size = len(WEIGHT) // 4
    directory = ((segment.PLANE_RAW, plane_size),) * 4
    header = segment.RecordHeader(
        segment.CODEC_PLANES, len(WEIGHT), len(WEIGHT), digest(WEIGHT), 4, directory, parameter=-50
    )
    return [raw[0], (header, planes(WEIGHT, 4)), *raw[1:]]


def segment_file(version: int = 1) -> tuple[bytes, list[segment.IndexEntry]]:
    data = bytearray(segment.pack_file_header(SNAPSHOT, 0, 0, version))
    digested = bytearray(data)
    index = []
    for header, payload in records():
        offset = segment.record_offset(len(data), header.size_bytes, header.codec, header.raw_size_bytes)
        before = bytes(offset - len(data)) + header.pack()
        data += before + payload
        digested += before if version == 2 and header.codec == segment.CODEC_RAW else before + payload
        index.append(
            segment.IndexEntry(header.digest, offset, header.record_size_bytes, header.raw_size_bytes, header.codec)
        )
    tail = segment.pack_tail(len(data), index)
    return bytes(data + tail + digest(digested + tail)), index


def snapshot_manifest() -> manifest.Manifest:
    whole = manifest.Shard((0, 0), (8, 8), 4 << 20, digest(WEIGHT))
    halves = tuple(manifest.Shard((8 * n,), (8,), 4 << 20, digest(HALVES[n])) for n in (0, 1))
    bias = manifest.Shard((0,), (6,), pack=(0, 0))
    scale = manifest.Shard((), (), pack=(0, 32))
    model = [["weight", {"tensor": 0, "parameter": True}], ["bias", {"tensor": 1}], ["scale", {"tensor": 2}]]
    return manifest.Manifest(
        snapshot=SNAPSHOT,
        top="dict",
        trees=(
            manifest.Tree("state", "model", {"ordered_dict": model}),
            manifest.Tree("state", "note", ["ünïcödé 𝄞", {"float": "3ff8000000000000"}, {"int": "-0x20000000000000"}]),
            manifest.Tree("rng", "python", {"tensor": 3}),
        ),
        packs=(manifest.Pack(4, len(PACK), digest(PACK)),),
        tensors=(
            manifest.StoredTensor(("model", "weight"), "float32", (8, 8), "cpu", (whole,)),
            manifest.StoredTensor(("model", "bias"), "float32", (6,), "cpu", (bias,)),
            manifest.StoredTensor(("model", "scale"), "float32", (), "cuda:0", (scale,)),
            manifest.StoredTensor(("python", 0), "int64", (16,), "cpu", halves),
        ),
        progress=manifest.Progress(step=1200, epoch=3, batch={"tuple": [1, "two"]}),
        environment={"python": "3.11.0", "torch": "2.6.0"},
    )


def locator() -> Locator:
    data, index = segment_file()
    reference = SegmentReference(layout.segment(SNAPSHOT, 0, 0), len(data), data[-32:])
    places = {e.digest: ChunkLocation(reference, e.offset_bytes, e.record_size_bytes, e.codec) for e in index}
    return Locator(SNAPSHOT, 0, {chunk: places[chunk] for chunk in snapshot_manifest().distinct_chunks()})


def entries() -> dict[str, bytes]:
    """One entry of every kind of version 1."""
    encoded = manifest.encode(snapshot_manifest())
    snapshot = entry.SnapshotEntry(
        common=COMMON,
        snapshot=SNAPSHOT,
        parent=bytes(range(32)),
        step=1200,
        epoch=3,
        batch="shard-7",
        tags=("best", "ünïcödé"),
        metrics=(("accuracy", "0.5"), ("loss", "1e-05")),
        manifest=encoded.reference,
        chunks=snapshot_manifest().chunk_tree(),
        raw_bytes=snapshot_manifest().raw_bytes,
        stored_bytes=4096,
    )
    chain = chain_file().encode()
    pinned = entry.FileReference(layout.CHAIN_FILE, sha256(chain).digest(), len(chain))
    vkey = "ciuic.dev/chain/" + "0f" * 16 + "+00000000+AQ=="
    return {
        "key": entry.KeyEntry(COMMON, vkey, pinned).encode(),
        "snapshot": snapshot.encode(),
        "prune": entry.PruneEntry(COMMON, (SNAPSHOT, RUN), "keep latest 3").encode(),
        "rollback": jsontext.encode(COMMON.to_json("rollback") | {"target": "ab" * 32, "reason": "loss spike"}),
        "tag": jsontext.encode(COMMON.to_json("tag") | {"name": "release", "snapshot": SNAPSHOT}),
        "note": jsontext.encode(COMMON.to_json("note") | {"text": "a note"}),
    }


def files() -> dict[str, bytes]:
    """Every golden file by its name below ``golden/v1``."""
    encoded = manifest.encode(snapshot_manifest())
    named = {layout.CHAIN_FILE: chain_file().encode(), layout.segment(SNAPSHOT, 0, 0): segment_file()[0]}
    named |= dict([*encoded.parts, encoded.root])
    named[layout.locator(SNAPSHOT, 0)] = locator().encode()
    return named | {f"entries/{kind}.json": data for kind, data in entries().items()}


if __name__ == "__main__":
    for name, data in files().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_bytes(data)

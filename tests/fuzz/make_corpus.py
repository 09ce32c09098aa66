"""The recipe of ``corpus``: small files of every kind that a target reads, made from real objects.

``python -m tests.fuzz.make_corpus`` writes them again. Files whose names begin with ``found-`` are inputs that once
broke a promise: they stay, and this script leaves them alone.
"""

from __future__ import annotations

import dataclasses
import runpy
import tempfile
from base64 import b64encode
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

import ciuic_async
from ciuic_async.capture.state_tree import Captured, flatten
from ciuic_async.codecs import planes
from ciuic_async.codecs.base import Base
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.format import entry, jsontext, manifest, merkle, segment
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import digest
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.pipeline.handover import Lineage, encode_plan, encode_request
from ciuic_async.pipeline.persist import SaveRequest
from ciuic_async.segments.reference import build_segment
from ciuic_async.staging.slot_header import DURABLE, FREE, PAGE_BYTES, STAGED, SlotHeader
from ciuic_async.transparency import note, slots, tiles
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.receipt import Receipt
from ciuic_async.transparency.slots import LogHead
from ciuic_async.version import ENGINE
from tests.fuzz.targets import ANY_ENGINE, KEY, ORIGIN, SNAPSHOT, pattern

FOLDER = Path(__file__).parent / "corpus"
FORMAT = Path(__file__).parents[1] / "format"
RUN = "fedcba9876543210fedc"
CHUNK_BYTES = 1 << 16
Files = dict[str, bytes]


def states() -> dict[str, object]:
    """Small states of which every one has something else."""
    weight = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    return {
        "empty": {},
        "single": [1, 2.5, None],
        "model": {
            "model": OrderedDict(weight=weight, bias=weight[0], tied=weight, half=torch.ones(3).to(torch.bfloat16)),
            "optimizer": {
                "state": {0: {"step": torch.tensor(3.0)}},
                "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}],
            },
        },
        "values": {
            "plain": [2**70, -1.5, float("nan"), complex(1, 2), "ü\ud800", b"bytes", bytearray(b"x")],
            "sets": ({1, 2}, frozenset("a"), range(3), slice(1, None)),
            "numpy": {
                "array": np.arange(6, dtype=np.int16).reshape(2, 3),
                "scalar": np.float32(1.5),
                3: torch.Size([1, 2]),
            },
            "empty": torch.zeros(0, 4),
        },
        "chunks": {"large": torch.from_numpy(np.frombuffer(pattern(3 * CHUNK_BYTES + 64), dtype="<f4").copy())},
    }


def captured(state: object) -> Captured:
    """As the training thread captures it."""
    return flatten(state, chunk_size_bytes=CHUNK_BYTES)


def golden() -> Files:
    """Every golden file of the format, by a name without folders."""
    named = runpy.run_path(str(FORMAT / "make_golden.py"))["files"]()
    return {name.replace("/", "-"): data for name, data in named.items()}


def entries() -> Files:
    found = {name.removeprefix("entries-"): data for name, data in golden().items() if name.startswith("entries-")}
    common = entry.Common(RUN, "2026-11-22T06:31:14.123Z", "node-3", "ciuic_async/1.0.0")
    found["key-own.json"] = entry.KeyEntry(common, KEY.vkey(ORIGIN)).encode()
    found["later-kind.json"] = jsontext.encode(common.to_json("merge") | {"parents": ["a", {"b": [1, None]}]})
    reference = entry.FileReference(f"manifests/{SNAPSHOT}/root.json", bytes(32), 1000)
    found["snapshot-bare.json"] = entry.SnapshotEntry(
        common, SNAPSHOT, None, None, None, None, (), (), reference, manifest.chunk_tree([]), 0, 0
    ).encode()
    return found


def manifests() -> Files:
    """Those of real snapshots, under one id; and one of several parts."""
    found: Files = {}
    for name, state in states().items():
        with tempfile.TemporaryDirectory() as folder:
            snapshot = ciuic_async.save(state, folder)
            where = Path(folder) / "manifests" / snapshot.id
            root = (where / "root.json").read_bytes().replace(snapshot.id.encode(), SNAPSHOT.encode())
            parts = [(where / "0.json").read_bytes().replace(snapshot.id.encode(), SNAPSHOT.encode())]
        found[f"{name}.json"] = b"\n".join([_without_environment(root), *parts])
    recipe = runpy.run_path(str(FORMAT / "make_golden.py"))["snapshot_manifest"]()
    for name, target_bytes in (("golden.json", 1 << 20), ("parts.json", 200)):
        encoded = manifest.encode(recipe, part_target_bytes=target_bytes)
        found[name] = b"\n".join([encoded.root[1], *(data for _, data in encoded.parts)])
    found["distributed.json"] = _distributed(recipe)
    return found


def _without_environment(root: bytes) -> bytes:
    value = jsontext.decode(root, what="root", limit_bytes=1 << 20)
    assert isinstance(value, dict)
    return jsontext.encode(value | {"environment": {"python": "3.11.0"}})


def _distributed(recipe: manifest.Manifest) -> bytes:
    """A tensor over a mesh of two times two ranks."""
    shards = tuple(
        manifest.Shard((row, column), (2, 3), 1 << 16, digest(b"%d %d" % (row, column)))
        for row in (0, 2)
        for column in (0, 3)
    )
    mesh = manifest.Mesh((2, 2), ("dp", "tp"))
    tensor = manifest.StoredTensor(("w",), "complex128", (4, 6), "cuda:1", shards, mesh)
    trees = (manifest.Tree("state", "w", {"tensor": 0}),)
    encoded = manifest.encode(dataclasses.replace(recipe, world=4, trees=trees, packs=(), tensors=(tensor,)))
    return b"\n".join([encoded.root[1], *(data for _, data in encoded.parts)])


def chunks() -> dict[str, EncodedChunk]:
    """A record of every codec, plane method and item size."""
    codec = planes.PlanesCodec()
    found = {"raw": RawCodec().encode(memoryview(b"raw bytes"), digest(b"raw bytes"), 1)}
    for item_size in (1, 2, 4, 8, 16):
        raw = pattern(max(2048, 300 * item_size))
        found[f"planes-{item_size}"] = codec.encode(memoryview(raw), digest(raw), item_size)
        zeros = bytes(1024 * item_size)
        found[f"zeros-{item_size}"] = codec.encode(memoryview(zeros), digest(zeros), item_size)
        new = bytes(byte ^ (number % 97 == 0) for number, byte in enumerate(raw))
        base = Base(memoryview(raw), digest(raw), 0)
        delta = planes.encode_delta(memoryview(new), digest(new), item_size, base, planes.Effort(0, 0.08))
        assert delta is not None
        found[f"delta-{item_size}"] = delta
    library = pattern(3000)[3::4] * 2
    encoded = planes.encode_planes(memoryview(library), digest(library), 1, planes.Effort(3, 0.0, None))
    assert encoded is not None
    found["library"] = encoded
    return found


def record_bytes(chunk: EncodedChunk) -> bytes:
    return chunk.header.pack() + b"".join(chunk.payload)


def segments() -> Files:
    all_chunks = chunks()
    some = [all_chunks[name] for name in ("raw", "planes-4", "delta-4", "zeros-2", "planes-2")]
    found = {"empty.seg": build_segment(SNAPSHOT, 0, 0, []), "mixed.seg": build_segment(SNAPSHOT, 0, 0, some)}
    found["raw.seg"] = build_segment(SNAPSHOT, 0, 0, [all_chunks["raw"]] * 2)
    for version in (1, 2):
        found[f"golden-v{version}.seg"] = (
            FORMAT / "golden" / f"v{version}" / "segments" / SNAPSHOT / "0-0.seg"
        ).read_bytes()
    return found


def locators() -> Files:
    found = {"golden.json": golden()[f"locators-{SNAPSHOT}.0.json"]}
    other = (FORMAT / "golden" / "v1-deltas" / "locators" / "1123456789abcdef0123.0.json").read_bytes()
    found["deltas.json"] = _renamed(other)
    body = jsontext.decode(other, what="", limit_bytes=1 << 20)
    assert isinstance(body, dict)
    found["none.json"] = _renamed(
        jsontext.encode(body | {"chunks": [], "segments": [], "schema": "ciuic.dev/locator/v1"})
    )
    with tempfile.TemporaryDirectory() as folder:
        snapshot = ciuic_async.save(states()["chunks"], folder)
        real = (Path(folder) / "locators" / f"{snapshot.id}.0.json").read_bytes()
    found["real.json"] = _renamed(real.replace(snapshot.id.encode(), SNAPSHOT.encode()))
    return found


def _renamed(data: bytes) -> bytes:
    """A locator of the one snapshot, with its own digest."""
    value = jsontext.decode(data, what="locator", limit_bytes=1 << 20)
    assert isinstance(value, dict)
    body = {name: item for name, item in value.items() if name != "digest"} | {"snapshot": SNAPSHOT}
    if not body["chunks"]:
        body.pop("bases", None)
    return jsontext.encode(body | {"digest": digest(jsontext.encode(body)).hex()})


def signed_notes() -> Files:
    head = note.head_text(ORIGIN, 5, bytes(range(32)))
    found = {"head": KEY.sign(ORIGIN, head), "proposal": KEY.sign(ORIGIN, note.proposal_text(5, bytes(32), b"bundle"))}
    found["vkeys"] = KEY.sign(ORIGIN, f"a text\n\n{KEY.vkey(ORIGIN)}\n{KEY.vkey('witness.example/w')}\n")
    witness = note.Signature("witness.example/w1", b"\1\2\3\4", bytes(72))
    signed = note.parse(KEY.sign(ORIGIN, head).encode(), "note")
    found["cosigned"] = note.format_note(head, (*signed.signatures, witness))
    found["empty-tree"] = KEY.sign(ORIGIN, note.head_text(ORIGIN, 0, merkle.EMPTY_ROOT))
    return {f"{name}.txt": text.encode() for name, text in found.items()}


def policies() -> Files:
    log = f"log {KEY.vkey(ORIGIN)} https://log.example/x\n"
    keys = [
        SigningKey.from_secret("ED25519-SECRET+" + b64encode(bytes([7 + number] * 32)).decode()) for number in range(4)
    ]
    known = [f"witness w{number} {key.cosigner(f'w{number}.example')}\n" for number, key in enumerate(keys)]
    texts = {
        "nobody": "quorum none\n",
        "writers": f"# writers\n\n{log}quorum none\n",
        "one": f"{log}{known[0]}quorum w0\n",
        "two-of-three": log + "".join(known[:3]) + "group g 2 w0 w1 w2\nquorum g\n",
        "nested": log + "".join(known) + "group g any w0 w1\n\tgroup  all all g w2 w3\nquorum all\n",
    }
    return {f"{name}.txt": text.encode() for name, text in texts.items()}


def receipts() -> Files:
    head = KEY.sign(ORIGIN, note.head_text(ORIGIN, 5, bytes(range(32)))).encode()
    cosigned = signed_notes()["cosigned.txt"]
    made = {
        "first": Receipt(0, (), head),
        "deep": Receipt(3, (bytes(32), bytes(range(32))), head, b'{"kind":"note"}'),
        "cosigned": Receipt(4, (bytes([7] * 32),), cosigned, b""),
        "large": Receipt(2**50, tuple(bytes([number] * 32) for number in range(50)), head, bytes(300)),
    }
    return {f"{name}.tlog-proof": one.encode() for name, one in made.items()}


def slot_files() -> Files:
    lines = entries()
    announced = lines["key-own.json"]
    root = merkle.leaf_hash(announced)
    return {
        "first.slot": slots.encode_slot(LogHead(0, merkle.EMPTY_ROOT), [announced], KEY, ORIGIN),
        "one.slot": slots.encode_slot(LogHead(1, root), [lines["snapshot.json"]], KEY, ORIGIN),
        "many.slot": slots.encode_slot(LogHead(2**40, root), [lines[name] for name in sorted(lines)], KEY, ORIGIN),
        "no-entry.slot": slots.encode_slot(LogHead(1, root), [b""], KEY, ORIGIN),
    }


def tile_files() -> Files:
    """Trees of several sizes by their right edges."""
    found: Files = {}
    for size in (0, 1, 3, 255, 256, 257, 700, 65536 + 3):
        edge = tiles.RightEdge()
        for number in range(size):
            edge.append(merkle.leaf_hash(b"%d" % number))
        data = b"".join(tiles.encode_tile(level) for level in edge.levels)
        found[f"edge-{size}"] = size.to_bytes(8, "big") + data
    return found


def bundles() -> Files:
    lines = list(entries().values())
    return {
        "every-kind": tiles.encode_bundle(lines),
        "key": tiles.encode_bundle([entries()["key-own.json"]]),
        "empty-entries": tiles.encode_bundle([b"", b"a", b""]),
        "none": b"",
        "full": tiles.encode_bundle([b"%d" % number for number in range(256)]),
    }


def descriptions() -> dict[str, tuple[bytes, bytes, int]]:
    """Plan and request of every state, and the length of its payload; a version is not said."""
    found = {}
    for number, (name, state) in enumerate(states().items()):
        plan = captured(state).plan
        request = SaveRequest(
            SNAPSHOT,
            plan,
            step=number or None,
            epoch=number,
            batch="shard-7",
            progress=manifest.Progress(number, {"tuple": [1, 2]}, "shard-7"),
            metrics=(("loss", "0.5"),),
            tags=("best",) * number,
            environment={"python": "3.11.0"},
            remembered={0: bytes(32)} if number == 2 else {},
        )
        lineage = Lineage(RUN, bytes(range(32)), 3) if number else Lineage(None, None, 0)
        text = encode_plan(plan).replace(b'"engine":' + jsontext.encode(ENGINE), ANY_ENGINE)
        found[name] = (text, encode_request(request, lineage), plan.size_bytes)
    return found


def handovers() -> Files:
    return {f"{name}.json": plan + b"\n" + request for name, (plan, request, _) in descriptions().items()}


def slots_in_memory() -> Files:
    found: Files = {}
    for number, (name, (plan, request, size)) in enumerate(descriptions().items()):
        if name == "chunks":
            continue  # large, and nothing that the others do not have
        at = segment.align_up(PAGE_BYTES + len(plan) + len(request), PAGE_BYTES)
        state = (STAGED, DURABLE)[number % 2]
        head = SlotHeader(state, number, number or None, SNAPSHOT, len(plan), len(request), at, size).encode()
        found[f"{name}.slot"] = (head.ljust(PAGE_BYTES, b"\0") + plan + request).ljust(at, b"\0") + bytes(size)
    found["bare.slot"] = SlotHeader(FREE, 0, None, "", 0, 0, PAGE_BYTES, 0).encode().ljust(PAGE_BYTES, b"\0")
    return found


def chain_files() -> Files:
    found = {"golden.json": golden()["ciuic.json"], "plain.json": ChainFile(ORIGIN).encode()}
    found["small-chunks.json"] = ChainFile(ORIGIN, 1 << 16, (), ("a", "ü")).encode()
    later = jsontext.decode(found["plain.json"], what="", limit_bytes=1 << 16)
    assert isinstance(later, dict)
    found["later-format.json"] = jsontext.encode(later | {"format": 2})
    found["later-feature.json"] = jsontext.encode(later | {"features_required": ["time-travel"]})
    return found


def raw_chunks() -> Files:
    """Two bytes that choose item size and level, then what is encoded."""
    contents = {
        "zeros": bytes(1500),
        "noise": b"".join(digest(b"%d" % number) for number in range(50)),
        "weights": pattern(6000),
        "skewed": b"".join(bytes([number % 7]) * (1 << number % 7) for number in range(150)),
        "two": b"ab" * 700,
        "short": b"abc",
    }
    sizes = (1, 2, 4, 8, 16)
    return {
        f"{name}-{sizes[number % 5]}.bin": bytes([number % 5, number]) + content
        for number, (name, content) in enumerate(contents.items())
    }


def corpus() -> dict[str, Files]:
    """The seeds of every target."""
    return {
        "bundle": bundles(),
        "chain_file": chain_files(),
        "encoders": raw_chunks(),
        "entry": entries(),
        "handover": handovers(),
        "locator": locators(),
        "manifest": manifests(),
        "note": signed_notes(),
        "policy": policies(),
        "receipt": receipts(),
        "record": {f"{name}.rec": record_bytes(chunk) for name, chunk in chunks().items()},
        "segment": segments(),
        "slot": slot_files(),
        "staging": slots_in_memory(),
        "tile": tile_files(),
    }


if __name__ == "__main__":
    for target, files in corpus().items():
        folder = FOLDER / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if not old.name.startswith("found-"):
                old.unlink()
        for name, data in files.items():
            (folder / name).write_bytes(data)

"""What reads bytes that somebody else may have written, one plain function each: bytes in, nothing out.

A target lets out no exception but a ``CiuicError`` (the bytes are refused) and ``BrokenPromiseError`` (a promise of the
format is broken): what is accepted must be written again as the same bytes, or, where the format allows several, as
bytes that read as an equal value. Digests and signatures would keep most mutations from the code behind them, so
targets seal their input anew, as a liar would who can compute BLAKE3 and owns a key. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from ciuic_async.codecs import planes, transform
from ciuic_async.codecs.base import Base
from ciuic_async.codecs.decode import decode as decode_record
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.errors import CiuicError
from ciuic_async.format import entry as entries
from ciuic_async.format import jsontext, layout, merkle, segment
from ciuic_async.format import locator as locators
from ciuic_async.format import manifest as manifests
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import DIGEST_SIZE_BYTES, digest
from ciuic_async.format.dtypes import ITEM_SIZE_BYTES
from ciuic_async.format.locator import ChunkLocation, SegmentReference
from ciuic_async.format.segment import RecordHeader
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.keeper.held import HeldSlot
from ciuic_async.pipeline import handover as handovers
from ciuic_async.segments.reader import SegmentReader
from ciuic_async.segments.reference import build_segment
from ciuic_async.segments.whole import check_segment, scan_segment
from ciuic_async.staging.slot_header import PAGE_BYTES, SlotHeader
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import note as notes
from ciuic_async.transparency import slots, tiles
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.policy import Policy
from ciuic_async.transparency.receipt import Receipt
from ciuic_async.transparency.slots import LogHead
from ciuic_async.transparency.view import View
from ciuic_async.version import ENGINE

SNAPSHOT = "0123456789abcdef0123"
SEGMENT = layout.segment(SNAPSHOT, 0, 0)
ORIGIN = "ciuic.dev/chain/" + "0f" * 16
KEY = SigningKey.from_secret("ED25519-SECRET+" + "A" * 43 + "=")  # of zeros: a key that everybody has
VKEY = notes.parse_vkey(KEY.vkey(ORIGIN))
ANY_ENGINE = b'"engine":"any"'
"""What a seed says in place of the version of this package, so that seeds outlive versions."""

RAW_LIMIT_BYTES = 4 << 20
"""Larger chunks are only parsed: what the format allows at most is 64 MiB, and takes more memory than a target may."""

CORES: tuple[ModuleType | None, ...] = (None,) if planes.native_core() is None else (None, planes.native_core())


class BrokenPromiseError(AssertionError):
    """A promise of the format is broken."""


def require(condition: bool, message: str) -> None:
    """Raise ``BrokenPromiseError`` unless the promise holds."""
    if not condition:
        raise BrokenPromiseError(message)


def _same(again: bytes, data: bytes) -> None:
    require(again == data, f"accepted, and written again as other bytes: {again[:200]!r} for {data[:200]!r}")


def _written(write: Callable[[], bytes]) -> bytes:
    """What is accepted can be written."""
    try:
        return write()
    except CiuicError as error:
        raise BrokenPromiseError(f"accepted, and cannot be written again: {error}") from error


# --- JSON files -------------------------------------------------------------------------------------------------------


def chain_file(data: bytes) -> None:
    """``ciuic.json``."""
    chain = ChainFile.decode(data)
    _same(_written(chain.encode), data)


def entry(data: bytes) -> None:
    """One line of history."""
    decoded = entries.decode(data, 7)
    if isinstance(decoded, entries.OtherEntry):
        _same(jsontext.encode(decoded.fields), data)
    else:
        _same(_written(decoded.encode), data)


def manifest(data: bytes) -> None:
    """A root, and behind newlines (canonical JSON has none) its parts."""
    first, *parts = data.split(b"\n")
    root = manifests.decode_root(first, SNAPSHOT)
    parts = [*parts, *(b"" for _ in root.parts)][: len(root.parts)]  # a reader reads as many as the root names
    with suppress(CiuicError):
        manifests.assemble(root, parts)
    root = _sealed_root(root, parts)
    decoded = manifests.assemble(root, parts)
    again = manifests.encode(decoded)
    again_root = manifests.decode_root(_written(lambda: again.root[1]), SNAPSHOT)
    again_parts = [part for _, part in again.parts]
    require(manifests.assemble(again_root, again_parts) == decoded, "written again, the manifest is another one")
    require(replace(again_root, parts=root.parts) == root, "written again, the root is another one")
    if len(parts) == 1 and json.loads(parts[0])["rank"] == 0:
        _same(again_parts[0], parts[0])


def _sealed_root(root: manifests.ManifestRoot, parts: list[bytes]) -> manifests.ManifestRoot:
    """The root with the chunk tree and the length that its parts have, if they have any."""
    try:
        bodies: list[dict[str, Any]] = [json.loads(part) for part in parts]
        digests = [bytes.fromhex(pack["digest"]) for body in bodies for pack in body["packs"]]
        raw_bytes = 0
        for tensor in (tensor for body in bodies for tensor in body["tensors"]):
            item_size = ITEM_SIZE_BYTES[tensor["dtype"]]
            raw_bytes += manifests.volume(tensor["shape"]) * item_size
            for text in (shard.get("digests", "") for shard in tensor["shards"]):
                digests += [bytes.fromhex(text[at : at + 64]) for at in range(0, len(text), 64)]
        if not 0 <= raw_bytes <= jsontext.MAX_SAFE_INTEGER:
            return root
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return root
    return replace(root, chunks=manifests.chunk_tree(digests), raw_bytes=raw_bytes)


def locator(data: bytes) -> None:
    """Where chunks lie; their digests, which the manifest states, are made up."""
    with suppress(CiuicError):
        locators.decode(data, SNAPSHOT, 0, _chunks(1))
    sealed, count = _sealed_locator(data)
    decoded = locators.decode(sealed, SNAPSHOT, 0, _chunks(count))
    again = _written(decoded.encode)
    require(locators.decode(again, SNAPSHOT, 0, _chunks(count)) == decoded, "written again, the locator is another one")
    if json.loads(again)["segments"] == json.loads(sealed)["segments"]:  # in order of use, and all of them used
        _same(again, sealed)


def _chunks(count: int) -> dict[bytes, int]:
    return {digest(b"%d" % number): 1 << 20 for number in range(count)}


def _sealed_locator(data: bytes) -> tuple[bytes, int]:
    """With its own digest made right, and the number of its rows."""
    try:
        value = json.loads(data)
        body = {name: item for name, item in value.items() if name != "digest"}
        sealed = jsontext.encode(body | {"digest": digest(jsontext.encode(body)).hex()})
        return sealed, min(len(value["chunks"]), 10_000)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data, 1


# --- segments ---------------------------------------------------------------------------------------------------------


def segment_file(data: bytes) -> None:
    """A whole segment: checked, scanned, every record read, written again."""
    with suppress(CiuicError):
        _whole_segment(data)
    _whole_segment(_sealed_segment(data))


def _whole_segment(content: bytes) -> None:
    store = MemoryStore()
    store.create(SEGMENT, content)
    reference = SegmentReference(SEGMENT, len(content), content[-DIGEST_SIZE_BYTES:])
    found = scan_segment(store, SEGMENT)
    _read_records(store, reference, found)
    index = check_segment(store, reference)
    places = {offset: header for header, offset in found}
    chunks = []
    for line in index:
        header = places.get(line.offset_bytes)
        require(header is not None, f"checked, but a scan finds no record at {line.offset_bytes}")
        assert header is not None
        start = line.offset_bytes + header.size_bytes
        chunks.append(EncodedChunk(header, (content[start : start + header.stored_size_bytes],)))
    owner = segment.parse_file_header(content, SEGMENT)
    if owner.version != segment.VERSION:
        return
    again = build_segment(owner.snapshot, owner.rank, owner.number, chunks)
    if _end(content) == segment.align_up(_records_end(index), segment.ALIGNMENT_BYTES):  # no zeros too many before it
        _same(again, content)
    store = MemoryStore()
    store.create(SEGMENT, again)
    reference = SegmentReference(SEGMENT, len(again), again[-DIGEST_SIZE_BYTES:])
    require(check_segment(store, reference) == index, "written again, the segment has other records")


def _records_end(index: list[segment.IndexEntry]) -> int:
    return index[-1].offset_bytes + index[-1].record_size_bytes if index else segment.FILE_HEADER_BYTES


def _end(content: bytes) -> int:
    """Where the trailer says that the index begins."""
    return segment.parse_trailer(content[-segment.TRAILER_BYTES :], len(content), SEGMENT).index_offset_bytes


def _read_records(store: MemoryStore, reference: SegmentReference, found: list[tuple[RecordHeader, int]]) -> None:
    """Each record by itself, as a locator would lead to it; bases are looked for in the same segment."""
    places = {
        header.digest: (
            header.raw_size_bytes,
            ChunkLocation(reference, offset, header.record_size_bytes, header.codec, header.depth),
        )
        for header, offset in found
        if header.raw_size_bytes <= RAW_LIMIT_BYTES
    }
    total = 0
    with SegmentReader(store, decode_record, bases=places.get) as reader:
        for chunk, (raw_size, location) in places.items():
            total += raw_size
            if total > RAW_LIMIT_BYTES:
                return
            with suppress(CiuicError):
                raw = reader.read_chunk(chunk, raw_size, location)
                require(len(raw) == raw_size and digest(raw) == chunk, "a chunk that is not what its digest says")


def _sealed_segment(data: bytes) -> bytes:
    """With the checksum of every record header made right, the digest of raw payloads, and the digest at the end."""
    content = bytearray(data)
    left_out: list[tuple[int, int]] = []
    index = []
    for at in range(segment.FILE_HEADER_BYTES, len(content), segment.ALIGNMENT_BYTES):
        if content[at : at + 4] == b"CREC":
            payload = _seal_header(content, at)
            with suppress(CiuicError):
                header = segment.parse_record_header(content[at:payload], SEGMENT)
                end = at + header.record_size_bytes
                if segment.leaves_out(int.from_bytes(content[8:10], "little"), header.codec) and end <= len(content):
                    left_out.append((payload, end))
                index.append(at)
    digested = bytearray(content[:-DIGEST_SIZE_BYTES])
    for start, end in reversed(left_out):
        del digested[start:end]
    return bytes(content[:-DIGEST_SIZE_BYTES]) + digest(digested)


def _seal_header(content: bytearray, at: int) -> int:
    """Make a record header's checksum right, and a raw record's digest; where the payload starts."""
    size = int.from_bytes(content[at + 4 : at + 6], "little")
    end = at + size
    if not segment.RECORD_HEADER_BYTES <= size <= segment.MAX_RECORD_HEADER_BYTES or end > len(content):
        return at
    stored = int.from_bytes(content[at + 16 : at + 24], "little")
    if content[at + 6] == segment.CODEC_RAW and end + stored <= len(content):
        content[at + 24 : at + 56] = digest(content[end : end + stored])
    content[at + 120 : at + 128] = bytes(8)
    content[at + 120 : at + 128] = digest(content[at:end])[:8]
    return end


def record(data: bytes) -> None:
    """One record: header and payload, decoded by each core there is."""
    content = bytearray(data)
    if len(content) >= segment.RECORD_HEADER_BYTES:
        _seal_header(content, 0)
    header = segment.parse_record_header(content, "a record")
    _same(header.pack(), bytes(content[: header.size_bytes]))
    if header.raw_size_bytes > RAW_LIMIT_BYTES:
        return
    payload = bytes(content[header.size_bytes : header.record_size_bytes])
    base = memoryview(pattern(header.raw_size_bytes)) if header.codec == segment.CODEC_DELTA else None
    out = memoryview(bytearray(header.raw_size_bytes))
    if header.codec == segment.CODEC_RAW or len(payload) != header.stored_size_bytes:
        decode_record(header, payload, out, base)
        _same(bytes(out), payload)
        return
    results = [_decoded(header, payload, base, core) for core in CORES]
    # What a damaged zstd frame decodes to, and whether it does, is nobody's promise: versions of zstd differ, and the
    # chunk's digest tells. All else is the same.
    frames = any(method == segment.PLANE_ZSTD for method, _ in header.planes)
    require(frames or all(result == results[0] for result in results), "the cores decode differently")
    decode_record(header, payload, out, base)
    require(bytes(out) == results[-1], "decoding twice gives two results")


def _decoded(header: RecordHeader, payload: bytes, base: memoryview | None, core: ModuleType | None) -> bytes | None:
    """What ``decode_record`` gives with this core; None where the payload is refused."""
    out = memoryview(bytearray(header.raw_size_bytes))
    try:
        planes.decode(header.planes, payload, out, core, transform.of_record(header), base)
    except ValueError:
        return None
    return bytes(out)


def encoders(data: bytes) -> None:
    """Any bytes as a chunk: what an encoder makes of them is decoded to the same, by each core."""
    if len(data) < 2:
        return
    item_size = segment.ITEM_SIZES_BYTES[data[0] % len(segment.ITEM_SIZES_BYTES)]
    level = (0, 1, 3, -50)[data[1] % 4]
    raw = memoryview(data)[2 : 2 + (len(data) - 2) // item_size * item_size]
    chunk = digest(raw)
    base = Base(memoryview(pattern(len(raw))), digest(pattern(len(raw))), data[1] // 4 % segment.MAX_DEPTH)
    for core in CORES:
        effort = planes.Effort(level, data[1] / 4096, core)
        for encoded in (
            RawCodec().encode(raw, chunk, item_size),
            planes.encode_planes(raw, chunk, item_size, effort),
            planes.encode_delta(raw, chunk, item_size, base, effort) if base.digest != chunk else None,
        ):
            if encoded is not None:
                _check_encoded(encoded, raw, base.raw)


def _check_encoded(encoded: EncodedChunk, raw: memoryview, base: memoryview) -> None:
    header = encoded.header
    payload = b"".join(encoded.payload)
    require(segment.parse_record_header(_written(header.pack), "a record") == header, "a header that reads differently")
    other = base if header.codec == segment.CODEC_DELTA else None
    if header.codec == segment.CODEC_RAW:
        require(payload == bytes(raw), "a raw record of other bytes")
        return
    for core in CORES:
        require(_decoded(header, payload, other, core) == bytes(raw), "what was encoded is decoded to other bytes")


def pattern(size_bytes: int) -> bytes:
    """Bytes that are like weights: the low one of every four is noise, the high one nearly constant."""
    words = np.arange((size_bytes + 3) // 4, dtype=np.uint32)
    noisy = (words * np.uint32(2654435761)) >> np.uint32(12) | np.uint32(0x3F000000)
    return noisy.astype("<u4").tobytes()[:size_bytes]


# --- the log ----------------------------------------------------------------------------------------------------------


def signed_note(data: bytes) -> None:
    """A signed note, and what its text may be: a head, a proposal, verifier keys."""
    parsed = notes.parse(data, "a note")
    _same(notes.format_note(parsed.text, parsed.signatures).encode(), data)
    with suppress(CiuicError):
        notes.verify(data, {(ORIGIN, VKEY.key_id): VKEY}, "a note")
        signature = notes.parse(KEY.sign(ORIGIN, parsed.text).encode(), "a note").signatures[0]
        require(signature in parsed.signatures, "a signature verified that the key did not make")
    signed = notes.verify(KEY.sign(ORIGIN, parsed.text).encode(), {(ORIGIN, VKEY.key_id): VKEY}, "a note")
    require(signed.text == parsed.text, "signed again, the text is another one")
    with suppress(CiuicError):
        size, root = notes.parse_head(parsed.text, ORIGIN, "a head")
        _same(notes.head_text(ORIGIN, size, root).encode(), parsed.text.encode())
    with suppress(CiuicError):
        old_size, old_root, content = notes.parse_proposal(parsed.text, "a proposal")
        again = notes.proposal_text(old_size, old_root, b"").rpartition(" ")[0] + f" {content}\n"
        _same(again.encode(), parsed.text.encode())
    for line in parsed.text.split("\n")[:100]:
        with suppress(CiuicError):
            _same(str(notes.parse_vkey(line)).encode(), line.encode())


def policy(data: bytes) -> None:
    """A policy (C2SP tlog-policy): what it formats to means the same, and signing more never un-meets its quorum."""
    parsed = Policy.parse(data, "a policy")
    require(Policy.parse(parsed.format().encode(), "a policy") == parsed, "formatted, it is another policy")
    witnesses = [witness.vkey for witness in parsed.witnesses]
    met = [parsed.witnessed(set(witnesses[:count])).met for count in range(len(witnesses) + 1)]
    require(met == sorted(met), "a quorum is met by fewer and not by more")


def receipt(data: bytes) -> None:
    """A receipt (C2SP tlog-proof): a proof and a signed head."""
    _same(Receipt.decode(data, "a receipt").encode(), data)


def slot(data: bytes) -> None:
    """The file that claims the next entries."""
    with suppress(CiuicError):
        slots.check_slot(data, LogHead(0, merkle.EMPTY_ROOT), ORIGIN, lambda key_id: None)
    sealed, old = _sealed_slot(data)
    checked = slots.check_slot(sealed, old, ORIGIN, lambda key_id: VKEY if key_id == VKEY.key_id else None)
    _same(slots.encode_slot(old, checked.entries, KEY, ORIGIN), sealed)


def _sealed_slot(data: bytes) -> tuple[bytes, LogHead]:
    """With the bundle's digest made right and signed, and the log that it says it follows."""
    old = LogHead(0, merkle.EMPTY_ROOT)
    header = re.match(rb"(ciuic\.dev/slot-file/v\d+) (\d{1,9}) (\d{1,9})\n", data)
    if header is None:
        return data, old
    middle = header.end() + int(header[2])
    text, empty, _ = data[header.end() : middle].rpartition(b"\n\n")
    bundle = data[middle:]
    try:
        proposal, found, _ = text.decode().rpartition("\nsha256 ")
        if not empty or not found:
            return data, old
        content = notes.proposal_text(0, b"", bundle).splitlines()[-1]
        signed = KEY.sign(ORIGIN, f"{proposal}\n{content}\n")
        size, root, _ = notes.parse_proposal(f"{proposal}\n{content}\n", "a proposal")
        old = LogHead(size, root)
    except CiuicError:
        pass
    except ValueError:
        return data, old
    return b"%s %d %d\n" % (header[1], len(signed.encode()), len(bundle)) + signed.encode() + bundle, old


def tile(data: bytes) -> None:
    """Tiles at the right edge of a tree whose size is the first 8 bytes; the rest as one tile, too."""
    size, rest = int.from_bytes(data[:8], "big"), data[8:]
    with suppress(CiuicError):
        hashes = tiles.decode_tile(rest, size % tiles.WIDTH or tiles.WIDTH, "a tile")
        _same(tiles.encode_tile(hashes), rest)
    if size <= notes.MAX_SIZE:
        _edge(size, rest)


def bundle(data: bytes) -> None:
    """Entries behind their lengths."""
    found = tiles.decode_bundle(data, None, "a bundle")
    _same(tiles.encode_bundle(found), data)
    if 0 < len(found) < tiles.WIDTH:
        _read_bundle(found, data)


def _edge(size: int, data: bytes) -> None:
    """Load the tree whose edge tiles are these bytes, cut one after the other."""
    store = MemoryStore()
    levels: list[tuple[bytes, ...]] = []
    start = 0
    for one in tiles.edge_tiles(size):
        if one is None:
            levels.append(())
            continue
        piece = data[start : start + one.width * tiles.HASH_BYTES]
        start += len(piece)
        store.create(one.name, piece)
        require(layout.is_known(one.name), f"{one.name} is no name of the format")
        levels.append(tiles.decode_tile(piece, one.width, one.name))
    edge = tiles.RightEdge(size, levels)
    view = View.load(store, ORIGIN, LogHead(size, edge.root()))
    if size < tiles.WIDTH:
        require(view.head.root == merkle.root(view.edge.levels[0] if size else ()), "the edge gives another root")
    for height in range(min(8, size.bit_length())):  # what a proof asks for first: all of it is in the edge
        index = (size >> height) - 1
        if index >> (8 - height) == size >> 8:
            view.subtree(height, index)


def _read_bundle(lines: tuple[bytes, ...], data: bytes) -> None:
    """A published log of exactly these entries gives them back."""
    edge = tiles.RightEdge()
    for item in lines:
        edge.append(merkle.leaf_hash(item))
    store = MemoryStore()
    store.create(layout.tile(0, 0, len(lines)), tiles.encode_tile(edge.levels[0]))
    store.create(layout.entry_bundle(0, len(lines)), data)
    view = View.load(store, ORIGIN, LogHead(edge.size, edge.root()))
    require(view.bundle(0) == lines, "a bundle that reads as other entries")
    view.find_key(VKEY.key_id)


# --- what the keeper finds --------------------------------------------------------------------------------------------


def handover(data: bytes) -> None:
    """A plan, and behind a newline a request."""
    plan, _, request = data.partition(b"\n")
    _describe(plan, request)


def staging(data: bytes) -> None:
    """A slot's memory, from its header on."""
    header = SlotHeader.decode(data, len(data))
    again = header.encode()
    _same(again, data[: len(again)])
    held = HeldSlot(header, memoryview(bytearray(data)))
    with suppress(CiuicError):  # seeds are of no version
        held.window(held.handover())
    middle = PAGE_BYTES + header.plan_size_bytes
    described = _describe(data[PAGE_BYTES:middle], data[middle : middle + header.request_size_bytes])
    window = held.window(described)
    for chunk in window.chunks[:100]:
        require(len(window.bytes_of(chunk)) == chunk.size_bytes, "a chunk that is not in the payload")


def _describe(plan: bytes, request: bytes) -> handovers.Handover:
    plan = plan.replace(ANY_ENGINE, b'"engine":' + jsontext.encode(ENGINE), 1)
    described = handovers.decode(plan, request)
    _same(_written(lambda: handovers.encode_plan(described.request.plan)), plan)
    _same(_written(lambda: handovers.encode_request(described.request, described.lineage)), request)
    described_plan = described.request.plan
    require(len(described_plan.trees) == len(described_plan.forms), "a plan without its trees")
    regions = range(-1, len(described_plan.regions))  # -1: of a tensor without bytes
    require(all(tensor.region in regions for tensor in described_plan.tensors), "a tensor of no region")
    return described


TARGETS: dict[str, Callable[[bytes], None]] = {
    "bundle": bundle,
    "chain_file": chain_file,
    "encoders": encoders,
    "entry": entry,
    "handover": handover,
    "locator": locator,
    "manifest": manifest,
    "note": signed_note,
    "policy": policy,
    "receipt": receipt,
    "record": record,
    "segment": segment_file,
    "slot": slot,
    "staging": staging,
    "tile": tile,
}


def accepts(target: str, data: bytes) -> bool:
    """Run a target; whether it takes these bytes. Raises what a target must not raise."""
    try:
        TARGETS[target](data)
    except CiuicError:
        return False
    return True

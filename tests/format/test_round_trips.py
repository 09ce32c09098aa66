"""What is written is read back equal, for any input; cross-checked with independent implementations."""

from __future__ import annotations

import struct
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.errors import IntegrityError
from ciuic_async.format import dtypes, entry, jsontext, layout, manifest, merkle, segment
from ciuic_async.format import locator as locators
from ciuic_async.format.chain_file import ChainFile
from ciuic_async.format.digest import ZERO_DIGEST, digest, hasher

LIMIT = 1 << 20
SAFE = st.integers(-jsontext.MAX_SAFE_INTEGER, jsontext.MAX_SAFE_INTEGER)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | SAFE | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=30,
)
IDS = st.text("0123456789abcdef", min_size=20, max_size=20)
DIGESTS = st.binary(min_size=32, max_size=32)
NUMBERS = st.integers(0, 10**9 - 1)


# --- JSON -------------------------------------------------------------------------------------------------------------


@given(JSON)
def test_json(value: Any) -> None:
    """decode(encode(x)) == x, with the same types, and encoding again gives the same bytes."""
    data = jsontext.encode(value)
    back = jsontext.decode(data, what="x", limit_bytes=LIMIT)
    assert repr(back) == repr(_sorted(value))
    assert jsontext.encode(back) == data


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


@given(
    st.recursive(
        st.none() | st.booleans() | SAFE | TEXT,
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.dictionaries(st.text(st.characters(max_codepoint=0xD7FF), max_size=10), inner, max_size=5)
        ),
    )
)
def test_json_equals_rfc_8785(value: Any) -> None:
    """With keys of the Basic Multilingual Plane the text is RFC 8785's, by an independent implementation."""
    assert jsontext.encode(value) == rfc8785.dumps(value)


@given(st.binary(max_size=60) | st.text('[]{}",:\\ud8019eE.-+tfn \n', max_size=40).map(str.encode))
def test_json_accepts_only_what_it_writes(data: bytes) -> None:
    """Any bytes are refused with a typed error, or are exactly what their value encodes to."""
    try:
        value = jsontext.decode(data, what="x", limit_bytes=LIMIT)
    except IntegrityError as error:
        outcome = error.kind
    else:
        outcome = "read" if jsontext.encode(value) == data else "read, but written otherwise"
    assert outcome in ("read", "json_syntax", "json_not_canonical")


@given(JSON, st.floats() | st.integers(min_value=2**53) | st.integers(max_value=-(2**53)) | st.just("\udc80"))
def test_json_never_writes_what_it_would_not_read(value: Any, foreign: Any) -> None:
    """Wherever a float, a huge integer or a lone surrogate hides, encoding is a ValueError."""
    for whole in (foreign, [value, foreign], {"1.5e3": value, "key": [foreign]}):
        with pytest.raises(ValueError, match=r"."):
            jsontext.encode(whole)


@given(st.integers(1, 500))
def test_json_depth(depth: int) -> None:
    """Encoding and decoding draw the limit at the same depth; brackets inside strings do not count."""
    value: Any = '["[[[[{\\"' * 200
    for number in range(depth):
        value = [value] if number % 2 else {"[": value}
    if depth <= jsontext.MAX_DEPTH:
        assert jsontext.decode(jsontext.encode(value), what="x", limit_bytes=LIMIT) == value
        return
    with pytest.raises(ValueError, match="deeper"):
        jsontext.encode(value)


# --- digests and trees ------------------------------------------------------------------------------------------------


def _naive_root(hashes: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if not hashes:
        return sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    k = 1
    while k * 2 < len(hashes):
        k *= 2
    return sha256(b"\x01" + _naive_root(hashes[:k]) + _naive_root(hashes[k:])).digest()


@given(st.lists(st.binary(max_size=5), max_size=70))
def test_merkle_root(leaves: list[bytes]) -> None:
    """The one-pass root equals the recursive definition."""
    hashes = [merkle.leaf_hash(leaf) for leaf in leaves]
    assert hashes == [sha256(b"\0" + leaf).digest() for leaf in leaves]
    assert merkle.root(iter(hashes)) == _naive_root(hashes)


def test_merkle_known_answers() -> None:
    """The test vectors of the certificate transparency project: trees of 0, 1, 2 and 8 leaves."""
    leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    hashes = [merkle.leaf_hash(bytes.fromhex(leaf)) for leaf in leaves]
    expected = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    assert {size: merkle.root(hashes[:size]).hex() for size in expected} == expected


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_digest_in_pieces(data: bytes, cut: int) -> None:
    """An incremental digest equals the digest of the whole, for every kind of buffer."""
    pieces = hasher()
    pieces.update(data[:cut])
    pieces.update(memoryview(data)[cut:])
    assert pieces.digest() == digest(data) == digest(bytearray(data)) == digest(memoryview(data))


def test_digest_known_answer() -> None:
    """BLAKE3-256 of nothing, as b3sum prints it."""
    assert digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


# --- names ------------------------------------------------------------------------------------------------------------


@given(IDS, NUMBERS, NUMBERS, st.integers(0, 10**20 - 1))
def test_layout_produces_known_names(snapshot: str, first: int, second: int, size: int) -> None:
    """Every name a function makes is known, and says whose it is."""
    owned = [
        layout.segment(snapshot, first, second),
        layout.manifest_root(snapshot),
        layout.manifest_part(snapshot, first),
        layout.locator(snapshot, first),
    ]
    assert all(layout.is_known(name) and layout.owner(name) == snapshot for name in owned)
    others = [layout.CHAIN_FILE, layout.LOG_HEAD, layout.slot(size), layout.temporary()]
    assert all(layout.is_known(name) and layout.owner(name) is None for name in others)
    assert layout.locator_generation(layout.locator(snapshot, first)) == first
    assert layout.slot_number(layout.slot(size)) == size
    assert [layout.locator_generation(name) for name in others] == [None] * 4
    assert [layout.slot_number(name) for name in owned] == [None] * 4


@given(st.integers(0, 63), st.integers(0, 1000**7 - 1), st.integers(1, 256))
def test_layout_tiles(level: int, index: int, width: int) -> None:
    """Tiles and bundles have known names whose groups spell the index."""
    for name in (layout.tile(level, index, width), layout.entry_bundle(index, width)):
        assert layout.is_known(name)
        path, _, partial = name.partition(".p/")
        assert int("".join(path.split("/")[3:]).replace("x", "")) == index
        assert int(partial or 256) == width


@given(st.from_regex(r"log/tile/(entries|[0-9]{1,2})/(x[0-9]{3}/){0,2}[0-9]{3}(\.p/[0-9]{1,3})?", fullmatch=True))
def test_layout_knows_one_name_of_each_tile(name: str) -> None:
    """Whatever name of a tile is known is the very one that is written: no tile has two."""
    if not layout.is_known(name):
        return
    path, _, partial = name.partition(".p/")
    level, *groups = path.removeprefix("log/tile/").split("/")
    index, width = int("".join(groups).replace("x", "")), int(partial or 256)
    assert name == (layout.entry_bundle(index, width) if level == "entries" else layout.tile(int(level), index, width))


@pytest.mark.parametrize("width", [-1, 0, 257])
def test_no_tile_has_another_width(width: int) -> None:
    """A tile has 1 to 256 hashes; a name for one of any other width is never made."""
    with pytest.raises(ValueError, match="width"):
        layout.tile(0, 0, width)
    with pytest.raises(ValueError, match="width"):
        layout.entry_bundle(0, width)


def test_layout_tile_examples() -> None:
    """The examples of C2SP tlog-tiles."""
    assert layout.tile(0, 1234067) == "log/tile/0/x001/x234/067"
    assert layout.tile(0, 273, 112) == "log/tile/0/273.p/112"
    assert layout.entry_bundle(1234067, 8) == "log/tile/entries/x001/x234/067.p/8"


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "ciuic.json\n", "./ciuic.json", "CIUIC.JSON", "ciuic.json/", "x/ciuic.json", "log",
        "log/checkpoint.tmp",
        "segments/0123456789abcdef012/0-0.seg", "segments/0123456789ABCDEF0123/0-0.seg",
        "segments/0123456789abcdef0123/00-0.seg", "segments/0123456789abcdef0123/0-1000000000.seg",
        "segments/0123456789abcdef0123/0-0.seg\n", "segments/0123456789abcdef0123/../x/0-0.seg",
        "segments/0123456789abcdef0123/-1-0.seg", "segments/0123456789abcdef0123/0-\u0660.seg",
        "manifests/0123456789abcdef0123/root", "manifests/0123456789abcdef0123/01.json",
        "locators/0123456789abcdef0123.json", "locators/0123456789abcdef0123.00.json",
        "log/commit/0", "log/commit/000000000000000000000", "log/commit/-0000000000000000001",
        "log/tile/64/000", "log/tile/00/000", "log/tile/0/00", "log/tile/0/0000", "log/tile/0/x000/000",
        "log/tile/0/x000/x001/000", "log/tile/0/001/000", "log/tile/0/x001", "log/tile/0/000.p/0",
        "log/tile/0/000.p/256", "log/tile/0/000.p/999", "log/tile/0/000.p/01", "log/tile/8/0/000",
        "log/tile/entries/000.p/", "tmp/x", "tmp/" + "0" * 31, "tmp/" + "0" * 33,
    ],
)  # fmt: skip
def test_layout_knows_no_other_names(name: str) -> None:
    """Names that no function makes are unknown, belong to nobody and are refused as references."""
    assert not layout.is_known(name)
    assert layout.owner(name) is None
    for prefix in ("segments", "manifests", "log", "locators", "log/tile"):
        with pytest.raises(IntegrityError) as caught:
            layout.check_reference(name, prefix, "a test")
        assert caught.value.kind == "bad_name"


def test_ids_are_not_torchs_nor_pythons() -> None:
    """Ids do not repeat when a training script seeds Python's generator again."""
    import random

    made = set()
    for _ in range(10):
        random.seed(0)
        made.add(layout.new_id())
    assert len(made) == 10
    assert all(layout.ID.fullmatch(name) for name in made)


# --- manifest, locator, entries, records ------------------------------------------------------------------------------

NODES = JSON
PATHS = st.lists(TEXT | SAFE, max_size=4).map(tuple)


@st.composite
def _tensors(draw: st.DrawFn) -> manifest.StoredTensor:
    """A tensor cut along its first axis into shards of chunks, digests drawn from the chunk's place and size."""
    dtype = draw(st.sampled_from(sorted(dtypes.ITEM_SIZE_BYTES)))
    item = dtypes.ITEM_SIZE_BYTES[dtype]
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    chunk_size = draw(st.sampled_from([16, 32, 4 << 20]))
    cuts = sorted(draw(st.sets(st.integers(1, shape[0] - 1)))) if shape and shape[0] > 1 else []
    shards = []
    for low, high in zip([0, *cuts], [*cuts, shape[0] if shape else 0], strict=True):
        sizes = (high - low, *shape[1:]) if shape else ()
        size = manifest.volume(sizes) * item
        lengths = [min(chunk_size, size - start) for start in range(0, size, chunk_size)]
        digests = b"".join(digest(b"%d %d" % (length, draw(st.integers(0, 3)))) for length in lengths)
        shards.append(manifest.Shard((low,) + (0,) * (len(shape) - 1) if shape else (), sizes, chunk_size, digests))
    return manifest.StoredTensor(draw(PATHS), dtype, shape, draw(TEXT), tuple(shards))


@st.composite
def _manifests(draw: st.DrawFn) -> manifest.Manifest:
    packs = []
    packed = []
    for number in range(draw(st.integers(0, 3))):
        counts = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
        offset = 0
        for count in counts:
            shard = manifest.Shard((0,), (count,), pack=(number, offset))
            packed.append(manifest.StoredTensor(draw(PATHS), "int32", (count,), "cpu", (shard,)))
            end = offset + 4 * count
            offset = segment.align_up(end, manifest.PACK_ALIGNMENT_BYTES)
        packs.append(manifest.Pack(4, end, digest(b"pack %d %d" % (number, end))))
    sections = st.sampled_from(["state", "rng"])
    trees = draw(st.lists(st.builds(manifest.Tree, sections, NODES, NODES), max_size=4))
    return manifest.Manifest(
        draw(IDS),
        "dict",
        tuple(trees),
        tuple(packs),
        tuple(draw(st.permutations(packed + draw(st.lists(_tensors(), max_size=4))))),
        manifest.Progress(draw(NODES), draw(NODES), draw(NODES)),
        draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        draw(st.integers(1, 100)),
        (),
        tuple(draw(st.lists(TEXT, max_size=2))),
    )


@given(_manifests(), st.sampled_from([1, 300, manifest.PART_TARGET_BYTES]))
def test_manifest(made: manifest.Manifest, part_target_bytes: int) -> None:
    """However many parts a manifest is split into, it comes back equal, and its reference fits its root."""
    encoded = manifest.encode(made, part_target_bytes=part_target_bytes)
    assert encoded.reference.sha256 == sha256(encoded.root[1]).digest()
    root = manifest.decode_root(encoded.root[1], made.snapshot)
    assert [(part.path, part.sha256, part.size_bytes) for part in root.parts] == [
        (name, sha256(data).digest(), len(data)) for name, data in encoded.parts
    ]
    back = manifest.assemble(root, [data for _, data in encoded.parts])
    assert back == made
    assert repr(back.trees) == repr(tuple(manifest.Tree(*map(_sorted, (t.section, t.key, t.node))) for t in made.trees))
    if part_target_bytes == 1:
        assert len(encoded.parts) == max(1, len(made.trees) + len(made.packs) + len(made.tensors))


CODECS_AND_DEPTHS = [(0, 0), (1, 0), (3, 0), *((2, depth) for depth in range(1, segment.MAX_DEPTH + 1))]


@given(_manifests(), st.data())
def test_locator(made: manifest.Manifest, data: st.DataObject) -> None:
    """A locator of any manifest's chunks, over any number of segments, with bases or without, comes back equal."""
    *references, elsewhere = [
        locators.SegmentReference(layout.segment(data.draw(IDS), 0, n), 1 << 40, data.draw(DIGESTS)) for n in range(4)
    ]
    chunks = {
        chunk: locators.ChunkLocation(
            data.draw(st.sampled_from(references)),
            64 * data.draw(st.integers(1, 1 << 30)),
            data.draw(st.integers(128, 256 + size)),
            *data.draw(st.sampled_from(CODECS_AND_DEPTHS)),
        )
        for chunk, size in made.distinct_chunks().items()
    }
    bases = {
        chunk: (
            size,
            locators.ChunkLocation(
                data.draw(st.sampled_from([*references, elsewhere])),
                64 * data.draw(st.integers(1, 1 << 30)),
                128 + size,
                *data.draw(st.sampled_from(CODECS_AND_DEPTHS)),
            ),
        )
        for chunk, size in data.draw(st.dictionaries(DIGESTS, st.integers(0, 64 << 20), max_size=4)).items()
        if chunk not in chunks
    }
    generation = data.draw(NUMBERS)
    locator = locators.Locator(made.snapshot, generation, chunks, bases)
    encoded = locator.encode()
    assert (b'"ciuic.dev/locator/v2"' in encoded) == (b'"bases"' in encoded) == bool(bases)
    assert {place.segment for _, place in bases.values()} <= set(locator.segments())
    assert all(locator.place(base) == place for base, (_, place) in bases.items())
    back = locators.decode(encoded, made.snapshot, generation, made.distinct_chunks())
    assert back == locator
    assert list(back.chunks) == list(made.distinct_chunks())
    assert back.encode() == encoded


COMMONS = st.builds(entry.Common, IDS, st.floats(0, 4e9).map(entry.timestamp), TEXT, st.just("ciuic_async/0.1.0"))
REAL = st.floats().map(repr)
POSITIONS = st.none() | SAFE | TEXT


@st.composite
def _snapshot_entries(draw: st.DrawFn) -> entry.SnapshotEntry:
    snapshot = draw(IDS)
    return entry.SnapshotEntry(
        common=draw(COMMONS),
        snapshot=snapshot,
        parent=draw(st.none() | DIGESTS),
        step=draw(st.none() | st.integers(0, jsontext.MAX_SAFE_INTEGER)),
        epoch=draw(POSITIONS),
        batch=draw(POSITIONS),
        tags=tuple(draw(st.lists(TEXT, max_size=3))),
        metrics=tuple(sorted(draw(st.dictionaries(TEXT, REAL, max_size=entry.MAX_METRICS)).items())),
        manifest=entry.FileReference(layout.manifest_root(snapshot), draw(DIGESTS), draw(NUMBERS)),
        chunks=entry.ChunkTree(draw(DIGESTS), draw(NUMBERS)),
        raw_bytes=draw(NUMBERS),
        stored_bytes=draw(NUMBERS),
        rank=draw(NUMBERS),
        world=draw(NUMBERS) + 1,
    )


ENTRIES = st.one_of(
    _snapshot_entries(),
    st.builds(
        entry.KeyEntry,
        COMMONS,
        TEXT,
        st.none() | st.builds(entry.FileReference, st.just(layout.CHAIN_FILE), DIGESTS, NUMBERS),
    ),
    st.builds(entry.PruneEntry, COMMONS, st.lists(IDS, max_size=3).map(tuple), TEXT),
)


@given(ENTRIES)
def test_entries(made: Any) -> None:
    """Every entry comes back equal, and its bytes are RFC 8785's by an independent implementation."""
    data = made.encode()
    assert entry.decode(data, 0) == made
    assert rfc8785.dumps(jsontext.decode(data, what="x", limit_bytes=LIMIT)) == data


@given(st.sampled_from([1 << n for n in range(16, 27)]), st.lists(TEXT, max_size=3).map(tuple))
def test_chain_file(chunk_size_bytes: int, optional: tuple[str, ...]) -> None:
    """ciuic.json comes back equal; every new chain has its own origin."""
    made = ChainFile(ChainFile.new().origin, chunk_size_bytes, (), optional)
    assert ChainFile.decode(made.encode()) == made
    assert ChainFile.new().origin != made.origin


@st.composite
def _headers(draw: st.DrawFn) -> segment.RecordHeader:
    item = draw(st.sampled_from(segment.ITEM_SIZES_BYTES))
    plane_size = draw(st.integers(0, 1 << 18))
    raw = item * plane_size
    parameter = draw(st.integers(-(2**31), 2**31 - 1))
    if draw(st.booleans()):
        return segment.RecordHeader(segment.CODEC_RAW, raw, raw, draw(DIGESTS), item, parameter=parameter)
    raw_planes = draw(st.lists(st.booleans(), min_size=item, max_size=item))
    directory = tuple(
        (segment.PLANE_RAW, plane_size) if is_raw else (segment.PLANE_ZSTD, draw(st.integers(0, plane_size)))
        for is_raw in raw_planes
    )
    stored = sum(size for _, size in directory)
    codecs = [segment.CODEC_PLANES, segment.CODEC_DELTA]
    methods = [segment.DELTA_XOR]
    if item in segment.WORD_SIZES_BYTES:
        codecs.append(segment.CODEC_ROTATED)
        methods.append(segment.DELTA_DIFFERENCE)
    made = segment.RecordHeader(draw(st.sampled_from(codecs)), raw, stored, draw(DIGESTS), item, directory, parameter)
    if made.codec != segment.CODEC_DELTA:
        return made
    base = draw(DIGESTS.filter(lambda drawn: drawn not in (made.digest, ZERO_DIGEST)))
    depth = draw(st.integers(1, segment.MAX_DEPTH))
    return replace(made, base=base, depth=depth, method=draw(st.sampled_from(methods)))


@given(_headers(), st.binary(max_size=8))
def test_record_headers(made: segment.RecordHeader, tail: bytes) -> None:
    """Every header comes back equal, is as long as it says, a multiple of 64, and followed by anything."""
    data = made.pack()
    assert len(data) == made.size_bytes <= segment.MAX_RECORD_HEADER_BYTES
    assert len(data) % segment.ALIGNMENT_BYTES == 0
    assert struct.unpack_from("<H", data, 4)[0] == len(data)
    assert segment.parse_record_header(data + tail, "x") == made
    assert (made.base == ZERO_DIGEST) == (made.depth == 0) == (made.method == 0) == (made.codec != segment.CODEC_DELTA)


@given(st.lists(_headers(), max_size=8), st.integers(0, 10**9 - 1))
def test_segments(headers: list[segment.RecordHeader], number: int) -> None:
    """Laid out by record_offset and closed by pack_tail, index and trailer come back, whole and aligned."""
    position = segment.FILE_HEADER_BYTES
    index = []
    for header in headers:
        offset = segment.record_offset(position, header.size_bytes, header.codec, header.raw_size_bytes)
        assert position <= offset < position + 4096 + 64
        assert offset % 64 == 0
        if header.codec == segment.CODEC_RAW and header.raw_size_bytes >= segment.DIRECT_MINIMUM_BYTES:
            assert (offset + header.size_bytes) % 4096 == 0
        position = offset + header.record_size_bytes
        index.append(
            segment.IndexEntry(header.digest, offset, header.record_size_bytes, header.raw_size_bytes, header.codec)
        )
    tail = segment.pack_tail(position, index) + ZERO_DIGEST
    size = position + len(tail)
    assert size % 4096 == 0
    trailer = segment.parse_trailer(tail[-64:], size, "x")
    assert segment.parse_index(tail[trailer.index_offset_bytes - position : -64], trailer, "x") == index
    assert segment.parse_file_header(segment.pack_file_header("0" * 20, 3, number), "x") == ("0" * 20, 3, number, 2)


def test_a_mesh_comes_back() -> None:
    """A distributed tensor's mesh survives; one without a name for each dimension is refused."""
    shards = (manifest.Shard((0,), (2,), 1 << 22, bytes(32)), manifest.Shard((2,), (2,), 1 << 22, bytes(32)))
    tensor = manifest.StoredTensor(("w",), "float32", (4,), "cuda:0", shards, manifest.Mesh((2,), ("dp",)))
    content = manifest.Manifest(
        "0" * 20, "single", (manifest.Tree("state", None, {"tensor": 0}),), (), (tensor,), world=2
    )
    encoded = manifest.encode(content)
    root = manifest.decode_root(encoded.root[1], content.snapshot)
    assert manifest.assemble(root, [data for _, data in encoded.parts]).tensors == (tensor,)
    broken = encoded.parts[0][1].replace(b'"names":["dp"]', b'"names":[]')
    with pytest.raises(IntegrityError, match="one name for each dimension"):
        manifest.assemble(root, [broken])

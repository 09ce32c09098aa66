"""Whole chains that somebody made to hurt, opened as a user would: a folder from the internet, loaded and verified.

``signed_*`` are by somebody who holds a key and signs lies; ``changed_*`` by somebody without one, who may write to the
folder and computes every digest anew that needs no key. Each is loaded and verified in a process that measures itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

import ciuic_async
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import IntegrityError, NotFoundError
from ciuic_async.format import jsontext, layout, locator, manifest, segment
from ciuic_async.format.digest import digest
from ciuic_async.format.entry import FileReference, PruneEntry, SnapshotEntry
from ciuic_async.format.locator import ChunkLocation, Locator, SegmentReference
from ciuic_async.handoffs import EncodedChunk
from ciuic_async.segments.reference import build_segment
from ciuic_async.stores.local import LocalStore

pytestmark = [pytest.mark.slow, pytest.mark.damages]

LIMIT_BYTES = 256 << 20
QUICKLY_S = 5.0  # of processor time
PICKLE = b"cos\nabort\n(tR."
"""Whoever unpickles this is dead."""
STATE = {"a": torch.arange(40_000, dtype=torch.int32), "b": torch.arange(40_000, dtype=torch.int32) + 1}

CHILD = """
import contextlib, io, json, os, resource, sys, time
import torch
from ciuic_async import SnapshotChain
from ciuic_async.cli.main import main
from ciuic_async.errors import CiuicError

def touch(folder):
    with SnapshotChain(folder, create=False) as chain:
        chain.latest().load()

def look(folder):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        code = main(["verify", "--json", folder])
    return {"exit": code, "problems": json.loads(printed.getvalue())["problems"]}

touch(sys.argv[1])  # what is imported on first use counts for nobody
look(sys.argv[1])
changed = []  # as a reader must not
sys.addaudithook(lambda name, given: changed.append(name) if name in WATCHED else None)
WATCHED = {"os.system", "os.exec", "subprocess.Popen", "pickle.find_class", "os.remove", "os.rename", "os.mkdir"}
for folder in sys.argv[2:]:
    pid = os.fork()  # each has its own peak
    if pid:
        assert os.waitpid(pid, 0)[1] == 0, folder
        continue
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    answer = {}
    try:
        touch(folder)
    except CiuicError as error:
        answer = {"kind": error.kind, "where": error.where, "length": len(str(error))}
    answer["load_s"] = time.process_time() - begin
    begin = time.process_time()
    answer |= look(folder)
    answer["verify_s"] = time.process_time() - begin
    answer["more_bytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    answer["changed"] = changed
    print(json.dumps(answer), flush=True)
    os._exit(0)
"""


# --- making lies ------------------------------------------------------------------------------------------------------


def tensor_json(size_bytes: int, digests: str, chunk_size_bytes: int, **changes: Any) -> dict[str, Any]:
    """A stored tensor of bytes in one shard."""
    shard = {"offsets": [0], "sizes": [size_bytes], "chunk_size_bytes": chunk_size_bytes, "digests": digests}
    return {"path": ["x"], "dtype": "uint8", "shape": [size_bytes], "device": "cpu", "shards": [shard], **changes}


def part_of(snapshot: str, node: Any, tensors: Sequence[dict[str, Any]]) -> bytes:
    """A manifest part with one tree."""
    trees = [manifest.tree_json(manifest.Tree("state", "x", node))]
    return manifest.encode_part(snapshot, 0, {"trees": trees, "packs": [], "tensors": list(tensors)})


class Liar:
    """Adds a snapshot to a chain, correctly signed, whose files are whatever it is told."""

    def __init__(self, folder: Path) -> None:
        ciuic_async.save(STATE, folder)
        self.folder = folder
        self.snapshot = layout.new_id()

    def write(self, name: str, data: bytes) -> FileReference:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return FileReference(name, sha256(data).digest(), len(data))

    def part(self, data: bytes, number: int = 0) -> FileReference:
        return self.write(layout.manifest_part(self.snapshot, number), data)

    def root(self, parts: Sequence[FileReference], digests: Sequence[bytes] = (), raw_bytes: int = 0) -> bytes:
        return jsontext.encode(
            {
                "schema": manifest.ROOT_SCHEMA,
                "snapshot": self.snapshot,
                "features_required": [],
                "features_optional": [],
                "world": 1,
                "top": "dict",
                "parts": [part.to_json() for part in parts],
                "chunks": manifest.chunk_tree(digests).to_json(),
                "raw_bytes": raw_bytes,
                "progress": {"step": 1, "epoch": None, "batch": None},
                "environment": {},
            }
        )

    def sign(
        self,
        root: FileReference,
        digests: Sequence[bytes] = (),
        raw_bytes: int = 0,
        *,
        parent: bytes | None = None,
        times: int = 1,
    ) -> None:
        """Make the snapshot part of history, ``times`` times."""
        with SnapshotChain(self.folder) as chain:
            tree = manifest.chunk_tree(digests)
            entry = SnapshotEntry(
                chain.common(), self.snapshot, parent, 1, None, None, (), (), root, tree, raw_bytes, 0
            ).encode()
            target = chain.target()
            target.log.append(lambda log: [entry] * times, target.key, announce=target.announce)

    def whole(self, part: bytes, digests: Sequence[bytes], raw_bytes: int) -> None:
        """A snapshot of one part that agrees with itself."""
        root = self.root([self.part(part)], digests, raw_bytes)
        self.sign(self.write(layout.manifest_root(self.snapshot), root), digests, raw_bytes)

    def one_chunk(self, chunk: EncodedChunk, node: Any) -> None:
        """A snapshot of one tensor in one chunk, with its segment and its locator."""
        header = chunk.header
        name = layout.segment(self.snapshot, 0, 0)
        data = build_segment(self.snapshot, 0, 0, [chunk])
        self.write(name, data)
        self.locate(
            {header.digest: (64, header.record_size_bytes)}, SegmentReference(name, len(data), data[-32:]), chunk
        )
        tensor = tensor_json(header.raw_size_bytes, header.digest.hex(), 4 << 20)
        self.whole(part_of(self.snapshot, node, [tensor]), [header.digest], header.raw_size_bytes)

    def locate(self, places: dict[bytes, tuple[int, int]], where: SegmentReference, chunk: EncodedChunk) -> None:
        chunks = {
            found: ChunkLocation(where, offset, size, chunk.header.codec) for found, (offset, size) in places.items()
        }
        self.write(layout.locator(self.snapshot, 0), Locator(self.snapshot, 0, chunks).encode())


def raw(data: bytes) -> EncodedChunk:
    return EncodedChunk(segment.RecordHeader(segment.CODEC_RAW, len(data), len(data), digest(data)), (data,))


def framed(content: bytes, frame: bytes) -> EncodedChunk:
    """A chunk of ``content`` whose record holds ``frame``."""
    directory = ((segment.PLANE_ZSTD, len(frame)),)
    header = segment.RecordHeader(segment.CODEC_PLANES, len(content), len(frame), digest(content), 1, directory)
    return EncodedChunk(header, (frame,))


# --- the lies ---------------------------------------------------------------------------------------------------------


def signed_pickle_as_root(folder: Path) -> None:
    liar = Liar(folder)
    liar.sign(liar.write(layout.manifest_root(liar.snapshot), PICKLE))


def signed_pickle_as_part(folder: Path) -> None:
    Liar(folder).whole(PICKLE, [], 0)


def signed_pickle_as_json_in_a_chunk(folder: Path) -> None:
    Liar(folder).one_chunk(raw(PICKLE), {"json": 0})


def signed_root_of_a_gigabyte(folder: Path) -> None:
    liar = Liar(folder)
    name = layout.manifest_root(liar.snapshot)
    liar.write(name, b"[")
    os.truncate(folder / name, 1 << 30)
    liar.sign(FileReference(name, bytes(32), 1 << 30))


def signed_part_of_a_gigabyte(folder: Path) -> None:
    liar = Liar(folder)
    os.truncate(folder / liar.part(b"[").path, 1 << 30)
    root = liar.root([FileReference(layout.manifest_part(liar.snapshot, 0), bytes(32), 1 << 30)])
    liar.sign(liar.write(layout.manifest_root(liar.snapshot), root))


def signed_a_gigabyte_in_seventeen_parts(folder: Path) -> None:
    liar = Liar(folder)
    size = manifest.PART_LIMIT_BYTES
    zeros = sha256(bytes(size)).digest()
    parts = []
    for number in range(17):
        name = liar.part(b"", number).path
        os.truncate(folder / name, size)
        parts.append(FileReference(name, zeros, size))
    liar.sign(liar.write(layout.manifest_root(liar.snapshot), liar.root(parts)))


def signed_part_of_brackets(folder: Path) -> None:
    Liar(folder).whole(b"[" * (32 << 20), [], 0)


def signed_chunk_count_of_ten_million(folder: Path) -> None:
    liar = Liar(folder)
    root = json.loads(liar.root([liar.part(part_of(liar.snapshot, None, []))]))
    root["chunks"]["count"] = 10**7
    liar.sign(liar.write(layout.manifest_root(liar.snapshot), jsontext.encode(root)))


def signed_tensor_of_ten_million_chunks(folder: Path) -> None:
    liar = Liar(folder)
    liar.whole(part_of(liar.snapshot, {"tensor": 0}, [tensor_json(16 * 10**7, "00" * 32, 16)]), [bytes(32)], 16 * 10**7)


def signed_shape_of_overflowing_product(folder: Path) -> None:
    liar = Liar(folder)
    shape = tensor_json(16, "00" * 32, 16, shape=[2**32, 2**32])
    liar.whole(part_of(liar.snapshot, {"tensor": 0}, [shape]), [bytes(32)], 16)


def signed_empty_shape_of_2_to_62(folder: Path) -> None:
    liar = Liar(folder)
    shape = tensor_json(0, "", 16, shape=[0, 2**52])
    shape["shards"][0] |= {"offsets": [0, 0], "sizes": [0, 2**52]}
    liar.whole(part_of(liar.snapshot, {"tensor": 7}, [shape]), [], 0)


def signed_bomb(folder: Path) -> None:
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    Liar(folder).one_chunk(framed(bytes(100_000), frame), {"tensor": 0})


def signed_window_of_2_to_31(folder: Path) -> None:
    # A frame whose header asks for a window of 2 GiB; content size in 4 bytes; one raw block that is too short.
    header = b"\x28\xb5\x2f\xfd" + bytes([0x80, 21 << 3]) + (100_000).to_bytes(4, "little")
    Liar(folder).one_chunk(framed(bytes(100_000), header + b"\x19\0\0abc"), {"tensor": 0})


def signed_the_same_snapshot_twice(folder: Path) -> None:
    liar = Liar(folder)
    root = liar.root([liar.part(part_of(liar.snapshot, None, []))])
    liar.sign(liar.write(layout.manifest_root(liar.snapshot), root), times=2)


def signed_prune_of_what_never_was(folder: Path) -> None:
    ciuic_async.save(STATE, folder)
    with SnapshotChain(folder) as chain:
        entry = PruneEntry(chain.common(), (layout.new_id(),), "a lie").encode()
        target = chain.target()
        target.log.append(lambda log: [entry], target.key, announce=target.announce)


def changed(name: Callable[[str], str], data: bytes) -> Callable[[Path], None]:
    """A file of a good chain replaced."""

    def make(folder: Path) -> None:
        (folder / name(ciuic_async.save(STATE, folder).id)).write_bytes(data)

    return make


def edited_locator(edit: Callable[[dict[str, Any], Path], None]) -> Callable[[Path], None]:
    """A locator rewritten by somebody who computes its digest anew."""

    def make(folder: Path) -> None:
        path = folder / layout.locator(ciuic_async.save(STATE, folder).id, 0)
        value = json.loads(path.read_bytes())
        del value["digest"]
        edit(value, folder)
        path.write_bytes(jsontext.encode(value | {"digest": digest(jsontext.encode(value)).hex()}))

    return make


def _swap(value: dict[str, Any], folder: Path) -> None:
    value["chunks"].reverse()


def _another_tensors(value: dict[str, Any], folder: Path) -> None:
    value["chunks"][1] = value["chunks"][0]


def _huge_segment(value: dict[str, Any], folder: Path) -> None:
    """The segment of a quarter of a gigabyte of zeros behind its records that a locator agrees to."""
    name = value["segments"][0][0]
    os.truncate(folder / name, 1 << 28)
    value["segments"][0][1:] = [1 << 28, "00" * 32]


def changed_dtype(folder: Path) -> None:
    """float32 for int32 in a part, and a root that agrees: only the signed entry tells."""
    snapshot = ciuic_async.save(STATE, folder).id
    part, root = folder / layout.manifest_part(snapshot, 0), folder / layout.manifest_root(snapshot)
    value = json.loads(part.read_bytes())
    value["tensors"][0]["dtype"] = "float32"
    data = jsontext.encode(value)
    part.write_bytes(data)
    described = json.loads(root.read_bytes())
    described["parts"][0] |= {"sha256": sha256(data).hexdigest(), "size": len(data)}
    root.write_bytes(jsontext.encode(described))


def _root(snapshot: str) -> str:
    return layout.manifest_root(snapshot)


def _part(snapshot: str) -> str:
    return layout.manifest_part(snapshot, 0)


def _locator(snapshot: str) -> str:
    return layout.locator(snapshot, 0)


def _segment(snapshot: str) -> str:
    return layout.segment(snapshot, 0, 0)


Lie = tuple[Callable[[Path], None], str, str]
READS_ALL_THE_SAME = ""
LIES: dict[str, Lie] = {
    # how it is made, the kind of the error of a load, where the place of the problem begins
    "signed: pickle as root": (signed_pickle_as_root, "json_syntax", "manifests/"),
    "signed: pickle as part": (signed_pickle_as_part, "json_syntax", "manifests/"),
    "signed: root of 1 GiB": (signed_root_of_a_gigabyte, "file_too_large", "manifests/"),
    "signed: part of 1 GiB": (signed_part_of_a_gigabyte, "file_too_large", "manifests/"),
    "signed: 1 GiB in 17 parts": (signed_a_gigabyte_in_seventeen_parts, "json_syntax", "manifests/"),
    "signed: part of brackets": (signed_part_of_brackets, "json_too_deep", "manifests/"),
    "signed: 10^7 chunks in the root": (signed_chunk_count_of_ten_million, "bad_manifest", "manifests/"),
    "signed: 10^7 chunks of a tensor": (signed_tensor_of_ten_million_chunks, "malformed", "manifests/"),
    "signed: shape of 2^64": (signed_shape_of_overflowing_product, "malformed", "manifests/"),
    "signed: a tensor that is not there": (signed_empty_shape_of_2_to_62, "missing", "locators/"),
    "signed: zstd bomb": (signed_bomb, "bad_payload", "segments/"),
    "signed: zstd window of 2^31": (signed_window_of_2_to_31, "bad_payload", "segments/"),
    "signed: a snapshot twice": (signed_the_same_snapshot_twice, "missing", "entry "),
    "signed: prune of nothing": (signed_prune_of_what_never_was, READS_ALL_THE_SAME, "entry "),
    "changed: pickle as ciuic.json": (changed(lambda _: layout.CHAIN_FILE, PICKLE), "json_syntax", "ciuic.json"),
    "changed: pickle as log head": (changed(lambda _: layout.LOG_HEAD, PICKLE), READS_ALL_THE_SAME, "log/checkpoint"),
    "changed: pickle as slot": (changed(lambda _: layout.slot(0), PICKLE), READS_ALL_THE_SAME, "log/commit/"),
    "changed: pickle as root": (changed(_root, PICKLE), "digest_mismatch", "manifests/"),
    "changed: pickle as part": (changed(_part, PICKLE), "digest_mismatch", "manifests/"),
    "changed: pickle as locator": (changed(_locator, PICKLE), "json_syntax", "locators/"),
    "changed: pickle as segment": (changed(_segment, PICKLE), "truncated", "segments/"),
    "changed: locator of 16 MiB": (
        changed(_locator, b"[" + b"[]," * 5_600_000 + b"[]]"),
        "file_too_large",
        "locators/",
    ),
    "changed: swapped chunks": (edited_locator(_swap), "wrong_record", "segments/"),
    "changed: another tensor's chunk": (edited_locator(_another_tensors), "wrong_record", "segments/"),
    "changed: segment of 256 MiB": (edited_locator(_huge_segment), READS_ALL_THE_SAME, "segments/"),
    "changed: dtype of equal size": (changed_dtype, "digest_mismatch", "manifests/"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process says that loads and verifies every one of them, after a good one."""
    folder = tmp_path_factory.mktemp("lies")
    home = {"XDG_CONFIG_HOME": str(folder / "config"), "XDG_STATE_HOME": str(folder / "state")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.items():
            patch.setenv(name, value)
        ciuic_async.save(STATE, folder / "good")
        for number, (make, _, _) in enumerate(LIES.values()):
            make(folder / str(number))
        arguments = [str(folder / "good"), *(str(folder / str(number)) for number in range(len(LIES)))]
        done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return dict(zip(LIES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_by_name_at_once_and_in_little_memory(lie: str, answers: dict[str, dict[str, Any]]) -> None:
    """Loading is a typed error that names the place (or gives what was saved), verify ends with 4, nothing is run."""
    _, kind, place = LIES[lie]
    answer = answers[lie]
    assert answer.get("kind", READS_ALL_THE_SAME) == kind, answer
    if kind and not place.startswith("entry"):
        assert place in answer["where"], answer
        assert answer["length"] < 1000
    assert answer["exit"] == 4
    assert any(problem["where"].startswith(place) for problem in answer["problems"]), answer["problems"]
    assert answer["changed"] == []
    assert max(answer["load_s"], answer["verify_s"]) < QUICKLY_S
    assert answer["more_bytes"] < LIMIT_BYTES


# --- no lies, but strange ---------------------------------------------------------------------------------------------


def test_a_pickle_in_a_chunk_is_bytes_and_nothing_else(tmp_path: Path) -> None:
    """Where a manifest calls the chunk of a pickle JSON it is refused; as a tensor its bytes come back. None is run."""
    signed_pickle_as_json_in_a_chunk(tmp_path / "json")
    with SnapshotChain(tmp_path / "json") as chain, pytest.raises(IntegrityError) as caught:
        chain.get("latest").load()
    assert caught.value.kind == "json_syntax"
    Liar(tmp_path / "tensor").one_chunk(raw(PICKLE), {"tensor": 0})
    loaded = ciuic_async.load(tmp_path / "tensor")
    assert bytes(loaded["x"].numpy()) == PICKLE


NAMES = [
    "", ".", "..", "/", "../../outside", "/etc/passwd", "a\0b", "a\\b", "..\\outside", "__proto__", "__class__",
    "constructor", "con", "nul.txt", "a\nb", "\x1b[2J", "x" * 4096, "😀", "\ud800", "a/b", "a.b", "~", "$HOME", "*",
    unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "Name", "name", "NAME", "ﬁ", "fi", " ",
]  # fmt: skip


def test_strange_names_are_only_names(tmp_path: Path) -> None:
    """Whatever text is a key, twins by case or normalisation too: each comes back as it was, and names no file."""
    outside = tmp_path / "runs"
    outside.mkdir()
    state: dict[str, Any] = {
        "model": {name: torch.full((20_000,), number) for number, name in enumerate(NAMES)},
        **{name: {"tensor": torch.tensor(number), "text": name} for number, name in enumerate(NAMES)},
    }
    ciuic_async.save(state, outside / "chain")
    assert os.listdir(outside) == ["chain"]
    store = LocalStore(outside / "chain")
    assert all(layout.is_known(item.name) for item in store.list())
    store.close()
    loaded = ciuic_async.load(outside / "chain")
    assert list(loaded) == ["model", *NAMES]
    assert list(loaded["model"]) == NAMES
    for number, name in enumerate(NAMES):
        assert torch.equal(loaded["model"][name], state["model"][name])
        assert loaded[name] == {"tensor": torch.tensor(number), "text": name}


def test_a_parent_that_is_none_leads_nowhere(tmp_path: Path) -> None:
    """A snapshot that names a stranger as its parent has none, and a walk to its ancestors ends."""
    liar = Liar(tmp_path / "chain")
    root = liar.write(layout.manifest_root(liar.snapshot), liar.root([liar.part(part_of(liar.snapshot, None, []))]))
    liar.sign(root, parent=sha256(b"a stranger").digest())
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        newest = chain.get("latest")
        assert newest.id == liar.snapshot
        assert newest.parent is None
        for ref in ("latest~1", "latest~999999"):
            with pytest.raises(NotFoundError) as caught:
                chain.get(ref)
            assert caught.value.kind == "no_such_snapshot"


def test_many_references_to_one_chunk_are_one_chunk(tmp_path: Path) -> None:
    """A tensor of 10,000 equal chunks is read, and verified, with the memory that the tensor itself takes."""
    count = 10_000
    chunk = raw(bytes(range(16)))
    liar = Liar(tmp_path / "chain")
    name = layout.segment(liar.snapshot, 0, 0)
    data = build_segment(liar.snapshot, 0, 0, [chunk])
    liar.write(name, data)
    size = chunk.header.record_size_bytes
    liar.locate({chunk.header.digest: (64, size)}, SegmentReference(name, len(data), data[-32:]), chunk)
    tensor = tensor_json(16 * count, chunk.header.digest.hex() * count, 16)
    liar.whole(part_of(liar.snapshot, {"tensor": 0}, [tensor]), [chunk.header.digest] * count, 16 * count)
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        report = chain.verify()
        assert report.ok, report.problems
        assert bytes(chain.get("latest").load()["x"].numpy()) == bytes(range(16)) * count


@pytest.mark.parametrize("count", [0, 1, 100])
def test_the_largest_honest_locator_is_within_its_limit(count: int) -> None:
    """Long names, large numbers, four bases for each chunk, all in segments of their own: a writer is never refused."""

    def place(number: int, codec: int, depth: int) -> ChunkLocation:
        name = layout.segment("f" * 20, 10**9 - 1, 10**9 - 1 - number)
        where = SegmentReference(name, 2**53 - 1, digest(str(number).encode()))
        return ChunkLocation(where, 2**52, segment.MAX_CHUNK_BYTES + 4096, codec, depth)

    size = segment.MAX_CHUNK_BYTES
    chunks = {digest(b"chunk %d" % number): place(number, segment.CODEC_DELTA, 4) for number in range(count)}
    bases = {digest(b"base %d" % number): (size, place(10**6 + number, 2, 3)) for number in range(4 * count)}
    encoded = Locator("f" * 20, 10**9 - 1, chunks, bases).encode()
    assert len(encoded) <= locator.limit_bytes(count)
    found = locator.decode(encoded, "f" * 20, 10**9 - 1, dict.fromkeys(chunks, size))
    assert (found.chunks, found.bases) == (chunks, bases)


def test_a_link_that_comes_and_goes_is_never_followed(tmp_path: Path) -> None:
    """A file, and the folder above it, changed for a link and back all the time: what is read is never from outside."""
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    snapshot = "a" * 20
    name = layout.segment(snapshot, 0, 0)
    store.create(name, b"inside")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0-0.seg").write_bytes(b"secret")
    path = tmp_path / "chain" / name
    folder = path.parent
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for place, target in ((path, outside / "0-0.seg"), (folder, outside)):
                kept = tmp_path / "kept"
                os.rename(place, kept)
                os.symlink(target, place)
                os.unlink(place)
                os.rename(kept, place)

    attacker = threading.Thread(target=swap)
    attacker.start()
    seen = set()
    try:
        for _ in range(3000):
            try:
                seen.add(store.read(name, 100))
            except (IntegrityError, NotFoundError) as error:
                seen.add(error.kind.encode())
    finally:
        stop.set()
        attacker.join()
    assert b"inside" in seen
    assert seen <= {b"inside", b"symbolic_link", b"no_file"}
    store.close()

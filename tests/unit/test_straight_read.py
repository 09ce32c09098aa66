"""Raw chunks that go from the disk into the tensor that is being made of them, without a copy in between."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_async import Checkpointer, IntegrityError, load, save
from ciuic_async.chain import SnapshotChain
from ciuic_async.codecs.raw import RawCodec
from ciuic_async.format import layout, segment
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import Locator
from ciuic_async.options import READ
from ciuic_async.pipeline.chunks import chunk_reader
from ciuic_async.segments.reader import ChunkRequest, SegmentReader
from ciuic_async.segments.scratch import address_of, fresh, inherit
from ciuic_async.segments.writer import SegmentWriter
from ciuic_async.stores.local import LocalStore

pytestmark = [pytest.mark.damages, pytest.mark.usefixtures("no_leaks")]

SNAPSHOT = "0123456789abcdef0123"
PATH = layout.segment(SNAPSHOT, 0, 0)
BLOCK = segment.DIRECT_ALIGNMENT_BYTES
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    yield store
    store.close()


def _segment(store: LocalStore, contents: list[bytes]) -> list[ChunkRequest]:
    writer = SegmentWriter(store, SNAPSHOT)
    for raw in contents:
        writer.append(RawCodec().encode(memoryview(raw), digest(raw), 1))
    finished = writer.finish()
    store.publish(finished.files)
    return [ChunkRequest(digest(raw), len(raw), finished.locations[digest(raw)]) for raw in contents]


def _random(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What ``read_straight`` answers from now on."""
    answers: list[bool] = []
    real = SegmentReader.read_straight

    def watched(self: SegmentReader, request: ChunkRequest, target: memoryview) -> bool:
        answers.append(real(self, request, target))
        return answers[-1]

    monkeypatch.setattr(SegmentReader, "read_straight", watched)
    return answers


def _damage(chain: Path, inside: bytes, *, cut: bool = False) -> None:
    """Flip a bit of the one segment after these bytes, or end it there."""
    (path,) = (chain / "segments").rglob("*.seg")
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    at = content.index(inside) + 100_000
    content[at] ^= 1
    path.write_bytes(content[:at] if cut else content)


@pytest.mark.parametrize("size_bytes", [MIB, MIB + 1, 2 * MIB - 1, 2 * MIB + BLOCK, 4 * MIB, 4 * MIB - 17])
def test_the_bytes_are_those_of_the_chunk(store: LocalStore, size_bytes: int) -> None:
    """Whatever its length, a raw chunk fills its target, and not a byte beside it changes."""
    raws = [_random(size_bytes), _random(size_bytes + 3)]
    memory = fresh(size_bytes + 64)
    memory[size_bytes:] = b"x" * 64
    with chunk_reader(store, verify=True, where=_nowhere(), sizes={}) as reader:
        for request in _segment(store, raws)[:1]:
            assert reader.read_straight(request, memory[:size_bytes])
    assert memory[:size_bytes] == raws[0]
    assert memory[size_bytes:] == b"x" * 64


def _nowhere() -> Any:
    return Locator(SNAPSHOT, 0, {})


def test_what_cannot_go_straight_is_left_alone(store: LocalStore) -> None:
    """Small records and targets at odd addresses: nothing is read, nothing is written, the answer says so."""
    small, large = _segment(store, [_random(1000), _random(MIB)])
    memory = fresh(MIB + 64)
    with chunk_reader(store, verify=True, where=_nowhere(), sizes={}) as reader:
        assert not reader.read_straight(large, memory[64:])
        assert not reader.read_straight(small, memory[:1000])
    assert not any(memory)


def test_trees_are_read_straight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded tree is bit for bit the saved one, odd sizes and ties included; large tensors go straight."""
    base = torch.randn(3 * MIB + 5)
    saved = {
        "wide": torch.randn(3, MIB),
        "odd": torch.randint(0, 255, (9 * MIB + 7,), dtype=torch.uint8),
        "half": torch.randn(1500, 1001).to(torch.bfloat16),
        "base": base,
        "view": base[10:1000],
        "small": torch.arange(10),
        "flags": torch.rand(3 * MIB) > 0.5,
    }
    save(saved, tmp_path / "chain", codec="raw")
    answers = _reads(monkeypatch)
    loaded = load(tmp_path / "chain")
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert loaded["view"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()
    assert loaded["wide"].untyped_storage().nbytes() == saved["wide"].nbytes
    assert answers.count(True) == 3 + 2 + 3


@pytest.mark.parametrize("cut", [False, True])
def test_damage_is_found_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    """A flipped bit, or a file that ends too soon, under a chunk that goes straight: typed, with the tensor's name."""
    saved = {"good": torch.randn(MIB), "bad": torch.randn(MIB)}
    save(saved, tmp_path / "chain", codec="raw")
    _damage(tmp_path / "chain", saved["bad"].numpy().tobytes()[:64], cut=cut)
    answers = _reads(monkeypatch)
    with pytest.raises(IntegrityError, match="tensor bad:") as caught:
        load(tmp_path / "chain", only=["bad"])
    assert caught.value.kind == ("truncated" if cut else "digest_mismatch")
    assert answers == []  # it was the straight way that raised
    assert torch.equal(load(tmp_path / "chain", only=["good"])["good"], saved["good"])


def test_live_tensors_never_get_unchecked_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restoring in place copies what was checked: nothing goes straight into what training has."""
    model = torch.nn.Linear(1024, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1024)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path / "chain", state, codec="raw") as checkpointer:
        checkpointer.save().wait_durable()
    answers = _reads(monkeypatch)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with Checkpointer(tmp_path / "chain", state, codec="raw") as checkpointer:
        assert checkpointer.restore() is not None
    assert torch.equal(model.weight.detach(), before)
    assert answers == []


def test_unverified_loads_go_straight_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``verify=False`` reads the same bytes the same way, and only leaves out the digest."""
    saved = {"t": torch.randn(2 * MIB)}
    save(saved, tmp_path / "chain", codec="raw")
    answers = _reads(monkeypatch)
    with SnapshotChain(tmp_path / "chain", create=False) as chain:
        loaded = chain.latest().load(verify=False)
    assert torch.equal(loaded["t"], saved["t"])
    assert answers == [True, True]


def test_memory_starts_at_a_page_and_is_inherited(tmp_path: Path) -> None:
    """Fresh memory lies at whole pages; after ``inherit`` a forked child reads what its parent wrote there."""
    for size_bytes in (1, BLOCK + 1, READ.straight_bytes, 5 * MIB + 3):
        memory = fresh(size_bytes)
        assert (len(memory), address_of(memory) % BLOCK) == (size_bytes, 0)
        memory[:] = b"y" * size_bytes
        inherit(address_of(memory), size_bytes)
        child = os.fork()
        if child == 0:
            os._exit(0 if memory == b"y" * size_bytes else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_loaded_tensors_survive_a_fork_and_can_be_shared(tmp_path: Path) -> None:
    """What a load returns behaves as other tensors do: children of a fork have it, and it can move to shared memory."""
    saved = {"t": torch.randn(MIB)}
    save(saved, tmp_path / "chain", codec="raw")
    loaded = load(tmp_path / "chain")["t"]
    child = os.fork()
    if child == 0:
        os._exit(0 if bytes(loaded.numpy().data.cast("B")) == bytes(saved["t"].numpy().data.cast("B")) else 1)
    assert os.waitpid(child, 0)[1] == 0
    loaded.share_memory_()
    assert loaded.is_shared()
    assert torch.equal(loaded, saved["t"])


def test_several_buffers_are_one_read(store: LocalStore) -> None:
    """Buffers are filled one after the other, up to where the file ends, by reads past the cache and through it."""
    content = _random(7 * BLOCK + 100)
    store.create(PATH, content)
    file = store.open_direct(PATH)
    for offset in (0, BLOCK, 3 * BLOCK + 1):
        buffers = [fresh(count * BLOCK) for count in (1, 0, 3, 2, 5)]
        count = file.read_aligned(offset, *buffers)
        assert count == len(content) - offset
        assert b"".join(bytes(buffer) for buffer in buffers)[:count] == content[offset:]
    file.close()

"""Deltas from end to end: what a snapshot leans on stays readable, whatever is pruned, restarted or taken away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ciuic_async import Checkpointer, KeepLatest, SnapshotChain
from ciuic_async.format import segment
from ciuic_async.format.digest import digest
from ciuic_async.format.locator import ChunkLocation, Locator, SegmentReference
from ciuic_async.handoffs import CapturePlan, Region
from ciuic_async.pipeline.bases import BaseFinder, InMemory, Parent, needed_bases
from ciuic_async.staging.retained import Retained


def _weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(300_000, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def chain_folder(tmp_path: Path) -> Path:
    return tmp_path / "chain"


def _nudge(weights: torch.Tensor, step: int) -> None:
    weights.mul_(1 + 1e-6 * step)


def _locator(chain: SnapshotChain, ref: str) -> Locator:
    return chain.get(ref).resolve().locator


def _train(chain: Path, weights: torch.Tensor, count: int, **options: object) -> list[torch.Tensor]:
    """``count`` snapshots, each after a small change; what the weights were at each."""
    states = []
    with Checkpointer(chain, {"w": weights}, rng=False, codec="smallest", **options) as ckpt:  # type: ignore[arg-type]
        for step in range(1, count + 1):
            _nudge(weights, step)
            ckpt.save().wait_durable()
            states.append(weights.clone())
    return states


def test_small_changes_are_stored_as_deltas_of_bounded_depth(chain_folder: Path) -> None:
    """Each snapshot leans on the one before, until the depth is reached; then one stands alone. All read back."""
    states = _train(chain_folder, _weights(), 12)
    with SnapshotChain(chain_folder) as chain:
        depths = []
        for number, state in enumerate(states):
            ref = f"latest~{len(states) - 1 - number}"
            (place,) = _locator(chain, ref).chunks.values()
            depths.append(place.depth)
            assert torch.equal(chain.get(ref).load()["w"], state)
        assert max(depths) == segment.MAX_DEPTH
        assert depths == [number % (segment.MAX_DEPTH + 1) for number in range(12)]
        assert chain.verify().ok
        sizes = [snapshot.stored_bytes for snapshot in chain]
    assert max(size for size, depth in zip(sizes, depths, strict=True) if depth) < min(
        size for size, depth in zip(sizes, depths, strict=True) if not depth
    )


def test_bases_of_pruned_snapshots_stay(chain_folder: Path) -> None:
    """Retention drops snapshots, and never the segments that a kept one is a delta to."""
    states = _train(chain_folder, _weights(), 5, keep=KeepLatest(1))
    with SnapshotChain(chain_folder) as chain:
        assert len(list(chain)) == 1
        where = _locator(chain, "latest")
        assert len(where.bases) == segment.MAX_DEPTH
        assert torch.equal(chain.latest().load()["w"], states[-1])  # type: ignore[union-attr]
        assert chain.verify().ok
        before = sorted(path.name for path in (chain_folder / "segments").rglob("*.seg"))
        chain.gc()
        assert sorted(path.name for path in (chain_folder / "segments").rglob("*.seg")) == before
    assert torch.equal(_train(chain_folder, _weights(1), 1, keep=KeepLatest(1))[0], _nudged(_weights(1)))
    with SnapshotChain(chain_folder) as chain:  # the newest stands alone: nothing of before is needed any more
        chain.gc()
        assert len({path.parent for path in (chain_folder / "segments").rglob("*.seg")}) == 1
        assert chain.verify().ok


def _nudged(weights: torch.Tensor) -> torch.Tensor:
    _nudge(weights, 1)
    return weights


def test_after_a_restart_nothing_leans_on_deltas_of_before(chain_folder: Path) -> None:
    """A restored run stores unchanged deltas anew, whole, and goes on with deltas to that."""
    weights = _weights()
    _train(chain_folder, weights, 3)
    with Checkpointer(chain_folder, {"w": weights}, rng=False, codec="smallest") as ckpt:
        assert ckpt.restore() is not None
        first = ckpt.save().wait_durable()
        _nudge(weights, 1)
        second = ckpt.save().wait_durable()
        assert [place.depth for place in first.resolve().locator.chunks.values()] == [0]
        assert [place.depth for place in second.resolve().locator.chunks.values()] == [1]
        assert torch.equal(second.load()["w"], weights)


def test_an_unchanged_delta_is_referenced_with_its_bases(chain_folder: Path) -> None:
    """A snapshot that repeats a tensor stored as a delta stores nothing, names the bases, and reads back."""
    weights, other = _weights(), _weights(1)
    with Checkpointer(chain_folder, {"w": weights, "o": other}, rng=False, codec="smallest") as ckpt:
        ckpt.save().wait_durable()
        _nudge(weights, 1)
        ckpt.save().wait_durable()
        _nudge(other, 1)
        third = ckpt.save().wait_durable()
        where = third.resolve().locator
        assert sorted(place.depth for place in where.chunks.values()) == [1, 1]
        assert len(where.bases) == 2
        loaded = third.load()
        assert torch.equal(loaded["w"], weights)
        assert torch.equal(loaded["o"], other)


def test_a_slot_that_is_needed_is_given_up(chain_folder: Path) -> None:
    """With memory for one slot there is no base in memory, and no delta; everything is durable all the same."""
    weights = _weights()
    with Checkpointer(chain_folder, {"w": weights}, rng=False, codec="smallest", host_memory_bytes=8 << 20) as ckpt:
        pending = []
        for step in range(1, 7):
            _nudge(weights, step)
            pending.append((ckpt.save(), weights.clone()))
        for one, state in pending:
            assert torch.equal(one.wait_durable().load()["w"], state)


def test_content_that_comes_back_leads_to_no_circle(chain_folder: Path) -> None:
    """A, B, C, A: what is stored as the base of all is referenced, not written as a delta to its own descendants."""
    weights = _weights()
    first = weights.clone()
    with Checkpointer(chain_folder, {"w": weights}, rng=False, codec="smallest") as ckpt:
        for change in (None, 1, 2, "back", 3, "back"):
            if change == "back":
                weights.copy_(first)
            elif change is not None:
                _nudge(weights, int(change))
            snapshot = ckpt.save().wait_durable()
            assert torch.equal(snapshot.load()["w"], weights)


def test_raw_never_asks_for_a_base(chain_folder: Path) -> None:
    """codec="raw" stores every changed chunk as it is."""
    weights = _weights()
    with Checkpointer(chain_folder, {"w": weights}, rng=False, codec="raw") as ckpt:
        ckpt.save().wait_durable()
        _nudge(weights, 1)
        second = ckpt.save().wait_durable()
        assert {place.codec for place in second.resolve().locator.chunks.values()} == {segment.CODEC_RAW}


# --- the parts --------------------------------------------------------------------------------------------------------

REFERENCE = SegmentReference("segments/" + "0" * 20 + "/0-0.seg", 1 << 20, b"\1" * 32)


def _place(depth: int, offset: int = 64) -> ChunkLocation:
    return ChunkLocation(REFERENCE, offset, 256, segment.CODEC_DELTA if depth else segment.CODEC_RAW, depth)


def _key(number: int) -> bytes:
    return bytes([number]) * 32


def test_all_bases_of_all_depths_are_named() -> None:
    """A reader follows one base after the other: each that is no chunk of the snapshot is named, and no other."""
    parent = Parent(
        "0" * 20,
        b"",
        {_key(2): _place(2), _key(9): _place(0)},
        {_key(3): (10, _place(1)), _key(4): (10, _place(0))},
        {_key(2): _key(3), _key(3): _key(4)},
    )
    bases, base_of = needed_bases({_key(1): _key(2)}, {_key(1): _place(3)}, {_key(1): 10}, parent)
    assert bases == {_key(2): (10, _place(2)), _key(3): (10, _place(1)), _key(4): (10, _place(0))}
    assert base_of == {_key(1): _key(2), _key(2): _key(3), _key(3): _key(4)}
    bases, _ = needed_bases(
        {_key(1): _key(2)}, {_key(1): _place(3), _key(2): _place(2)}, {_key(1): 10, _key(2): 10}, parent
    )
    assert set(bases) == {_key(3), _key(4)}


def test_without_deltas_there_are_no_bases() -> None:
    """Chunks that stand alone need nothing, and no parent either."""
    assert needed_bases({}, {_key(1): _place(0)}, {_key(1): 10}, None) == ({}, {})


@pytest.mark.parametrize("change", ["size", "item", "path", "unknown", "too deep", "revoked", "none"])
def test_a_base_is_found_only_where_it_is_the_same_tensor(change: str) -> None:
    """Same path, size and item size, a known place not too deep, and bytes still there: else there is no base."""
    raw = bytes(range(256)) * 16
    region = Region(4096, len(raw), 4, ("w",))
    before = CapturePlan("dict", (), (), (region,), 0, 4 << 20)
    retained = Retained(memoryview(bytes(4096) + raw))
    kept = InMemory("0" * 20, before, (digest(raw),), retained)
    now = Region(
        0, len(raw) - (4 if change == "size" else 0), 2 if change == "item" else 4, ("v" if change == "path" else "w",)
    )
    plan = CapturePlan("dict", (), (), (now,), 0, 4 << 20)
    known = {} if change == "unknown" else {digest(raw): _place(segment.MAX_DEPTH if change == "too deep" else 1)}
    if change == "revoked":
        retained.revoke()
    finder = BaseFinder(plan, known, None if change == "none" else kept)
    (chunk,) = plan.chunks()
    with finder.base(chunk) as base:
        assert base is None
    same = BaseFinder(before, {digest(raw): _place(1)}, InMemory("0" * 20, before, (digest(raw),), retained))
    (chunk,) = before.chunks()
    with same.base(chunk) as base:
        if change == "revoked":
            assert base is None
        else:
            assert base is not None
            assert (bytes(base.raw), base.digest, base.depth) == (raw, digest(raw), 1)


@pytest.mark.damages
def test_a_lost_base_costs_no_further_snapshot(chain_folder: Path) -> None:
    """The segment of a base is deleted under a running training: what leaned on it is stored anew, whole."""
    weights = _weights()
    with Checkpointer(chain_folder, {"w": weights}, rng=False, codec="smallest") as ckpt:
        first = ckpt.save().wait_durable()
        _nudge(weights, 1)
        ckpt.save().wait_durable()
        for path in (chain_folder / "segments" / first.id).glob("*.seg"):
            path.unlink()
        for step in (0, 1):
            if step:
                _nudge(weights, step)
            snapshot = ckpt.save().wait_durable()
            assert torch.equal(snapshot.load()["w"], weights)

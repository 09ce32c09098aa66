"""What a snapshot holds is what was there when it was taken, whatever happens before it is durable."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, SaveFailedError, SnapshotChain
from ciuic_async.format import layout
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.stores.base import Unpublished
from ciuic_async.stores.local import LocalStore


class KeepNothing:
    """Retention at its worst: everything may go."""

    def keep(self, snapshots: Sequence[SnapshotEntry]) -> set[str]:
        return set()

    def describe(self) -> str:
        return "KeepNothing()"


def pause_publishing(monkeypatch: pytest.MonkeyPatch, suffix: str, meanwhile: Any) -> None:
    """Call ``meanwhile()`` once, right before a file whose name ends in ``suffix`` is published for the first time."""
    publish = LocalStore.publish
    done = threading.Event()

    def paused(store: LocalStore, files: Sequence[Unpublished]) -> None:
        if not done.is_set() and any(file.name.endswith(suffix) for file in files):
            done.set()
            meanwhile()
        publish(store, files)

    monkeypatch.setattr(LocalStore, "publish", paused)


def test_training_may_change_everything_as_soon_as_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In-place updates, fused steps and ``.data`` writes right after ``save()`` do not reach the snapshot."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.BatchNorm1d(256))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    gate = threading.Event()
    pause_publishing(monkeypatch, ".seg", lambda: gate.wait(30))
    with Checkpointer(tmp_path / "chain", {"model": model, "optimizer": optimizer}) as ckpt:
        for _ in range(2):
            model(torch.randn(8, 256)).square().mean().backward()
            optimizer.step()
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moment = next(iter(optimizer.state.values()))["exp_avg"].clone()
        pending = ckpt.save()
        model(torch.randn(8, 256)).square().mean().backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
        gate.set()
        loaded = pending.wait_durable(30).load()
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in expected.items())
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], moment)


def test_each_kind_of_file_is_published_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments, then manifest and locator, then the slot, then tiles, then the log head: whoever sees a name finds all
    that it refers to."""
    state = {"w": torch.randn(30_000)}
    published: list[str] = []
    publish = LocalStore._publish

    def recorded(store: LocalStore, files: Sequence[Any], *, replace: bool) -> None:
        publish(store, files, replace=replace)
        published.extend(file.name for file in files)

    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        ckpt.save().wait_durable(30)
        monkeypatch.setattr(LocalStore, "_publish", recorded)
        state["w"] = torch.randn(30_000)
        ckpt.save()
    kinds = ["/".join(name.split("/")[: 2 if name.startswith("log/") else 1]) for name in published]
    assert list(dict.fromkeys(kinds)) == [
        "segments", "manifests", "locators", "log/commit", "log/tile", "log/checkpoint"
    ]  # fmt: skip
    assert kinds == sorted(kinds, key=list(dict.fromkeys(kinds)).index), "each kind is complete before the next"


def test_storages_may_be_replaced_between_snapshots(tmp_path: Path) -> None:
    """Nothing is remembered of where a tensor lay: ``.data =`` swaps, a new optimizer state and ``load_state_dict``."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = []  # kept alive, so that nothing new comes to lie where something old was
    with Checkpointer(tmp_path / "chain", {"model": model, "optimizer": optimizer}) as ckpt:
        for number in range(4):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            before += [model.weight.detach(), optimizer.state[model.weight]["momentum_buffer"]]
            model.weight.data = torch.full((64, 64), float(number))
            optimizer.load_state_dict(optimizer.state_dict())
            momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
            loaded = ckpt.save().wait_durable(30).load()
            assert torch.equal(loaded["model"]["weight"], torch.full((64, 64), float(number)))
            assert torch.equal(loaded["optimizer"]["state"][0]["momentum_buffer"], momentum)


def test_a_parent_that_is_pruned_just_before_the_claim_is_not_leaned_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot is lost to the prune; the chunks are written again from memory, as a new locator generation."""
    state = {"shared": torch.randn(300_000), "n": 0}
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        first = ckpt.save().wait_durable(30)
        state["n"] = 1

        def prune() -> None:
            with SnapshotChain(tmp_path / "chain") as other:
                ciuic_async.save({"unrelated": torch.zeros(3)}, other)  # the latest always stays
                assert other.prune(KeepNothing()).pruned == (first.id,)

        pause_publishing(monkeypatch, "root.json", prune)
        second = ckpt.save().wait_durable(30)
        assert torch.equal(second.load()["shared"], state["shared"])
        third = ckpt.save().wait_durable(30)
        assert third.stored_bytes == 0
    with SnapshotChain(tmp_path / "chain") as chain:
        assert [snapshot.id for snapshot in chain][1:] == [second.id, third.id]
        assert (tmp_path / "chain" / layout.locator(second.id, 1)).exists()
        assert not (tmp_path / "chain" / layout.manifest_root(first.id)).exists()
        assert chain.verify().ok


def test_a_delta_to_a_parent_that_is_pruned_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune between writing and claiming takes the base away: the delta is replaced, the snapshot reads back."""
    state = {"w": torch.randn(300_000)}
    with Checkpointer(tmp_path / "chain", state, rng=False, codec="smallest") as ckpt:
        ckpt.save().wait_durable(30)
        state["w"].mul_(1 + 1e-6)

        def prune() -> None:
            with SnapshotChain(tmp_path / "chain") as other:
                ciuic_async.save({"unrelated": torch.zeros(3)}, other)
                other.prune(KeepNothing())

        pause_publishing(monkeypatch, "root.json", prune)
        second = ckpt.save().wait_durable(30)
        where = second.resolve().locator
        assert where.generation == 1
        assert [place.depth for place in where.chunks.values()] == [0]
        assert torch.equal(second.load()["w"], state["w"])
        state["w"].mul_(1 + 1e-6)
        third = ckpt.save().wait_durable(30)
        assert [place.depth for place in third.resolve().locator.chunks.values()] == [1]
        assert torch.equal(third.load()["w"], state["w"])


def test_a_windowed_snapshot_whose_parent_vanished_fails_and_the_next_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is gone already and so are the parent's files: this one fails loudly, nothing half is committed."""
    state = {"shared": torch.randn(4_000_000), "n": 0}
    with Checkpointer(tmp_path / "chain", state, rng=False, host_memory_bytes=8 << 20) as ckpt:
        ckpt.save().wait_durable(30)
        state["n"] = 1

        def prune() -> None:
            with SnapshotChain(tmp_path / "chain") as other:
                ciuic_async.save({"unrelated": torch.zeros(3)}, other)
                other.prune(KeepNothing())

        pause_publishing(monkeypatch, "root.json", prune)
        with pytest.raises(SaveFailedError):
            ckpt.save().wait_durable(30)
        with SnapshotChain(tmp_path / "chain") as chain:
            assert len(chain) == 1
        snapshot = ckpt.save().wait_durable(30)
        assert torch.equal(snapshot.load()["shared"], state["shared"])


def test_chunks_of_the_parent_and_of_this_snapshot_are_stored_once(tmp_path: Path) -> None:
    """An unchanged chunk is referenced, and equal chunks inside one snapshot are written once."""
    place = tmp_path / "chain"
    half = torch.randn(1 << 20)
    ciuic_async.save({"a": half, "b": half.clone(), "c": torch.randn(1 << 20)}, place, codec="raw")
    with SnapshotChain(place) as chain:
        first = chain.get("latest")
        assert 8 << 20 < first.stored_bytes < (8 << 20) + 100_000
    changed = {"a": half, "b": half.clone(), "c": torch.randn(1 << 20)}
    second = ciuic_async.save(changed, place, codec="raw")
    assert 4 << 20 < second.stored_bytes < (4 << 20) + 100_000
    assert second.raw_bytes == 12 << 20


def test_a_snapshot_that_failed_is_no_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed snapshot wrote is withdrawn, and the next one refers to the last durable one."""
    state = {"w": torch.randn(100_000)}
    with Checkpointer(tmp_path / "chain", state, rng=False) as ckpt:
        first = ckpt.save().wait_durable(30)
        state["w"] = torch.randn(100_000)

        def fail() -> None:
            raise ciuic_async.StoreError("the disk is full", kind="enospc")

        pause_publishing(monkeypatch, "root.json", fail)
        with pytest.raises(SaveFailedError):
            ckpt.save().wait_durable(30)
        assert [path.name for path in (tmp_path / "chain" / "segments").iterdir()] == [first.id]
        third = ckpt.save().wait_durable(30)
        assert third.parent == first.id
        assert third.stored_bytes > 0

"""The commit and its mirror image: what failed leaves nothing, what may have succeeded stays, what lies is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, IntegrityError, NotFoundError, SaveFailedError, SnapshotChain, UsageError
from ciuic_async.chain import Snapshot
from ciuic_async.errors import CiuicWarning, StoreError
from ciuic_async.format import layout, manifest
from ciuic_async.format.digest import Buffer
from ciuic_async.format.entry import ChunkTree, FileReference, PruneEntry, SnapshotEntry
from ciuic_async.format.locator import Locator
from ciuic_async.format.manifest import Node, Shard, StoredTensor
from ciuic_async.pipeline.commit import Resolved, read_checked, read_root
from ciuic_async.pipeline.history import resolve_ref
from ciuic_async.pipeline.restore import load_tree, restore_objects
from ciuic_async.stores.base import Store, Unpublished
from ciuic_async.stores.local import LocalStore

WAIT_S = 30.0


class Troubled(LocalStore):
    """A disk on which ``trouble`` sees every operation and name before it happens, and may raise."""

    trouble: Callable[[str, str], None] = staticmethod(lambda operation, name: None)

    def begin(self, name: str) -> Unpublished:
        self.trouble("begin", name)
        return super().begin(name)

    def create(self, name: str, data: Buffer) -> None:
        self.trouble("create", name)
        super().create(name, data)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> type[Troubled]:
    """Chains of this test lie on a troubled disk."""
    monkeypatch.setattr("ciuic_async.chain.resolve_store", lambda url, _options: Troubled(url))
    monkeypatch.setattr(Troubled, "trouble", staticmethod(lambda operation, name: None))
    return Troubled


def files(chain: Path, *folders: str) -> set[str]:
    return {path.relative_to(chain).as_posix() for folder in folders for path in (chain / folder).rglob("*.*")}


def fail_once(store: type[Troubled], operation: str, start: str, kind: str) -> None:
    def trouble(found: str, name: str) -> None:
        if found == operation and name.startswith(start):
            store.trouble = staticmethod(lambda operation, name: None)
            raise StoreError(f"{name}: {kind}", kind=kind, where=name)

    store.trouble = staticmethod(trouble)


# --- commit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "start", "kind", "stays"),
    [
        ("begin", "manifests/", "enospc", False),
        ("begin", "locators/", "enospc", False),  # the manifest is begun by then
        ("create", "log/commit/", "enospc", False),
        ("create", "log/commit/", "eio", True),  # a reader elsewhere may see the slot
    ],
)
def test_a_failed_commit_withdraws_all_it_may(
    operation: str, start: str, kind: str, stays: bool, tmp_path: Path, store: type[Troubled]
) -> None:
    """Until a claim was tried, or where it surely failed, nothing stays; after one of unknown outcome all files do."""
    chain = tmp_path / "chain"
    state = {"w": torch.randn(50_000)}
    with Checkpointer(chain, state, rng=False) as ckpt:
        ckpt.save().wait_durable(WAIT_S)
        before = files(chain, "segments", "manifests", "locators")
        state["w"] += 1
        fail_once(store, operation, start, kind)
        with pytest.raises(SaveFailedError) as caught:
            ckpt.save().wait_durable(WAIT_S)
        assert caught.value.kind == kind
        left = files(chain, "segments", "manifests", "locators") - before
        assert {name.partition("/")[0] for name in left} == ({"segments", "manifests", "locators"} if stays else set())
        assert files(chain, "tmp") == set()
        assert torch.equal(ckpt.save().wait_durable(WAIT_S).load()["w"], state["w"])


def test_a_segment_that_is_gone_before_the_claim_fails_the_snapshot(tmp_path: Path, store: type[Troubled]) -> None:
    """Somebody deletes a new segment before the slot is claimed: no entry refers to a hole, and the next save works."""
    chain = tmp_path / "chain"
    state = {"w": torch.randn(50_000)}
    with Checkpointer(chain, state, rng=False) as ckpt:
        first = ckpt.save().wait_durable(WAIT_S)
        state["w"] += 1

        def trouble(operation: str, name: str) -> None:
            if operation == "begin" and name.startswith("locators/"):
                (new,) = [path for path in (chain / "segments").rglob("*.seg") if path.parent.name != first.id]
                new.unlink()

        store.trouble = staticmethod(trouble)
        with pytest.raises(SaveFailedError, match="was it deleted") as caught:
            ckpt.save().wait_durable(WAIT_S)
        assert caught.value.kind == "segment_vanished"
        store.trouble = staticmethod(lambda operation, name: None)
        assert torch.equal(ckpt.save().wait_durable(WAIT_S).load()["w"], state["w"])
    assert len(SnapshotChain(chain)) == 2


@pytest.mark.parametrize("windowed", [False, True])
def test_a_prune_whose_files_are_not_deleted_yet(windowed: bool, tmp_path: Path, store: type[Troubled]) -> None:
    """A parent is pruned before the claim and its files are still there: what is leaned on is written again, the rest
    is not, from memory or (its memory given back already) from the store."""
    chain = tmp_path / "chain"
    state = {"kept": torch.randn(3_000_000), "new": torch.randn(200_000)}
    options: dict[str, Any] = {"host_memory_bytes": 8 << 20} if windowed else {}
    with Checkpointer(chain, state, rng=False, codec="raw", **options) as ckpt:
        first = ckpt.save().wait_durable(WAIT_S)
        state["new"] += 1

        def trouble(operation: str, name: str) -> None:
            if operation == "begin" and name.startswith("locators/"):
                store.trouble = staticmethod(lambda operation, name: None)
                with SnapshotChain(chain) as other:
                    target = other.target()
                    entry = PruneEntry(other.common(), (first.id,), "all").encode()
                    target.log.append(lambda log: [entry], target.key, announce=target.announce)

        store.trouble = staticmethod(trouble)
        second = ckpt.save().wait_durable(WAIT_S)
        where = second.resolve().locator
        assert where.generation == 1
        assert {layout.owner(segment.path) for segment in where.segments()} == {second.id}
        numbers = {int(segment.path[-5]) for segment in where.segments()}
        assert numbers == {0, 1}, "what was written once is not written again"
        loaded = second.load()
        assert torch.equal(loaded["kept"], state["kept"])
        assert torch.equal(loaded["new"], state["new"])
    with SnapshotChain(chain) as other:
        other.gc()
        assert other.verify().ok


# --- resolve ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Snapshot:
    """A snapshot of two small tensors, packed, and a large one, of several chunks."""
    state = {"a": torch.ones(8), "b": torch.zeros(8), "w": torch.randn(2_000_000)}
    return ciuic_async.save(state, tmp_path / "chain", codec="raw")


def _store(snapshot: Snapshot) -> Store:
    return snapshot._store


@pytest.mark.parametrize("change", [{"raw_bytes": 1}, {"world": 2}, {"chunks": ChunkTree(bytes(32), 5)}])
def test_a_root_that_contradicts_its_entry_is_refused(change: dict[str, Any], saved: Snapshot) -> None:
    """What entry and manifest both say must be the same, also where each is signed or digested."""
    store, entry = _store(saved), saved.resolve().entry
    assert read_root(store, entry).raw_bytes == entry.raw_bytes
    with pytest.raises(IntegrityError, match="contradicts") as caught:
        read_root(store, replace(entry, **change))
    assert (caught.value.kind, caught.value.where) == ("bad_manifest", entry.manifest.path)


def test_a_file_said_to_be_huge_is_not_read(saved: Snapshot) -> None:
    """A reference beyond the limit of its kind of file is refused by what it says, whatever the file holds."""
    store, entry = _store(saved), saved.resolve().entry
    huge = FileReference(entry.manifest.path, bytes(32), manifest.ROOT_LIMIT_BYTES + 1)
    with pytest.raises(IntegrityError) as caught:
        read_checked(store, huge, manifest.ROOT_LIMIT_BYTES)
    assert caught.value.kind == "file_too_large"


@pytest.mark.damages
def test_an_older_locator_serves_where_a_newer_one_is_damaged(saved: Snapshot, tmp_path: Path) -> None:
    """The newest intact generation counts; with all of them damaged the error names the newest."""
    where = saved.resolve().locator
    first, second = (tmp_path / "chain" / layout.locator(saved.id, generation) for generation in (0, 1))
    second.write_bytes(Locator(saved.id, 1, where.chunks).encode())
    assert saved.resolve().locator.generation == 1
    second.write_bytes(second.read_bytes().replace(b'"generation":1', b'"generation":7'))
    assert saved.resolve().locator == where
    assert torch.equal(saved.load()["a"], torch.ones(8))
    first.chmod(0o644)
    first.write_bytes(b"{}")
    with pytest.raises(IntegrityError) as caught:
        saved.resolve()
    assert (caught.value.kind, caught.value.where) == ("digest_mismatch", layout.locator(saved.id, 1))


# --- refs and names ---------------------------------------------------------------------------------------------------


def test_the_beginning_of_several_ids_is_no_ref(tmp_path: Path) -> None:
    """Digits that several ids begin with are refused with those ids; one digit more, and they mean one of them."""
    ids = ["abcd" + "0" * 16, "abcd1" + "0" * 15, "ffff" + "0" * 16]
    with SnapshotChain(tmp_path / "chain") as chain:
        target = chain.target()
        for name in ids:
            root = FileReference(layout.manifest_root(name), bytes(32), 1)
            tree = ChunkTree(bytes(32), 0)
            made = SnapshotEntry(chain.common(), name, None, 1, None, None, (), (), root, tree, 0, 0).encode()
            target.log.append(lambda log, made=made: [made], target.key, announce=target.announce)  # type: ignore[misc]
        with pytest.raises(UsageError, match="several") as caught:
            resolve_ref(target.log, "abcd")
        assert all(name in str(caught.value) for name in ids[:2])
        assert [resolve_ref(target.log, ref).entry.snapshot for ref in ("abcd0", "abcd1", "ffff")] == ids
    (tmp_path / "chain" / "ciuic.json").unlink()  # its snapshots have no files: no chain to leave behind


def test_two_tensors_of_one_dotted_name_are_not_exported(tmp_path: Path) -> None:
    """An export never drops one of two tensors whose names are the same in the other format."""
    snapshot = ciuic_async.save({"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}, tmp_path / "chain")
    with pytest.raises(UsageError, match=r"a\.b") as caught:
        snapshot.export(tmp_path / "out.safetensors")
    assert caught.value.kind == "duplicate_name"
    assert not (tmp_path / "out.safetensors").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Where the file cannot be made there is a StoreError with the place, and no temporary file."""
    snapshot = ciuic_async.save({"w": torch.ones(2), "odd": {1, 2}, "n": 3}, tmp_path / "chain")
    place = tmp_path / "folder.safetensors"
    place.mkdir()
    for path in (place, tmp_path / "nowhere" / "out.safetensors"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CiuicWarning)
            with pytest.raises(StoreError) as caught:
                snapshot.export(path)
        assert (caught.value.kind, caught.value.where) == ("export_failed", str(path))
    assert {path.name for path in tmp_path.iterdir()} <= {"chain", "folder.safetensors", "home"}
    from safetensors import safe_open

    with pytest.warns(CiuicWarning, match="set: left out"):
        snapshot.export(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.ones(2))
        assert file.metadata()["ciuic.values"] == '{"n": 3}'


# --- manifests that lie -----------------------------------------------------------------------------------------------


def _tensors(resolved: Resolved, number: int, **changes: Any) -> Resolved:
    tensors = list(resolved.manifest.tensors)
    tensors[number] = replace(tensors[number], **changes)
    return replace(resolved, manifest=replace(resolved.manifest, tensors=tuple(tensors)))


def _trees(resolved: Resolved, number: int, **changes: Any) -> Resolved:
    trees = list(resolved.manifest.trees)
    trees[number] = replace(trees[number], **changes)
    return replace(resolved, manifest=replace(resolved.manifest, trees=tuple(trees)))


def _number(resolved: Resolved, name: str) -> int:
    return next(number for number, tensor in enumerate(resolved.manifest.tensors) if tensor.path == (name,))


def _sharded(resolved: Resolved) -> Resolved:
    number = _number(resolved, "w")
    (shard,) = resolved.manifest.tensors[number].shards
    return _tensors(resolved, number, shards=(shard, shard))


def _outside_its_pack(resolved: Resolved) -> Resolved:
    number = _number(resolved, "a")
    shard = resolved.manifest.tensors[number].shards[0]
    return _tensors(resolved, number, shards=(replace(shard, pack=(0, 1 << 20)),))


def _too_many_chunks(resolved: Resolved) -> Resolved:
    number = _number(resolved, "w")
    tensor: StoredTensor = resolved.manifest.tensors[number]
    shard: Shard = tensor.shards[0]
    return _tensors(resolved, number, shards=(replace(shard, digests=shard.digests * 2),))


LIES: list[tuple[Callable[[Resolved], Resolved], str]] = [
    (_sharded, "sharded"),
    (_outside_its_pack, "bad_manifest"),
    (_too_many_chunks, "bad_manifest"),
    (lambda resolved: _trees(resolved, 0, node={"tensor": 99}), "malformed_node"),
    (lambda resolved: _trees(resolved, 0, node={"tensor": -1}), "malformed_node"),
    (lambda resolved: _trees(resolved, 0, key="w"), "malformed_node"),
]


@pytest.mark.parametrize(("lie", "kind"), LIES)
def test_a_manifest_that_lies_is_refused(lie: Callable[[Resolved], Resolved], kind: str, saved: Snapshot) -> None:
    """Places outside a tensor or a pack, references to no tensor and two items of one name are typed errors."""
    store = _store(saved)
    assert torch.equal(load_tree(store, saved.resolve())["a"], torch.ones(8))
    with pytest.raises(IntegrityError) as caught:
        load_tree(store, lie(saved.resolve()))
    assert caught.value.kind == kind


@pytest.mark.parametrize("items", [[1], [["x"]], [["x", 1, 2]]])
def test_choosing_from_a_dict_that_is_none_is_refused(items: list[Any], saved: Snapshot) -> None:
    """``only=`` looks into dicts of the manifest: one whose items are no pairs is damage, as it is without."""
    store = _store(saved)
    with pytest.raises(IntegrityError) as caught:
        load_tree(store, _trees(saved.resolve(), 0, node={"dict": items}), only=["a.x"])
    assert caught.value.kind == "malformed_node"


def test_nothing_chosen_from_a_single_tree_is_not_found(tmp_path: Path) -> None:
    """``only=`` that matches nothing is an error for a state without names too."""
    ciuic_async.save([torch.ones(2), 1], tmp_path / "chain")
    with pytest.raises(NotFoundError):
        ciuic_async.load(tmp_path / "chain", only="model")


def test_random_states_that_are_none_are_refused(tmp_path: Path) -> None:
    """What cannot be a generator's state is an IntegrityError that says so, and the generators stay as they are."""
    with Checkpointer(tmp_path / "chain", {"n": 1}) as ckpt:
        snapshot = ckpt.save().wait_durable(WAIT_S)
    resolved = snapshot.resolve()
    number = next(number for number, tree in enumerate(resolved.manifest.trees) if tree.section == "rng")
    before = torch.get_rng_state()
    store = _store(snapshot)
    nodes: list[Node] = [1, {"dict": []}, {"dict": [["torch", "x"]]}]
    for node in nodes:
        with pytest.raises(IntegrityError) as caught:
            restore_objects(store, _trees(resolved, number, node=node), {"n": 1}, strict=True, rng=True)
        assert caught.value.kind == "bad_rng"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("held", ["right", "changed", "cut off"])
def test_chunks_in_memory_are_believed_only_if_they_are_right(held: str, saved: Snapshot) -> None:
    """What a keeper hands over is checked like what is read: where it is wrong or cut off, the store's bytes count."""
    store = _store(saved)
    resolved = saved.resolve()
    whole = load_tree(store, resolved)["w"].numpy().tobytes()
    shard = resolved.manifest.tensors[_number(resolved, "w")].shards[0]
    size = shard.chunk_size_bytes
    memory = {}
    for number, chunk in enumerate(shard.chunk_digests()):
        right = whole[number * size :][:size]
        memory[chunk] = memoryview(
            bytearray({"right": right, "changed": bytes(len(right)), "cut off": right[:-1]}[held])
        )
    assert load_tree(store, replace(resolved, in_memory=memory))["w"].numpy().tobytes() == whole

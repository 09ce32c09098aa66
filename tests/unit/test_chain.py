"""SnapshotChain and Snapshot: refs, facts, and messages that help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, KeepLatest, NotFoundError, Snapshot, SnapshotChain, UsageError


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[SnapshotChain]:
    """Steps 10, 20, 30 with losses 3, 1, 2; 20 is tagged; 40 has no loss and a NaN."""
    with SnapshotChain(tmp_path / "chain") as chain:
        with Checkpointer(chain, {"t": torch.zeros(4)}) as ckpt:
            for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None)):
                while ckpt._step < step:
                    ckpt.step(epoch=step // 20, batch=f"b{step}")
                metrics = {"nan": float("nan")} if loss is None else {"loss": loss}
                ckpt.save(metrics=metrics, tags=["golden", "v1"] if step == 20 else [])
        yield chain


REFS = {
    "latest": 40,
    "latest~1": 30,
    "latest~3": 10,
    "step:10": 10,
    "best:loss": 20,
    "golden": 20,
    "golden~1": 10,
    "v1": 20,
}


@pytest.mark.parametrize("ref", REFS)
def test_refs_mean_snapshots(ref: str, chain: SnapshotChain) -> None:
    """Every kind of ref finds its snapshot."""
    assert chain.get(ref).step == REFS[ref]


def test_ids_and_unique_prefixes_are_refs(chain: SnapshotChain) -> None:
    """A whole id, and as many digits as are needed."""
    for snapshot in chain:
        assert chain.get(snapshot.id).step == snapshot.step
        assert chain.get(snapshot.id[:12]).step == snapshot.step
        assert chain.get(f"{snapshot.id}~0").step == snapshot.step


@pytest.mark.parametrize(
    "ref", ["latest~4", "step:11", "best:accuracy", "best:nan", "silver", "ffffffffffff", "step:x", "~1"]
)
def test_a_ref_to_nothing_says_what_there_is(ref: str, chain: SnapshotChain) -> None:
    """The NotFoundError repeats the ref, and names the newest snapshot or the one without a parent."""
    with pytest.raises(NotFoundError) as missing:
        chain.get(ref)
    assert missing.value.kind == "no_such_snapshot"
    assert str(missing.value).startswith(ref)
    known = chain.get("latest").id if "~4" not in ref else chain.get("step:10").id
    assert known in str(missing.value)


@pytest.mark.parametrize("ref", ["", None, 3])
def test_what_is_no_ref_is_a_usage_error(ref: Any, chain: SnapshotChain) -> None:
    """A ref is a text."""
    with pytest.raises(UsageError, match="ref"):
        chain.get(ref)


def test_of_equal_refs_the_newest_counts(chain: SnapshotChain) -> None:
    """Going back and training again makes a second step 20: refs mean the newer one; parents tell the story."""
    with Checkpointer(chain, {"t": torch.ones(4)}) as ckpt:
        ckpt.restore("step:10")
        ckpt.step()
        while ckpt._step < 20:
            ckpt.step()
        second = ckpt.save(metrics={"loss": 1.0}, tags=["golden"]).wait_durable(30)
    assert [chain.get(ref).id for ref in ("step:20", "best:loss", "golden", "latest")] == [second.id] * 4
    assert chain.get("v1").id != second.id
    assert chain.get("latest~1").step == 10
    assert second.parent == chain.get("step:10").id


def test_snapshots_tell_their_facts(chain: SnapshotChain) -> None:
    """Facts come from the entry: oldest first, with parents and positions."""
    snapshots = list(chain)
    assert len(chain) == len(snapshots) == 4
    assert [s.step for s in snapshots] == [10, 20, 30, 40]
    assert [s.batch for s in snapshots] == ["b10", "b20", "b30", "b40"]
    assert [s.parent for s in snapshots] == [None, *(s.id for s in snapshots[:3])]
    assert [s.index for s in snapshots] == sorted(s.index for s in snapshots)
    latest = chain.latest()
    assert isinstance(latest, Snapshot)
    assert latest.id == snapshots[-1].id
    assert latest.created.endswith("Z")
    assert latest.raw_bytes > 16
    assert snapshots[1].tags == ("golden", "v1")


def test_the_log_is_plain_json(chain: SnapshotChain) -> None:
    """log() can be printed as JSON, NaN included, and has the documented keys."""
    chain.prune(KeepLatest(3))
    lines = json.loads(json.dumps(chain.log(), allow_nan=False))
    assert [line["kind"] for line in lines] == ["key", *["snapshot"] * 4, "prune"]
    keys = {
        "id",
        "index",
        "kind",
        "step",
        "epoch",
        "batch",
        "created",
        "parent",
        "raw_bytes",
        "stored_bytes",
        "metrics",
        "tags",
    }
    assert all(keys <= set(line) for line in lines)
    assert [line["index"] for line in lines] == list(range(6))
    assert lines[4]["metrics"] == {"nan": "nan"}
    assert lines[5]["snapshots"] == [lines[1]["id"]]


def test_a_chain_that_is_not_there(tmp_path: Path) -> None:
    """create=False and load() say so and make nothing."""
    for open_it in (
        lambda: SnapshotChain(tmp_path / "none", create=False),
        lambda: ciuic_async.load(tmp_path / "none"),
    ):
        with pytest.raises(NotFoundError, match=r"no chain here.*ciuic\.json") as missing:
            open_it()
        assert missing.value.kind == "no_chain"
    assert not (tmp_path / "none").exists()


def test_an_empty_chain(tmp_path: Path) -> None:
    """No snapshot yet: latest() is None, get() says so, verify is content."""
    with SnapshotChain(tmp_path / "chain") as chain:
        assert chain.latest() is None
        assert list(chain) == []
        assert chain.verify().ok
        with pytest.raises(NotFoundError, match="no snapshot yet") as missing:
            chain.get("latest")
        assert missing.value.kind == "no_snapshot"


def test_reading_writes_nothing(chain: SnapshotChain, tmp_path: Path) -> None:
    """Looking at a chain, loading and verifying change no file and make no key."""
    folder = tmp_path / "chain"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with SnapshotChain(folder, create=False) as reader:
        for snapshot in reader:
            snapshot.load()
        reader.log()
        reader.keys()
        assert reader.verify().ok
        assert reader.signing_key() is not None
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_verify_takes_a_level(chain: SnapshotChain) -> None:
    """Shallow levels are named in the report; another word is a UsageError."""
    assert chain.verify().level.startswith("chunk data")
    assert chain.verify(deep=False).level.startswith("manifests")
    assert chain.verify(level="manifests").level.startswith("manifests")
    with pytest.raises(UsageError, match="level"):
        chain.verify(level="everything")


def test_loading_a_part_reads_only_that(tmp_path: Path) -> None:
    """only= takes patterns over dotted paths; nothing that matches is a NotFoundError."""
    state = {"model": {"trunk": torch.ones(300_000), "head": {"w": torch.zeros(3)}}, "step": 1}
    with SnapshotChain(tmp_path / "chain") as chain:
        snapshot = ciuic_async.save(state, chain)
        read: list[int] = []
        loaded = snapshot.load(only="model.head", listener=lambda event: read.append(event.size_bytes))
        assert list(loaded) == ["model"]
        assert list(loaded["model"]) == ["head"]
        assert sum(read) < 1000
        assert set(snapshot.load(only=["step", "model.h*"])) == {"model", "step"}
        with pytest.raises(NotFoundError, match="matches"):
            snapshot.load(only="optimizer")


def test_another_process_sees_what_was_added(chain: SnapshotChain, tmp_path: Path) -> None:
    """An object that was opened earlier finds newer snapshots of other writers."""
    with SnapshotChain(tmp_path / "chain", create=False) as other:
        assert len(other) == 4
        ciuic_async.save({"n": 1}, chain)
        assert len(other) == 5
        latest = other.latest()
        assert latest is not None
        assert latest.load() == {"n": 1}


def test_a_run_records_what_it_was_started_with(tmp_path: Path) -> None:
    """``config`` comes back bit for bit from every snapshot, as it was when the checkpointer was made; what is no plain
    value or no mapping is refused at once."""
    config: dict[str, Any] = {
        "lr": 0.1 + 0.2,
        "betas": (0.9, 0.999),
        "seed": 2**70,
        "name": "größe",
        "nested": {1: None},
    }
    with SnapshotChain(tmp_path / "chain") as chain:
        with Checkpointer(chain, {"t": torch.zeros(4)}, config=config) as ckpt:
            config_before = dict(config)
            config["lr"] = 7.0
            first = ckpt.save().wait_durable()
            second = ckpt.save().wait_durable()
        assert first.config == second.config == config_before
        with Checkpointer(chain, {"t": torch.zeros(4)}) as ckpt:
            assert ckpt.save().wait_durable().config is None
        for wrong in ({"t": torch.zeros(1)}, {"f": print}, {"x": "y" * 100_000}, [1]):
            with pytest.raises(UsageError):
                Checkpointer(chain, {"t": torch.zeros(4)}, config=wrong)  # type: ignore[arg-type]

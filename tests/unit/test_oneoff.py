"""``save`` and ``load`` without a training loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ciuic_async
from ciuic_async import NotFoundError, SnapshotChain, UsageError, oneoff
from tests.strategies import fingerprint


def test_three_lines(tmp_path: Path) -> None:
    """Save, save again, load by ref; the returned snapshot is durable and says so in the chain."""
    first = ciuic_async.save({"w": torch.ones(3)}, tmp_path / "chain", tags=["a"], metrics={"loss": 0.5})
    second = ciuic_async.save({"w": torch.zeros(3)}, str(tmp_path / "chain"))
    assert ciuic_async.load(tmp_path / "chain")["w"].tolist() == [0, 0, 0]
    assert ciuic_async.load(tmp_path / "chain", "a")["w"].tolist() == [1, 1, 1]
    assert ciuic_async.load(f"file://{tmp_path}/chain", first.id)["w"].tolist() == [1, 1, 1]
    assert (first.step, first.tags, first.metrics) == (None, ("a",), {"loss": 0.5})
    assert second.parent == first.id
    assert second.stored_bytes < 16_384


def test_unchanged_chunks_are_not_written_again(tmp_path: Path) -> None:
    """Saving the same tensors a second time stores next to nothing."""
    state = {"w": torch.randn(1_000_000)}
    first = ciuic_async.save(state, tmp_path / "chain")
    second = ciuic_async.save({**state, "step": 2}, tmp_path / "chain")
    assert first.stored_bytes > 3_000_000
    assert second.stored_bytes == 0
    assert second.raw_bytes == first.raw_bytes


def test_a_state_beyond_the_window_is_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state many times larger than the host memory in use comes back bit for bit."""
    monkeypatch.setattr(oneoff, "WINDOW_BYTES", 4 << 20)
    state = {str(n): torch.randn(3_000_001 - n) for n in range(3)} | {"small": [torch.ones(n) for n in range(9)]}
    ciuic_async.save(state, tmp_path / "chain", codec="raw")
    assert fingerprint(ciuic_async.load(tmp_path / "chain")) == fingerprint(state)


@pytest.mark.damages
def test_a_damaged_newest_snapshot_is_not_leaned_on(tmp_path: Path) -> None:
    """When the newest snapshot's locator is gone, the next save writes everything itself."""
    state = {"w": torch.randn(10_000)}
    broken = ciuic_async.save(state, tmp_path / "chain")
    (tmp_path / "chain" / "locators" / f"{broken.id}.0.json").unlink()
    ciuic_async.save(state, tmp_path / "chain")
    assert fingerprint(ciuic_async.load(tmp_path / "chain")) == fingerprint(state)


def test_an_open_chain_stays_open(tmp_path: Path) -> None:
    """A SnapshotChain given as url is used and not closed."""
    with SnapshotChain(tmp_path / "chain") as chain:
        ciuic_async.save([1], chain)
        ciuic_async.save([2], chain)
        assert ciuic_async.load(chain, "latest~1") == [1]
        assert len(chain) == 2


@pytest.mark.parametrize(("codec", "good"), [("auto", True), ("raw", True), ("best", False)])
def test_codecs_by_name(codec: str, good: bool, tmp_path: Path) -> None:
    """An unknown codec is a UsageError before anything is made."""
    if good:
        ciuic_async.save([torch.zeros(9)], tmp_path / "chain", codec=codec)
        assert ciuic_async.load(tmp_path / "chain")[0].tolist() == [0] * 9
    else:
        with pytest.raises(UsageError, match="best"):
            ciuic_async.save([1], tmp_path / "chain", codec=codec)
        assert not (tmp_path / "chain").exists()


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    """No chain, and no such snapshot, are told apart."""
    with pytest.raises(NotFoundError) as missing:
        ciuic_async.load(tmp_path / "chain")
    assert missing.value.kind == "no_chain"
    ciuic_async.save([1], tmp_path / "chain")
    with pytest.raises(NotFoundError) as missing:
        ciuic_async.load(tmp_path / "chain", "step:4")
    assert missing.value.kind == "no_such_snapshot"


def test_export_writes_what_others_read(tmp_path: Path) -> None:
    """The safetensors file holds every tensor under its dotted path; another suffix is refused."""
    from safetensors.torch import load_file

    state = {"model": {"w": torch.randn(3, 4).t(), "tied": (tied := torch.ones(2))}, "again": [tied], "step": 3}
    snapshot = ciuic_async.save(state, tmp_path / "chain")
    with SnapshotChain(tmp_path / "chain") as chain:
        path = chain.get(snapshot.id).export(tmp_path / "out.safetensors")
        tensors = load_file(path)
        assert torch.equal(tensors["model.w"], state["model"]["w"])  # type: ignore[index]
        assert torch.equal(tensors["again.0"], tied)
        with pytest.raises(UsageError, match=r"\.zip"):
            chain.get(snapshot.id).export(tmp_path / "out.zip")


def test_importing_the_package_imports_no_torch() -> None:
    """The names are there at once; torch is loaded when something needs it."""
    code = "import sys, ciuic_async; ciuic_async.load, ciuic_async.save; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

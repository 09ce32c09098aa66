"""Bad places: full, read-only, immutable, gone, or not a folder at all.

Each gives an error that says what, where and what helps; earlier snapshots stay as they are; training goes on; and it
works again, without leftovers, when the place does.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, KeepLatest
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import CiuicError, CiuicWarning, NotFoundError, SaveFailedError, StoreError

pytestmark = [pytest.mark.slow]

STATE_BYTES = 400_000


class Training:
    """A training of one tensor that does not compress."""

    def __init__(self, chain: Path, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.state: dict[str, Any] = {"model": {"weights": self.draw()}}
        self.checkpointer = Checkpointer(chain, self.state, every_steps=1, rng=False, **options)
        self.saved: dict[str, torch.Tensor] = {}
        self.steps = 0

    def draw(self) -> torch.Tensor:
        return torch.randint(0, 256, (STATE_BYTES,), dtype=torch.uint8, generator=self.generator)

    def step(self) -> CiuicError | None:
        """One step with its snapshot; why that failed, or None."""
        self.state["model"]["weights"] = self.draw()
        self.steps += 1
        pending = self.checkpointer.step()
        assert pending is not None
        try:
            snapshot = pending.wait_durable(60)
        except SaveFailedError as error:
            return error
        finally:
            self.checkpointer._writer.wait_idle()  # it tidies up once, and must not trip over what a test does next
        self.saved[snapshot.id] = self.state["model"]["weights"].clone()
        return None

    def close(self) -> None:
        self.checkpointer.close()


def check(chain: Path, saved: dict[str, torch.Tensor]) -> None:
    """Exactly what was saved is there, whole, and nothing besides."""
    with SnapshotChain(chain, create=False) as opened:
        report = opened.verify()
        assert report.ok, report.problems
        assert report.notes == (), "leftovers"
        assert {snapshot.id for snapshot in opened} == set(saved)
        for snapshot in opened:
            assert torch.equal(snapshot.load()["model"]["weights"], saved[snapshot.id])
    assert os.listdir(chain / "tmp") == [], "leftovers"


def is_clear(error: CiuicError, where: Path, *words: str) -> None:
    """What, where, what helps."""
    message = str(error)
    assert str(where) in message
    for word in words:
        assert word in message, message
    assert error.kind not in ("internal", "store", "error"), error.kind


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """A mount for a ``with`` block; the last argument is where. Skips the test where mounting is not allowed."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(arguments[-1])], check=True)  # a failed test holds it


def fill(folder: Path) -> Path:
    """Take all the space there is."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    return ballast


def test_a_full_disk(tmp_path: Path) -> None:
    """No space left, from one moment to the next: those snapshots fail, training and earlier ones do not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=8m", "none", disk):
        chain = disk / "chain"
        training = Training(chain)
        assert training.step() is None
        ballast = fill(disk)
        for _ in range(3):
            error = training.step()
            assert error is not None
            assert error.kind == "enospc"
            is_clear(error, chain, "disk is full", "free space or prune")
        check(chain, training.saved)
        ballast.unlink()
        assert training.step() is None
        training.close()
        check(chain, training.saved)
        assert len(training.saved) == 2


@pytest.mark.parametrize(
    "free_bytes", [4096, 20_000, 100_000, 399_360, 405_504, 409_600, 413_696, 417_792, 421_888, 430_080]
)
def test_a_disk_that_gets_full_in_the_middle(tmp_path: Path, free_bytes: int) -> None:
    """Space for a part of a snapshot, truly short writes included: nothing of it stays, and the space is free again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=4m", "none", disk):
        chain = disk / "chain"
        training = Training(chain)
        assert training.step() is None
        ballast = fill(disk)
        os.truncate(ballast, ballast.stat().st_size - free_bytes)
        before = free_space(disk)
        error = training.step()
        if error is not None:
            is_clear(error, chain, "disk is full")
            assert free_space(disk) == before
        check(chain, training.saved)
        ballast.unlink()
        assert training.step() is None
        training.close()
        check(chain, training.saved)


def free_space(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bfree * status.f_bsize


def test_a_full_disk_works_again_by_retention(tmp_path: Path) -> None:
    """The chain itself fills the disk: dropping old snapshots frees the space that the next one takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=2m", "none", disk):
        chain = disk / "chain"
        training = Training(chain)
        errors = []
        while not errors and training.steps < 50:
            error = training.step()
            errors += [error] if error else []
        assert len(training.saved) >= 2
        check(chain, training.saved)
        training.checkpointer.chain.prune(KeepLatest(1))
        kept = list(training.saved)[-1]
        assert training.step() is None
        training.close()
        check(chain, {kept: training.saved[kept], **dict([list(training.saved.items())[-1]])})


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """A lower limit of this process for a ``with`` block."""
    before, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (before, hard))


def test_a_file_size_limit(tmp_path: Path) -> None:
    """A process that may not write files that large gets an error that names the limit."""
    chain = tmp_path / "chain"
    training = Training(chain)
    assert training.step() is None
    with limited(resource.RLIMIT_FSIZE, STATE_BYTES // 4):
        error = training.step()
    assert error is not None
    assert error.kind == "efbig"
    is_clear(error, chain, "ulimit -f")
    assert training.step() is None
    training.close()
    check(chain, training.saved)


def test_too_many_open_files(tmp_path: Path, no_leaks: None) -> None:
    """No descriptor left: an error that says so, no leak, and the next snapshot works."""
    chain = tmp_path / "chain"
    training = Training(chain)
    assert training.step() is None
    lowest = max(int(number) for number in os.listdir("/proc/self/fd"))
    for spare in range(4):
        taken = []
        with limited(resource.RLIMIT_NOFILE, lowest + 1):
            try:
                while True:
                    taken.append(os.dup(0))
            except OSError:
                pass
            for descriptor in taken[len(taken) - spare :]:
                os.close(descriptor)
            error = training.step()
        for descriptor in taken[: len(taken) - spare]:
            os.close(descriptor)
        assert error is not None
        assert error.kind == "emfile"
        is_clear(error, chain, "ulimit -n")
    assert training.step() is None
    training.close()
    check(chain, training.saved)


def test_a_read_only_place(tmp_path: Path, no_leaks: None) -> None:
    """Everything that reads works, and nothing that writes; a run that was there before goes on."""
    place = tmp_path / "place"
    place.mkdir()
    chain = place / "chain"
    training = Training(chain)
    assert training.step() is None
    with mounted("--bind", place, place):
        # The folder of the run that is open lies on the mount below, which stays writable: a new one sees this one.
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        check(chain, training.saved)
        with pytest.raises(StoreError) as caught:
            ciuic_async.save({"a": torch.zeros(3)}, chain)
        assert caught.value.kind == "erofs"
        is_clear(caught.value, chain, "read-only", "another folder or remount")
        with pytest.raises(StoreError) as caught:
            SnapshotChain(place / "new")
        is_clear(caught.value, place / "new", "read-only")
        other = Training(chain)
        progress = other.checkpointer.restore()
        assert progress is not None
        error = other.step()
        assert error is not None
        assert error.kind == "erofs"
        other.close()
    assert training.step() is None
    training.close()
    check(chain, training.saved)


def test_an_immutable_folder(tmp_path: Path) -> None:
    """The chain's folders may not be changed: a clear error, and all works when they may."""
    chain = tmp_path / "chain"
    training = Training(chain)
    assert training.step() is None
    folders = [chain / "tmp", chain / "segments", chain / "log" / "commit"]
    for folder in folders:
        done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            training.close()
            pytest.skip(f"no immutable folders here: {done.stderr.strip()}")
        try:
            error = training.step()
        finally:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        assert error is not None
        assert error.kind == "eperm"
        is_clear(error, chain, "not permitted: check owner and mode")
        with SnapshotChain(chain, create=False) as opened:
            assert opened.verify().ok
            assert {snapshot.id for snapshot in opened} == set(training.saved)
        assert training.step() is None
    training.close()
    with SnapshotChain(chain) as opened:
        opened.gc(orphan_age_s=0)  # when the claim itself fails its outcome may be unknown: those files wait for gc
    check(chain, training.saved)


def make_file(path: Path) -> Path:
    path.write_text("here first")
    return path


@pytest.mark.parametrize(
    "where",
    [
        lambda tmp: make_file(tmp / "file"),
        lambda tmp: make_file(tmp / "file") / "chain",
        lambda tmp: make_file(tmp / "file") / "far" / "below" / "chain",
        lambda tmp: Path("/proc/chain"),
        lambda tmp: Path("/proc/self/status/chain"),
        lambda tmp: Path("/dev/null"),
        lambda tmp: Path("/dev/null/chain"),
    ],
)
def test_no_place_for_a_chain(tmp_path: Path, where: Callable[[Path], Path]) -> None:
    """A path at which no folder can be: an error at once, and what stands there is left alone."""
    chain = where(tmp_path)
    with pytest.raises(StoreError) as caught:
        Checkpointer(chain, {"a": torch.zeros(2)})
    is_clear(caught.value, chain, ":")
    with pytest.raises((StoreError, NotFoundError)) as reading:
        SnapshotChain(chain, create=False)
    is_clear(reading.value, chain)
    if (tmp_path / "file").exists():
        assert (tmp_path / "file").read_text() == "here first"


@pytest.mark.parametrize("name", ["segments", "manifests", "locators", "tmp", "log/commit"])
def test_a_file_where_a_folder_of_the_chain_should_be(tmp_path: Path, name: str) -> None:
    """A folder of the chain replaced by a file: snapshots fail and name it; put back, all works again."""
    chain = tmp_path / "chain"
    training = Training(chain)
    assert training.step() is None
    (chain / name).rename(tmp_path / "aside")
    make_file(chain / name)
    error = training.step()
    assert error is not None
    assert error.kind in ("enotdir", "segment_vanished", "missing", "slots_missing"), error.kind
    (chain / name).unlink()
    (tmp_path / "aside").rename(chain / name)
    assert training.step() is None
    training.close()
    check(chain, training.saved)


def test_no_chain_where_one_is_read(tmp_path: Path) -> None:
    """Reading a chain that is not there is a NotFoundError, and makes nothing."""
    for ask in (lambda p: SnapshotChain(p, create=False), ciuic_async.load):
        with pytest.raises(NotFoundError) as caught:
            ask(tmp_path / "nothing")
        is_clear(caught.value, tmp_path / "nothing", "no chain here")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError):
        SnapshotChain(tmp_path / "empty", create=False)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_chain_deleted_under_a_running_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each snapshot fails with a clear error and training goes on; it makes no new chain behind the user's back."""
    chain = tmp_path / "chain"
    training = Training(chain)
    assert training.step() is None
    shutil.rmtree(chain)
    with caplog.at_level(logging.ERROR, "ciuic_async"):
        for _ in range(3):
            error = training.step()
            assert error is not None
            is_clear(error, chain)
            assert error.kind in ("enoent", "slots_missing", "segment_vanished"), error.kind
    assert caplog.text.count("failed") >= 3
    training.close()
    assert not chain.exists()
    fresh = Training(chain)
    assert fresh.checkpointer.restore() is None
    assert fresh.step() is None
    fresh.close()
    check(chain, fresh.saved)


def test_a_chain_that_is_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    """Renaming the chain's folder under a running training loses nothing."""
    training = Training(tmp_path / "chain")
    assert training.step() is None
    (tmp_path / "chain").rename(tmp_path / "moved")
    assert training.step() is None
    training.close()
    check(tmp_path / "moved", training.saved)
    assert not (tmp_path / "chain").exists()


def test_a_failure_nobody_waited_for_is_a_warning_or_an_error(tmp_path: Path) -> None:
    """By default the next step warns once and goes on; with ``on_error="raise"`` it raises."""
    for on_error in ("warn", "raise"):
        chain = tmp_path / on_error
        state = {"weights": torch.zeros(10)}
        checkpointer = Checkpointer(chain, state, rng=False, on_error=on_error)
        checkpointer.save().wait_durable(60)
        checkpointer._writer.wait_idle()  # it tidies up once, and must not trip over what follows
        shutil.move(chain / "tmp", tmp_path / "aside")
        make_file(chain / "tmp")
        checkpointer.save()
        if on_error == "warn":
            with pytest.warns(CiuicWarning, match="did not become durable.*file stands where a folder"):
                checkpointer.flush()
            checkpointer.step()
        else:
            with pytest.raises(SaveFailedError, match="file stands where a folder"):
                checkpointer.flush()
        (chain / "tmp").unlink()
        shutil.move(tmp_path / "aside", chain / "tmp")
        checkpointer.save().wait_durable(60)
        checkpointer.close()
        with SnapshotChain(chain, create=False) as opened:
            assert opened.verify().ok
            assert len(opened) == 2

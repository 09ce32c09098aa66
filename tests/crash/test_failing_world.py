"""The world fails for a while: full disks, limits, disks that hang, clocks that jump, others on the same chain.

After each fault ``verify`` is clean, everything reported durable is there to the bit, training is alive, and the next
save works. What a place can do wrong besides is in ``tests/hostile/test_places.py``.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ciuic_async
from ciuic_async import Checkpointer, KeepLatest, background, native
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import CiuicError, CiuicWarning, NotFoundError, SaveFailedError
from ciuic_async.format import layout
from ciuic_async.options import WRITE
from ciuic_async.stores import local
from tests.crash.crew import Crew, crew
from tests.crash.crew_lives import held
from tests.crash.faults import LONG, check, fast_folder, same, state_at

SAVES = 1000 if LONG else 300
ALL = 1_000_000
"""Retention that drops nothing."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 if LONG else 120)]


class Run:
    """A training with a snapshot at every step. ``durable`` is what was reported."""

    def __init__(self, chain: Path, **options: Any) -> None:
        self.chain = chain
        self.durable: dict[int, str] = {}
        self.state = state_at(0)
        self.checkpointer = Checkpointer(chain, self.state, every_steps=1, rng=False, **options)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.checkpointer.close()

    def step(self) -> CiuicError | None:
        """One step; why its snapshot failed, or None."""
        step = self.checkpointer._step + 1
        self.state.update(state_at(step))
        pending = self.checkpointer.step()
        assert pending is not None
        try:
            self.durable[step] = pending.wait_durable(60).id
        except SaveFailedError as error:
            return error
        finally:
            self.checkpointer._writer.wait_idle()  # it tidies up once, and must not trip over what a test does next
        return None

    def close_and_check(self) -> None:
        """The fault is gone: the next step is durable, nothing is left over, and all that was reported is there."""
        assert self.step() is None
        self.checkpointer.close()
        assert os.listdir(self.chain / "tmp") == [], "leftovers"
        with SnapshotChain(self.chain, create=False) as opened:
            assert opened.verify().notes == (), "leftovers"
        assert check(self.chain, self.durable, kept=ALL) == set(self.durable)


@contextmanager
def disk(size_bytes: int) -> Iterator[Path]:
    """A real ext4 of its own, on a loop device. Skips the test where mounting is not allowed."""
    with fast_folder() as folder:
        image, place = folder / "image", folder / "disk"
        place.mkdir()
        image.touch()
        os.truncate(image, size_bytes)
        try:
            for command in (
                ["mkfs.ext4", "-q", "-m", "0", str(image)],
                ["mount", "-o", "loop", str(image), str(place)],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk of its own: {error} {getattr(error, 'stderr', '')}")
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)  # a failed test holds it


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(folder: Path, leave_bytes: int) -> Path:
    """Take all the space of a disk, but for so much."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        size = 0
        for piece in (1 << 20, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece
        os.truncate(file.fileno(), size - leave_bytes)
    return ballast


# --- no space ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False], ids=["native", "python"])
def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """A real ext4 with room for nothing, a little, or most of a snapshot: those fail as ``enospc`` and give back what
    they took; with the space the saving comes back."""
    if not compiled:
        monkeypatch.setattr(native, "core", None)
    with disk(16 << 20) as place, Run(place / "chain") as run:
        assert run.step() is None
        for leave in (0, 32 << 10, 100 << 10):
            ballast = fill(place, leave)
            before = free_bytes(place)
            error = run.step()
            assert error is not None
            assert error.kind == "enospc"
            assert "free space or prune" in str(error)
            assert abs(free_bytes(place) - before) <= 8192, "folders grow by a block; nothing else may stay"
            ballast.unlink()
        run.close_and_check()


def test_a_writer_takes_no_more_space_than_it_needs_where_it_is_scarce() -> None:
    """Room ahead of the writes is for disks with plenty: on a small one, others find what is free while a segment is
    being written; on a full one what could not be had is given back, and the length is that of what was written."""
    if native.core is None:
        pytest.skip("the native core is not in use")
    piece = mmap.mmap(-1, 4 << 20)
    with disk(32 << 20) as place:
        before = free_bytes(place)
        descriptor = os.open(place / "file", os.O_RDWR | os.O_CREAT)
        try:
            writer = native.core.DirectWriter(descriptor, 1 << 20, 2, 0)
            writer.lend(memoryview(piece))
            writer.drain()
            assert before - free_bytes(place) <= len(piece) + 65536
            with pytest.raises(OSError, match="No space left") as caught:  # noqa: PT012 -- until it is full
                while True:
                    writer.lend(memoryview(piece))
                    writer.drain()
            assert caught.value.errno == errno.ENOSPC
            writer.abort()
            status = os.fstat(descriptor)
            assert status.st_size <= before
            assert status.st_blocks * 512 <= status.st_size + 65536
        finally:
            os.close(descriptor)


class NoSpaceOs:
    """The ``os`` module of a process that may write so many bytes more: short writes first, then an error."""

    def __init__(self, left_bytes: int, number: int) -> None:
        self.left_bytes = left_bytes
        self.number = number

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: Any) -> int:
        if not self.left_bytes:
            raise OSError(self.number, os.strerror(self.number))
        done = os.write(descriptor, memoryview(data).cast("B")[: self.left_bytes])
        self.left_bytes -= done
        return done


@pytest.mark.parametrize("left_bytes", [0, 5000, 100_000, 136_000])
def test_a_quota_that_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_bytes: int) -> None:
    """EDQUOT anywhere in a snapshot, after writes that fell short: it fails by that name, and saving comes back."""
    monkeypatch.setattr(native, "core", None)  # every write passes here
    with Run(tmp_path / "chain") as run:
        assert run.step() is None
        with monkeypatch.context() as patch:
            patch.setattr(local, "os", NoSpaceOs(left_bytes, errno.EDQUOT))
            error = run.step()
        assert error is not None
        assert error.kind == "edquot"
        assert "quota" in str(error)
        run.close_and_check()


@pytest.mark.parametrize("compiled", [True, False], ids=["native", "python"])
def test_a_file_that_may_not_be_that_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """RLIMIT_FSIZE below the segment's size: ``efbig``, by both writers."""
    if not compiled:
        monkeypatch.setattr(native, "core", None)
    with Run(tmp_path / "chain") as run:
        assert run.step() is None
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
        try:
            error = run.step()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error is not None
        assert error.kind == "efbig"
        run.close_and_check()


def test_a_disk_that_turns_read_only() -> None:
    """A remount, as the kernel does it after an error: snapshots fail, reading works, and so does the next save."""
    with disk(16 << 20) as place, Run(place / "chain") as run:
        assert run.step() is None
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        error = run.step()
        assert error is not None
        assert error.kind == "erofs"
        check(run.chain, run.durable, kept=ALL, save_again=False)
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        run.close_and_check()


# --- a disk that hangs ------------------------------------------------------------------------------------------------


@contextmanager
def hanging(place: Path) -> Iterator[Callable[[], None]]:
    """Every write to a real disk blocks in the kernel until the given function is called, or 30 s are over."""
    done = subprocess.run(["fsfreeze", "--freeze", str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no freezing here: {done.stderr}")
    once = threading.Lock()
    hangs = True

    def go_on() -> None:
        nonlocal hangs
        with once:
            if hangs:
                subprocess.run(["fsfreeze", "--unfreeze", str(place)], check=True)
            hangs = False

    guard = threading.Timer(30, go_on)  # a process that waits for a frozen disk cannot even be killed
    guard.start()
    try:
        yield go_on
    finally:
        guard.cancel()
        guard.join()
        go_on()


class Told(logging.Handler):
    """Knows when the log says a word so many times, and does something then."""

    def __init__(self, word: str, times: int, then: Callable[[], None]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.event = threading.Event()
        self._word, self._times, self._then = word, times, then

    def emit(self, record: logging.LogRecord) -> None:
        if self._word in record.getMessage():
            self.lines.append(record.getMessage())
            if len(self.lines) == self._times:
                self._then()
                self.event.set()


@contextmanager
def told(word: str, times: int = 1, then: Callable[[], None] = lambda: None) -> Iterator[Told]:
    handler = Told(word, times, then)
    logging.getLogger("ciuic_async").addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger("ciuic_async").removeHandler(handler)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late is what takes 0.1 s, and it is told every 0.2 s."""
    monkeypatch.setattr(background, "WRITE", replace(WRITE, late_s=0.1, late_factor=0.0, late_again_s=0.2))


def test_training_goes_on_beside_a_disk_that_hangs(impatient: None) -> None:
    """Snapshots are taken until the slots are used up; then one waits ``busy_timeout_s`` and is skipped, loudly. It is
    reported, and again after a while. When the disk is back everything that was taken becomes durable."""
    with disk(32 << 20) as place, Run(place / "chain", busy_timeout_s=0.3) as run:
        assert run.step() is None
        with told("is not durable", times=2) as said, hanging(place) as go_on:
            taken = []
            for step in (2, 3):
                run.state.update(state_at(step))
                pending = run.checkpointer.step()
                assert pending is not None
                assert pending.phase == "staged"
                taken.append(pending)
            with pytest.warns(CiuicWarning, match="busy_timeout_s"):
                skipped = run.checkpointer.step()
            assert skipped is not None
            assert skipped.error is not None
            assert skipped.error.kind == "busy"
            assert said.event.wait(30), "nobody was told"
            assert [pending.phase for pending in taken] == ["staged", "staged"]
            go_on()
            for step, pending in zip((2, 3), taken, strict=True):
                run.durable[step] = pending.wait_durable(60).id
        assert "of step 2 is not durable" in said.lines[0]
        assert str(run.chain) in said.lines[0]
        assert f"newest durable: step 1 (snapshot {run.durable[1]})" in said.lines[0]
        run.close_and_check()


def test_close_waits_for_a_disk_that_hangs_and_says_so(impatient: None) -> None:
    """What was taken becomes durable before ``close`` returns, however long that is; the log says what it waits for."""
    with disk(32 << 20) as place, Run(place / "chain") as run:
        assert run.step() is None
        with hanging(place) as go_on, told("is not durable", then=go_on) as said:
            run.state.update(state_at(2))
            pending = run.checkpointer.step()
            assert pending is not None
            run.checkpointer.close()
            assert said.event.is_set(), "close did not wait"
        run.durable[2] = pending.wait_durable(0).id
        check(run.chain, run.durable, kept=ALL)


def test_nothing_is_told_of_a_disk_that_is_as_slow_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What takes no more than a few times as long as the snapshot before is not late; nor is the time without any."""
    with Run(tmp_path / "chain") as run:
        assert run.step() is None
        writer = run.checkpointer._writer
        clock = [1e6]
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        job: Any = SimpleNamespace(request=SimpleNamespace(snapshot="0", step=2), submitted_s=clock[0])
        writer._usual_s = 100.0
        clock[0] += 1e6
        writer._tell_if_late()
        assert caplog.text == ""
        job.submitted_s = clock[0]
        writer._under_way = job
        for later_s, count in ((WRITE.late_s, 0), (WRITE.late_factor * 100, 1), (WRITE.late_again_s, 1), (1100, 2)):
            clock[0] = job.submitted_s + later_s
            writer._tell_if_late()
            assert caplog.text.count("is not durable") == count
        writer._under_way = None
        monkeypatch.undo()
        run.close_and_check()


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Years forward and back between saves: order, ``latest`` and ``~1`` follow the log; what is old enough for gc is
    decided by the store's clock."""
    with Run(tmp_path / "chain") as run:
        orphans = []
        for hours in (1, 48):
            orphan = run.chain / layout.segment(layout.new_id(), 0, 0)
            orphan.parent.mkdir()
            orphan.write_bytes(b"left by a crash")
            os.utime(orphan, times=(0, time.time() - hours * 3600))
            orphans.append(orphan)
        young, old = orphans
        for year in (2100, 1971, 2038, 2000):
            monkeypatch.setattr(time, "time", lambda year=year: (year - 1969.9) * 365.25 * 86400)
            assert run.step() is None
            run.checkpointer.chain.gc()
            assert young.exists()
            assert not old.exists()
        with SnapshotChain(run.chain) as opened:
            assert [snapshot.step for snapshot in opened] == [1, 2, 3, 4]
            assert [snapshot.created[:4] for snapshot in opened] == ["2100", "1971", "2038", "2000"]
            assert opened.get("latest").step == 4
            assert opened.get("latest~1").step == 3
        monkeypatch.undo()
        young.unlink()
        young.parent.rmdir()
        run.close_and_check()


# --- several at once --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Crew, Path]]:
    with fast_folder() as folder, crew(folder / "home") as opened:
        yield opened, folder


@pytest.fixture
def at(place: tuple[Crew, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Crew, Path]:
    """The crew, and a chain of the test's own, which is there."""
    opened, folder = place
    for name in ("config", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(folder / "home" / name))
    chain = folder / request.node.name
    SnapshotChain(chain).close()
    return opened, chain


def durable_of(lines: list[str]) -> dict[int, str]:
    return {int(line.split()[1]): line.split()[2] for line in lines if line.startswith("durable ")}


def test_two_trainers_and_a_reader_on_one_chain(at: tuple[Crew, Path]) -> None:
    """20 snapshots of each of two processes: every one is there, once. Who reads ``latest`` meanwhile always finds a
    whole snapshot."""
    opened, chain = at
    reader = opened.start("read", chain, pruned=False)
    trainers = [opened.start("train", chain, first=first, count=20, keep=None) for first in (1, 101)]
    durable: dict[int, str] = {}
    for trainer in trainers:
        ended = trainer.end()
        assert (ended.code, ended.stderr) == (0, "")
        durable |= durable_of(ended.lines)
    assert sorted(durable) == [*range(1, 21), *range(101, 121)]
    durable |= durable_of(opened.start("train", chain, first=1000, count=1, keep=None).end().lines)
    read = reader.end()
    assert (read.code, read.stderr) == (0, "")
    assert {line.split()[0] for line in read.lines} == {"read"}
    with SnapshotChain(chain) as history:
        assert sorted(snapshot.id for snapshot in history) == sorted(durable.values())
    check(chain, durable, kept=ALL)


def test_a_reader_that_the_first_writers_overtake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a reader's look at the log head, which is not there yet, and at the slots two snapshots come: no damage
    is reported, and the newest is read."""
    writer = SnapshotChain(tmp_path / "chain")

    class Overtaken(local.LocalStore):
        overtaken = False

        def read(self, name: str, limit_bytes: int) -> bytes:
            if name == layout.LOG_HEAD and not self.overtaken:
                self.overtaken = True
                assert self.size(name) is None
                for step in (1, 2):
                    ciuic_async.save(state_at(step), writer)
                raise NotFoundError("it was not there", where=name)
            return super().read(name, limit_bytes)

    monkeypatch.setattr("ciuic_async.chain.resolve_store", lambda url, _options: Overtaken(url))
    with writer, SnapshotChain(tmp_path / "chain", create=False) as reader:
        latest = reader.latest()
        assert latest is not None
        assert same(latest.load(), state_at(2))
        assert reader.verify().ok


def test_retention_beside_a_writer_and_a_reader(at: tuple[Crew, Path]) -> None:
    """One process prunes and sweeps for ever while another saves and a third reads: every save becomes durable, the
    newest three stay; a snapshot is read whole, or is gone: a clear error, and never wrong bytes."""
    opened, chain = at
    reader = opened.start("read", chain, pruned=True)
    sweeper = opened.start("sweep", chain)
    ended = opened.start("train", chain, first=1, count=30, keep=None).end()
    assert (ended.code, ended.stderr) == (0, "")
    durable = durable_of(ended.lines)
    assert sorted(durable) == list(range(1, 31))
    durable |= durable_of(opened.start("train", chain, first=1000, count=1, keep=None).end().lines)
    for hand in (sweeper, reader):
        ended = hand.end()
        assert (ended.code, ended.stderr) == (0, "")
    assert {line.split()[0] for line in ended.lines} <= {"read", "gone"}
    assert {line for line in ended.lines if line.startswith("gone")} <= {"gone missing", "gone no_file"}
    assert {29, 30, 1000} <= check(chain, durable, kept=3)


def test_a_chain_moved_away_while_one_trains(tmp_path: Path) -> None:
    """Reading the old name is a clear error; training goes on where the chain is now; a new one may take its place."""
    with Run(tmp_path / "chain") as run:
        assert run.step() is None
        run.chain = run.chain.rename(tmp_path / "moved")
        with pytest.raises(NotFoundError, match="no chain here"):
            SnapshotChain(tmp_path / "chain", create=False)
        with Run(tmp_path / "chain") as fresh:
            assert fresh.step() is None
            run.close_and_check()
            fresh.close_and_check()


# --- what a process holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [12, 16])
def test_few_descriptors(at: tuple[Crew, Path], limit: int) -> None:
    """``ulimit -n`` so low that there may be no descriptor left: a snapshot is durable or fails by that name, none is
    leaked, and the next one works."""
    opened, chain = at
    ended = opened.start("few_descriptors", chain, limit=limit).end()
    assert ended.code == 0, ended.stderr
    failed = [line.split()[2] for line in ended.lines if line.startswith("failed")]
    assert set(failed) <= {"emfile"}, ended.lines
    assert failed or limit > 12, "it was no limit"
    durable = durable_of(ended.lines)
    assert {1, 2, 3, 6} <= set(durable)
    _, _, first, _, _, last = ended.numbers("descriptors")
    assert last == first
    check(chain, durable, kept=ALL)


def test_who_keeps_the_log_keeps_no_staged_memory(tmp_path: Path) -> None:
    """Log records of failures, kept for ever, refer to no slot: after ``close`` its memory is the system's again."""
    before = held()["memfds"]
    records: list[logging.LogRecord] = []
    with Run(tmp_path / "chain", keep=KeepLatest(2)) as run, told("") as said:
        setattr(said, "emit", records.append)  # noqa: B010
        assert run.step() is None
        assert run.step() is None
        manifest = run.chain / "manifests" / run.durable[2] / "root.json"
        manifest.rename(tmp_path / "aside")  # nobody knows what that one needs: nothing is deleted
        assert run.step() is None
        with pytest.warns(CiuicWarning, match="tidying up failed"):
            run.checkpointer.flush()
        (tmp_path / "aside").rename(manifest)
        run.checkpointer.close()
    assert any("tidying up failed" in record.getMessage() for record in records)
    assert held()["memfds"] == before
    check(run.chain, run.durable, kept=2)


def test_many_saves_hold_no_more_than_few(at: tuple[Crew, Path]) -> None:
    """300 saves: threads, descriptors and shared memory as after 100; less than 3 % more memory."""
    opened, chain = at
    ended = opened.start("many_saves", chain, count=SAVES).end()
    assert (ended.code, ended.stderr) == (0, "")
    early, late = (json.loads(line.partition(" ")[2]) for line in ended.lines if line.startswith("held"))
    resident = early.pop("resident_bytes"), late.pop("resident_bytes")
    assert late == early
    assert resident[1] < 1.03 * resident[0]
    with SnapshotChain(chain) as history:
        assert len(history) == 2
        assert history.verify().ok

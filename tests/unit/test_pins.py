"""Pins: a log that goes back or elsewhere is found out, by writers, readers and restore; a pin never goes back."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.errors import IntegrityError, SaveFailedError, StoreError
from ciuic_async.format import merkle
from ciuic_async.transparency import note
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.pins import EVIDENCE_KEPT, Pins

ORIGIN = "ciuic.dev/chain/" + "0" * 32
KEY = SigningKey.generate()
LEAVES = [merkle.leaf_hash(bytes([number])) for number in range(40)]
OTHERS = [merkle.leaf_hash(bytes([number, 1])) for number in range(40)]


def head(size: int, leaves: list[bytes] = LEAVES, origin: str = ORIGIN) -> bytes:
    return KEY.sign(origin, note.head_text(origin, size, merkle.root(leaves[:size]))).encode()


def had(leaves: list[bytes] = LEAVES) -> Callable[[int, bytes], bool]:
    return lambda size, root: merkle.root(leaves[:size]) == root


def kind_of(call: Callable[[], object]) -> str:
    with pytest.raises(IntegrityError) as caught:
        call()
    return caught.value.kind


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    return Pins(str(tmp_path / "state" / "pins"))


def folder(pins: Pins) -> Path:
    return Path(pins.path(ORIGIN)).parent


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_pin_moves_forward_only(pins: Pins) -> None:
    """Larger heads that extend it become the pin; the same and smaller ones change nothing."""
    assert pins.read(ORIGIN) is None
    assert pins.save(ORIGIN, head(3), had())
    assert pins.save(ORIGIN, head(5), had())
    assert not pins.save(ORIGIN, head(5), had())
    assert not pins.save(ORIGIN, head(4), had())
    pin = pins.read(ORIGIN)
    assert pin is not None
    assert (pin.size, pin.root, pin.data) == (5, merkle.root(LEAVES[:5]), head(5))
    assert pin.signed_by(note.parse_vkey(KEY.vkey(ORIGIN)))
    assert not pin.signed_by(note.parse_vkey(SigningKey.generate().vkey(ORIGIN)))
    assert [path.name for path in folder(pins).iterdir()] == [os.path.basename(pins.path(ORIGIN))]
    assert stat.S_IMODE(Path(pins.path(ORIGIN)).stat().st_mode) == 0o600


def test_what_contradicts_a_pin_is_kept_as_evidence(pins: Pins) -> None:
    """A smaller log and another one have kinds of their own; the message names sizes, pin and ways out; the note that
    was found is kept, once for each, a bounded number.
    """
    pins.save(ORIGIN, head(5), had())
    pin = pins.read(ORIGIN)
    assert pin is not None
    with pytest.raises(IntegrityError) as caught:
        pins.compare(pin, 3, had(), lambda: head(3))
    message = str(caught.value)
    assert caught.value.kind == "pin_rollback"
    assert all(text in message for text in ("3 entries", "of 5", pins.path(ORIGIN), "chain repin", "chain fork"))
    assert kind_of(lambda: pins.compare(pin, 6, had(OTHERS), lambda: head(6, OTHERS))) == "pin_fork"
    assert kind_of(lambda: pins.save(ORIGIN, head(7, OTHERS), had(OTHERS))) == "pin_fork"
    assert kind_of(lambda: pins.save(ORIGIN, head(5, OTHERS), had(OTHERS))) == "pin_fork"
    assert kind_of(lambda: pins.compare(pin, 3, had(), lambda: head(3))) == "pin_rollback"
    evidence = {path.read_bytes() for path in folder(pins).glob("*.evidence")}
    assert evidence == {head(3), head(6, OTHERS), head(7, OTHERS), head(5, OTHERS)}
    for size in range(8, 40):
        assert kind_of(lambda size=size: pins.save(ORIGIN, head(size, OTHERS), had(OTHERS))) == "pin_fork"  # type: ignore[misc]
    assert len(list(folder(pins).glob("*.evidence"))) == EVIDENCE_KEPT
    found = pins.read(ORIGIN)
    assert found is not None
    assert found.data == head(5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        head(5)[:-9],
        head(5, origin="ciuic.dev/chain/" + "1" * 32),
        head(5).replace(b"\n5\n", b"\n05\n"),
        b"\xff" * 100,
        b"x" * (note.LIMIT_BYTES + 1),
    ],
    ids=range(7),
)
def test_a_pin_that_is_none_is_an_error(pins: Pins, data: bytes) -> None:
    """Somebody changed the file: it is refused by name, nothing is compared with it, and a person can replace it."""
    pins.save(ORIGIN, head(3), had())
    Path(pins.path(ORIGIN)).write_bytes(data)
    assert kind_of(lambda: pins.read(ORIGIN)) == "pin_malformed"
    assert kind_of(lambda: pins.save(ORIGIN, head(9), had())) == "pin_malformed"
    kept = pins.replace(ORIGIN, head(4))
    assert kept is not None
    assert Path(kept).read_bytes() == data
    assert pins.save(ORIGIN, head(9), had())


def test_a_folder_or_a_pipe_in_the_pins_place(pins: Pins) -> None:
    """What is no file is refused at once, without waiting for a writer."""
    folder(pins).mkdir(parents=True)
    os.mkfifo(pins.path(ORIGIN))
    assert kind_of(lambda: pins.read(ORIGIN)) == "pin_malformed"
    os.unlink(pins.path(ORIGIN))
    os.mkdir(pins.path(ORIGIN))
    assert kind_of(lambda: pins.read(ORIGIN)) == "pin_malformed"


def test_without_a_home_there_are_no_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, a file in the folder's place, a disk that refuses: nothing is pinned and nothing fails, but for the
    explicit replacement.
    """
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    assert Pins.of_user().path(ORIGIN).startswith(str(tmp_path / "h" / ".local" / "state"))
    (tmp_path / "file").write_text("")
    for pins in (Pins(None), Pins(str(tmp_path / "file" / "pins"))):
        assert not pins.save(ORIGIN, head(3), had())
        assert pins.read(ORIGIN) is None
        with pytest.raises(StoreError) as caught:
            pins.replace(ORIGIN, head(3))
        assert caught.value.kind == "pin_not_writable"


def test_a_write_that_fails_leaves_the_pin(pins: Pins, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the pin moves: the old pin stays whole, and nothing else is left."""
    pins.save(ORIGIN, head(3), had())

    def full(descriptor: int) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        assert not pins.save(ORIGIN, head(5), had())
    pin = pins.read(ORIGIN)
    assert pin is not None
    assert pin.size == 3
    assert len(list(folder(pins).iterdir())) == 1


def _race(place: str, start: int) -> None:
    """A process of its own: pins every fourth size."""
    pins = Pins(place)
    for size in range(start, 40, 4):
        pins.save(ORIGIN, head(size), had())


def test_of_processes_at_once_the_largest_head_wins(pins: Pins) -> None:
    """Four processes that pin in turns end with the largest size, and with nothing else in the folder."""
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_race, args=(str(folder(pins)), start)) for start in range(1, 5)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    pin = pins.read(ORIGIN)
    assert pin is not None
    assert pin.size == 39
    assert len(list(folder(pins).iterdir())) == 1


# --- chains -----------------------------------------------------------------------------------------------------------


def save(path: Path, value: float) -> None:
    ciuic_async.save({"w": torch.full((8,), value)}, path)


def rolled_back(tmp_path: Path) -> Path:
    """A chain of two snapshots, put back to when it had one; this user saw both."""
    path = tmp_path / "chain"
    save(path, 1.0)
    shutil.copytree(path, tmp_path / "before")
    save(path, 2.0)
    path.rename(tmp_path / "after")
    (tmp_path / "before").rename(path)
    return path


def test_writers_pin_what_they_append(tmp_path: Path) -> None:
    """After every kind of append the pin is the whole log; reading alone makes none."""
    path = tmp_path / "chain"
    pins = Pins.of_user()
    save(path, 1.0)
    with SnapshotChain(path) as chain:

        def pinned() -> int:
            pin = pins.read(chain.origin)
            return 0 if pin is None else pin.size

        assert pinned() == len(chain.log()) == 2
        chain.tag("a", "latest")
        assert pinned() == 3
        chain.note("text")
        assert pinned() == 4
        chain.tag("a", "latest")
        assert pinned() == 4
        shutil.rmtree(os.path.dirname(pins.path(chain.origin)))
        assert len(list(chain)) == 1
        assert pinned() == 0


@pytest.mark.damages
def test_a_log_that_was_rolled_back_is_refused(tmp_path: Path) -> None:
    """Nobody reads, restores from or adds to it; nothing falls back over it, and the chain stays as it is."""
    path = rolled_back(tmp_path)
    before = sorted(str(item) for item in path.rglob("*"))
    calls: list[Callable[[], object]] = [
        lambda: list(SnapshotChain(path)),
        lambda: SnapshotChain(path).latest(),
        lambda: SnapshotChain(path).get("latest"),
        lambda: SnapshotChain(path).log(),
        lambda: SnapshotChain(path).tag("x", "latest"),
        lambda: SnapshotChain(path).rollback("latest"),
        lambda: ciuic_async.load(path),
        lambda: save(path, 3.0),
        lambda: Checkpointer(path, {"w": torch.zeros(8)}),
    ]
    assert [kind_of(call) for call in calls] == ["pin_rollback"] * len(calls)
    assert sorted(str(item) for item in path.rglob("*")) == before


@pytest.mark.damages
def test_a_restore_does_not_fall_back_over_a_pin(tmp_path: Path) -> None:
    """A pin that comes while the training runs, of another process, is met by ``restore("latest")`` as an error."""
    path = tmp_path / "chain"
    save(path, 1.0)
    with Checkpointer(path, {"w": torch.zeros(8)}, rng=False) as ckpt:
        pins = Pins.of_user()
        origin = SnapshotChain(path).origin
        pins.replace(origin, head(9, OTHERS, origin))
        ckpt._chain._knows_pin = False
        assert kind_of(lambda: ckpt.restore()) == "pin_rollback"
        with pytest.raises(SaveFailedError) as caught:
            ckpt.save().wait_durable(30)
        assert "pin is of 9" in str(caught.value)


@pytest.mark.damages
def test_two_copies_that_both_go_on_are_a_fork(tmp_path: Path) -> None:
    """The second copy that is written to contradicts the pin of the first: it is refused before its slot is claimed."""
    path, copy = tmp_path / "chain", tmp_path / "copy"
    save(path, 1.0)
    shutil.copytree(path, copy)
    with SnapshotChain(copy) as chain:
        chain.note("opened before the other goes on")
        slots = len(list((copy / "log" / "commit").iterdir()))
        assert kind_of(lambda: save(path, 2.0)) == "pin_rollback"
        Pins.of_user().replace(chain.origin, head(9, OTHERS, chain.origin))
        assert kind_of(lambda: chain.note("refused")) == "pin_rollback"
        assert len(list((copy / "log" / "commit").iterdir())) == slots


def test_a_pin_that_cannot_move_fails_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with it after the claim: the snapshot is durable and reported so."""

    def fails(self: Pins, *_: object) -> bool:
        raise RuntimeError("the home is gone")

    monkeypatch.setattr(Pins, "save", fails)
    save(tmp_path / "chain", 1.0)
    with SnapshotChain(tmp_path / "chain") as chain:
        assert len(chain) == 1


def test_a_pin_that_another_moves_meanwhile_is_no_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at the log and at the pin another process appends and pins: readers, writers and verify look
    again, and find nothing wrong.
    """
    path = tmp_path / "chain"
    save(path, 1.0)
    other = SnapshotChain(path)
    read = Pins.read
    before: list[bool] = []

    def overtaken(self: Pins, origin: str) -> object:
        if before:
            before.clear()
            other.note("meanwhile")
        return read(self, origin)

    monkeypatch.setattr(Pins, "read", overtaken)
    with other:
        calls: list[Callable[[SnapshotChain], object]] = [
            lambda chain: chain.latest(),
            lambda chain: chain.note("second"),
            lambda chain: chain.verify().ok or pytest.fail("verify found a problem"),
        ]
        for call in calls:
            with SnapshotChain(path) as chain:
                chain._knows_pin = call is calls[1]  # the writer first looks when it has the lock
                before.append(True)
                call(chain)
                assert not before
        with SnapshotChain(path) as chain:
            texts = [entry["text"] for entry in chain.log() if "text" in entry]
        assert texts.count("meanwhile") == 3
        assert texts.count("second") == 1


def test_training_pins_after_it_said_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that hangs delays no snapshot: it is durable while its pin is still being written."""
    hangs, pinning = threading.Event(), threading.Event()
    written = Pins.save

    def slow(self: Pins, origin: str, data: bytes, extends: Callable[[int, bytes], bool]) -> bool:
        pinning.set()
        assert hangs.wait(30)
        return written(self, origin, data, extends)

    monkeypatch.setattr(Pins, "save", slow)
    with Checkpointer(tmp_path / "chain", {"w": torch.zeros(8)}, rng=False) as ckpt:
        assert ckpt.save().wait_durable(30).index == 1
        assert pinning.wait(30)
        hangs.set()
        origin = ckpt._chain.origin
    pin = Pins.of_user().read(origin)
    assert pin is not None
    assert pin.size == 2


def test_looking_for_a_pin_keeps_nothing_alive(tmp_path: Path) -> None:
    """Whether there is one or not: who looked is freed with its last reference, not by garbage collection."""

    class Caller:
        pass

    def look(pins: Pins) -> weakref.ref[Caller]:
        caller = Caller()
        pins.read(ORIGIN)
        return weakref.ref(caller)

    pins = Pins(str(tmp_path / "pins"))
    gc.collect()
    gc.disable()
    try:
        assert look(pins)() is None
        pins.save(ORIGIN, head(3), had())
        assert look(pins)() is None
    finally:
        gc.enable()


def test_a_pin_that_may_not_be_read_is_an_error_and_a_closed_home_is_none() -> None:
    """Whose pin was made unreadable is told so, and not that there is none; a folder that cannot be entered, as that of
    somebody else in a container, holds none that anybody could know of."""
    folder = Path(tempfile.mkdtemp(prefix="ciuic-pins-"))
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        pins = Pins(str(folder / "pins"))
        path = Path(pins.path("ciuic.dev/chain/x"))
        path.parent.mkdir()
        path.write_bytes(b"a pin")
        path.chmod(0)
        with pytest.raises(IntegrityError, match="cannot be read") as caught:
            pins.read("ciuic.dev/chain/x")
        assert caught.value.kind == "pin_malformed"
        path.parent.chmod(0)
        assert pins.read("ciuic.dev/chain/x") is None
        path.parent.chmod(0o700)
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(folder)

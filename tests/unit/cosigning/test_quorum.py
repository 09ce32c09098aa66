"""Collecting cosignatures: when there are enough, and that training never waits for it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ciuic_async.cli.serving import Reply
from ciuic_async.format import layout
from ciuic_async.transparency import note
from ciuic_async.transparency.cosigning import Cosigner, Pace
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.witness import request_body
from tests.witnesses import (
    WAIT_S,
    Place,
    Process,
    signers,
)


def test_two_of_three_are_enough_and_one_is_not(place: Place, cosigner: Callable, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """Real processes, killed one after the other: a quorum of two is met with one dead, not with two; commits go on
    all the time; when one is back, under its old state, the quorum is met again."""
    vkey = place.key.vkey(place.origin)
    running = [Process(tmp_path / f"w{number}", f"example.org/w{number}", vkey) for number in range(3)]
    addresses = [item.address for item in running]
    try:
        item = cosigner(addresses, 2)
        assert item.wait(place.add(), WAIT_S)
        running[0].kill()
        met = place.add()
        assert item.wait(met, WAIT_S)
        running[1].kill()
        missed = place.add()
        item.notice()
        assert item.settle(WAIT_S)
        assert item.witnessed_size == met
        assert place.size(place.witnessed()) == met
        assert place.size(place.head()) == missed
        assert item.settle(WAIT_S)
        assert [status.error is None for status in item.status()] == [False, False, True]
        item.close()
        running[1] = Process(tmp_path / "w1", "example.org/w1", vkey)
        addresses[1] = running[1].address
        item = cosigner(addresses, 2)
        assert item.wait(missed, WAIT_S)
        assert signers(place.witnessed(), addresses) == 2
    finally:
        for process in running:
            process.kill()


def test_nothing_waits_for_a_witness_that_hangs(
    place: Place, witness: Callable, cosigner: Callable, liar: Callable
) -> None:  # type: ignore[type-arg]
    """While one witness holds its answer back, commits and notices go on, and the others' quorum is met for head after
    head; closing cuts it off."""
    let_go, asked = threading.Event(), threading.Event()

    def hold(body: bytes) -> Reply:
        asked.set()
        let_go.wait(WAIT_S)
        return Reply(500)

    held, server = liar(hold)
    good = [witness()[0] for _ in range(2)]
    item = cosigner([held, *good], 2)
    item.notice()
    assert asked.wait(WAIT_S)
    for _ in range(4):
        assert item.wait(place.add(), WAIT_S)
    assert server.asked == 1
    assert signers(place.witnessed(), good) == 2
    item.close(0.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-witness")]
    assert not let_go.is_set()
    let_go.set()


def test_heads_that_come_faster_than_witnesses_sign(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """Both of two must sign, each takes its time, and commits never stop: head after head gets both signatures."""
    addresses, servers = zip(*(witness() for _ in range(2)), strict=True)
    more = threading.Semaphore(0)

    def late(answer: Callable[[bytes], object], commits: int, body: bytes) -> object:
        for _ in range(commits):  # so many commits later
            more.acquire(timeout=WAIT_S)
        return answer(body)

    for server, commits in zip(servers, (1, 3), strict=True):
        server.witness.add_checkpoint = partial(late, server.witness.add_checkpoint, commits)
    item = cosigner(list(addresses), 2)
    met: set[int] = set()
    for _ in range(500):
        place.add()
        item.notice()
        more.release()
        met.add(item.witnessed_size)
        if len(met) > 4:
            break
    assert len(met) > 4
    for _ in range(20):
        more.release()


PROGRAM = """
import sys
from ciuic_async.chain import SnapshotChain
from ciuic_async.transparency import note
from ciuic_async.transparency.cosigning import Cosigner
from ciuic_async.transparency.log import Log

folder, name, vkey, url = sys.argv[1:]
with SnapshotChain(folder) as chain:
    item = Cosigner(
        chain.store, Log(chain.store, chain.origin), [(name, note.parse_vkey(vkey), url)], lambda signers: bool(signers)
    )
    while True:
        chain.note("x")
        item.notice()
        print(chain.log_size, item.witnessed_size, flush=True)
"""


def test_a_killed_writer_leaves_nothing_that_hinders(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """SIGKILL while cosignatures come in, several times: what is there verifies, log/witnessed is what was told of at
    least, and the next process goes on."""
    (name, vkey, url), _ = witness()
    for lines in (5, 12, 30):
        command = [sys.executable, "-c", PROGRAM, str(place.folder), name, str(vkey), url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = [0, 0]
            for _ in range(lines):
                told = [int(word) for word in process.stdout.readline().split()]
            process.kill()
            process.wait(30)
        log = place.log()
        assert len(log) >= told[0]
        if told[1]:
            assert told[1] <= place.size(place.witnessed()) <= len(log)
            assert signers(place.witnessed(), [(name, vkey, url)]) == 1
        assert place.chain.verify().ok
    item = cosigner([(name, vkey, url)], 1, roll_forward=lambda log: log.roll_forward(place.key))
    assert item.wait(len(place.log()), WAIT_S)


DIES = """
import os, signal, sys
from ciuic_async.chain import SnapshotChain
from ciuic_async.stores.local import LocalStore

with SnapshotChain(sys.argv[1]) as chain:
    LocalStore.overwrite = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    chain.note("in its slot, and under no signed head")
"""


def add_and_die(place: Place) -> int:
    """An entry by a writer who is killed between its slot and the log head; the log's size after it."""
    signed = place.size(place.head())
    done = subprocess.run([sys.executable, "-c", DIES, str(place.folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert place.size(place.head()) == signed < len(place.log())
    return len(place.log())


def test_entries_of_a_writer_who_died_before_the_log_head_are_cosigned(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
) -> None:
    """Nobody will sign their head but somebody with a key: who waits for witnesses does so, and gets a quorum."""
    address, _ = witness()
    size = add_and_die(place)
    item = cosigner([address], 1, roll_forward=lambda log: log.roll_forward(place.key))
    assert item.wait(size, WAIT_S)
    assert place.size(place.head()) == place.size(place.witnessed()) == size


def test_a_key_that_the_log_does_not_know_signs_no_head_of_others(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a key of the log it is said what is missing; the head is found without being told once it is there."""
    address, _ = witness()
    size = add_and_die(place)
    tried = threading.Semaphore(0)
    stranger = SigningKey.generate()

    def roll_forward(log: Log) -> None:
        log.roll_forward(stranger)
        tried.release()

    item = cosigner([address], 1, roll_forward=roll_forward)
    item.notice()
    for _ in range(4):
        assert tried.acquire(timeout=WAIT_S)
    assert place.size(place.head()) == item.witnessed_size == size - 1
    assert f"the log has {size} entries and a signed head of {size - 1}" in caplog.text
    place.log().roll_forward(place.key)
    assert reaches(item, size)


def reaches(item: Cosigner, size: int) -> bool:
    """As ``wait``, without saying that there may be a new head."""
    with item._changed:
        return item._changed.wait_for(lambda: item._witnessed_size >= size, WAIT_S)


def test_what_another_process_wrote_down_counts(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """A quorum that another process collected, for this head or a later one, is one for who waits here too."""
    address, server = witness()
    first, second = cosigner([address], 1), cosigner([address], 1)
    assert first.wait(len(place.log()), WAIT_S)
    size = place.add()
    assert second.wait(size, WAIT_S)
    assert second.settle(WAIT_S)
    asked = server.asked
    assert first.wait(size, WAIT_S)
    assert server.asked == asked


def test_a_witness_that_others_keep_busy_is_asked_again_at_once(
    place: Place, witness: Callable, cosigner: Callable
) -> None:  # type: ignore[type-arg]
    """It signed for other writers while it was asked, twice: that is no failure, after which one would wait."""
    address, server = witness()
    heads = []
    for _ in range(3):
        heads.append((place.size(place.head()), place.store.read(layout.LOG_HEAD, note.LIMIT_BYTES)))
        place.add()
    answer, log = server.witness.add_checkpoint, place.log()
    sizes = iter([(0, heads[0]), *((heads[n][0], heads[n + 1]) for n in range(2))])

    def overtaken(body: bytes) -> object:
        old, (size, head) = next(sizes, (0, (0, b"")))
        if size:
            assert answer(request_body(old, log.consistency(old, size), head)).status == 200
        return answer(body)

    server.witness.add_checkpoint = overtaken
    item = cosigner([address], 1, pace=Pace(retry_s=3600.0, retry_max_s=3600.0))
    assert item.wait(len(log), WAIT_S)
    assert item.settle(WAIT_S)
    assert server.asked == 4
    assert item.status()[0].error is None


def test_a_witness_that_is_ahead_is_left_alone(
    place: Place, witness: Callable, cosigner: Callable, liar: Callable
) -> None:  # type: ignore[type-arg]
    """While one witness hangs, another that has signed a later head for another writer is not asked in a loop for the
    earlier one, which it can never sign."""
    too_often, hangs = threading.Event(), threading.Event()

    def hang(body: bytes) -> Reply:
        hangs.set()
        too_often.wait(1.0)
        return Reply(500)

    held, _ = liar(hang)
    address, server = witness()
    answer = server.witness.add_checkpoint
    sizes: list[int] = []

    def overtaken(body: bytes) -> object:
        assert hangs.wait(WAIT_S)
        if not sizes:
            sizes.append(place.add())
            assert answer(request_body(0, [], place.store.read(layout.LOG_HEAD, note.LIMIT_BYTES))).status == 200
        if server.asked > 8:
            too_often.set()
        return answer(body)

    server.witness.add_checkpoint = overtaken
    item = cosigner([held, address], 2, pace=Pace(retry_s=3600.0, retry_max_s=3600.0))
    item.notice()
    assert item.settle(WAIT_S)
    assert not too_often.is_set()
    assert [status.size for status in item.status()] == [None, sizes[0]]


def test_other_writers_of_the_log_may_be_ahead(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A witness that has signed a newer head for another process is no failure: the newer head is there to be read."""
    address, server = witness()
    item = cosigner([address], 1)
    answer = server.witness.add_checkpoint
    sizes: list[int] = []

    def overtaken(body: bytes) -> object:
        if not sizes:
            sizes.append(place.add())
            assert answer(request_body(0, [], place.store.read(layout.LOG_HEAD, note.LIMIT_BYTES))).status == 200
        return answer(body)

    server.witness.add_checkpoint = overtaken
    item.notice()
    assert item.wait(len(place.log()) + 1, WAIT_S)
    assert item.settle(WAIT_S)
    assert item.status()[0].error is None
    assert "ahead" not in caplog.text
    assert place.size(place.witnessed()) == sizes[0]

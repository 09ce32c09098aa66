"""Collecting cosignatures: what is kept, that training never waits for it, and that no witness can do harm."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import ciuic_async
from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.chain_witness import WitnessServer
from ciuic_async.cli.serving import BoundedServer, Handler, Reply
from ciuic_async.errors import IntegrityError, NotFoundError, SaveFailedError, StoreError, UsageError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.format.entry import SnapshotEntry
from ciuic_async.retention.policy import KeepLatest
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import note, proof, witnessing
from ciuic_async.transparency.asking import ANSWER_LIMIT_BYTES, WitnessConnection
from ciuic_async.transparency.cosigning import Cosigner, Pace
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Vkey
from ciuic_async.transparency.policy import Group, Policy
from ciuic_async.transparency.policy import Witness as PolicyWitness
from ciuic_async.transparency.receipt import Receipt
from ciuic_async.transparency.witness import Witness, request_body
from ciuic_async.transparency.witnessing import Trust

QUICK = Pace(request_s=20.0, retry_s=0.01, retry_max_s=0.05)
WAIT_S = 60.0

Address = tuple[str, Vkey, str]


def at_least(count: int) -> Callable[[set[Vkey]], bool]:
    return lambda signers: len(signers) >= count


class CountingServer(WitnessServer):
    """A real witness; ``asked`` counts connections."""

    def __init__(self, witness: Witness) -> None:
        super().__init__(("127.0.0.1", 0), witness)
        self.asked = 0

    def process_request(self, request: object, client_address: object) -> None:
        self.asked += 1
        super().process_request(request, client_address)


class Liar(BoundedServer):
    """Answers whatever ``say`` gives for a request's body; ``asked`` counts."""

    def __init__(self, say: Callable[[bytes], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _LiarHandler)
        self.say = say
        self.asked = 0


class _LiarHandler(Handler):
    methods: ClassVar[tuple[str, ...]] = ("GET", "HEAD", "POST")
    server: Liar

    def reply(self) -> Reply:
        self.server.asked += 1
        body = self.read_body(1 << 20) if self.command == "POST" else b""
        return body if isinstance(body, Reply) else self.server.say(body)


@dataclass
class Place:
    """A chain with entries, and its witnesses."""

    folder: Path
    chain: SnapshotChain
    key: SigningKey

    @property
    def store(self) -> Store:
        return self.chain.store

    @property
    def origin(self) -> str:
        return self.chain.origin

    def add(self, text: str = "more") -> int:
        """One entry; the log's size after it."""
        self.chain.note(text)
        return self.chain.log_size

    def save(self) -> str:
        """One snapshot; its id."""
        return ciuic_async.save({"weight": torch.arange(4.0)}, str(self.folder)).id

    def head(self) -> note.Note:
        return note.parse(self.store.read(layout.LOG_HEAD, note.LIMIT_BYTES), "head")

    def witnessed(self) -> note.Note:
        return note.parse(self.store.read(layout.WITNESSED, note.LIMIT_BYTES), "witnessed")

    def size(self, found: note.Note) -> int:
        return note.parse_head(found.text, self.origin, "head")[0]

    def log(self) -> Log:
        log = Log(self.store, self.origin)
        log.refresh()
        return log


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "chain"
    key = SigningKey.generate()
    monkeypatch.setenv("CIUIC_KEY", key.secret())
    with SnapshotChain(folder) as chain:
        chain.note("first")
        yield Place(folder, chain, key)


@pytest.fixture
def witness(place: Place, tmp_path: Path) -> Iterator[Callable[..., tuple[Address, CountingServer]]]:
    """Makes running witnesses that know the chain's key."""
    running: list[CountingServer] = []

    def make(
        name: str = "", state: Path | None = None, key: SigningKey | None = None, tls: ssl.SSLContext | None = None
    ) -> tuple[Address, CountingServer]:
        name = name or f"example.org/w{len(running)}"
        logs = [note.parse_vkey(vkey) for vkey in [*place.chain.keys(), place.key.vkey(place.origin)]]
        state = state or tmp_path / f"state{len(running)}"
        server = CountingServer(Witness(state, key or SigningKey.generate(), name, logs))
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.start()
        running.append(server)
        return (name, server.witness.vkey, server.url), server

    yield make
    for server in running:
        stop(server)


def stop(server: CountingServer) -> None:
    server.close()
    server.witness.close()


@pytest.fixture
def cosigner(place: Place) -> Iterator[Callable[..., Cosigner]]:
    """Makes cosigners, and ends them."""
    made: list[Cosigner] = []

    def make(addresses: list[Address], quorum: int, **options: object) -> Cosigner:
        options.setdefault("pace", QUICK)
        log = Log(place.store, place.origin)
        made.append(Cosigner(place.store, log, addresses, at_least(quorum), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for item in made:
        item.close(0.0)


@pytest.fixture
def liar() -> Iterator[Callable[[Callable[[bytes], Reply]], tuple[Address, Liar]]]:
    """Makes servers that answer as told, under the name and a key of a witness."""
    running: list[Liar] = []

    def make(say: Callable[[bytes], Reply]) -> tuple[Address, Liar]:
        server = Liar(say)
        server.start()
        running.append(server)
        vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/liar"))
        return ("example.org/liar", vkey, server.url), server

    yield make
    for server in running:
        server.close()


def signers(found: note.Note, addresses: list[Address]) -> int:
    """How many of these witnesses signed; fails when one of their signatures does not hold."""
    known = {(vkey.name, vkey.key_id): vkey for _, vkey, _ in addresses}
    lines = [line for line in found.signatures if (line.name, line.key_id) in known]
    assert all(known[line.name, line.key_id].verifies(found.text, line.signature) for line in lines)
    return len(lines)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_cosignatures_and_receipts_are_kept(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """Head and log/witnessed carry the signatures of all witnesses under the log's own; each snapshot gets a receipt
    that proves its entry under a signed head. Other writers' heads are witnessed just so."""
    addresses = [witness()[0] for _ in range(3)]
    item = cosigner(addresses, 2)
    ids = [place.save(), place.save()]
    log = place.log()
    assert item.wait(len(log), WAIT_S)
    assert item.settle(WAIT_S)
    for found in (place.head(), place.witnessed()):
        assert place.size(found) == len(log)
        assert found.signatures[0].name == place.origin
        assert signers(found, addresses) == 3
    entries = {e.snapshot: index for index, e in log.entries() if isinstance(e, SnapshotEntry)}
    for snapshot in ids:
        data = place.store.read(layout.receipt(snapshot), note.LIMIT_BYTES)
        top, _, signed = data.partition(b"\n\n")
        header, extra, index, *hashes = top.decode().split("\n")
        assert (header, index) == ("c2sp.org/tlog-proof@v1", f"index {entries[snapshot]}")
        assert base64.b64decode(extra.removeprefix("extra ")) == log.entry_bytes(entries[snapshot])
        parsed = note.parse(signed, "receipt")
        size, root = note.parse_head(parsed.text, place.origin, "receipt")
        path = [base64.b64decode(line) for line in hashes]
        proof.check_inclusion(entries[snapshot], size, log.leaf_hash(entries[snapshot]), path, root)
        assert signers(parsed, addresses) >= 2
    statuses = item.status()
    assert [(s.size, s.error, s.forked) for s in statuses] == [(len(log), None, False)] * 3
    assert item.witnessed_size == len(log)


def test_the_bytes_of_a_receipt() -> None:
    """Header, index, hashes one a line, an empty line, the note; also where there is no hash."""
    assert Receipt(7, (bytes(32),), b"note\n").encode() == (
        b"c2sp.org/tlog-proof@v1\nindex 7\n" + b"A" * 43 + b"=\n\nnote\n"
    )
    assert Receipt(0, (), b"note\n").encode() == b"c2sp.org/tlog-proof@v1\nindex 0\n\nnote\n"


def test_nothing_starts_before_the_first_notice(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """No thread and no request until then; closing before or twice is fine; after it nothing starts any more."""
    address, server = witness()
    item = cosigner([address], 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ciuic-witness")]
    item.close()
    item.notice()
    assert not item.wait(1, 0.0)
    item.close()
    assert server.asked == 0


def test_a_later_process_goes_on_where_the_first_stopped(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """It knows from log/witnessed what each witness signed last, asks nobody again for the same head, and makes up for
    receipts that were not written; those of pruned snapshots are not."""
    addresses, servers = zip(*(witness() for _ in range(2)), strict=True)
    gone = place.save()
    place.save()
    first = cosigner(list(addresses), 2)
    assert first.wait(len(place.log()), WAIT_S)
    first.close()
    asked = [server.asked for server in servers]
    second = cosigner(list(addresses), 2)
    assert second.wait(len(place.log()), WAIT_S)
    assert second.settle(WAIT_S)
    assert [server.asked for server in servers] == asked
    second.close()
    kept = place.save()
    place.chain.prune(KeepLatest(1))
    for snapshot in (gone, kept):
        place.store.delete(layout.receipt(snapshot))
    third = cosigner(list(addresses), 2)
    assert third.wait(len(place.log()), WAIT_S)
    assert third.settle(WAIT_S)
    assert [server.asked for server in servers] == [count + 1 for count in asked]  # no 409 in between
    assert place.store.size(layout.receipt(kept)) is not None
    assert place.store.size(layout.receipt(gone)) is None


def test_a_restarted_witness_goes_on(place: Place, witness: Callable, cosigner: Callable, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """Its state is kept; a client that knows nothing is told the size and asks once more."""
    key = SigningKey.generate()
    address, server = witness("example.org/w", tmp_path / "kept", key)
    item = cosigner([address], 1)
    assert item.wait(place.add(), WAIT_S)
    item.close()
    stop(server)
    place.store.delete(layout.WITNESSED)
    address, server = witness("example.org/w", tmp_path / "kept", key)
    size = place.add()
    other = cosigner([address], 1)
    assert other.wait(size, WAIT_S)
    assert other.settle(WAIT_S)
    assert server.asked == 2
    assert place.size(place.witnessed()) == size


def test_a_cosignature_for_a_head_that_is_past_is_still_kept(
    place: Place, witness: Callable, cosigner: Callable
) -> None:  # type: ignore[type-arg]
    """A commit while the witness is asked: the head stays the newer one, without the signature that is not its own,
    log/witnessed gets the older one, and then the newer."""
    address, server = witness()
    item = cosigner([address], 1)
    answer = server.witness.add_checkpoint
    sizes = [len(place.log())]
    seen: list[tuple[int, int]] = []

    def slow(body: bytes) -> object:
        if len(sizes) == 1:
            sizes.append(place.add())
        else:
            item.wait(sizes[0], WAIT_S)
            seen.append((place.size(place.witnessed()), signers(place.head(), [address])))
        return answer(body)

    server.witness.add_checkpoint = slow
    item.notice()
    assert item.wait(sizes[0], WAIT_S)
    assert item.wait(sizes[-1], WAIT_S)
    assert seen == [(sizes[0], 0)]
    assert place.size(place.head()) == place.size(place.witnessed()) == sizes[1]
    assert signers(place.head(), [address]) == 1


def test_two_processes_with_different_witnesses_do_not_undo_each_other(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
) -> None:
    """Each adds its own to the head and leaves the other's there."""
    addresses = [witness()[0] for _ in range(2)]
    size = len(place.log())
    for address in addresses:
        item = cosigner([address], 1)
        assert item.wait(size, WAIT_S)
        assert item.settle(WAIT_S)
    assert signers(place.head(), addresses) == 2


def test_cosignatures_of_an_idle_chain_are_renewed(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """With ``refresh_s`` the witness is asked again for the same head once its signature is that old."""
    address, server = witness()
    now = [2_000_000_000]
    server.witness._clock = lambda: now[0]
    pace = Pace(retry_s=0.01, refresh_s=0.2)
    item = cosigner([address], 1, clock=lambda: now[0], pace=pace)
    assert item.wait(len(place.log()), WAIT_S)
    assert item.settle(WAIT_S)
    now[0] += 3600
    renewed = threading.Event()
    answer = server.witness.add_checkpoint
    server.witness.add_checkpoint = lambda body: (answer(body), renewed.set())[0]
    assert renewed.wait(WAIT_S)
    item.close()
    for found in (place.head(), place.witnessed()):
        assert len(found.signatures) == 2
        assert note.cosigned_at(found.signatures[1].signature) == 2_000_003_600


# --- quorum -----------------------------------------------------------------------------------------------------------


class Process:
    """A witness in a process of its own, by the command line."""

    def __init__(self, state: Path, name: str, vkey: str) -> None:
        command = [sys.executable, "-m", "ciuic_async.cli.main", "chain", "witness", "--state", str(state)]
        self.process = subprocess.Popen(
            [*command, "--name", name, "--log", vkey], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        facts = dict(self.process.stdout.readline().strip().split(" ", 1) for _ in range(2))
        self.address: Address = (name, note.parse_vkey(facts["vkey"]), facts["url"])

    def kill(self) -> None:
        self.process.kill()
        with self.process:
            self.process.wait(30)


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
    item = cosigner([(name, vkey, url)], 1)
    assert item.wait(len(place.log()), WAIT_S)


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


# --- what witnesses may do to us --------------------------------------------------------------------------------------


def test_a_fork_is_final_and_kept(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A witness that cosigned another history of this very log refuses ours: an error is logged, both heads are kept
    on our side and on its, and it is not asked again. The others go on."""
    forked, server = witness()
    good, _ = witness()
    size = len(place.log())
    other = place.key.sign(place.origin, note.head_text(place.origin, size, bytes(32))).encode()
    assert server.witness.add_checkpoint(request_body(0, [], other)).status == 200
    item = cosigner([forked, good], 1, evidence=tmp_path / "evidence")
    with caplog.at_level(logging.ERROR, "ciuic_async"):
        assert item.wait(size, WAIT_S)
        assert item.settle(WAIT_S)
    assert "FORK" in caplog.text
    assert [status.forked for status in item.status()] == [True, False]
    kept = json.loads(next((tmp_path / "evidence").iterdir()).read_bytes())
    assert kept["refused"] == note.format_note(place.head().text, place.head().signatures[:1])
    assert kept["cosigned"].startswith(other.decode())
    assert next((server.witness._folder / "evidence").iterdir()).name.endswith(".0")
    asked = server.asked
    assert item.wait(place.add(), WAIT_S)
    assert item.settle(WAIT_S)
    assert server.asked == asked


def test_409_that_names_the_very_size_is_a_fork(place: Place, cosigner: Callable, liar: Callable) -> None:  # type: ignore[type-arg]
    """So said version 1.0.0 of the specification for another root of the same size: final, not retried."""
    address, server = liar(lambda body: Reply(409, body.partition(b"\n")[0].removeprefix(b"old ") + b"\n"))
    item = cosigner([address], 1)
    item.notice()
    assert item.settle(WAIT_S)
    assert item.status()[0].forked
    place.add()
    item.notice()
    assert item.settle(WAIT_S)
    assert server.asked == 1


def lines_by(key: SigningKey, name: str, body: bytes, text: str | None = None) -> bytes:
    """A cosignature line by ``name`` under the head in a request, or under ``text``."""
    own = note.parse(body.partition(b"\n\n")[2], "request").text
    line = key.cosign(name, own if text is None else text, 2_000_000_000)
    return note.format_note("", (line,))[1:].encode()


def test_lying_witnesses_do_no_harm(place: Place, witness: Callable, cosigner: Callable, liar: Callable) -> None:  # type: ignore[type-arg]
    """Whatever the one answers, the other's signature is kept, nothing else is, and the liar is named in the status."""
    stranger = SigningKey.generate()
    elsewhere, target = liar(lambda body: Reply(200, b""))
    answers: dict[str, Callable[[bytes], Reply]] = {
        "nothing": lambda body: Reply(200, b""),
        "a stranger's line": lambda body: Reply(200, lines_by(stranger, "example.org/stranger", body)),
        "a line under its name by another key": lambda body: Reply(200, forged(body)),
        "no line": lambda body: Reply(200, b"hello\n"),
        "a whole note": lambda body: Reply(200, b"x\n\n" + lines_by(stranger, "example.org/liar", body)),
        "no text": lambda body: Reply(200, bytes(range(256))),
        "many lines": lambda body: Reply(200, 100 * lines_by(stranger, "example.org/stranger", body)),
        "too much": lambda body: Reply(200, bytes(ANSWER_LIMIT_BYTES + 1)),
        "elsewhere": lambda body: Reply(307, b"", headers={"Location": elsewhere[2] + "/add-checkpoint"}),
        "an error": lambda body: Reply(503, b"\x1b[2J come later\n"),
        "sizes that never fit": lambda body: Reply(409, b"0\n" if body.startswith(b"old 1\n") else b"1\n"),
        "a larger size": lambda body: Reply(409, b"9000\n"),
        "a size that is none": lambda body: Reply(409, b"9" * 100),
        "forbidden": lambda body: Reply(403, b"no\n"),
    }

    def forged(body: bytes) -> bytes:
        vkey = bad[1]
        line = stranger.cosign(vkey.name, "other\n0\nAAAA\n", 2_000_000_000)
        return note.format_note("", (note.Signature(vkey.name, vkey.key_id, line.signature),))[1:].encode()

    good, _ = witness()
    for what, say in answers.items():
        bad, server = liar(say)
        item = cosigner([bad, good], 1)
        assert item.wait(place.add(), WAIT_S), what
        assert item.settle(WAIT_S)
        status = item.status()[0]
        assert status.error, what
        assert status.error.isprintable(), what
        assert not status.forked, what
        assert server.asked, what
        item.close()
        assert [line.name for line in place.head().signatures] == [place.origin, good[0]], what
    assert target.asked == 0


def test_lines_of_others_beside_the_right_one_are_ignored(place: Place, cosigner: Callable, liar: Callable) -> None:  # type: ignore[type-arg]
    """A witness may answer with more lines than its own."""
    key, stranger = SigningKey.generate(), SigningKey.generate()
    (name, _, url), _ = liar(
        lambda body: Reply(200, lines_by(stranger, "example.org/else", body) + lines_by(key, "example.org/liar", body))
    )
    item = cosigner([(name, note.parse_vkey(key.cosigner(name)), url)], 1)
    assert item.wait(len(place.log()), WAIT_S)
    assert [line.name for line in place.head().signatures] == [place.origin, name]


def test_an_answer_that_drips_is_cut_off(place: Place, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """A byte now and then keeps a socket alive for ever, but not the request: it ends at its deadline."""
    listener = socket.create_server(("127.0.0.1", 0))
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/drip"))
    gone, over = threading.Event(), threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            try:
                while not over.wait(0.02):
                    connection.sendall(b"x")
            except OSError:
                gone.set()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    item = cosigner([("example.org/drip", vkey, url)], 1, pace=Pace(request_s=0.3, retry_s=60.0))
    item.notice()
    assert item.settle(WAIT_S)
    assert "no whole answer within 0.3 s" in str(item.status()[0].error)
    assert gone.wait(WAIT_S)
    over.set()
    thread.join(WAIT_S)
    listener.close()


def certificate(folder: Path) -> Path:
    """A key and its own certificate for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "witness")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "witness.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


def test_https(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A witness behind TLS is asked if its certificate is trusted, and not otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    (name, vkey, url), _ = witness(tls=context)
    address = (name, vkey, url.replace("http:", "https:"))
    item = cosigner([address], 1)
    item.notice()
    assert item.settle(WAIT_S)
    assert "CERTIFICATE_VERIFY_FAILED" in str(item.status()[0].error)
    item.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "witness.pem"))
    item = cosigner([address], 1)
    assert item.wait(len(place.log()), WAIT_S)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/",
        "http://",
        "http://u:p@host/",
        "http://host/?q",
        "http://host:99999/",
        "http://ho st/",
        "http://h/\n",
    ],
)
def test_urls_that_cannot_be(url: str) -> None:
    """Only http and https with a host, nothing that could smuggle a header; refused at once."""
    with pytest.raises(UsageError) as caught:
        WitnessConnection(url, 1.0)
    assert caught.value.kind == "witness_url"


def test_a_key_of_another_kind_is_refused(place: Place) -> None:
    """A log's key is no witness's."""
    vkey = note.parse_vkey(place.key.vkey(place.origin))
    with pytest.raises(UsageError):
        Cosigner(place.store, place.log(), [("x", vkey, "http://127.0.0.1:1")], at_least(1))


# --- what the place may do to us --------------------------------------------------------------------------------------


class Failing(LocalStore):
    """A local store whose overwrites fail while ``broken``."""

    broken = False
    failed = threading.Event()

    def overwrite(self, name: str, data: Buffer) -> None:
        if self.broken:
            self.failed.set()
            raise StoreError(f"{name}: told to fail", where=name)
        super().overwrite(name, data)


def test_a_full_disk_costs_no_cosignature(place: Place, witness: Callable, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[type-arg]
    """What was collected is kept in memory and written when the place works again; the witness is not asked twice."""
    address, server = witness()
    store = Failing(place.folder)
    store.broken = True
    item = Cosigner(store, Log(store, place.origin), [address], at_least(1), pace=QUICK)
    item.notice()
    assert store.failed.wait(WAIT_S)
    assert item.witnessed_size == 0
    store.broken = False
    assert item.wait(len(place.log()), WAIT_S)
    item.close()
    store.close()
    assert server.asked == 1
    assert "told to fail" in caplog.text
    assert signers(place.head(), [address]) == 1


@pytest.mark.damages
def test_a_chain_that_lost_its_newest_entries_is_told_of(
    place: Place,
    witness: Callable,  # type: ignore[type-arg]
    cosigner: Callable,  # type: ignore[type-arg]
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Witnesses signed more than the log has: an error says so, and what they signed stays where it is."""
    address, _ = witness()
    size = len(place.log())
    head = place.store.read(layout.LOG_HEAD, note.LIMIT_BYTES)
    item = cosigner([address], 1)
    assert item.wait(place.add(), WAIT_S)
    item.close()
    for name in (layout.slot(size), layout.tile(0, 0, size + 1), layout.entry_bundle(0, size + 1)):
        place.store.delete(name)
    place.store.overwrite(layout.LOG_HEAD, head)
    again = cosigner([address], 1)
    again.notice()
    assert again.settle(WAIT_S)
    assert "witnesses signed" in caplog.text
    assert place.size(place.witnessed()) == size + 1
    assert "lost its newest entries" in str(again.status()[0].error)


def test_a_witnessed_head_of_another_history_is_replaced(place: Place, witness: Callable, cosigner: Callable) -> None:  # type: ignore[type-arg]
    """Rubbish and unsigned heads under log/witnessed are no reason to stop: they prove nothing."""
    address, _ = witness()
    huge = note.head_text(place.origin, 10**9, bytes(32))
    for bad in (b"rubbish", place.key.sign(place.origin, huge).encode()):
        place.store.overwrite(layout.WITNESSED, bad)
        size = place.add()
        item = cosigner([address], 1)
        assert item.wait(size, WAIT_S)
        item.close()
        assert place.size(place.witnessed()) == size


# --- the option -------------------------------------------------------------------------------------------------------


def trusting(*witnesses: tuple[str, Vkey, str | None], needed: int = 1, **settings: object) -> Trust:
    """The option, with a quorum of ``needed``; 0: none."""
    known = tuple(PolicyWitness(*witness) for witness in witnesses)
    groups = (Group("q", needed, tuple(witness.name for witness in known)),) if needed else ()
    return Trust.parse({"policy": Policy((), known, groups, "q" if needed else None), **settings})


def test_required_witnesses(place: Place, witness: Callable) -> None:  # type: ignore[type-arg]
    """``committed`` returns once a quorum signed; without one it fails with a kind of its own, in bounded time, and
    says that the entry stays. ``async`` never waits."""
    address, server = witness()
    log = Log(place.store, place.origin)
    trust = trusting(address, witnesses="required", max_age="1h")
    item = trust.witnessing(place.store, log, timeout_s=WAIT_S)
    assert item is not None
    size = place.add()
    item.committed(size)
    assert place.size(place.witnessed()) == size
    item.close()
    stop(server)
    late = trust.witnessing(place.store, log, timeout_s=0.2)
    assert late is not None
    with pytest.raises(SaveFailedError, match="is in the chain") as caught:
        late.committed(place.add())
    assert caught.value.kind == "not_witnessed"
    late.close()
    soft = trusting(address).witnessing(place.store, log, timeout_s=0.0)
    assert soft is not None
    soft.committed(10**6)
    soft.close(0.0)
    assert soft.cosigner.witnessed_size < 10**6


def test_settings_that_cannot_be(place: Place, tmp_path: Path) -> None:
    """Unknown names, modes and ages, and a quorum that nobody can meet, are refused at once; no URL, nobody to ask."""
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/w"))
    no_url = ("w", vkey, None)
    url = ("w", vkey, "http://127.0.0.1:1")
    refused: list[Callable[[], Trust]] = [
        lambda: trusting(url, wittnesses="async"),
        lambda: trusting(url, witnesses="sometimes"),
        lambda: trusting(url, max_age="soon"),
        lambda: trusting(url, max_age=-1),
        lambda: trusting(url, max_age=True),
        lambda: trusting(no_url, witnesses="required"),
        lambda: trusting(url, needed=2, witnesses="required"),
        lambda: trusting(url, needed=0, witnesses="required"),
        lambda: Trust.parse({"witnesses": "async"}),
        lambda: Trust.parse({"policy": tmp_path / "none"}),
    ]
    for make in refused:
        with pytest.raises(UsageError):
            make()
    with pytest.raises(IntegrityError):
        Trust.parse({"policy": "no policy\n"})
    assert trusting(no_url).witnessing(place.store, place.log()) is None
    file = tmp_path / "policy.txt"
    file.write_text(trusting(url).policy.format())
    assert Trust.parse({"policy": file}) == Trust.parse({"policy": file.read_text()}) == trusting(url)
    assert [witnessing.duration_s(value) for value in (1.5, "90s", "2m", "1h", "2d")] == [1.5, 90, 120, 3600, 172800]


def test_an_empty_log_has_nothing_to_witness(tmp_path: Path) -> None:
    """A notice without any entry is no error, and nobody is asked."""
    store = LocalStore(tmp_path / "empty")
    store.initialize()
    vkey = note.parse_vkey(SigningKey.generate().cosigner("example.org/w"))
    item = Cosigner(store, Log(store, "example.org/log"), [("w", vkey, "http://127.0.0.1:1")], at_least(1))
    item.notice()
    assert item.settle(WAIT_S)
    assert item.status()[0].asked_s is None
    item.close()
    store.close()
    with pytest.raises(NotFoundError):
        store.read(layout.WITNESSED, 1000)

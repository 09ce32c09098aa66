"""The witness: which heads it cosigns, what it answers to all others, and what is left after it was killed."""

from __future__ import annotations

import base64
import errno
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ciuic_async.cli.chain_witness import WitnessServer
from ciuic_async.cli.main import main
from ciuic_async.errors import IntegrityError, StoreError, UsageError
from ciuic_async.format import merkle
from ciuic_async.transparency import note, proof
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.note import Signature, Vkey
from ciuic_async.transparency.witness import BODY_LIMIT_BYTES, EVIDENCE_KEPT, Witness, request_body

ORIGIN = "ciuic.dev/chain/" + "0" * 32
NAME = "example.org/witness"
HOUR_S = 1_800_000_000
_random = random.Random(4)


class History:
    """A log's tree, made of numbered leaves; ``salt`` makes another one of the same sizes."""

    def __init__(self, key: SigningKey, salt: str = "", origin: str = ORIGIN) -> None:
        self.key = key
        self.origin = origin
        self.leaves = [merkle.leaf_hash(f"{salt}{number}".encode()) for number in range(64)]

    def root(self, size: int) -> bytes:
        return merkle.root(self.leaves[:size])

    def head(self, size: int) -> bytes:
        return self.key.sign(self.origin, note.head_text(self.origin, size, self.root(size))).encode()

    def proof(self, old: int, new: int) -> list[bytes]:
        def subtree(height: int, index: int) -> bytes:
            return merkle.root(self.leaves[index << height : (index + 1) << height])

        return proof.make_consistency(old, new, subtree)

    def body(self, old: int, new: int) -> bytes:
        return request_body(old, self.proof(old, new) if old <= new else [], self.head(new))


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def log(key: SigningKey) -> History:
    return History(key)


@pytest.fixture
def witness(tmp_path: Path, key: SigningKey) -> Iterator[Witness]:
    logs = [note.parse_vkey(key.vkey(ORIGIN))]
    witness = Witness(tmp_path / "state", SigningKey.generate(), NAME, logs, clock=lambda: HOUR_S)
    yield witness
    witness.close()


@pytest.fixture
def server(witness: Witness) -> Iterator[WitnessServer]:
    server = WitnessServer(("127.0.0.1", 0), witness)
    server.start()
    yield server
    server.close()


def ask(url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, str]:
    """Status, body and media type."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read(), response.headers.get("Content-Type", "")
    finally:
        connection.close()


def post(server: WitnessServer, body: bytes) -> tuple[int, bytes, str]:
    return ask(server.url, "POST", "/add-checkpoint", body)


def cosigned(head: bytes, lines: bytes, vkey: Vkey) -> int:
    """The time at which ``vkey`` cosigned; fails unless the lines are good under the head."""
    signed = note.parse(head + lines, "answer")
    note.verify_note(signed, {(vkey.name, vkey.key_id): vkey}, "answer")
    return note.cosigned_at(signed.signatures[-1].signature)


def test_a_head_that_extends_the_last_is_cosigned(server: WitnessServer, log: History) -> None:
    """200 with one line that verifies; from nothing, further on, and again for the same head."""
    for old, new in ((0, 1), (1, 5), (5, 5), (5, 64)):
        status, body, content_type = post(server, log.body(old, new))
        assert (status, content_type) == (200, "text/plain; charset=utf-8")
        assert body.count(b"\n") == 1
        assert cosigned(log.head(new), body, server.witness.vkey) == HOUR_S


def test_the_empty_log_is_cosigned_too(server: WitnessServer, log: History) -> None:
    """Size 0 with the root of nothing; with another root it is 422."""
    assert post(server, log.body(0, 0))[0] == 200
    wrong = log.key.sign(ORIGIN, note.head_text(ORIGIN, 0, bytes(32))).encode()
    assert post(server, request_body(0, [], wrong))[0] == 422


def replaced(body: bytes, old: str, new: str) -> bytes:
    assert old.encode() in body
    return body.replace(old.encode(), new.encode(), 1)


MALFORMED = {
    "nothing": lambda log: b"",
    "no old line": lambda log: log.body(5, 9).partition(b"\n")[2],
    "leading zero": lambda log: replaced(log.body(5, 9), "old 5", "old 05"),
    "negative": lambda log: replaced(log.body(5, 9), "old 5", "old -5"),
    "huge": lambda log: replaced(log.body(5, 9), "old 5", "old 9007199254740993"),
    "other digits": lambda log: replaced(log.body(5, 9), "old 5", "old \u0665"),
    "no empty line": lambda log: b"old 5\n" + log.head(9).replace(b"\n\n", b"\n"),
    "64 hashes": lambda log: request_body(5, [bytes(32)] * 64, log.head(9)),
    "short hash": lambda log: request_body(5, [bytes(31)], log.head(9)),
    "stray bits": lambda log: replaced(request_body(5, [bytes(32)], log.head(9)), "AAA=\n", "AAB=\n"),
    "no padding": lambda log: replaced(request_body(5, [bytes(32)], log.head(9)), "AAA=\n", "AAA\n"),
    "spaces": lambda log: replaced(request_body(5, [bytes(32)], log.head(9)), "AAA=\n", "AAA= \n"),
    "carriage returns": lambda log: log.body(5, 9).replace(b"\n", b"\r\n"),
    "not UTF-8": lambda log: log.body(5, 9).replace(b"ciuic", b"\xff\xfe", 1),
    "no signature": lambda log: b"old 5\n\n" + log.head(9).partition(b"\n\n")[0] + b"\n\n",
    "signature with stray text": lambda log: log.body(5, 9)[:-1] + b" x\n",
    "size with a leading zero": lambda log: request_body(5, [], signed(log, f"{ORIGIN}\n09\n{root64(log, 9)}\n")),
    "size is no number": lambda log: request_body(5, [], signed(log, f"{ORIGIN}\nnine\n{root64(log, 9)}\n")),
    "no root": lambda log: request_body(5, [], signed(log, f"{ORIGIN}\n9\n")),
    "short root": lambda log: request_body(5, [], signed(log, f"{ORIGIN}\n9\n{root64(log, 9)[:-4]}\n")),
    "extension line": lambda log: request_body(5, [], signed(log, f"{ORIGIN}\n9\n{root64(log, 9)}\nmore\n")),
    "old beyond the head": lambda log: request_body(9, [], log.head(5)),
}


def root64(log: History, size: int) -> str:
    return base64.b64encode(log.root(size)).decode()


def signed(log: History, text: str) -> bytes:
    return log.key.sign(ORIGIN, text).encode()


def test_what_is_malformed_is_400(server: WitnessServer, log: History) -> None:
    """Every deviation from the format, and an old size beyond the head's; the state stays."""
    post(server, log.body(0, 5))
    for what, body in MALFORMED.items():
        status, reason, _ = post(server, body(log))
        assert (status, reason.count(b"\n")) == (400, 1), what
    assert post(server, log.body(5, 9))[0] == 200


def test_an_unknown_log_is_404(server: WitnessServer, key: SigningKey) -> None:
    """Even if the key of a known log signed it."""
    assert post(server, History(key, origin="example.org/other").body(0, 5))[0] == 404
    assert ask(server.url, "GET", f"/{sha256(b'example.org/other').hexdigest()}/checkpoint")[0] == 404


def test_a_head_that_no_trusted_key_signed_is_403(server: WitnessServer, log: History) -> None:
    """Another key; a trusted one whose signature fails, also beside a good one of another key."""
    stranger = History(SigningKey.generate())
    assert post(server, stranger.body(0, 5))[0] == 403
    good = note.parse(log.head(5), "head")
    bad = good.signatures[0]
    flipped = Signature(bad.name, bad.key_id, bytes([bad.signature[0] ^ 1]) + bad.signature[1:])
    other = note.parse(stranger.head(5), "head").signatures[0]
    for lines in ((flipped,), (flipped, other), (bad, flipped)):
        assert post(server, request_body(0, [], note.format_note(good.text, lines).encode()))[0] == 403
    both = note.format_note(good.text, (other, bad)).encode()  # signatures by unknown keys are ignored
    assert post(server, request_body(0, [], both))[0] == 200


def test_another_old_size_is_409_and_says_the_right_one(server: WitnessServer, log: History) -> None:
    """The body is the size alone, with its own media type; a smaller head too, for it never goes back."""
    assert post(server, log.body(3, 5)) == (409, b"0\n", "text/x.tlog.size")
    post(server, log.body(0, 5))
    assert post(server, log.body(3, 9)) == (409, b"5\n", "text/x.tlog.size")
    assert post(server, log.body(0, 9)) == (409, b"5\n", "text/x.tlog.size")
    assert post(server, log.body(3, 3)) == (409, b"5\n", "text/x.tlog.size")


def test_what_does_not_extend_the_last_head_is_422(server: WitnessServer, log: History) -> None:
    """A proof with old size 0, one that is wrong, too long or too short, and another root of the same size."""
    assert post(server, request_body(0, [bytes(32)], log.head(5)))[0] == 422
    assert post(server, log.body(0, 5))[0] == 200
    right = log.proof(5, 9)
    for path in ([], right[:-1], [*right, bytes(32)], [bytes(32), *right[1:]]):
        assert post(server, request_body(5, path, log.head(9)))[0] == 422
    assert post(server, request_body(5, [bytes(32)], log.head(5)))[0] == 422
    other = History(log.key, "other")
    assert post(server, request_body(5, [], other.head(5)))[0] == 422
    assert post(server, other.body(5, 9))[0] == 422
    assert post(server, log.body(5, 9))[0] == 200


def test_a_fork_is_kept_as_evidence(server: WitnessServer, log: History, tmp_path: Path) -> None:
    """Both notes, each with the log's signature; proven forks and suspected ones are told apart; their number is
    bounded, and what is met again is kept once."""
    folder = tmp_path / "state" / "evidence"
    post(server, log.body(0, 5))
    other = History(log.key, "other")
    known = {(ORIGIN, log.key.key_id(ORIGIN)): note.parse_vkey(log.key.vkey(ORIGIN))}
    for body in (request_body(5, [], other.head(5)), request_body(5, [], other.head(5)), other.body(0, 5)):
        assert post(server, body)[0] in (409, 422)
    assert [path.name for path in folder.iterdir()] == [f"{sha256(ORIGIN.encode()).hexdigest()}.0"]
    kept = json.loads(next(folder.iterdir()).read_bytes())
    roots = [note.verify(kept[which].encode(), known, which).text for which in ("cosigned", "refused")]
    assert roots == [note.head_text(ORIGIN, 5, log.root(5)), note.head_text(ORIGIN, 5, other.root(5))]
    for number in range(EVIDENCE_KEPT + 4):
        assert post(server, History(log.key, str(number)).body(5, 9))[0] == 422
        assert post(server, History(log.key, str(number)).body(5, 5))[0] == 422
    assert len(list(folder.iterdir())) == 2 * EVIDENCE_KEPT
    unsigned = History(SigningKey.generate(), "unsigned")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert post(server, unsigned.body(5, 9))[0] == 403
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_newest_cosigned_head_can_be_read(server: WitnessServer, log: History) -> None:
    """With the log's signature and the witness's, and without those of strangers; 404 before there is one."""
    path = f"/{sha256(ORIGIN.encode()).hexdigest()}/checkpoint"
    assert ask(server.url, "GET", path)[0] == 404
    stranger = note.parse(History(SigningKey.generate()).head(5), "head").signatures[0]
    parsed = note.parse(log.head(5), "head")
    with_stranger = note.format_note(parsed.text, (*parsed.signatures, stranger)).encode()
    _, line, _ = post(server, request_body(0, [], with_stranger))
    status, body, content_type = ask(server.url, "GET", path)
    assert (status, body, content_type) == (200, log.head(5) + line, "text/plain; charset=utf-8")
    assert ask(server.url, "HEAD", path) == (200, b"", content_type)


def test_other_requests_are_refused(server: WitnessServer, log: History) -> None:
    """Unknown paths, methods that are not meant, bodies without a length or too long; the server goes on."""
    assert ask(server.url, "GET", "/")[0] == 404
    assert ask(server.url, "GET", "/../etc/passwd")[0] == 404
    assert ask(server.url, "GET", "/add-checkpoint")[0] == 405
    assert ask(server.url, "POST", f"/{'0' * 64}/checkpoint", b"x")[0] == 405
    assert ask(server.url, "DELETE", "/add-checkpoint")[0] == 501
    assert post(server, bytes(BODY_LIMIT_BYTES + 1))[0] == 413
    assert post(server, b"old 0\n\n" + b"x" * (BODY_LIMIT_BYTES - 7))[0] == 400
    with socket.create_connection((server.server_name, server.server_port)) as raw:
        raw.sendall(b"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 411 ")
    with socket.create_connection((server.server_name, server.server_port)) as raw:
        raw.sendall(b"\x16\x03\x01\x00\r\n\r\n")
        with raw.makefile("rb") as answer:
            assert b"400" in answer.read()
    assert post(server, log.body(0, 5))[0] == 200


def test_concurrent_requests_never_get_two_heads_of_one_size(server: WitnessServer, log: History) -> None:
    """Many askers with two histories: for each size at most one root is cosigned, and all are of one history."""
    histories = [log, History(log.key, "other")]
    seen: dict[int, set[bytes]] = {}
    mutex = threading.Lock()

    def attack(number: int) -> None:
        choose = random.Random(number)
        old = 0
        for _ in range(30):
            history, new = choose.choice(histories), old + choose.randint(0, 2)
            status, body, _ = post(server, history.body(old, new))
            if status == 200:
                cosigned(history.head(new), body, server.witness.vkey)
                with mutex:
                    seen.setdefault(new, set()).add(history.root(new))
                old = new
            elif status == 409:
                old = int(body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attack, range(8)))
    assert len(seen) > 2
    assert all(len(roots) == 1 for size, roots in seen.items() if size)
    agreed = [all(roots <= {history.root(size)} for size, roots in seen.items()) for history in histories]
    assert any(agreed)


def test_state_is_kept_and_guarded(tmp_path: Path, key: SigningKey, log: History) -> None:
    """A second process gets no hold of the folder; a later one goes on where the first stopped; a damaged file is an
    error, never a fresh start; a state that cannot be written cosigns nothing."""
    own = SigningKey.generate()
    logs = [note.parse_vkey(key.vkey(ORIGIN))]
    first = Witness(tmp_path / "s", own, NAME, logs)
    with pytest.raises(UsageError, match="another witness"):
        Witness(tmp_path / "s", own, NAME, logs)
    assert first.add_checkpoint(log.body(0, 5)).status == 200
    first.close()
    (tmp_path / "s" / "tmp.0123").write_bytes(b"half")
    second = Witness(tmp_path / "s", own, NAME, logs)
    assert not (tmp_path / "s" / "tmp.0123").exists()
    assert second.add_checkpoint(log.body(0, 5)).status == 409
    assert second.add_checkpoint(log.body(5, 9)).status == 200
    path = next((tmp_path / "s").glob("*.note"))
    good = path.read_bytes()
    for bad in (b"", good[:-30], good.replace(b"\n9\n", b"\n8\n"), good[:-5] + b"AAA=\n"):
        path.write_bytes(bad)
        with pytest.raises(IntegrityError):
            second.add_checkpoint(log.body(9, 12))
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError):
        second.add_checkpoint(log.body(9, 12))
    second.close()
    second.close()


def test_nothing_is_given_out_that_is_not_durable(
    witness: Witness, log: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the syncs before an answer may fail: then there is no cosignature. Where the new state may have come to
    stay, a fork of it is refused afterwards, and the same head is cosigned."""
    real = os.fsync
    assert witness.add_checkpoint(log.body(0, 5)).status == 200
    for failing, stays in ((1, False), (2, True)):
        calls = []

        def fsync(descriptor: int, failing: int = failing, calls: list[int] = calls) -> None:
            calls.append(descriptor)
            if len(calls) == failing:
                raise OSError(errno.EIO, "told to fail")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreError, match="Input/output error"):
            witness.add_checkpoint(log.body(5, 9))
        monkeypatch.setattr(os, "fsync", real)
        assert witness.add_checkpoint(log.body(9, 9)).status == (200 if stays else 409)
    assert witness.add_checkpoint(History(log.key, "other").body(9, 9)).status == 422
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "told to fail")))
    with pytest.raises(StoreError):
        witness.add_checkpoint(log.body(9, 12))


@pytest.mark.parametrize("name", ["", "a b", "a+b"])
def test_names_and_keys_that_cannot_be(name: str, tmp_path: Path, key: SigningKey) -> None:
    """A name that no note can carry, and a cosigner's key in the place of a log's, are refused before anything is."""
    with pytest.raises(UsageError):
        Witness(tmp_path / "s", key, name, [])
    with pytest.raises(UsageError):
        Witness(tmp_path / "s", key, NAME, [note.parse_vkey(key.cosigner(ORIGIN))])
    assert not (tmp_path / "s").exists()


# --- the command ------------------------------------------------------------------------------------------------------


class Process:
    """A witness in a process of its own."""

    def __init__(self, state: Path, vkey: str, *options: str) -> None:
        command = [sys.executable, "-m", "ciuic_async.cli.main", "chain", "witness", "--state", str(state)]
        command += ["--name", NAME, "--log", vkey, "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = self.process.stdout.readline().decode()
            assert line, "the witness ended"
            text += line
        facts = json.loads(text)
        self.url: str = facts["url"]
        self.vkey = note.parse_vkey(facts["vkey"])

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        with self.process:
            return self.process.wait(30)


def test_killed_at_any_moment_it_never_cosigns_a_fork(tmp_path: Path, key: SigningKey) -> None:
    """SIGKILL while requests of two histories are under way, several times: over all its lives, no two heads of one
    size were cosigned, and all that were form one history. The key stays the same."""
    histories = [History(key), History(key, "other")]
    seen: dict[int, set[bytes]] = {}
    vkeys = set()
    mutex = threading.Lock()
    for life in range(3):
        witness = Process(tmp_path / "state", key.vkey(ORIGIN))
        vkeys.add(witness.vkey)
        answered = threading.Semaphore(0)
        dead = threading.Event()

        def attack(number: int, witness: Process = witness, answered=answered, dead=dead) -> None:  # type: ignore[no-untyped-def]
            choose = random.Random(number)
            old = 0
            while not dead.is_set():
                history, new = choose.choice(histories), old + choose.randint(0, 1)
                if new > 63:
                    old = new = 63
                try:
                    status, body, _ = ask(witness.url, "POST", "/add-checkpoint", history.body(old, new))
                except (OSError, http.client.HTTPException):
                    continue
                if status == 200:
                    cosigned(history.head(new), body, witness.vkey)
                    with mutex:
                        seen.setdefault(new, set()).add(history.root(new))
                    old = new
                    answered.release()
                elif status == 409:
                    old = int(body)

        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(attack, 10 * life + number) for number in range(4)]
            for _ in range(5):
                answered.acquire(timeout=30)
            threading.Event().wait(_random.uniform(0, 0.05))
            witness.end(signal.SIGKILL)
            dead.set()
            for future in done:
                future.result()
    assert len(vkeys) == 1
    assert len(seen) > 3
    assert all(len(roots) == 1 for size, roots in seen.items() if size)
    assert any(all(roots <= {history.root(size)} for size, roots in seen.items()) for history in histories)


def test_told_to_end_it_ends(tmp_path: Path, key: SigningKey) -> None:
    """By SIGTERM and by SIGINT: exit code 0, the next one goes on where it stopped, the key file is nobody else's."""
    log = History(key)
    first = Process(tmp_path / "state", key.vkey(ORIGIN))
    assert ask(first.url, "POST", "/add-checkpoint", log.body(0, 5))[0] == 200
    assert first.end(signal.SIGINT) == 0
    assert (tmp_path / "state" / "witness.key").stat().st_mode & 0o777 == 0o600
    policy = tmp_path / "policy.txt"
    policy.write_text(f"# comment\nlog {key.vkey(ORIGIN)}\nquorum none\n")
    second = Process(tmp_path / "state", key.vkey(ORIGIN), "--policy", str(policy))
    assert ask(second.url, "POST", "/add-checkpoint", log.body(3, 9))[1] == b"5\n"
    assert second.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 2),
        (["--log", "nonsense"], 4),
        (["--log", "{vkey}", "--listen", "127.0.0.1"], 2),
        (["--log", "{vkey}", "--listen", "127.0.0.1:99999"], 2),
        (["--log", "{vkey}", "--listen", "192.0.2.1:1"], 2),
        (["--policy", "/nothing/here"], 2),
    ],
)
def test_wrong_arguments(
    options: list[str], code: int, tmp_path: Path, key: SigningKey, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit codes of what cannot be started, with a reason on stderr and without a traceback."""
    arguments = [option.format(vkey=key.vkey(ORIGIN)) for option in options]
    assert main(["chain", "witness", "--state", str(tmp_path / "s"), "--name", NAME, *arguments]) == code
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("error: ")

"""Timestamps: tokens by a real authority (``openssl ts``) are evidence of time; nothing else passes for one."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import ciuic_async
from ciuic_async.chain import SnapshotChain
from ciuic_async.cli import chain_timestamp
from ciuic_async.cli.main import main
from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError, StoreError, UsageError
from ciuic_async.format import layout
from ciuic_async.retention.policy import KeepLatest
from ciuic_async.stores.local import LocalStore
from ciuic_async.transparency import anchor
from ciuic_async.transparency.anchor import TimestampAuthority
from ciuic_async.transparency.log import Log

pytest.importorskip("rfc3161_client", reason="rfc3161-client is not installed")
OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="there is no openssl here to be the authority")
HEAD = b"ciuic.dev/chain/00\n3\nq0LYyhYRIN7pbSpRy0pLvxfqVQfZW1XRlVjVcUZBV5A=\n"
DAY = timedelta(days=1)
CONFIG = """
[tsa]
default_tsa = one
[one]
serial = {folder}/serial
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256
ess_cert_id_alg = sha256
"""


class Authority:
    """An authority of its own root; ``answer`` makes replies, at the time that it is."""

    def __init__(self, folder: Path, *, valid: tuple[datetime, datetime] | None = None) -> None:
        folder.mkdir()
        now = datetime.now(UTC)
        self.folder = folder
        root_key = ec.generate_private_key(ec.SECP256R1())
        always = (now - 9 * DAY, now + 9 * DAY)
        self.root = _certificate("root", root_key, "root", root_key, always, is_root=True)
        key = ec.generate_private_key(ec.SECP256R1())
        signer = _certificate("tsa", key, "root", root_key, valid or always)
        (folder / "signer.pem").write_bytes(signer.public_bytes(Encoding.PEM))
        (folder / "root.pem").write_bytes(self.root.public_bytes(Encoding.PEM))
        (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / "serial").write_text("01")
        (folder / "tsa.cnf").write_text(CONFIG.format(folder=folder))

    def answer(self, query: bytes) -> bytes:
        (self.folder / "query.tsq").write_bytes(query)
        self._ts("-reply", "-queryfile", "query.tsq", "-signer", "signer.pem", "-inkey", "key.pem", "-out", "reply.tsr")
        return (self.folder / "reply.tsr").read_bytes()

    def token(self, data: bytes) -> bytes:
        """A token for ``data``, asked for by openssl."""
        return self.answer(self.query(data))

    def query(self, data: bytes, algorithm: str = "-sha256") -> bytes:
        (self.folder / "data").write_bytes(data)
        self._ts("-query", "-data", "data", algorithm, "-cert", "-out", "own.tsq")
        return (self.folder / "own.tsq").read_bytes()

    def verifies(self, data: bytes, token: bytes) -> bool:
        """What openssl says of a token."""
        (self.folder / "data").write_bytes(data)
        (self.folder / "token.tsr").write_bytes(token)
        done = subprocess.run(
            [OPENSSL or "", "ts", "-verify", "-in", "token.tsr", "-data", "data", "-CAfile", "root.pem"],
            cwd=self.folder,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def _ts(self, *arguments: str) -> None:
        config = ["-config", "tsa.cnf"]
        subprocess.run([OPENSSL or "", "ts", *arguments, *config], cwd=self.folder, capture_output=True, check=True)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    valid: tuple[datetime, datetime],
    is_root: bool = False,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
    )
    if not is_root:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


Reply = Callable[[bytes], tuple[int, bytes]]
"""Status and body for a query."""


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], str]]:
    """Serves replies over HTTP; gives the URL."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers["Content-Type"] == "application/timestamp-query"
                status, body = reply(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(status)
                self.send_header("Content-Type", "application/timestamp-reply")
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/tsa?x=1"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tsa") / "one")


@pytest.fixture(scope="module")
def token(authority: Authority) -> bytes:
    """A good token for HEAD."""
    return authority.token(HEAD)


def good(authority: Authority) -> Reply:
    return lambda query: (200, authority.answer(query))


# --- one token --------------------------------------------------------------------------------------------------------


def test_a_token_of_openssl_holds(authority: Authority, token: bytes) -> None:
    """The token is for these bytes alone, states a time of just now in UTC, and needs no network."""
    time = anchor.verify_token(HEAD, token, [authority.root], "token")
    assert time.tzinfo is UTC
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=2)
    for other in (b"", HEAD[:-1], HEAD + b"\n", HEAD.replace(b"\n3\n", b"\n4\n")):
        with pytest.raises(IntegrityError) as caught:
            anchor.verify_token(other, token, [authority.root], "token")
        assert caught.value.kind == "timestamp_mismatch"


def test_a_token_of_ours_holds_for_openssl(authority: Authority, serve: Callable[[Reply], str]) -> None:
    """What ``stamp`` brings home is what openssl verifies for the text of the head."""
    client = TimestampAuthority(serve(good(authority)), [authority.root])
    token = client.stamp(HEAD)
    assert authority.verifies(HEAD, token)
    assert not authority.verifies(HEAD + b"\n", token)
    assert client.verify(HEAD, token) == anchor.verify_token(HEAD, token, [authority.root], "token")


@pytest.mark.parametrize("how", ["other root", "expired", "not yet valid"])
def test_a_token_by_nobody_trusted_is_refused(tmp_path: Path, authority: Authority, how: str) -> None:
    """Of an authority under another root, or with a certificate that was not valid when it was made: refused."""
    now = datetime.now(UTC)
    valid = {"expired": (now - 3 * DAY, now - DAY), "not yet valid": (now + DAY, now + 3 * DAY)}.get(how)
    other = Authority(tmp_path / "other", valid=valid)
    token = other.token(HEAD)
    root = authority.root if how == "other root" else other.root
    with pytest.raises(IntegrityError) as caught:
        anchor.verify_token(HEAD, token, [root], "token")
    assert caught.value.kind == "timestamp_invalid"


def test_a_token_outlives_its_certificate(tmp_path: Path) -> None:
    """It holds up to the end of its authority's certificate and after: what counts is when it was made."""
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    short = Authority(tmp_path / "short", valid=(end - DAY, end))
    token = short.token(HEAD)
    made = anchor.verify_token(HEAD, token, [short.root], "token")
    assert made <= end
    while datetime.now(UTC) <= end + timedelta(milliseconds=100):
        assert anchor.verify_token(HEAD, token, [short.root], "token") == made
    assert anchor.verify_token(HEAD, token, [short.root], "token") == made


def test_a_truncated_token_is_refused(authority: Authority, token: bytes) -> None:
    """Cut anywhere, longer by a byte, empty or huge: malformed, and nothing else happens."""
    cuts = [token[:length] for length in range(0, len(token), 7)]
    for bad in (*cuts, token + b"\0", token * 2, b"", b"\x30\x80", bytes(1 << 20)):
        with pytest.raises(IntegrityError) as caught:
            anchor.verify_token(HEAD, bad, [authority.root], "token")
        assert caught.value.kind == "timestamp_malformed"


def test_no_changed_token_states_another_time(authority: Authority, token: bytes) -> None:
    """Any flipped byte is refused with a typed error, or is in a part that nothing depends on: the time is the same."""
    true = anchor.verify_token(HEAD, token, [authority.root], "token")
    chance = random.Random(7)
    for place in range(len(token)):
        bad = bytearray(token)
        bad[place] ^= 1 << chance.randrange(8)
        try:
            found = anchor.verify_token(HEAD, bytes(bad), [authority.root], "token")
        except IntegrityError:
            continue
        assert found == true, place


# --- asking for one ---------------------------------------------------------------------------------------------------


def test_an_answer_to_another_question_is_refused(authority: Authority, serve: Callable[[Reply], str]) -> None:
    """A token of other bytes, or an older one of these bytes (another nonce, or none): refused."""
    other = authority.token(b"something else")
    older = authority.token(HEAD)
    for answer, kind in ((other, "timestamp_mismatch"), (older, "timestamp_invalid")):
        client = TimestampAuthority(serve(lambda query, answer=answer: (200, answer)), [authority.root])
        with pytest.raises(IntegrityError) as caught:
            client.stamp(HEAD)
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (500, b"", "tsa_refused"),
        (302, b"", "tsa_refused"),
        (200, b"", "timestamp_malformed"),
        (200, b"<html></html>", "timestamp_malformed"),
        (200, bytes(1 << 17), "no_answer"),
    ],
)
def test_a_useless_answer_is_a_typed_error(
    authority: Authority, serve: Callable[[Reply], str], status: int, body: bytes, kind: str
) -> None:
    """An error, a redirect (not followed), nothing, a page, or too much: an error of a stable kind."""
    client = TimestampAuthority(serve(lambda query: (status, body)), [authority.root])
    with pytest.raises((StoreError, IntegrityError)) as caught:
        client.stamp(HEAD)
    assert caught.value.kind == kind


def test_an_authority_that_refuses_says_so(authority: Authority, serve: Callable[[Reply], str]) -> None:
    """A reply that grants nothing is an error with the authority's words."""
    refusal = authority.answer(authority.query(HEAD, "-sha512"))  # it takes SHA-256 alone
    with pytest.raises(StoreError, match="status 2") as caught:
        TimestampAuthority(serve(lambda query: (200, refusal)), [authority.root]).stamp(HEAD)
    assert caught.value.kind == "tsa_refused"


def test_what_the_caller_must_bring(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No roots, a file without certificates, no URL, or no package: usage errors before anything is asked."""
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for call, kind in (
        (lambda: TimestampAuthority("http://127.0.0.1:1", []), "no_roots"),
        (lambda: anchor.verify_token(HEAD, b"", [], "token"), "no_roots"),
        (lambda: anchor.load_roots(nothing), "bad_roots"),
        (lambda: anchor.load_roots(tmp_path / "gone.pem"), "bad_roots"),
        (lambda: TimestampAuthority("ftp://host/", [authority.root]), "bad_url"),
        (lambda: TimestampAuthority("http://user:secret@host/", [authority.root]), "bad_url"),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.kind == kind
        assert "secret" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "rfc3161_client", None)
    with pytest.raises(UsageError, match="pip install") as caught:
        TimestampAuthority("http://127.0.0.1:1", [authority.root])
    assert caught.value.kind == "timestamps_missing"


# --- a chain's --------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """A chain with one snapshot."""
    place = str(tmp_path / "chain")
    ciuic_async.save({"x": torch.ones(3)}, place)
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the action."""
    parser = argparse.ArgumentParser()
    chain_timestamp.add_parser(parser.add_subparsers())
    args = parser.parse_args(["timestamp", *arguments])
    code: int = args.run(args)
    out = capsys.readouterr()
    return code, out.out, out.err


def opened(chain: str) -> tuple[LocalStore, Log]:
    with SnapshotChain(chain, create=False) as known:
        origin = known.origin
    store = LocalStore(chain)
    log = Log(store, origin)
    log.refresh()
    return store, log


def test_the_newest_snapshot_is_stamped_once(
    chain: str, authority: Authority, serve: Callable[[Reply], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The token is durable under the snapshot's name, openssl verifies it, it is not replaced; the next has its own."""
    url, roots = serve(good(authority)), str(authority.folder / "root.pem")
    code, out, _ = run(capsys, chain, "--tsa", url, "--roots", roots, "--json")
    first = json.loads(out)
    assert (code, first["made"], first["index"]) == (0, True, 1)
    store, log = opened(chain)
    kept = store.read(layout.timestamp(first["snapshot"]), anchor.TOKEN_LIMIT_BYTES)
    assert authority.verifies(first["head"].encode(), kept)
    with SnapshotChain(chain) as more:
        more.note("the log grows, the snapshot's head stays")
    code, out, _ = run(capsys, chain, "--tsa", url, "--roots", roots)
    assert (code, "was stamped" in out) == (0, True)
    assert store.read(layout.timestamp(first["snapshot"]), anchor.TOKEN_LIMIT_BYTES) == kept
    second = ciuic_async.save({"x": torch.zeros(3)}, chain)
    assert run(capsys, chain, "--tsa", url, "--roots", roots)[0] == 0
    log.refresh()
    found = anchor.timestamped(store, log, anchor.load_roots(roots))
    assert [index for index, _ in found] == [1, second.index]
    code, out, _ = run(capsys, chain, "--roots", roots, "--json")
    assert code == 0
    assert [item["snapshot"] for item in json.loads(out)["timestamps"]] == [first["snapshot"], second.id]
    assert len(run(capsys, chain, "--roots", roots)[1].splitlines()) == 3


def test_a_failed_stamp_leaves_nothing(
    chain: str, authority: Authority, serve: Callable[[Reply], str], tmp_path: Path
) -> None:
    """What is refused is not kept."""
    store, log = opened(chain)
    before = [item.name for item in store.list()]
    other = Authority(tmp_path / "other")
    for reply in (lambda query: (200, b"x"), lambda query: (500, b""), good(other)):
        with pytest.raises(CiuicError):
            anchor.stamp_newest(store, log, TimestampAuthority(serve(reply), [authority.root]))
    assert [item.name for item in store.list()] == before


@pytest.mark.damages
@pytest.mark.parametrize("bad", ["other authority", "garbage", "huge", "other snapshot"])
def test_a_token_that_is_refused_is_kept_until_told_otherwise(
    chain: str, authority: Authority, serve: Callable[[Reply], str], tmp_path: Path, bad: str
) -> None:
    """One by another authority, a damaged or a moved one: reported and not counted, replaced only on demand."""
    store, log = opened(chain)
    name = layout.timestamp(log.entry(1).snapshot)  # type: ignore[attr-defined]
    head = anchor.snapshot_head(log, 1)
    content = {
        "other authority": lambda: Authority(tmp_path / "other").token(head),
        "garbage": lambda: b"garbage",
        "huge": lambda: bytes(1 << 17),
        "other snapshot": lambda: authority.token(anchor.snapshot_head(log, 0)),
    }[bad]()
    store.create(name, content)
    refused: list[CiuicError] = []
    assert anchor.timestamped(store, log, [authority.root], refused) == []
    assert [error.where for error in refused] == [name]
    client = TimestampAuthority(serve(good(authority)), [authority.root])
    with pytest.raises(UsageError) as caught:
        anchor.stamp_newest(store, log, client)
    assert caught.value.kind == "timestamp_exists"
    assert store.read(name, 1 << 20) == content
    assert anchor.stamp_newest(store, log, client, replace=True)[1]
    assert len(anchor.timestamped(store, log, [authority.root])) == 1


@pytest.mark.damages
def test_the_command_reports_refused_tokens(
    chain: str, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4, the token's name on stderr or in the data; an empty chain is exit code 0 and no rows."""
    roots = str(authority.folder / "root.pem")
    assert run(capsys, chain, "--roots", roots, "--json")[:2] == (0, '{\n  "timestamps": [],\n  "problems": []\n}\n')
    store, log = opened(chain)
    name = layout.timestamp(log.entry(1).snapshot)  # type: ignore[attr-defined]
    store.create(name, b"\x1b[31m")
    code, out, err = run(capsys, chain, "--roots", roots)
    assert (code, name in err, "\x1b" in err + out) == (4, True, False)
    code, out, _ = run(capsys, chain, "--roots", roots, "--json")
    assert (code, json.loads(out)["problems"][0]["kind"]) == (4, "timestamp_malformed")


def test_a_pruned_snapshot_is_not_stamped(chain: str, authority: Authority, serve: Callable[[Reply], str]) -> None:
    """The newest that is left is stamped; a chain without any is a NotFoundError."""
    client = TimestampAuthority(serve(good(authority)), [authority.root])
    ciuic_async.save({"x": torch.zeros(3)}, chain)
    with SnapshotChain(chain) as known:
        first = next(iter(known))
        known.rollback(first.id)
        known.prune(KeepLatest(1))
    store, log = opened(chain)
    stamp = anchor.stamp_newest(store, log, client)[0]
    assert (stamp.index, stamp.snapshot) == (first.index, first.id)
    with SnapshotChain(str(chain) + "-empty") as empty:
        empty.note("no snapshot")
        with pytest.raises(NotFoundError) as caught:
            anchor.stamp_newest(empty.store, Log(empty.store, empty.origin), client)
    assert caught.value.kind == "no_snapshot"


def test_verify_reaches_the_level(
    authority: Authority, serve: Callable[[Reply], str], chain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``verify`` with the roots says when the log existed; without a token it cannot say, by other roots it does not
    hold, and without roots nobody asked."""
    roots, others = tmp_path / "roots.pem", tmp_path / "others.pem"
    roots.write_bytes(authority.root.public_bytes(Encoding.PEM))
    others.write_bytes(Authority(tmp_path / "other").root.public_bytes(Encoding.PEM))

    def level(path: Path | None) -> tuple[str, str]:
        with SnapshotChain(chain, create=False) as known:
            report = known.verify(roots=path)
        found = next(one for one in report.levels if one.name == "timestamped")
        assert [one.kind for one in report.problems] == ["not_timestamped"] * (found.state == "failed")
        return found.state, found.detail

    assert level(None)[0] == "not asked"
    assert level(roots) == ("unknown", "no token")
    assert run(capsys, chain, "--tsa", serve(good(authority)), "--roots", str(roots))[0] == 0
    state, detail = level(roots)
    assert state == "ok"
    assert "entry 1 existed at" in detail
    assert level(others)[0] == "failed"
    assert main(["verify", chain, "--roots", str(others)]) == 4
    assert "not_timestamped" in capsys.readouterr().out
    with SnapshotChain(chain) as known:
        ciuic_async.save({"x": torch.zeros(3)}, known)
        latest = known.latest()
        assert latest is not None
        known.store.create(layout.timestamp(latest.id), b"garbage")
    state, detail = level(roots)
    assert state == "ok"
    assert "of 2 tokens 1 do not hold" in detail  # what is refused beside a good one is not kept quiet
    assert main(["verify", chain, "--roots", str(roots)]) == 0
    assert "entry 1 existed at" in capsys.readouterr().out

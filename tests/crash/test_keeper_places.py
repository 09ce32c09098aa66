"""Where keepers are looked for: found by whoever may use them, and no reason for a restore to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciuic_async import Checkpointer
from ciuic_async.chain import SnapshotChain
from ciuic_async.keeper import offer, wire
from tests.crash.keeper_lives import state_of


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder where keepers of this test can be. The path of a socket has a limit of some 100 bytes."""
    for name in ("_RUNTIME", "_SHARED"):
        monkeypatch.setattr(wire, name, "/proc/none")
    monkeypatch.delenv("TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="ciuic-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.mark.usefixtures("no_leaks")
def test_an_address_without_a_keeper_is_swept(tmp_path: Path) -> None:
    """A keeper that was killed leaves its address; whoever restores next removes it."""
    with SnapshotChain(tmp_path / "chain") as chain:
        path, listener = wire.listen(chain.origin, chain.url)
        listener.close()
        assert path.exists()
        assert offer.find(chain.origin, chain.url) == []
        assert not path.exists()


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else can put an address where a trainer would look for its keeper."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "ciuic").mkdir(mode=0o777)
    (tmp_path / "ciuic").chmod(0o777)
    with pytest.raises(OSError, match="private"):
        wire.listen("origin", "url")
    assert list(wire.addresses("origin", "url")) == []


def test_keepers_are_found_whatever_the_environment_says(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that was started from a login is started again by cron, which has none of its variables."""
    monkeypatch.setattr(wire, "_RUNTIME", str(short))
    (short / str(os.getuid())).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / str(os.getuid())))
    path, listener = wire.listen("origin", "url")
    listener.close()
    assert list(wire.addresses("origin", "url")) == [path]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert list(wire.addresses("origin", "url")) == [path]


@pytest.mark.parametrize("place", ["no folder", "too long", "not utf-8"])
def test_restoring_needs_no_place_for_keepers(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not a keeper could be here, snapshots are restored: in a container with a read-only root and no
    ``/tmp``, with folders too deep for sockets, and from a path that is no text."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    if place == "too long":
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    chain = os.fsdecode(os.fsencode(tmp_path) + b"/\xff") if place == "not utf-8" else tmp_path / "chain"
    state = state_of(1)
    with Checkpointer(chain, state, every_steps=1, rng=False, keeper=True) as ckpt:
        pending = ckpt.step()
        assert pending is not None
        pending.wait_durable(60)
        progress = ckpt.restore()
        assert progress is not None
        assert progress.step == 1


def test_a_runtime_folder_of_somebody_else_is_passed_over(tmp_path: Path) -> None:
    """After ``su`` or ``sudo -E`` the variable names a folder that this user may not even look into."""
    tmp_path.chmod(0o700)
    code = (
        "import os, sys\n"
        "from ciuic_async.keeper import wire\n"
        "if os.getuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "else:\n"
        "    os.chmod(sys.argv[1], 0)\n"
        "print(list(wire.addresses('origin', 'url')))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    tmp_path.chmod(0o700)
    assert found.stdout == "[]\n", found.stderr


def test_a_chain_is_the_same_by_every_path_and_its_copy_is_not(tmp_path: Path) -> None:
    """A keeper is found by a symbolic link to its chain and after the chain was renamed, and never by a copy of it."""
    with SnapshotChain(tmp_path / "chain") as chain:
        origin = chain.origin
    shutil.copytree(tmp_path / "chain", tmp_path / "copy")
    (tmp_path / "link").symlink_to("chain")
    path, listener = wire.listen(origin, str(tmp_path / "chain"))
    listener.close()
    assert list(wire.addresses(origin, str(tmp_path / "link"))) == [path]
    assert list(wire.addresses(origin, str(tmp_path / "copy"))) == []
    (tmp_path / "chain").rename(tmp_path / "moved")
    assert list(wire.addresses(origin, str(tmp_path / "moved"))) == [path]

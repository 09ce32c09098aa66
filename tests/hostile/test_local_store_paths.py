"""A chain's folder that somebody else prepared: links, pipes, devices and folders where files should be."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import time
from pathlib import Path

import pytest

from ciuic_async.errors import CiuicError, CommitConflictError, IntegrityError, StoreError
from ciuic_async.format import layout
from ciuic_async.stores.local import LocalStore

A = "a" * 20
NAME = layout.segment(A, 0, 0)
QUICKLY_S = 10.0  # of waiting, on however busy a machine: what blocks, blocks for ever


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    os.mkdir(tmp_path / "chain" / "segments" / A)
    (tmp_path / "secret").write_bytes(b"secret")
    return store


def path_of(store: LocalStore, name: str = NAME) -> Path:
    return Path(store.url) / name


def verify_refused(store: LocalStore, name: str, kind: str) -> None:
    """Reading, sizing and filling from ``name`` are refused quickly and say where."""
    begin = time.monotonic()
    for call in (
        lambda: store.read(name, 1000),
        lambda: store.size(name),
        lambda: store.read_into(name, 0, memoryview(bytearray(1))),
    ):
        with pytest.raises(IntegrityError) as caught:
            call()
        assert caught.value.kind == kind
        assert name in str(caught.value)
    assert time.monotonic() - begin < QUICKLY_S


@pytest.mark.usefixtures("no_leaks")
def test_symbolic_link_to_a_file(store: LocalStore, tmp_path: Path) -> None:
    """A linked file is refused, whether its target is outside, inside or missing."""
    store.create(layout.LOG_HEAD, b"inside")
    for target in (tmp_path / "secret", path_of(store, layout.LOG_HEAD), tmp_path / "missing"):
        os.symlink(target, path_of(store))
        verify_refused(store, NAME, "symbolic_link")
        os.unlink(path_of(store))
    store.close()


@pytest.mark.usefixtures("no_leaks")
def test_symbolic_link_to_a_folder(store: LocalStore, tmp_path: Path) -> None:
    """A linked folder is refused at any level, for reading and for writing, and is not followed by a listing."""
    outside = tmp_path / "outside"
    (outside / A).mkdir(parents=True)
    (outside / A / "0-0.seg").write_bytes(b"secret")
    for level, target in (("segments/" + A, outside / A), ("segments", outside)):
        link = path_of(store, level)
        shutil.rmtree(link)
        os.symlink(target, link)
        verify_refused(store, NAME, "symbolic_link")
        assert NAME not in [item.name for item in store.list()]
        with pytest.raises(IntegrityError) as caught:
            store.create(layout.segment(A, 0, 1), b"written outside")
        assert caught.value.kind == "symbolic_link"
        with pytest.raises(IntegrityError):
            store.delete(NAME)
        os.unlink(link)
        link.mkdir()
    assert os.listdir(outside / A) == ["0-0.seg"]
    store.close()


def test_links_in_place_of_tmp_and_names(store: LocalStore, tmp_path: Path) -> None:
    """A linked tmp/ is refused, and neither create nor overwrite writes through a linked name."""
    os.rmdir(path_of(store, "tmp"))
    os.symlink(tmp_path, path_of(store, "tmp"))
    with pytest.raises(IntegrityError):
        store.create(NAME, b"x")
    os.unlink(path_of(store, "tmp"))
    os.symlink(tmp_path / "secret", path_of(store))
    with pytest.raises(CommitConflictError):
        store.create(NAME, b"x")
    os.symlink(tmp_path / "secret", path_of(store, layout.LOG_HEAD))
    store.overwrite(layout.LOG_HEAD, b"new head")
    assert store.read(layout.LOG_HEAD, 100) == b"new head"
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_delete_removes_the_link_and_not_its_target(store: LocalStore, tmp_path: Path) -> None:
    """Deleting a linked name removes the link only."""
    os.symlink(tmp_path / "secret", path_of(store))
    store.delete(NAME)
    assert not os.path.lexists(path_of(store))
    assert (tmp_path / "secret").read_bytes() == b"secret"


@pytest.mark.usefixtures("no_leaks")
def test_fifo_does_not_block(store: LocalStore) -> None:
    """A pipe without a writer is refused at once instead of being waited for."""
    os.mkfifo(path_of(store))
    verify_refused(store, NAME, "not_a_file")
    assert [item.name for item in store.list()] == [NAME]
    store.close()


def test_socket(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket is refused."""
    monkeypatch.chdir(path_of(store).parent)  # a socket's name must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path_of(store).name)
    verify_refused(store, NAME, "not_a_file")


def test_device(store: LocalStore) -> None:
    """A device that never ends is refused unread."""
    try:
        os.mknod(path_of(store), stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("making a device needs privileges")
    try:
        open(path_of(store), "rb").close()
    except PermissionError:
        pytest.skip("devices cannot be opened on this file system")
    verify_refused(store, NAME, "not_a_file")


def test_folder_where_a_file_is_expected(store: LocalStore) -> None:
    """A folder under a file's name is refused for reading; creating there is a conflict; overwriting a StoreError."""
    path_of(store).mkdir()
    verify_refused(store, NAME, "not_a_file")
    with pytest.raises(CommitConflictError):
        store.create(NAME, b"x")
    with pytest.raises(StoreError):
        store.overwrite(NAME, b"x")
    with pytest.raises(StoreError):
        store.delete(NAME)
    assert os.listdir(path_of(store, "tmp")) == []


def test_hard_link_is_fine(store: LocalStore, tmp_path: Path) -> None:
    """A hard link is a file like any other: backups and ``cp -al`` make them."""
    os.link(tmp_path / "secret", path_of(store))
    assert store.read(NAME, 100) == b"secret"
    assert store.size(NAME) == 6


def test_unpublished_files_cannot_be_asked_for(store: LocalStore) -> None:
    """A name in tmp/ is as good as absent for readers, although the file is there."""
    (path_of(store, "tmp") / ("0" * 32)).write_bytes(b"half a file")
    assert store.size("tmp/" + "0" * 32) is None
    assert list(store.list()) == []
    assert list(store.list("tmp")) == []


def test_folders_without_end(store: LocalStore) -> None:
    """Folders nested beyond any reason end a listing with a typed error, not with a full stack."""
    here = os.open(path_of(store, "segments"), os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        following = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = following
    os.close(here)
    begin = time.monotonic()
    with pytest.raises(CiuicError) as caught:
        list(store.list())
    assert caught.value.kind == "bad_name"
    assert time.monotonic() - begin < QUICKLY_S
    _remove_nested(path_of(store, "segments"))


def _remove_nested(folder: Path) -> None:
    """shutil.rmtree recurses, and so would pytest when it cleans up."""
    while (folder / "d").exists():
        inner = folder / "d" / "d"
        if inner.exists():
            os.rename(inner, folder / "e")
            os.rmdir(folder / "d")
            os.rename(folder / "e", folder / "d")
        else:
            os.rmdir(folder / "d")


def test_a_file_that_grows_while_it_is_read(store: LocalStore) -> None:
    """What the limit allows is the most that is ever returned, also when the size lies (as in /proc)."""
    liar = LocalStore("/proc/self")
    with pytest.raises(IntegrityError) as caught:
        liar.read("status", 10)
    assert caught.value.kind == "file_too_large"
    assert liar.size("status") == 0
    assert len(liar.read("status", 1 << 20)) > 100
    liar.close()

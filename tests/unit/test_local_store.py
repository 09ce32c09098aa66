"""LocalStore where the disk is the subject: what is synced in which order, and what failing places look like."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ciuic_async.errors import CiuicError, StoreError, UsageError
from ciuic_async.format import layout
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.resolve import resolve

A = "a" * 20

PUBLISH = f"""
import sys
from ciuic_async.errors import CiuicError
from ciuic_async.stores.local import LocalStore
store = LocalStore(sys.argv[1])
names = ["segments/{A}/0-0.seg", "segments/{A}/0-1.seg", "manifests/{A}/root.json"]
try:
    files = [store.begin(name) for name in names]
    for file in files:
        file.write(b"data of " + file.name.encode())
    store.publish(files)
    outcome = "published"
except CiuicError as error:
    outcome = f"{{type(error).__name__}} {{error.kind}} {{error.where}}"
sys.stderr.flush()
sys.stdout.write(outcome)
"""
NAMES = [f"segments/{A}/0-0.seg", f"segments/{A}/0-1.seg", f"manifests/{A}/root.json"]

pytestmark = pytest.mark.damages  # stores are filled with names here, not with chains


def _strace(folder: Path, log: Path, calls: str, *options: str) -> tuple[str, list[str]]:
    """Run PUBLISH under strace: what it printed, and the calls that concern the chain, in order."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    command = [strace, "-f", "-y", "-o", str(log), "-e", f"trace={calls}", *options]
    probe = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"strace cannot trace here: {probe.stderr.strip()[-200:]}")
    done = subprocess.run(
        [*command, sys.executable, "-c", PUBLISH, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout, [line for line in log.read_text().splitlines() if str(folder) in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = LocalStore(tmp_path / "chain")
    store.initialize()
    store.close()
    return tmp_path / "chain"


# --- the order of durability ------------------------------------------------------------------------------------------


def test_publish_syncs_files_before_names_and_folders_after(folder: Path, tmp_path: Path) -> None:
    """Every file is fsynced before the first name appears, and every folder after its last name."""
    outcome, calls = _strace(folder, tmp_path / "log", "fsync,linkat")
    assert outcome == "published"
    links = [(number, call) for number, call in enumerate(calls) if "linkat(" in call]
    assert len(links) == len(NAMES)
    done = re.compile(r"fsync\(\d+<(.*?)>\)\s+= 0")
    synced = {match[1]: number for number, call in enumerate(calls) if (match := done.search(call))}
    files = [path for path in synced if "/tmp/" in path.removeprefix(str(folder.parent))]
    assert len(files) == len(NAMES)
    assert all(synced[path] < links[0][0] for path in files)
    for number, call in links:
        match = re.search(r'linkat\(\d+<[^>]*>, "[^"]*", \d+<([^>]*)>', call)
        assert match
        assert synced[match[1]] > number, f"{match[1]} is not synced after {call}"
    assert sum(f"<{folder}/segments/{A}>" in call and "fsync(" in call for call in calls) == 1, "one sync a folder"


def test_new_folders_are_durable_before_they_are_used(folder: Path, tmp_path: Path) -> None:
    """The parent of a folder made on the way is fsynced before anything gets a name in it."""
    _, calls = _strace(folder, tmp_path / "log", "mkdirat,fsync,linkat")
    made = [number for number, call in enumerate(calls) if "mkdirat(" in call]
    assert len(made) == 2
    for number in made:
        parent = re.search(r"mkdirat\(\d+<([^>]*)>", calls[number])
        assert parent
        assert re.search(rf"fsync\(\d+<{re.escape(parent[1])}>\)\s+= 0", calls[number + 1])


def test_initialize_syncs_every_folder_it_makes(tmp_path: Path) -> None:
    """The names of all folders made for a chain, ancestors included, are synced."""
    made: list[str] = []
    synced: list[str] = []
    chain = tmp_path / "one" / "two" / "chain"
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    script = "import sys; from ciuic_async.stores.local import LocalStore; LocalStore(sys.argv[1]).initialize()"
    log = tmp_path / "log"
    done = subprocess.run(
        [strace, "-f", "-y", "-o", str(log), "-e", "trace=fsync", sys.executable, "-c", script, str(chain)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr:
        pytest.skip("strace cannot trace here")
    synced = re.findall(r"fsync\(\d+<(.*?)>\)\s+= 0", log.read_text())
    made = [path for path, _, _ in os.walk(tmp_path / "one")]
    assert {str(Path(path).parent) for path in made} <= set(synced)


def test_a_failed_fsync_is_final(tmp_path: Path) -> None:
    """The first fsync of a publish fails, then the second, until a run passes: of files, folders and their parents.

    Each time: a StoreError of kind fsync_failed, no second fsync on that descriptor, no name where it was a file's,
    every name whole or absent, nothing left in tmp/.
    """
    failed = []
    for number in range(1, 30):
        store = LocalStore(tmp_path / f"chain{number}")
        store.initialize()
        folder = Path(store.url)
        fault = f"inject=fsync:error=EIO:when={number}"
        outcome, calls = _strace(folder, tmp_path / "log", "fsync,linkat", "-e", fault)
        for item in store.list():
            assert store.read(item.name, 1000) == b"data of " + item.name.encode()
        assert os.listdir(folder / "tmp") == []
        store.close()
        if outcome == "published":
            break
        assert outcome.startswith("StoreError fsync_failed ")
        at = next(n for n, call in enumerate(calls) if "(INJECTED)" in call)
        target = re.search(r"fsync\(\d+<(.*?)>\)", calls[at])
        assert target
        if "/tmp/" in target[1].removeprefix(str(tmp_path)):
            assert not [call for call in calls if "linkat(" in call]
        assert calls[at + 1 :] == []
        failed.append(target[1].removeprefix(str(folder)))
    assert outcome == "published"
    assert len([path for path in failed if path.startswith("/tmp/")]) == len(NAMES)
    assert {"/segments", f"/segments/{A}", "/manifests", f"/manifests/{A}"} <= set(failed)


def test_a_full_disk_says_what_helps(folder: Path, tmp_path: Path) -> None:
    """ENOSPC while writing is a StoreError of that kind, and nothing is left behind that would keep the disk full."""
    outcome, _ = _strace(folder, tmp_path / "log", "write", "-e", "inject=write:error=ENOSPC:when=1")
    assert outcome == f"StoreError enospc {NAMES[0]}"
    assert os.listdir(folder / "tmp") == []
    assert list(LocalStore(folder).list()) == []


# --- places that fail -------------------------------------------------------------------------------------------------


def _in_child(work: Callable[[], object]) -> str:
    """What ``work`` raised in a forked child, whose limits and user are its own: ``kind message``, or ``done``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            text = "done"
        except CiuicError as error:
            text = f"{error.kind} {error}"
        except BaseException as error:
            text = f"unexpected {error!r}"
        os.write(writer, text.encode()[:4000])
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as stream:
        return stream.read().decode()


def test_no_permission(folder: Path) -> None:
    """Without the right to write, creating is a StoreError of kind eacces that advises about owner and mode."""
    store = LocalStore(folder)
    store.create(layout.CHAIN_FILE, b"x")

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # the superuser may write everywhere
        else:
            os.chmod(folder / "tmp", 0o555)
        store.create(layout.slot(0), b"x")

    assert re.fullmatch(r"eacces .*00000000: Permission denied \(permission denied: check owner .*\)", _in_child(work))
    assert [item.name for item in store.list()] == [layout.CHAIN_FILE]


def test_reading_needs_no_permission_to_write(folder: Path) -> None:
    """A reader without the right to write reads, lists and sizes everything."""
    store = LocalStore(folder)
    store.create(layout.CHAIN_FILE, b"x")

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        assert store.read(layout.CHAIN_FILE, 10) == b"x"
        assert store.size(layout.CHAIN_FILE) == 1
        assert len(list(store.list())) == 1

    assert _in_child(work) == "done"


def test_a_file_larger_than_the_limit(folder: Path) -> None:
    """RLIMIT_FSIZE is a StoreError of kind efbig that names ulimit, and leaves nothing behind."""
    store = LocalStore(folder)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        store.create(layout.segment(A, 0, 0), bytes(1 << 20))

    assert re.match(r"efbig .*0-0\.seg: File too large .*ulimit -f", _in_child(work))
    assert list(store.list()) == []
    assert os.listdir(folder / "tmp") == []


def test_too_many_open_files(folder: Path) -> None:
    """Reaching RLIMIT_NOFILE is a StoreError of kind emfile that names ulimit; the store works again afterwards."""
    store = LocalStore(folder)

    def work() -> None:
        highest = max(int(number) for number in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, highest + 8))
        files = []
        try:
            while True:
                files.append(store.begin(layout.slot(len(files))))
        except StoreError:
            for file in files:
                file.discard()
            store.create(layout.slot(0), b"works again")
            raise

    assert re.match(r"emfile .*ulimit -n", _in_child(work))
    assert store.read(layout.slot(0), 100) == b"works again"


@pytest.mark.parametrize("place", ["/proc/ciuic-chain", "/sys/ciuic-chain", "/dev/null/chain"])
def test_places_where_no_folder_can_be(place: str) -> None:
    """Where no folder can be made, initialize is a StoreError with the place and an advice, never NotFoundError."""
    with pytest.raises(StoreError) as caught:
        LocalStore(place).initialize()
    assert caught.value.kind in ("enoent", "eperm", "eacces", "erofs", "enotdir")
    assert place in str(caught.value)


def test_a_file_where_a_folder_is_expected(tmp_path: Path, folder: Path) -> None:
    """A file in place of the chain, of a parent, or of a folder inside is a StoreError of kind enotdir."""
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/chain"):
        with pytest.raises(StoreError) as caught:
            LocalStore(tmp_path / place).initialize()
        assert caught.value.kind == "enotdir"
    os.rmdir(folder / "segments")
    (folder / "segments").write_bytes(b"precious")
    for call in (
        lambda: LocalStore(folder).create(layout.segment(A, 0, 0), b"x"),
        lambda: LocalStore(folder).read(layout.segment(A, 0, 0), 10),
        lambda: LocalStore(folder).initialize(),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.kind == "enotdir"
    assert (folder / "segments").read_bytes() == b"precious"


def test_a_folder_renamed_while_open(folder: Path, tmp_path: Path) -> None:
    """Renaming the chain's folder harms no open store: what it writes and reads is in the renamed folder."""
    store = LocalStore(folder)
    store.create(layout.slot(0), b"before")
    os.rename(folder, tmp_path / "renamed")
    folder.mkdir()
    store.create(layout.slot(1), b"after")
    assert store.read(layout.slot(0), 10) == b"before"
    assert (tmp_path / "renamed" / layout.slot(1)).read_bytes() == b"after"
    assert os.listdir(folder) == []


def test_a_folder_removed_while_open(folder: Path) -> None:
    """Writing into a chain whose folder was removed is a StoreError, and makes no new folder in its place."""
    store = LocalStore(folder)
    store.create(layout.slot(0), b"before")
    shutil.rmtree(folder)
    with pytest.raises(StoreError) as caught:
        store.create(layout.slot(1), b"after")
    assert caught.value.kind == "enoent"
    assert not folder.exists()


def test_an_unpublished_file_that_was_swept(folder: Path) -> None:
    """Publishing a file whose temporary name is gone is a StoreError; nothing gets the name."""
    store = LocalStore(folder)
    file = store.begin(layout.slot(0))
    for path in (folder / "tmp").iterdir():
        path.unlink()
    with pytest.raises(StoreError) as caught:
        store.publish([file])
    assert (caught.value.kind, caught.value.where) == ("enoent", layout.slot(0))
    assert store.size(layout.slot(0)) is None


# --- what lies around -------------------------------------------------------------------------------------------------


def test_sweep_takes_old_unpublished_files_only(folder: Path) -> None:
    """Files in tmp/ older than the limit go, younger ones and folders stay."""
    store = LocalStore(folder)
    young = store.begin(layout.slot(0))
    for name in ("0" * 32, "1" * 32):
        (folder / "tmp" / name).write_bytes(b"left by a crash")
        os.utime(folder / "tmp" / name, (1, 1))
    (folder / "tmp" / "folder").mkdir()
    os.utime(folder / "tmp" / "folder", (1, 1))
    assert store.sweep_unpublished(3600.0) == 2
    assert store.sweep_unpublished(3600.0) == 0
    store.publish([young])
    assert os.listdir(folder / "tmp") == ["folder"]
    assert store.size(layout.slot(0)) == 0


def test_sweep_tells_dead_writers_from_living_ones(folder: Path) -> None:
    """However old, the file of a living writer stays; that of one killed on this machine goes after a minute."""
    store = LocalStore(folder)
    living = store.begin(layout.slot(0))
    program = f"""
import os, signal
from ciuic_async.stores.local import LocalStore
file = LocalStore({str(folder)!r}).begin({layout.slot(1)!r})
file.write(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -signal.SIGKILL
    assert len(os.listdir(folder / "tmp")) == 2
    assert store.sweep_unpublished(3600.0) == 0
    long_ago = time.time() - 120
    for name in os.listdir(folder / "tmp"):
        os.utime(folder / "tmp" / name, (long_ago, long_ago))
    assert store.sweep_unpublished(3600.0) == 1
    assert store.sweep_unpublished(0.0) == 0
    store.publish([living])
    assert os.listdir(folder / "tmp") == []


def test_a_dropped_file_cleans_up_after_itself(folder: Path) -> None:
    """An unpublished file that nobody holds any more leaves nothing in tmp/."""
    store = LocalStore(folder)
    store.begin(layout.slot(0)).write(b"x")
    assert os.listdir(folder / "tmp") == []


def test_a_forked_copy_takes_nothing_away(folder: Path) -> None:
    """A child that inherits an unpublished file by fork may drop it; the parent still publishes it."""
    store = LocalStore(folder)
    file = store.begin(layout.slot(0))
    file.write(b"parent's")
    assert _in_child(file.discard) == "done"
    store.publish([file])
    assert store.read(layout.slot(0), 100) == b"parent's"


def test_descriptors_do_not_reach_other_programs(folder: Path) -> None:
    """No descriptor of an open store is inherited by a program that is started meanwhile."""
    store = LocalStore(folder)
    file = store.begin(layout.slot(0))
    script = "import os, json; print(json.dumps([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')\
 if os.path.exists(f'/proc/self/fd/{n}')]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, close_fds=False)
    assert not [target for target in json.loads(done.stdout) if str(folder) in target]
    file.discard()


def test_a_snapshot_folder_goes_with_its_last_file(folder: Path) -> None:
    """Deleting the last segment of a snapshot removes its folder, and never the folder of all segments."""
    store = LocalStore(folder)
    for number in (0, 1):
        store.create(layout.segment(A, 0, number), b"x")
    store.create(layout.locator(A, 0), b"x")
    store.delete(layout.segment(A, 0, 0))
    assert os.listdir(folder / "segments") == [A]
    store.delete(layout.segment(A, 0, 1))
    store.delete(layout.locator(A, 0))
    assert os.listdir(folder / "segments") == []
    assert os.listdir(folder / "locators") == []


def test_opening_creates_nothing(tmp_path: Path) -> None:
    """Looking at a place that is not there leaves it not there."""
    store = LocalStore(tmp_path / "absent")
    assert store.size(layout.CHAIN_FILE) is None
    assert list(store.list()) == []
    assert store.sweep_unpublished(0.0) == 0
    assert not (tmp_path / "absent").exists()


# --- what a user types ------------------------------------------------------------------------------------------------


def test_resolve_paths_and_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, a path object, ``~`` and file URLs (percent-decoded) name the folder they mean."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/demo").url == str(tmp_path / "runs/demo")
    assert resolve(tmp_path / "x").url == str(tmp_path / "x")
    assert resolve("~/x").url == str(tmp_path / "x")
    assert resolve("file:///a%20b/c").url == "/a b/c"
    assert resolve("FILE://localhost/a").url == "/a"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "url",
    ["", "a\0b", "ftp://host/x", "smb://n/x", "file://", "file://host/x", "file://rel/x", "file:///a#b", "file:///a?b",
     "file:///a%00b", "file://[/x"],
)  # fmt: skip
def test_resolve_refuses_what_it_cannot_mean(url: str) -> None:
    """Unknown schemes and URLs that name no local absolute path are a UsageError, never a guess."""
    with pytest.raises(UsageError):
        resolve(url)

"""``ciuic doctor``: what it finds in good places and in places that lie, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async.cli import doctor, doctor_disk
from ciuic_async.cli.doctor_finding import Finding
from ciuic_async.cli.doctor_store import Trial, leftovers, look
from ciuic_async.cli.main import main
from ciuic_async.errors import CommitConflictError, StoreError
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.stores.base import Capabilities, Listed, Unpublished
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore

SIZE_BYTES = 2 << 20


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without configuration, and no variable of ours."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in [name for name in os.environ if name.startswith("CIUIC_")]:
        monkeypatch.delenv(name)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", "--size", "1MiB", *arguments])
    return code, json.loads(capsys.readouterr().out)


def _texts(data: dict[str, Any]) -> dict[str, tuple[bool | None, str]]:
    return {finding["name"]: (finding["ok"], finding["text"]) for finding in data["findings"]}


def _by_name(findings: Sequence[Finding]) -> dict[str, bool | None]:
    return {finding.name: finding.ok for finding in findings}


def _listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- good places ------------------------------------------------------------------------------------------------------


def test_a_store_in_memory_passes_every_check_and_is_left_empty() -> None:
    """Nothing of the trial needs more than the protocol."""
    store = MemoryStore()
    findings = Trial(store, SIZE_BYTES).run()
    assert _by_name(findings) == dict.fromkeys(
        ("create once", "race", "overwrite", "list", "delete", "commit", "read small", "write", "read", "clock"), True
    )
    assert list(store.list()) == []


@pytest.mark.usefixtures("no_leaks")
def test_a_local_place_is_tried_and_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every finding of a good disk is good, and the folder that would be made is not there afterwards."""
    before = _listing(tmp_path)
    code, data = _run(capsys, str(tmp_path / "later" / "chain"))
    assert (code, data["ok"]) == (0, True)
    assert {"reachable", "file system", "free space", "create once", "commit", "read"} <= set(_texts(data))
    assert _listing(tmp_path) == before


def test_a_chain_is_tried_where_its_readers_do_not_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial in a chain lies in tmp/: verify finds nothing while it runs, and nothing is left after it."""
    place = tmp_path / "chain"
    ciuic_async.save({"a": torch.arange(10)}, place)
    before = _listing(place)
    seen: list[bool] = []

    def run(self: Trial) -> list[Finding]:
        with ciuic_async.SnapshotChain(place, create=False) as chain:
            seen.append(chain.verify().ok and chain.gc(orphan_age_s=0.0).deleted_files == 0)
        return original(self)

    original = Trial.run
    monkeypatch.setattr(Trial, "run", run)
    code, data = _run(capsys, str(place))
    assert (code, seen) == (0, [True])
    assert data["forecast"]["snapshots"] == 1
    assert _listing(place) == before


# --- places that lie, or fail -----------------------------------------------------------------------------------------


class Overwriting(MemoryStore):
    """Takes a second writer of a name, and says nothing."""

    def create(self, name: str, data: Buffer) -> None:
        self.overwrite(name, data)


class Looking(MemoryStore):
    """Looks first and writes then: of two at once both win."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def create(self, name: str, data: Buffer) -> None:
        if len(bytes(data)) == 16:  # the race
            self.overwrite(name, data)
        else:
            super().create(name, data)


class Swallowing(MemoryStore):
    """Says that a name is taken, and takes the second content all the same."""

    def create(self, name: str, data: Buffer) -> None:
        taken = self.size(name) is not None
        self.overwrite(name, data)
        if taken:
            raise CommitConflictError(f"{name}: exists already")


class Modest(MemoryStore):
    """Knows of itself that it does not order writers."""

    capabilities = Capabilities(orders_writers=False)


class Stale(MemoryStore):
    """Reads the log head as it was first."""

    def read(self, name: str, limit_bytes: int) -> bytes:
        data = super().read(name, limit_bytes)
        return b"one" if name == layout.LOG_HEAD else data


class Blind(MemoryStore):
    """Lists nothing."""

    def list(self, prefix: str = "") -> Iterator[Listed]:
        return iter(())


class Keeping(MemoryStore):
    """Deletes nothing, and says nothing."""

    def delete(self, name: str) -> None:
        pass


class Corrupting(MemoryStore):
    """Gives back other bytes than it took."""

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        super().read_into(name, offset_bytes, buffer)
        buffer[0] ^= 1


class Late(MemoryStore):
    """Lives in another hour."""

    def now_s(self) -> float:
        return super().now_s() - 3600.0


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Overwriting, {"create once", "race"}),
        (Looking, {"race"}),
        (Swallowing, {"create once", "race"}),
        (Modest, {"create once"}),
        (Stale, {"overwrite"}),
        (Blind, {"list"}),
        (Keeping, {"delete"}),
        (Corrupting, {"read"}),
        (Late, {"clock"}),
    ],
)
def test_a_place_that_lies_is_found_out(kind: Callable[[], MemoryStore], found: set[str]) -> None:
    """Each lie is a finding of its own, and no other check falls over it."""
    findings = Trial(kind(), SIZE_BYTES).run()
    assert {finding.name for finding in findings if finding.ok is False} == found
    assert len(findings) >= 10


class Failing(MemoryStore):
    """Fails at one kind of call."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "__dict__").get("call"):

            def fail(*_: object) -> None:
                raise StoreError(f"{name}: not today", kind="access_denied")

            return fail
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("call", ["overwrite", "list", "begin", "publish", "read_into", "now_s", "delete", "size"])
def test_a_call_that_is_not_allowed_is_a_finding_and_the_others_go_on(call: str) -> None:
    """A missing permission is named with the place's own words."""
    findings = Trial(Failing(call), SIZE_BYTES).run()
    failed = [finding for finding in findings if finding.ok is False]
    assert any(f"{call}: not today" in finding.text for finding in failed)
    assert {"create once", "race", "commit"} <= {finding.name for finding in findings if finding.ok}


def test_a_place_that_takes_nothing_says_what_was_not_checked() -> None:
    """Where nothing can be created, one finding has the reason and the names of the checks that need it."""
    (finding,) = Trial(Failing("create"), SIZE_BYTES).run()
    assert finding.ok is False
    assert "not today" in finding.text
    assert "not checked: create once" in finding.text


def test_what_cannot_be_removed_is_named() -> None:
    """Leftovers are told of, with how many there are."""
    store = Failing("delete")
    findings = Trial(store, SIZE_BYTES).run()
    left = next(finding for finding in findings if finding.name == "cleaned up")
    assert left.ok is False
    assert "log/commit/00000000000000000000" in left.text
    assert "more below memory://" in left.text


class Interrupting(LocalStore):
    """Ctrl-C in the middle of the large file."""

    def publish(self, files: Sequence[Unpublished]) -> None:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("no_leaks")
def test_nothing_is_left_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted while the large file is written: exit code 130, and nothing of the trial is there."""
    before = _listing(tmp_path)
    monkeypatch.setattr(doctor, "LocalStore", Interrupting)
    monkeypatch.setattr(doctor, "resolve", Interrupting)
    assert main(["doctor", str(tmp_path / "chain")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert _listing(tmp_path) == before


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_after_being_told_to_leave(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``timeout``, or the end of a container: the usual exit code, nothing is left, handlers as before."""

    class Told(LocalStore):
        def publish(self, files: Sequence[Unpublished]) -> None:
            os.kill(os.getpid(), number)
            super().publish(files)

    before = _listing(tmp_path)
    monkeypatch.setattr(doctor, "LocalStore", Told)
    monkeypatch.setattr(doctor, "resolve", Told)
    handler = signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored, and then it stays ignored
    try:
        with pytest.raises(SystemExit) as left:
            main(["doctor", str(tmp_path / "chain")])
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        assert main(["doctor", str(tmp_path / "chain")]) == 0, "who has it ignored is not told to leave"
    finally:
        signal.signal(number, handler)
    assert left.value.code == 128 + number
    assert _listing(tmp_path) == before


def test_a_name_that_no_folder_can_have_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the system does not even look up, such as a name that is too long, ends in an answer."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ("x" * 300)))
    code, data = _run(capsys, str(tmp_path / ("y" * 300)))
    assert code == 1
    assert _texts(data)["reachable"][0] is False
    assert "signing key" in _texts(data)


def test_nothing_is_left_in_a_remote_place_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is no folder is cleaned name by name."""

    class Interrupted(MemoryStore):
        def publish(self, files: Sequence[Unpublished]) -> None:
            super().publish(files)
            raise KeyboardInterrupt

    store = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        Trial(store, SIZE_BYTES).run()
    assert list(store.list()) == []


def test_a_remote_place_is_tried_below_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial of a URL has a place of its own under tmp/, beside whatever is there."""
    stores: dict[str, MemoryStore] = {}
    monkeypatch.setattr(doctor, "resolve", lambda url: stores.setdefault(url, MemoryStore()))
    code, data = _run(capsys, "s3://bucket/runs/a/")
    assert code == 0
    outer, inner = stores
    assert outer == "s3://bucket/runs/a/"
    assert inner.startswith("s3://bucket/runs/a/tmp/")
    assert all(list(store.list()) == [] for store in stores.values())
    assert "AbortIncompleteMultipartUpload" in _texts(data)["leftovers"][1]
    assert leftovers("az://container/a") is None


def test_an_unreachable_place_is_one_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is tried where nobody answers."""
    monkeypatch.setattr(doctor, "resolve", lambda url: Failing("read"))
    code, data = _run(capsys, "s3://bucket/runs/a")
    assert code == 1
    assert _texts(data)["reachable"] == (False, "read: not today")
    assert "create once" not in _texts(data)
    assert _by_name(list(look(MemoryStore()))) == {"reachable": True, "chain": None}


# --- what may not be written ------------------------------------------------------------------------------------------


def test_a_chain_that_may_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chain whose folders this user may not write to: named, with what was not checked; --read-only is content."""
    place = tmp_path / "chain"
    ciuic_async.save({"a": 1}, place)
    before = _listing(place)
    closed = str(place / "log" / "commit")
    access = os.access  # this user may be root, whom no mode stops
    monkeypatch.setattr(doctor_disk.os, "access", lambda path, mode: str(path) != closed and access(path, mode))
    code, data = _run(capsys, str(place))
    assert code == 1
    assert _texts(data)["write"][0] is False
    assert closed in _texts(data)["write"][1]
    assert "Not checked: create once" in _texts(data)["write"][1]
    code, data = _run(capsys, str(place), "--read-only")
    assert code == 0
    assert _texts(data)["chain"][0] is True
    assert _listing(place) == before


def test_a_home_that_may_only_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no key can be kept, doctor says so and how to give one, and is content otherwise."""
    (tmp_path / "file").touch()  # no folder can be made here, by root neither
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file" / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "state"))
    code, data = _run(capsys, str(tmp_path))
    assert code == 0
    assert "CIUIC_KEY" in _texts(data)["signing key"][1]


def test_a_small_disk_is_not_filled_by_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With little room the trial takes a quarter of it at most, and doctor says what helps."""
    real = os.statvfs

    def small(path: Any) -> os.statvfs_result:
        found = list(real(path))
        found[0] = found[1] = 4096
        found[3] = found[4] = 1500  # 6 MB
        found[7] = 999
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", small)
    code = main(["doctor", str(tmp_path), "--json"])
    texts = _texts(json.loads(capsys.readouterr().out))
    assert code == 1
    assert texts["free space"] == (False, "6.1 MB of " + texts["free space"][1].partition(" of ")[2])
    assert "prune" in texts["free space"][1]
    assert texts["free inodes"][0] is False
    assert "one file of 1.0 MB" in texts["write"][1]


def test_the_file_system_is_named() -> None:
    """By the mount that is nearest; what is memory, a container's own or far away is told of."""
    assert doctor_disk._kind(Path("/proc/self")) == "proc"
    assert "memory" in doctor_disk._describe("tmpfs")
    assert "container" in doctor_disk._describe("overlay")
    assert "network" in doctor_disk._describe("nfs4")
    assert doctor_disk._describe("ext4") == "ext4"


# --- configuration and usage ------------------------------------------------------------------------------------------


def test_config_shows_value_and_origin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option with where it comes from, for people and as data; secrets are not among it."""
    Path("ciuic.toml").write_text('every_seconds = "10m"\nfrozen = ["a.*"]\n')
    monkeypatch.setenv("CIUIC_KEEP", "latest=3 | best=loss")
    monkeypatch.setenv("CIUIC_KEY", "ED25519-SECRET+CANARY")
    monkeypatch.setenv("CIUIC_ORDERING", "etcd://me:CANARY@host:2379")
    assert main(["doctor", "--config"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["every_seconds"].endswith("file ciuic.toml:1")
    assert "latest=3 | best=loss" in lines["keep"]
    assert lines["keep"].endswith("environment CIUIC_KEEP")
    assert lines["codec"].endswith("default")
    code, data = _run(capsys, "--config")
    options = {option["name"]: option for option in data["options"]}
    assert code == 0
    assert (options["every_seconds"]["value"], options["every_seconds"]["written"]) == ("600", "10m")
    assert options["rng"]["value"] == "true"
    assert "CANARY" not in out + json.dumps(data)


def test_config_lists_every_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong configuration is exit code 1 and one finding each; doctor itself goes on."""
    Path("ciuic.toml").write_text("every_step = 1\nrng = 2\n")
    monkeypatch.setenv("CIUIC_CODEC", "zip")
    monkeypatch.setenv("CIUIC_STAGNG", "auto")
    code, data = _run(capsys)
    problems = [f["text"] for f in data["findings"] if f["name"] == "configuration"]
    assert code == 1
    assert len(problems) == 5
    assert all(
        any(word in text for text in problems) for word in ("every_step'", "rng", "CIUIC_CODEC", "CIUIC_STAGING")
    )


@pytest.mark.parametrize(
    "arguments", [["--size", "lots"], ["--size", "1TB"], ["--forecast", "12GB"], ["--forecast", "big", "."]]
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A size that is none, too much, or a forecast of no place: exit code 2."""
    assert main(["doctor", *arguments]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_named_pipe_as_place_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no folder is a finding."""
    os.mkfifo(tmp_path / "pipe")
    code, _ = _run(capsys, str(tmp_path / "pipe"))
    assert code == 1
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

"""The mirror: a copy behind the commits that can be verified alone, heals what is damaged here, and brings it home."""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ciuic_async
from ciuic_async import Checkpointer, CiuicWarning, IntegrityError, KeepLatest, SnapshotChain, StoreError, UsageError
from ciuic_async import chain as chain_module
from ciuic_async.cli.main import main
from ciuic_async.format import layout
from ciuic_async.format.digest import Buffer
from ciuic_async.mirroring import mirror as mirror_module
from ciuic_async.stores.base import Store
from ciuic_async.stores.local import LocalStore
from ciuic_async.stores.memory import MemoryStore
from ciuic_async.stores.resolve import resolve as real_resolve
from ciuic_async.verify import verify_store
from tests.crash.faults import same, state_at

WAIT_S = 30.0


def mirrored(tmp_path: Path, **options: Any) -> SnapshotChain:
    """The chain that all tests here write, with a folder as its mirror."""
    return SnapshotChain(tmp_path / "chain", mirror=tmp_path / "mirror", **options)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a chain by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def essence(folder: Path) -> dict[str, bytes]:
    """The same without partial tiles of earlier sizes, which a mirror that was behind never had."""
    return essence_of(files(folder))


def essence_of(found: dict[str, bytes]) -> dict[str, bytes]:
    """See ``essence``."""
    return {name: data for name, data in found.items() if ".p/" not in name}


def save(chain: SnapshotChain, *steps: int) -> None:
    """Save and wait until the mirror has it."""
    for step in steps:
        ciuic_async.save(state_at(step), chain).wait_replicated(WAIT_S)


def flip(path: Path, at: int) -> None:
    """Change one bit of a file that the chain has made read-only."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def lose(folder: Path) -> None:
    """The disk with the chain is gone."""
    shutil.rmtree(folder)


# --- copying ----------------------------------------------------------------------------------------------------------


def test_the_mirror_is_the_chain_byte_for_byte(tmp_path: Path) -> None:
    """After a flush every file of the chain is in the mirror with the same bytes, and nothing else is.

    But for partial tiles of earlier sizes: where the mirror lagged it never had a head that needed them.
    """
    with mirrored(tmp_path) as chain:
        save(chain, 1, 2, 3)
        chain.tag("good", "latest")
        chain.note("a remark")
        chain.mirror and chain.mirror.wait(len(chain.log()), WAIT_S)
    here, there = files(tmp_path / "chain"), files(tmp_path / "mirror")
    size = len(SnapshotChain(tmp_path / "chain", create=False).log())
    earlier = {name for name in here if ".p/" in name and not name.endswith(f".p/{size}")}
    assert there == {name: data for name, data in here.items() if name in there or name not in earlier}
    with SnapshotChain(tmp_path / "mirror", create=False) as copy:
        assert copy.verify().ok
        assert same(copy.get("good").load(), state_at(3))


def test_training_replicates_behind_it(tmp_path: Path) -> None:
    """``flush(replicated=True)`` waits for the mirror; statistics say how long that took."""
    model = torch.nn.Linear(40, 40)
    chain = mirrored(tmp_path)
    with Checkpointer(chain, {"model": model}, every_steps=1, keep=KeepLatest(2)) as ckpt:
        for _ in range(4):
            with torch.no_grad():
                model.weight += 1
            ckpt.step()
        pending = ckpt.save()
        assert pending.wait_replicated(WAIT_S).replicated
        ckpt.flush(WAIT_S, replicated=True)
        assert all(snapshot.replicated for snapshot in chain)
        stats = ckpt.stats()
        assert stats[-1].replicated_s is not None
        assert stats[-1].replicated_s >= 0
    chain.close()
    assert essence(tmp_path / "mirror") == essence(tmp_path / "chain")


def test_an_existing_chain_gets_a_mirror(tmp_path: Path) -> None:
    """A chain with a past, some of it pruned, is copied whole; what was pruned before is not missed."""
    with SnapshotChain(tmp_path / "chain") as chain:
        for step in range(1, 6):
            ciuic_async.save(state_at(step), chain)
            chain.prune(KeepLatest(2))
    with mirrored(tmp_path) as chain:
        assert chain.mirror is not None
        chain.mirror.wait(len(chain.log()), WAIT_S)
        assert [snapshot.replicated for snapshot in chain] == [True, True]
    assert verify_store(LocalStore(tmp_path / "mirror")).problems == ()
    assert essence(tmp_path / "mirror") == essence(tmp_path / "chain")


def test_retention_reaches_the_mirror(tmp_path: Path) -> None:
    """Files go there once the prune entry is there, what was moved out of dying segments is there before."""
    fixed = torch.arange(50_000)
    with mirrored(tmp_path) as chain:
        for step in range(4):
            state = {"fixed": fixed, "moving": torch.full((200_000,), float(step))}
            ciuic_async.save(state, chain).wait_replicated(WAIT_S)
        report = chain.prune(KeepLatest(1))
        assert report.pruned
        assert chain.mirror is not None
        chain.mirror.wait(len(chain.log()), WAIT_S)
    here, there = files(tmp_path / "chain"), files(tmp_path / "mirror")
    assert {name for name in there if layout.owner(name)} == {name for name in here if layout.owner(name)}
    assert any(layout.locator_generation(name) for name in there)
    with SnapshotChain(tmp_path / "mirror", create=False) as copy:
        latest = copy.latest()
        assert latest is not None
        assert same(latest.load(), {"fixed": fixed, "moving": torch.full((200_000,), 3.0)})


def test_a_mirror_is_of_one_chain(tmp_path: Path) -> None:
    """Another chain's mirror is refused before anything is written to either."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    before = files(tmp_path / "mirror")
    with SnapshotChain(tmp_path / "other") as other:
        ciuic_async.save(state_at(1), other)
    with pytest.raises(UsageError) as refused:
        SnapshotChain(tmp_path / "other", mirror=tmp_path / "mirror")
    assert refused.value.kind == "mirror_of_another"
    assert files(tmp_path / "mirror") == before


def test_a_chain_is_not_its_own_mirror(tmp_path: Path) -> None:
    """One place under two names is refused."""
    (tmp_path / "link").symlink_to(tmp_path / "chain")
    for place in (tmp_path / "chain", tmp_path / "link", f"file://{tmp_path}/chain"):
        with pytest.raises(UsageError) as refused:
            SnapshotChain(tmp_path / "chain", mirror=place)
        assert refused.value.kind == "mirror_is_chain"


def test_closing_training_lets_the_mirror_have_everything(tmp_path: Path) -> None:
    """Nobody has to remember a flush: after ``close`` of the checkpointer the mirror has its last snapshot."""
    chain = mirrored(tmp_path)
    with Checkpointer(chain, {"t": torch.ones(3)}) as ckpt:
        ckpt.save()
    assert len(SnapshotChain(tmp_path / "mirror", create=False)) == 1
    chain.close()


def test_a_forked_child_leaves_the_mirror_alone(tmp_path: Path) -> None:
    """A child of a data loader copies nothing, waits for nothing and ends at once; the parent goes on."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
        mirror = chain.mirror
        assert mirror is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: this process has threads, on purpose
            child = os.fork()
        if child == 0:  # no exception may leave this block: it would run the tests again
            try:
                mirror.notice(99)
                mirror.close()
                os._exit(0 if mirror._log_size < 99 and mirror._closing_s is None else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        save(chain, 2)


def test_what_the_mirror_lost_is_sent_again(tmp_path: Path) -> None:
    """The next process looks at all that should be there: files that are gone or cut off arrive again."""
    with mirrored(tmp_path) as chain:
        save(chain, 1, 2)
    whole = files(tmp_path / "mirror")
    segments = sorted((tmp_path / "mirror" / "segments").rglob("*.seg"))
    segments[0].unlink()
    segments[1].chmod(0o644)
    segments[1].write_bytes(segments[1].read_bytes()[:-5])
    (tmp_path / "mirror" / layout.slot(0)).unlink()
    next((tmp_path / "mirror" / "manifests").rglob("root.json")).unlink()
    with mirrored(tmp_path) as chain:
        assert chain.mirror is not None
        assert not all(snapshot.replicated for snapshot in chain)
        chain.mirror.wait(chain.log_size, WAIT_S)
    assert files(tmp_path / "mirror") == whole


# --- forks ------------------------------------------------------------------------------------------------------------


@pytest.mark.damages
def test_a_fork_is_loud_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot with other bytes over there stops the copying for good, with evidence; snapshots stay durable."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    shutil.copytree(tmp_path / "mirror", tmp_path / "copy")
    # The other home: a copied folder is written to with a pin of its own.
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
        with SnapshotChain(tmp_path / "copy") as copy:
            ciuic_async.save(state_at(7), copy)
    with SnapshotChain(tmp_path / "chain") as alone:
        ciuic_async.save(state_at(2), alone)
    other = files(tmp_path / "copy")[layout.slot(2)]
    (tmp_path / "mirror" / layout.slot(2)).write_bytes(other)
    chain = mirrored(tmp_path)
    mirror = chain.mirror
    assert mirror is not None
    with Checkpointer(chain, {"t": torch.ones(3)}) as ckpt:
        first = ckpt.save().wait_durable(WAIT_S)
        with mirror._changed:
            assert mirror._changed.wait_for(lambda: mirror._stopped, WAIT_S)
        with pytest.warns(CiuicWarning, match="not replicated: .*holds other bytes"):
            ckpt.step()
        with pytest.raises(IntegrityError) as fork:
            first.wait_replicated(WAIT_S)
        assert fork.value.kind == "mirror_fork"
        assert fork.value.where == layout.slot(2)
        ckpt.step()  # told once
        assert not ckpt.save().wait_durable(WAIT_S).replicated
    assert mirror.status().stopped
    chain.close()
    evidence = list((tmp_path / "home" / "state" / "ciuic_async" / "evidence").glob("mirror-*"))
    assert [path.read_bytes() for path in evidence] == [other]
    with SnapshotChain(tmp_path / "chain", create=False) as own:
        assert len(own) == 4
        assert own.verify().ok


# --- healing and coming home ------------------------------------------------------------------------------------------


@pytest.mark.damages
@pytest.mark.parametrize("part", ["segments", "manifests", "locators"])
def test_damage_here_is_read_from_there(part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped bit in any data file costs one line in the log that names it; the values are right; verify still says
    what is damaged here."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    for path in (tmp_path / "chain" / part).rglob("*"):
        if path.is_file():
            flip(path, path.stat().st_size // 2)
    with mirrored(tmp_path) as chain:
        latest = chain.latest()
        assert latest is not None
        assert same(latest.load(), state_at(1))
        assert not chain.verify().ok
    named = [record for record in caplog.records if "not good here" in record.message]
    assert named
    assert all(f"{part}/" in record.message for record in named)


def test_what_was_healed_is_good_here_again(tmp_path: Path) -> None:
    """After it was read from the mirror, a damaged segment is replaced behind; the chain alone is whole again."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    before = files(tmp_path / "chain")
    for path in (tmp_path / "chain" / "segments").rglob("*.seg"):
        flip(path, path.stat().st_size // 2)
    with mirrored(tmp_path) as chain:
        latest = chain.latest()
        assert latest is not None
        assert same(latest.load(), state_at(1))
        wait_home(chain)
    assert files(tmp_path / "chain") == before


def wait_home(chain: SnapshotChain) -> None:
    """Until all segments are here."""
    assert chain.mirror is not None
    chain.mirror.notice(chain.log_size)
    chain.mirror.wait_home(WAIT_S)


def test_a_lost_chain_comes_home_and_goes_on(tmp_path: Path) -> None:
    """New machine, empty folder: the same three lines restore bit for bit and the same chain grows; then it is whole
    here without the mirror."""
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 30)
    with Checkpointer(mirrored(tmp_path), {"model": model}, every_steps=1) as ckpt:
        for _ in range(3):
            with torch.no_grad():
                model.weight.mul_(1.5)
            ckpt.step(epoch=0, batch="b")
        ckpt.flush(WAIT_S, replicated=True)
        origin = ckpt.chain.origin
        ckpt.chain.close()
    expected = model.weight.detach().clone()
    lose(tmp_path / "chain")

    again = torch.nn.Linear(30, 30)
    chain = mirrored(tmp_path)
    with Checkpointer(chain, {"model": again}, every_steps=1) as ckpt:
        progress = ckpt.restore()
        assert progress is not None
        assert (progress.step, progress.batch) == (3, "b")
        assert again.weight.equal(expected)
        ckpt.step()
        ckpt.flush(WAIT_S, replicated=True)
        assert [snapshot.step for snapshot in chain] == [1, 2, 3, 4]
        assert chain.origin == origin
        wait_home(chain)
    chain.close()
    assert essence(tmp_path / "mirror") == essence(tmp_path / "chain")


def test_new_snapshots_lean_on_nothing_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as old segments are in the mirror alone, durable means: everything that it needs is here."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    lose(tmp_path / "chain")
    monkeypatch.setattr(mirror_module.Homing, "turn", lambda self: None)
    with mirrored(tmp_path) as chain:
        new = ciuic_async.save(state_at(1), chain)
        segments = {segment.path for segment in new.resolve().segments}
        assert segments
        assert all(layout.owner(path) == new.id for path in segments)
        new.wait_replicated(WAIT_S)
    monkeypatch.undo()
    with mirrored(tmp_path) as chain:
        wait_home(chain)


def test_entries_that_were_lost_here_come_home(tmp_path: Path) -> None:
    """A folder restored from an old backup gets its newest entries back before anything is written."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    shutil.copytree(tmp_path / "chain", tmp_path / "backup")
    with mirrored(tmp_path) as chain:
        save(chain, 2)
    lose(tmp_path / "chain")
    shutil.move(tmp_path / "backup", tmp_path / "chain")
    with mirrored(tmp_path) as chain:
        latest = chain.latest()
        assert latest is not None
        assert same(latest.load(), state_at(2))
        save(chain, 3)
        wait_home(chain)
        assert len(chain) == 3
    assert essence(tmp_path / "mirror") == essence(tmp_path / "chain")


def test_a_mirror_whose_head_is_behind_comes_home_too(tmp_path: Path) -> None:
    """A copier died between slots and head: all entries come home, and the next writer makes the head."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    old = (tmp_path / "mirror" / layout.LOG_HEAD).read_bytes()
    with mirrored(tmp_path) as chain:
        save(chain, 2)
    (tmp_path / "mirror" / layout.LOG_HEAD).write_bytes(old)
    lose(tmp_path / "chain")
    with mirrored(tmp_path) as chain:
        with pytest.warns(CiuicWarning, match="log head is missing"):
            assert len(chain) == 2
        save(chain, 3)
        wait_home(chain)
    assert essence(tmp_path / "mirror") == essence(tmp_path / "chain")


def test_a_mirror_that_was_taken_back_is_refused_by_the_pin(tmp_path: Path) -> None:
    """The pin knows more than a mirror that was rolled back: nothing is brought home from it."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    shutil.copytree(tmp_path / "mirror", tmp_path / "old")
    with mirrored(tmp_path) as chain:
        save(chain, 2)
    lose(tmp_path / "chain")
    lose(tmp_path / "mirror")
    shutil.move(tmp_path / "old", tmp_path / "mirror")
    with pytest.raises(IntegrityError) as refused:
        mirrored(tmp_path)
    assert refused.value.kind == "pin_rollback"
    assert not (tmp_path / "chain" / layout.CHAIN_FILE).exists()


# --- places that fail -------------------------------------------------------------------------------------------------


class DeadStore(MemoryStore):
    """Answers nothing until it is revived."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = threading.Event()

    def _get(self, name: str) -> bytes:
        if not self.alive.is_set():
            raise StoreError(f"{name}: no answer", kind="unavailable", where=name)
        return super()._get(name)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> DeadStore:
    """What ``mirror="dead://"`` is."""
    store = DeadStore()
    resolve: Callable[[Any, Any], Store] = lambda url, _options: store if url == "dead://" else real_resolve(url)  # noqa: E731
    monkeypatch.setattr(chain_module, "resolve_store", resolve)
    return store


def test_a_dead_mirror_delays_nothing(dead: DeadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots become durable; the failure is told once; when the mirror is back everything is copied."""
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.01)
    with SnapshotChain(tmp_path / "chain") as first:
        ciuic_async.save(state_at(1), first)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chain = SnapshotChain(tmp_path / "chain", mirror="dead://")
        with Checkpointer(chain, {"t": torch.ones(3)}) as ckpt:
            pending = ckpt.save()
            snapshot = pending.wait_durable(WAIT_S)
            with pytest.raises(StoreError) as silent:
                ckpt.flush(replicated=True)
            assert silent.value.kind == "unavailable"
            assert not snapshot.replicated
            for _ in range(5):
                ckpt.step()
            dead.alive.set()
            ckpt.flush(WAIT_S, replicated=True)
            assert snapshot.replicated
        chain.close()
    assert len(told) <= 1
    assert verify_store(dead).problems == ()


class StuckStore(MemoryStore):
    """Takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def create(self, name: str, data: Buffer) -> None:
        self.reached.set()
        assert self.go.wait(WAIT_S)
        super().create(name, data)


def test_a_mirror_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Snapshots become durable while a call to the mirror hangs, and ``close`` waits no longer than it was given: it
    says what is not replicated."""
    store = StuckStore()
    resolve: Callable[[Any, Any], Store] = lambda url, _options: store if url == "stuck://" else real_resolve(url)  # noqa: E731
    monkeypatch.setattr(chain_module, "resolve_store", resolve)
    chain = SnapshotChain(tmp_path / "chain", mirror="stuck://")
    first = ciuic_async.save(state_at(1), chain)
    assert store.reached.wait(WAIT_S)
    ciuic_async.save(state_at(2), chain)
    assert len(chain) == 2
    with pytest.raises(TimeoutError, match="0 of 2 entries"):
        first.wait_replicated(0.01)
    assert chain.mirror is not None
    chain.mirror.close(0.01)
    assert "0 of 3 entries are replicated" in caplog.text
    store.go.set()
    chain.close()


def test_without_a_chain_a_mirror_that_does_not_answer_is_an_error(dead: DeadStore, tmp_path: Path) -> None:
    """Nobody knows whether there was a chain: making a new one beside it would be worse than not beginning."""
    with pytest.raises(StoreError, match="cannot be asked"):
        SnapshotChain(tmp_path / "chain", mirror="dead://")
    assert not (tmp_path / "chain").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and stdout of a command in this process."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def test_the_command_line_copies_tells_and_brings_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``ciuic mirror`` once, its status before and after, ``log`` and ``verify`` with a mirror, and the way home."""
    chain, mirror = tmp_path / "chain", tmp_path / "mirror"
    for step in (1, 2):
        ciuic_async.save(state_at(step), chain)
    assert run(capsys, "mirror", chain, mirror, "--status")[0] == 1
    code, out = run(capsys, "mirror", chain, mirror, "--once", "--read-back", "--json")
    assert code == 0
    assert json.loads(out)["replicated_size"] == 3
    assert run(capsys, "verify", chain, "--mirror", mirror)[0] == 0
    ciuic_async.save(state_at(3), chain)
    code, out = run(capsys, "mirror", chain, mirror, "--status", "--json")
    assert code == 1
    assert [row["replicated"] for row in json.loads(out)["snapshots"]] == [True, True, False]
    code, out = run(capsys, "log", chain, "--mirror", mirror)
    assert code == 0
    assert ["not replicated" in line for line in out.splitlines()] == [False, True, False, False]
    assert run(capsys, "verify", chain, "--mirror", mirror)[0] == 0  # behind is no damage
    assert run(capsys, "mirror", chain, mirror, "--once")[0] == 0
    assert run(capsys, "mirror", chain, mirror, "--status")[0] == 0
    before = files(chain)
    lose(chain)
    assert run(capsys, "mirror", chain, mirror, "--once")[0] == 3
    code, out = run(capsys, "mirror", chain, mirror, "--home", "--json")
    assert (code, json.loads(out)["missing"]) == (0, [])
    assert essence_of(files(chain)) == essence_of(before)


@pytest.mark.damages
def test_verify_of_a_mirror_finds_every_kind_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in the mirror's segment is exit code 4; so is the mirror of another history."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    segment = next((tmp_path / "mirror" / "segments").rglob("*.seg"))
    flip(segment, segment.stat().st_size // 2)
    assert run(capsys, "verify", tmp_path / "chain", "--mirror", tmp_path / "mirror")[0] == 4
    flip(segment, segment.stat().st_size // 2)
    assert run(capsys, "verify", tmp_path / "chain", "--mirror", tmp_path / "mirror")[0] == 0
    ciuic_async.save(state_at(1), tmp_path / "other")
    assert run(capsys, "verify", tmp_path / "other", "--mirror", tmp_path / "mirror")[0] == 2


def test_a_mirror_that_was_behind_comes_home_when_a_person_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest entries died with the disk, and the pin knows of them: coming home takes ``repin`` with a reason."""
    with mirrored(tmp_path) as chain:
        save(chain, 1)
    with SnapshotChain(tmp_path / "chain") as alone:
        ciuic_async.save(state_at(2), alone)
    lose(tmp_path / "chain")
    with pytest.raises(IntegrityError, match="repin"):
        mirrored(tmp_path)
    assert run(capsys, "chain", "repin", tmp_path / "mirror", "--reason", "disk lost")[0] == 0
    with mirrored(tmp_path) as chain:
        latest = chain.latest()
        assert latest is not None
        assert same(latest.load(), state_at(1))
        save(chain, 3)
        wait_home(chain)

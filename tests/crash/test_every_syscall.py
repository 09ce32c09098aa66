"""Every file operation of a save fails once, falls short, or is the last thing the process does.

Two ways: counted calls of the ``os`` module, and strace, which also reaches the native writer. Short form: every fsync
of the commit, a sample of the rest. ``CIUIC_CRASH_LONG=1``: every call, every system call.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import IntegrityError
from tests.crash.faults import LONG, Fault, Forge, Outcome, check, fast_folder, forge, spread

CHANGES = ("write", "fsync", "link", "rename", "unlink", "mkdir", "rmdir")
"""Calls that change the disk: killing the process between two of them leaves the same disk wherever it happens."""

TRACED = ("pwritev", "write", "fsync", "fdatasync", "linkat", "renameat", "renameat2", "openat", "mkdirat", "unlinkat",
          "fallocate", "ftruncate")  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if LONG else 240)]


class Bench:
    """A forge, and a chain with two snapshots to begin each experiment with."""

    def __init__(self, folder: Path, forge: Forge) -> None:
        self.forge = forge
        self._folder = folder
        self._template = folder / "template"
        self._number = 0
        prepared = forge.run("prepare", self._template, native=True)
        assert sorted(prepared.durable) == [1, 2], prepared.lines
        self._durable = prepared.durable

    def save(
        self, fault: Fault | None = None, *, native: bool = False, trace: Sequence[str] = ()
    ) -> tuple[Path, Outcome]:
        """Save to a fresh copy of the chain; what was durable before is in the outcome too."""
        self._number += 1
        chain = self._folder / f"save-{self._number}"
        shutil.copytree(self._template, chain)
        shutil.rmtree(self._folder / "home" / "state", ignore_errors=True)  # copies that all go on contradict a pin
        outcome = self.forge.run("save", chain, fault=fault, native=native, trace=trace)
        outcome.durable = {**self._durable, **outcome.durable}
        return chain, outcome

    def create(self, fault: Fault | None = None) -> tuple[Path, Outcome]:
        """The first save to a chain that is not there yet, by somebody who has no key yet."""
        self._number += 1
        chain = self._folder / f"create-{self._number}"
        shutil.rmtree(self._folder / "home" / "config", ignore_errors=True)
        return chain, self.forge.run("create", chain, fault=fault)


@pytest.fixture(scope="module")
def module_bench() -> Iterator[tuple[Bench, Path]]:
    with fast_folder() as folder, forge(folder / "home") as opened:
        yield Bench(folder, opened), folder / "home"


@pytest.fixture
def bench(module_bench: tuple[Bench, Path], monkeypatch: pytest.MonkeyPatch) -> Bench:
    made, home = module_bench
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    return made


def judge_failure(chain: Path, outcome: Outcome, fault: str, *, save_again: bool) -> None:
    """One failed operation: the process lives, at most one snapshot fails and says why, and the next one works."""
    assert outcome.status == 0, f"{fault}: {outcome.lines}"
    assert len(outcome.failed) <= 1, f"{fault}: {outcome.failed}"
    assert set(outcome.failed.values()) <= {"eio", "enospc", "fsync_failed", "key_not_writable", "key_unreadable"}, (
        f"{fault}: {outcome.lines}"
    )
    last = max((*outcome.durable, *outcome.failed))
    assert last in outcome.durable, f"{fault}: the save after the fault failed too: {outcome.lines}"
    check(chain, outcome.durable, save_again=save_again)


def chosen(calls: list[str], wanted: Sequence[str], samples: int) -> list[int]:
    """Positions of the calls named ``wanted``, as many as ``samples`` of them; counted from 1."""
    positions = [number for number, name in enumerate(calls, 1) if name.partition(">")[0] in wanted]
    return [positions[place - 1] for place in spread(len(positions), samples)]


@pytest.mark.parametrize(
    ("what", "calls", "samples"),
    [
        ("EIO", ("fsync",), 30),
        ("EIO", ("link", "rename", "unlink", "rmdir", "mkdir", "write"), 40),
        ("EIO", ("open", "read", "preadv", "stat", "fstat", "dup", "scandir", "listdir", "close"), 30),
        ("ENOSPC", ("write", "link", "open", "mkdir", "fsync", "rename"), 25),
        ("SHORT", ("write",), 12),
    ],
)
def test_a_call_that_fails_once_costs_one_snapshot_at_most(
    bench: Bench, what: str, calls: tuple[str, ...], samples: int
) -> None:
    """No failed call makes a false report, damages what is there, or outlives its snapshot."""
    chain, clean = bench.save()
    judge_failure(chain, clean, "no fault", save_again=True)
    assert not clean.failed
    for position in chosen(clean.calls, calls, samples):
        fault = f"{what} at call {position}, {clean.calls[position - 1]}"
        chain, outcome = bench.save(Fault(position, what))
        judge_failure(chain, outcome, fault, save_again=position % 4 == 0)
        if what == "SHORT":
            assert not outcome.failed, fault
        if clean.calls[position - 1] != "unlink":  # that one keeps its file
            assert os.listdir(chain / "tmp") == [], f"{fault}: leftovers"
        shutil.rmtree(chain)


def test_a_failed_fsync_of_the_commit_is_never_reported_durable(bench: Bench) -> None:
    """Whichever fsync before the claim of the slot fails, its folder's included: that snapshot is reported failed.

    A slot whose name is there but not on stable storage can be read back, and is yet no durable claim.
    """
    chain, clean = bench.save()
    shutil.rmtree(chain)
    slot = next(number for number, name in enumerate(clean.calls, 1) if re.fullmatch(r"link>\d{20}", name))
    syncs = [number for number, name in enumerate(clean.calls, 1) if name == "fsync"]
    last = next(number for number in syncs if number > slot)  # of the slots' folder
    assert sum(number <= last for number in syncs) >= 10, "segments, manifest, locator and slot, with their folders"
    for position in syncs[: 4 + sum(number <= last for number in syncs)]:
        chain, outcome = bench.save(Fault(position, "EIO"))
        assert outcome.failed == ({3: "fsync_failed"} if position <= last else {}), f"call {position}: {outcome.lines}"
        judge_failure(chain, outcome, f"fsync at call {position}", save_again=False)
        shutil.rmtree(chain)


def test_after_the_claim_nothing_fails_a_snapshot(bench: Bench) -> None:
    """Once its slot is durable, so is the snapshot, whatever then fails in tiles, log head or retention."""
    chain, clean = bench.save()
    shutil.rmtree(chain)
    slots = [number for number, name in enumerate(clean.calls, 1) if re.fullmatch(r"link>\d{20}", name)]
    claimed = next(number for number in range(slots[0], len(clean.calls)) if clean.calls[number - 1] == "fsync")
    for offset in spread(slots[1] - claimed, 40):  # up to the prune entry's slot
        chain, outcome = bench.save(Fault(claimed + offset, "EIO"))
        assert not outcome.failed, f"{clean.calls[claimed + offset - 1]} at call {claimed + offset}: {outcome.failed}"
        check(chain, outcome.durable, save_again=False)
        shutil.rmtree(chain)


def test_a_kill_before_any_change_of_the_disk_loses_nothing(bench: Bench) -> None:
    """SIGKILL before each call that changes the disk: what was reported durable loads, and the next start works."""
    chain, clean = bench.save()
    shutil.rmtree(chain)
    for position in chosen(clean.calls, CHANGES, 90):
        chain, outcome = bench.save(Fault(position, "KILL"))
        assert outcome.killed, f"call {position}: {outcome.lines}"
        check(chain, outcome.durable)
        shutil.rmtree(chain)


@pytest.mark.parametrize(("what", "samples"), [("EIO", 25), ("ENOSPC", 10)])
def test_a_first_save_that_fails_can_be_tried_again(bench: Bench, what: str, samples: int) -> None:
    """A fault while chain, key and first snapshot are made is a clear error, and the second attempt works."""
    chain, clean = bench.create()
    assert sorted(clean.durable) == [1, 2], clean.lines
    for position in chosen(clean.calls, (*CHANGES, "open", "read"), samples):
        chain, outcome = bench.create(Fault(position, what))
        judge_failure(chain, outcome, f"{what} at call {position}, {clean.calls[position - 1]}", save_again=False)
        shutil.rmtree(chain)


def test_a_first_save_that_is_killed_can_be_tried_again(bench: Bench) -> None:
    """SIGKILL while chain, key and first snapshot are made: the next start makes or completes them."""
    _, clean = bench.create()
    for position in chosen(clean.calls, CHANGES, 40):
        chain, outcome = bench.create(Fault(position, "KILL"))
        assert outcome.killed, f"call {position}: {outcome.lines}"
        with SnapshotChain(chain) as again:
            saved = len(again)
        check(chain, outcome.durable)
        assert saved <= 1
        shutil.rmtree(chain)


# --- strace: the native writer too ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced_calls(module_bench: tuple[Bench, Path], tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How often each system call is made by the thread that makes it most: strace counts by thread."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path_factory.mktemp("strace") / "log"
    _, outcome = module_bench[0].save(native=True, trace=("-o", str(log), "-e", "trace=" + ",".join(TRACED)))
    if not outcome.traced:
        pytest.skip("strace may not attach here")
    assert not outcome.failed, outcome.lines
    by_thread: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines():
        if match := re.match(r"(\d+)\s+(\w+)\(", line):
            by_thread[match[1], match[2]] += 1
    most: Counter[str] = Counter()
    for (_, name), count in by_thread.items():
        most[name] = max(most[name], count)
    assert most["pwritev"], "the native writer was not traced"
    return most


def plan(calls: Counter[str], names: Sequence[str], samples: int) -> list[tuple[str, int]]:
    every = [(name, number) for name in names for number in range(1, calls[name] + 1)]
    return [every[place - 1] for place in spread(len(every), samples)]


@pytest.mark.parametrize(("error", "samples"), [("EIO", 14), ("ENOSPC", 6)])
def test_a_system_call_that_fails_once_costs_one_snapshot_at_most(
    bench: Bench, traced_calls: Counter[str], error: str, samples: int
) -> None:
    """As above for every system call, those of the native writer included."""
    names = TRACED if error == "EIO" else ("pwritev", "linkat", "openat", "mkdirat", "fallocate", "renameat")
    first = [("pwritev", 1)]
    for name, number in dict.fromkeys([*first, *plan(traced_calls, names, samples)]):
        inject = f"inject={name}:error={error}:when={number}"
        chain, outcome = bench.save(native=True, trace=("-o", "/dev/null", "-e", f"trace={name}", "-e", inject))
        # The counts are of each thread: at most one fault a thread, and the native writer has one for each segment.
        assert outcome.status == 0, f"{inject}: {outcome.lines}"
        assert "internal" not in outcome.failed.values(), f"{inject}: {outcome.lines}"
        check(chain, outcome.durable, save_again=number % 4 == 1)
        if (name, number) == ("pwritev", 1):
            assert sorted(outcome.failed) == [3, 4, 5], f"every native writer's first write failed: {outcome.lines}"
        shutil.rmtree(chain)


def test_a_kill_at_a_system_call_loses_nothing(bench: Bench, traced_calls: Counter[str]) -> None:
    """SIGKILL at a system call: what was reported durable loads, and the next start works."""
    for name, number in plan(traced_calls, TRACED, 16):
        inject = f"inject={name}:signal=KILL:when={number}"
        chain, outcome = bench.save(native=True, trace=("-o", "/dev/null", "-e", f"trace={name}", "-e", inject))
        assert outcome.killed, f"{inject}: {outcome.lines}"
        check(chain, outcome.durable)
        shutil.rmtree(chain)


def test_an_interrupted_system_call_is_repeated(bench: Bench, traced_calls: Counter[str]) -> None:
    """EINTR is no failure."""
    for name, number in plan(traced_calls, ("pwritev", "write", "fsync", "openat"), 8):
        inject = f"inject={name}:error=EINTR:when={number}"
        chain, outcome = bench.save(native=True, trace=("-o", "/dev/null", "-e", f"trace={name}", "-e", inject))
        assert outcome.status == 0, f"{inject}: {outcome.lines}"
        assert not outcome.failed, f"{inject}: {outcome.lines}"
        check(chain, outcome.durable, save_again=False)
        shutil.rmtree(chain)


def test_a_write_that_lies_is_caught_by_a_digest(bench: Bench, traced_calls: Counter[str]) -> None:
    """A disk that reports a write it never made: verify names every snapshot hit, and loading it is an error."""
    inject = "inject=pwritev:retval=4096:when=1"  # the first 4096 bytes of each segment stay zero
    chain, outcome = bench.save(native=True, trace=("-o", "/dev/null", "-e", "trace=pwritev", "-e", inject))
    assert {1, 2, 3, 4} <= set(outcome.durable)
    with SnapshotChain(chain, create=False) as opened:
        hit = {problem.snapshot for problem in opened.verify().problems}
        for snapshot in opened:
            assert snapshot.id in hit
            with pytest.raises(IntegrityError):
                snapshot.load()

"""The harness of the crash campaigns: one planned fault in one process, and the check of what it left behind.

A *forge* (``save_once.py``) is a process that has imported everything once. It forks a child for each experiment; the
child saves, meets its fault, and says what became durable. The test then opens what is left in its own process.

Faults come in two ways. ``FaultyOs`` stands in for the ``os`` module of those modules that touch the disk, counts the
calls and lets the n-th one fail, fall short or kill the process. ``Forge.run(trace=...)`` attaches strace instead,
which sees the native writer too.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

import ciuic_async
from ciuic_async.chain import SnapshotChain

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("CIUIC_CRASH_LONG") == "1"
"""Every experiment instead of a sample; minutes instead of seconds."""

KEPT = 2
"""What the children's retention keeps."""

COUNTED = (
    "open", "dup", "close", "read", "preadv", "write", "fsync", "link", "rename", "unlink", "mkdir", "rmdir",
    "stat", "fstat", "listdir", "scandir",
)  # fmt: skip
"""Calls of the ``os`` module that can be made to fail: all that the local store uses."""


# --- one fault in this process ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the ``at``-th counted call: an errno by name, ``KILL``, or ``SHORT`` (half of a write)."""

    at: int
    what: str


class FaultyOs:
    """The ``os`` module with one planned fault. Any thread may call."""

    def __init__(self, fault: Fault | None) -> None:
        self._fault = fault
        self._mutex = threading.Lock()
        self.calls: list[str] = []
        """Names of the counted calls so far; of a link also the new name, after a ``>``."""

    def disarm(self) -> None:
        self._fault = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._mutex:
                self.calls.append(f"link>{args[1]}" if name == "link" else name)
                fault = self._fault if self._fault is not None and self._fault.at == len(self.calls) else None
            return real(*args, **kwargs) if fault is None else _strike(fault, name, real, args, kwargs)

        return counted


def _strike(fault: Fault, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if fault.what == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.what == "SHORT":
        if name != "write":
            return real(*args, **kwargs)
        data = memoryview(args[1]).cast("B")
        return real(args[0], data[: max(1, len(data) // 2)])
    if name == "close":
        real(*args, **kwargs)  # Linux closes the descriptor whatever it answers
    number = int(getattr(errno, fault.what))
    raise OSError(number, os.strerror(number))


# --- the state that is saved ------------------------------------------------------------------------------------------


def state_at(step: int) -> dict[str, Any]:
    """A small state that depends on the step alone; it gives both codecs, packs, and chunks that repeat."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "frozen": torch.arange(20_000, dtype=torch.int32),  # as in every step: deduplicated
            "weights": torch.randn(17_000, generator=generator),  # compresses: planes
            "noise": torch.randint(0, 256, (66_000,), dtype=torch.uint8, generator=generator),  # does not: raw
            "bias": torch.randn(30, generator=generator),  # packed
            "scale": torch.tensor(float(step), dtype=torch.float64),
        },
        "position": {"step": step, "names": ["a", None, (1, 2.5)]},
    }


def same(found: Any, expected: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and found.dtype == expected.dtype
            and found.shape == expected.shape
            and found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))
        )
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and list(found) == list(expected)
            and all(same(found[k], expected[k]) for k in found)
        )
    return type(found) is type(expected) and bool(found == expected)


# --- experiments in children ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """What a child said, and how it ended."""

    durable: dict[int, str] = field(default_factory=dict)
    """Step to snapshot id, as reported durable."""
    failed: dict[int, str] = field(default_factory=dict)
    """Step to kind of error."""
    calls: list[str] = field(default_factory=list)
    """The counted calls of the faulty part; empty if it was killed before its end."""
    lines: list[str] = field(default_factory=list)
    status: int = 0
    """As ``os.waitpid`` gives it."""
    traced: bool = False
    """strace was attached; it may not be allowed to."""

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


class Forge:
    """Forks a child for each experiment. One at a time; belongs to one thread.

    Args:
        home: where children keep keys; also takes what they say on stderr.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._errors = open(home / "stderr.txt", "w+")  # noqa: SIM115 -- closed by close
        environment = {**os.environ, "XDG_CONFIG_HOME": str(home / "config"), "XDG_STATE_HOME": str(home / "state")}
        environment["OMP_NUM_THREADS"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.save_once"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )

    def run(
        self,
        scenario: str,
        chain: Path,
        *,
        fault: Fault | None = None,
        native: bool = False,
        options: Mapping[str, Any] | None = None,
        trace: Sequence[str] = (),
        watch: Callable[[int, IO[bytes], Outcome], None] | None = None,
    ) -> Outcome:
        """One experiment.

        Args:
            scenario: a function of ``save_once.py``.
            chain: the folder it saves to.
            fault: for its ``os`` module.
            native: write through the native core; else every write passes through ``os.write``.
            options: for the scenario.
            trace: arguments of strace, which is attached just before the faulty part.
            watch: takes over reading what the child says, given its pid; may kill it.
        """
        request = {
            "scenario": scenario,
            "chain": str(chain),
            "fault": None if fault is None else asdict(fault),
            "native": native,
            "traced": bool(trace),
            "options": dict(options or {}),
        }
        self._say(json.dumps(request))
        outcome = Outcome()
        tracer: subprocess.Popen[bytes] | None = None
        while not (line := self._line()).startswith("end "):
            words = line.split(" ", 3)
            if words[0] == "ready":
                if trace:
                    tracer = _attach(trace, int(words[1]))
                    self._say("go")
                elif watch is not None:
                    assert self._process.stdout is not None
                    watch(int(words[1]), self._process.stdout, outcome)
                continue
            note_line(outcome, line)
        outcome.status = int(line.split()[1])
        if tracer is not None:
            tracer.wait(timeout=30)
            outcome.traced = True
        return outcome

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)
        self._errors.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line.endswith("\n"):
            self._errors.seek(0)
            raise AssertionError(f"the forge died: {self._errors.read()[-4000:]}")
        return line[:-1]


def note_line(outcome: Outcome, line: str) -> None:
    """Take down one line of a child."""
    outcome.lines.append(line)
    words = line.split(" ", 3)
    if words[0] == "durable":
        outcome.durable[int(words[1])] = words[2]
    elif words[0] == "failed":
        outcome.failed[int(words[1])] = words[2]
    elif words[0] == "calls":
        outcome.calls = words[1].split(",")


def _attach(arguments: Sequence[str], pid: int) -> subprocess.Popen[bytes] | None:
    """strace on all threads of ``pid``, attached on return; None where that is not allowed."""
    tracer = subprocess.Popen(["strace", "-f", *arguments, "-p", str(pid)], stderr=subprocess.PIPE)
    said = tracer.stderr
    assert said is not None
    attached = b"attached" in said.readline()

    def drain() -> None:
        with said:
            said.read()

    threading.Thread(target=drain, daemon=True).start()
    if not attached:
        tracer.wait(timeout=30)
        return None
    return tracer


@contextmanager
def forge(home: Path) -> Iterator[Forge]:
    """A forge for a ``with`` block."""
    opened = Forge(home)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def fast_folder() -> Iterator[Path]:
    """A folder in memory where the machine has one: what survives is decided by the harness, not by the disk."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="ciuic-crash-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- what must hold afterwards ----------------------------------------------------------------------------------------


def check(folder: Path, durable: Mapping[int, str], *, kept: int = KEPT, save_again: bool = True) -> set[int]:
    """What must hold of a chain after any fault; the steps whose snapshots are there.

    ``verify`` finds no problem; every snapshot that is there is exactly the state of its step; what was reported
    durable is there unless retention may have dropped it; and the next save works.
    """
    with SnapshotChain(folder, create=False) as chain:
        report = chain.verify()
        assert report.ok, report.problems
        found = {snapshot.step: snapshot for snapshot in chain}
        for step, snapshot in found.items():
            assert step is not None
            assert same(snapshot.load(), state_at(step)), f"step {step} is not what was saved"
        claimed = {fact["step"]: fact["id"] for fact in chain.log() if fact["kind"] == "snapshot"}
        for step, snapshot_id in durable.items():
            assert claimed.get(step) == snapshot_id, f"step {step} was reported durable and is not in the chain"
            newer = sum(1 for other in claimed if other > step)
            assert step in found or newer >= kept, f"step {step} was reported durable and is gone"
    if save_again:
        check_next_save(folder, len(found))
    return {step for step in found if step is not None}


def check_next_save(folder: Path, snapshots: int) -> None:
    """A save by a process that knows nothing of what happened works, and is sound."""
    saved = ciuic_async.save(state_at(77), folder)
    with SnapshotChain(folder, create=False) as chain:
        assert same(chain.get(saved.id).load(), state_at(77))
        report = chain.verify()
        assert report.ok, report.problems
        assert len(chain) == snapshots + 1


def spread(count: int, samples: int) -> list[int]:
    """``samples`` numbers evenly over 1..count; all of them in the long form."""
    if LONG or samples >= count:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (samples - 1)) for i in range(samples)})

"""A long training in a bad world: random faults in its store, kills of its keeper, every way of staging; nothing lost.

    python -m tests.crash.soak [SNAPSHOTS] [SEED]         CIUIC_SOAK=2000 python -m tests.crash.soak

A *life* is one checkpointer and up to 50 snapshots, with options drawn by chance. Between lives the faults stop for a
moment: the chain is verified, everything reported durable is looked for, and the newest snapshot is restored and
compared bit by bit. Prints a report as JSON; ``CIUIC_SOAK=N`` in the environment writes it to bench/results/soak.json
besides. Exits with 1 if anything was lost or wrong, or if the process holds more and more.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ciuic_async import Checkpointer, KeepLatest, native
from ciuic_async.chain import SnapshotChain
from ciuic_async.errors import CiuicError, CiuicWarning
from ciuic_async.format.digest import digest
from ciuic_async.stores import local
from tests.crash.crew_lives import held
from tests.crash.faults import COUNTED

SHORT = 60
LONGEST_LIFE = 50
SMALL_FILES_BYTES = 65536
SMALL_FILES_RATE = 0.02
"""How often files may not grow beyond that size, for the length of a snapshot: the native writer meets that too."""
KEPT = 3
STRUCK = tuple(name for name in COUNTED if name not in ("dup", "close", "unlink", "rmdir"))
"""Calls that may fail: all but those that only give back."""
ERRNOS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ENOMEM, errno.EINTR)
MAX_GROWTH_BYTES = 64 << 20
"""What the process may grow by between the first third of a soak and its end: the history of the chain and of
allocators; a leak of a tenth of each of 2,000 snapshots would be more."""


class FailingOs:
    """The ``os`` module of the store. Some calls fail, fall short or take long while it is ``armed``. Any thread."""

    def __init__(self, dice: random.Random, counts: Counter[str]) -> None:
        self._dice = dice
        self._counts = counts
        self._mutex = threading.Lock()
        self.armed = False
        self.rate = 0.0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STRUCK:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._mutex:
                what = self._draw(name)
            if what == "slow":
                threading.Event().wait(0.005)
            elif what == "short":
                data = memoryview(args[1]).cast("B")
                return real(args[0], data[: max(1, len(data) // 3)])
            elif what:
                number = getattr(errno, what)
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call

    def _draw(self, name: str) -> str:
        if not self.armed or self._dice.random() >= self.rate:
            return ""
        what = self._dice.choice(["slow", "short", errno.errorcode[self._dice.choice(ERRNOS)]])
        if what == "short" and name != "write":
            what = "slow"
        self._counts[what] += 1
        return what


class State:
    """A training without a model: tensors that change a little, wholly, never, and come and go."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tree: dict[str, Any] = {
            "frozen": torch.randn(20_000, generator=self._generator),
            "weights": torch.randn(300_000, generator=self._generator),
            "half": torch.randn(100_000, generator=self._generator).bfloat16(),
            "noise": torch.zeros(50_000, dtype=torch.uint8),
            "biases": [torch.zeros(7), torch.zeros(3, dtype=torch.int64)],
            "plain": {"history": [], "name": "soak"},
        }

    def train(self, step: int, large: bool) -> None:
        """One step. ``large`` adds a tensor that makes the state larger than the least memory for staging."""
        tree = self.tree
        for name in ("weights", "half"):
            tree[name] += 1e-3 * torch.randn(tree[name].shape, generator=self._generator)
        tree["noise"] = torch.randint(0, 256, (50_000,), dtype=torch.uint8, generator=self._generator)
        tree["biases"][0] += 1
        tree["biases"][1] += step
        tree["plain"]["history"] = [step, step / 3]
        tree.pop("large", None)
        if large:
            tree["large"] = torch.full((2_200_000,), float(step))


def digest_of(value: Any) -> str:
    """Equal for equal states, to the bit."""
    parts: list[bytes] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts.append(f"{value.dtype}{tuple(value.shape)}".encode() + data)
        elif isinstance(value, dict):
            parts.append(repr(list(value)).encode())
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            parts.append(f"list {len(value)}".encode())
            for item in value:
                walk(item)
        else:
            parts.append(repr(value).encode())

    walk(value)
    return digest(b"\0".join(parts)).hex()


@dataclass(slots=True)
class Report:
    """What came of a soak."""

    snapshots: int = 0
    durable: int = 0
    failed: int = 0
    failed_by_kind: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    keeper_kills: int = 0
    lives: int = 0
    lives_by_staging: dict[str, int] = field(default_factory=dict)
    restores: int = 0
    lost: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)
    late: int = 0
    """Reported failed, and there all the same: the answer to the claim was lost."""
    held_early: dict[str, int] = field(default_factory=dict)
    held_late: dict[str, int] = field(default_factory=dict)
    flat: bool = False
    peak_resident_bytes: int = 0
    duration_s: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.lost or self.wrong or self.problems) and self.flat


class Soak:
    """One soak of a chain. Replaces the store's ``os`` for as long as ``run`` runs."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._chain = folder / "chain"
        self._dice = random.Random(seed)
        self._counts: Counter[str] = Counter()
        self._os = FailingOs(random.Random(seed + 1), self._counts)
        self._state = State(seed)
        self._digests: dict[int, str] = {}
        self._durable: dict[int, str] = {}
        self._kinds: Counter[str] = Counter()
        self._stagings: Counter[str] = Counter()
        self.report = Report()

    def run(self, snapshots: int) -> Report:
        """So many snapshots, in lives; returns what came of them."""
        report = self.report
        started = time.monotonic()
        life = min(LONGEST_LIFE, max(10, snapshots // 3))
        core = native.core
        setattr(local, "os", self._os)  # noqa: B010 -- not a name that the module exports
        try:
            SnapshotChain(self._chain).close()
            while report.snapshots < snapshots:
                native.core = core if report.lives % 2 else None
                self._live(min(life, snapshots - report.snapshots))
                report.lives += 1
                if not report.held_early and report.snapshots >= snapshots // 3:
                    report.held_early = held()
        finally:
            setattr(local, "os", os)  # noqa: B010
            native.core = core
        report.held_late = held()
        report.flat = _flat(report.held_early, report.held_late)
        report.duration_s = time.monotonic() - started
        report.faults = dict(sorted(self._counts.items()))
        report.failed_by_kind = dict(sorted(self._kinds.items()))
        report.lives_by_staging = dict(sorted(self._stagings.items()))
        report.peak_resident_bytes = _peak_resident_bytes()
        return report

    def _live(self, snapshots: int) -> None:
        """Open, restore, take snapshots under faults, close or leave; then look at what is there."""
        dice, lives = self._dice, self.report.lives
        large = lives % 3 == 2
        keeper = lives % 3 == 0
        options: dict[str, Any] = {
            "staging": dice.choice(["auto", "blocking", "overlap"]),
            "codec": dice.choice(["auto", "auto", "auto", "smallest", "raw"]),
            "when_busy": dice.choice(["wait", "skip"]),
            "host_memory_bytes": (8 << 20) if large else dice.choice([None, 24 << 20]),
            "keeper": keeper,
            "frozen": dice.choice([(), ("frozen",)]),
        }
        self._stagings["windows" if large else options["staging"]] += 1
        self._os.rate = dice.choice([0.001, 0.005, 0.02])
        checkpointer = Checkpointer(self._chain, self._state.tree, keep=KeepLatest(KEPT), rng=False, **options)
        with checkpointer:
            self._restore(checkpointer)
            kills = {dice.randrange(snapshots) for _ in range(2)} if keeper else set()
            self._os.armed = True
            try:
                for number in range(snapshots):
                    self._snapshot(checkpointer, large)
                    if number in kills:
                        self._kill_keeper(checkpointer)
            finally:
                self._os.armed = False
        self._look()

    def _snapshot(self, checkpointer: Checkpointer, large: bool) -> None:
        step = max(self._digests, default=0) + 1
        self._state.train(step, large)
        self._digests[step] = digest_of(self._state.tree)
        checkpointer._step = step
        self.report.snapshots += 1
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self._dice.random() < SMALL_FILES_RATE:
            self._counts["EFBIG"] += 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES_BYTES, before[1]))
        pending = checkpointer.save()
        try:
            self._durable[step] = pending.wait_durable(60).id
            self.report.durable += 1
        except (CiuicError, TimeoutError) as error:
            self.report.failed += 1
            self._kinds[getattr(error, "kind", "timeout")] += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def _kill_keeper(self, checkpointer: Checkpointer) -> None:
        pid = checkpointer._keeper.pid if checkpointer._keeper is not None else None
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.report.keeper_kills += 1

    def _restore(self, checkpointer: Checkpointer) -> None:
        """Faults are over: the newest snapshot comes back, exactly. Training goes on from there."""
        progress = checkpointer.restore()
        self._check(progress is not None or not self._durable, "nothing to restore")
        if progress is None:
            return
        self.report.restores += 1
        self._check(not progress.skipped, f"passed over: {progress.skipped}")
        self.report.wrong += digest_of(self._state.tree) != self._digests[progress.step]

    def _look(self) -> None:
        """Everything that must hold between two lives."""
        with SnapshotChain(self._chain, create=False) as history:
            verified = history.verify()
            self._check(verified.ok, f"verify: {verified.problems[:3]}")
            claimed = {fact["step"]: fact["id"] for fact in history.log() if fact["kind"] == "snapshot"}
            there = {snapshot.step: snapshot for snapshot in history}
            self.report.late = len(claimed.keys() - self._durable.keys())
            newest = sorted(claimed)[-KEPT:]
            self.report.lost += sum(claimed.get(step) != self._durable[step] for step in self._durable)
            self.report.lost += sum(step not in there for step in newest)
            for step, snapshot in there.items():
                self.report.wrong += digest_of(snapshot.load()) != self._digests[step or 0]
            self.report.restores += len(there)

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            self.report.problems.append(problem)


def _flat(early: dict[str, int], late: dict[str, int]) -> bool:
    return all(late[name] <= early[name] for name in ("threads", "descriptors", "memfds")) and (
        late["resident_bytes"] <= early["resident_bytes"] + MAX_GROWTH_BYTES
    )


def _peak_resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    wanted = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    wanted.add_argument("snapshots", type=int, nargs="?", default=int(os.environ.get("CIUIC_SOAK", SHORT)))
    wanted.add_argument("seed", type=int, nargs="?", default=1)
    wanted.add_argument("--folder", type=Path, help="where the chain is; default: a temporary one")
    options = wanted.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CiuicWarning)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=".run-soak-") as folder:
        for name in ("CONFIG", "STATE"):
            os.environ[f"XDG_{name}_HOME"] = f"{folder}/home/{name}"
        os.environ["XDG_RUNTIME_DIR"] = folder
        report = Soak(Path(folder), options.seed).run(options.snapshots)
    gc.collect()
    facts = asdict(report)
    print(json.dumps(facts, indent=1))
    if "CIUIC_SOAK" in os.environ:
        # Looked up here: the benches have a path of their own, and only the long form needs them.
        importlib.import_module("bench.harness.output").store(
            "soak", facts, argparse.Namespace(results=None, quick=False)
        )
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())

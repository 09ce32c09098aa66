"""Training on an object store, as the campaigns of ``test_s3_*.py`` do it: a state that says which step it is of.

As a program it is the process that forks writers of ``tests/chain/writer_lives.py``, with one more kind of writer, or,
given a scenario and arguments, one process that trains. What is said, each line at once and whole: ``durable STEP ID``,
``failed STEP KIND``, ``memory BYTES``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciuic_async import Checkpointer, PendingSnapshot, SnapshotChain
from ciuic_async.errors import CiuicError, CiuicWarning
from ciuic_async.events import SnapshotStats
from tests.chain import writer_lives

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("CIUIC_SERVICES_LONG") == "1"
"""Every experiment many times; minutes instead of seconds."""

LARGE_ELEMENTS = 4_300_000
"""17 MB of float32 that do not compress: more than one part of an upload."""


def content(step: int, elements: int = LARGE_ELEMENTS) -> Tensor:
    """What the large tensor holds at a step; no two steps share a chunk."""
    return torch.rand(elements, generator=torch.Generator().manual_seed(step))


@dataclass
class Run:
    """A training of which every snapshot is known. Belongs to one thread.

    Attributes:
        step: of the state, which is what ``content`` says for it.
    """

    chain: str
    options: Mapping[str, str]
    arguments: dict[str, Any] = field(default_factory=dict)
    elements: int = LARGE_ELEMENTS
    step: int = 0
    pending: list[PendingSnapshot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = {"step": torch.zeros(1), "large": torch.zeros(self.elements)}
        self.place = SnapshotChain(self.chain, storage_options=self.options)
        always: dict[str, Any] = {"rng": False, "codec": "raw", "when_busy": "skip"}
        self.checkpointer = Checkpointer(self.place, self.state, **{**always, **self.arguments})

    def train(self, steps: int) -> None:
        """That many steps, each with a snapshot unless the engine is too busy for one."""
        for _ in range(steps):
            self.step += 1
            self.state["step"].fill_(self.step)
            self.state["large"].copy_(content(self.step, self.elements))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CiuicWarning)  # of snapshots that failed or were skipped
                taken = self.checkpointer.step()
            if taken is not None:
                self.pending.append(taken)

    def settle(self) -> tuple[dict[int, str], dict[int, CiuicError]]:
        """Wait for all snapshots; ids of the durable ones, and errors of the others, by step."""
        durable: dict[int, str] = {}
        failed: dict[int, CiuicError] = {}
        for pending in self.pending:
            assert pending.step is not None
            try:
                durable[pending.step] = pending.wait_durable(120).id
            except CiuicError as error:
                failed[pending.step] = error
        return durable, failed

    def stats(self) -> list[SnapshotStats]:
        return self.checkpointer.stats()

    def close(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CiuicWarning)
            self.checkpointer.close()
        self.place.close()


@contextmanager
def training(chain: str, options: Mapping[str, str], **arguments: Any) -> Any:
    """A run for a ``with`` block, a snapshot at every step."""
    run = Run(chain, options, {"every_steps": 1, **arguments})
    try:
        yield run
    finally:
        run.close()


def check(chain: str, options: Mapping[str, str], durable: Mapping[int, str]) -> None:
    """What somebody finds who was not there: all verifies, what was reported durable is there, bit for bit."""
    with SnapshotChain(chain, create=False, storage_options=options) as reader:
        report = reader.verify()
        assert report.ok, report.problems
        found = {snapshot.id: snapshot for snapshot in reader}
        for step, snapshot in durable.items():
            assert_is(found[snapshot].load(), step)
        for snapshot in found.values():  # also those nobody was told of are whole
            assert snapshot.step is not None
            if snapshot.id not in durable.values():
                assert_is(snapshot.load(), snapshot.step)


def assert_is(tree: Any, step: int) -> None:
    """A loaded state is that of a step."""
    assert torch.equal(tree["step"], torch.full((1,), float(step)))
    assert torch.equal(tree["large"], content(step, tree["large"].numel()))


# --- processes --------------------------------------------------------------------------------------------------------


def peak_memory_bytes() -> int:
    """The most that this process ever had in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the system does not say how much memory this process had")


def train(chain: str, steps: int, memory_steps: int = 0, elements: int = LARGE_ELEMENTS) -> None:
    """Train as the environment says; tell of every snapshot, and how much memory it took.

    Args:
        memory_steps: after the first ``steps`` say the memory, wait for a line, train so many more, say it again.
    """
    run = Run(chain, {}, {"every_steps": 1}, elements)
    progress = run.checkpointer.restore()
    if progress is not None:
        run.step = progress.step or 0
        assert_is(run.state, run.step)
        writer_lives.say("restored", run.step)
    for _ in range(steps):
        run.train(1)
        tell(run)
    if memory_steps:
        writer_lives.say("memory", peak_memory_bytes())
        sys.stdin.readline()
        run.train(memory_steps)
        writer_lives.say("memory", peak_memory_bytes())
        sys.stdin.readline()
        tell(run)
    run.close()


def tell(run: Run) -> None:
    durable, failed = run.settle()
    run.pending.clear()
    for step, snapshot in durable.items():
        writer_lives.say("durable", step, snapshot)
    for step, error in failed.items():
        writer_lives.say("failed", step, (error.__cause__ or error).kind)  # type: ignore[attr-defined]


def fill(chain_path: str, writer: str, life: int, key: str) -> None:
    """Takes snapshots of a state whose values no other has; acknowledged as ``ID=VALUE``."""
    weight = torch.zeros(1000)
    with Checkpointer(chain_path, {"w": weight}, rng=False, key=key) as checkpointer:
        for turn in range(1_000_000):
            value = 1_000_000 * (ord(writer) - ord("a")) + 1000 * life + turn
            weight.fill_(value)
            snapshot = checkpointer.save().wait_durable(60)
            writer_lives.say("ack", writer, snapshot.index, f"{snapshot.id}={value}")


def main() -> None:
    if len(sys.argv) > 1:
        logging.basicConfig(level=logging.DEBUG)
        train(**json.loads(sys.argv[1]))
    else:
        writer_lives.SCENARIOS["fill"] = fill
        writer_lives.main()


if __name__ == "__main__":
    main()

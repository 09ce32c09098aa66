"""Does ``overhead_budget`` keep its promise in a real training run?

    python bench/interval_control.py     # about 17 minutes; writes bench/results/interval_control.json

One training, one checkpointer, blocks of steps in the order

    WITH | without | without | WITH

so that a drift of the machine cancels within a group. A block WITH lasts ``--block`` seconds and then until nothing is
on its way; a block without has as many steps. The base step is the mean of the group's blocks without; overhead is the
time of the blocks WITH beyond as many base steps, over these base steps, in all groups together. To the engine the
blocks without never happened. Its first snapshots, and what is allocated once, come before the first block.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ciuic_async import Checkpointer, KeepLatest, PendingSnapshot
from ciuic_async.cli.demo_table import tensor_bytes
from ciuic_async.cli.demo_training import Training
from ciuic_async.pending import DURABLE, FAILED
from harness.intervals import bootstrap, percentile
from harness.lost import prepare_training
from harness.output import parser, rows, say, seconds, store, workplace

WARM_UP_SNAPSHOTS = 2
"""Both of the engine's buffers have been used then."""


@dataclass(frozen=True, slots=True)
class Block:
    """Steps in one go. ``snapshots`` is 0 in a block without."""

    steps: int
    wall_s: float
    snapshots: int


@dataclass(frozen=True, slots=True)
class Group:
    """WITH, without, without, WITH."""

    with_snapshots: tuple[Block, Block]
    without: tuple[Block, Block]

    @property
    def base_s(self) -> float:
        """What the steps of the blocks WITH take without snapshots."""
        base_step_s = sum(block.wall_s for block in self.without) / sum(block.steps for block in self.without)
        return base_step_s * sum(block.steps for block in self.with_snapshots)

    @property
    def lost_s(self) -> float:
        """Time of the blocks WITH beyond that."""
        return sum(block.wall_s for block in self.with_snapshots) - self.base_s

    @property
    def snapshots(self) -> int:
        return sum(block.snapshots for block in self.with_snapshots)


class Run:
    """A training and its checkpointer."""

    def __init__(self, training: Training, folder: Path, budget: float) -> None:
        self.training = training
        keep = KeepLatest(3)  # a run takes hundreds
        state = training.state()
        self.checkpointer = Checkpointer(folder, state, overhead_budget=budget, keep=keep, on_error="raise")
        self._newest: PendingSnapshot | None = None

    def warm_up(self) -> None:
        """Train until the first snapshots are durable."""
        taken = 0
        while taken < WARM_UP_SNAPSHOTS or self._on_its_way():
            taken += self._step()

    def with_snapshots(self, least_s: float) -> Block:
        """Train with snapshots for this time, and then until nothing is on its way."""
        self.checkpointer._schedule.restored(
            self.training.loader.epoch
        )  # what lies between two blocks is nobody's time
        begin_s = time.perf_counter()
        steps = snapshots = 0
        while time.perf_counter() - begin_s < least_s or self._on_its_way():
            snapshots += self._step()
            steps += 1
        return Block(steps, time.perf_counter() - begin_s, snapshots)

    def without(self, steps: int) -> Block:
        """Train alone."""
        begin_s = time.perf_counter()
        for _ in range(steps):
            self.training.update()
        return Block(steps, time.perf_counter() - begin_s, 0)

    def _step(self) -> bool:
        self.training.update()
        pending = self.checkpointer.step(epoch=self.training.loader.epoch, batch=self.training.loader.batch)
        if pending is not None:
            self._newest = pending
        return pending is not None

    def _on_its_way(self) -> bool:
        return self._newest is not None and self._newest.phase not in (DURABLE, FAILED)


def overhead(groups: Sequence[Group]) -> float:
    """Lost time over time without snapshots."""
    return sum(group.lost_s for group in groups) / sum(group.base_s for group in groups)


def summarize(groups: Sequence[Group], budget: float) -> dict[str, Any]:
    """The overhead with a 95% interval, and what it was computed from."""
    resampled = bootstrap(len(groups), lambda drawn: overhead([groups[number] for number in drawn]))
    snapshots = sum(group.snapshots for group in groups)
    return {
        "overhead_budget": budget,
        "overhead": overhead(groups),
        "overhead_interval_95": [percentile(resampled, 0.025), percentile(resampled, 0.975)],
        "interval_method": f"bootstrap over {len(groups)} groups",
        "snapshots": snapshots,
        "lost_s_per_snapshot": sum(group.lost_s for group in groups) / max(snapshots, 1),
        "base_step_s": statistics.fmean(
            group.base_s / sum(block.steps for block in group.with_snapshots) for group in groups
        ),
        "groups": [asdict(group) for group in groups],
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of this program."""
    made = parser(__doc__)
    made.add_argument("--size", default="bench", help="of the demo's model")
    made.add_argument("--budget", type=float, default=0.05)
    made.add_argument("--groups", type=int, default=24)
    made.add_argument("--block", type=float, default=10.0, metavar="SECONDS")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="that training uses")
    options = made.parse_args(arguments)
    if options.quick:
        options.size, options.groups, options.block = "tiny", 2, 0.5
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = parse(arguments)
    groups = []
    with workplace(options) as folder:
        run = Run(prepare_training(options.size, options.threads), folder / "chain", options.budget)
        with run.checkpointer:
            run.warm_up()
            for number in range(1, options.groups + 1):
                first = run.with_snapshots(options.block)
                without = (run.without(first.steps), run.without(first.steps))
                groups.append(Group((first, run.with_snapshots(options.block)), without))
                this, so_far = overhead(groups[-1:]), overhead(groups)
                say(f"group {number} of {options.groups}: overhead {this:.2%}, so far {so_far:.2%}")
            figures = run.checkpointer._schedule.figures()
    assert figures is not None
    summary = summarize(groups, options.budget)
    low, high = summary["overhead_interval_95"]
    table = [
        ["budget", "overhead", "95% interval", "snapshots", "lost per snapshot", "as the engine measured"],
        [
            f"{options.budget:.1%}",
            f"{summary['overhead']:.2%}",
            f"{low:.2%} to {high:.2%}",
            str(summary["snapshots"]),
            seconds(summary["lost_s_per_snapshot"]),
            f"{figures.overhead:.2%}",
        ],
    ]
    result = {
        "question": "Does overhead_budget keep its promise in a real training run?",
        "method": "groups of WITH, without, without, WITH in one training; see interval_control.py",
        "state_bytes": tensor_bytes(run.training),
        "threads": options.threads,
        "block_s": options.block,
        **summary,
        "engine_figures": asdict(figures),
        "table": table,
    }
    store("interval_control", result, options)
    rows(table)


if __name__ == "__main__":
    main()

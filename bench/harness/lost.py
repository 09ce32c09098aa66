"""Lost time per snapshot, measured so that the machine's drift cancels.

Lost time = (wall time of n steps with a snapshot) - (wall time of as many steps without). The difference is small
beside what a step's time drifts within minutes, so both are measured within seconds: a contender's turn alternates
*blocks*,

    without | WITH | without | WITH | without

A block WITH begins with the call that takes the snapshot and ends when at least ``steps`` steps are done and the
snapshot is durable: training goes on until then. Its plain wall time is compared to n times the base step time, which
is the mean of the blocks before and behind it: what drifts evenly cancels. A block without has as many steps as the
block WITH before it. The base leaves out the fastest and slowest eighth of the steps of each block of five or more;
from the contender's own time nothing is left out.

The contender is open in the blocks without as well: a hook in every step would not show up here. ``base_step_s`` beside
that of "none" would show it.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ciuic_async.cli.demo_table import folder_bytes
from ciuic_async.cli.demo_training import SIZES, Training
from harness.contenders import Contender, Entry
from harness.intervals import describe, median_interval, ratio_to_best, trimmed_mean
from harness.output import say, seconds, span

WARM_UP_SNAPSHOTS = 2
"""Both of this engine's buffers have been used then; one would do for the others."""
PATIENCE_STEPS = 60
"""Training goes on until a snapshot is durable, but no longer than this; then it stands still for the rest."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One block WITH between two without.

    Attributes:
        round: in which round of all contenders.
        snapshots: taken in the block.
        steps: trained in the block.
        wall_s: the whole block, calls included.
        stall_s: longest return time of a call that takes a snapshot.
        steps_s: of each step in the block, without the calls.
        before_s, after_s: of each step in the blocks without.
    """

    round: int
    snapshots: int
    steps: int
    wall_s: float
    stall_s: float
    steps_s: tuple[float, ...]
    before_s: tuple[float, ...]
    after_s: tuple[float, ...]

    @property
    def base_step_s(self) -> float:
        return (trimmed_mean(self.before_s) + trimmed_mean(self.after_s)) / 2

    @property
    def lost_s(self) -> float:
        """Per snapshot."""
        return (self.wall_s - self.steps * self.base_step_s) / self.snapshots

    @property
    def lost_plain_s(self) -> float:
        """The same with a plain mean as base: to see that trimming decides nothing."""
        base_s = (statistics.fmean(self.before_s) + statistics.fmean(self.after_s)) / 2
        return (self.wall_s - self.steps * base_s) / self.snapshots

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "lost_s": self.lost_s, "lost_plain_s": self.lost_plain_s}


def steps_alone(contender: Contender, training: Training, count: int) -> tuple[float, ...]:
    """A block without: the time of each step."""
    times = []
    for _ in range(count):
        begin_s = time.perf_counter()
        training.update()
        contender.step()
        times.append(time.perf_counter() - begin_s)
    return tuple(times)


def steps_with_snapshots(
    contender: Contender, training: Training, steps: int, every_steps: int, snapshots: int
) -> tuple[float, float, tuple[float, ...]]:
    """A block WITH: a snapshot at its beginning and then every ``every_steps`` steps; ends when all are durable.

    Returns:
        Wall time, the longest call, and the time of each step.
    """
    times: list[float] = []
    stall_s = 0.0
    taken = 0
    begin_s = time.perf_counter()
    while len(times) < steps or (not contender.is_durable() and len(times) < steps + PATIENCE_STEPS):
        if taken < snapshots and len(times) == taken * every_steps:
            called_s = time.perf_counter()
            contender.save()
            stall_s = max(stall_s, time.perf_counter() - called_s)
            taken += 1
        step_s = time.perf_counter()
        training.update()
        contender.step()
        times.append(time.perf_counter() - step_s)
    contender.wait()
    return time.perf_counter() - begin_s, stall_s, tuple(times)


@dataclass(frozen=True, slots=True)
class Plan:
    """One turn: ``blocks`` blocks WITH, each of ``snapshots`` snapshots ``every_steps`` apart."""

    steps: int
    blocks: int
    every_steps: int = 1
    snapshots: int = 1
    base_steps: int | None = None
    """Of the blocks without; default as many as the block WITH before them turned out to have."""


def turn(
    entry: Entry, training: Training, folder: Path, plans: Sequence[Plan], number: int
) -> tuple[list[list[Sample]], int]:
    """One contender's turn in round ``number``; ``folder`` is made and gone afterwards.

    Returns:
        For each plan its samples; and the bytes that one snapshot takes.
    """
    folder.mkdir()
    contender = entry.make(folder, training.state())
    try:
        for _ in range(WARM_UP_SNAPSHOTS):
            training.update()
            contender.step()
            contender.save()
            contender.wait()
        before_bytes = folder_bytes(folder)
        gc.collect()
        os.sync()  # what the contender before this one deleted or left is none of ours
        taken = 0
        measured: list[list[Sample]] = []
        for plan in plans:
            samples = []
            before_s = steps_alone(contender, training, plan.base_steps or plan.steps)
            for _ in range(plan.blocks):
                wall_s, stall_s, steps_s = steps_with_snapshots(
                    contender, training, plan.steps, plan.every_steps, plan.snapshots
                )
                after_s = steps_alone(contender, training, plan.base_steps or len(steps_s))
                steps = len(steps_s)
                samples.append(Sample(number, plan.snapshots, steps, wall_s, stall_s, steps_s, before_s, after_s))
                before_s = after_s
                taken += plan.snapshots
            measured.append(samples)
        stored = folder_bytes(folder)
        return measured, stored if entry.replaces else (stored - before_bytes) // max(1, taken)
    finally:
        contender.close()
        shutil.rmtree(folder)


def run_rounds(
    entries: Mapping[str, Entry],
    training: Training,
    folder: Path,
    plans: Sequence[Plan],
    rounds: int,
    limit_s: float,
) -> tuple[list[dict[str, list[Sample]]], dict[str, int]]:
    """All contenders in every round, each round in another order.

    No round begins that would end later than ``limit_s`` seconds from now if it took as long as the longest before it.

    Returns:
        For each plan the samples by contender; and bytes per snapshot by contender.
    """
    measured: list[dict[str, list[Sample]]] = [{name: [] for name in entries} for _ in plans]
    stored: dict[str, int] = {}
    begin_s = time.monotonic()
    longest_s = 0.0
    for number in range(rounds):
        round_s = time.monotonic()
        if number and round_s - begin_s + longest_s > limit_s:
            say(f"no time for round {number + 1}")
            break
        order = list(entries)
        random.Random(number).shuffle(order)
        for name in order:
            samples, stored[name] = turn(entries[name], training, folder / "turn", plans, number)
            for one, into in zip(samples, measured, strict=True):
                into[name] += one
            lost = ", ".join(seconds(statistics.median(sample.lost_s for sample in one)) for one in samples)
            say(f"round {number + 1} of {rounds}: {name} loses {lost}")
        longest_s = max(longest_s, time.monotonic() - round_s)
    return measured, stored


def by_round(samples: Sequence[Sample]) -> dict[int, list[float]]:
    """Lost times grouped by round."""
    grouped: dict[int, list[float]] = {}
    for sample in samples:
        grouped.setdefault(sample.round, []).append(sample.lost_s)
    return grouped


def summarize(
    measured: Mapping[str, Sequence[Sample]], entries: Mapping[str, Entry], stored: Mapping[str, int], headline: str
) -> dict[str, Any]:
    """Figures by contender, and the ratio of ``headline`` to the best that is not ours."""
    contenders = {}
    for name, samples in measured.items():
        lost = [sample.lost_s for sample in samples]
        contenders[name] = {
            "durability": entries[name].durability,
            "ours": entries[name].ours,
            "lost_s_per_snapshot": describe(lost),
            "lost_plain_s_per_snapshot": statistics.median(sample.lost_plain_s for sample in samples),
            "stall_s": describe([sample.stall_s for sample in samples]),
            "base_step_s": statistics.median(sample.base_step_s for sample in samples),
            "stored_bytes": stored[name],
            "samples": [sample.facts() for sample in samples],
        }
    others = {
        name: by_round(samples) for name, samples in measured.items() if name != "none" and not entries[name].ours
    }
    facts: dict[str, Any] = {"contenders": contenders}
    if headline in measured and others:
        facts["ratio_to_best_opponent"] = ratio_to_best(by_round(measured[headline]), others)
    return facts


def table(measured: Mapping[str, Sequence[Sample]], stored: Mapping[str, int]) -> list[list[str]]:
    """Rows for the README: name, median, 95% interval, median of the time blocked in the call, stored per snapshot."""
    made = []
    for name, samples in measured.items():
        if name == "none":
            continue
        lost = [sample.lost_s for sample in samples]
        stall_s = statistics.median(sample.stall_s for sample in samples)
        made.append(
            [
                name,
                f"{statistics.median(lost):.2f} s",
                span(median_interval(lost)),
                f"{stall_s:.3f} s",
                f"{stored[name] / 1e6:.0f} MB",
            ]
        )
    return made


def prepare_training(size: str, threads: int, steps: int = 3) -> Training:
    """The demo's training after a few steps, so that its optimizer has all its state, with ``threads`` threads."""
    training = Training(SIZES[size], steps=100_000)
    torch.set_num_threads(threads)
    for _ in range(steps):
        training.update()
    return training

"""The interval that tunes itself, on a simulated clock and disk, and in a real training run."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.schedule.account import RETRY_S, best_interval_s
from ciuic_async.schedule.rules import Schedule

ROOT = Path(__file__).parents[2]
HOURS = 3600.0
BUDGETS = (0.01, 0.03, 0.05)
POINTS = 0.001
"""A tenth of a percentage point."""


@dataclass
class Machine:
    """A training loop with a disk, in simulated seconds. What it loses to snapshots is known exactly.

    A snapshot blocks training for ``stall_s``; then its bytes go to the disk, which makes each step
    ``1 + slowdown`` times longer, and so does retention for ``tidy_s`` after that. ``noise`` is the standard deviation
    of a step's logarithm, ``hiccups`` the share of steps that take twice as long, ``pause`` a pair: every so many steps
    training stands still for so many seconds.
    """

    step_s: Callable[[float], float] = lambda now_s: 0.25
    stall_s: float = 0.05
    slowdown: float = 0.1
    size_bytes: float = 600e6
    bandwidth: Callable[[float], float] = lambda now_s: 300e6
    tidy_s: float = 0.0
    noise: float = 0.0
    hiccups: float = 0.0
    pause: tuple[int, float] = (0, 0.0)
    fails: Callable[[int], bool] = lambda number: False
    has_fixed_rule: bool = False
    seed: int = 1

    now_s: float = 0.0
    lost_s: float = 0.0
    step: int = 0
    epoch: int | None = None
    taken_s: list[float] = field(default_factory=list)
    lost_at_s: list[tuple[float, float]] = field(default_factory=list)
    durable_s: float | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def clock(self) -> float:
        return self.now_s

    @property
    def overhead(self) -> float:
        """Lost time over time without snapshots."""
        return self.lost_s / (self.now_s - self.lost_s)

    def overhead_since(self, begin_s: float) -> float:
        """The same from a moment on."""
        lost_s = sum(lost_s for at_s, lost_s in self.lost_at_s if at_s >= begin_s)
        return lost_s / (self.now_s - begin_s - lost_s)

    def intervals_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.taken_s)]

    def run(self, schedule: Schedule, until_s: float) -> Machine:
        """Train until ``until_s``. Tuned rules never ask for a snapshot while one is on its way."""
        while self.now_s < until_s:
            self._train(schedule)
            self.step += 1
            if schedule.step_done(self.step, self.epoch):
                if self.durable_s is None:
                    self._take(schedule)
                else:
                    assert self.has_fixed_rule, "a snapshot before the previous one was durable"
                    schedule.taken()  # an engine with when_busy="skip"
                    schedule.finished(0.0, 0.0, 0.0, False)
            every, pause_s = self.pause
            if every and self.step % every == 0:
                self._pass(schedule, pause_s)
        return self

    def _train(self, schedule: Schedule) -> None:
        left_s = self.step_s(self.now_s) * math.exp(self.random.gauss(0, self.noise) if self.noise else 0.0)
        if self.random.random() < self.hiccups:
            left_s *= 2
        if self.durable_s is not None:
            factor = 1 + self.slowdown
            slow_s = min(left_s * factor, self.durable_s - self.now_s)
            self._lose(slow_s - slow_s / factor)
            left_s -= slow_s / factor
            self._pass(schedule, slow_s)
        self._pass(schedule, left_s)

    def _pass(self, schedule: Schedule, seconds: float) -> None:
        """Time goes by; if the snapshot becomes durable meanwhile, the schedule hears of it at that very moment."""
        end_s = self.now_s + seconds
        if self.durable_s is not None and self.durable_s <= end_s:
            self.now_s, self.durable_s = self.durable_s, None
            began_s = self.taken_s[-1]
            ok = not self.fails(len(self.taken_s))
            schedule.finished(self.stall_s, 0.0, self.now_s - self.tidy_s - began_s, ok, self.tidy_s)
        self.now_s = end_s

    def _take(self, schedule: Schedule) -> None:
        schedule.taken()
        self.taken_s.append(self.now_s)
        self._lose(self.stall_s)
        self.now_s += self.stall_s
        self.durable_s = self.now_s + self.size_bytes / self.bandwidth(self.now_s) + self.tidy_s

    def _lose(self, seconds: float) -> None:
        self.lost_s += seconds
        self.lost_at_s.append((self.now_s, seconds))


def _tuned(machine: Machine, budget: float | None = None, mtbf_s: float | None = None) -> Schedule:
    return Schedule(overhead_budget=budget, mtbf_s=mtbf_s, clock=machine.clock)


# --- the budget -------------------------------------------------------------------------------------------------------

CONDITIONS: dict[str, tuple[float, dict[str, object]]] = {
    "even steps": (4, {}),
    "noisy steps": (4, {"noise": 0.05}),
    "very noisy steps": (16, {"noise": 0.1}),
    "hiccups": (16, {"noise": 0.05, "hiccups": 0.02}),
    "no slowdown": (4, {"noise": 0.05, "slowdown": 0.0, "stall_s": 0.25}),
    "no stall": (4, {"noise": 0.05, "stall_s": 0.0}),
    "a machine that drifts": (4, {"noise": 0.03, "step_s": lambda now_s: 0.25 * (1 + 0.04 * math.sin(now_s / 60))}),
    "a disk that becomes slower": (4, {"noise": 0.05, "bandwidth": lambda now_s: 300e6 if now_s < 2 * HOURS else 60e6}),
    "a disk that becomes faster": (4, {"noise": 0.05, "bandwidth": lambda now_s: 60e6 if now_s < 2 * HOURS else 300e6}),
    "retention": (4, {"noise": 0.05, "tidy_s": 1.5}),
    "evaluation": (4, {"noise": 0.05, "pause": (1000, 60.0)}),
    "other batches": (4, {"noise": 0.05, "step_s": lambda now_s: 0.25 if now_s < 2 * HOURS else 0.4}),
    "short steps": (0.2, {"noise": 0.1, "step_s": lambda now_s: 0.002, "stall_s": 0.005, "size_bytes": 30e6}),
    "long steps": (200, {"noise": 0.05, "step_s": lambda now_s: 40.0, "stall_s": 1.0, "size_bytes": 30e9}),
}
"""Simulated hours, and what differs from ``Machine``. The noisier the steps, the longer until chance is small."""


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_overhead_stays_at_the_budget(condition: str, budget: float) -> None:
    """Over the hours in ``CONDITIONS`` it is within a tenth of a point of the budget."""
    hours, differs = CONDITIONS[condition]
    machine = Machine(**differs)  # type: ignore[arg-type]
    machine.run(_tuned(machine, budget), hours * HOURS)
    assert machine.overhead == pytest.approx(budget, abs=POINTS)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("change", ["slower", "faster"])
def test_each_half_of_the_run_keeps_to_the_budget(change: str, budget: float) -> None:
    """A disk that becomes 5 times slower or faster midway is followed: the second half alone is at the budget."""
    speeds = (300e6, 60e6) if change == "slower" else (60e6, 300e6)
    machine = Machine(noise=0.05, bandwidth=lambda now_s: speeds[now_s >= 2 * HOURS])
    schedule = _tuned(machine, budget)
    machine.run(schedule, 2 * HOURS)
    assert machine.overhead == pytest.approx(budget, abs=POINTS)
    machine.run(schedule, 4 * HOURS)
    assert machine.overhead_since(2 * HOURS) == pytest.approx(budget, abs=POINTS)


@pytest.mark.parametrize("budget", BUDGETS)
def test_training_that_begins_to_suffer_more_keeps_to_the_budget(budget: float) -> None:
    """Writing that slows steps by 30% instead of 10% after two hours: six hours in all are at the budget."""
    machine = Machine(noise=0.05)
    schedule = _tuned(machine, budget)
    machine.run(schedule, 2 * HOURS)
    machine.slowdown = 0.3
    machine.run(schedule, 6 * HOURS)
    assert machine.overhead == pytest.approx(budget, abs=POINTS)


def test_a_slower_disk_is_noticed_at_once() -> None:
    """Within five snapshots the interval is that of the new cost, give or take a quarter."""
    machine = Machine(noise=0.02, bandwidth=lambda now_s: 300e6 if now_s < HOURS else 60e6)
    machine.run(_tuned(machine, 0.01), 2 * HOURS)
    later = [at_s for at_s in machine.taken_s if at_s > HOURS]
    cost_s = 0.05 + 10.0 * 0.1 / 1.1
    assert later[6] - later[5] == pytest.approx(cost_s / 0.01, rel=0.25)


def test_the_engines_own_figure_is_the_overhead() -> None:
    """What ``figures`` tells agrees with what the simulator knows."""
    machine = Machine(noise=0.05)
    schedule = _tuned(machine, 0.03)
    machine.run(schedule, 4 * HOURS)
    figures = schedule.figures()
    assert figures is not None
    assert figures.overhead == pytest.approx(machine.overhead, abs=POINTS)
    assert figures.lost_s_per_snapshot == pytest.approx(machine.lost_s / len(machine.taken_s), rel=0.15)
    assert figures.time_to_durable_s == pytest.approx(2.05, rel=0.01)
    assert figures.step_s == pytest.approx(0.25, rel=0.05)
    assert figures.interval_s == pytest.approx(figures.lost_s_per_snapshot / 0.03)


@pytest.mark.parametrize(
    "machine",
    [
        {"pause": (20, 2.0)},
        {"pause": (20, 1.0), "noise": 0.1},
        {"step_s": lambda now_s: 0.01, "pause": (10, 0.9)},
    ],
    ids=["2 s every 20 steps", "1 s every 20 steps", "a GPU that is waited for every 10 steps"],
)
@pytest.mark.parametrize("budget", BUDGETS)
def test_uneven_loops_are_bounded(machine: dict[str, object], budget: float) -> None:
    """Where long pauses are a rhythm lost time is hard to tell from them: most often less than the budget is spent."""
    made = Machine(**machine)  # type: ignore[arg-type]
    made.run(_tuned(made, budget), 4 * HOURS)
    assert 0.1 * budget < made.overhead < 1.5 * budget


@pytest.mark.parametrize("factor", [0.15, 4.0])
def test_steps_that_change_a_lot_do_not_run_away(factor: float) -> None:
    """Much shorter or longer steps midway: the first hour with them may be off, the next six are at the budget."""
    machine = Machine(noise=0.05, step_s=lambda now_s: 0.5 if now_s < HOURS else 0.5 * factor, size_bytes=1200e6)
    machine.run(_tuned(machine, 0.02), 8 * HOURS)
    assert machine.overhead_since(2 * HOURS) == pytest.approx(0.02, abs=POINTS)
    assert machine.overhead == pytest.approx(0.02, abs=0.002)


def test_a_disk_that_needs_longer_than_the_interval_sets_the_pace() -> None:
    """One snapshot after the other, with steps between them to compare with; the budget is not used up."""
    machine = Machine(noise=0.05, size_bytes=9e9)
    machine.run(_tuned(machine, 0.5), HOURS)
    way_s = 0.05 + 30.0
    assert way_s < min(machine.intervals_s())
    assert sum(machine.intervals_s()) / len(machine.intervals_s()) < 1.6 * way_s
    assert machine.overhead < 0.5


def test_failed_snapshots_are_charged_and_not_repeated_at_every_step() -> None:
    """A full disk for an hour: attempts a minute or more apart, and the overhead keeps to the budget."""
    machine = Machine(noise=0.02)
    machine.fails = lambda number: HOURS < machine.taken_s[-1] < 2 * HOURS
    schedule = _tuned(machine, 0.01)
    machine.run(schedule, 4 * HOURS)
    failing = [at_s for at_s in machine.taken_s if HOURS < at_s < 2 * HOURS]
    assert len(failing) > 10
    assert min(after - before for before, after in itertools.pairwise(failing)) >= RETRY_S
    assert machine.overhead <= 0.01 + POINTS
    assert machine.overhead_since(2.5 * HOURS) == pytest.approx(0.01, abs=POINTS)


def test_a_disk_that_is_full_from_the_start_is_tried_now_and_then() -> None:
    """Without any success the cost stays unknown; attempts are a minute apart."""
    machine = Machine(fails=lambda number: True)
    machine.run(_tuned(machine, 0.01), HOURS)
    assert 30 < len(machine.taken_s) <= 60
    assert min(machine.intervals_s()) >= RETRY_S


def test_snapshots_of_other_rules_are_charged_to_the_account() -> None:
    """``every_steps`` alone keeps to half the budget; the tuned rule adds only what is left of it."""
    machine = Machine(has_fixed_rule=True)
    cost_s = 0.05 + 2.0 * 0.1 / 1.1
    every = int(cost_s / 0.005 / 0.25)
    machine.run(Schedule(every_steps=every, overhead_budget=0.01, clock=machine.clock), 4 * HOURS)
    assert machine.overhead == pytest.approx(0.01, abs=POINTS)


def test_a_restart_takes_its_first_snapshot_early() -> None:
    """A new process knows no cost: it pays for one snapshot within seconds, and keeps to the budget from then on."""
    machine = Machine(noise=0.05)
    for restart in range(4):
        begin_s, machine.durable_s = machine.now_s, None  # what was on its way is lost
        schedule = _tuned(machine, 0.01)
        schedule.restored(None)
        machine.run(schedule, (restart + 1) * HOURS)
        assert next(at_s for at_s in machine.taken_s if at_s > begin_s) < begin_s + 5
    assert machine.overhead == pytest.approx(0.01, abs=POINTS)


# --- mean time between failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtbf_s", [600.0, 3600.0, 86400.0])
def test_the_interval_is_young_and_dalys(mtbf_s: float) -> None:
    """Without a budget snapshots follow each other at Daly's optimum for what they cost, within 5%."""
    machine = Machine(noise=0.03)
    machine.run(_tuned(machine, mtbf_s=mtbf_s), max(4 * HOURS, mtbf_s))
    cost_s = machine.lost_s / len(machine.taken_s)
    intervals_s = machine.intervals_s()[3:]
    mean_s = sum(intervals_s) / len(intervals_s)
    assert mean_s == pytest.approx(best_interval_s(cost_s, mtbf_s), rel=0.05)
    assert mean_s == pytest.approx(math.sqrt(2 * cost_s * mtbf_s), rel=0.05)


def test_with_both_the_larger_interval_counts() -> None:
    """The budget is a cap: it stretches an interval that would cost too much, and shortens none."""
    tight = Machine(noise=0.03)
    tight.run(_tuned(tight, 0.01, mtbf_s=600.0), 4 * HOURS)  # failures alone: every 17 s, the budget: every 23 s
    assert tight.overhead == pytest.approx(0.01, abs=POINTS)
    loose = Machine(noise=0.03)
    loose.run(_tuned(loose, 0.05, mtbf_s=86400.0), 8 * HOURS)  # failures: every 200 s, the budget: every 5 s
    cost_s = loose.lost_s / len(loose.taken_s)
    intervals_s = loose.intervals_s()[3:]
    assert sum(intervals_s) / len(intervals_s) == pytest.approx(best_interval_s(cost_s, 86400.0), rel=0.05)


def test_a_snapshot_counts_only_when_it_is_durable() -> None:
    """One that failed protects nothing: the next attempt does not wait for a whole interval."""
    machine = Machine()
    schedule = _tuned(machine, mtbf_s=1e6)
    machine.run(schedule, HOURS)
    interval_s = machine.intervals_s()[-1]
    number = len(machine.taken_s) + 1
    machine.fails = lambda taken: taken == number
    machine.run(schedule, 3 * HOURS)
    failed_s, again_s, after_s = machine.taken_s[number - 1 : number + 2]
    assert again_s - failed_s < 0.5 * interval_s
    assert after_s - again_s == pytest.approx(interval_s, rel=0.25)


# --- anything ---------------------------------------------------------------------------------------------------------


@given(
    budget=st.sampled_from([0.003, 0.01, 0.05, 0.2]),
    step_s=st.floats(0.001, 20.0),
    stall_s=st.floats(0.0, 5.0),
    slowdown=st.floats(0.0, 2.0),
    way_s=st.floats(0.01, 60.0),
    noise=st.floats(0.0, 0.2),
    every=st.integers(50, 500),
    pause_s=st.floats(0.0, 600.0),
    seed=st.integers(0, 1000),
)
def test_no_loop_exceeds_its_budget_by_much(
    budget: float,
    step_s: float,
    stall_s: float,
    slowdown: float,
    way_s: float,
    noise: float,
    every: int,
    pause_s: float,
    seed: int,
) -> None:
    """Whatever loop and disk are like, with pauses now and then: at most half above it, and three snapshots' cost.

    ``Machine.run`` checks beside it that none is asked for while another is on its way.
    """
    machine = Machine(
        step_s=lambda now_s: step_s,
        stall_s=stall_s,
        slowdown=slowdown,
        size_bytes=way_s,
        bandwidth=lambda now_s: 1.0,
        noise=noise,
        pause=(every, pause_s),
        seed=seed,
    )
    machine.run(_tuned(machine, budget), 3000 * step_s)
    most_s = max((sum(lost for _, lost in group) for group in _by_snapshot(machine)), default=0.0)
    allowed_s = 1.5 * budget * (machine.now_s - machine.lost_s) + 3 * most_s
    assert machine.lost_s <= allowed_s


def _by_snapshot(machine: Machine) -> list[list[tuple[float, float]]]:
    """What was lost, snapshot by snapshot."""
    groups: list[list[tuple[float, float]]] = [[] for _ in machine.taken_s]
    for at_s, lost_s in machine.lost_at_s:
        groups[bisect.bisect_right(machine.taken_s, at_s) - 1].append((at_s, lost_s))
    return groups


# --- a real run -------------------------------------------------------------------------------------------------------


def test_the_real_run_works_and_tells_its_figures(tmp_path: Path) -> None:
    """``bench/interval_control.py`` trains, keeps its groups, and writes figures that fit together."""
    finished = subprocess.run(
        [sys.executable, "bench/interval_control.py", "--quick", "--results", str(tmp_path), "--folder", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "interval_control.json").read_text())
    assert result["overhead_budget"] == 0.05
    assert len(result["groups"]) == 2
    assert result["engine_figures"]["snapshots"] >= 2
    low, high = result["overhead_interval_95"]
    assert low <= result["overhead"] <= high
    assert result["engine_figures"]["lost_s"] >= 0
    assert f"{result['overhead']:.2%}" in finished.stdout

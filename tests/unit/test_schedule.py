"""When a snapshot is due: the fixed rules, what is refused, and how lost time is measured."""

from __future__ import annotations

import itertools
import logging
import math
import random
import threading
import timeit
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_async.errors import UsageError
from ciuic_async.schedule.account import DEBT_SNAPSHOTS, best_interval_s
from ciuic_async.schedule.meter import BASELINE_STEPS, LostTimeMeter
from ciuic_async.schedule.rules import Schedule


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# --- fixed rules ------------------------------------------------------------------------------------------------------


def _asked(schedule: Schedule, epochs: list[Any]) -> list[int]:
    """The steps, counted from 1, at which a snapshot was due; each is taken."""
    due = []
    for step, epoch in enumerate(epochs, start=1):
        if schedule.step_done(step, epoch):
            schedule.taken()
            schedule.finished(0.0, 0.0, 0.0, True)
            due.append(step)
    return due


def test_without_a_rule_nothing_is_ever_due() -> None:
    """A schedule without rules leaves it to ``save``."""
    assert _asked(Schedule(), [0, 1, None, "two"] * 50) == []


def test_every_steps_counts_the_steps_of_the_whole_training() -> None:
    """Multiples of the training's step are due, also after a restore at any step."""
    schedule = Schedule(every_steps=5)
    assert [step for step in range(1, 21) if schedule.step_done(step)] == [5, 10, 15, 20]
    schedule.restored(None)
    assert [step for step in range(8, 21) if schedule.step_done(step)] == [10, 15, 20]


def test_every_epochs_is_due_at_the_first_step_of_the_next_one() -> None:
    """An epoch is over when the next begins; several may be asked for at once."""
    epochs = [0, 0, 0, 1, 1, 2, 2, 3, 4]
    assert _asked(Schedule(every_epochs=1), epochs) == [4, 6, 8, 9]
    assert _asked(Schedule(every_epochs=2), epochs) == [6, 9]
    assert _asked(Schedule(every_epochs=1), [None] * 9) == []


def test_epochs_that_are_no_numbers_count_at_every_change() -> None:
    """Texts cannot be subtracted, arrays not even compared: a change is a new epoch."""
    assert _asked(Schedule(every_epochs=3), list("aabbc")) == [3, 5]

    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth value of an array is ambiguous")

        def __hash__(self) -> int:
            return 0

    assert _asked(Schedule(every_epochs=1), [Odd(), Odd()]) == [1, 2]


def test_a_restore_sets_the_epoch() -> None:
    """Going on within the restored epoch is no new epoch."""
    schedule = Schedule(every_epochs=1)
    schedule.restored(7)
    assert _asked(schedule, [7, 7, 8, 8]) == [3]


def test_a_snapshot_that_the_user_asked_for_does_not_end_the_epoch() -> None:
    """``save`` in the middle of an epoch leaves the epoch's own snapshot due."""
    schedule = Schedule(every_epochs=1)
    assert not schedule.step_done(1, 0)
    schedule.taken(scheduled=False)
    assert schedule.step_done(2, 1)


def test_a_snapshot_that_was_due_and_not_taken_stays_due() -> None:
    """If the caller could not take it (an error surfaced instead), the next step asks again."""
    clock = Clock()
    schedule = Schedule(every_epochs=1, every_seconds=10, clock=clock)
    schedule.step_done(1, 0)
    assert schedule.step_done(2, 1)
    assert schedule.step_done(3, 1)
    schedule.taken()
    assert not schedule.step_done(4, 1)


def test_every_seconds_counts_from_the_last_snapshot_or_restore() -> None:
    """Any snapshot starts the interval anew, and so does a restore."""
    clock = Clock()
    schedule = Schedule(every_seconds=10, clock=clock)
    due = []
    for step in range(1, 40):
        clock.now_s += 1
        if step == 4:
            schedule.taken(scheduled=False)
        if step == 20:
            schedule.restored(0)
        if schedule.step_done(step, 0):
            due.append(step)
            schedule.taken()
    assert due == [14, 30]


class _Before:
    """The rules as the checkpointer had them before they moved here, word for word: what stays the same."""

    def __init__(self, steps: int | None, epochs: float | None, seconds: float | None, clock: Clock) -> None:
        self.every_steps, self.every_epochs, self.every_seconds, self.clock = steps, epochs, seconds, clock
        self.epoch_of_snapshot: Any = None
        self.last_snapshot_s = clock()

    def step(self, step: int, epoch: Any) -> bool:
        if self.epoch_of_snapshot is None:
            self.epoch_of_snapshot = epoch
        return self._due(step, epoch)

    def _due(self, step: int, epoch: Any) -> bool:
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        if self.every_seconds is not None and self.clock() - self.last_snapshot_s >= self.every_seconds:
            return True
        if self.every_epochs is None or epoch is None:
            return False
        try:
            if epoch == self.epoch_of_snapshot:
                return False
            return bool(epoch - self.epoch_of_snapshot >= self.every_epochs)
        except Exception:
            return True


@given(
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 20),
    st.lists(
        st.tuples(
            st.sampled_from(["step", "step", "step", "save", "restore", "surface"]),
            st.none() | st.integers(-2, 6) | st.sampled_from(["a", "b"]),
            st.integers(0, 8),
        ),
        max_size=60,
    ),
)
def test_fixed_rules_are_the_old_ones(
    steps: int | None, epochs: int | None, seconds: int | None, actions: list[tuple[str, Any, int]]
) -> None:
    """Whatever a loop does, every step gets the answer that it got before these rules had a module of their own."""
    clock = Clock()
    before = _Before(steps, epochs, seconds, clock)
    now = Schedule(steps, epochs, seconds, clock=clock)
    step = 0
    for action, epoch, passed_s in actions:
        clock.now_s += passed_s
        if action == "save":
            before.last_snapshot_s = clock()
            now.taken(scheduled=False)
        elif action == "restore":
            step = 3
            before.epoch_of_snapshot, before.last_snapshot_s = epoch, clock()
            now.restored(epoch)
        else:
            step += 1
            due = now.step_done(step, epoch)
            assert due == before.step(step, epoch)
            if due and action == "step":  # else an error surfaced, and nothing was taken
                before.epoch_of_snapshot, before.last_snapshot_s = epoch, clock()
                now.taken()


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_steps": 0},
        {"every_steps": 2.5},
        {"every_epochs": 0},
        {"every_epochs": "one"},
        {"every_seconds": -1.0},
        {"every_seconds": True},
        {"overhead_budget": 0},
        {"overhead_budget": 1},
        {"overhead_budget": 1.5},
        {"overhead_budget": -0.01},
        {"overhead_budget": math.nan},
        {"overhead_budget": "1%"},
        {"mtbf_s": 0},
        {"mtbf_s": -3.0},
        {"mtbf_s": math.inf},
        {"mtbf_s": math.nan},
        {"mtbf_s": "1h"},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any]) -> None:
    """What is no number in its range is a UsageError that names the argument and shows what was found."""
    with pytest.raises(UsageError, match=rf"{next(iter(arguments))}=.*expected"):
        Schedule(**arguments)


def test_figures_are_there_only_where_something_is_tuned() -> None:
    """Fixed rules measure nothing; a budget has no interval before the first snapshot."""
    assert Schedule(every_steps=3).figures() is None
    figures = Schedule(overhead_budget=0.01).figures()
    assert figures is not None
    assert figures.interval_s is None
    assert figures.overhead == 0.0


# --- Young and Daly ---------------------------------------------------------------------------------------------------


def test_small_costs_give_youngs_interval() -> None:
    """Where a snapshot costs little against the time between failures, the interval is sqrt(2 cost mtbf)."""
    for cost_s, mtbf_s in [(0.1, 3600.0), (1.0, 86400.0), (5.0, 1e6)]:
        assert best_interval_s(cost_s, mtbf_s) == pytest.approx(math.sqrt(2 * cost_s * mtbf_s), rel=0.01)


@given(st.floats(1e-3, 1e3), st.floats(1.0, 1e6))
def test_the_interval_minimises_the_time_to_solution(cost_s: float, mtbf_s: float) -> None:
    """In Daly's model (failures are Poisson, also during snapshots) no other interval is better by a thousandth."""

    def time_to_solution(period_s: float) -> float:
        return math.expm1(period_s / mtbf_s) / (period_s - cost_s)

    if cost_s >= mtbf_s / 2:
        return  # most snapshots would fail; the series is for less
    best = time_to_solution(best_interval_s(cost_s, mtbf_s))
    grid = [cost_s + (10 * mtbf_s - cost_s) * 1.01**-number for number in range(2500)]
    finite = [time_to_solution(period_s) for period_s in grid if period_s - cost_s > 1e-9 * mtbf_s]
    assert best <= 1.001 * min(finite)


def test_costs_beyond_the_time_between_failures_still_give_an_interval() -> None:
    """Hopeless machines get a finite interval of at least the cost."""
    assert best_interval_s(100.0, 10.0) == 110.0


# --- lost time --------------------------------------------------------------------------------------------------------


def _warmed(step_s: float = 0.2, steps: int = 60) -> LostTimeMeter:
    meter = LostTimeMeter()
    for _ in range(steps):
        meter.undisturbed(step_s)
    return meter


def test_lost_time_is_what_steps_take_longer() -> None:
    """The stall is taken out, and what remains beyond the usual step is the slowdown."""
    meter = _warmed(0.2)
    for step_s in (0.2 + 0.5, 0.3, 0.3, 0.25):  # blocked for half a second in the first
        meter.disturbed(step_s)
    assert meter.settle(0.5) == pytest.approx(0.25)


@pytest.mark.parametrize("pause_at", range(12))
def test_a_pause_is_no_lost_time(pause_at: int) -> None:
    """An evaluation of a minute while a snapshot is on its way changes what it cost by its step's share at most."""
    meter = _warmed(0.2)
    for number in range(12):
        stall_s = 0.5 if number == 0 else 0.0
        meter.disturbed(0.25 + stall_s + (60.0 if number == pause_at else 0.0))
    assert meter.settle(0.5) == pytest.approx(12 * 0.05, rel=0.1)


def test_long_steps_in_a_row_are_no_pause() -> None:
    """Writing that makes every step ten times longer is lost time, however unusual."""
    meter = _warmed(0.2)
    for _ in range(12):
        meter.disturbed(2.0)
    assert meter.settle(0.0) == pytest.approx(12 * 1.8)


def test_a_pause_between_snapshots_does_not_change_the_usual_step() -> None:
    """Evaluations are left out of what steps are compared to."""
    meter = _warmed(0.2)
    for number in range(1, 500):
        meter.undisturbed(30.0 if number % 100 == 0 else 0.2)
    assert meter.step_s == pytest.approx(0.2)


def test_the_first_steps_may_compile() -> None:
    """A first step of a minute does not become the usual one."""
    meter = LostTimeMeter()
    for step_s in (60.0, 20.0, 0.3, *[0.2] * 5):
        meter.undisturbed(step_s)
    assert meter.step_s == pytest.approx(0.2)


@pytest.mark.parametrize("factor", [0.01, 0.1, 0.5, 2.0, 10.0, 100.0])
def test_another_step_time_is_learned(factor: float) -> None:
    """A batch that becomes larger or smaller for good is the new usual step within a few hundred steps."""
    meter = _warmed(0.2)
    for _ in range(400):
        meter.undisturbed(0.2 * factor)
    assert meter.step_s == pytest.approx(0.2 * factor, rel=0.02)


def test_disturbed_steps_that_are_shorter_mean_that_the_loop_has_changed() -> None:
    """Nobody gains time by a snapshot: the mean step is out of date, and nothing was lost or won."""
    meter = _warmed(1.0)
    for _ in range(5):
        meter.disturbed(0.2)
    assert meter.settle(0.0) == 0.0
    assert meter.step_s == pytest.approx(0.2)


def test_a_rhythm_of_long_steps_is_part_of_the_usual_step() -> None:
    """Every tenth step waits for the GPU: that is no pause, and the mean step is that of the whole rhythm."""
    meter = LostTimeMeter()
    for number in range(4000):
        meter.undisturbed(0.91 if number % 10 == 9 else 0.01)
    assert meter.step_s == pytest.approx(0.1, rel=0.3)


def test_chance_cancels_out() -> None:
    """With noisy steps and no slowdown the measured slowdowns have both signs, and their mean is near zero."""
    numbers = random.Random(5)
    meter = LostTimeMeter()
    slowdowns = []
    for _ in range(2000):
        for _ in range(40):
            meter.undisturbed(0.2 * math.exp(numbers.gauss(0, 0.1)))
        for _ in range(10):
            meter.disturbed(0.2 * math.exp(numbers.gauss(0, 0.1)))
        slowdowns.append(meter.settle(0.0))
    assert min(slowdowns) < 0 < max(slowdowns)
    assert abs(math.fsum(slowdowns) / len(slowdowns)) < 0.005


@given(
    st.lists(st.floats(1e-4, 100.0), min_size=1, max_size=30),
    st.lists(st.floats(1e-4, 100.0), max_size=30),
    st.floats(0.0, 50.0),
)
def test_any_times_give_a_finite_result(before: list[float], during: list[float], stall_s: float) -> None:
    """Whatever the clock says, the mean step stays within what was seen, and the slowdown is a number."""
    meter = LostTimeMeter()
    for step_s in before:
        meter.undisturbed(step_s)
    for step_s in during:
        meter.disturbed(step_s)
    slowdown_s = meter.settle(stall_s)
    assert math.isfinite(slowdown_s)
    assert slowdown_s <= sum(during) + 1e-9
    assert 0 < meter.step_s <= max(before) * (1 + 1e-9)


# --- the interval that tunes itself -----------------------------------------------------------------------------------


def _steps(schedule: Schedule, clock: Clock, count: int, step_s: float = 0.2) -> list[int]:
    """The steps at which a snapshot was due; none is taken."""
    due = []
    for step in range(1, count + 1):
        clock.now_s += step_s
        if schedule.step_done(step):
            due.append(step)
    return due


def _snapshot(schedule: Schedule, clock: Clock, stall_s: float, steps: int = 5, ok: bool = True) -> None:
    """Take one that blocks for ``stall_s``, slows nothing, and is durable within so many steps of 0.2 s."""
    schedule.taken()
    clock.now_s += stall_s
    for step in range(1, steps + 1):
        clock.now_s += 0.2
        if step == steps:
            schedule.finished(stall_s, 0.0, stall_s + 0.2 * steps, ok)
        assert not schedule.step_done(step)


@pytest.mark.parametrize("options", [{"overhead_budget": 0.01}, {"mtbf_s": 3600.0}], ids=str)
def test_the_first_snapshot_comes_after_a_few_steps(options: dict[str, float]) -> None:
    """Its cost is unknown, and only a snapshot can tell."""
    clock = Clock()
    assert _steps(Schedule(**options, clock=clock), clock, 30)[0] == BASELINE_STEPS + 1  # type: ignore[arg-type]


def test_with_very_long_steps_the_first_snapshot_does_not_wait_for_many() -> None:
    """One step of ten minutes is baseline enough."""
    clock = Clock()
    assert _steps(Schedule(overhead_budget=0.01, clock=clock), clock, 5, step_s=600.0)[0] == 2


def test_the_debt_of_the_first_snapshot_is_paid_before_the_next() -> None:
    """At 1% a first snapshot that cost 1 s is followed by the next when 2 s are earned: 200 s of training."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.01, clock=clock)
    _steps(schedule, clock, BASELINE_STEPS + 1)
    _snapshot(schedule, clock, 1.0)
    begin_s = clock.now_s
    first = _steps(schedule, clock, 2000)[0]
    assert 0.2 * first + begin_s - 100 == pytest.approx(200, rel=0.12)


def test_nothing_is_due_while_a_snapshot_is_on_its_way() -> None:
    """However rich the account, the previous snapshot must be durable first."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.5, mtbf_s=1.0, clock=clock)
    _steps(schedule, clock, 50)
    schedule.taken()
    assert _steps(schedule, clock, 5000) == []
    schedule.finished(0.1, 0.0, 1000.0, True)
    assert _steps(schedule, clock, 5000)[0] > 0


def test_a_discarded_snapshot_that_is_taken_again_finishes_once() -> None:
    """``again`` counts the two as one: after its ``finished`` nothing is on its way."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.05, clock=clock)
    _steps(schedule, clock, 20)
    schedule.taken()
    clock.now_s += 0.3
    schedule.step_done(1)
    schedule.taken(scheduled=False, again=True)
    schedule.finished(0.1, 0.0, 0.5, True)
    assert _steps(schedule, clock, 1000) != []


def test_snapshots_that_overlap_share_their_cost() -> None:
    """``every_steps`` may take one while another is on its way; the figures know of both."""
    clock = Clock()
    schedule = Schedule(every_steps=2, overhead_budget=0.05, clock=clock)
    _steps(schedule, clock, 20)
    for _ in range(2):
        schedule.taken()
        clock.now_s += 0.2 + 0.5
        schedule.step_done(1)
    schedule.finished(0.5, 0.0, 1.4, True)
    schedule.finished(0.5, 0.0, 0.7, True)
    schedule.step_done(1)
    figures = schedule.figures()
    assert figures is not None
    assert figures.snapshots == 2
    assert figures.stall_s_per_snapshot == pytest.approx(0.5)
    assert figures.lost_s == pytest.approx(1.0, abs=0.5)


def test_a_fixed_rule_beside_a_budget_is_still_followed() -> None:
    """Any one rule is enough: a budget does not hold back ``every_steps``."""
    clock = Clock()
    schedule = Schedule(every_steps=10, overhead_budget=0.001, clock=clock)
    due = []
    for step in range(1, 101):
        clock.now_s += 0.2
        if schedule.step_done(step):
            due.append(step)
            schedule.taken()
            schedule.finished(5.0, 0.0, 5.0, True)
    assert set(range(10, 101, 10)) <= set(due)


def test_one_snapshot_that_hung_does_not_end_all_others() -> None:
    """A stall of an hour would take 100 hours to earn; beyond the usual cost of a few snapshots it is forgiven."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.01, clock=clock)
    _steps(schedule, clock, 20)
    for _ in range(5):
        _snapshot(schedule, clock, 0.2)
        _steps(schedule, clock, 100)
    _snapshot(schedule, clock, 3600.0)
    waited_s = 0.2 * _steps(schedule, clock, 20_000)[0]
    assert waited_s < 2 * (DEBT_SNAPSHOTS + 1) * 0.2 / 0.01
    figures = schedule.figures()
    assert figures is not None
    assert figures.lost_s >= 3600.0


def test_a_night_in_a_debugger_does_not_pay_for_a_thousand_snapshots() -> None:
    """A pause earns no more than 20 minutes do, and that is spent at no more than twice the usual pace."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.01, clock=clock)
    _steps(schedule, clock, 20)
    for _ in range(3):
        _snapshot(schedule, clock, 0.2)
        _steps(schedule, clock, 150)
    clock.now_s += 12 * 3600
    taken_s = []
    for step in range(5000):  # 1000 s: 50 snapshots at the usual pace
        clock.now_s += 0.2
        if schedule.step_done(step):
            taken_s.append(clock.now_s)
            _snapshot(schedule, clock, 0.2, steps=1)
    gaps_s = [after - before for before, after in itertools.pairwise(taken_s)]
    assert min(gaps_s) >= 0.5 * 0.2 / 0.01
    assert len(taken_s) <= 50 + 2 * 600 * 0.01 / 0.2


def test_time_of_a_restore_is_nobodys() -> None:
    """Neither a step nor lost time nor earnings: after a restore the clock starts at the next step."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.01, clock=clock)
    _steps(schedule, clock, 20)
    before = schedule.figures()
    schedule.restored(3)
    clock.now_s += 5000
    schedule.step_done(1)
    assert schedule.figures() == before


def test_the_writer_may_report_from_its_own_thread() -> None:
    """``finished`` on another thread is heard at the next step, none of ten thousand is lost."""
    schedule = Schedule(overhead_budget=0.5)
    count = 10_000
    for _ in range(count):
        schedule.taken()
    thread = threading.Thread(target=lambda: [schedule.finished(0.0, 0.0, 0.0, True) for _ in range(count)])
    thread.start()
    step = 0
    while thread.is_alive():
        schedule.step_done(step := step + 1)
    thread.join()
    schedule.step_done(step + 1)
    figures = schedule.figures()
    assert figures is not None
    assert figures.snapshots == count


def test_the_log_says_when_and_why_the_interval_changes(caplog: pytest.LogCaptureFixture) -> None:
    """One line with the figures when it changes by more than a fifth, and none while it stays."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.01, mtbf_s=1e5, clock=clock)
    _steps(schedule, clock, 20)
    with caplog.at_level(logging.INFO, logger="ciuic_async"):
        for _ in range(6):
            _snapshot(schedule, clock, 0.5)
            _steps(schedule, clock, 100)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1
        assert "0.5 s of training" in told[0]
        assert "budget of 1.00%" in told[0]
        assert "1e+05 s between failures" in told[0]
        for _ in range(6):
            _snapshot(schedule, clock, 2.5)
            _steps(schedule, clock, 100)
    assert 2 <= len(caplog.records) <= 7


def test_a_budget_that_affords_less_than_failures_need_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """If a failure comes before the next affordable snapshot, work would be lost in every run: a warning says so."""
    clock = Clock()
    schedule = Schedule(overhead_budget=0.001, mtbf_s=600.0, clock=clock)
    _steps(schedule, clock, 20)
    with caplog.at_level(logging.WARNING, logger="ciuic_async"):
        _snapshot(schedule, clock, 5.0)
    assert "raise overhead_budget" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "limit_s"),
    [
        (lambda: Schedule(every_steps=10**9, every_epochs=5, every_seconds=1e9), 2e-6),
        (lambda: Schedule(overhead_budget=1e-9, mtbf_s=1e9), 5e-6),
    ],
    ids=["rules", "budget"],
)
def test_a_step_costs_next_to_nothing(schedule: Callable[[], Schedule], limit_s: float) -> None:
    """Two microseconds a step with fixed rules, five with a budget (the best of many: the machine may be busy)."""
    made = schedule()
    for step in range(1, 1000):
        if made.step_done(step, 1):
            made.taken()
            made.finished(0.1, 0.0, 0.1, True)
    times_s = timeit.repeat(lambda: made.step_done(7, 1), number=2000, repeat=50)
    assert min(times_s) / 2000 < limit_s

"""When a snapshot is due: every so many steps, epochs or seconds, or as often as a budget of lost time allows.

The interval that tunes itself is an account (docs/interval.md): time in which training is not held up earns
``overhead_budget`` of itself, each snapshot pays what it was measured to cost, and the next one is due when the account
covers its predicted cost. ``mtbf_s`` gives the interval of Young and Daly instead, or beside it as a lower bound.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ciuic_async.arguments import check_number
from ciuic_async.errors import UsageError
from ciuic_async.events import logger

BASELINE_STEPS = 8
"""Steps measured before the first snapshot: enough that a median of them ignores compilation and warm-up."""
BASELINE_S = 60.0
"""... or one step at least and this long: with steps of a minute nobody waits for eight of them."""
WINDOW_STEPS = (32, 1024)
"""The mean step forgets over as many steps as a snapshot disturbs, within these bounds: few, for a machine can become
slower within minutes, and no fewer than the ones they are compared to."""
UNEVEN = 5.0
"""Uneven steps need a longer memory: so many times their relative variance."""
VARIANCE_STEPS = 64
"""Memory of the variance of steps."""
IMPOSSIBLE = 4.0
"""Disturbed steps are not shorter than undisturbed ones. If they seem to be by so many standard errors, the loop has
changed (a smaller batch), and they are the new mean."""
PAUSE_FACTOR = 3.0
"""A step this many times longer than usual is a pause (evaluation, export, a debugger). Background writing was seen to
make steps up to 2.8 times longer."""
PAUSE_ALLOWANCE_S = 0.1
"""Added to it: steps of a millisecond are often late by more than three of them, with and without snapshots."""
PAUSE_SHARE = 0.025
"""Long steps that come more often than this share are no pauses but the rhythm of the loop: an accumulated update, a
loss that is read every tenth step while a GPU runs ahead. The limit grows until it holds them."""
LIMIT_GROWTH = 1.5
"""The limit's growth at each pause, and its distance from a rhythm's longest step."""
LIMIT_DECAY = LIMIT_GROWTH ** (-PAUSE_SHARE / (1 - PAUSE_SHARE))
STALLED_STEPS = 8
"""The stall lies in the first interval after a snapshot was taken; a gate or a second attempt in one of the next."""
REST_STEPS = 2
REST_S = 30.0
"""Between two snapshots so many steps run undisturbed (or one, and so long), and no fewer than half as many as were
disturbed: the step to compare with stays fresh."""
SMOOTHING = 0.25
"""Weight of the newest snapshot in the predicted cost: a change of the disk's speed is learned within four."""
OUTLIER = 4.0
"""A value so many times the mean counts as no more than that, unless the one before was as large."""
DEBT_SNAPSHOTS = 10.0
"""Debt is forgiven beyond the usual cost of so many snapshots: one that hung for ten minutes must not leave training
without any for a day."""
SPREAD = 0.5
"""Savings are not spent at once: snapshots follow each other at no less than this share of the budget's interval."""
EARNING_STEPS = 64
"""What a long step earns is spread over so many."""
SAVINGS_S = 600.0
"""The account holds what this time earns (or two snapshots): a night in a debugger does not pay for a thousand."""
MEMORY = 32
MEMORY_SNAPSHOTS = (16, 256)
"""The slowdown for each second on the way is averaged over so many snapshots, and what was measured beyond it is paid
within as many: so many times as share an error, within these bounds. It is noisy, and the error of the mean step lasts
for several snapshots: charged at once, it would make snapshots that seem cheap more frequent than ones that seem dear,
and the errors would not cancel out. Stall and time are exact, and count at once."""
CREDIT_SNAPSHOTS = 20.0
"""Measured slowdowns below zero are noise and are set off against others, up to the cost of so many snapshots."""
DITHER = 0.2
GOLDEN = (math.sqrt(5) - 1) / 2
"""Intervals vary by this share in an even sequence without a period, lest snapshots fall into step with evaluations
that come every so many steps: these would always, or never, count as steps to compare with."""
RETRY_S = 60.0
"""After a failed snapshot: what filled the disk or broke the network takes a while to go away."""
NEWS = 0.2
"""A change of the interval by more than this share is logged."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the interval was chosen from. Seconds; ``None`` until the first snapshot is durable.

    Attributes:
        interval_s: from one snapshot to the next, as chosen now.
        interval_steps: the same in training steps.
        lost_s_per_snapshot: predicted cost of the next snapshot (smoothed).
        stall_s_per_snapshot: the share of it for which the training thread is blocked.
        time_to_durable_s: from taken to durable (smoothed).
        step_s: mean wall time of a step with nothing under way; 0 until known.
        lost_s: lost time of all snapshots so far.
        trained_s: time between steps so far, without the lost time.
        snapshots: how many were finished, failed ones included.
    """

    interval_s: float | None
    interval_steps: float | None
    lost_s_per_snapshot: float | None
    stall_s_per_snapshot: float | None
    time_to_durable_s: float | None
    step_s: float
    lost_s: float
    trained_s: float
    snapshots: int

    @property
    def overhead(self) -> float:
        """Lost time over time without snapshots, so far."""
        return self.lost_s / self.trained_s if self.trained_s > 0 else 0.0


class Schedule:
    """Decides when a snapshot is due. Any one rule is enough; without any, none ever is.

    Lives on the training thread; only ``finished`` may be called on another one. After each ``taken`` comes exactly one
    ``finished``, also for a snapshot that failed or was skipped: while one is missing, the rules that tune themselves
    take it to be under way, and ask for no other.

    Args:
        every_steps, every_epochs, every_seconds: fixed rules. An epoch is over when ``step_done`` is first called with
            the next one; epochs that are no numbers count at every change.
        overhead_budget: lost time may be this share of the time without snapshots, e.g. 0.01.
        mtbf_s: mean time between failures: the interval that loses least time to snapshots and failures together. With
            ``overhead_budget`` the larger interval of the two is taken: the budget is a cap.
        clock: seconds, never going back.

    Raises:
        UsageError: an argument is no number in its range.
    """

    def __init__(
        self,
        every_steps: int | None = None,
        every_epochs: float | None = None,
        every_seconds: float | None = None,
        overhead_budget: float | None = None,
        mtbf_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_number("every_steps", every_steps, whole=True)
        check_number("every_epochs", every_epochs)
        check_number("every_seconds", every_seconds)
        check_number("mtbf_s", mtbf_s)
        if mtbf_s is not None and math.isinf(mtbf_s):
            raise UsageError(f"mtbf_s={mtbf_s!r}: expected seconds; leave it out if nothing ever fails")
        check_number("overhead_budget", overhead_budget)
        if overhead_budget is not None and overhead_budget >= 1:
            raise UsageError(
                f"overhead_budget={overhead_budget!r}: expected a share below 1, e.g. 0.01 for one percent"
            )
        self._every_steps, self._every_epochs, self._every_seconds = every_steps, every_epochs, every_seconds
        self._clock = clock
        self._tuner = (
            None if overhead_budget is None and mtbf_s is None else _Tuner(overhead_budget, mtbf_s, self._clock)
        )
        self._epoch: Any = None
        self._epoch_of_snapshot: Any = None
        self._last_snapshot_s = clock()

    def step_done(self, step: int, epoch: Any = None) -> bool:
        """Count a finished training step; whether a snapshot is due now.

        Call it first thing after the step: what happens from here to the next call is attributed to the next step.
        """
        if self._epoch_of_snapshot is None:
            self._epoch_of_snapshot = epoch
        self._epoch = epoch
        due = self._tuner is not None and self._tuner.step_done()
        return due or self._rule_says(step, epoch)

    def taken(self, *, scheduled: bool = True, again: bool = False) -> None:
        """A snapshot is being taken, from now on.

        Args:
            scheduled: because ``step_done`` said so, and its epoch counts as done. False: the user asked for it; it is
                charged to the account like any other.
            again: one that is not finished was discarded, and this takes its place: ``finished`` comes once for both.
        """
        if scheduled:
            self._epoch_of_snapshot = self._epoch
        self._last_snapshot_s = self._clock()
        if self._tuner is not None:
            self._tuner.taken(again)

    def finished(self, stall_s: float, gate_s: float, time_to_durable_s: float, ok: bool) -> None:
        """A snapshot that was ``taken`` is durable (``ok``), or will never be. Any thread; at once.

        Args:
            stall_s: the training thread was blocked by it, the gate included (as in ``SnapshotStats``).
            gate_s: the share of ``stall_s`` spent in the optimizer gate.
            time_to_durable_s: from ``taken`` until now; without meaning unless ``ok``.
        """
        if self._tuner is not None:
            self._tuner.finished(_Finished(stall_s, gate_s, time_to_durable_s, ok, self._clock()))

    def restored(self, epoch: Any) -> None:
        """Training goes on from a snapshot of ``epoch``. The time until the next step is nobody's.

        Everything taken is finished.
        """
        self._epoch = self._epoch_of_snapshot = epoch
        self._last_snapshot_s = self._clock()
        if self._tuner is not None:
            self._tuner.restored()

    def figures(self) -> Figures | None:
        """What the interval was chosen from; None without ``overhead_budget`` and ``mtbf_s``."""
        return None if self._tuner is None else self._tuner.figures()

    def _rule_says(self, step: int, epoch: Any) -> bool:
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        if self._every_seconds is not None and self._clock() - self._last_snapshot_s >= self._every_seconds:
            return True
        if self._every_epochs is None or epoch is None:
            return False
        try:
            if epoch == self._epoch_of_snapshot:
                return False
            return bool(epoch - self._epoch_of_snapshot >= self._every_epochs)
        except Exception:  # no number (a text, an array, ...): every change counts
            return True


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """From one snapshot to the next, so that snapshots and repeated work cost least time together.

    Young's sqrt(2 cost mtbf) with the higher order terms of J. T. Daly, "A higher order estimate of the optimum
    checkpoint interval for restart dumps" (2006), equation 37; its interval ends where the dump begins, ours includes
    the cost. How long a snapshot takes to become durable makes every failure dearer by the same time, and so does not
    move the optimum.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s + cost_s
    share = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9)


class LostTimeMeter:
    """How much longer steps are while a snapshot is on its way, from the wall time of steps alone.

    Steps that are too long to be steps are left out on both sides, in the same way, so that pauses are no lost time
    and chance is: deviations count with their sign.

    Attributes:
        step_s: mean wall time of an undisturbed step; 0 until the first.
        steps: undisturbed steps since the last ``settle``.
        seconds: their wall time.
        disturbed_steps: the others, up to the last ``settle``.
        alike: snapshots that are compared to about the same steps, and so share an error.
        error_s: standard error of the last result of ``settle``.
    """

    def __init__(self) -> None:
        self.step_s = 0.0
        self.steps = 0
        self.seconds = 0.0
        self.disturbed_steps = 0
        self.alike = 1.0
        self.error_s = 0.0
        self._start: list[float] = []
        self._known_steps = 0
        self._variance = 0.0
        self._window_steps = WINDOW_STEPS[0]
        self._limit = PAUSE_FACTOR
        self._rest_steps = REST_STEPS
        self._slowdown = 2.0  # a guess, until snapshots were seen
        self._stalled: list[float] = []
        self._forget_disturbed()

    def undisturbed(self, step_s: float) -> None:
        """A step with nothing under way."""
        self.steps += 1
        self.seconds += step_s
        usual_s = self.step_s
        if self._known_steps < BASELINE_STEPS:
            self._start.append(step_s)
            self._known_steps += 1
            self.step_s = statistics.median(self._start)
        elif step_s > self._limit * usual_s + PAUSE_ALLOWANCE_S:
            self._limit *= LIMIT_GROWTH
        else:
            if self._limit > PAUSE_FACTOR:
                held = LIMIT_GROWTH * step_s / usual_s if step_s > PAUSE_FACTOR * usual_s else PAUSE_FACTOR
                self._limit = max(held, self._limit * LIMIT_DECAY)
            if self._known_steps < WINDOW_STEPS[1]:
                self._known_steps += 1
            off_s = step_s - usual_s
            self._variance += (off_s * off_s - self._variance) / min(self._known_steps, VARIANCE_STEPS)
            self.step_s = usual_s + off_s / min(self._known_steps, self._window_steps)

    def disturbed(self, step_s: float) -> None:
        """A step during a part of which a snapshot was under way."""
        self._disturbed_steps += 1
        if len(self._stalled) < STALLED_STEPS:
            self._stalled.append(step_s)
        else:
            self._count(step_s)

    def rested(self) -> bool:
        """Whether enough steps went undisturbed since the last snapshot."""
        return self.steps >= self._rest_steps or (self.steps > 0 and self.seconds >= REST_S)

    def settle(self, stall_s: float) -> float:
        """Nothing is under way any more: how much longer the disturbed steps were, without the stall. May be negative.

        ``stall_s`` of all snapshots since the last ``settle`` lies in the first of the steps.
        """
        left_s = stall_s
        for step_s in self._stalled:
            part_s = min(left_s, max(0.0, step_s - self.step_s))
            left_s -= part_s
            self._count(step_s - part_s)
        steps, slowdown_s = self._disturbed_steps, 0.0
        if self._counted_steps:
            mean_s = self._counted_s / self._counted_steps
            slowdown_s = steps * (mean_s - self.step_s) - left_s
            self.error_s = math.sqrt(self._variance * steps * (1 + steps / (2 * self._window_steps)))
            if slowdown_s < -IMPOSSIBLE * self.error_s:
                slowdown_s = 0.0
                self.step_s = min(self.step_s, mean_s)
                self._known_steps = BASELINE_STEPS
        shortest, longest = WINDOW_STEPS
        spread = self._variance / self.step_s**2 if self.step_s else 0.0
        self._window_steps = int(min(max(steps, shortest * (1 + UNEVEN * spread)), longest))
        self._rest_steps = max(REST_STEPS, steps // 2)
        self.disturbed_steps = steps
        self.alike = 2 * self._window_steps / max(self.steps, 1)
        self._forget_disturbed()
        self.steps, self.seconds = 0, 0.0
        return slowdown_s

    def _count(self, step_s: float) -> None:
        """A pause stands alone: of long steps in a row all count."""
        usual_s = self.step_s
        if not usual_s:
            return
        if step_s <= self._limit * self._slowdown * usual_s + PAUSE_ALLOWANCE_S:
            self._held_s = 0.0
            self._counted_steps += 1
            self._counted_s += step_s
            self._slowdown = max(1.0, self._slowdown + 0.1 * (step_s / usual_s - self._slowdown))
        elif self._held_s:
            self._counted_steps += 2
            self._counted_s += self._held_s + step_s
            self._held_s = 0.0
            self._slowdown = step_s / usual_s
        else:
            self._held_s = step_s

    def _forget_disturbed(self) -> None:
        self._stalled.clear()
        self._disturbed_steps = 0
        self._counted_steps = 0
        self._counted_s = 0.0
        self._held_s = 0.0


@dataclass(frozen=True, slots=True)
class _Finished:
    """What ``Schedule.finished`` was told, on its way to the training thread."""

    stall_s: float
    gate_s: float
    time_to_durable_s: float
    ok: bool
    at_s: float


class _Mean:
    """A mean that forgets, and that a single outlier does not carry away.

    The first value counts until there is a second: it holds what is allocated once for a whole run.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._count = 0
        self._last = 0.0

    def add(self, value: float) -> None:
        self._count += 1
        if self._count > 2:
            bounded = min(value, max(OUTLIER * self.value, self._last))
            self.value += max(SMOOTHING, 1 / (self._count - 1)) * (bounded - self.value)
        else:
            self.value = value
        self._last = value


class _Slowdown:
    """Lost time while snapshots are on their way: noisy, and therefore charged at its usual rate."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self._way_s = 0.0
        self._owed_s = 0.0
        self._count = 0

    def usual_s(self, way_s: float) -> float:
        """Lost time of a snapshot that is on its way for ``way_s``."""
        return max(0.0, self._lost_s / self._way_s * way_s) if self._way_s > 0 else 0.0

    def charge(self, lost_s: float, way_s: float, credit_s: float, alike: float) -> float:
        """What the account pays now for a measured ``lost_s``; the rest is owed. Chance cancels out, down to credit.

        ``way_s`` is 0 if nothing became durable; ``alike``: how many snapshots share an error.
        """
        least, most = MEMORY_SNAPSHOTS
        share = 1 / min(max(MEMORY * alike, least), most)
        if way_s > 0:
            self._count += 1
            if self._count == 2:  # the first one was slowed by what is allocated once
                self._lost_s = self._way_s = 0.0
            self._lost_s += lost_s - share * self._lost_s
            self._way_s += way_s - share * self._way_s
        usual_s = self.usual_s(way_s)
        self._owed_s = max(self._owed_s + lost_s, -credit_s)
        charge_s = max(0.0, usual_s + (self._owed_s - usual_s) * share)
        self._owed_s -= charge_s
        return charge_s


class _Tuner:
    """The account, and Young and Daly's interval."""

    def __init__(self, budget: float | None, mtbf_s: float | None, clock: Callable[[], float]) -> None:
        self._budget, self._mtbf_s, self._clock = budget, mtbf_s, clock
        self._rate = budget or 0.0
        self._meter = LostTimeMeter()
        self._news: deque[_Finished] = deque()  # the writer's thread appends, the training thread takes
        self._finished: list[_Finished] = []
        self._under_way = 0
        self._last_s: float | None = None
        self._account_s = self._unearned_s = 0.0
        self._savings_s = self._rate * SAVINGS_S
        self._stall, self._gate, self._to_durable = _Mean(), _Mean(), _Mean()
        self._slowdown = _Slowdown()
        self._cost_s: float | None = None
        self._last_charge_s = math.inf
        self._interval_s: float | None = None
        self._least_s = self._best_s = self._needed_s = self._patience_s = 0.0
        self._disturbed_s = self._elapsed_s = self._stall_s = self._slowdown_s = 0.0
        self._snapshots = 0
        self._taken_s = self._protected_s = self._not_before_s = clock()
        self._told_s: float | None = None

    def step_done(self) -> bool:
        now_s = self._clock()
        last_s, self._last_s = self._last_s, now_s
        step_s = 0.0 if last_s is None else now_s - last_s
        self._elapsed_s += step_s
        if self._under_way:
            if last_s is not None:
                self._meter.disturbed(step_s)
            self._disturbed_s += step_s
            self._collect()
            return False
        if last_s is None:
            return False
        self._meter.undisturbed(step_s)
        self._earn(step_s, 1)
        return self._is_due(now_s)

    def taken(self, again: bool) -> None:
        if not again:
            self._under_way += 1
        self._taken_s = self._clock()

    def finished(self, news: _Finished) -> None:
        self._news.append(news)

    def restored(self) -> None:
        self._last_s = None
        self._taken_s = self._protected_s = self._clock()

    def figures(self) -> Figures:
        step_s, interval_s, known = self._meter.step_s, self._interval_s, self._cost_s is not None
        lost_s = self._stall_s + max(0.0, self._slowdown_s)
        return Figures(
            interval_s=interval_s,
            interval_steps=interval_s / step_s if interval_s is not None and step_s > 0 else None,
            lost_s_per_snapshot=self._cost_s,
            stall_s_per_snapshot=self._stall.value if known else None,
            time_to_durable_s=self._to_durable.value if known else None,
            step_s=step_s,
            lost_s=lost_s,
            trained_s=self._elapsed_s - lost_s,
            snapshots=self._snapshots,
        )

    def _is_due(self, now_s: float) -> bool:
        if now_s < self._not_before_s:
            return False
        if self._cost_s is None:  # the first one shows what a snapshot costs, and its debt is paid before the next
            return self._meter.steps >= BASELINE_STEPS or self._meter.seconds >= BASELINE_S
        if self._budget is not None and (self._account_s < self._needed_s or now_s - self._taken_s < self._least_s):
            return False
        if self._mtbf_s is not None and now_s - self._protected_s < self._patience_s:
            return False
        return self._meter.rested()

    def _earn(self, seconds: float, steps: int) -> None:
        """All time earns in the end, but a long step or a pause does so over the next steps.

        Else snapshots would be due just after long steps more often than before them, and be compared with these.
        """
        earning_s = steps * self._meter.step_s + self._unearned_s / EARNING_STEPS
        self._unearned_s = min(self._unearned_s + seconds - earning_s, SAVINGS_S)
        self._account_s = min(self._account_s + self._rate * earning_s, self._savings_s)

    def _collect(self) -> None:
        """Hear what the writer finished; settle when nothing is under way any more."""
        while self._news:
            self._finished.append(self._news.popleft())
            self._under_way = max(self._under_way - 1, 0)  # one from before a restart is none of ours
        if self._under_way == 0:
            self._settle(self._finished)
            self._finished = []

    def _settle(self, finished: list[_Finished]) -> None:
        """Charge what was measured, and predict the next. Snapshots that overlapped share the cost evenly."""
        stall_s = sum(one.stall_s for one in finished)
        slowdown_s = self._meter.settle(stall_s)
        done = [one for one in finished if one.ok]
        if done:
            self._stall.add(stall_s / len(finished))
            self._gate.add(sum(one.gate_s for one in finished) / len(finished))
            self._to_durable.add(sum(one.time_to_durable_s for one in done) / len(done))
            self._protected_s = max(one.at_s - one.time_to_durable_s for one in done)
        way_s = sum(one.time_to_durable_s for one in done)
        credit_s = CREDIT_SNAPSHOTS * max(self._cost_s or 0.0, self._meter.error_s)
        charge_s = stall_s + self._slowdown.charge(slowdown_s, way_s, credit_s, self._meter.alike)
        if done:
            self._cost_s = self._stall.value + self._slowdown.usual_s(self._to_durable.value)
        self._stall_s += stall_s
        self._slowdown_s += slowdown_s
        self._snapshots += len(finished)
        self._earn(self._disturbed_s - charge_s, self._meter.disturbed_steps)
        usual_s = max(self._cost_s or 0.0, min(charge_s, self._last_charge_s))
        self._account_s = max(self._account_s - charge_s, -DEBT_SNAPSHOTS * usual_s)
        self._last_charge_s = charge_s
        self._disturbed_s = 0.0
        if self._cost_s is not None:
            self._choose(self._cost_s)
        if not done:
            self._not_before_s = self._taken_s + max(RETRY_S, self._least_s)

    def _choose(self, cost_s: float) -> None:
        """The interval for this cost."""
        affordable_s = 0.0 if self._budget is None else cost_s / self._budget
        dither = 1 + DITHER * (self._snapshots * GOLDEN % 1 - 0.5)
        self._needed_s = dither * cost_s
        self._least_s = SPREAD * affordable_s
        self._savings_s = max(self._rate * SAVINGS_S, 2 * cost_s)
        self._best_s = 0.0 if self._mtbf_s is None else best_interval_s(cost_s, self._mtbf_s)
        self._patience_s = dither * self._best_s
        self._interval_s = max(affordable_s, self._best_s, self._to_durable.value)
        if self._told_s is None or abs(self._interval_s - self._told_s) > NEWS * self._told_s:
            self._told_s = self._interval_s
            self._tell(cost_s, affordable_s)

    def _tell(self, cost_s: float, affordable_s: float) -> None:
        figures = self.figures()
        reasons = []
        if self._budget is not None:
            reasons.append(f"a budget of {self._budget:.2%} affords one every {affordable_s:.4g} s")
        if self._mtbf_s is not None:
            reasons.append(f"with {self._mtbf_s:.4g} s between failures {self._best_s:.4g} s is best")
        logger.info(
            "a snapshot every %.4g s (%.0f steps): it costs %.3g s of training (%.3g s blocked, of which %.3g s in the "
            "gate) and is durable after %.3g s; %s; overhead so far %.2f%%",
            self._interval_s,
            figures.interval_steps or 0,
            cost_s,
            self._stall.value,
            self._gate.value,
            self._to_durable.value,
            "; ".join(reasons),
            100 * figures.overhead,
        )
        if self._mtbf_s is not None and affordable_s > self._mtbf_s:
            logger.warning(
                "the overhead budget affords a snapshot every %.4g s, but a failure is expected every %.4g s: "
                "raise overhead_budget, or most runs will lose all their work",
                affordable_s,
                self._mtbf_s,
            )

"""The interval that tunes itself is an account (docs/interval.md).

Time in which training is not held up earns ``overhead_budget`` of itself, each snapshot pays what it was measured to
cost, and the next one is due when the account covers its predicted cost. ``mtbf_s`` gives the interval of Young and
Daly instead, or beside it as a lower bound.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ciuic_async.events import logger
from ciuic_async.schedule.meter import BASELINE_STEPS, LostTimeMeter

BASELINE_S = 60.0
"""... or one step at least and this long: with steps of a minute nobody waits for eight of them."""
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


@dataclass(frozen=True, slots=True)
class Finished:
    """What ``Schedule.finished`` was told, on its way to the training thread. ``at_s``: when it was durable."""

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


class Tuner:
    """The account, and Young and Daly's interval."""

    def __init__(self, budget: float | None, mtbf_s: float | None, clock: Callable[[], float]) -> None:
        self._budget, self._mtbf_s, self._clock = budget, mtbf_s, clock
        self._rate = budget or 0.0
        self._meter = LostTimeMeter()
        self._news: deque[Finished] = deque()  # the writer's thread appends, the training thread takes
        self._finished: list[Finished] = []
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

    def finished(self, news: Finished) -> None:
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

    def _settle(self, finished: list[Finished]) -> None:
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

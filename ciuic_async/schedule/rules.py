"""When a snapshot is due: every so many steps, epochs or seconds, or as often as a budget of lost time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from ciuic_async.arguments import check_number
from ciuic_async.errors import UsageError
from ciuic_async.schedule.account import Figures, Finished, Tuner


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
            None if overhead_budget is None and mtbf_s is None else Tuner(overhead_budget, mtbf_s, self._clock)
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

    def finished(self, stall_s: float, gate_s: float, time_to_durable_s: float, ok: bool, tidy_s: float = 0.0) -> None:
        """A snapshot that was ``taken`` is durable (``ok``) and tidied up after, or will never be. Any thread; at once.

        Args:
            stall_s: the training thread was blocked by it, the gate included (as in ``SnapshotStats``).
            gate_s: the share of ``stall_s`` spent in the optimizer gate.
            time_to_durable_s: from ``taken`` until it was durable; without meaning unless ``ok``.
            tidy_s: from then until now: retention, which slows training as writing does.
        """
        if self._tuner is not None:
            self._tuner.finished(Finished(stall_s, gate_s, time_to_durable_s, ok, self._clock() - tidy_s))

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

"""How much longer steps are while a snapshot is on its way, from their wall time alone (docs/interval.md)."""

from __future__ import annotations

import math
import statistics

BASELINE_STEPS = 8
"""Steps measured before the first snapshot: enough that a median of them ignores compilation and warm-up."""
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

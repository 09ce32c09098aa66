"""How sure a figure is: medians with exact intervals, and ratios with a bootstrap over rounds."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

RESAMPLES = 10_000
SEED = 20_251_122
CONFIDENCE = 0.95


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Exact confidence interval of the median from order statistics; assumes no distribution, only independence.

    The k-th smallest and k-th largest sample enclose the median unless fewer than k of n samples fall on one side,
    which has the probability of a binomial tail at 1/2 (David and Nagaraja, "Order Statistics", section 7.1).

    Returns:
        None with fewer than six samples: then not even their extremes are 95% sure.
    """
    ordered = sorted(samples)
    count = len(ordered)
    rank = 0
    tail = 0.0
    while rank < count:
        tail += math.comb(count, rank) * 0.5**count
        if 2 * tail > 1 - confidence:
            break
        rank += 1
    if rank == 0:
        return None
    return ordered[rank - 1], ordered[count - rank]


def trimmed_mean(samples: Sequence[float], share: float = 0.125) -> float:
    """The mean without the smallest and largest ``share``; at least one each where five or more samples are there."""
    ordered = sorted(samples)
    cut = max(round(len(ordered) * share), 1 if len(ordered) >= 5 else 0)
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def bootstrap(
    rounds: int, estimate: Callable[[Sequence[int]], float], resamples: int = RESAMPLES, seed: int = SEED
) -> list[float]:
    """``estimate`` of as many rounds drawn with replacement, ``resamples`` times, sorted; the same in every run.

    Whole rounds are drawn, since what was measured within one shares the machine's mood.
    """
    generator = random.Random(seed)
    return sorted(estimate(generator.choices(range(rounds), k=rounds)) for _ in range(resamples))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The sample at or just above ``share`` of an ordered sequence."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def ratio_to_best(
    ours: Mapping[int, Sequence[float]], others: Mapping[str, Mapping[int, Sequence[float]]]
) -> dict[str, float | str]:
    """Our median in relation to that of the best other, with the bound that 95% of bootstrapped rounds stay below.

    Which one is best is found anew in every resample: so the bound also covers our having picked the best afterwards.

    Args:
        ours, others: samples by round; every contender has samples in every round, of which there is at least one.
    """
    rounds = sorted(ours)

    def median(samples: Mapping[int, Sequence[float]], drawn: Sequence[int]) -> float:
        return statistics.median([value for number in drawn for value in samples[rounds[number]]])

    def ratio(drawn: Sequence[int]) -> float:
        best = min(median(samples, drawn) for samples in others.values())
        return median(ours, drawn) / best if best > 0 else math.inf

    everything = range(len(rounds))
    resampled = bootstrap(len(rounds), ratio)
    return {
        "best_opponent": min(others, key=lambda name: median(others[name], everything)),
        "ratio": ratio(everything),
        "upper_bound_95": percentile(resampled, 0.95),
        "method": f"bootstrap over {len(rounds)} rounds, {RESAMPLES} resamples, best opponent of each resample",
    }


def describe(samples: Sequence[float]) -> dict[str, object]:
    """Median, exact 95% interval, extremes, and the samples themselves."""
    return {
        "median": statistics.median(samples),
        "interval_95": median_interval(samples),
        "least": min(samples),
        "most": max(samples),
        "samples": list(samples),
    }

"""Accuracy figures of n completions a prompt, and their uncertainty. Pure functions of numbers.

Shapes: `P` prompts, `n` completions each, rewards in [low, high].
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
BLOCK = 500
CONFIDENCE = 0.95
ROUNDING = 1e-12
"""Of the range: means of rewards, and their differences, that are this close are equal."""


def best_of_k(rewards: Sequence[float], k: int) -> float:
    """Expected best reward among k of the n completions, drawn without replacement: unbiased for any k <= n.

    For rewards 0 and 1 with c ones it is pass@k = 1 - C(n - c, k) / C(n, k) (Chen et al. 2021).
    Raises ValueError unless 1 <= k <= n.
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to {n} (the number of samples), got {k}")
    # The i-th smallest (from 0) is the best of C(i, k - 1) of the C(n, k) subsets.
    weighted = (reward * math.comb(i, k - 1) for i, reward in enumerate(sorted(rewards)))
    return sum(weighted) / math.comb(n, k)


def majority_of_k(answers: Sequence[Hashable | None], rewards: Sequence[float], k: int) -> float:
    """Expected reward of the most frequent answer among k completions: maj1@k.

    Averaged over the n // k disjoint groups in the order of the samples: unbiased, and all there is for k = n. Tied
    answers share the vote; completions without an answer (None) don't vote, and a group without votes counts as its
    completions' mean reward, the best it can do.
    """
    if len(answers) != len(rewards) or not 1 <= k <= len(rewards):
        raise ValueError(f"k must be 1 to n with one answer a reward, got k={k}, {len(answers)}, {len(rewards)}")
    groups = range(len(rewards) // k)
    values = [_majority(answers[g * k : (g + 1) * k], rewards[g * k : (g + 1) * k]) for g in groups]
    return sum(values) / len(values)


def _majority(answers: Sequence[Hashable | None], rewards: Sequence[float]) -> float:
    by_answer: dict[Hashable, list[float]] = defaultdict(list)
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            by_answer[answer].append(reward)
    if not by_answer:
        return sum(rewards) / len(rewards)
    most = max(map(len, by_answer.values()))
    winners = [sum(group) / len(group) for group in by_answer.values() if len(group) == most]
    return sum(winners) / len(winners)


def bootstrap_interval(
    values_P: Sequence[float], low: float, high: float, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts.

    When all values are equal the bootstrap would claim certainty. The exact binomial (Clopper-Pearson) bound on how
    often another value may occur is used instead, each way to the end of the range: 300 of 300 right is [0.988, 1].
    low, high: the range of the values. Raises ValueError without values.
    """
    values = np.asarray(values_P, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one prompt")
    if np.ptp(values) <= ROUNDING * (high - low):
        return _interval_of_equals(float(values[0]), values.size, low, high, (1 - confidence) / 2)
    means = _resampled_means(values, np.random.default_rng(seed))
    tail = 100 * (1 - confidence) / 2
    lower, upper = np.percentile(means, [tail, 100 - tail])
    return float(lower), float(upper)


def paired_interval(
    values_P: Sequence[float], reference_P: Sequence[float], low: float, high: float, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of two policies on the same prompts, and its bootstrap interval over prompts.

    Prompts are resampled with both values, so that what makes a prompt hard for both doesn't widen the interval.
    low, high: the range of the values, not of the differences. Raises ValueError without values.
    """
    differences = [value - reference for value, reference in zip(values_P, reference_P, strict=True)]
    lower, upper = bootstrap_interval(differences, low - high, high - low, seed)
    return float(np.mean(differences)), lower, upper


def _resampled_means(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    # Block by block: all indices at once would need P * 80 kB.
    shape = (BLOCK, values.size)
    return np.concatenate([values[rng.integers(values.size, size=shape)].mean(1) for _ in range(RESAMPLES // BLOCK)])


def _interval_of_equals(value: float, n: int, low: float, high: float, tail: float) -> tuple[float, float]:
    # The largest rate of other values with which n equal ones in a row still have the probability `tail`.
    possible = 1 - tail ** (1 / n)
    return value - possible * (value - low), value + possible * (high - value)

"""Accuracy figures against enumeration and known intervals."""

import itertools
import random
from collections.abc import Hashable

import numpy as np
import pytest
from scipy import stats

from qtilt_trainer.estimators import best_of_k, bootstrap_interval, majority_of_k


@pytest.mark.parametrize("n", [1, 3, 6])
def test_best_of_k_is_the_mean_over_all_subsets(n: int) -> None:
    rng = random.Random(n)
    rewards = [round(rng.random(), 1) for _ in range(n)]
    for k in range(1, n + 1):
        subsets = [max(subset) for subset in itertools.combinations(rewards, k)]
        assert best_of_k(rewards, k) == pytest.approx(sum(subsets) / len(subsets))


def test_best_of_k_is_pass_at_k_for_binary_rewards() -> None:
    n, c, k = 10, 3, 4
    expected = 1 - np.prod([1 - k / m for m in range(n - c + 1, n + 1)])  # Chen et al. 2021, their code
    assert best_of_k([1.0] * c + [0.0] * (n - c), k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 4])
def test_best_of_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match="k must be 1 to 3"):
        best_of_k([0.0, 1.0, 0.0], k)


@pytest.mark.parametrize(
    ("answers", "rewards", "k", "expected"),
    [
        (["a", "b", "a"], [1, 0, 1], 3, 1.0),
        (["a", "b", "b"], [1, 0, 0], 3, 0.0),
        (["a", "b"], [1, 0], 2, 0.5),
        (["a", None, None], [1, 0, 0], 3, 1.0),
        ([None, None], [0, 0], 2, 0.0),
        (["a", "b", "b", "b"], [1, 0, 0, 0], 2, 0.25),
        (["a", "b"], [1, 0], 1, 0.5),
        (["a", "a", "b", "c", "z"], [1, 1, 0, 0, 0], 4, 1.0),
    ],
)
def test_majority(answers: list[Hashable | None], rewards: list[float], k: int, expected: float) -> None:
    assert majority_of_k(answers, rewards, k) == pytest.approx(expected)


def test_the_interval_agrees_with_scipys_bootstrap() -> None:
    values = np.random.default_rng(0).binomial(4, 0.8, size=300) / 4
    low, high = bootstrap_interval(list(values), 0.0, 1.0)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.003)
    assert high == pytest.approx(expected.high, abs=0.003)
    assert (low, high) == bootstrap_interval(list(values), 0.0, 1.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(100):
        low, high = bootstrap_interval(list(rng.binomial(1, 0.7, size=200).astype(float)), 0.0, 1.0, seed)
        hits += low <= 0.7 <= high
    assert 88 <= hits <= 100


def test_all_right_or_all_wrong_is_not_certainty() -> None:
    low, high = bootstrap_interval([1.0] * 300, 0.0, 1.0)
    exact = stats.binomtest(300, 300).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((exact.low, 1.0))
    low, high = bootstrap_interval([-1.0] * 50, -1.0, 1.0)
    exact = stats.binomtest(0, 50).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((-1.0, -1.0 + 2 * exact.high))
    assert bootstrap_interval([0.5, 0.5], 0.0, 1.0) == (0.5, 0.5)


def test_no_prompts_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_interval([], 0.0, 1.0)

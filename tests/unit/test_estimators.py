"""Accuracy figures against enumeration and known intervals."""

import itertools
import random
from collections.abc import Hashable

import numpy as np
import pytest
from scipy import stats

from qtilt_trainer.estimators import best_of_k, bootstrap_interval, majority_of_k, paired_interval


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


def test_equal_values_inside_the_range_are_not_certainty_either() -> None:
    other = stats.binomtest(0, 40).proportion_ci(0.95, method="exact").high
    assert bootstrap_interval([0.25] * 40, 0.0, 1.0) == pytest.approx((0.25 * (1 - other), 0.25 + 0.75 * other))
    # Thirds differ in their last bit.
    gain, low, high = paired_interval([1 / 3, 2 / 3, 1.0], [0.0, 1 / 3, 2 / 3], 0.0, 1.0)
    assert gain == pytest.approx(1 / 3)
    assert low < 0.0 and high > 0.8


def test_the_paired_interval_is_that_of_all_resamples_of_the_prompts() -> None:
    values, reference = [1.0, 0.5, 0.75, 1.0, 0.0, 0.25], [0.5, 0.5, 0.0, 1.0, 0.25, 0.0]
    resamples = itertools.product(range(6), repeat=6)
    means = [sum(values[i] - reference[i] for i in chosen) / 6 for chosen in resamples]
    gain, low, high = paired_interval(values, reference, 0.0, 1.0)
    assert gain == pytest.approx(1.25 / 6)
    # Steps of 1/24: a percentile falls on the same step or a neighbour of it.
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1 / 24 + 1e-9)
    wide_low, wide_high = paired_interval(values, reference[::-1], 0.0, 1.0)[1:]
    assert (wide_low, wide_high) != (low, high)


def test_pairing_takes_out_what_makes_a_prompt_hard_for_both() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(size=300)
    reference = rng.binomial(8, 0.5 * difficulty) / 8
    values = rng.binomial(8, 0.5 * difficulty + 0.2) / 8
    _, low, high = paired_interval(list(values), list(reference), 0.0, 1.0)
    expected = stats.bootstrap((values - reference,), np.mean, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.003)
    assert low < 0.2 < high
    unpaired = np.hypot(*(np.ptp(bootstrap_interval(list(row), 0.0, 1.0)) for row in (values, reference)))
    assert high - low < 0.85 * unpaired
    with pytest.raises(ValueError, match="longer"):
        paired_interval([1.0], [1.0, 0.0], 0.0, 1.0)


def test_no_prompts_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_interval([], 0.0, 1.0)

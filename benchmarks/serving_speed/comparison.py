"""Measured rounds into figures: ratios to plain vLLM per round, latencies, distances to the bounds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from serving_speed.bounds import RatioBounds
from serving_speed.workload import Outcome


@dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def ratios_per_round(mine: Sequence[float], plain: Sequence[float]) -> Spread:
    """Of figures measured in the same rounds. Raises ValueError when the rounds differ.

    A ratio is taken within a round, where both ran one shortly after the other: what slows the machine down for
    minutes slows both.
    """
    return Spread.of([one / other for one, other in zip(mine, plain, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of the values don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Row:
    """One system in one setting. Times in seconds. ratio: wall-clock time to plain's; cpu_ratio: of processor time.

    bounds: None where they don't apply. products_ratio: plain's time and the value model's matrix products alone, over
    plain's time.
    """

    system: str
    tokens_per_second: Spread
    first_token: float
    inter_token_p50: float
    inter_token_p99: float
    ratio: Spread
    cpu_ratio: Spread
    bounds: RatioBounds | None
    products_ratio: float | None

    @property
    def over_flops(self) -> float | None:
        """Measured over the bound of FLOPs."""
        return None if self.bounds is None else self.ratio.median / self.bounds.flops

    @property
    def over_products(self) -> float | None:
        return None if self.products_ratio is None else self.ratio.median / self.products_ratio


def make_row(
    system: str,
    mine: Sequence[Outcome],
    plain: Sequence[Outcome],
    bounds: RatioBounds | None,
    products_seconds: float | None,
) -> Row:
    gaps = [gap for outcome in mine for gap in outcome.inter_token_seconds]
    plain_seconds = statistics.median(outcome.seconds for outcome in plain)
    return Row(
        system,
        Spread.of([outcome.tokens / outcome.seconds for outcome in mine]),
        statistics.median(wait for outcome in mine for wait in outcome.first_token_seconds),
        percentile(gaps, 50),
        percentile(gaps, 99),
        ratios_per_round([outcome.seconds for outcome in mine], [outcome.seconds for outcome in plain]),
        ratios_per_round([outcome.cpu_seconds for outcome in mine], [outcome.cpu_seconds for outcome in plain]),
        bounds,
        None if products_seconds is None else 1 + products_seconds / plain_seconds,
    )

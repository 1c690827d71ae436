"""The public path of what lies in :mod:`qtilt.method.distributions`."""

from qtilt.method.distributions import (
    DISTRIBUTIONS,
    Bernoulli,
    Categorical,
    ReturnDistribution,
    distribution_from_config,
)

__all__ = [
    "DISTRIBUTIONS",
    "Bernoulli",
    "Categorical",
    "ReturnDistribution",
    "distribution_from_config",
]

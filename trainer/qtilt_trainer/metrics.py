"""How good a value model's predictions are on sequences it wasn't trained on.

All take one-dimensional arrays over labelled tokens: the predicted mean return, and the return that was observed.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

CALIBRATION_BINS = 10


def auc(predicted: NDArray[np.float64], observed: NDArray[np.float64], threshold: float) -> float | None:
    """Probability that a token of a good sequence (return above `threshold`) is valued above one of a bad sequence.

    None when all sequences are good or all are bad.
    """
    good = observed > threshold
    if good.all() or not good.any():
        return None
    return float(roc_auc_score(good, predicted))


def calibration_error(predicted: NDArray[np.float64], observed: NDArray[np.float64], low: float, high: float) -> float:
    """Expected calibration error in units of the reward: mean |predicted - observed| over equal-width bins of the
    prediction on [low, high], weighted by how many tokens fall into each."""
    edges = np.linspace(low, high, CALIBRATION_BINS + 1)
    bins = np.clip(np.digitize(predicted, edges) - 1, 0, CALIBRATION_BINS - 1)
    totals = np.bincount(bins, weights=predicted - observed, minlength=CALIBRATION_BINS)
    return float(np.abs(totals).sum() / len(predicted))

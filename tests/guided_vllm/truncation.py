"""min-p, top-k and top-p written out on float64 probabilities, each on what the one before left, as in vLLM."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-4
"""Tokens whose probabilities differ by less, relatively, or sums that do, may be on either side of a limit."""


def truncate_as_reported(log_probs_V: Tensor, reported_V: Tensor, sampling: Mapping[str, Any]) -> Tensor:
    """Log-probabilities of what is left by the sampling parameters; −inf for the others.

    Which tokens are left is the oracle's to say, but for those that rounding may put on either side of a limit.
    """
    if not {"min_p", "top_k", "top_p"} & set(sampling):
        return log_probs_V
    kept_V = reported_V.isfinite()
    surely_V, perhaps_V = (_left(log_probs_V.exp(), sampling, slack) for slack in (-ROUNDING, ROUNDING))
    assert (kept_V | ~surely_V).all(), "a token is missing"
    assert (perhaps_V | ~kept_V).all(), "a token is left that should not be"
    left_V = log_probs_V.masked_fill(~kept_V, -torch.inf)
    return left_V - left_V.logsumexp(0)


def _left(probs_V: Tensor, sampling: Mapping[str, Any], slack: float) -> Tensor:
    """Which tokens are left, bool ``[V]``: fewer in doubt with a negative slack, more with a positive one."""
    left_V = probs_V >= sampling.get("min_p", 0.0) * probs_V.max() * (1 - slack)
    left_V &= probs_V > 0
    if "top_k" in sampling:
        ordered = probs_V[left_V].sort(descending=True).values
        limit = ordered[min(sampling["top_k"], len(ordered)) - 1]
        left_V &= probs_V >= limit * (1 - slack)
    if "top_p" in sampling:
        # The fewest of the likeliest tokens that have the mass top_p together.
        order = torch.where(left_V, probs_V, 0.0).argsort(descending=True)
        mass_V = torch.where(left_V, probs_V, 0.0)[order] / probs_V[left_V].sum()
        before_V = mass_V.cumsum(0) - mass_V
        needed_V = before_V < sampling["top_p"] + slack
        needed_V[0] = True
        left_V &= torch.zeros_like(left_V).scatter(0, order, needed_V)
    return left_V

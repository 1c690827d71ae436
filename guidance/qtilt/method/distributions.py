"""Return distributions Z(x, y): what a value model predicts about the reward-to-go under the reference policy.

Shapes: ``...`` any leading shape, ``A`` logits of one distribution (1 for Bernoulli, the atoms for Categorical).

Everything stays in log space and is computed in float32 or better whatever the logits' dtype, so that it holds for
logits of ±100 and 1/η of 1000. η isn't part of a distribution: one Z serves every η (paper, section 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class ReturnDistribution(Protocol):
    """The closed forms that training and guidance need, and the range of the return."""

    @property
    def name(self) -> str: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def v_min(self) -> float: ...
    @property
    def v_max(self) -> float: ...
    @property
    def support(self) -> list[float]:
        """The returns that there may be, ascending."""

    def nll(self, logits: Tensor, returns: Tensor) -> Tensor:
        """Negative log-likelihood, in nats, of ``returns [...]`` under ``logits [..., A]`` → ``[...]``.

        Raises ValueError for a return outside [v_min, v_max].
        """

    def mean(self, logits: Tensor) -> Tensor:
        """E[Z] in units of the reward: ``[..., A]`` → ``[...]``."""

    def pmf(self, logits: Tensor) -> Tensor:
        """P(Z = z) of each return in :attr:`support`: ``[..., A]`` → ``[..., Z]``."""

    def log_mgf(self, logits: Tensor, inv_eta: Tensor | float) -> Tensor:
        """ln E[exp(Z/η)] = Q*/η in nats (Theorem 2.2): ``[..., A]`` and 1/η broadcastable to ``[...]`` → ``[...]``."""

    def log_mgf_below_max(self, logits: Tensor, inv_eta: Tensor | float) -> Tensor:
        """ln E[exp((Z − v_max)/η)] ≤ 0: Q*/η less v_max/η, which all tokens have in common.

        At large 1/η that would round off what tells them apart, which is ln P(Z = v_max) in the end.
        """

    def to_config(self) -> dict[str, Any]:
        """The JSON object that :func:`distribution_from_config` reads back."""


@dataclass(frozen=True)
class Bernoulli:
    """A reward of 0 or 1, won with probability sigmoid(logit)."""

    name: ClassVar[str] = "bernoulli"
    num_logits: ClassVar[int] = 1
    v_min: ClassVar[float] = 0.0
    v_max: ClassVar[float] = 1.0
    support: ClassVar[list[float]] = [0.0, 1.0]

    def nll(self, logits: Tensor, returns: Tensor) -> Tensor:
        logit = _at_least_float32(logits).squeeze(-1)
        returns = _checked_returns(returns, self).to(logit.dtype)
        return returns * _softplus(-logit) + (1 - returns) * _softplus(logit)

    def mean(self, logits: Tensor) -> Tensor:
        return _at_least_float32(logits).squeeze(-1).sigmoid()

    def pmf(self, logits: Tensor) -> Tensor:
        won = _at_least_float32(logits).sigmoid()
        return torch.cat([1 - won, won], dim=-1)

    def log_mgf(self, logits: Tensor, inv_eta: Tensor | float) -> Tensor:
        # ln(1 − p + p·e^{1/η}) with p = sigmoid(ℓ).
        logit = _at_least_float32(logits).squeeze(-1)
        return _softplus(logit + inv_eta) - _softplus(logit)

    def log_mgf_below_max(self, logits: Tensor, inv_eta: Tensor | float) -> Tensor:
        # ln(p + (1 − p)·e^{−1/η}).
        logit = _at_least_float32(logits).squeeze(-1)
        return torch.logaddexp(logsigmoid(logit), logsigmoid(-logit) - inv_eta)

    def to_config(self) -> dict[str, Any]:
        return {"name": self.name}


@dataclass(frozen=True)
class Categorical:
    """A reward on ``atoms`` evenly spaced values v_1 = low … v_A = high.

    A return between two atoms counts as their mixture with the same mean (the paper's graded rewards lie on atoms).
    """

    low: float
    high: float
    atoms: int
    name: ClassVar[str] = "categorical"

    def __post_init__(self) -> None:
        if not -float("inf") < self.low < self.high < float("inf"):
            raise ValueError(f"distribution range is [{self.low}, {self.high}], expected finite low < high")
        if not isinstance(self.atoms, int) or self.atoms < 2:
            raise ValueError(f"distribution atoms is {self.atoms!r}, expected an integer of at least 2")

    @property
    def num_logits(self) -> int:
        return self.atoms

    @property
    def v_min(self) -> float:
        return self.low

    @property
    def v_max(self) -> float:
        return self.high

    @property
    def support(self) -> list[float]:
        values: list[float] = self.atom_values(like=torch.empty(0, dtype=torch.float64)).tolist()
        return values

    def atom_values(self, like: Tensor) -> Tensor:
        """v_1 … v_A ``[A]`` with the dtype and device of ``like``."""
        return torch.linspace(self.low, self.high, self.atoms, dtype=like.dtype, device=like.device)

    def nll(self, logits: Tensor, returns: Tensor) -> Tensor:
        log_pmf = _at_least_float32(logits).log_softmax(-1)
        returns = _checked_returns(returns, self).to(log_pmf.dtype)
        position = (returns - self.low) / (self.high - self.low) * (self.atoms - 1)
        below = position.floor().clamp(0, self.atoms - 2)
        weight_above = position - below
        log_below = log_pmf.gather(-1, below.long().unsqueeze(-1)).squeeze(-1)
        log_above = log_pmf.gather(-1, below.long().unsqueeze(-1) + 1).squeeze(-1)
        return -((1 - weight_above) * log_below + weight_above * log_above)

    def mean(self, logits: Tensor) -> Tensor:
        pmf = _at_least_float32(logits).softmax(-1)
        return pmf @ self.atom_values(like=pmf)

    def pmf(self, logits: Tensor) -> Tensor:
        return _at_least_float32(logits).softmax(-1)

    def log_mgf(self, logits: Tensor, inv_eta: Tensor | float) -> Tensor:
        return self._log_mgf(logits, inv_eta, less=0.0)

    def log_mgf_below_max(self, logits: Tensor, inv_eta: Tensor | float) -> Tensor:
        return self._log_mgf(logits, inv_eta, less=self.high)

    def _log_mgf(self, logits: Tensor, inv_eta: Tensor | float, less: float) -> Tensor:
        """ln E[exp((Z − less)/η)]."""
        log_pmf = _at_least_float32(logits).log_softmax(-1)
        inv_eta = torch.as_tensor(inv_eta, dtype=log_pmf.dtype, device=log_pmf.device).unsqueeze(-1)
        return (log_pmf + (self.atom_values(like=log_pmf) - less) * inv_eta).logsumexp(-1)

    def to_config(self) -> dict[str, Any]:
        return {"name": self.name, "low": self.low, "high": self.high, "atoms": self.atoms}


DISTRIBUTIONS: dict[str, type[Bernoulli] | type[Categorical]] = {
    Bernoulli.name: Bernoulli,
    Categorical.name: Categorical,
}


def distribution_from_config(config: Mapping[str, Any]) -> ReturnDistribution:
    """Build a distribution from its JSON object.

    Raises ValueError for an unknown name, unknown or missing parameters, or values out of range.
    """
    parameters = dict(config)
    name = parameters.pop("name", None)
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution name is {name!r}, allowed: {', '.join(DISTRIBUTIONS)}")
    try:
        return DISTRIBUTIONS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"distribution {name}: parameters {parameters} do not fit ({error})") from error


def _softplus(x: Tensor) -> Tensor:
    # torch's softplus switches to the identity above 20; this form is exact everywhere.
    return -logsigmoid(-x)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _checked_returns(returns: Tensor, distribution: ReturnDistribution) -> Tensor:
    low, high = distribution.v_min, distribution.v_max
    inside = (returns >= low) & (returns <= high)
    if not bool(inside.all()):
        worst = returns[~inside].flatten()[0].item()
        raise ValueError(f"a return is {worst}, outside [{low}, {high}] of the {distribution.name} distribution")
    return returns

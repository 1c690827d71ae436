"""What one request asks of guidance, fully resolved: every default filled in and the value-model version fixed.

Knows nothing of torch or vLLM: the API process imports it, and it travels to the worker in
``SamplingParams.extra_args[EXTRA_ARGS_KEY]``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

EXTRA_ARGS_KEY = "qtilt"
METHODS = ("qsharp", "cd")
MIN_ETA = 1e-9
"""A mean return is rounded in float64; a smaller η would make a difference of the rounding of means that are equal."""
TAILS = ("floor", "mean")
DEFAULT_ETA, DEFAULT_TOP_K = 0.1, 20
DEFAULT_TAIL: Literal["floor", "mean"] = "mean"
"""Where neither the request nor the server says otherwise. Why this tail: docs/tails.md."""


@dataclass(frozen=True, slots=True)
class GuidanceParams:
    """One request's guidance.

    value_model, version: which resident value model scores the candidates.
    eta: the KL weight η of the paper (Eq. 1), MIN_ETA or more; a larger η is a weaker tilt.
    top_k: how many of the reference's likeliest tokens are candidates in each step, at most.
    candidate_mass: the reference's mass, 0 < m ≤ 1, that is enough for them: once the likeliest hold so much at the
    request's temperature, the others aren't candidates. 1 takes all top_k.
    method: ``qsharp`` adds ln E[e^{Z/η}], ``cd`` adds E[Z]/η.
    tail: what tokens that aren't candidates get: ``floor`` v_min/η, ``mean`` the reference-weighted mean of the
    candidates, so that they keep the reference's probability (:mod:`qtilt.method.tilt`).
    guided_tokens: guide this many generated tokens and leave the rest to the reference; None guides all.
    kl_budget: nats, above 0, that the KLs(guided ‖ reference) of a response's steps may add up to
    (:mod:`qtilt.method.budget`); None: no bound.
    details: whether what is measured of each token is kept for who asks.
    trace_id: names the KL records of this request in the worker; all children of n > 1 share it.

    Raises ValueError for a value out of its range, naming the field.
    """

    value_model: str
    version: int
    eta: float
    top_k: int
    method: str = "qsharp"
    tail: str = DEFAULT_TAIL
    guided_tokens: int | None = None
    candidate_mass: float = 1.0
    kl_budget: float | None = None
    details: bool = False
    trace_id: str = ""

    def __post_init__(self) -> None:
        _require(isinstance(self.value_model, str) and self.value_model != "", self, "value_model", "a non-empty name")
        _require(_is_int(self.version) and self.version >= 1, self, "version", "an integer of at least 1")
        is_eta = _is_number(self.eta) and MIN_ETA <= self.eta < math.inf
        _require(is_eta, self, "eta", f"a finite number of {MIN_ETA} or more")
        _require(_is_int(self.top_k) and self.top_k >= 1, self, "top_k", "an integer of at least 1")
        _require(self.method in METHODS, self, "method", f"one of {', '.join(METHODS)}")
        _require(self.tail in TAILS, self, "tail", f"one of {', '.join(TAILS)}")
        _require(
            self.guided_tokens is None or (_is_int(self.guided_tokens) and self.guided_tokens >= 0),
            self,
            "guided_tokens",
            "null or an integer of at least 0",
        )
        # A NaN is in no range.
        _require(
            _is_number(self.candidate_mass) and 0 < self.candidate_mass <= 1,
            self,
            "candidate_mass",
            "a number above 0, at most 1",
        )
        _require(
            self.kl_budget is None or (_is_number(self.kl_budget) and 0 < self.kl_budget < math.inf),
            self,
            "kl_budget",
            "null or a finite number above 0",
        )
        _require(isinstance(self.details, bool), self, "details", "true or false")
        _require(isinstance(self.trace_id, str), self, "trace_id", "a string")

    def guides(self, generated: int) -> bool:
        """Whether the token that follows ``generated`` generated tokens is drawn from the guided distribution."""
        return self.guided_tokens is None or generated < self.guided_tokens

    @property
    def inv_eta(self) -> float:
        """1/η."""
        return 1 / self.eta

    def to_extra_args(self) -> dict[str, Any]:
        """The JSON-able form that goes under ``extra_args[EXTRA_ARGS_KEY]``."""
        return asdict(self)

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "GuidanceParams | None":
        """Read a request's guidance back, with defaults for all but ``value_model``; None when it asked for none.

        The entry may also be an object in JSON: ``vllm_xargs``, by which a plain vLLM server is told, holds no objects.
        Raises ValueError when it isn't what :meth:`to_extra_args` writes, or a part of that.
        """
        entry = (extra_args or {}).get(EXTRA_ARGS_KEY)
        if entry is None:
            return None
        if isinstance(entry, str):
            entry = _parsed(entry)
        if not isinstance(entry, Mapping):
            raise ValueError(f"extra_args['{EXTRA_ARGS_KEY}'] is a {type(entry).__name__}, expected an object")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(entry) - {*known})
        if unknown or "value_model" not in entry:
            raise ValueError(
                f"extra_args['{EXTRA_ARGS_KEY}'] has the keys {sorted(entry)}, expected value_model and perhaps "
                f"{', '.join(known[1:])}"
            )
        given = {name: value for name, value in entry.items() if value is not None}
        return cls(**{"version": 1, "eta": DEFAULT_ETA, "top_k": DEFAULT_TOP_K, **given})


def asks_for_guidance(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request has an entry of guidance, right or wrong."""
    return (extra_args or {}).get(EXTRA_ARGS_KEY) is not None


def _parsed(entry: str) -> Any:
    try:
        return json.loads(entry)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"extra_args['{EXTRA_ARGS_KEY}'] is no JSON: {str(error).splitlines()[0]}") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(holds: bool, params: GuidanceParams, field: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"guidance.{field} is {getattr(params, field)!r}, allowed: {allowed}")

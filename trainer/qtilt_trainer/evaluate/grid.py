"""What is measured: policies, and regimes to draw their tokens in.

Tokens that aren't candidates can lose by guidance what truncation would take from them. What guidance does is told from
what truncation does by comparing in one regime: every policy is measured in every regime, the reference too. The
reference is also measured without each regime's truncation, and with its `top_k` lowered to the number of candidates:
*the truncation that guidance implies*.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtilt_trainer.config import EvaluateConfig, Method, SamplingConfig, SamplingOverride, Tail


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to draw tokens from a policy."""

    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    """0: no truncation."""

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, so that one completion is all there is."""
        return self.temperature == 0

    @property
    def is_untruncated(self) -> bool:
        """Whether every token can be drawn."""
        return self.top_k == 0 and self.top_p == 1 and not self.is_greedy

    @property
    def label(self) -> str:
        """For people."""
        if self.is_greedy:
            return "greedy"
        top_k = f", top-k {self.top_k}" if self.top_k else ""
        return f"T {self.temperature:g}{top_k}{f', top-p {self.top_p:g}' if self.top_p < 1 else ''}"

    @property
    def name(self) -> str:
        """For directories: different regimes have different ones."""
        if self.is_greedy:
            return "greedy"
        top_k = f"-k{self.top_k}" if self.top_k else ""
        return f"t{_exact(self.temperature)}{top_k}{f'-p{_exact(self.top_p)}' if self.top_p < 1 else ''}"

    @property
    def without_truncation(self) -> "Regime":
        """The same with all tokens to draw from."""
        return self if self.is_greedy else replace(self, top_p=1.0, top_k=0)

    def truncated_to(self, candidates: int) -> "Regime":
        """The same with no more than `candidates` tokens to draw from."""
        if self.is_greedy or 0 < self.top_k <= candidates:
            return self
        return replace(self, top_k=candidates)


GREEDY = Regime(0.0, 1.0, 0)


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy in one regime."""

    method: Method | None
    """None: the reference."""
    inv_eta: float | None
    tail: Tail | None
    """None: the server's default, or the reference."""
    regime: Regime

    @property
    def name(self) -> str:
        """For logs and directories."""
        if self.method is None or self.inv_eta is None:
            return f"reference-{self.regime.name}"
        tail = f"-{self.tail}" if self.tail is not None else ""
        return f"{self.method}-{_exact(self.inv_eta)}{tail}-{self.regime.name}"

    def iteration(self, iteration: int) -> int:
        """0 for the reference: it was there before the first iteration, and is measured once."""
        return 0 if self.method is None else iteration

    def place(self, iteration: int) -> str:
        """Where its completions are, below `evaluation/`; ITERATION/NAME."""
        return f"iteration-{self.iteration(iteration):03d}/{self.name}"


def regimes(config: EvaluateConfig, sampling: SamplingConfig) -> list[Regime]:
    """Those guided policies are measured in. Entries that come to the same are one regime."""
    drawn = [_resolved(entry, sampling, config.guidance_top_k) for entry in config.sampling]
    by_decoding = {"sample": drawn, "greedy": [GREEDY]}
    return _distinct([regime for decoding in config.decoding for regime in by_decoding[decoding]])


def grid(config: EvaluateConfig, sampling: SamplingConfig) -> list[Cell]:
    """The cells in the order in which they are measured: the reference's first, which the others are compared with."""
    measured = regimes(config, sampling)
    truncated = [regime.truncated_to(config.guidance_top_k) for regime in measured]
    untruncated = [regime.without_truncation for regime in measured]
    reference = [Cell(None, None, None, regime) for regime in _distinct([*measured, *truncated, *untruncated])]
    guided = [
        Cell(method, inv_eta, tail, regime)
        for method in config.methods
        for tail in config.tails
        for inv_eta in config.inv_eta
        for regime in measured
    ]
    return reference + guided


def _resolved(entry: SamplingOverride, sampling: SamplingConfig, guidance_top_k: int) -> Regime:
    top_k = guidance_top_k if entry.top_k == "guidance" else entry.top_k
    return Regime(
        sampling.temperature if entry.temperature is None else entry.temperature,
        sampling.top_p if entry.top_p is None else entry.top_p,
        sampling.top_k if top_k is None else top_k,
    )


def _distinct(found: Sequence[Regime]) -> list[Regime]:
    return list(dict.fromkeys(found))


def _exact(number: float) -> str:
    """As short as it can be without two numbers looking the same."""
    return repr(number).removesuffix(".0")

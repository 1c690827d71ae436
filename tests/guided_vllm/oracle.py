"""What a guided request must sample from, computed without the code under test.

Plain Hugging Face forwards over whole sequences in float64, and the formulas of QSHARP.md written out as sums. Nothing
of qtilt is imported; a value-model directory is read as its documented format says.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import brentq
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from qtilt.params import DEFAULT_TAIL

Adjust = Callable[[Tensor, list[int]], Tensor]
"""What happens to raw logits ``[V]`` before guidance, given the tokens generated before: masks, biases, penalties."""


@dataclass(frozen=True)
class Guided:
    """Guidance of one request, as the oracle needs it."""

    directory: Path
    eta: float
    top_k: int
    method: str
    guided_tokens: int | None
    candidate_mass: float = 1.0
    tail: str = DEFAULT_TAIL
    kl_budget: float | None = None


MASS_ROUNDING = 1e-5
"""By so much the reference's mass may be off in float32 when it decides how many candidates there are."""
TIE = 3e-5
"""Logits that differ by less may change places in float32: 6e-6 has, with the reference split between two workers."""


class ReferenceOracle:
    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """After every token: ``[L, V]``."""
        return self.model(torch.tensor([tokens])).logits[0]


class ValueOracle:
    def __init__(self, directory: Path) -> None:
        manifest = json.loads((directory / "value_model.json").read_text())
        self.type, self.distribution = manifest["type"], manifest["distribution"]
        self.backbone = AutoModel.from_pretrained(directory / "backbone", dtype=torch.float64).eval()
        head = load_file(directory / "head.safetensors")
        self.weight, self.bias = head["weight"].double(), head["bias"].double()
        self.vocab = self.backbone.get_input_embeddings().weight.shape[0]
        self.atoms = 1 if self.distribution["name"] == "bernoulli" else self.distribution["atoms"]

    @torch.no_grad()
    def logits(self, history: list[int], candidates: list[int]) -> Tensor:
        """Of Z(history, candidate): ``[K, A]``."""
        # A reference token outside of the value model's table is read as the table's last row.
        history = [min(token, self.vocab - 1) for token in history]
        if self.type == "v":
            sequences = torch.tensor([[*history, candidate] for candidate in candidates])
            hidden_KH = self.backbone(sequences, use_cache=False).last_hidden_state[:, -1]
            return hidden_KH @ self.weight.T + self.bias
        hidden_H = self.backbone(torch.tensor([history]), use_cache=False).last_hidden_state[0, -1]
        scores_VA = (self.weight @ hidden_H + self.bias).view(self.vocab, self.atoms)
        return scores_VA[candidates]

    def pmf(self, logits_KA: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and their probabilities: ``[Z]`` and ``[K, Z]``."""
        if self.distribution["name"] == "bernoulli":
            win_K = 1 / (1 + torch.exp(-logits_KA[:, 0]))
            return torch.tensor([0.0, 1.0]).double(), torch.stack([1 - win_K, win_K], 1)
        low, high = self.distribution["low"], self.distribution["high"]
        returns = torch.tensor(np.linspace(low, high, self.atoms)).double()
        weights_KA = torch.exp(logits_KA)
        return returns, weights_KA / weights_KA.sum(1, keepdim=True)

    def offsets(self, history: list[int], candidates: list[int], eta: float, method: str) -> tuple[Tensor, float]:
        """Q/η per candidate ``[K]``, and v_min/η; less v_max/η, which changes no distribution."""
        returns, pmf_KZ = self.pmf(self.logits(history, candidates))
        returns = returns - returns[-1]
        if method == "qsharp":
            offsets = torch.log((pmf_KZ * torch.exp(returns / eta)).sum(1))
        else:
            offsets = (pmf_KZ * returns).sum(1) / eta
        return offsets, float(returns[0]) / eta


@cache
def reference_oracle(directory: Path) -> ReferenceOracle:
    return ReferenceOracle(directory)


@cache
def value_oracle(directory: Path) -> ValueOracle:
    return ValueOracle(directory)


def log_softmax(logits_V: Tensor) -> Tensor:
    return logits_V - torch.logsumexp(logits_V, 0)


class Step(NamedTuple):
    """log_probs_V: what the step samples from. kl: KL(guided ‖ reference) in nats. kl_candidates: the same given that
    the token is among the candidates. mass: the reference's in them.

    guided_logits_V: raw logits with T·Q/η, each token's Q/η less the largest of the row: as the HTTP API's page says,
    the most valuable candidate keeps its logit. candidates: how many are scored; None where nothing is guided.
    """

    log_probs_V: Tensor
    kl: float
    guided_logits_V: Tensor
    candidates: int | None
    kl_candidates: float = 0.0
    mass: float = 0.0


class Measured(NamedTuple):
    """Over the guided steps of a choice: sums of KLs in nats, means of the others; 0 without any."""

    kl: float
    kl_candidates: float
    mass: float
    candidates: float

    @classmethod
    def of(cls, steps: Sequence[Step]) -> "Measured":
        guided = [step for step in steps if step.candidates is not None]
        return cls(
            sum(step.kl for step in guided),
            sum(step.kl_candidates for step in guided),
            fmean(step.mass for step in guided) if guided else 0.0,
            fmean(step.candidates or 0 for step in guided) if guided else 0.0,
        )


def step_distributions(
    reference_V: Tensor,
    history: list[int],
    guided: Guided | None,
    temperature: float,
    scorable: int,
    left: float = math.inf,
) -> list[Step]:
    """One step; ``reference_V`` holds −inf where masked. Several where rounding decides which tokens are scored.

    left: nats that its KL may have.
    """
    scale = temperature or 1.0
    reference = log_softmax(reference_V / scale)
    if guided is None:
        return [Step(reference, 0.0, reference_V, None)]
    steps = []
    for candidates in _candidates(reference_V, reference, guided, scorable):
        full_K, lowest = value_oracle(guided.directory).offsets(history, candidates, guided.eta, guided.method)
        # e^o, weighted by the reference.
        weights = reference[candidates].exp()
        scored = 0 if guided.tail == "mean" and len(candidates) == 1 else len(candidates)

        def step_of(strength: float, candidates=candidates, full_K=full_K, lowest=lowest, weights=weights) -> Step:
            offsets_K = strength * full_K
            mean = float(torch.log((weights * offsets_K.exp()).sum() / weights.sum()))
            others = mean if guided.tail == "mean" else strength * lowest
            return _step(reference_V, reference, candidates, offsets_K, others, scale)

        steps.append(_strongest(step_of, left)._replace(candidates=scored))
    return steps


def _strongest(step_of: Callable[[float], Step], left: float) -> Step:
    """The step of the largest part of its offsets, up to 1, whose KL isn't above what is left."""
    if step_of(1.0).kl <= left:
        return step_of(1.0)
    strength = brentq(lambda strength: step_of(strength).kl - left, 0.0, 1.0, xtol=1e-14) if left > 0 else 0.0
    return step_of(strength)


def _candidates(reference_V: Tensor, reference: Tensor, guided: Guided, scorable: int) -> list[list[int]]:
    """The likeliest ``top_k`` tokens, or as many of them as hold the mass; all that it may be, by rounding."""
    ranked = [token for token in range(scorable) if torch.isfinite(reference_V[token])]
    ranked.sort(key=lambda token: -float(reference_V[token]))
    masses = reference[ranked].exp().tolist()
    either = []
    for enough in (guided.candidate_mass, guided.candidate_mass - MASS_ROUNDING, guided.candidate_mass + MASS_ROUNDING):
        count = 1
        while count < min(guided.top_k, len(ranked)) and (guided.candidate_mass == 1 or sum(masses[:count]) < enough):
            count += 1
        either.append(ranked[:count])
        if count < len(ranked) and float(reference_V[ranked[count - 1]] - reference_V[ranked[count]]) < TIE:
            either.append([*ranked[: count - 1], ranked[count]])
    return [candidates for index, candidates in enumerate(either) if candidates not in either[:index]]


def _step(
    reference_V: Tensor, reference: Tensor, candidates: list[int], offsets_K: Tensor, others: float, scale: float
) -> Step:
    """reference: log-probabilities at temperature ``scale``."""
    offsets_V = torch.full_like(reference_V, others)
    offsets_V[candidates] = offsets_K
    tilted = log_softmax(reference_V / scale + offsets_V)
    return Step(
        tilted,
        _kl(tilted, reference),
        reference_V + scale * (offsets_V - offsets_K.max()),
        len(offsets_K),
        _kl(log_softmax(tilted[candidates]), log_softmax(reference[candidates])),
        float(reference[candidates].exp().sum()),
    )


def _kl(of: Tensor, to: Tensor) -> float:
    """Of two distributions' logarithms."""
    present = torch.isfinite(of)
    return float((of[present].exp() * (of[present] - to[present])).sum())


def expected_steps(
    reference: Path,
    prompt: list[int],
    generated: list[int],
    guided: Guided | None,
    temperature: float,
    scorable: int,
    adjust: Adjust | None = None,
    reported: Sequence[Tensor] | None = None,
) -> list[Step]:
    """Of every generated token. ``adjust`` changes the raw logits first.

    reported: log-probabilities ``[V]`` of every step, NaN where unknown, which decide where rounding may.
    """
    logits_LV = reference_oracle(reference).logits([*prompt, *generated])
    steps: list[Step] = []
    budget = math.inf if guided is None or guided.kl_budget is None else guided.kl_budget
    for count in range(len(generated)):
        reference_V = logits_LV[len(prompt) + count - 1].clone()
        if adjust is not None:
            reference_V = adjust(reference_V, generated[:count])
        limit = guided.guided_tokens if guided is not None else 0
        applies = guided if limit is None or count < limit else None
        left, history = budget - sum(step.kl for step in steps), [*prompt, *generated[:count]]
        either = step_distributions(reference_V, history, applies, temperature, scorable, left)
        if reported is not None:
            probs_V = reported[count].exp()
            either.sort(key=lambda step, probs_V=probs_V: float((step.log_probs_V.exp() - probs_V).abs().nansum()))
        steps.append(either[0])
    return steps

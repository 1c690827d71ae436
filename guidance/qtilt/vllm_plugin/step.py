"""One guided step on the device: candidates → values → offsets → tilted logits. The same for both model runners.

Shapes: ``G`` rows of one value-model version, ``K`` candidates, ``A`` logits of one return distribution, ``V``
vocabulary of the reference.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtilt.params import GuidanceParams
from qtilt.tilt import OFFSETS, kl_divergence, offsets, tilt, top_candidates
from qtilt.vllm_plugin.finite_check import finite_rows
from qtilt.vllm_plugin.residents import ResidentVersion

CERTAIN = 1e30
"""A logit beside which all others have no probability, at any temperature, and which float32 still divides by one."""
NO_TOKEN = -1
METHODS = list(OFFSETS)


class RowSettings(NamedTuple):
    """What of a request a step needs on the device; a tuple of numbers, so that all rows' are copied at once.

    temperature: of the sampling, 0 for greedy. ending_token: ends the request when it is sampled, whatever else was
    asked; NO_TOKEN when no token does.
    """

    top_k: int
    inv_eta: float
    method: int
    temperature: float
    ending_token: int

    @classmethod
    def of(cls, params: GuidanceParams, temperature: float, ending_token: int | None) -> "RowSettings":
        """From a request."""
        token = NO_TOKEN if ending_token is None else ending_token
        return cls(params.top_k, params.inv_eta, METHODS.index(params.method), temperature, token)


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The settings of a step's rows ``[G]`` on the device, and what the host must know of all of them."""

    top_k_G: Tensor
    inv_eta_G: Tensor
    method_G: Tensor
    temperature_G: Tensor
    ending_token_G: Tensor
    max_top_k: int
    methods: frozenset[str]

    @classmethod
    def of(cls, rows_GS: Tensor, params: Iterable[GuidanceParams]) -> "StepSettings":
        """rows_GS: float64 ``[G, len(RowSettings)]``. params: those of all rows, in any order."""
        top_k_G, inv_eta_G, method_G, temperature_G, ending_token_G = rows_GS.unbind(1)
        asked = list(params)
        return cls(
            top_k_G=top_k_G.long(),
            inv_eta_G=inv_eta_G,
            method_G=method_G,
            temperature_G=temperature_G,
            ending_token_G=ending_token_G.long(),
            max_top_k=max(each.top_k for each in asked),
            methods=frozenset(each.method for each in asked),
        )


class GuidedLogits(NamedTuple):
    """What a step gives: the KL(guided ‖ reference) is in nats, and finite where guidance was numbers."""

    logits_GV: Tensor
    kl_G: Tensor
    finite_G: Tensor


def guide_step(
    version: ResidentVersion, logits_GV: Tensor, settings: StepSettings, score: Callable[[Tensor], Tensor]
) -> GuidedLogits:
    """The guided logits of the rows of one version. ``score`` gives values ``[G, K, A]`` of candidates ``[G, K]``.

    A row whose values aren't finite numbers isn't tilted: it gets logits that end its request, in this same step and
    without the host knowing.
    """
    inv_eta_G = settings.inv_eta_G
    candidates = top_candidates(logits_GV, settings.max_top_k, version.scorable, settings.top_k_G)
    values_GKA = score(candidates.token_ids_BK)
    offsets_GK = _offsets(version, values_GKA, settings)
    floor_G = version.distribution.v_min * inv_eta_G
    finite_G = finite_rows(values_GKA, offsets_GK, candidates.valid_BK)
    # Offsets that are all the floor's tilt nothing: such a row keeps the reference's logits.
    offsets_GK = torch.where(finite_G.unsqueeze(-1), offsets_GK, floor_G.unsqueeze(-1))
    tilted_GV = tilt(logits_GV, candidates, offsets_GK, floor_G, settings.temperature_G)
    kl_G = kl_divergence(logits_GV, candidates, offsets_GK, floor_G, settings.temperature_G)
    finite_G = finite_G & kl_G.isfinite()
    return GuidedLogits(end_unless(finite_G, tilted_GV, settings.ending_token_G), kl_G, finite_G)


def end_unless(goes_on_G: Tensor, logits_GV: Tensor, ending_token_G: Tensor) -> Tensor:
    """Make the ending token certain, in place, in the rows that don't go on; rows without one stay as they are."""
    token_G1 = ending_token_G.clamp(min=0).unsqueeze(-1)
    ends_G1 = (~goes_on_G & (ending_token_G != NO_TOKEN)).unsqueeze(-1)
    return logits_GV.scatter_(-1, token_G1, logits_GV.gather(-1, token_G1).masked_fill_(ends_G1, CERTAIN))


def _offsets(version: ResidentVersion, values_GKA: Tensor, settings: StepSettings) -> Tensor:
    """Q/η ``[G, K]`` by each row's method; one forward serves all methods of the step."""
    first, *others = sorted(settings.methods)
    offsets_GK = offsets(version.distribution, values_GKA, settings.inv_eta_G, first)
    for method in others:
        has_method_G1 = (settings.method_G == METHODS.index(method)).unsqueeze(-1)
        of_method_GK = offsets(version.distribution, values_GKA, settings.inv_eta_G, method)
        offsets_GK = torch.where(has_method_G1, of_method_GK, offsets_GK)
    return offsets_GK

"""One guided step on the device: candidates → values → offsets → tilted logits.

Shapes: ``G`` rows of one value-model version, ``K`` candidates, ``A`` logits of one return distribution, ``V``
vocabulary of the reference.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qtilt.method.budget import largest_scale
from qtilt.method.params import GuidanceParams
from qtilt.method.tilt import (
    OFFSETS,
    TAILS,
    Candidates,
    Drops,
    ReferenceMass,
    likeliest,
    lowest_offset,
)
from qtilt.vllm_plugin.versions import ResidentVersion

CERTAIN = 1e30
"""A logit beside which all others have no probability, at any temperature, and which float32 still divides by one."""
FORCED = 1e9
"""The logit by which vLLM makes a token certain, after guidance, when a thinking budget is used up."""
NO_TOKEN = -1
METHODS = list(OFFSETS)
TAIL_NAMES = list(TAILS)


class RowSettings(NamedTuple):
    """What of a request a step needs on the device; a tuple of numbers, so that all rows' are copied at once.

    temperature: of the sampling, 0 for greedy. candidate_mass: infinite where all top_k are candidates. ending_token:
    ends the request when it is sampled, whatever else was asked; NO_TOKEN when no token does. guided_below: the
    positions of last tokens after which the next one is guided. kl_left: what the KL of a step may be at most.
    """

    top_k: int
    inv_eta: float
    method: int
    tail: int
    temperature: float
    candidate_mass: float
    ending_token: int
    guided_below: float = math.inf
    kl_left: float = math.inf

    @classmethod
    def of(cls, params: GuidanceParams, temperature: float, ending_token: int | None) -> "RowSettings":
        """From a request, whatever the length of its prompt."""
        token = NO_TOKEN if ending_token is None else ending_token
        method, tail = METHODS.index(params.method), TAIL_NAMES.index(params.tail)
        enough = params.candidate_mass if params.candidate_mass < 1 else math.inf
        return cls(params.top_k, params.inv_eta, method, tail, temperature, enough, token)

    @classmethod
    def ending(cls, ending_token: int | None) -> "RowSettings":
        """Of a request whose guidance has failed: nothing but its end matters."""
        return cls(1, 0.0, 0, 0, 1.0, math.inf, NO_TOKEN if ending_token is None else ending_token)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the host must know of all rows of a step. ``max_top_k`` is the largest; have_masses: some ask for less than
    all of their top_k; have_budgets: some have a budget for their KL.
    """

    max_top_k: int
    differ_in_top_k: bool
    have_masses: bool
    have_budgets: bool
    methods: frozenset[str]
    tails: frozenset[str]

    @classmethod
    def by(cls, params: Iterable[GuidanceParams]) -> "Asked":
        """params: those of all rows, in any order."""
        asked = list(params)
        top_ks = {each.top_k for each in asked}
        return cls(
            max_top_k=max(top_ks),
            differ_in_top_k=len(top_ks) > 1,
            have_masses=any(each.candidate_mass < 1 for each in asked),
            have_budgets=any(each.kl_budget is not None for each in asked),
            methods=frozenset(each.method for each in asked),
            tails=frozenset(each.tail for each in asked),
        )


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The settings of a step's rows ``[G]`` on the device: numbers_GS are all of them, a :class:`RowSettings` a row.

    top_k_G: None when it is the same for all. candidate_mass_G: None when all top_k of all are candidates.
    """

    asked: Asked
    numbers_GS: Tensor
    top_k_G: Tensor | None
    inv_eta_G: Tensor
    method_G: Tensor
    tail_G: Tensor
    has_floor_G1: Tensor
    temperature_G: Tensor
    candidate_mass_G: Tensor | None
    ending_token_G: Tensor
    guided_below_G: Tensor
    kl_left_G: Tensor

    @classmethod
    def of(cls, numbers_GS: Tensor, asked: Asked) -> "StepSettings":
        """numbers_GS: float64 ``[G, len(RowSettings)]``."""
        columns = numbers_GS.unbind(1)
        top_k_G, inv_eta_G, method_G, tail_G, temperature_G, enough_G, ending_G, guided_below_G, kl_left_G = columns
        return cls(
            asked=asked,
            numbers_GS=numbers_GS,
            top_k_G=top_k_G.long() if asked.differ_in_top_k else None,
            inv_eta_G=inv_eta_G,
            method_G=method_G,
            tail_G=tail_G,
            has_floor_G1=(tail_G == TAIL_NAMES.index("floor")).unsqueeze(-1),
            temperature_G=temperature_G,
            candidate_mass_G=enough_G if asked.have_masses else None,
            ending_token_G=ending_G.long(),
            guided_below_G=guided_below_G,
            kl_left_G=kl_left_G,
        )

    def after(self, spent_G: Tensor) -> "StepSettings":
        """The same, with so many nats less left."""
        numbers_GS = self.numbers_GS.clone()
        numbers_GS[:, RowSettings._fields.index("kl_left")] -= spent_G
        return StepSettings.of(numbers_GS, self.asked)


class Score(Protocol):
    """The value engine as a step uses it."""

    def __call__(self, candidates_GK: Tensor, is_scored_GK: Tensor) -> Tensor:
        """Values ``[G, K, A]``; numbers that mean nothing where a candidate isn't to be scored.

        Those that are to be scored are the first of their row.
        """


class Guided(NamedTuple):
    """What a step has measured.

    divergence_G3: the columns of :class:`qtilt.tilt.Divergence`, NaN where guidance failed. candidates_G: how many
    tokens of a row were scored, is_scored_GK: which. token_ids_GK: the candidates. drops_GK, others_G1: how many nats
    these and all other tokens have dropped, the one that ends a request aside, see :class:`qtilt.tilt.Drops`.
    log_reference_GK, log_rest_G1: see :class:`qtilt.tilt.ReferenceMass`. values_GKA: as they were scored.
    """

    divergence_G3: Tensor
    candidates_G: Tensor
    token_ids_GK: Tensor
    drops_GK: Tensor
    others_G1: Tensor
    log_reference_GK: Tensor
    log_rest_G1: Tensor
    is_scored_GK: Tensor
    values_GKA: Tensor

    @property
    def failed(self) -> Tensor:
        """Whether guidance failed, bool ``[G]``: such a row's logits end its request."""
        return self.divergence_G3[:, 0].isnan()


def guide_step(
    version: ResidentVersion,
    logits_GV: Tensor,
    settings: StepSettings,
    score: Score,
    applies_G: Tensor | None = None,
) -> Guided:
    """Guide, in place, the rows of one version.

    A row whose values aren't finite numbers isn't tilted: it gets logits that end its request, in this same step and
    without the host knowing. applies_G: the rows that are guided, None: all; the others stay bit-identical.
    """
    candidates = version.tilt.top_candidates(logits_GV, settings.asked.max_top_k, version.scorable, settings.top_k_G)
    mass = version.tilt.reference_mass(logits_GV, candidates, settings.temperature_G)
    if settings.candidate_mass_G is not None:
        candidates, mass = likeliest(candidates, mass, settings.candidate_mass_G)
    is_scored_GK = candidates.valid_BK & _can_be_moved(candidates, settings)
    if applies_G is not None:
        is_scored_GK &= applies_G.unsqueeze(-1)
    values_GKA = score(candidates.token_ids_BK, is_scored_GK)
    offsets_GK = _offsets(version, values_GKA, settings.inv_eta_G, settings.method_G, settings.asked.methods)
    # Of a row that scores nothing the first one too: a draft's history that isn't finite is cached as if it were.
    is_checked_GK = is_scored_GK.clone()
    is_checked_GK[:, 0] = True
    finite_G = finite_rows(values_GKA, offsets_GK, is_checked_GK)
    # A row without a score keeps the reference's logits.
    is_moved_GK = is_scored_GK & finite_G.unsqueeze(-1)
    if settings.asked.have_budgets:
        scale_G = _scale(version, mass, is_moved_GK, offsets_GK, settings)
        dropped = _drops(version, mass, is_moved_GK, offsets_GK, settings, scale_G)
        divergence_G3 = version.tilt.divergence(mass, dropped)
        divergence_G3[:, :2].masked_fill_(scale_G.unsqueeze(-1) == 0, 0.0)  # not what rounding has left of it
    else:
        dropped = _drops(version, mass, is_moved_GK, offsets_GK, settings)
        divergence_G3 = version.tilt.divergence(mass, dropped)
    version.tilt.tilt_(logits_GV, candidates, dropped, settings.temperature_G)
    finite_G = finite_G & (divergence_G3[:, 0] < math.inf)
    end_unless(finite_G if applies_G is None else finite_G | ~applies_G, logits_GV, settings.ending_token_G)
    divergence_G3 = divergence_G3.masked_fill(~finite_G.unsqueeze(-1), math.nan)
    return Guided(
        divergence_G3, is_scored_GK.sum(-1), candidates.token_ids_BK, *dropped, *mass, is_scored_GK, values_GKA
    )


def _can_be_moved(candidates: Candidates, settings: StepSettings) -> Tensor:
    """Whether scores can change a row, bool ``[G, 1]``: with ``mean`` a single candidate keeps the reference's mass."""
    has_two_G1 = candidates.valid_BK[:, 1:2].any(-1, keepdim=True)  # those that count are the first ones
    return has_two_G1 | settings.has_floor_G1


def finite_rows(values_GKA: Tensor, offsets_GK: Tensor, is_checked_GK: Tensor) -> Tensor:
    """Whether values and offsets of all candidates of a row that are checked are finite: bool ``[G]``.

    The tilted logits of a finite row are numbers wherever the reference's are: they are a finite logit plus an offset
    that is at most 0. Masks of the reference (−inf or NaN logits) aren't candidates, and aren't scored.
    """
    # A sum, in float64, is finite where all that it adds up is.
    finite_GK = (values_GKA.sum(-1, dtype=torch.float64) + offsets_GK).abs() < torch.inf
    return (finite_GK | ~is_checked_GK).all(-1)


def end_unless(goes_on_G: Tensor, logits_GV: Tensor, ending_token_G: Tensor) -> Tensor:
    """Make the ending token certain, in place, in the rows that don't go on; rows without one stay as they are."""
    token_G1 = ending_token_G.clamp(min=0).unsqueeze(-1)
    ends_G1 = (~goes_on_G & (ending_token_G != NO_TOKEN)).unsqueeze(-1)
    return logits_GV.scatter_(-1, token_G1, logits_GV.gather(-1, token_G1).masked_fill_(ends_G1, CERTAIN))


def _offsets(
    version: ResidentVersion, values_RKA: Tensor, inv_eta_R: Tensor, method_R: Tensor, methods: frozenset[str]
) -> Tensor:
    """Q/η ``[R, K]`` by each row's method, one of ``methods``; one forward serves all methods of the step."""
    first, *others = sorted(methods)
    offsets_RK = version.tilt.offsets(version.distribution, values_RKA, inv_eta_R, first)
    for method in others:
        has_method_R1 = (method_R == METHODS.index(method)).unsqueeze(-1)
        of_method_RK = version.tilt.offsets(version.distribution, values_RKA, inv_eta_R, method)
        offsets_RK = torch.where(has_method_R1, of_method_RK, offsets_RK)
    return offsets_RK


def _scale(
    version: ResidentVersion, mass: ReferenceMass, is_scored_GK: Tensor, offsets_GK: Tensor, settings: StepSettings
) -> Tensor:
    """The λ ``[G]`` of each row that what is left of its budget allows."""

    def kl(scale_G: Tensor) -> Tensor:
        dropped = _drops(version, mass, is_scored_GK, offsets_GK, settings, scale_G)
        return version.tilt.divergence(mass, dropped)[:, 0]

    return largest_scale(kl, settings.kl_left_G)


def _drops(
    version: ResidentVersion,
    mass: ReferenceMass,
    is_scored_GK: Tensor,
    offsets_GK: Tensor,
    settings: StepSettings,
    scale_G: Tensor | None = None,
) -> Drops:
    """By each row's tail, one of the step's. scale_G: of all offsets, if they aren't to be as they are."""
    floor_G = lowest_offset(version.distribution, settings.inv_eta_G)
    if scale_G is not None:
        offsets_GK, floor_G = offsets_GK * scale_G.unsqueeze(-1), floor_G * scale_G
    first, *others = sorted(settings.asked.tails)
    dropped = version.tilt.drops(mass, is_scored_GK, offsets_GK, floor_G, first)
    for tail in others:
        has_tail_G1 = (settings.tail_G == TAIL_NAMES.index(tail)).unsqueeze(-1)
        of_tail = version.tilt.drops(mass, is_scored_GK, offsets_GK, floor_G, tail)
        dropped = Drops(*(torch.where(has_tail_G1, new, old) for new, old in zip(of_tail, dropped, strict=True)))
    return dropped

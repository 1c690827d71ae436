"""One guided step on the device: candidates → values → offsets → tilted logits.

Where requests tolerate a small distance to full guidance, candidates are scored in stages, the likeliest first, until
no row needs more. The host must know which rows go on: each stage but the last waits for the device. Rows without a
tolerance are steps of their own, scored at once, and wait for nothing.

Shapes: ``G`` rows of one value-model version, ``R`` of them, ``K`` candidates, ``A`` logits of one return distribution,
``V`` vocabulary of the reference.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qtilt.method.params import GuidanceParams
from qtilt.method.tilt import (
    OFFSETS,
    TAILS,
    Candidates,
    Drops,
    ReferenceMass,
    lowest_offset,
    may_stop_scoring,
    offsets,
)
from qtilt.vllm_plugin.versions import ResidentVersion

CERTAIN = 1e30
"""A logit beside which all others have no probability, at any temperature, and which float32 still divides by one."""
NO_TOKEN = -1
METHODS = list(OFFSETS)
TAIL_NAMES = list(TAILS)
STAGES = (2,)
"""How many candidates a row has scored after each stage but the last, which scores all that are left.

A further stage is a further forward, for which the device waits for the host, and a row's last token is run again in
it. A schedule is thus a compromise between tokens and forwards. On the demo's arithmetic and star graph models, at
concurrency 32, (2,) runs 3.8 and 9.3 tokens a row and step, (2, 8) about 3.4 and 8.0, (4,) 5.4 and 8.9. Those forwards
are so small that their number counts: processor time a token was 304 and 412 µs, 319 and 426 µs, 277 and 390 µs.
"""


class RowSettings(NamedTuple):
    """What of a request a step needs on the device; a tuple of numbers, so that all rows' are copied at once.

    temperature: of the sampling, 0 for greedy. ending_token: ends the request when it is sampled, whatever else was
    asked; NO_TOKEN when no token does. guided_below: the positions of last tokens after which the next one is guided.
    """

    top_k: int
    inv_eta: float
    method: int
    tail: int
    temperature: float
    tolerance: float
    ending_token: int
    guided_below: float = math.inf

    @classmethod
    def of(cls, params: GuidanceParams, temperature: float, ending_token: int | None) -> "RowSettings":
        """From a request, whatever the length of its prompt."""
        token = NO_TOKEN if ending_token is None else ending_token
        method, tail = METHODS.index(params.method), TAIL_NAMES.index(params.tail)
        return cls(params.top_k, params.inv_eta, method, tail, temperature, params.tolerance, token)

    @classmethod
    def ending(cls, ending_token: int | None) -> "RowSettings":
        """Of a request whose guidance has failed: nothing but its end matters."""
        return cls(1, 0.0, 0, 0, 1.0, 0.0, NO_TOKEN if ending_token is None else ending_token)


@dataclass(frozen=True, slots=True)
class StepSettings:
    """The settings of a step's rows ``[G]`` on the device, and what the host must know of all of them.

    top_k_G: None when it is ``max_top_k`` for all.
    """

    top_k_G: Tensor | None
    inv_eta_G: Tensor
    method_G: Tensor
    tail_G: Tensor
    temperature_G: Tensor
    tolerance_G: Tensor
    ending_token_G: Tensor
    guided_below_G: Tensor
    max_top_k: int
    methods: frozenset[str]
    tails: frozenset[str]

    @classmethod
    def of(cls, rows_GS: Tensor, params: Iterable[GuidanceParams]) -> "StepSettings":
        """rows_GS: float64 ``[G, len(RowSettings)]``. params: those of all rows, in any order."""
        top_k_G, inv_eta_G, method_G, tail_G, temperature_G, tolerance_G, ending_token_G, guided_below_G = (
            rows_GS.unbind(1)
        )
        asked = list(params)
        top_ks = {each.top_k for each in asked}
        return cls(
            top_k_G=top_k_G.long() if len(top_ks) > 1 else None,
            inv_eta_G=inv_eta_G,
            method_G=method_G,
            tail_G=tail_G,
            temperature_G=temperature_G,
            tolerance_G=tolerance_G,
            ending_token_G=ending_token_G.long(),
            guided_below_G=guided_below_G,
            max_top_k=max(top_ks),
            methods=frozenset(each.method for each in asked),
            tails=frozenset(each.tail for each in asked),
        )


class Score(Protocol):
    """The value engine as a step uses it."""

    def __call__(self, candidates_RK: Tensor, rows_R: Tensor | None = None) -> Tensor:
        """Values ``[R, K, A]`` of candidates of these rows of the step; of all of them, and that comes first, if None.

        The host waits for ``rows_R``.
        """


class Scored(NamedTuple):
    """offsets_GK: nats, of the candidates that are scored. finite_G: whether all scores of a row are numbers."""

    offsets_GK: Tensor
    is_scored_GK: Tensor
    finite_G: Tensor


class Guided(NamedTuple):
    """What a step has measured.

    divergence_G3: the columns of :class:`qtilt.tilt.Divergence`, NaN where guidance failed. candidates_G: how many
    tokens of a row were scored.
    """

    divergence_G3: Tensor
    candidates_G: Tensor

    @property
    def failed(self) -> Tensor:
        """Whether guidance failed, bool ``[G]``: such a row's logits end its request."""
        return self.divergence_G3[:, 0].isnan()


def scores_in_stages(version: ResidentVersion, params: GuidanceParams) -> bool:
    """Whether a request's steps are guided with ``in_stages``.

    For Q-type value models further candidates cost next to nothing: all are scored, which any tolerance allows.
    """
    return params.tolerance > 0 and version.manifest.type == "v"


def guide_step(
    version: ResidentVersion,
    logits_GV: Tensor,
    settings: StepSettings,
    score: Score,
    applies_G: Tensor | None = None,
    *,
    in_stages: bool = False,
) -> Guided:
    """Guide, in place, the rows of one version; ``in_stages`` stops scoring within each row's tolerance.

    What is sampled from, and the KL of it, treats a candidate without a score like the tokens that aren't candidates.
    A row whose values aren't finite numbers isn't tilted: it gets logits that end its request, in this same step and
    without the host knowing. applies_G: the rows that are guided, None: all; the others stay bit-identical.
    """
    candidates = version.tilt.top_candidates(logits_GV, settings.max_top_k, version.scorable, settings.top_k_G)
    mass = version.tilt.reference_mass(logits_GV, candidates, settings.temperature_G)
    if in_stages:
        offsets_GK, is_scored_GK, finite_G = _score_in_stages(version, candidates, mass, settings, score)
    else:
        offsets_GK, is_scored_GK, finite_G = _score_all(version, candidates, settings, score)
    # A row without a score keeps the reference's logits.
    counts_G = finite_G if applies_G is None else finite_G & applies_G
    dropped = _drops(version, mass, is_scored_GK & counts_G.unsqueeze(-1), offsets_GK, settings)
    divergence_G3 = version.tilt.divergence(mass, dropped)
    version.tilt.tilt_(logits_GV, candidates, dropped, settings.temperature_G)
    finite_G = finite_G & (divergence_G3[:, 0] < math.inf)
    end_unless(finite_G if applies_G is None else finite_G | ~applies_G, logits_GV, settings.ending_token_G)
    return Guided(divergence_G3.masked_fill(~finite_G.unsqueeze(-1), math.nan), is_scored_GK.sum(-1))


def finite_rows(values_GKA: Tensor, offsets_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """Whether values and offsets of all that count among a row's candidates are finite: bool ``[G]``.

    The tilted logits of a finite row are numbers wherever the reference's are: they are a finite logit plus an offset
    that is at most 0. Masks of the reference (−inf or NaN logits) aren't candidates and don't count.
    """
    # A sum, in float64, is finite where all that it adds up is.
    finite_GK = (values_GKA.sum(-1, dtype=torch.float64) + offsets_GK).abs() < torch.inf
    return (finite_GK | ~valid_GK).all(-1)


def end_unless(goes_on_G: Tensor, logits_GV: Tensor, ending_token_G: Tensor) -> Tensor:
    """Make the ending token certain, in place, in the rows that don't go on; rows without one stay as they are."""
    token_G1 = ending_token_G.clamp(min=0).unsqueeze(-1)
    ends_G1 = (~goes_on_G & (ending_token_G != NO_TOKEN)).unsqueeze(-1)
    return logits_GV.scatter_(-1, token_G1, logits_GV.gather(-1, token_G1).masked_fill_(ends_G1, CERTAIN))


def _score_all(version: ResidentVersion, candidates: Candidates, settings: StepSettings, score: Score) -> Scored:
    """Every candidate, in one forward."""
    values_GKA = score(candidates.token_ids_BK)
    offsets_GK = _offsets(version, values_GKA, settings.inv_eta_G, settings.method_G, settings.methods)
    return Scored(offsets_GK, candidates.valid_BK, finite_rows(values_GKA, offsets_GK, candidates.valid_BK))


def _score_in_stages(
    version: ResidentVersion, candidates: Candidates, mass: ReferenceMass, settings: StepSettings, score: Score
) -> Scored:
    """The likeliest candidates first, and more of them only in the rows whose tolerance isn't met yet."""
    token_ids_GK, valid_GK = candidates
    lowest_G = lowest_offset(version.distribution, settings.inv_eta_G)
    offsets_GK = lowest_G.unsqueeze(-1).repeat(1, token_ids_GK.shape[1])
    is_scored_GK = torch.zeros_like(valid_GK)
    finite_G = torch.ones_like(valid_GK[:, 0])
    rows_R = torch.arange(len(token_ids_GK), device=token_ids_GK.device)
    for stage in _stages(token_ids_GK.shape[1]):
        valid_RK = valid_GK[rows_R, stage]
        values_RKA = score(token_ids_GK[rows_R, stage], None if stage.start == 0 else rows_R)
        offsets_RK = _offsets(
            version, values_RKA, settings.inv_eta_G[rows_R], settings.method_G[rows_R], settings.methods
        )
        finite_G[rows_R] = finite_rows(values_RKA, offsets_RK, valid_RK)
        offsets_GK[rows_R, stage] = offsets_RK
        is_scored_GK[rows_R, stage] = valid_RK
        if stage.stop == token_ids_GK.shape[1]:
            break
        is_mean_G = settings.tail_G == TAIL_NAMES.index("mean")
        stops_G = may_stop_scoring(
            mass, is_scored_GK, offsets_GK, lowest_G, is_mean_G, settings.temperature_G, settings.tolerance_G
        )
        # A row whose request ends needs no more either.
        rows_R = (~stops_G & finite_G).nonzero().squeeze(-1)
        if len(rows_R) == 0:
            break
    return Scored(offsets_GK, is_scored_GK, finite_G)


def _stages(candidates: int) -> Iterator[slice]:
    """Which candidates each stage scores.

    >>> list(_stages(5))
    [slice(0, 2, None), slice(2, 5, None)]
    """
    ends = [*(end for end in STAGES if end < candidates), candidates]
    return (slice(start, end) for start, end in zip([0, *ends], ends, strict=False))


def _offsets(
    version: ResidentVersion, values_RKA: Tensor, inv_eta_R: Tensor, method_R: Tensor, methods: frozenset[str]
) -> Tensor:
    """Q/η ``[R, K]`` by each row's method, one of ``methods``; one forward serves all methods of the step."""
    first, *others = sorted(methods)
    offsets_RK = offsets(version.distribution, values_RKA, inv_eta_R, first)
    for method in others:
        has_method_R1 = (method_R == METHODS.index(method)).unsqueeze(-1)
        of_method_RK = offsets(version.distribution, values_RKA, inv_eta_R, method)
        offsets_RK = torch.where(has_method_R1, of_method_RK, offsets_RK)
    return offsets_RK


def _drops(
    version: ResidentVersion, mass: ReferenceMass, is_scored_GK: Tensor, offsets_GK: Tensor, settings: StepSettings
) -> Drops:
    """By each row's tail, one of the step's."""
    floor_G = lowest_offset(version.distribution, settings.inv_eta_G)
    first, *others = sorted(settings.tails)
    dropped = version.tilt.drops(mass, is_scored_GK, offsets_GK, floor_G, first)
    for tail in others:
        has_tail_G1 = (settings.tail_G == TAIL_NAMES.index(tail)).unsqueeze(-1)
        of_tail = version.tilt.drops(mass, is_scored_GK, offsets_GK, floor_G, tail)
        dropped = Drops(*(torch.where(has_tail_G1, new, old) for new, old in zip(of_tail, dropped, strict=True)))
    return dropped

"""The tilt: π(y|x) ∝ π_ref(y|x) · exp(Q(x, y)/η) on logits (Eq. 2), and its KL to the reference.

Shapes: ``B`` rows, ``V`` vocabulary of the reference, ``K`` candidates, ``A`` logits of one return distribution.

Temperature. vLLM divides by T after logits processors. The policy that was rolled out is π_ref at temperature T, so the
target is softmax(logits/T + Q/η), and what is added to the raw logits is T·Q/η. (The official code adds Q/η before the
division, an offset 1/T times ours.) As T → 0⁺ this lets guidance vanish; T = 0 is by definition the argmax of
logits + Q/η.

Unscored tokens keep their logit plus v_min/η, the offset of the lowest possible return. The official Bernoulli code
does the same; its categorical code subtracts the smallest scored offset instead.

Each function is written twice: here, and for float32 on CPUs in compiled/tilt.h, which is what runs once that has been
loaded. They differ where a logit over the temperature overflows float32: here such a token is masked, there it isn't.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qtilt.compiled import library
from qtilt.distributions import ReturnDistribution


class Candidates(NamedTuple):
    """The tokens that are scored: ``token_ids_BK`` in order of falling reference logit, and which of them count.

    An entry that isn't ``valid_BK`` (masked by a grammar, beyond the row's own top-k or the scorable vocabulary) holds
    some token id within the scorable vocabulary and is treated like an unscored token.
    """

    token_ids_BK: Tensor
    valid_BK: Tensor


def top_candidates(logits_BV: Tensor, k: int, scorable: int, top_k_B: Tensor | None = None) -> Candidates:
    """The k likeliest tokens of each row among ids below ``scorable``, at most ``min(scorable, V)`` of them.

    Tokens with a logit of −inf or NaN never count. ``top_k_B`` narrows single rows below k.
    """
    if library.takes(logits_BV):
        return Candidates(*torch.ops.qtilt.top_candidates(logits_BV, k, scorable, top_k_B))
    scorable = min(scorable, logits_BV.shape[-1])
    scorable_logits = logits_BV[:, :scorable]
    finite_logits = scorable_logits.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    top_logits_BK, token_ids_BK = finite_logits.topk(min(k, scorable), dim=-1)
    valid_BK = top_logits_BK > -torch.inf
    if top_k_B is not None:
        rank_K = torch.arange(valid_BK.shape[-1], device=valid_BK.device)
        valid_BK = valid_BK & (rank_K < top_k_B.unsqueeze(-1))
    return Candidates(token_ids_BK, valid_BK)


def qsharp_offsets(distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor) -> Tensor:
    """Q♯: ln E[e^{Z/η}] in nats, float64 ``[B, K]`` (Theorem 2.2)."""
    return distribution.log_mgf(logits_BKA.double(), inv_eta_B.double().unsqueeze(-1))


def cd_offsets(distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor) -> Tensor:
    """Controlled decoding: E[Z]/η in nats, float64 ``[B, K]``."""
    return distribution.mean(logits_BKA.double()) * inv_eta_B.double().unsqueeze(-1)


# Mass that a float32 softmax can't tell from none. No offset is below the floor, so the guided mass of what isn't a
# candidate is below it too.
_ROUNDING = 1e-6

OFFSETS = {"qsharp": qsharp_offsets, "cd": cd_offsets}


def offsets(distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor, method: str) -> Tensor:
    """What the method adds to each candidate's log-probability: nats, float64 ``[B, K]``.

    float64 because offsets grow to v_max/η, where a float32 would round off the differences that decide.
    """
    return OFFSETS[method](distribution, logits_BKA, inv_eta_B)


def tilt(
    logits_BV: Tensor, candidates: Candidates, offsets_BK: Tensor, floor_B: Tensor, temperature_B: Tensor
) -> Tensor:
    """Tilted logits ``[B, V]``: softmax(tilted/T) is the guided distribution; the dtype is that of ``logits_BV``.

    offsets_BK: nats added to the candidates. floor_B: nats added to all other tokens, v_min/η; no offset is below it.
    Only differences of offsets matter, so each row is shifted by its largest: a row of equal offsets comes back
    bit-identical, and large 1/η costs no precision where the mass is. −inf and NaN logits stay as they are.
    """
    if library.takes(logits_BV):
        tilted_BV: Tensor = torch.ops.qtilt.tilt(logits_BV, *candidates, offsets_BK, floor_B, temperature_B)
        return tilted_BV
    offsets_BK, floor_B1 = _below_the_largest(candidates, offsets_BK, floor_B)
    scale_B1 = _scale(temperature_B).double().unsqueeze(-1)
    tilted_BV = logits_BV + (scale_B1 * floor_B1).to(logits_BV.dtype)
    candidate_logits_BK = logits_BV.gather(-1, candidates.token_ids_BK)
    shifts_BK = (scale_B1 * offsets_BK).to(logits_BV.dtype)
    return tilted_BV.scatter_(-1, candidates.token_ids_BK, candidate_logits_BK + shifts_BK)


def _below_the_largest(candidates: Candidates, offsets_BK: Tensor, floor_B: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of candidates ``[B, K]`` and of all others ``[B, 1]``, float64, shifted so that a row's largest is 0."""
    floor_B1 = floor_B.double().unsqueeze(-1)
    offsets_BK = torch.where(candidates.valid_BK, offsets_BK.double(), floor_B1)
    largest_B1 = offsets_BK.amax(-1, keepdim=True)
    return offsets_BK - largest_B1, floor_B1 - largest_B1


def _scale(temperature_B: Tensor) -> Tensor:
    """What logits are divided by: greedy rows are tilted and measured at T = 1."""
    return torch.where(temperature_B > 0, temperature_B, 1.0)


class ReferenceMass(NamedTuple):
    """ln of the reference's probabilities at temperature T: of the candidates ``[B, K]``, and of all other tokens
    together ``[B, 1]``. float64; −inf for a candidate that isn't valid, and for a rest that rounding can't tell from 0.
    """

    candidates_BK: Tensor
    rest_B1: Tensor


def reference_mass(logits_BV: Tensor, candidates: Candidates, temperature_B: Tensor) -> ReferenceMass:
    """From the full vocabulary, once. T = 0 is measured at T = 1; −inf and NaN logits have no mass."""
    if library.takes(logits_BV):
        return ReferenceMass(*torch.ops.qtilt.reference_mass(logits_BV, *candidates, temperature_B))
    scaled_BV = logits_BV / _scale(temperature_B).to(logits_BV.dtype).unsqueeze(-1)
    scaled_BV.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    log_mass_BK = scaled_BV.log_softmax(-1).gather(-1, candidates.token_ids_BK).double()
    log_mass_BK = log_mass_BK.masked_fill(~candidates.valid_BK, -torch.inf)
    rest_B1 = 1 - log_mass_BK.exp().sum(-1, keepdim=True)
    return ReferenceMass(log_mass_BK, rest_B1.masked_fill(rest_B1 < _ROUNDING, 0.0).log())


def kl_divergence(mass: ReferenceMass, candidates: Candidates, offsets_BK: Tensor, floor_B: Tensor) -> Tensor:
    """KL(guided ‖ reference) of the two sampling distributions at temperature T, in nats, float64 ``[B]``.

    mass: of these candidates. Other arguments as for :func:`tilt`. Full vocabulary, before penalties and truncation.
    Tokens masked in the logits (−inf or NaN) have no mass in either, and a row without any other has a KL of 0. (The
    official code compares a truncated with an untruncated distribution, which isn't 0 without guidance.)

    With offsets o and Z = E_reference[e^o], the KL is E_guided[o − ln Z]: the vocabulary is read once, for the
    reference's normaliser, and all tokens that aren't candidates are one outcome M with the mass that is left.
    """
    if library.is_loaded() and floor_B.device.type == "cpu":
        kl_B: Tensor = torch.ops.qtilt.kl_divergence(*mass, candidates.valid_BK, offsets_BK, floor_B)
        return kl_B
    offsets_BK, floor_B1 = _below_the_largest(candidates, offsets_BK, floor_B)
    offsets_BM = torch.cat([offsets_BK, floor_B1], dim=-1)
    log_weight_BM = torch.cat(mass, dim=-1) + offsets_BM
    log_z_B1 = log_weight_BM.logsumexp(-1, keepdim=True)
    guided_BM = (log_weight_BM - log_z_B1).exp()
    # What has no guided mass adds nothing; a row without any token has no normaliser either.
    return (guided_BM * (offsets_BM - log_z_B1)).masked_fill(log_weight_BM == -torch.inf, 0.0).sum(-1).clamp(min=0.0)


class OffsetRange(NamedTuple):
    """Between which bounds, v_min/η and v_max/η, all offsets of a row lie: nats, ``[B]`` each."""

    lowest_B: Tensor
    highest_B: Tensor

    @classmethod
    def of(cls, distribution: ReturnDistribution, inv_eta_B: Tensor) -> "OffsetRange":
        """Of both methods: Q♯'s ln E[e^{Z/η}] and controlled decoding's E[Z]/η are means of one kind or another."""
        inv_eta_B = inv_eta_B.double()
        return cls(distribution.v_min * inv_eta_B, distribution.v_max * inv_eta_B)


def may_stop_scoring(
    mass: ReferenceMass,
    scored_BK: Tensor,
    offsets_BK: Tensor,
    bounds: OffsetRange,
    temperature_B: Tensor,
    tolerance_B: Tensor,
) -> Tensor:
    """Whether the candidates not scored yet can stay unscored: bool ``[B]``.

    scored_BK: which valid candidates have a true offset in ``offsets_BK``; the others' entries aren't read.

    T > 0: when :func:`total_variation_bound` is at most the row's tolerance. T = 0: when the greedy token is certain,
    whatever the tolerance. It is the argmax of ln p + o, at T = 1; a candidate without a score reaches ln p + v_max/η
    at most, and where that is less than what a scored one has, no score would let it win. (Ties and what float32 rounds
    off logits aside.)
    """
    is_close_B = total_variation_bound(mass, scored_BK, offsets_BK, bounds) <= tolerance_B
    log_weight_BK = mass.candidates_BK + (offsets_BK - bounds.highest_B.unsqueeze(-1))
    best_scored_B = log_weight_BK.masked_fill(~scored_BK, -torch.inf).amax(-1)
    best_unscored_B = mass.candidates_BK.masked_fill(scored_BK, -torch.inf).amax(-1)
    is_decided_B = (best_unscored_B < best_scored_B) | (best_unscored_B == -torch.inf)
    return torch.where(temperature_B > 0, is_close_B, is_decided_B)


def total_variation_bound(mass: ReferenceMass, scored_BK: Tensor, offsets_BK: Tensor, bounds: OffsetRange) -> Tensor:
    """How far guidance that treats the candidates not scored like other tokens can be from full guidance, at most.

    The total-variation distance ½ Σ |g − g'| of the sampling distributions at T, before penalties and truncation:
    float64 ``[B]`` in [0, 1]. Arguments as for :func:`may_stop_scoring`.

    Let p be the reference, o the offsets of full guidance, all in [lo, hi] = ``bounds``, U the candidates that aren't
    scored, and u = Σ_U p. Full guidance g has the weights w = p·e^o, o being lo outside of the candidates, and
    Z = Σ w = S + X with X = Σ_U p·e^o; S, the weight of what is scored and of what is no candidate, is known. Shortened
    guidance g' has the same weights w' = w but for w' = p·e^lo in U, and Z' = S + u·e^lo.

    No weight grows: w' ≤ w, so Z' ≤ Z, so g' = w'/Z' ≥ w'/Z and g = w/Z ≥ w'/Z. Hence Σ min(g, g') ≥ Z'/Z and

        TV = 1 − Σ min(g, g') ≤ 1 − Z'/Z = (X − u·e^lo) / (S + X) ≤ u·(e^hi − e^lo) / (S + u·e^hi),

    the last because the fraction before it grows with X, and X ≤ u·e^hi. Computed as logarithms of weights divided by
    e^hi, none of which overflows; what underflows is a weight that doesn't count.
    """
    lowest_B1 = (bounds.lowest_B - bounds.highest_B).unsqueeze(-1)
    log_weight_BK = mass.candidates_BK + (offsets_BK - bounds.highest_B.unsqueeze(-1))
    log_weight_BK = log_weight_BK.masked_fill(~scored_BK, -torch.inf)
    log_known_B = torch.cat([log_weight_BK, mass.rest_B1 + lowest_B1], dim=-1).logsumexp(-1)
    log_unscored_B = mass.candidates_BK.masked_fill(scored_BK, -torch.inf).logsumexp(-1)
    log_missing_B = log_unscored_B + (-torch.expm1(lowest_B1.squeeze(-1))).log()
    return (log_missing_B - torch.logaddexp(log_known_B, log_unscored_B)).exp()

"""The tilt: π(y|x) ∝ π_ref(y|x) · exp(Q(x, y)/η) on logits (Eq. 2), and its KL to the reference.

Shapes: ``B`` rows, ``V`` vocabulary of the reference, ``K`` candidates, ``A`` logits of one return distribution.

Temperature. vLLM divides by T after logits processors. The policy that was rolled out is π_ref at temperature T, so the
target is softmax(logits/T + Q/η), and what is added to the raw logits is T·Q/η. (The official code adds Q/η before the
division, an offset 1/T times ours.) As T → 0⁺ this lets guidance vanish; T = 0 is by definition the argmax of
logits + Q/η.

The tail: which offset the tokens without a score get, see TAILS.
- ``floor``: v_min/η, that of the lowest possible return. The official Bernoulli code does the same; its categorical
  code subtracts the smallest scored offset instead. A value above v_min, even a constant one, then lifts the
  candidates over all others: a strong tilt also truncates.
- ``mean``: ln(Σ p·e^o / Σ p), the mean of the scored candidates' e^o weighted by the reference p at temperature T. The
  guided mass of what is scored is then the reference's, every other token keeps the reference's probability, and a
  constant value tilts nothing. Neither the paper nor its code has this: what truncation does is left to sampling.

What touches the vocabulary is written again for float32: for CPUs in C++ (forwards/compiled/tilt.py), for GPUs in
Triton (forwards/triton_tilt/tilt.py). They differ where a logit over the temperature overflows float32: here such a
token is masked, there it isn't.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qtilt.method.distributions import ReturnDistribution


class Candidates(NamedTuple):
    """The tokens that may be scored: ``token_ids_BK`` in order of falling reference logit, and which of them count.

    An entry that isn't ``valid_BK`` (masked by a grammar, beyond the row's own top-k or the scorable vocabulary) holds
    some token id within the scorable vocabulary and is treated like an unscored token.
    """

    token_ids_BK: Tensor
    valid_BK: Tensor


class TiltFunctions(Protocol):
    """The functions of this module that a step runs: this module is one implementation."""

    def top_candidates(self, logits_BV: Tensor, k: int, scorable: int, top_k_B: Tensor | None = None) -> Candidates: ...
    def reference_mass(self, logits_BV: Tensor, candidates: Candidates, temperature_B: Tensor) -> "ReferenceMass": ...
    def offsets(
        self, distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor, method: str
    ) -> Tensor: ...
    def drops(
        self, mass: "ReferenceMass", scored_BK: Tensor, offsets_BK: Tensor, floor_B: Tensor, tail: str
    ) -> "Drops": ...
    def tilt_(self, logits_BV: Tensor, candidates: Candidates, drops: "Drops", temperature_B: Tensor) -> None: ...
    def divergence(self, mass: "ReferenceMass", drops: "Drops") -> Tensor: ...


def top_candidates(logits_BV: Tensor, k: int, scorable: int, top_k_B: Tensor | None = None) -> Candidates:
    """The k likeliest tokens of each row among ids below ``scorable``, at most ``min(scorable, V)`` of them.

    Tokens with a logit of −inf or NaN never count. ``top_k_B`` narrows single rows below k.
    """
    scorable = min(scorable, logits_BV.shape[-1])
    scorable_logits = logits_BV[:, :scorable]
    finite_logits = scorable_logits.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    top_logits_BK, token_ids_BK = finite_logits.topk(min(k, scorable), dim=-1)
    valid_BK = top_logits_BK > -torch.inf
    if top_k_B is not None:
        rank_K = torch.arange(valid_BK.shape[-1], device=valid_BK.device)
        valid_BK = valid_BK & (rank_K < top_k_B.unsqueeze(-1))
    return Candidates(token_ids_BK, valid_BK)


def likeliest(candidates: Candidates, mass: "ReferenceMass", enough_B: Tensor) -> tuple[Candidates, "ReferenceMass"]:
    """The fewest candidates, the likeliest first, that hold ``enough_B`` > 0 of the reference; all that hold less.

    One is left at least. mass: of these candidates. Returns theirs as well.
    """
    held_BK = mass.candidates_BK.exp()
    before_BK = held_BK.cumsum(-1) - held_BK
    fewer = Candidates(candidates.token_ids_BK, candidates.valid_BK & (before_BK < enough_B.double().unsqueeze(-1)))
    return fewer, mass_and_rest(mass.candidates_BK, fewer)


def qsharp_offsets(distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor) -> Tensor:
    """Q♯: ln E[e^{Z/η}], less v_max/η, in nats, float64 ``[B, K]`` (Theorem 2.2)."""
    return distribution.log_mgf_below_max(logits_BKA.double(), inv_eta_B.double().unsqueeze(-1))


def cd_offsets(distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor) -> Tensor:
    """Controlled decoding: E[Z]/η, less v_max/η, in nats, float64 ``[B, K]``."""
    return (distribution.mean(logits_BKA.double()) - distribution.v_max) * inv_eta_B.double().unsqueeze(-1)


# Mass that a float32 softmax can't tell from none. The guided mass of what isn't a candidate is no larger than the
# reference's, whatever the tail.
ROUNDING = 1e-6

OFFSETS = {"qsharp": qsharp_offsets, "cd": cd_offsets}


def offsets(distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor, method: str) -> Tensor:
    """What the method adds to each candidate's log-probability, less v_max/η: nats ≤ 0, float64 ``[B, K]``.

    Only differences matter; beside v_max/η a large 1/η would round them off.
    """
    return OFFSETS[method](distribution, logits_BKA, inv_eta_B)


def lowest_offset(distribution: ReturnDistribution, inv_eta_B: Tensor) -> Tensor:
    """(v_min − v_max)/η: no offset of either method is below it; nats, float64 ``[B]``."""
    return (distribution.v_min - distribution.v_max) * inv_eta_B.double()


class Drops(NamedTuple):
    """How many nats each token loses to the most valuable of its row, float64 ≥ 0: the candidates ``[B, K]``, all other
    tokens ``[B, 1]``.

    Only differences of offsets matter. Where all are equal nothing drops, and large 1/η costs no precision where the
    mass is.
    """

    candidates_BK: Tensor
    others_B1: Tensor


def drops(mass: "ReferenceMass", scored_BK: Tensor, offsets_BK: Tensor, floor_B: Tensor, tail: str) -> Drops:
    """From the scored candidates' offsets; candidates without a score get what the other tokens get by this ``tail``.

    mass: of these candidates. scored_BK: which valid candidates have an offset in ``offsets_BK``, in nats; the others'
    entries aren't read. floor_B: :func:`lowest_offset`. A row without a score drops nowhere.
    """
    return TAILS[tail](mass, scored_BK, offsets_BK, floor_B)


def _floor_drops(_mass: "ReferenceMass", scored_BK: Tensor, offsets_BK: Tensor, floor_B: Tensor) -> Drops:
    floor_B1 = floor_B.double().unsqueeze(-1)
    offsets_BK = torch.where(scored_BK, offsets_BK.double(), floor_B1)
    largest_B1 = offsets_BK.amax(-1, keepdim=True)
    return Drops(largest_B1 - offsets_BK, largest_B1 - floor_B1)


def _mean_drops(mass: "ReferenceMass", scored_BK: Tensor, offsets_BK: Tensor, _floor_B: Tensor) -> Drops:
    log_mass_BK = mass.candidates_BK.masked_fill(~scored_BK, -torch.inf)
    largest_B1 = offsets_BK.double().masked_fill(~scored_BK, -torch.inf).amax(-1, keepdim=True)
    drops_BK = (largest_B1 - offsets_BK.double()).masked_fill(~scored_BK, 0.0)
    log_total_B1 = log_mass_BK.logsumexp(-1, keepdim=True)
    mean_B1 = log_total_B1 - (log_mass_BK - drops_BK).logsumexp(-1, keepdim=True)
    mean_B1 = mean_B1.masked_fill(~(log_total_B1 > -torch.inf), 0.0)
    # A mean is between the ends, whatever was rounded: between 0 and 0 of a constant value.
    others_B1 = mean_B1.clamp(min=0.0).minimum(drops_BK.amax(-1, keepdim=True))
    return Drops(torch.where(scored_BK, drops_BK, others_B1), others_B1)


TAILS = {"floor": _floor_drops, "mean": _mean_drops}


def tilt_(logits_BV: Tensor, candidates: Candidates, drops: Drops, temperature_B: Tensor) -> None:
    """Tilt in place: softmax(logits/T) is then the guided distribution.

    The most valuable token keeps its logit. (To move the candidates alone would be K writes a row, but a large number
    added to those that matter rounds away their differences.) A row in which nothing drops stays bit-identical. −inf
    and NaN logits stay as they are.
    """
    scale_B1 = scale_of(temperature_B).double().unsqueeze(-1)
    drops_BK = (scale_B1 * drops.candidates_BK).to(logits_BV.dtype)
    # Minus, not plus a negative: a logit of −0 less 0 is −0.
    tilted_BK = logits_BV.gather(-1, candidates.token_ids_BK) - drops_BK
    logits_BV.sub_((scale_B1 * drops.others_B1).to(logits_BV.dtype)).scatter_(-1, candidates.token_ids_BK, tilted_BK)


def scale_of(temperature_B: Tensor) -> Tensor:
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
    scaled_BV = logits_BV / scale_of(temperature_B).to(logits_BV.dtype).unsqueeze(-1)
    scaled_BV.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    return mass_and_rest(scaled_BV.log_softmax(-1).gather(-1, candidates.token_ids_BK).double(), candidates)


def mass_and_rest(log_mass_BK: Tensor, candidates: Candidates) -> ReferenceMass:
    """From what the candidates' masses are, or would be if they were valid."""
    log_mass_BK = log_mass_BK.masked_fill(~candidates.valid_BK, -torch.inf)
    rest_B1 = 1 - log_mass_BK.exp().sum(-1, keepdim=True)
    return ReferenceMass(log_mass_BK, rest_B1.masked_fill(rest_B1 < ROUNDING, 0.0).log())


class Divergence(NamedTuple):
    """What guidance did to a step's distribution at temperature T, before penalties and truncation: float64 ``[B]``.

    kl_B: KL(guided ‖ reference) in nats of the whole vocabulary. kl_candidates_B: the same given that the token is a
    candidate, scored or not. mass_B: the reference's mass in the candidates. With the guided mass g of the candidates,

        kl = g·ln(g/mass) + (1 − g)·ln((1 − g)/(1 − mass)) + g·kl_candidates:

    the first two are what the tail adds, and 0 for ``mean``. Tokens masked in the logits (−inf or NaN) have no mass in
    either distribution, and a row without any other has a KL of 0. (The official code compares a truncated with an
    untruncated distribution, which isn't 0 without guidance.)
    """

    kl_B: Tensor
    kl_candidates_B: Tensor
    mass_B: Tensor


def divergence(mass: ReferenceMass, drops: Drops) -> Tensor:
    """The columns of :class:`Divergence`: ``[B, 3]``. mass: of the same candidates.

    With offsets o = −drops and Z = E_reference[e^o], the KL is E_guided[o − ln Z]: the vocabulary is read once, for the
    reference's normaliser, and all tokens that aren't candidates are one outcome M with the mass that is left. Given a
    candidate, the sums are over the candidates, and the reference is divided by their mass, however small.
    """
    log_mass_B1 = mass.candidates_BK.logsumexp(-1, keepdim=True)
    kl_B = _tilted_kl(torch.cat(mass, dim=-1), torch.cat(drops, dim=-1), torch.zeros_like(log_mass_B1))
    kl_candidates_B = _tilted_kl(mass.candidates_BK, drops.candidates_BK, log_mass_B1)
    return torch.stack([kl_B, kl_candidates_B, log_mass_B1.squeeze(-1).exp().clamp(max=1.0)], dim=-1)


def _tilted_kl(log_mass_BM: Tensor, drops_BM: Tensor, log_total_B1: Tensor) -> Tensor:
    """KL ``[B]`` of p·e^(−drops)/Z to p, p being masses by their total. What has no mass adds nothing; a row without
    any token has a KL of 0.
    """
    log_weight_BM = log_mass_BM - drops_BM
    log_z_B1 = log_weight_BM.logsumexp(-1, keepdim=True)
    terms_BM = (log_weight_BM - log_z_B1).exp() * (log_total_B1 - drops_BM - log_z_B1)
    return terms_BM.masked_fill(log_weight_BM == -torch.inf, 0.0).sum(-1).clamp(min=0.0)

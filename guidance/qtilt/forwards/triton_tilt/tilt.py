"""The functions of :mod:`qtilt.method.tilt` by Triton: one kernel each, or two. Those that read the vocabulary read it
once, and nothing of its size is written but tilted logits. Logits in other numbers than float32 are torch's business.

Shapes: as there, with ``P`` parts of a row.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from qtilt.forwards.triton_tilt import programs
from qtilt.method import tilt as by_torch
from qtilt.method.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.method.tilt import Candidates, Drops, ReferenceMass

__all__ = ["divergence", "drops", "offsets", "reference_mass", "tilt_", "top_candidates"]

BLOCK = 2048
FEWEST = 64
"""Candidates of a program; more than are asked for as a rule."""
TOKEN_BITS = 32
LAST_TOKEN = 2**31 - 1
KEY_OF_NOTHING = -0x7F800001 << TOKEN_BITS
"""A key of any token with a logit of −inf is less than half a token's range above it, of any other more."""


def top_candidates(logits_BV: Tensor, k: int, scorable: int, top_k_B: Tensor | None = None) -> Candidates:
    """See :func:`qtilt.method.tilt.top_candidates`. Of equal logits the first token is taken.

    A key is a logit's bits, turned so that integers compare as the floats do, and below them the token, counted
    backwards: the largest keys of all parts are among the largest ones of each.
    """
    if not _takes(logits_BV):
        return by_torch.top_candidates(logits_BV, k, scorable, top_k_B)
    scorable = min(scorable, logits_BV.shape[-1])
    most = min(k, BLOCK)
    rows, parts = len(logits_BV), triton.cdiv(scorable, BLOCK)
    keys_BX = torch.empty(rows, parts * most, dtype=torch.int64, device=logits_BV.device)
    programs.largest[rows, parts](logits_BV, keys_BX, most, logits_BV.stride(0), scorable, BLOCK=BLOCK)
    top_BK = keys_BX.topk(min(k, scorable), dim=-1).values
    chosen = Candidates(torch.empty_like(top_BK), torch.empty_like(top_BK, dtype=torch.bool))
    programs.choose[(rows,)](
        *(top_BK, top_BK.stride(0), top_BK if top_k_B is None else top_k_B.contiguous()),
        *(*chosen, top_BK.shape[1], KEY_OF_NOTHING + LAST_TOKEN),
        HAS_TOP_KS=top_k_B is not None,
        BLOCK_K=_padded(top_BK.shape[1]),
    )
    return chosen


def reference_mass(logits_BV: Tensor, candidates: Candidates, temperature_B: Tensor) -> ReferenceMass:
    """See :func:`qtilt.method.tilt.reference_mass`."""
    if not _takes(logits_BV):
        return by_torch.reference_mass(logits_BV, candidates, temperature_B)
    rows, parts = len(logits_BV), triton.cdiv(logits_BV.shape[-1], BLOCK)
    scale_B = by_torch.scale_of(temperature_B).float()
    largest_BP, sum_BP = torch.empty(2, rows, parts, dtype=torch.float32, device=logits_BV.device).unbind(0)
    programs.log_sum_exp[rows, parts](
        logits_BV, scale_B, largest_BP, sum_BP, logits_BV.stride(0), logits_BV.shape[-1], BLOCK=BLOCK
    )
    size = candidates.token_ids_BK.shape[1]
    mass = ReferenceMass(*_float64(logits_BV.device, (rows, size), (rows, 1)))
    programs.masses[(rows,)](
        *(logits_BV, logits_BV.stride(0), candidates.token_ids_BK.contiguous(), candidates.valid_BK.contiguous()),
        *(scale_B, largest_BP, sum_BP, *mass, size, parts, by_torch.ROUNDING),
        BLOCK_K=_padded(size),
        BLOCK_P=triton.next_power_of_2(parts),
    )
    return mass


def offsets(distribution: ReturnDistribution, logits_BKA: Tensor, inv_eta_B: Tensor, method: str) -> Tensor:
    """See :func:`qtilt.method.tilt.offsets`."""
    if not isinstance(distribution, Bernoulli | Categorical):
        return by_torch.offsets(distribution, logits_BKA, inv_eta_B, method)
    rows, size, _ = logits_BKA.shape
    (offsets_BK,) = _float64(logits_BKA.device, (rows, size))
    returns_A = _returns_below_max(distribution, logits_BKA.device)
    programs.offsets[(rows,)](
        *(logits_BKA.contiguous(), returns_A, inv_eta_B.double().contiguous(), offsets_BK, size, len(returns_A)),
        FIRST_IS_ZERO=int(isinstance(distribution, Bernoulli)),
        IS_MEAN=method == "cd",
        BLOCK_K=_padded(size),
    )
    return offsets_BK


def drops(mass: ReferenceMass, scored_BK: Tensor, offsets_BK: Tensor, floor_B: Tensor, tail: str) -> Drops:
    """See :func:`qtilt.method.tilt.drops`."""
    rows, size = offsets_BK.shape
    dropped = Drops(*_float64(offsets_BK.device, (rows, size), (rows, 1)))
    programs.drops[(rows,)](
        *(mass.candidates_BK.contiguous(), scored_BK.contiguous(), offsets_BK.double().contiguous()),
        *(floor_B.double().contiguous(), *dropped, size),
        IS_MEAN=tail == "mean",
        BLOCK_K=_padded(size),
    )
    return dropped


def divergence(mass: ReferenceMass, drops: Drops) -> Tensor:
    """See :func:`qtilt.method.tilt.divergence`."""
    rows, size = drops.candidates_BK.shape
    (divergence_B3,) = _float64(drops.candidates_BK.device, (rows, 3))
    programs.divergence[(rows,)](
        *(each.contiguous() for each in (*mass, *drops)), divergence_B3, size, BLOCK_K=_padded(size)
    )
    return divergence_B3


def tilt_(logits_BV: Tensor, candidates: Candidates, drops: Drops, temperature_B: Tensor) -> None:
    """See :func:`qtilt.method.tilt.tilt_`."""
    if not _takes(logits_BV):
        by_torch.tilt_(logits_BV, candidates, drops, temperature_B)
        return
    rows, size = drops.candidates_BK.shape
    programs.lower[rows, triton.cdiv(logits_BV.shape[-1], BLOCK)](
        *(logits_BV, logits_BV.stride(0), logits_BV.shape[-1], candidates.token_ids_BK.contiguous()),
        *(*(each.contiguous() for each in drops), by_torch.scale_of(temperature_B).contiguous(), size),
        BLOCK=BLOCK,
        BLOCK_K=_padded(size),
    )


def _padded(candidates: int) -> int:
    """Few sizes: programs are compiled for each when it is first met, the first of them at load."""
    return max(int(triton.next_power_of_2(candidates)), FEWEST)


def _takes(logits_BV: Tensor) -> bool:
    return logits_BV.dtype == torch.float32 and logits_BV.stride(-1) == 1


def _float64(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.float64, device=device) for shape in shapes]


@cache
def _returns_below_max(distribution: Bernoulli | Categorical, device: torch.device) -> Tensor:
    """z − v_max of all atoms ``[A]``, on the device for good: captured steps read them there."""
    if isinstance(distribution, Bernoulli):
        return torch.tensor([-1.0, 0.0], dtype=torch.float64, device=device)
    return distribution.atom_values(like=torch.empty(0, dtype=torch.float64, device=device)) - distribution.high

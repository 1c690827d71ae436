"""The functions of :mod:`qtilt.method.tilt` that read the vocabulary, by Triton: once each, and nothing of its size is
written in between. What remains is torch's, as it is for logits in other numbers than float32.

Shapes: as there, with ``P`` parts of a row.
"""

import torch
import triton
from torch import Tensor

from qtilt.forwards.triton_tilt import programs
from qtilt.method import tilt as by_torch
from qtilt.method.tilt import Candidates, ReferenceMass, divergence, drops, tilt_

__all__ = ["divergence", "drops", "reference_mass", "tilt_", "top_candidates"]

BLOCK = 2048
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
    valid_BK = top_BK > KEY_OF_NOTHING + LAST_TOKEN
    if top_k_B is not None:
        rank_K = torch.arange(valid_BK.shape[-1], device=valid_BK.device)
        valid_BK = valid_BK & (rank_K < top_k_B.unsqueeze(-1))
    return Candidates(LAST_TOKEN - (top_BK & LAST_TOKEN), valid_BK)


def reference_mass(logits_BV: Tensor, candidates: Candidates, temperature_B: Tensor) -> ReferenceMass:
    """See :func:`qtilt.method.tilt.reference_mass`."""
    if not _takes(logits_BV):
        return by_torch.reference_mass(logits_BV, candidates, temperature_B)
    rows, parts = len(logits_BV), triton.cdiv(logits_BV.shape[-1], BLOCK)
    scale_B1 = by_torch.scale_of(temperature_B).float().unsqueeze(-1)
    largest_BP, sum_BP = torch.empty(2, rows, parts, dtype=torch.float32, device=logits_BV.device).unbind(0)
    programs.log_sum_exp[rows, parts](
        logits_BV, scale_B1, largest_BP, sum_BP, logits_BV.stride(0), logits_BV.shape[-1], BLOCK=BLOCK
    )
    log_parts_BP = largest_BP.double() / scale_B1 + sum_BP.double().log()
    log_total_B1 = log_parts_BP.logsumexp(-1, keepdim=True)
    log_mass_BK = logits_BV.gather(-1, candidates.token_ids_BK).double() / scale_B1 - log_total_B1
    return by_torch.mass_and_rest(log_mass_BK, candidates)


def _takes(logits_BV: Tensor) -> bool:
    return logits_BV.dtype == torch.float32 and logits_BV.stride(-1) == 1

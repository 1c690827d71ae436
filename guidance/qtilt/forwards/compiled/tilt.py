"""The functions of :mod:`qtilt.method.tilt` in C++ (tilt.h). The library must have been loaded (library.py).

Rows that the library doesn't compute with, of other numbers than float32 say, go to torch.
"""

import torch
from torch import Tensor

from qtilt.forwards.compiled import library
from qtilt.method import tilt as by_torch
from qtilt.method.tilt import Candidates, Drops, ReferenceMass, offsets

__all__ = ["divergence", "drops", "offsets", "reference_mass", "tilt_", "top_candidates"]


def top_candidates(logits_BV: Tensor, k: int, scorable: int, top_k_B: Tensor | None = None) -> Candidates:
    """See :func:`qtilt.method.tilt.top_candidates`."""
    if not library.takes(logits_BV):
        return by_torch.top_candidates(logits_BV, k, scorable, top_k_B)
    return Candidates(*torch.ops.qtilt.top_candidates(logits_BV, k, scorable, top_k_B))


def reference_mass(logits_BV: Tensor, candidates: Candidates, temperature_B: Tensor) -> ReferenceMass:
    """See :func:`qtilt.method.tilt.reference_mass`."""
    if not library.takes(logits_BV):
        return by_torch.reference_mass(logits_BV, candidates, temperature_B)
    return ReferenceMass(*torch.ops.qtilt.reference_mass(logits_BV, *candidates, temperature_B))


def drops(mass: ReferenceMass, scored_BK: Tensor, offsets_BK: Tensor, floor_B: Tensor, tail: str) -> Drops:
    """See :func:`qtilt.method.tilt.drops`."""
    return Drops(*torch.ops.qtilt.drops(mass.candidates_BK, scored_BK, offsets_BK, floor_B, tail == "mean"))


def tilt_(logits_BV: Tensor, candidates: Candidates, drops: Drops, temperature_B: Tensor) -> None:
    """See :func:`qtilt.method.tilt.tilt_`."""
    if library.takes(logits_BV):
        torch.ops.qtilt.tilt_(logits_BV, candidates.token_ids_BK, *drops, temperature_B)
    else:
        by_torch.tilt_(logits_BV, candidates, drops, temperature_B)


def divergence(mass: ReferenceMass, drops: Drops) -> Tensor:
    """See :func:`qtilt.method.tilt.divergence`."""
    divergence_B3: Tensor = torch.ops.qtilt.divergence(*mass, *drops)
    return divergence_B3

"""Did the value model give numbers? Computed on the device in the step, looked at on the host when it has come over.

Shapes: ``G`` rows of one value-model version, ``K`` candidates, ``A`` logits of one return distribution.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

RowT = TypeVar("RowT")


def finite_rows(values_GKA: Tensor, offsets_GK: Tensor, valid_GK: Tensor) -> Tensor:
    """Whether values and offsets of all that count among a row's candidates are finite: bool ``[G]``.

    The tilted logits of a finite row are numbers wherever the reference's are: they are a finite logit plus an offset
    that is at most 0. Masks of the reference (−inf or NaN logits) aren't candidates and don't count.
    """
    # A sum, in float64, is finite where all that it adds up is.
    finite_GK = (values_GKA.sum(-1, dtype=torch.float64) + offsets_GK).abs() < torch.inf
    return (finite_GK | ~valid_GK).all(-1)


class FiniteCheck(Generic[RowT]):
    """The verdict on the rows of one step, without a synchronisation of host and device.

    rows: what the verdict is about, with the number of tokens generated before the step. finite_G: on any device.
    """

    def __init__(self, rows: Sequence[tuple[RowT, int]], finite_G: Tensor) -> None:
        self._rows = rows
        self._finite_G = finite_G.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if finite_G.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def has_arrived(self) -> bool:
        """Whether :meth:`failed` answers without waiting."""
        return self._copied is None or self._copied.query()

    def failed(self) -> list[tuple[RowT, int]]:
        """The rows that weren't finite, in order."""
        if self._copied is not None:
            self._copied.synchronize()
        return [row for row, finite in zip(self._rows, self._finite_G.tolist(), strict=True) if not finite]

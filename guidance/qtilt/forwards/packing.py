"""Spans and last tokens of running histories → one packed step ``[T]``, which a forward runs (interface.py).

Shapes: ``C`` tokens of a span, ``N`` tokens of all spans, ``B`` rows (histories to score), ``K`` candidates a row at
most, ``R = 1 + K`` tail tokens of a row at most, ``X`` tail tokens of all rows, ``T = N + X`` packed tokens.

A row's *tail* is its last token and its candidates: they all see exactly the row's history, so the tails of many rows
are one batched attention. What a row's cache lacks before its last token is a *span*: ordinary causal attention, row by
row. Which tokens these are is on the device; only the sizes, and where spans begin, must be known on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.arrays import IntArray, copy_to_device
from qtilt.forwards.memory import PageMemory


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens ``[C]`` of one history, the first of them at position ``start``."""

    slot: int
    start: int
    token_ids_C: Tensor

    @property
    def end(self) -> int:
        """The history's length once the span is cached."""
        return self.start + len(self.token_ids_C)


@dataclass(frozen=True, slots=True)
class LastTokens:
    """The last token of each history to score: int64 ``[B]`` each, on the cache's device.

    longest: at least the length of the longest of these histories; what is read beyond a history's own end is idle.
    has_drafts: some of them may not come true, and one slot may have several, each the next one's history.
    """

    slots_B: Tensor
    positions_B: Tensor
    token_ids_B: Tensor
    longest: int
    has_drafts: bool = False


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The tokens of one packed forward ``[T]``: those of the spans, then the tails of the rows to score.

    tails_B: on the host, how many tokens each row's tail has; ``most`` is R. places_X: on the device, where the tail
    tokens are among ``B·R`` places, R of each row; None when all places are taken.
    """

    memory: PageMemory
    input_ids_T: Tensor
    position_ids_T: Tensor
    spans: Sequence[Span]
    last: LastTokens | None
    tails_B: IntArray
    most: int
    places_X: Tensor | None

    @property
    def span_tokens(self) -> int:
        """N."""
        return sum(len(span.token_ids_C) for span in self.spans)

    def by_row(self, packed_X: Tensor) -> Tensor:
        """What there is of each tail token, as ``[B, R, …]``: zeros where a row has fewer tokens."""
        rows = len(self.tails_B)
        if self.places_X is not None:
            packed_X = packed_X.new_zeros(rows * self.most, *packed_X.shape[1:]).index_copy_(0, self.places_X, packed_X)
        rows_BR: Tensor = packed_X.unflatten(0, (rows, -1))
        return rows_BR


def pack(
    memory: PageMemory,
    spans: Sequence[Span],
    last: LastTokens | None = None,
    candidates_BK: Tensor | None = None,
    counts_B: IntArray | None = None,
) -> PackedStep:
    """Lay out one forward that caches ``spans`` and the last tokens, and scores ``candidates_BK`` after these.

    counts_B: how many of each row's candidates, its first; None: all. At least one token in all. Nothing waits for the
    device.
    """
    device = memory.geometry.device
    positions = [torch.arange(span.start, span.end, device=device) for span in spans]
    input_ids = [span.token_ids_C for span in spans]
    tails_B, most, places_X = np.empty(0, dtype=np.int64), 0, None
    if last is not None:
        tail_ids_BR, tail_positions_BR = last.token_ids_B.unsqueeze(1), last.positions_B.unsqueeze(1)
        if candidates_BK is not None:
            tail_ids_BR = torch.cat([tail_ids_BR, candidates_BK], dim=1)
            after_BK = (tail_positions_BR + 1).expand_as(candidates_BK)
            tail_positions_BR = torch.cat([tail_positions_BR, after_BK], dim=1)
        tail_ids_X, tail_positions_X = tail_ids_BR.flatten(), tail_positions_BR.flatten()
        rows, most = tail_ids_BR.shape
        tails_B = np.full(rows, most, dtype=np.int64) if counts_B is None else 1 + counts_B
        if (tails_B < most).any():
            (places_X,) = copy_to_device(device, np.flatnonzero(np.arange(most) < tails_B[:, None]))
            tail_ids_X, tail_positions_X = tail_ids_X[places_X], tail_positions_X[places_X]
        input_ids.append(tail_ids_X)
        positions.append(tail_positions_X)
    return PackedStep(memory, torch.cat(input_ids), torch.cat(positions), spans, last, tails_B, most, places_X)

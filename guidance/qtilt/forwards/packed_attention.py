"""Attention of packed, ragged rows on CPUs: what transformers and fused forwards do there in each layer.

Shapes: ``T`` packed tokens (see packing.py), ``X`` of them of tails; ``C`` tokens of a span that ends at position
``E``; ``B`` rows with ``R = 1 + K`` tail tokens each, where they are padded; ``W`` rows of one attention call, ``P``
cached positions it reads; ``H`` query heads, ``G`` key/value heads, ``D`` head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtilt.forwards.attention import attend_prefix, attend_span, merge_own_
from qtilt.forwards.memory import PageMemory
from qtilt.forwards.packing import LastTokens, PackedStep, Span

# Idle key/value elements of a layer that are read as fast as one more attention call is made.
IDLE_ELEMENTS = 2**15
# Most key elements of a layer that one attention call copies, and as many of the values, unless one row has more.
COPIED_ELEMENTS = 2**25


@dataclass(frozen=True, slots=True)
class TailRows:
    """Rows whose tails are one attention call: neighbours in the step and, when ``slots`` is a slice, in the cache.

    mask_W11P: None when all these histories are ``length`` tokens long.
    """

    rows: slice
    slots: slice | Tensor
    length: int
    mask_W11P: Tensor | None


class PackedAttention:
    """See :class:`qtilt.forwards.interface.StepAttention`."""

    def __init__(self, step: PackedStep) -> None:
        device = step.memory.geometry.device
        self.step, self.memory, self.spans, self.last = step, step.memory, step.spans, step.last
        self.visible_by_span = [_visible(span, device) for span in step.spans]
        self.tail_rows = [] if step.last is None else _tail_rows(step.memory, step.last)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        extras: dict[str, Any],
        *,
        tails_only: bool = False,
    ) -> Tensor:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        query_THD, key_TGD, value_TGD = (packed[0].transpose(0, 1) for packed in (query, key, value))
        outs, first = [query_THD[:0]], 0  # with tails_only and no tails, that is all
        for span, visible_CE in zip(self.spans, self.visible_by_span, strict=True):
            part = slice(first, first + len(span.token_ids_C))
            self.memory.write_span(layer, span.slot, span.start, key_TGD[part], value_TGD[part])
            first = part.stop
            if tails_only:
                continue
            key_1GED, value_1GED = self.memory.read(layer, slice(span.slot, span.slot + 1), span.end)
            out_1HCD = attend_span(query[:, :, part], key_1GED, value_1GED, visible_CE, scaling)
            outs.append(out_1HCD[0].transpose(0, 1))
        if self.last is not None:
            query_BRHD, key_BRGD, value_BRGD = (
                self.step.by_row(packed[first:]) for packed in (query_THD, key_TGD, value_TGD)
            )
            out_XHD = self._attend_tails(layer, query_BRHD, key_BRGD, value_BRGD, scaling).flatten(0, 1)
            outs.append(out_XHD if self.step.places_X is None else out_XHD[self.step.places_X])
        out_THD = outs[-1] if len(outs) <= 2 else torch.cat(outs)
        return out_THD.unsqueeze(0)

    def _attend_tails(
        self, layer: int, query_BRHD: Tensor, key_BRGD: Tensor, value_BRGD: Tensor, scaling: float
    ) -> Tensor:
        """The tails' attention ``[B, R, H, D]``."""
        assert self.last is not None
        last_key_BGD, last_value_BGD, spoilt_B = key_BRGD[:, 0], value_BRGD[:, 0], None
        if self.last.has_drafts:
            last_key_BGD, last_value_BGD, spoilt_B = only_numbers(last_key_BGD, last_value_BGD)
        self.memory.write_last(layer, self.last.slots_B, self.last.positions_B, last_key_BGD, last_value_BGD)
        kv_heads, tail = key_BRGD.shape[2:0:-1]
        # A key/value head's queries are one matrix: its keys are read once for all of them.
        query_BGQD = query_BRHD.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
        parts = [
            attend_prefix(
                query_BGQD[tails.rows], *self.memory.read(layer, tails.slots, tails.length), tails.mask_W11P, scaling
            )
            for tails in self.tail_rows
        ]
        out_BGQD, lse_BGQ = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
        out_BRHD: Tensor = out_BGQD.unflatten(2, (tail, -1)).transpose(1, 2).flatten(2, 3)
        if tail > 1:
            lse_BRH = lse_BGQ.unflatten(2, (tail, -1)).transpose(1, 2).flatten(2, 3)
            own = (slice(None), slice(1, None))
            merge_own_(out_BRHD[own], lse_BRH[own], query_BRHD[own], key_BRGD[own], value_BRGD[own], scaling)
        if spoilt_B is not None:
            out_BRHD = out_BRHD + spoilt_B[:, None, None, None]
        return out_BRHD


def only_numbers(key_BGD: Tensor, value_BGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with 0 for what isn't a finite number, and per row NaN if it had such, else 0.

    A reader multiplies the positions beyond its own by a weight of 0, and 0·NaN is NaN: so what a draft would write
    that isn't finite would fail the tokens before it, although it needn't come true. It fails its own row instead. The
    rows after it read zeros, but if they come true, so has the one that failed.
    """
    spoilt_B = (key_BGD * 0 + value_BGD * 0).sum((1, 2))
    key_BGD, value_BGD = (torch.nan_to_num(each, nan=0.0, posinf=0.0, neginf=0.0) for each in (key_BGD, value_BGD))
    return key_BGD, value_BGD, spoilt_B


def _visible(span: Span, device: torch.device) -> Tensor | None:
    """Which positions ``[C, E]`` each token of a span sees; None for plain causal attention."""
    if span.start == 0:
        return None
    ones_CE = torch.ones(len(span.token_ids_C), span.end, dtype=torch.bool, device=device)
    return ones_CE.tril(diagonal=span.start)


def _tail_rows(memory: PageMemory, last: LastTokens) -> list[TailRows]:
    """How the tails are divided into attention calls.

    Copying keys costs more than attending to them, so rows are taken together only where their slots are neighbours and
    their lengths similar, and the cache is read in place. Where slots are in many pages a call reads a copy, of all
    rows if that isn't too much memory.
    """
    lengths_B = last.positions_B + 1
    elements = memory.geometry.kv_heads * memory.geometry.head_size
    if not memory.in_one_piece:
        together = max(COPIED_ELEMENTS // (elements * last.longest), 1)
        parts = [slice(first, first + together) for first in range(0, len(lengths_B), together)]
        mask_B11P = prefix_mask(lengths_B, last.longest, memory)
        return [TailRows(part, last.slots_B[part], last.longest, mask_B11P[part]) for part in parts]
    slots, lengths = last.slots_B.tolist(), lengths_B.tolist()
    max_idle = IDLE_ELEMENTS // elements
    tails = []
    for rows in _neighbours(slots, lengths, max_idle):
        longest = max(lengths[rows])
        mask_W11P = prefix_mask(lengths_B[rows], longest, memory) if min(lengths[rows]) < longest else None
        slot_slice = slice(slots[rows.start], slots[rows.start] + rows.stop - rows.start)
        tails.append(TailRows(rows, slot_slice, longest, mask_W11P))
    return tails


def _neighbours(slots: Sequence[int], lengths: Sequence[int], max_idle: int) -> list[slice]:
    """Cut rows where the next slot isn't the neighbour, or padding to the longest would idle over ``max_idle`` tokens.

    >>> _neighbours([2, 3, 4, 7], [5, 6, 90, 6], max_idle=40)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    cuts, first, longest, total = [], 0, lengths[0], lengths[0]
    for row in range(1, len(slots)):
        longest, total = max(longest, lengths[row]), total + lengths[row]
        idle = (row + 1 - first) * longest - total
        if slots[row] != slots[row - 1] + 1 or idle > max_idle:
            cuts.append(slice(first, row))
            first, longest, total = row, lengths[row], lengths[row]
    return [*cuts, slice(first, len(slots))]


def prefix_mask(lengths_W: Tensor, longest: int, memory: PageMemory) -> Tensor:
    """Additive mask ``[W, 1, 1, longest]``: 0 at a row's first ``lengths_W`` positions, −inf after them."""
    hidden_WP = torch.arange(longest, device=lengths_W.device) >= lengths_W.unsqueeze(1)
    mask_WP = torch.zeros(hidden_WP.shape, dtype=memory.geometry.dtype, device=lengths_W.device)
    return mask_WP.masked_fill_(hidden_WP, -torch.inf)[:, None, None]

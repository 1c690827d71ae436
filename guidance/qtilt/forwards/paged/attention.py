"""Attention of a packed step over pages in place: two or three kernels a layer, and two for spans, however many rows.

Shapes: ``T`` packed tokens (see packing.py), ``X`` of them of tails; ``W`` rows of one call, ``M`` pages of a row;
``H`` query heads and ``G`` key/value heads of size ``D``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtilt.forwards.arrays import copy_to_device
from qtilt.forwards.memory import PageMemory
from qtilt.forwards.packing import LastTokens, PackedStep, Span
from qtilt.forwards.paged.kernels import LayerPages, PagedKernels, Rows


class PagedAttention:
    """See :class:`qtilt.forwards.interface.StepAttention`."""

    def __init__(self, step: PackedStep, kernels: PagedKernels) -> None:
        self._kernels, self._memory = kernels, step.memory
        self._span_tokens = step.span_tokens
        self._spans = _span_rows(step.memory, step.spans) if step.spans else None
        self._tails = _tail_rows(step, step.last) if step.last is not None else None

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
        pages = LayerPages(*(content_LNGPD[layer] for content_LNGPD in self._memory.content))
        packed_THD, key_TGD, value_TGD = (packed[0].transpose(0, 1) for packed in (query, key, value))
        spans, tails = slice(0, self._span_tokens), slice(self._span_tokens, None)
        own = key_TGD[tails], value_TGD[tails]
        # All that is new is stored before anything is read: a tail sees the span before it.
        if self._spans is not None:
            self._kernels.store_spans(key_TGD[spans], value_TGD[spans], pages, self._spans)
        if self._tails is not None:
            self._kernels.store_tails(*own, pages, self._tails)
        out_THD = torch.empty_like(
            packed_THD[tails if tails_only else slice(None)], memory_format=torch.contiguous_format
        )
        if self._spans is not None and not tails_only:
            self._kernels.attend_spans(out_THD[spans], packed_THD[spans], pages, self._spans, scaling)
        if self._tails is not None:
            out_XHD = out_THD if tails_only else out_THD[tails]
            self._kernels.attend_tails(out_XHD, packed_THD[tails], own, pages, self._tails, scaling)
        return out_THD.unsqueeze(0)


def _span_rows(memory: PageMemory, spans: Sequence[Span]) -> Rows:
    counts = [len(span.token_ids_C) for span in spans]
    longest = max(span.end for span in spans)
    slots_W, ends_W, starts_Y = copy_to_device(
        memory.geometry.device,
        *(
            np.array(column, dtype=np.int32)
            for column in ([span.slot for span in spans], [span.end for span in spans], np.cumsum([0, *counts]))
        ),
    )
    return Rows(_pages(memory, slots_W, longest), ends_W, starts_Y, max(counts), longest)


def _tail_rows(step: PackedStep, last: LastTokens) -> Rows:
    memory, most = step.memory, int(step.tails_B.max())
    if step.places_X is None:  # all are as long: nothing comes from the host
        end = len(step.tails_B) * most
        starts_Y = torch.arange(0, end + 1, most, dtype=torch.int32, device=memory.geometry.device)
    else:
        (starts_Y,) = copy_to_device(memory.geometry.device, np.cumsum([0, *step.tails_B], dtype=np.int32))
    lengths_W = (last.positions_B + 1).int()
    pages_WM = _pages(memory, last.slots_B, last.longest)
    return Rows(pages_WM, lengths_W, starts_Y, most, last.longest, last.has_drafts)


def _pages(memory: PageMemory, slots_W: Tensor, longest: int) -> Tensor:
    """int32 ``[W, M]``, as far as the longest of these histories reaches, and a page more: kernels may look ahead."""
    return memory.table_SM[slots_W, : math.ceil(longest / memory.page_size) + 1].int()

"""Rows of a step → one packed forward ``[1, T]`` over the value model's backbone.

Shapes: ``B`` rows, ``K`` candidates a row, ``N`` new tokens of all rows, ``T = N + B·K`` packed tokens (new tokens row
by row, then the candidates row by row); ``W`` cache rows in the window, ``R`` tail queries of a row, ``P`` cached
positions read; ``H`` query heads, ``G`` key/value heads, ``D`` head size.

A row's *tail* is its last new token and its candidates. They all see exactly the row's history, so the tails of all
rows are one batched attention over a window of slots. The other new tokens of a row that catches up are its *span*:
ordinary causal attention, row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtilt.attention import attend_prefix, attend_span, merge_own
from qtilt.kv_cache import KVCache

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """One history in a step: its slot, how many tokens of it the cache holds, and the tokens it lacks."""

    slot: int
    start: int
    new_token_ids: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens in the history once the new ones are cached."""
        return self.start + len(self.new_token_ids)


@dataclass(frozen=True, slots=True)
class Span:
    """A row's new tokens before its last: ``count`` packed tokens from ``first`` on, at positions from ``start`` on."""

    slot: int
    first: int
    count: int
    start: int
    visible_CE: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The device tensors of one packed forward, and what its attention layers do with them."""

    cache: KVCache
    new_tokens: int
    input_ids_T: Tensor
    position_ids_T: Tensor
    slots_N: Tensor
    slots_B: Tensor
    last_B: Tensor
    window: slice | Tensor
    prefix_length: int
    prefix_mask_W11P: Tensor
    tail_WR: Tensor
    tail_of_T: Tensor
    no_prefix_T: Tensor | None
    spans: Sequence[Span]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, extras: dict[str, Any]
    ) -> Tensor:
        """Cache the new tokens' keys and values, then attend: ``[1, T, H, D]``. See :class:`AttentionStep`."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        new = self.new_tokens
        query_THD, key_TGD, value_TGD = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        if new:
            self.cache.write(layer, self.slots_N, self.position_ids_T[:new], key_TGD[:new], value_TGD[:new])
        out_THD, lse_TH = self._attend_tails(layer, query_THD, scaling)
        for span in self.spans:
            out_THD[span.first : span.first + span.count] = self._attend_span(layer, span, query, scaling)
        if new < len(out_THD):
            out_THD[new:] = merge_own(
                out_THD[new:], lse_TH[new:], query_THD[new:], key_TGD[new:], value_TGD[new:], scaling
            )
        return out_THD.unsqueeze(0)

    def _attend_tails(self, layer: int, query_THD: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention of every tail query over its row's history; the entries of span tokens mean nothing."""
        window_rows, tail = self.tail_WR.shape
        key_WGPD, value_WGPD = self.cache.read(layer, self.window, self.prefix_length)
        kv_heads = key_WGPD.shape[1]
        heads = (kv_heads, query_THD.shape[1] // kv_heads)
        # A key/value head's queries are one matrix: its keys are read once for all of them.
        query_WGQD = query_THD[self.tail_WR].unflatten(2, heads).transpose(1, 2).flatten(2, 3)
        out_WGQD, lse_WGQ = attend_prefix(query_WGQD, key_WGPD, value_WGPD, self.prefix_mask_W11P, scaling)
        out_XHD = out_WGQD.unflatten(2, (tail, -1)).transpose(1, 2).reshape(window_rows * tail, -1, out_WGQD.shape[-1])
        lse_XH = lse_WGQ.unflatten(2, (tail, -1)).transpose(1, 2).reshape(window_rows * tail, -1)
        lse_TH = lse_XH[self.tail_of_T]
        if self.no_prefix_T is not None:
            lse_TH.masked_fill_(self.no_prefix_T.unsqueeze(-1), -torch.inf)
        return out_XHD[self.tail_of_T], lse_TH

    def _attend_span(self, layer: int, span: Span, query_1HTD: Tensor, scaling: float) -> Tensor:
        """Causal attention of a row's tokens before its last: ``[C, H, D]``."""
        slot = slice(span.slot, span.slot + 1)
        key_1GED, value_1GED = self.cache.read(layer, slot, span.start + span.count)
        query_1HCD = query_1HTD[:, :, span.first : span.first + span.count]
        return attend_span(query_1HCD, key_1GED, value_1GED, span.visible_CE, scaling)[0].transpose(0, 1)


def pack(cache: KVCache, rows: Sequence[Row], candidates_BK: Tensor | None) -> PackedStep:
    """Lay out one forward over ``rows`` (distinct slots, at least one packed token in all).

    ``candidates_BK`` are tokens to score after each history (on the cache's device), or None to extend caches only.
    Everything else is computed on the host and copied to the device at once, without a synchronisation.
    """
    device = cache.geometry.device
    slots_B = np.array([row.slot for row in rows], dtype=np.int64)
    starts_B = np.array([row.start for row in rows], dtype=np.int64)
    counts_B = np.array([len(row.new_token_ids) for row in rows], dtype=np.int64)
    lengths_B = starts_B + counts_B
    new_ids_N = np.fromiter(chain.from_iterable(row.new_token_ids for row in rows), dtype=np.int64)
    columns = 0 if candidates_BK is None else candidates_BK.shape[1]

    first_B = np.cumsum(counts_B) - counts_B
    row_of_N = np.repeat(np.arange(len(rows)), counts_B)
    positions_N = np.arange(len(new_ids_N)) + (starts_B - first_B)[row_of_N]
    positions_T = np.concatenate([positions_N, np.repeat(lengths_B, columns)])
    window, window_row_B, window_rows = _window(slots_B)
    prefix_lengths_W = np.ones(window_rows, dtype=np.int64)  # at least one position: a softmax over none is NaN
    prefix_lengths_W[window_row_B] = np.maximum(lengths_B, 1)
    tail_WR, tail_of_T = _tails(first_B, counts_B, window_row_B, window_rows, columns)

    on_device = copy_to_device(
        device,
        new_ids=new_ids_N,
        positions=positions_T,
        slots=slots_B[row_of_N],
        row_slots=slots_B,
        last=first_B + counts_B - 1,
        prefix_lengths=prefix_lengths_W,
        tails=tail_WR,
        tail_of=tail_of_T,
        no_prefix=np.repeat(lengths_B == 0, columns).astype(np.int64),
    )
    prefix_length = int(prefix_lengths_W.max())
    new_ids = on_device["new_ids"]
    return PackedStep(
        cache=cache,
        new_tokens=len(new_ids_N),
        input_ids_T=new_ids if candidates_BK is None else torch.cat([new_ids, candidates_BK.flatten()]),
        position_ids_T=on_device["positions"],
        slots_N=on_device["slots"],
        slots_B=on_device["row_slots"],
        last_B=on_device["last"],
        window=on_device["row_slots"] if window is None else window,
        prefix_length=prefix_length,
        prefix_mask_W11P=_prefix_mask(on_device["prefix_lengths"], prefix_length, cache.geometry.dtype),
        tail_WR=on_device["tails"],
        tail_of_T=on_device["tail_of"],
        no_prefix_T=_no_prefix(on_device["no_prefix"], len(new_ids_N)) if (lengths_B == 0).any() else None,
        spans=_spans(rows, first_B, device),
    )


def _window(slots_B: Ints) -> tuple[slice | None, Ints, int]:
    """The cache rows a step reads: a slice if the slots are dense (None: gather them), each row's place, their number.

    Computing a few idle rows is cheaper than copying the keys and values of all.
    """
    low, high = int(slots_B.min()), int(slots_B.max()) + 1
    if high - low <= 2 * len(slots_B):
        return slice(low, high), slots_B - low, high - low
    return None, np.arange(len(slots_B)), len(slots_B)


def _tails(first_B: Ints, counts_B: Ints, window_row_B: Ints, window_rows: int, columns: int) -> tuple[Ints, Ints]:
    """Which packed token each tail query is ``[W, R]``, and which (flat) tail query each packed token is ``[T]``.

    Column 0 is the last new token, then the candidates. Where there is no such token the first packed one stands in
    and its result is not read.
    """
    new = int(counts_B.sum())
    has_last = counts_B > 0
    last = (first_B + counts_B - 1)[has_last]
    tail_WR = np.zeros((window_rows, 1 + columns), dtype=np.int64)
    tail_WR[window_row_B[has_last], 0] = last
    tail_WR[window_row_B, 1:] = new + np.arange(len(first_B) * columns).reshape(len(first_B), columns)
    tail_of_T = np.zeros(new + len(first_B) * columns, dtype=np.int64)
    tail_of_T[last] = window_row_B[has_last] * (1 + columns)
    tail_of_T[new:] = (window_row_B[:, None] * (1 + columns) + 1 + np.arange(columns)).reshape(-1)
    return tail_WR, tail_of_T


def _spans(rows: Sequence[Row], first_B: Ints, device: torch.device) -> list[Span]:
    """The catch-up spans of rows with more than one new token."""
    spans = []
    for row, first in zip(rows, first_B.tolist(), strict=True):
        count = len(row.new_token_ids) - 1
        if count > 0:
            visible_CE = None
            if row.start:
                ones_CE = torch.ones(count, row.start + count, dtype=torch.bool, device=device)
                visible_CE = ones_CE.tril(diagonal=row.start)
            spans.append(Span(row.slot, first, count, row.start, visible_CE))
    return spans


def _prefix_mask(lengths_W: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[W, 1, 1, length]``: 0 at a row's first ``lengths_W`` positions, −inf after them."""
    hidden_WP = torch.arange(length, device=lengths_W.device) >= lengths_W.unsqueeze(1)
    mask_WP = torch.zeros(hidden_WP.shape, dtype=dtype, device=lengths_W.device).masked_fill_(hidden_WP, -torch.inf)
    return mask_WP[:, None, None]


def _no_prefix(no_prefix_M: Tensor, new_tokens: int) -> Tensor:
    """True for packed tokens without any history: a candidate that starts its row sees itself only."""
    return torch.cat([no_prefix_M.new_zeros(new_tokens), no_prefix_M]).bool()


def copy_to_device(device: torch.device, **arrays: Ints) -> dict[str, Tensor]:
    """Copy integer arrays to the device as one transfer, keeping names and shapes."""
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays.values()]))
    flat = flat.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flat.to(device)
    parts = flat.split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}

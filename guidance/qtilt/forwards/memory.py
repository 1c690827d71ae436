"""Where keys and values lie: pages of positions, and a table that says which page has which positions of a slot.

Shapes: ``L`` layers, ``S`` slots (``W`` of them read), ``N`` pages of ``P`` positions, ``M`` pages of a slot, ``G``
key/value heads of size ``D``, ``B`` rows of one token each, ``C`` tokens of a span.

Knows nothing of tokens, or of who holds what (engine/cache.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_TOKENS = 32
"""Positions of a page where a slot has many."""


def has_one_piece(device: torch.device) -> bool:
    """Whether a slot may be one piece of memory. CPUs read it faster; the kernels of GPUs are made for pages."""
    return device.type == "cpu"


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """What two models must agree on to share a cache."""

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def label(self) -> str:
        """For people, and for names of series."""
        return f"{self.layers}x{self.kv_heads}x{self.head_size}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.dtype.itemsize


class PageMemory:
    """Keys and values of ``pages`` pages of ``page_size`` positions, zeros at first.

    table_SM: int64, whose pages are whose. in_one_piece: each slot has one page, of its own number. The last slot is
    a scratch slot: what is written there means nothing. Raises RuntimeError when the memory isn't there.
    """

    def __init__(
        self, geometry: CacheGeometry, pages: int, page_size: int, table_SM: Tensor, *, in_one_piece: bool
    ) -> None:
        self.geometry = geometry
        self.page_size = page_size
        self.table_SM = table_SM
        self.in_one_piece = in_one_piece
        shape = (geometry.layers, pages, geometry.kv_heads, page_size, geometry.head_size)
        self.keys_LNGPD = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)
        self.values_LNGPD = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)

    @property
    def content(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[L, N, G, P, D]``."""
        return self.keys_LNGPD, self.values_LNGPD

    def write_last(self, layer: int, slots_B: Tensor, positions_B: Tensor, key_BGD: Tensor, value_BGD: Tensor) -> None:
        """Store one key and value per row at (slot, position)."""
        pages_B = slots_B
        if not self.in_one_piece:
            pages_B = self.table_SM[slots_B, positions_B // self.page_size]
            positions_B = positions_B % self.page_size
        self.keys_LNGPD[layer][pages_B, :, positions_B] = key_BGD
        self.values_LNGPD[layer][pages_B, :, positions_B] = value_BGD

    def write_span(self, layer: int, slot: int, start: int, key_CGD: Tensor, value_CGD: Tensor) -> None:
        """Store the keys and values of consecutive tokens of one slot."""
        if not self.in_one_piece:
            positions_C = torch.arange(start, start + len(key_CGD), device=key_CGD.device)
            self.write_last(layer, torch.full_like(positions_C, slot), positions_C, key_CGD, value_CGD)
            return
        span = slice(start, start + len(key_CGD))
        self.keys_LNGPD[layer, slot, :, span] = key_CGD.transpose(0, 1)
        self.values_LNGPD[layer, slot, :, span] = value_CGD.transpose(0, 1)

    def read(self, layer: int, window: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[W, G, length, D]`` of a window of slots: a view of slots in one piece, else a copy."""
        return self._read(self.keys_LNGPD[layer], window, length), self._read(self.values_LNGPD[layer], window, length)

    def _read(self, content_NGPD: Tensor, window: slice | Tensor, length: int) -> Tensor:
        if self.in_one_piece:
            return content_NGPD[:, :, :length][window]
        pages_WM = self.table_SM[window, : math.ceil(length / self.page_size)]
        return content_NGPD[pages_WM].transpose(1, 2).flatten(2, 3)[:, :, :length]

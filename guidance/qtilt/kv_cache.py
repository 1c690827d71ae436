"""Per-slot memory of a value model: the keys and values of each running history.

Shapes: ``L`` layers, ``S`` slots (``W`` of them read), ``G`` key/value heads of size ``D``, ``P`` positions, ``B`` rows
of one token each, ``C`` tokens of a span.

Knows nothing of tokens, rows or models: the engine decides what is written where. Engines of models with equal
geometry may share one cache, because a slot belongs to one engine from ``acquire`` to ``release``.
"""

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """What two models must agree on to share a cache."""

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device


class KVCache:
    """All memory for ``slots`` histories of up to ``max_length`` tokens, allocated at once.

    Bytes: ``2 · layers · slots · kv_heads · max_length · head_size`` elements of the geometry's dtype. Raises
    ValueError unless both sizes are positive and the memory is there.
    """

    def __init__(self, geometry: CacheGeometry, slots: int, max_length: int) -> None:
        if slots < 1 or max_length < 1:
            raise ValueError(f"a cache of {slots} slots × {max_length} tokens was asked for, both must be positive")
        self.geometry = geometry
        self.slots = slots
        self.max_length = max_length
        shape = (geometry.layers, slots, geometry.kv_heads, max_length, geometry.head_size)
        try:
            self.keys_LSGPD = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)
            self.values_LSGPD = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)
        except RuntimeError as error:
            gib = 2 * math.prod(shape) * geometry.dtype.itemsize / 2**30
            raise ValueError(
                f"the value cache for {slots} sequences × {max_length} tokens needs {gib:,.1f} GiB, more than "
                f"{geometry.device} has left: serve fewer (--max-num-seqs) or shorter (--max-model-len) sequences"
            ) from error
        # The lowest free slot goes first, so that the slots in use stay close together and can be read as a slice.
        self._free = list(range(slots))
        self._covered = [0] * slots
        self._written = [0] * slots

    @property
    def free_slots(self) -> int:
        """How many slots no history holds."""
        return len(self._free)

    def acquire(self, slot: int | None = None) -> int:
        """An empty slot, this one if given. Raises ValueError when it, or all, are in use."""
        if slot is not None:
            if slot not in self._free:
                raise ValueError(f"cache slot {slot} of {self.slots} is in use")
            self._free.remove(slot)
            heapq.heapify(self._free)
            return slot
        if not self._free:
            raise ValueError(f"all {self.slots} cache slots are in use; release one or build the cache with more")
        return heapq.heappop(self._free)

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Give a slot back.

        What it held is zeroed: a later reader multiplies the positions beyond its own by a weight of 0, and 0·NaN is
        NaN, so one history's overflow would otherwise reach another's.
        """
        self.keys_LSGPD[:, slot, :, : self._written[slot]].zero_()
        self.values_LSGPD[:, slot, :, : self._written[slot]].zero_()
        self._covered[slot] = self._written[slot] = 0
        heapq.heappush(self._free, slot)

    def covered(self, slot: int) -> int:
        """How many tokens of its history the slot holds."""
        return self._covered[slot]

    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ValueError if the slot holds fewer."""
        if not 0 <= length <= self._covered[slot]:
            raise ValueError(f"slot {slot} holds {self._covered[slot]} tokens and cannot be rewound to {length}")
        self._covered[slot] = length

    def reserve(self, slot: int, length: int) -> None:
        """Note that positions below ``length`` are about to be written."""
        assert self._covered[slot] <= length <= self.max_length, f"slot {slot} to hold {length} of {self.max_length}"
        self._written[slot] = max(self._written[slot], length)

    def advance(self, slot: int, length: int) -> None:
        """Note that keys and values of the first ``length`` tokens have been written."""
        assert length <= self._written[slot], f"slot {slot} advanced to {length}, {self._written[slot]} reserved"
        self._covered[slot] = length

    def write_last(self, layer: int, slots_B: Tensor, positions_B: Tensor, key_BGD: Tensor, value_BGD: Tensor) -> None:
        """Store one key and value per row at (slot, position)."""
        self.keys_LSGPD[layer][slots_B, :, positions_B] = key_BGD
        self.values_LSGPD[layer][slots_B, :, positions_B] = value_BGD

    def write_span(self, layer: int, slot: int, start: int, key_CGD: Tensor, value_CGD: Tensor) -> None:
        """Store the keys and values of consecutive tokens of one slot."""
        span = slice(start, start + len(key_CGD))
        self.keys_LSGPD[layer, slot, :, span] = key_CGD.transpose(0, 1)
        self.values_LSGPD[layer, slot, :, span] = value_CGD.transpose(0, 1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Have ``target`` hold the first ``length`` tokens of what ``source`` holds."""
        assert length <= self._covered[source], f"slot {source} holds {self._covered[source]} tokens, not {length}"
        self.reserve(target, length)
        self.keys_LSGPD[:, target, :, :length] = self.keys_LSGPD[:, source, :, :length]
        self.values_LSGPD[:, target, :, :length] = self.values_LSGPD[:, source, :, :length]
        self.advance(target, length)

    def read(self, layer: int, window: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[W, G, length, D]`` of a window of slots: a view for a slice, a copy for an index."""
        keys_SGPD = self.keys_LSGPD[layer, :, :, :length]
        values_SGPD = self.values_LSGPD[layer, :, :, :length]
        return keys_SGPD[window], values_SGPD[window]

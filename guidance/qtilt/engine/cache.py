"""Memory of a value model: the keys and values of each running history, by slot.

Shapes: ``L`` layers, ``S`` slots (``W`` of them read), ``N`` pages of ``P`` positions, ``M`` pages of a slot, ``G``
key/value heads of size ``D``, ``B`` rows of one token each, ``C`` tokens of a span.

Knows nothing of tokens, rows or models: the engine decides what is written where. Engines of models with equal
geometry may share one cache, because a slot belongs to one engine from ``acquire`` to ``release``.
"""

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_TOKENS = 32
"""Positions of a page where a slot has many."""


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """What two models must agree on to share a cache."""

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device


class Pages:
    """Which pages hold which slot's positions.

    With memory for the longest history in every slot (``fraction`` 1) each slot has one page of its own, and its
    positions lie in one piece. With less, pages of ``PAGE_TOKENS`` go to slots as their histories grow; where a slot
    has none, it reads from one that is never written. The last slot has a single page, whatever the position.
    """

    def __init__(self, slots: int, max_length: int, fraction: float, device: torch.device) -> None:
        self.in_one_piece = fraction == 1
        self.size = max_length if self.in_one_piece else PAGE_TOKENS
        self.per_slot = math.ceil(max_length / self.size)
        # One history of full length always fits.
        self.total = slots if self.in_one_piece else max(math.ceil(fraction * slots * self.per_slot), self.per_slot)
        self._of_slot: list[list[int]] = [[slot] if self.in_one_piece else [] for slot in range(slots)]
        self._free = [] if self.in_one_piece else list(range(self.total))
        nobodys, self._empty = self.total, self.total + 1
        self.allocated = self.total + (1 if self.in_one_piece else 2)
        self.table_SM = torch.full((slots + 1, self.per_slot), self._empty, device=device)
        self.table_SM[slots] = nobodys
        if self.in_one_piece:
            self.table_SM[:slots, 0] = torch.arange(slots, device=device)

    @property
    def free(self) -> int:
        """How many pages no slot has."""
        return len(self._free)

    def count(self, length: int) -> int:
        """How many pages a history of ``length`` tokens has."""
        return math.ceil(length / self.size)

    def filled(self, length: int) -> tuple[int, int]:
        """How many pages ``length`` tokens fill, and how many of them are left for the next; all, of one piece."""
        return (0, length) if self.in_one_piece else divmod(length, self.size)

    def of(self, slot: int) -> list[int]:
        """The pages of a slot, in order."""
        return self._of_slot[slot]

    def lacking(self, slot: int, length: int) -> int:
        """How many pages the slot needs more for ``length`` tokens."""
        return max(self.count(length) - len(self._of_slot[slot]), 0)

    def take(self, slot: int, length: int) -> None:
        """Have the slot hold ``length`` tokens. Raises ValueError when there are too few free pages."""
        lacking = self.lacking(slot, length)
        if lacking > self.free:
            raise ValueError(f"slot {slot} needs {lacking} more pages, {self.free} of {self.total} are free")
        if lacking:
            pages = self._of_slot[slot]
            pages += [self._free.pop() for _ in range(lacking)]
            new = torch.tensor(pages[-lacking:], pin_memory=self.table_SM.is_cuda)
            self.table_SM[slot, len(pages) - lacking : len(pages)] = new.to(self.table_SM.device, non_blocking=True)

    def give_back(self, slot: int, kept: int) -> None:
        """All but the first ``kept`` pages of the slot are free."""
        if not self.in_one_piece:
            self._free += self._of_slot[slot][kept:]
            del self._of_slot[slot][kept:]
            self.table_SM[slot, kept:] = self._empty


class KVCache:
    """Memory for ``slots`` histories of up to ``max_length`` tokens, allocated at once.

    fraction: of the memory that all of them would need at full length. With less than 1, what was used least recently
    is dropped where room is needed; a slot then covers nothing, and its history is computed again.
    ``nobodys`` is a further slot whose content means nothing.

    Raises ValueError unless sizes and fraction are positive and the memory is there.
    """

    def __init__(self, geometry: CacheGeometry, slots: int, max_length: int, fraction: float = 1.0) -> None:
        if slots < 1 or max_length < 1:
            raise ValueError(f"a cache of {slots} slots × {max_length} tokens was asked for, both must be positive")
        if not 0 < fraction <= 1:
            raise ValueError(f"the fraction of a cache's memory is {fraction}, expected above 0 and at most 1")
        self.geometry = geometry
        self.slots = self.nobodys = slots
        self.max_length = max_length
        self.pages = Pages(slots, max_length, fraction, geometry.device)
        shape = (geometry.layers, self.pages.allocated, geometry.kv_heads, self.pages.size, geometry.head_size)
        self.gib = 2 * math.prod(shape) * geometry.dtype.itemsize / 2**30
        try:
            self.keys_LNGPD = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)
            self.values_LNGPD = torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)
        except RuntimeError as error:
            raise ValueError(
                f"the value cache for {slots} sequences × {max_length} tokens needs {self.gib:,.1f} GiB, more than "
                f"{geometry.device} has left: serve fewer (--max-num-seqs) or shorter (--max-model-len) sequences, or "
                "have less memory for them (--guidance-kv-fraction)"
            ) from error
        # The lowest free slot goes first, so that the slots in use stay close together and can be read as a slice.
        self._free = list(range(slots))
        self._covered = [0] * slots
        self._written = [0] * slots
        self._used = [0] * slots
        self._clock = 0
        self.dropped = 0
        """How many histories have been dropped to make room for others."""

    @property
    def free_slots(self) -> int:
        """How many slots no history holds."""
        return len(self._free)

    @property
    def held_pages(self) -> int:
        """How many pages slots in use have; where a slot is one piece, how many slots are in use."""
        return self.slots - self.free_slots if self.pages.in_one_piece else self.pages.total - self.pages.free

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

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self.drop(slot)
        heapq.heappush(self._free, slot)

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        """Forget what the slot holds; whose it is doesn't change.

        What was written is zeroed: a later reader multiplies the positions beyond its own by a weight of 0, and 0·NaN
        is NaN, so one history's overflow would otherwise reach another's.
        """
        self._zero(slot, 0)
        self.pages.give_back(slot, 0)
        self._covered[slot] = self._written[slot] = 0

    def covered(self, slot: int) -> int:
        """How many tokens of its history the slot holds."""
        return self._covered[slot]

    @torch.inference_mode()
    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ValueError if the slot holds fewer."""
        if not 0 <= length <= self._covered[slot]:
            raise ValueError(f"slot {slot} holds {self._covered[slot]} tokens and cannot be rewound to {length}")
        self._covered[slot] = length
        if not self.pages.in_one_piece:
            kept = self.pages.count(length)
            self._zero(slot, kept)
            self.pages.give_back(slot, kept)
            self._written[slot] = min(self._written[slot], kept * self.pages.size)

    def _zero(self, slot: int, first: int) -> None:
        """Zero what was written in the slot's pages from number ``first`` on."""
        full, rest = self.pages.filled(self._written[slot])
        if full > first:
            pages_M = self.pages.table_SM[slot, first:full]
            for words_LNX in self._words():
                words_LNX.index_fill_(1, pages_M, 0)
        if rest and full >= first:
            page = self.pages.of(slot)[full]
            for content_LNGPD in (self.keys_LNGPD, self.values_LNGPD):
                content_LNGPD[:, page, :, :rest].zero_()

    def _words(self) -> tuple[Tensor, Tensor]:
        """Keys and values as words ``[L, N, X]`` of 16 bytes, not for slots in one piece: they needn't be a multiple.

        Indexing whole pages goes element by element on CPUs: with words it is as fast as a loop of copies of memory.
        """
        keys_LNX, values_LNX = self.keys_LNGPD.flatten(2), self.values_LNGPD.flatten(2)
        return keys_LNX.view(torch.complex128), values_LNX.view(torch.complex128)

    def fits(self, lengths: Collection[int]) -> bool:
        """Whether histories of these lengths can be held together."""
        return self.pages.in_one_piece or sum(map(self.pages.count, lengths)) <= self.pages.total

    def make_room(self, length_by_slot: dict[int, int]) -> None:
        """Drop what was used least recently until these slots can be reserved; they keep what they hold."""
        if self.pages.in_one_piece:
            return
        lacking = sum(self.pages.lacking(slot, length) for slot, length in length_by_slot.items())
        others = (slot for slot in range(self.slots) if slot not in length_by_slot and self.pages.of(slot))
        for slot in sorted(others, key=self._used.__getitem__):
            if lacking <= self.pages.free:
                break
            self.drop(slot)
            self.dropped += 1

    def reserve(self, slot: int, length: int) -> None:
        """Note that positions below ``length`` are about to be written. Raises ValueError without room for them."""
        assert self._covered[slot] <= length <= self.max_length, f"slot {slot} to hold {length} of {self.max_length}"
        if not self.pages.in_one_piece:
            self.pages.take(slot, length)
        self._written[slot] = max(self._written[slot], length)
        self._clock += 1
        self._used[slot] = self._clock

    def advance(self, slot: int, length: int) -> None:
        """Note that keys and values of the first ``length`` tokens have been written."""
        assert length <= self._written[slot], f"slot {slot} advanced to {length}, {self._written[slot]} reserved"
        self._covered[slot] = length

    def write_last(self, layer: int, slots_B: Tensor, positions_B: Tensor, key_BGD: Tensor, value_BGD: Tensor) -> None:
        """Store one key and value per row at (slot, position)."""
        pages_B = slots_B
        if not self.pages.in_one_piece:
            pages_B = self.pages.table_SM[slots_B, positions_B // self.pages.size]
            positions_B = positions_B % self.pages.size
        self.keys_LNGPD[layer][pages_B, :, positions_B] = key_BGD
        self.values_LNGPD[layer][pages_B, :, positions_B] = value_BGD

    def write_span(self, layer: int, slot: int, start: int, key_CGD: Tensor, value_CGD: Tensor) -> None:
        """Store the keys and values of consecutive tokens of one slot."""
        if not self.pages.in_one_piece:
            positions_C = torch.arange(start, start + len(key_CGD), device=key_CGD.device)
            self.write_last(layer, torch.full_like(positions_C, slot), positions_C, key_CGD, value_CGD)
            return
        span = slice(start, start + len(key_CGD))
        self.keys_LNGPD[layer, slot, :, span] = key_CGD.transpose(0, 1)
        self.values_LNGPD[layer, slot, :, span] = value_CGD.transpose(0, 1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Have ``target`` hold the first ``length`` tokens of what ``source`` holds."""
        assert length <= self._covered[source], f"slot {source} holds {self._covered[source]} tokens, not {length}"
        self.reserve(target, length)
        full, rest = self.pages.filled(length)
        if full:
            source_M, target_M = self.pages.table_SM[source, :full], self.pages.table_SM[target, :full]
            for words_LNX in self._words():
                words_LNX[:, target_M] = words_LNX[:, source_M]
        if rest:
            source_page, target_page = self.pages.of(source)[full], self.pages.of(target)[full]
            for content_LNGPD in (self.keys_LNGPD, self.values_LNGPD):
                content_LNGPD[:, target_page, :, :rest] = content_LNGPD[:, source_page, :, :rest]
        self.advance(target, length)

    def read(self, layer: int, window: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[W, G, length, D]`` of a window of slots: a view of slots in one piece, else a copy."""
        return self._read(self.keys_LNGPD[layer], window, length), self._read(self.values_LNGPD[layer], window, length)

    def _read(self, content_NGPD: Tensor, window: slice | Tensor, length: int) -> Tensor:
        if self.pages.in_one_piece:
            return content_NGPD[:, :, :length][window]
        pages_WM = self.pages.table_SM[window, : self.pages.count(length)]
        return content_NGPD[pages_WM].transpose(1, 2).flatten(2, 3)[:, :, :length]

"""Who holds what of a value model's cache: slots of running histories, and the pages they get.

Shapes: ``S`` slots, ``N`` pages, ``M`` pages of a slot; otherwise as in :mod:`qtilt.forwards.memory`.

Knows nothing of tokens, rows or models: the engine decides what is written where. Engines of models with equal
geometry may share one cache, because a slot belongs to one engine from ``acquire`` to ``release``.
"""

import math

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.arrays import IntArray
from qtilt.forwards.memory import PAGE_TOKENS, CacheGeometry, PageMemory, has_one_piece


class Pages:
    """Which pages hold which slot's positions.

    With memory for the longest history in every slot (``fraction`` 1) each slot has one page of its own on a CPU, and
    its positions lie in one piece. With less, and on GPUs, pages of ``PAGE_TOKENS`` go to slots as their histories
    grow; where a slot has none, it reads from one that is never written. The last slot has a single page, whatever the
    position.
    """

    def __init__(self, slots: int, max_length: int, fraction: float, device: torch.device) -> None:
        self.in_one_piece = fraction == 1 and has_one_piece(device)
        self.size = max_length if self.in_one_piece else PAGE_TOKENS
        self.per_slot = math.ceil(max_length / self.size)
        # One history of full length always fits.
        self.total = slots if self.in_one_piece else max(math.ceil(fraction * slots * self.per_slot), self.per_slot)
        self._of_slot: list[list[int]] = [[slot] if self.in_one_piece else [] for slot in range(slots)]
        self._held_S = np.array([len(pages) for pages in self._of_slot])
        self._free = [] if self.in_one_piece else list(range(self.total))
        scratch_page, self._empty = self.total, self.total + 1
        self.allocated = self.total + (1 if self.in_one_piece else 2)
        # A column more than there may be pages: kernels that read pages in place look one ahead.
        self.table_SM = torch.full((slots + 1, self.per_slot + 1), self._empty, device=device)
        self.table_SM[slots] = scratch_page
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

    def take(self, slots_B: IntArray, lengths_B: IntArray) -> None:
        """Have slots hold so many tokens. Raises ValueError when there are too few free pages."""
        lacking = np.flatnonzero(-(-lengths_B // self.size) > self._held_S[slots_B])
        for slot, length in zip(slots_B[lacking].tolist(), lengths_B[lacking].tolist(), strict=True):
            self._take(slot, length)

    def _take(self, slot: int, length: int) -> None:
        lacking = self.lacking(slot, length)
        if lacking > self.free:
            raise ValueError(f"slot {slot} needs {lacking} more pages, {self.free} of {self.total} are free")
        pages = self._of_slot[slot]
        pages += [self._free.pop() for _ in range(lacking)]
        self._held_S[slot] = len(pages)
        new = torch.tensor(pages[-lacking:], pin_memory=self.table_SM.is_cuda)
        self.table_SM[slot, len(pages) - lacking : len(pages)] = new.to(self.table_SM.device, non_blocking=True)

    def give_back(self, slot: int, kept: int) -> None:
        """All but the first ``kept`` pages of the slot are free."""
        if not self.in_one_piece:
            self._free += self._of_slot[slot][kept:]
            del self._of_slot[slot][kept:]
            self._held_S[slot] = len(self._of_slot[slot])
            self.table_SM[slot, kept:] = self._empty


class KVCache:
    """Memory for ``slots`` histories of up to ``max_length`` tokens, allocated at once.

    fraction: of the memory that all of them would need at full length. With less than 1, what was used least recently
    is dropped where room is needed; a slot then covers nothing, and its history is computed again.
    ``scratch_slot`` is a further one, whose content means nothing: for what isn't to be kept.

    Raises ValueError unless sizes and fraction are positive and the memory is there.
    """

    def __init__(self, geometry: CacheGeometry, slots: int, max_length: int, fraction: float = 1.0) -> None:
        if slots < 1 or max_length < 1:
            raise ValueError(f"a cache of {slots} slots × {max_length} tokens was asked for, both must be positive")
        if not 0 < fraction <= 1:
            raise ValueError(f"the fraction of a cache's memory is {fraction}, expected above 0 and at most 1")
        self.geometry = geometry
        self.slots = self.scratch_slot = slots
        self.max_length = max_length
        self.pages = Pages(slots, max_length, fraction, geometry.device)
        self.gib = self.pages.allocated * self.pages.size * geometry.token_bytes / 2**30
        try:
            self.memory = PageMemory(
                geometry,
                self.pages.allocated,
                self.pages.size,
                self.pages.table_SM,
                in_one_piece=self.pages.in_one_piece,
            )
        except RuntimeError as error:
            raise ValueError(
                f"the value cache for {slots} sequences × {max_length} tokens needs {self.gib:,.1f} GiB, more than "
                f"{geometry.device} has left: serve fewer (--max-num-seqs) or shorter (--max-model-len) sequences, or "
                "have less memory for them (--guidance-kv-fraction)"
            ) from error
        self._free = set(range(slots))
        self.covered_S = np.zeros(slots, dtype=np.int64)
        """How many tokens of its history each slot holds."""
        self.held_before_S = np.zeros(slots, dtype=np.int64)
        """How many tokens of its history each slot held when it was last dropped, or its request was preempted."""
        self._written_S = np.zeros(slots, dtype=np.int64)
        self._used_S = np.zeros(slots, dtype=np.int64)
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

    def acquire(self, slot: int) -> None:
        """A history takes a slot. Raises ValueError when another one has it."""
        if slot not in self._free:
            raise ValueError(f"cache slot {slot} of {self.slots} is in use")
        self._free.remove(slot)
        assert self.covered_S[slot] == 0, f"slot {slot} holds {self.covered_S[slot]} tokens of nobody"

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self.drop(slot)
        self._free.add(slot)

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        """Forget what the slot holds; whose it is doesn't change.

        What was written is zeroed: a later reader multiplies the positions beyond its own by a weight of 0, and 0·NaN
        is NaN, so one history's overflow would otherwise reach another's.
        """
        self._zero(slot, 0)
        self.pages.give_back(slot, 0)
        self.held_before_S[slot] = max(self.held_before_S[slot], self.covered_S[slot])
        self.covered_S[slot] = self._written_S[slot] = 0

    @torch.inference_mode()
    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ValueError if the slot holds fewer."""
        if not 0 <= length <= self.covered_S[slot]:
            raise ValueError(f"slot {slot} holds {self.covered_S[slot]} tokens and cannot be rewound to {length}")
        self.covered_S[slot] = length
        if not self.pages.in_one_piece:
            kept = self.pages.count(length)
            self._zero(slot, kept)
            self.pages.give_back(slot, kept)
            self._written_S[slot] = min(int(self._written_S[slot]), kept * self.pages.size)

    def _zero(self, slot: int, first: int) -> None:
        """Zero what was written in the slot's pages from number ``first`` on."""
        full, rest = self.pages.filled(int(self._written_S[slot]))
        if full > first:
            pages_M = self.pages.table_SM[slot, first:full]
            for words_LNX in self._words():
                words_LNX.index_fill_(1, pages_M, 0)
        if rest and full >= first:
            page = self.pages.of(slot)[full]
            for content_LNGPD in self.memory.content:
                content_LNGPD[:, page, :, :rest].zero_()

    def _words(self) -> tuple[Tensor, Tensor]:
        """Keys and values as words ``[L, N, X]`` of 16 bytes, not for slots in one piece: they needn't be a multiple.

        Indexing whole pages goes element by element on CPUs: with words it is as fast as a loop of copies of memory.
        """
        keys_LNX, values_LNX = (content_LNGPD.flatten(2) for content_LNGPD in self.memory.content)
        return keys_LNX.view(torch.complex128), values_LNX.view(torch.complex128)

    def parts(self, lengths_B: IntArray) -> list[slice]:
        """Cuts histories of these lengths, in order, into as few parts as can be held one at a time."""
        if self.pages.in_one_piece:
            return [slice(0, len(lengths_B))]
        cuts, first, pages = [], 0, 0
        for row, needed in enumerate(-(-lengths_B // self.pages.size)):
            pages += needed
            if pages > self.pages.total and row > first:
                cuts.append(slice(first, row))
                first, pages = row, needed
        return [*cuts, slice(first, len(lengths_B))]

    def make_room(self, slots_B: IntArray, lengths_B: IntArray) -> None:
        """Drop what was used least recently until these slots can hold as much; they keep what they hold."""
        if self.pages.in_one_piece:
            return
        lacking = sum(self.pages.lacking(*each) for each in zip(slots_B.tolist(), lengths_B.tolist(), strict=True))
        if lacking <= self.pages.free:
            return
        kept = set(slots_B.tolist())
        others = (slot for slot in range(self.slots) if slot not in kept and self.pages.of(slot))
        for slot in sorted(others, key=self._used_S.__getitem__):
            self.drop(slot)
            self.dropped += 1
            if lacking <= self.pages.free:
                break

    def hold(self, slots_B: IntArray, lengths_B: IntArray) -> None:
        """Note that slots are about to hold the first ``lengths_B`` tokens of their histories: who calls writes them.

        Raises ValueError without pages for them: make room first.
        """
        assert (lengths_B <= self.max_length).all(), f"histories of {lengths_B} tokens in slots of {self.max_length}"
        if not self.pages.in_one_piece:
            self.pages.take(slots_B, lengths_B)
        self.covered_S[slots_B] = lengths_B
        self._written_S[slots_B] = np.maximum(self._written_S[slots_B], lengths_B)
        self._clock += 1
        self._used_S[slots_B] = self._clock

    def copy(self, source: int, target: int, length: int) -> None:
        """Have ``target`` hold the first ``length`` tokens of what ``source`` holds."""
        assert length <= self.covered_S[source], f"slot {source} holds {self.covered_S[source]} tokens, not {length}"
        self.hold(np.array([target]), np.array([length]))
        full, rest = self.pages.filled(length)
        if full:
            source_M, target_M = self.pages.table_SM[source, :full], self.pages.table_SM[target, :full]
            for words_LNX in self._words():
                words_LNX[:, target_M] = words_LNX[:, source_M]
        if rest:
            source_page, target_page = self.pages.of(source)[full], self.pages.of(target)[full]
            for content_LNGPD in self.memory.content:
                content_LNGPD[:, target_page, :, :rest] = content_LNGPD[:, source_page, :, :rest]

"""The value engine: token histories in, the return distributions of candidate tokens out.

Shapes: ``B`` rows, ``K`` candidates a row, ``A`` logits of one return distribution, ``H`` hidden size; ``S`` slots and
``P`` positions of the model runner's table of tokens.

Each running history owns a slot of the value model's cache. A step brings every slot up to its history: a new request,
one resumed after preemption and one more token are the same case, and the engine does not know why a history grew.
:meth:`ValueEngine.feed` finds what is lacking, :meth:`ValueEngine.score` runs it with the last tokens and their
candidates in one packed forward.
"""

import copy
from collections.abc import Iterator, MutableMapping, Sequence, Set
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from qtilt.engine.cache import KVCache
from qtilt.engine.counts import EngineCounts
from qtilt.engine.prefixes import SharedPrefixes
from qtilt.forwards.arrays import BoolArray, Int32Array, IntArray
from qtilt.forwards.choice import choose_forward
from qtilt.forwards.compiled.llama_forward import CompiledForward, candidate_logits
from qtilt.forwards.fused import Kernels
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.packing import LastTokens, Span, pack
from qtilt.forwards.probe import measure_geometry
from qtilt.model.value_model import ValueModel


class ValueEngine:
    """Runs one value model over up to ``slots`` histories of up to ``max_length`` tokens each.

    All memory that stays is allocated here. ``caches`` are those of other engines by geometry: one for models of this
    geometry (two versions of one model) is used, its slots shared out between both engines; otherwise the new cache is
    added. ``kv_fraction`` is the part of the worst case's memory that a new cache gets: histories that it can't hold
    together are computed in turn, and what was dropped is computed again. ``max_new_tokens`` bounds the new tokens of
    one forward, and with it the memory a step needs for a long catch-up, which then takes several forwards.
    ``forward`` runs the backbone (forwards/choice.py), on ``kernels`` if it can't do better.

    Raises ValueError for a backbone the engine is not exact on, positions that don't cover ``max_length``, or a shared
    cache that is too small.
    """

    def __init__(
        self,
        model: ValueModel,
        slots: int,
        max_length: int,
        caches: MutableMapping[CacheGeometry, KVCache] | None = None,
        max_new_tokens: int = 8192,
        kv_fraction: float = 1.0,
        kernels: Kernels | None = None,
    ) -> None:
        if max_length > model.max_positions:
            raise ValueError(
                f"the value model has {model.max_positions} positions, fewer than the {max_length} tokens a history "
                "may have; use a backbone with more, or shorter sequences"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.model = model.eval()
        self.max_new_tokens = max_new_tokens
        geometry = measure_geometry(model.backbone, max_length)
        self.cache = _own_or_shared({} if caches is None else caches, geometry, slots, max_length, kv_fraction)
        self.forward = choose_forward(model.backbone, geometry, max_length, kernels)
        self._q_head = model.head_logits
        if isinstance(self.forward, CompiledForward):
            self._q_head = partial(candidate_logits, model.head, model.distribution.num_logits)
        self.counts = EngineCounts()
        self._mine: set[int] = set()
        self._prefixes = SharedPrefixes()

    def free_what_is_kept_twice(self) -> None:
        """Drop weights that the forward has in another form: the model can't be run but by this engine after that."""
        if isinstance(self.forward, CompiledForward):
            self.forward.free_backbones_own()

    def apart(self, length: int) -> "ValueEngine":
        """The same model with a cache of its own, whose only slot, 0, holds a history of so many tokens that nobody has
        written yet. Raises ValueError without the memory for it.
        """
        engine = copy.copy(self)
        engine.cache, engine._mine, engine._prefixes = KVCache(self.cache.geometry, 1, length), set(), SharedPrefixes()
        engine.counts = EngineCounts()
        engine.acquire(0)
        engine.cache.hold(np.array([0]), np.array([length]))
        return engine

    @property
    def held_pages(self) -> int:
        """How many pages of the cache histories of this engine have."""
        return sum(len(self.cache.pages.of(slot)) for slot in self._mine)

    def acquire(self, slot: int, known: Sequence[int] | Int32Array = (), *, held_before: int = 0) -> None:
        """A new history takes the slot. known: the tokens that it begins with, as many as the host knows. held_before:
        how many of them it has had cached before, which only ``counts`` tells apart.

        Raises ValueError when the slot is in use.
        """
        self.cache.acquire(slot)
        self.cache.held_before_S[slot] = held_before
        self._mine.add(slot)
        self._prefixes.hold(slot, np.asarray(known, dtype=np.int32))

    def holds(self, slot: int) -> bool:
        """Whether the slot has been acquired and not yet released."""
        return slot in self._mine

    def release(self, slot: int) -> None:
        """Give a slot back; its history is forgotten."""
        self._mine.remove(slot)
        self._prefixes.release(slot)
        self.cache.release(slot)

    def feed(
        self,
        slots_B: IntArray,
        lengths_B: IntArray,
        tokens_SP: Tensor,
        draws_B: BoolArray | None = None,
        are_bounds_B: BoolArray | None = None,
    ) -> list[Span]:
        """Have the cache hold histories of these lengths, as many as it can at once (``cache.parts``).

        tokens_SP: each slot's tokens, on the model's device; ids beyond the model's vocabulary (added tokens, padding
        rows of the reference) are read as its last row, there being nothing better. draws_B: whose last token is a row
        of the coming :meth:`score`, and cached by that; None: all of them. are_bounds_B: which lengths are upper bounds
        (with drafts the host doesn't know how many came true); a slot that holds anything of such a history holds all
        of it but its last token. A slot that holds more than its history forgets it.

        Returns what must be cached before the last tokens, ``max_new_tokens`` at most: of more tokens than that, or
        when no history draws, it has been cached already.
        """
        draws_B = np.ones(len(slots_B), dtype=bool) if draws_B is None else draws_B
        for row in np.flatnonzero(self.cache.covered_S[slots_B] > lengths_B):
            # Drafts that didn't come true, or tokens that vLLM took back.
            self.cache.rewind(int(slots_B[row]), int(lengths_B[row]))
        self.cache.make_room(slots_B, lengths_B)
        covered_B, ends_B = self.cache.covered_S[slots_B], lengths_B - draws_B
        is_held_B = covered_B >= ends_B
        if are_bounds_B is not None:
            is_held_B |= are_bounds_B & (covered_B > 0)
        spans: list[Span] = []
        for row in np.flatnonzero(~is_held_B):
            slot, end = int(slots_B[row]), int(ends_B[row])
            # Nothing is cached yet of the last tokens of those before it.
            start = int(covered_B[row]) or self._share(slot, end, spans, set(slots_B[:row][draws_B[:row]].tolist()))
            self.cache.hold(slots_B[row : row + 1], lengths_B[row : row + 1])
            if start < end:
                self.counts.note_catch_up(start, end, int(self.cache.held_before_S[slot]))
                tokens_C = tokens_SP[slot, start:end].long().clamp(0, self.model.vocab_size - 1)
                spans.append(Span(slot, start, tokens_C))
        self.cache.hold(slots_B, lengths_B)
        if spans and (sum(len(span.token_ids_C) for span in spans) > self.max_new_tokens or not draws_B.any()):
            self.extend(spans)
            spans = []
        return spans

    @torch.inference_mode()
    def score(
        self,
        last: LastTokens,
        candidates_BK: Tensor,
        spans: Sequence[Span] = (),
        counts_B: IntArray | None = None,
    ) -> Tensor:
        """Logits of Z for candidates after each last token, float32 ``[B, K, A]``: one packed forward.

        counts_B: how many of each row's candidates are wanted, its first; None: all. The others of a V-type, which runs
        each candidate as a token, aren't run, and have logits of 0. Where those of the last token itself aren't finite,
        nor are any of its row.

        Caches the spans and the last tokens, wherever their slots are; all before them must be cached already. Takes
        the word of the caller for slots, positions and token ids, and never waits for the device.
        """
        began = perf_counter()
        values_BKA = self._score(last, candidates_BK, spans, counts_B)
        self.counts.seconds += perf_counter() - began
        return values_BKA

    def _score(
        self, last: LastTokens, candidates_BK: Tensor, spans: Sequence[Span], counts_B: IntArray | None
    ) -> Tensor:
        if self.model.type == "q":
            return self._q_head(self.forward(pack(self.cache.memory, spans, last)), candidates_BK)
        step = pack(self.cache.memory, spans, last, candidates_BK, counts_B)
        logits_BRA = step.by_row(self.model.head_logits(self.forward(step)))
        return logits_BRA[:, 1:] + logits_BRA[:, :1] * 0

    @torch.inference_mode()
    def extend(self, spans: Sequence[Span]) -> None:
        """Cache spans, wherever their slots are, in forwards of at most ``max_new_tokens``. As :meth:`score`."""
        began = perf_counter()
        for part in _cut(spans, self.max_new_tokens):
            self.forward(pack(self.cache.memory, part))
        self.counts.seconds += perf_counter() - began

    def _share(self, slot: int, length: int, spans: list[Span], rows: Set[int]) -> int:
        """Copy what the history has in common with another one: how many tokens that are.

        spans: what others lack; run, and emptied, if it is taken from them. rows: slots whose last token isn't cached.
        """

        def available(other: int) -> int:
            return int(self.cache.covered_S[other]) - (other in rows)

        source, common = self._prefixes.longest(slot, length, available)
        if common:
            if any(span.slot == source for span in spans):
                self.extend(spans)
                spans.clear()
            self.cache.copy(source, slot, common)
            self.counts.copied += common
        return common


def _own_or_shared(
    caches: MutableMapping[CacheGeometry, KVCache],
    geometry: CacheGeometry,
    slots: int,
    max_length: int,
    fraction: float,
) -> KVCache:
    cache = caches.get(geometry)
    if cache is None:
        cache = caches[geometry] = KVCache(geometry, slots, max_length, fraction)
    elif cache.slots < slots or cache.max_length < max_length:
        raise ValueError(
            f"the shared cache is {cache.slots} slots × {cache.max_length} tokens, the value model needs {slots} × "
            f"{max_length}"
        )
    return cache


def _cut(spans: Sequence[Span], most: int) -> Iterator[list[Span]]:
    """The same tokens in parts of at most ``most``, in order."""
    part: list[Span] = []
    room = most
    for span in spans:
        while len(span.token_ids_C) > room:
            part.append(Span(span.slot, span.start, span.token_ids_C[:room]))
            span = Span(span.slot, span.start + room, span.token_ids_C[room:])
            yield part
            part, room = [], most
        part.append(span)
        room -= len(span.token_ids_C)
        if room == 0:
            yield part
            part, room = [], most
    if part:
        yield part

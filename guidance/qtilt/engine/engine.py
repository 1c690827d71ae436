"""The value engine: token histories in, the return distributions of candidate tokens out.

Shapes: ``B`` rows, ``K`` candidates a row, ``T`` packed tokens, ``A`` logits of one return distribution, ``H`` hidden
size.

Each running history owns a slot of the value model's cache. A step extends every slot by whatever its history has and
the cache lacks, so a new request, one resumed after preemption and one more token are the same case; the engine does
not know why a history grew. One step is one packed forward of the backbone.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtilt.engine.cache import CacheGeometry, KVCache
from qtilt.engine.device_copy import copy_to_device
from qtilt.engine.packing import LastTokens, PackedAttention, PackedStep, Span, pack
from qtilt.engine.prefixes import SharedPrefixes
from qtilt.forwards.compiled import library
from qtilt.forwards.compiled.llama_forward import CompiledForward, can_compile, candidate_logits
from qtilt.forwards.cpu_linear import onednn_linears, slow_linears
from qtilt.forwards.fused import FusedForward, Kernels, can_fuse
from qtilt.forwards.probe import check_forward, check_packed, engine_attention, measure_geometry
from qtilt.model.value_model import ValueModel


@dataclass(slots=True)
class Row:
    """One history in a step: its slot, how many of its tokens the cache holds, and the tokens it lacks, one at least.

    The last token is always run: where the cache has it, it is computed again. length: tokens in the history.
    """

    slot: int
    start: int
    new_token_ids: Sequence[int]
    length: int

    def advance(self, count: int) -> None:
        """The cache has got the next ``count`` tokens."""
        self.start, self.new_token_ids = self.start + count, self.new_token_ids[count:]


class ValueEngine:
    """Runs one value model over up to ``slots`` histories of up to ``max_length`` tokens each.

    All memory that stays is allocated here. ``caches`` are those of other engines by geometry: one for models of this
    geometry (two versions of one model) is used, its slots shared out between both engines; otherwise the new cache is
    added. ``kv_fraction`` is the part of the worst case's memory that a new cache gets: histories that it can't hold
    together are computed in turn, and what was dropped is computed again. ``max_new_tokens`` bounds the new tokens of
    one forward, and with it the memory a step needs for a long catch-up, which then takes several forwards.
    Backbones of the kinds that allow it run compiled, if the library has been loaded (compiled/library.py), or on
    ``kernels``, if given.

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
        self.max_length = max_length
        # A V-type candidate has a position too.
        self._longest = max_length if model.type == "q" else min(max_length, model.max_positions - 1)
        self._vocab_size = model.vocab_size
        self.max_new_tokens = max_new_tokens
        self.cache = self._own_or_shared_cache({} if caches is None else caches, slots, kv_fraction)
        self._mine: set[int] = set()
        self._prefixes = SharedPrefixes(self.cache.slots, max_length)
        self._slow_linears = slow_linears(model.backbone)
        # A mask of four dimensions is passed through untouched: no mask is built and, in GPT-2, no ids are compared
        # with the padding token on the device.
        self._any_mask = torch.zeros(1, 1, 1, 1, device=self.cache.geometry.device)
        self._compiled = self._compile()
        self._fused = self._fuse(kernels) if self._compiled is None else None

    def _own_or_shared_cache(
        self, caches: MutableMapping[CacheGeometry, KVCache], slots: int, fraction: float
    ) -> KVCache:
        geometry = measure_geometry(self.model.backbone, self.max_length)
        cache = caches.get(geometry)
        if cache is None:
            cache = caches[geometry] = KVCache(geometry, slots, self.max_length, fraction)
        elif cache.slots < slots or cache.max_length < self.max_length:
            raise ValueError(
                f"the shared cache is {cache.slots} slots × {cache.max_length} tokens, the value model needs {slots} × "
                f"{self.max_length}"
            )
        return cache

    def _fuse(self, kernels: Kernels | None) -> FusedForward | None:
        if kernels is None or not can_fuse(self.model.backbone):
            return None
        fused = FusedForward(self.model.backbone, kernels, min(self.max_length + 1, self.model.max_positions))
        check_forward(self.model.backbone, fused)
        return fused

    def _compile(self) -> CompiledForward | None:
        backbone, geometry = self.model.backbone, self.cache.geometry
        if not library.is_loaded() or not can_compile(backbone, geometry):
            return None
        compiled = CompiledForward(backbone, geometry, self.max_length + 1)
        check_packed(backbone, compiled, geometry)
        return compiled

    @property
    def forward(self) -> str:
        """What runs the backbone: ``compiled``, ``fused`` (on the kernels) or ``transformers``."""
        if self._compiled is not None:
            return "compiled"
        return "transformers" if self._fused is None else "fused"

    def acquire(self, slot: int | None = None) -> int:
        """An empty slot for a new history, this one if given. Raises ValueError when it, or all, are in use."""
        slot = self.cache.acquire(slot)
        self._mine.add(slot)
        return slot

    def holds(self, slot: int) -> bool:
        """Whether the slot has been acquired and not yet released."""
        return slot in self._mine

    def release(self, slot: int) -> None:
        """Give a slot back; its history is forgotten."""
        self._check_mine(slot)
        self._mine.remove(slot)
        self.cache.release(slot)

    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of the slot's history, before it goes another way."""
        self._check_mine(slot)
        self.cache.rewind(slot, length)

    def covered(self, slot: int) -> int:
        """How many tokens of its history the slot's cache holds."""
        self._check_mine(slot)
        return self.cache.covered(slot)

    @torch.inference_mode()
    def value_logits(self, slots: Sequence[int], histories: Sequence[Sequence[int]], candidates_BK: Tensor) -> Tensor:
        """Logits of Z(history, candidate) for every candidate: float32 ``[B, K, A]``.

        ``slots`` are B distinct slots (fastest in ascending order), ``histories`` their full token histories (anything
        with a length and slices; only what the cache lacks is read), each an extension of what its slot covers: after a
        change of what is covered, ``rewind`` first. ``candidates_BK`` (int64, on the model's device) are token ids
        below the model's vocabulary size. A row's result doesn't depend on the rows beside it, up to rounding.

        Raises ValueError for slots that aren't this engine's or not distinct, histories that are empty, shorter than
        what is covered or too long, or token ids outside the model's vocabulary.
        """
        if len(slots) != len(histories) or len(slots) != len(candidates_BK):
            raise ValueError(
                f"{len(slots)} slots, {len(histories)} histories and {len(candidates_BK)} rows of candidates differ"
            )
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} are not distinct")
        if not slots:
            shape = (0, candidates_BK.shape[1], self.model.distribution.num_logits)
            return torch.zeros(shape, dtype=torch.float32, device=candidates_BK.device)
        parts = [
            self._held_together(slots[part], histories[part], candidates_BK[part])
            for part in self.parts([len(history) for history in histories])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, lengths: Sequence[int]) -> list[slice]:
        """Cuts rows with histories of these lengths, in order, into as few parts as the cache holds one at a time."""
        if self.cache.fits(lengths):
            return [slice(0, len(lengths))]
        cuts, first = [], 0
        for row in range(1, len(lengths)):
            if not self.cache.fits(lengths[first : row + 1]):
                cuts.append(slice(first, row))
                first = row
        return [*cuts, slice(first, len(lengths))]

    def _held_together(self, slots: Sequence[int], histories: Sequence[Sequence[int]], candidates_BK: Tensor) -> Tensor:
        """:meth:`value_logits` of histories that the cache can hold together."""
        rows = [self._row(slot, history) for slot, history in zip(slots, histories, strict=True)]
        self.cache.make_room({row.slot: row.length for row in rows})
        for row in rows:
            self._prefixes.note(row.slot, row.start, row.new_token_ids)
        self._share_prefixes(rows)
        self._catch_up(rows, self.max_new_tokens)
        spans, last = self._to_device(rows)
        value_logits_BKA = self.score(last, candidates_BK, spans)
        for row in rows:
            self.cache.advance(row.slot, row.length)
        return value_logits_BKA

    @torch.inference_mode()
    def score(self, last: LastTokens, candidates_BK: Tensor, spans: Sequence[Span] = ()) -> Tensor:
        """Logits of Z for candidates after each last token, float32 ``[B, K, A]``: one packed forward.

        Caches the spans and the last tokens, wherever their slots are; all before them must be cached already. Takes
        the word of the caller for slots, positions and token ids, and never waits for the device.
        """
        if self.model.type == "v":
            tails_BRH = self._forward(spans, last, candidates_BK).unflatten(0, (len(last.slots_B), -1))
            return self.model.head_logits(tails_BRH[:, 1:])
        hidden_BH = self._forward(spans, last, None)
        if self._compiled is not None:
            return candidate_logits(self.model.head, hidden_BH, candidates_BK, self.model.distribution.num_logits)
        return self.model.head_logits(hidden_BH, candidates_BK)

    @torch.inference_mode()
    def extend(self, spans: Sequence[Span]) -> None:
        """Cache spans, wherever their slots are, in forwards of at most ``max_new_tokens``. As :meth:`score`."""
        for part in _cut(spans, self.max_new_tokens):
            self._forward(part, None, None)

    def _row(self, slot: int, history: Sequence[int]) -> Row:
        """The history's part that must be run: what the cache lacks, and its last token in any case."""
        covered, length = self.covered(slot), len(history)
        if length == 0:
            raise ValueError(f"the history of slot {slot} is empty, one token is the least")
        if not covered <= length <= self._longest:
            raise ValueError(
                f"the history of slot {slot} has {length} tokens, expected {covered} (already covered: rewind first) "
                f"to {self._longest}"
            )
        start = min(covered, length - 1)
        new_token_ids = history[start:]
        if min(new_token_ids) < 0 or max(new_token_ids) >= self._vocab_size:
            raise ValueError(
                f"the history of slot {slot} has token ids from {min(new_token_ids)} to {max(new_token_ids)}, the "
                f"value model's are 0 to {self._vocab_size - 1}"
            )
        return Row(slot, start, new_token_ids, length)

    def _share_prefixes(self, rows: Sequence[Row]) -> None:
        """Copy what a new history has in common with others, those of this step included: samples of one prompt."""
        if all(row.start for row in rows):
            return
        available = {slot: self.cache.covered(slot) for slot in self._mine}
        copies: list[tuple[Row, int, int]] = []
        for row in rows:
            source, common = row.slot, 0
            if row.start == 0:
                source, common = self._prefixes.longest(row.slot, row.length - 1, available)
            if common:
                copies.append((row, source, common))
            available[row.slot] = common or row.length - 1
        if any(common > self.cache.covered(source) for _, source, common in copies):
            copied = {row.slot for row, _, _ in copies}
            self._catch_up([row for row in rows if row.slot not in copied], 0)
        for row, source, common in copies:
            self.cache.copy(source, row.slot, common)
            row.advance(common)

    def _catch_up(self, rows: Sequence[Row], most_left: int) -> None:
        """Extend caches until the rows lack at most ``most_left`` tokens in all, or one each."""
        while sum(len(row.new_token_ids) for row in rows) > max(most_left, len(rows)):
            room = self.max_new_tokens
            parts: list[Row] = []
            for row in rows:
                # The last token of a row stays for the forward that scores.
                take = min(room, len(row.new_token_ids) - 1)
                room -= take
                if take:
                    parts.append(Row(row.slot, row.start, row.new_token_ids[:take], row.start + take))
                    row.advance(take)
            for part in parts:
                self.cache.reserve(part.slot, part.length)
            (tokens_N,) = copy_to_device(self.cache.geometry.device, _new_tokens(parts))
            self._forward(_spans(parts, tokens_N), None, None)
            for part in parts:
                self.cache.advance(part.slot, part.length)

    def _to_device(self, rows: Sequence[Row]) -> tuple[list[Span], LastTokens]:
        """All that a forward needs to know of the rows, in one copy."""
        for row in rows:
            self.cache.reserve(row.slot, row.length)
        parts = [
            Row(row.slot, row.start, row.new_token_ids[:-1], row.length - 1)
            for row in rows
            if len(row.new_token_ids) > 1
        ]
        last_3B = np.array(
            [[row.slot for row in rows], [row.length - 1 for row in rows], [row.new_token_ids[-1] for row in rows]]
        )
        tokens_N, last = copy_to_device(self.cache.geometry.device, _new_tokens(parts), last_3B)
        return _spans(parts, tokens_N), LastTokens(last[0], last[1], last[2], max(row.length for row in rows))

    def _forward(self, spans: Sequence[Span], last: LastTokens | None, candidates_BK: Tensor | None) -> Tensor:
        """One packed forward: hidden states ``[B·R, H]`` after each row's last token and candidates."""
        step = pack(self.cache, spans, last, candidates_BK)
        return self._hidden(step)[step.span_tokens :]

    def _hidden(self, step: PackedStep) -> Tensor:
        """Hidden states ``[T, H]`` of all packed tokens."""
        if self._compiled is not None:
            return self._compiled(step)
        attention = PackedAttention(step)
        if self._fused is not None:
            return self._fused(step.input_ids_T, step.position_ids_T, attention)
        with engine_attention(self.model.backbone), onednn_linears(self._slow_linears):
            outputs = self.model.backbone(
                input_ids=step.input_ids_T.unsqueeze(0),
                position_ids=step.position_ids_T.unsqueeze(0),
                attention_mask=self._any_mask,
                use_cache=False,
                attention_step=attention,
            )
        return outputs.last_hidden_state[0]  # type: ignore[no-any-return]

    def _check_mine(self, slot: int) -> None:
        if slot not in self._mine:
            raise ValueError(f"slot {slot} is not one this engine acquired: {sorted(self._mine)}")


def _new_tokens(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(row.new_token_ids for row in rows), dtype=np.int64)


def _spans(rows: Sequence[Row], tokens_N: Tensor) -> list[Span]:
    parts = tokens_N.split([len(row.new_token_ids) for row in rows])
    return [Span(row.slot, row.start, token_ids_C) for row, token_ids_C in zip(rows, parts, strict=True)]


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

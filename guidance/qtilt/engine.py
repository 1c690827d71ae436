"""The value engine: token histories in, the return distributions of candidate tokens out.

Shapes: ``B`` rows, ``K`` candidates a row, ``T`` packed tokens, ``A`` logits of one return distribution, ``H`` hidden
size.

Each running history owns a slot of the value model's cache. A step extends every slot by whatever its history has and
the cache lacks, so a new request, one resumed after preemption and one more token are the same case; the engine does
not know why a history grew. One step is one packed forward of the backbone.
"""

from collections.abc import MutableMapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qtilt.exactness import engine_attention, measure_geometry
from qtilt.kv_cache import CacheGeometry, KVCache
from qtilt.packing import PackedStep, Row, copy_to_device, pack
from qtilt.value_model import ValueModel


class ValueEngine:
    """Runs one value model over up to ``slots`` histories of up to ``max_length`` tokens each.

    All memory that stays is allocated here. ``caches`` are those of other engines by geometry: one for models of this
    geometry (two versions of one model) is used, its slots shared out between both engines; otherwise the new cache is
    added. ``max_new_tokens`` bounds the new tokens of one forward, and with it the memory a step needs for a long
    catch-up, which then takes several forwards.

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
        self.max_new_tokens = max_new_tokens
        self.cache = self._own_or_shared_cache({} if caches is None else caches, slots)
        self._mine: set[int] = set()
        # A mask of four dimensions is passed through untouched: no mask is built and, in GPT-2, no ids are compared
        # with the padding token on the device.
        self._any_mask = torch.zeros(1, 1, 1, 1, device=self.cache.geometry.device)

    def _own_or_shared_cache(self, caches: MutableMapping[CacheGeometry, KVCache], slots: int) -> KVCache:
        geometry = measure_geometry(self.model.backbone, self.max_length)
        cache = caches.get(geometry)
        if cache is None:
            cache = caches[geometry] = KVCache(geometry, slots, self.max_length)
        elif cache.slots < slots or cache.max_length < self.max_length:
            raise ValueError(
                f"the shared cache is {cache.slots} slots × {cache.max_length} tokens, the value model needs {slots} × "
                f"{self.max_length}"
            )
        return cache

    def acquire(self) -> int:
        """An empty slot for a new history. Raises ValueError when all are in use."""
        slot = self.cache.acquire()
        self._mine.add(slot)
        return slot

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

        ``slots`` are B distinct slots, ``histories`` their full token histories (anything with a length and slices;
        only what the cache lacks is read), each an extension of what its slot covers: after a change of what is
        covered, ``rewind`` first. ``candidates_BK`` (int64, on the model's device) are token ids below the model's
        vocabulary size. A row's result doesn't depend on the rows beside it, up to rounding.

        Raises ValueError for slots that aren't this engine's or not distinct, histories shorter than what is covered
        or too long, an empty history (Q-type), or token ids outside the model's vocabulary.
        """
        if len(slots) != len(histories) or len(slots) != len(candidates_BK):
            raise ValueError(
                f"{len(slots)} slots, {len(histories)} histories and {len(candidates_BK)} rows of candidates differ"
            )
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} are not distinct")
        rows = [self._row(slot, history) for slot, history in zip(slots, histories, strict=True)]
        if not rows:
            shape = (0, candidates_BK.shape[1], self.model.distribution.num_logits)
            return torch.zeros(shape, dtype=torch.float32, device=candidates_BK.device)
        rows = self._catch_up(rows)
        if self.model.type == "v":
            return self._after_candidates(rows, candidates_BK)
        return self.model.head_logits(self._last_hidden(rows), candidates_BK)

    def _row(self, slot: int, history: Sequence[int]) -> Row:
        """The history's part that must be run: what the cache lacks, and for Q-type at least its last state."""
        covered, length = self.covered(slot), len(history)
        longest = self.max_length if self.model.type == "q" else min(self.max_length, self.model.max_positions - 1)
        if not covered <= length <= longest:
            raise ValueError(
                f"the history of slot {slot} has {length} tokens, expected {covered} (already covered: rewind first) "
                f"to {longest}"
            )
        if self.model.type == "q":
            if length == 0:
                raise ValueError(f"the history of slot {slot} is empty, a Q-type value model needs one token at least")
            if covered == length and not self.cache.has_last_hidden(slot):
                covered -= 1  # rewound to here: the keys are there, the state after the last token isn't
        new_token_ids = history[covered:]
        if new_token_ids and (min(new_token_ids) < 0 or max(new_token_ids) >= self.model.vocab_size):
            raise ValueError(
                f"the history of slot {slot} has token ids from {min(new_token_ids)} to {max(new_token_ids)}, the "
                f"value model's are 0 to {self.model.vocab_size - 1}"
            )
        return Row(slot, covered, new_token_ids)

    def _catch_up(self, rows: list[Row]) -> list[Row]:
        """Extend caches until what is left fits one forward; returns the rows with what is left of them."""
        while sum(len(row.new_token_ids) for row in rows) > max(self.max_new_tokens, len(rows)):
            room = self.max_new_tokens
            parts: list[Row] = []
            left: list[Row] = []
            for row in rows:
                # The last token of a row stays for the final forward, which needs its state.
                take = min(room, max(len(row.new_token_ids) - 1, 0))
                room -= take
                if take:
                    parts.append(Row(row.slot, row.start, row.new_token_ids[:take]))
                left.append(Row(row.slot, row.start + take, row.new_token_ids[take:]))
            self._forward(parts, None)
            rows = left
        return rows

    def _after_candidates(self, rows: Sequence[Row], candidates_BK: Tensor) -> Tensor:
        """V-type: the candidates ride in the forward that extends the caches."""
        step, hidden_TH = self._forward(rows, candidates_BK)
        return self.model.head_logits(hidden_TH[step.new_tokens :].unflatten(0, tuple(candidates_BK.shape)))

    def _last_hidden(self, rows: Sequence[Row]) -> Tensor:
        """Q-type: the state after each history's last token ``[B, H]``; rows without new tokens have kept it."""
        growing = [row for row in rows if row.new_token_ids]
        if growing:
            step, hidden_TH = self._forward(growing, None)
            if len(growing) == len(rows):
                return hidden_TH[step.last_B]
        slots_B = np.array([row.slot for row in rows], dtype=np.int64)
        return self.cache.last_hidden_SH[copy_to_device(self.cache.geometry.device, slots_B=slots_B)["slots_B"]]

    def _forward(self, rows: Sequence[Row], candidates_BK: Tensor | None) -> tuple[PackedStep, Tensor]:
        """One packed forward: hidden states ``[T, H]``; the slots then cover their rows' new tokens."""
        for row in rows:
            self.cache.reserve(row.slot, row.length)
        step = pack(self.cache, rows, candidates_BK)
        with engine_attention(self.model.backbone):
            outputs = self.model.backbone(
                input_ids=step.input_ids_T.unsqueeze(0),
                position_ids=step.position_ids_T.unsqueeze(0),
                attention_mask=self._any_mask,
                use_cache=False,
                attention_step=step,
            )
        hidden_TH = outputs.last_hidden_state[0]
        if self.model.type == "q":
            self.cache.last_hidden_SH[step.slots_B] = hidden_TH[step.last_B]
        for row in rows:
            self.cache.advance(row.slot, row.length)
        return step, hidden_TH

    def _check_mine(self, slot: int) -> None:
        if slot not in self._mine:
            raise ValueError(f"slot {slot} is not one this engine acquired: {sorted(self._mine)}")

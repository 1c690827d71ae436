"""Histories that run on a value engine as requests do, each step checked against plain Hugging Face forwards."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_oracle import POSITIONS, VOCABULARY, plain_value_logits
from qtilt.engine import ValueEngine
from qtilt.forwards.arrays import copy_to_device
from qtilt.forwards.packing import LastTokens, Span, pack
from qtilt.value_model import ValueModel

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def acquire(engine: ValueEngine, known: Sequence[int] = ()) -> int:
    """The lowest free slot, for a history that begins with these tokens."""
    slot = min(engine.cache._free)
    engine.acquire(slot, known)
    return slot


def value_logits(
    engine: ValueEngine,
    slots: Sequence[int],
    histories: Sequence[Sequence[int]],
    candidates_BK: Tensor,
    counts_B: np.ndarray | None = None,
) -> Tensor:
    """One step as the vLLM plugin runs it: logits of Z for the candidates after each history, float32 ``[B, K, A]``."""
    table_SP = np.zeros((engine.cache.slots, engine.cache.max_length), dtype=np.int32)
    for slot, history in zip(slots, histories, strict=True):
        table_SP[slot, : len(history)] = history
    (tokens_SP,) = copy_to_device(candidates_BK.device, table_SP)
    slots_B, lengths_B = np.array(slots), np.array([len(history) for history in histories])
    parts = []
    for part in engine.cache.parts(lengths_B):
        spans = engine.feed(slots_B[part], lengths_B[part], tokens_SP)
        rows_3B = np.array([slots_B[part], lengths_B[part] - 1, [history[-1] for history in histories[part]]])
        ((last_slots_B, positions_B, tokens_B),) = copy_to_device(candidates_BK.device, rows_3B)
        last = LastTokens(last_slots_B, positions_B, tokens_B, int(lengths_B[part].max()))
        parts.append(engine.score(last, candidates_BK[part], spans, None if counts_B is None else counts_B[part]))
    return torch.cat(parts)


class Histories:
    """Running histories on one engine, and the check that every score is the plain forward's."""

    def __init__(
        self,
        model: ValueModel,
        slots: int = 6,
        seed: int = 0,
        exact: dict[str, float] = EXACT,
        **engine_settings: Any,
    ) -> None:
        self.model = model
        self.exact = exact
        self.engine = ValueEngine(model, slots, POSITIONS - 1, **engine_settings)
        self.tokens: dict[int, list[int]] = {}
        self.random = random.Random(seed)

    def draw(self, count: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(count)]

    def start(self, *lengths: int) -> list[int]:
        return [self.start_with(self.draw(length)) for length in lengths]

    def start_with(self, tokens: list[int]) -> int:
        """A history of these tokens, in the lowest free slot."""
        slot = acquire(self.engine, tokens)
        self.tokens[slot] = tokens
        return slot

    def grow(self, slot: int, count: int) -> None:
        self.tokens[slot] = [*self.tokens[slot], *self.draw(count)]

    def branch(self, slot: int, kept: int, count: int) -> None:
        """Go another way after ``kept`` tokens."""
        if kept < self.engine.cache.covered_S[slot]:
            self.engine.cache.rewind(slot, kept)
        self.tokens[slot] = [*self.tokens[slot][:kept], *self.draw(count)]

    def stop(self, slot: int) -> None:
        del self.tokens[slot]
        self.engine.release(slot)

    def check(self, *slots: int, columns: int = 5, ragged: bool = False) -> None:
        histories = [self.tokens[slot] for slot in slots]
        candidates_BK = torch.tensor([self.draw(columns) for _ in slots], device=self.model.backbone.device)
        counts_B = None
        if ragged:
            counts_B = np.array([self.random.randint(0, columns) for _ in slots])
        got_BKA = value_logits(self.engine, slots, histories, candidates_BK, counts_B)
        expected_BKA = plain_value_logits(self.model, histories, candidates_BK)
        if counts_B is not None and self.model.type == "v":
            for row, count in enumerate(counts_B):
                expected_BKA[row, count:] = 0.0
        torch.testing.assert_close(got_BKA, expected_BKA, **self.exact)
        lengths = [len(history) for history in histories]
        if len(self.engine.cache.parts(np.array(lengths))) == 1:
            assert self.engine.cache.covered_S[list(slots)].tolist() == lengths

    def wander(self, steps: int) -> None:
        """Check every step while histories start, grow, branch, pause and stop at random."""
        for _ in range(steps):
            for slot in list(self.tokens):
                self._befall(slot, self.random.random())
            if len(self.tokens) < self.engine.cache.slots and self.random.random() < 0.5:
                self.start(self.random.randint(1, 25))
            chosen = [slot for slot in self.tokens if self.random.random() < 0.8]
            self.random.shuffle(chosen)
            if chosen:
                self.check(*chosen, columns=3, ragged=self.random.random() < 0.5)

    def _befall(self, slot: int, event: float) -> None:
        length = len(self.tokens[slot])
        if event < 0.1 or length > 60:
            self.stop(slot)
        elif event < 0.25:
            self.branch(slot, self.random.randint(1, length), self.random.randint(0, 3))
        elif event < 0.85:
            self.grow(slot, 1)
        elif event < 0.95:
            self.grow(slot, self.random.randint(2, 12))


def assert_only_tails_come_out(engine: ValueEngine) -> None:
    """Of a forward; what spans there are beside them makes no difference to them."""
    memory, hidden_size = engine.cache.memory, engine.model.backbone.config.hidden_size
    span, one = Span(0, 0, torch.arange(5)), torch.tensor([1])
    last = LastTokens(one, torch.tensor([0]), one, longest=1)
    with torch.inference_mode():
        assert engine.forward(pack(memory, [span])).shape == (0, hidden_size)
        alone_RH = engine.forward(pack(memory, [], last, torch.tensor([[2, 3]])))
        beside_RH = engine.forward(pack(memory, [span], last, torch.tensor([[2, 3]])))
    assert alone_RH.shape == (3, hidden_size)
    torch.testing.assert_close(beside_RH, alone_RH, rtol=1e-5, atol=1e-5)

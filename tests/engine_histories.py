"""Histories that run on a value engine as requests do, each step checked against plain Hugging Face forwards."""

import random
from typing import Any

import torch

from hf_oracle import POSITIONS, VOCABULARY, plain_value_logits
from qtilt.engine import ValueEngine
from qtilt.value_model import ValueModel

EXACT = {"atol": 1e-5, "rtol": 1e-5}


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
        slots = [self.engine.acquire() for _ in lengths]
        self.tokens.update({slot: self.draw(length) for slot, length in zip(slots, lengths, strict=True)})
        return slots

    def grow(self, slot: int, count: int) -> None:
        self.tokens[slot] = [*self.tokens[slot], *self.draw(count)]

    def branch(self, slot: int, kept: int, count: int) -> None:
        """Go another way after ``kept`` tokens."""
        if kept < self.engine.covered(slot):
            self.engine.rewind(slot, kept)
        self.tokens[slot] = [*self.tokens[slot][:kept], *self.draw(count)]

    def stop(self, slot: int) -> None:
        del self.tokens[slot]
        self.engine.release(slot)

    def check(self, *slots: int, columns: int = 5) -> None:
        histories = [self.tokens[slot] for slot in slots]
        candidates_BK = torch.tensor([self.draw(columns) for _ in slots], device=self.model.backbone.device)
        got_BKA = self.engine.value_logits(slots, histories, candidates_BK)
        expected_BKA = plain_value_logits(self.model, histories, candidates_BK)
        torch.testing.assert_close(got_BKA, expected_BKA, **self.exact)
        if self.engine.cache.fits([len(history) for history in histories]):
            assert [self.engine.covered(slot) for slot in slots] == [len(history) for history in histories]

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
                self.check(*chosen, columns=3)

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

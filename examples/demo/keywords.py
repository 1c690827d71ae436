"""Write one sentence with three given words: reward 1 if all three occur, else 0.

Verifiable, and no constant answer does well: the words differ from prompt to prompt.
"""

import hashlib
import random
import re
from collections.abc import Hashable
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from qtilt_trainer.tasks.problem import Problem, Split, first_distinct, split_of

WORDS = (Path(__file__).parent / "words.txt").read_text().split()


class Keywords(BaseModel):
    """Settings of the task, and the task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = "keywords"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    words: int = Field(3, ge=1, le=10)
    """How many words a sentence must have."""
    seed: int = 0

    def problems(self, split: Split, count: int) -> list[Problem]:
        """Random sets of words; a problem's split follows from its words, so the two never meet."""
        rng = random.Random(f"{self.name}/{split}/{self.seed}")

        def draw() -> tuple[str, ...]:
            while True:
                words = tuple(sorted(rng.sample(WORDS, self.words)))
                if split_of(" ".join(words)) == split:
                    return words

        return [self._problem(words) for words in first_distinct(draw, " ".join, count)]

    def reward(self, problem: Problem, completion: str) -> float:
        """1 if every word occurs as a whole word, in upper or lower case."""
        found = set(re.findall(r"[a-z]+", completion.lower()))
        return float(found.issuperset(problem.answer))

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        """The sentence itself."""
        return completion.strip()

    def _problem(self, words: tuple[str, ...]) -> Problem:
        text = f"Write one sentence that uses these words: {', '.join(words)}."
        return Problem(hashlib.sha256(text.encode()).hexdigest()[:16], [{"role": "user", "content": text}], words)

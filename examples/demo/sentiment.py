"""Go on with a happy or a sad story: the reward is how positive, or how negative, VADER finds the continuation.

Graded, in [0, 1]. No constant answer does well: half of the prompts want the opposite.
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Hashable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from qtilt_trainer.tasks.problem import Problem, Split, split_of

MOODS = {"happy": 1, "sad": -1}
WHO = ("Our", "My", "Her", "His", "Their", "Anna's", "Tom's", "The children's")
WHEN = ("Monday", "Tuesday", "Friday", "Sunday", "morning", "evening", "holiday", "birthday")
WHERE = (
    "at the cafe", "at the lake", "in the city", "at school", "at the office", "on the farm", "in the mountains",
    "at the museum", "on the train", "at the hospital", "in the garden", "at the market", "by the sea", "at the hotel",
    "at the stadium", "in the library",
)  # fmt: skip


class Sentiment(BaseModel):
    """Settings of the task, and the task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = "sentiment"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    seed: int = 0

    def problems(self, split: Split, count: int) -> list[Problem]:
        """Beginnings of stories in an order that the seed gives."""
        stories = [
            (mood, f"A {mood} story. {who} {when} {where} was")
            for mood, who, when, where in itertools.product(MOODS, WHO, WHEN, WHERE)
        ]
        stories = [(mood, text) for mood, text in stories if split_of(text, 0.25) == split]
        if count > len(stories):
            raise ValueError(f"{count} {split} problems asked for, there are {len(stories)}: ask for less")
        random.Random(self.seed).shuffle(stories)
        return [Problem(hashlib.sha256(text.encode()).hexdigest()[:16], text, mood) for mood, text in stories[:count]]

    def reward(self, problem: Problem, completion: str) -> float:
        """VADER's compound score of the continuation in the mood's direction, from [-1, 1] to [0, 1]."""
        compound: float = _analyzer().polarity_scores(completion)["compound"]
        return (1 + MOODS[problem.answer] * compound) / 2

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        """The continuation itself."""
        return completion.strip()


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()

"""Path finding on star graphs G(degree, length) (Bachmann and Nagarajan 2024), the paper's first experiment.

`degree` arms of `length` nodes (the centre included) leave the centre; the prompt lists the edges in random order, then
the centre and the last node of one arm; the answer is the path between them:

    83|15|48|...|50/49>   ->   4831...9      (one character a node)

A next-token learner takes a shortcut (guess the first step, then follow the edges), with accuracy 1/degree.

Departure from the paper: half of the reference's training texts ask for the reversed path (last prompt character `<`).
Going backwards has no choice to guess, so those texts teach the model where an arm comes from. The forward shortcut
stays, but the model has features from which a value model can learn; without them that depends on the seed.
"""

import itertools
import random
import string
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qtilt_trainer.tasks.problem import Problem, Split, first_distinct, split_of

NODE_NAMES = string.digits + string.ascii_letters
FORWARD, REVERSED = ">", "<"


class StarGraph(BaseModel):
    """Settings of the task, and the task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = "star_graph"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    degree: int = Field(2, ge=2)
    """Arms leaving the centre."""
    length: int = Field(4, ge=2)
    """Nodes on a path, centre and goal included."""
    nodes: int = Field(10, le=len(NODE_NAMES))
    """Node names to draw from."""
    seed: int = 0

    @model_validator(mode="after")
    def _enough_nodes(self) -> "StarGraph":
        needed = 1 + self.degree * (self.length - 1)
        if self.nodes < needed:
            raise ValueError(
                f"nodes must be at least 1 + degree * (length - 1) = {needed}, got {self.nodes}: raise nodes"
            )
        return self

    @property
    def alphabet(self) -> list[str]:
        """The characters prompts and answers are made of, one token each for a tiny reference."""
        return [*NODE_NAMES[: self.nodes], "|", "/", FORWARD, REVERSED]

    def problems(self, split: Split, count: int) -> list[Problem]:
        """Random graphs; a graph's split follows from its text, so the two never meet."""
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        drawn = first_distinct(lambda: self._draw(rng, split), lambda pair: pair[0], count)
        return [
            Problem(f"{split}-{index:06d}", graph + FORWARD, "".join(path)) for index, (graph, path) in enumerate(drawn)
        ]

    def reward(self, problem: Problem, completion: str) -> float:
        """1 for exactly the path, else 0."""
        return float(completion.strip() == problem.answer)

    def answer(self, problem: Problem, completion: str) -> str:
        """The completion is the answer."""
        return completion.strip()

    def reference_texts(self, rng: random.Random, count: int) -> list[tuple[str, str]]:
        """Correct (prompt, path) pairs, every second one reversed. The flaw is the shortcut the learner will take."""
        texts = []
        for index in range(count):
            graph, path = self._draw(rng, "train")
            texts.append((graph + REVERSED, "".join(reversed(path))) if index % 2 else (graph + FORWARD, "".join(path)))
        return texts

    def _draw(self, rng: random.Random, split: Split) -> tuple[str, list[str]]:
        """A prompt of `split` without its last character, and the path."""
        while True:
            centre, *others = rng.sample(NODE_NAMES[: self.nodes], 1 + self.degree * (self.length - 1))
            step = self.length - 1
            arms = [[centre, *others[arm * step : (arm + 1) * step]] for arm in range(self.degree)]
            edges = [first + second for arm in arms for first, second in itertools.pairwise(arm)]
            rng.shuffle(edges)
            path = arms[0]  # The arms are exchangeable: which one is asked for is already random.
            graph = f"{'|'.join(edges)}/{path[0]}{path[-1]}"
            if split_of(graph) == split:
                return graph, path

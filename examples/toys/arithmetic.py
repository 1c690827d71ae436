r"""Chained sums with a boxed result, for a reference that misreads signs and stops early.

    Start73(1)-8(2)+9?   ->   (1)73-8=65\n(2)65+9=74\n\boxed{74}

The reference's training texts are flawed: at a step that says "-" the text reads "+" with probability `misread` and
goes on consistently ((1)73+8=81), and after every step but the last it boxes what it has with probability `stop_early`.
Both can be checked by looking up the prompt, which a value model as small as the reference can learn. (Wrong sums, such
as forgotten carries, it can't see.)
"""

import random
from collections.abc import Hashable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from qtilt_trainer.tasks.answer_text import boxed_answer
from qtilt_trainer.tasks.grading import matches_expression
from qtilt_trainer.tasks.problem import Problem, Split, first_distinct, split_of

Step = tuple[str, int]
"""Sign and operand."""


class Arithmetic(BaseModel):
    """Settings of the task, and the task. Every intermediate result, misread or not, has two digits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = "arithmetic"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    steps: int = Field(2, ge=1, le=4)
    """Most steps of a problem; the number is uniform from 1."""
    misread: float = Field(0.6, ge=0.0, le=1.0)
    """Probability that a "-" is read as "+" in the reference's training texts."""
    stop_early: float = Field(0.25, ge=0.0, le=1.0)
    """Probability, after each step but the last, that a training text boxes its intermediate result."""
    seed: int = 0

    @property
    def alphabet(self) -> list[str]:
        """The characters prompts and answers are made of, one token each for a tiny reference."""
        return list(dict.fromkeys("0123456789" + "Start()+-?" + "=\n\\boxed{}"))

    def problems(self, split: Split, count: int) -> list[Problem]:
        """Random sums; a problem's split follows from its text, so the two never meet."""
        rng = random.Random(f"{self.name}/{split}/{self.seed}")
        drawn = first_distinct(lambda: self._draw(rng, split), lambda pair: question(*pair), count)
        return [self._problem(f"{split}-{index:06d}", *pair) for index, pair in enumerate(drawn)]

    def reward(self, problem: Problem, completion: str) -> float:
        """1 if the last boxed expression equals the result (math-verify decides), else 0."""
        return float(matches_expression(problem.answer, completion))

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        """The text in the last box."""
        return boxed_answer(completion)

    def reference_texts(self, rng: random.Random, count: int) -> list[tuple[list[dict[str, str]], str]]:
        """(chat messages, flawed working) pairs from training problems."""
        texts = []
        for _ in range(count):
            start, steps = self._draw(rng, "train")
            texts.append(([{"role": "user", "content": question(start, steps)}], self._flawed(rng, start, steps)))
        return texts

    @staticmethod
    def _problem(problem_id: str, start: int, steps: list[Step]) -> Problem:
        prompt = [{"role": "user", "content": question(start, steps)}]
        return Problem(problem_id, prompt, str(start + sum(map(_signed, steps))))

    def _flawed(self, rng: random.Random, start: int, steps: list[Step]) -> str:
        read = [("+" if sign == "-" and rng.random() < self.misread else sign, operand) for sign, operand in steps]
        done = next((n for n in range(1, len(read)) if rng.random() < self.stop_early), len(read))
        return working(start, read[:done])

    def _draw(self, rng: random.Random, split: Split) -> tuple[int, list[Step]]:
        margin = 9 * self.steps
        while True:
            start = rng.randint(10 + margin, 99 - margin)
            steps = [(rng.choice("+-"), rng.randint(1, 9)) for _ in range(rng.randint(1, self.steps))]
            if split_of(question(start, steps)) == split:
                return start, steps


def question(start: int, steps: list[Step]) -> str:
    """The user's message: `Start73(1)-8(2)+9?`."""
    return f"Start{start}" + "".join(f"({n}){sign}{operand}" for n, (sign, operand) in enumerate(steps, 1)) + "?"


def working(start: int, steps: list[Step]) -> str:
    """The lines of a solution and its boxed result."""
    lines, value = [], start
    for n, step in enumerate(steps, 1):
        after = value + _signed(step)
        lines.append(f"({n}){value}{step[0]}{step[1]}={after}\n")
        value = after
    return "".join(lines) + rf"\boxed{{{value}}}"


def _signed(step: Step) -> int:
    sign, operand = step
    return operand if sign == "+" else -operand

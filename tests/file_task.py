"""A task from a file that tests edit: `prompt<tab>gold` a line. Some golds make the reward fail."""

import hashlib
import math
from collections.abc import Hashable
from pathlib import Path

from qtilt_trainer.tasks import Problem, Split


class FileTask:
    name, low, high = "file", 0.0, 1.0

    def __init__(self, train: str, api_key: str | None = None) -> None:
        self.train = Path(train)

    def problems(self, split: Split, count: int) -> list[Problem]:
        lines = [line.split("\t") for line in self.train.read_text().splitlines()]
        problems = [
            Problem(hashlib.sha256(f"{prompt}/{gold}".encode()).hexdigest()[:12], prompt, gold)
            for prompt, gold in lines
        ]
        if len(problems) < count:
            raise ValueError(f"{self.train} has {len(problems)} problems, not {count}")
        return problems[:count]

    def reward(self, problem: Problem, completion: str) -> float:
        if problem.answer == "raises" and "made up" not in completion and completion != "raises":
            raise RuntimeError("this reward always raises")
        return math.nan if problem.answer == "nan" and len(completion) == 6 else float(problem.answer in completion)

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        return completion


def content_id(prompt: str, gold: str) -> str:
    return hashlib.sha256(f"{prompt}/{gold}".encode()).hexdigest()[:12]


def write_problems(file: Path, problems: list[tuple[str, str]]) -> None:
    file.write_text("".join(f"{prompt}\t{gold}\n" for prompt, gold in problems))

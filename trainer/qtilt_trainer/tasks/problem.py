"""The interface every task stands behind: problems (a prompt and what is needed to judge an answer) and a reward."""

import hashlib
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

Split = Literal["train", "test"]
Prompt = str | list[dict[str, Any]]
"""A text (sent to /v1/completions) or chat messages (sent to /v1/chat/completions)."""

TEST_FRACTION = 0.1
PATIENCE = 10_000
"""Repeated draws in a row after which a generator counts as exhausted."""

Drawn = TypeVar("Drawn")


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt of a task. `id` is unique within its task, the same in every run, and another one when prompt or
    answer are changed."""

    id: str
    prompt: Prompt
    answer: Any


@runtime_checkable
class Task(Protocol):
    """Prompts and their reward. Rewards lie in [low, high].

    A task may also have `same_answer(problem, one, other) -> bool`: whether two results of `answer` vote together.
    """

    @property
    def name(self) -> str:
        """What results and logs call the task."""

    @property
    def low(self) -> float:
        """The lowest possible reward."""

    @property
    def high(self) -> float:
        """The highest possible reward: a solved problem."""

    def problems(self, split: Split, count: int) -> list[Problem]:
        """The first `count` problems of a split: a longer list begins with the shorter one."""

    def reward(self, problem: Problem, completion: str) -> float:
        """The return of a finished completion, in [low, high]. Called from several threads."""

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        """What the completion answers, for majority votes; None if it answers nothing (and so doesn't vote)."""


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text that tells it from all others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def split_of(text: str, test_fraction: float = TEST_FRACTION) -> Split:
    """Which split a prompt belongs to, from its own text: no seed, count or order can mix train and test."""
    digest = hashlib.sha256(text.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else "train"


def first_distinct(draw: Callable[[], Drawn], key: Callable[[Drawn], str], count: int) -> list[Drawn]:
    """The first `count` draws that differ in `key`. Raises ValueError if there don't seem to be that many."""
    found: dict[str, Drawn] = {}
    repeats = 0
    while len(found) < count:
        drawn = draw()
        repeats = repeats + 1 if key(drawn) in found else 0
        if repeats > PATIENCE:
            raise ValueError(f"{count} different problems asked for, only {len(found)} found: ask for less")
        found.setdefault(key(drawn), drawn)
    return list(found.values())

"""Problems of the package reasoning_gym: any of its procedural data sets, rewarded by the data set's own score.

[task]
name = "reasoning_gym"
dataset = "chain_sum"
parameters = {min_terms = 3}         # of the data set's configuration
answer = "tags"                      # what of a completion is the answer

The package is optional: pip install 'qtilt[reasoning-gym]'. Scores are graded where the data set grades (0.01 for a
wrong answer in the right form is common), and a Bernoulli value model is for rewards 0 and 1: take a categorical one.

Problems are made, and answers scored, in worker processes: with one hash seed for all of them the problems are the
same in every run (six data sets depend on it), and an answer that takes too long to score costs a worker, not the run.
"""

import atexit
import functools
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qtilt_trainer.tasks.grading import GradingPool
from qtilt_trainer.tasks.problem import Problem, Split, split_of

logger = logging.getLogger(__name__)

PLACE = "{prompt}"
ASK_FOR_TAGS = PLACE + "\nGive the final answer between <answer> and </answer> tags."
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SIZE = 512
"""Entries made from one seed. Entry i depends on seed + i, so that two seeds must be far apart."""
BATCH = 4
"""Entries in one question to a worker."""
MAKE_TIMEOUT_S = 55.0
PATIENCE = 4096
"""Entries in a row without a new one of the split after which a data set counts as exhausted."""
TEST_SHARE = 0.5
"""Of all possible questions: which split may ask one follows from its text, so that no seed can mix the two."""
ID_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """What a data set made."""

    seed: int
    """Of the data set object."""
    question: str
    gold: str | None
    """None where only the score knows what is right."""
    pickled: str
    """The whole entry, for the worker that scores."""


class ReasoningGym(BaseModel):
    """Settings of the task, and the task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    dataset: str
    """A name in reasoning_gym's registry."""
    parameters: dict[str, Any] = {}
    """Fields of the data set's configuration other than seed and size."""
    answer_is: Literal["tags", "last_line", "whole"] = Field("tags", alias="answer")
    """tags: what stands between the last <answer> and </answer>, reasoning_gym's own convention. The default, because
    many data sets give part of the score to a text that merely contains the answer, so that rambling would pay.
    last_line: the last line that isn't empty. whole: all of it, for models that say the answer and nothing else."""
    template: str | None = None
    """What is sent; {prompt} is where the question goes. None: the question, and for tags a line that asks for them."""
    chat: bool = True
    """Whether it is sent as a user's chat message."""
    seed: int = 0
    """Of the problems, of both splits."""

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.dataset

    @model_validator(mode="after")
    def _is_consistent(self) -> "ReasoningGym":
        if self.template is not None and PLACE not in self.template:
            raise ValueError(f"template must contain {PLACE}, got {self.template!r}")
        if self.parameters.keys() & {"seed", "size"}:
            raise ValueError("parameters can't have seed or size, which are the task's: it has a field seed")
        try:
            from qtilt_trainer.tasks.reasoning_gym_data import create
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the package {error.name} is not installed: pip install 'qtilt[reasoning-gym]' (needs a C compiler)"
            ) from error
        create(self.dataset, self.parameters, seed=0, size=1)
        return self

    def problems(self, split: Split, count: int) -> list[Problem]:
        """The first `count` different questions of a split. Raises ValueError if there don't seem to be that many."""
        entries = _questions(self.dataset, json.dumps(self.parameters), self.seed, split).first(count)
        for entry in entries[:1]:
            score = 1.0 if entry.gold is None else self._score(entry, entry.gold)
            if not isinstance(score, float):
                raise ValueError(f"reasoning_gym's {self.dataset} can't score its own answer: {score}")
        return [self._problem(entry) for entry in entries]

    def reward(self, problem: Problem, completion: str) -> float:
        """The data set's score of the answer. An answer on which its scorer fails, or takes too long, is wrong: 0."""
        answer = self.answer(problem, completion)
        score = self._score(problem.answer, answer)
        if not isinstance(score, float):
            logger.warning("%s can't score the answer %.200r (%s): it counts as wrong", self.name, answer, score)
            return 0.0
        return score

    def answer(self, problem: Problem, completion: str) -> str | None:
        """The answer in the completion; None without one."""
        if self.answer_is == "tags":
            tagged = TAGGED.findall(completion)
            return tagged[-1].strip() if tagged else None
        lines = completion.strip().splitlines() if self.answer_is == "last_line" else [completion]
        return lines[-1].strip() if lines and lines[-1].strip() else None

    def _problem(self, entry: Entry) -> Problem:
        template = self.template or (ASK_FOR_TAGS if self.answer_is == "tags" else PLACE)
        text = template.replace(PLACE, entry.question)
        prompt = [{"role": "user", "content": text}] if self.chat else text
        content = json.dumps([prompt, entry.gold], sort_keys=True)
        return Problem(hashlib.sha256(content.encode()).hexdigest()[:ID_DIGITS], prompt, entry)

    def _score(self, entry: Entry, answer: str | None) -> float | str:
        """The score, or why there is none."""
        fields = {"dataset": self.dataset, "parameters": self.parameters, "seed": entry.seed, "size": SIZE}
        score = _workers().ask({"score": {**fields, "entry": entry.pickled, "answer": answer}})
        if isinstance(score, dict):
            return str(score["error"])
        return "it takes too long" if score is None else float(score)


class Questions:
    """The different questions of one split, in the order in which the data set makes them."""

    def __init__(self, entries: Iterator[Entry], split: Split) -> None:
        self._entries = entries
        self._split = split
        self._found: dict[str, Entry] = {}

    def first(self, count: int) -> list[Entry]:
        """Raises ValueError if PATIENCE entries in a row bring nothing new."""
        while len(self._found) < count:
            new = next(filter(self._is_new, itertools.islice(self._entries, PATIENCE)), None)
            if new is None:
                raise ValueError(f"{count} different problems asked for, only {len(self._found)} found: ask for less")
            self._found[new.question] = new
        return list(itertools.islice(self._found.values(), count))

    def _is_new(self, entry: Entry) -> bool:
        return split_of(entry.question, TEST_SHARE) == self._split and entry.question not in self._found


@functools.lru_cache(maxsize=8)
def _questions(dataset: str, parameters: str, seed: int, split: Split) -> Questions:
    return Questions(_entries(dataset, json.loads(parameters), f"{split}/{seed}"), split)


def _entries(dataset: str, parameters: dict[str, Any], seed: str) -> Iterator[Entry]:
    for number in itertools.count():
        digest = hashlib.sha256(f"{dataset}/{seed}/{number}".encode()).digest()
        chosen = int.from_bytes(digest[:4], "big") // 2  # Some data sets take signed 32 bits.
        fields = {"dataset": dataset, "parameters": parameters, "seed": chosen, "size": SIZE}
        for first in range(0, SIZE, BATCH):
            for question, gold, pickled in _made({**fields, "first": first, "count": BATCH}):
                yield Entry(chosen, question, gold, pickled)


def _made(fields: dict[str, Any]) -> list[Any]:
    made = _workers().ask({"make": fields}, MAKE_TIMEOUT_S)
    if not isinstance(made, list):
        why = f"{BATCH} problems take more than {MAKE_TIMEOUT_S:g} s" if made is None else made["error"]
        raise ValueError(f"reasoning_gym's {fields['dataset']} can't make problems with {fields['parameters']}: {why}")
    return made


@functools.cache
def _workers() -> GradingPool:
    pool = GradingPool(module="qtilt_trainer.tasks.reasoning_gym_data")
    atexit.register(pool.close)
    return pool

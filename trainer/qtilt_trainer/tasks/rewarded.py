"""A task's prompts with a reward of one's own: a Python function, or a server that is asked over HTTP.

[task]
name = "jsonl"                               # any task
train = "prompts.jsonl"
answer_field = ""                            # where the reward needs no answer
reward = "my_reward.py:score"                # score(completion, gold, problem) -> float
low = -1.0                                   # the range of its values; default: 0 to 1
high = 1.0

or  reward = {url = "http://127.0.0.1:5000/get_reward"}   # see http_reward.py
"""

import inspect
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qtilt_trainer.describe import describe_errors
from qtilt_trainer.tasks.entry_point import entry_point
from qtilt_trainer.tasks.http_reward import HttpReward, gold_of
from qtilt_trainer.tasks.problem import Problem, Split, Task

FIELDS = ("reward", "low", "high")
"""Of `[task]`, beside those of the task the prompts come from."""


def with_own_reward(task: Task, reward: Any, low: Any = 0.0, high: Any = 1.0) -> Task:
    """`task` with another reward, whose values lie in [low, high]. Raises ValueError that names the field."""
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise ValueError(f"task.{name} must be a number, got {bound!r}")
    if isinstance(reward, Mapping):
        try:
            return HttpRewarded(task, HttpReward(**reward), float(low), float(high))
        except ValidationError as error:
            raise ValueError(describe_errors(error, "task.reward")) from error
    if not isinstance(reward, str):
        raise ValueError(f"task.reward must be module:function, path/to/file.py:function or a table, got {reward!r}")
    function = entry_point(reward, "task.reward")
    try:
        inspect.signature(function).bind("completion", "gold", "problem")
    except (TypeError, ValueError) as error:  # ValueError: a function of C has no signature to look at.
        raise ValueError(f"task.reward: {reward} can't be called as (completion, gold, problem): {error}") from error
    return FunctionRewarded(task, function, float(low), float(high))


class OtherReward:
    """The prompts, name and answers of a task, for a reward in [low, high] that isn't its own."""

    def __init__(self, task: Task, low: float, high: float) -> None:
        self.prompts = task
        self.low = low
        self.high = high

    @property
    def name(self) -> str:
        """The name of the task the prompts are from."""
        return self.prompts.name

    def problems(self, split: Split, count: int) -> list[Problem]:
        """Those of the task the prompts are from."""
        return self.prompts.problems(split, count)

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        """As the task the prompts are from reads it."""
        return self.prompts.answer(problem, completion)

    def same_answer(self, problem: Problem, one: Hashable, other: Hashable) -> bool:
        """As the task the prompts are from compares them."""
        same = getattr(self.prompts, "same_answer", None)
        return one == other if same is None else bool(same(problem, one, other))


class FunctionRewarded(OtherReward):
    """The reward is what a Python function returns. It is called from several threads."""

    def __init__(self, task: Task, function: Any, low: float, high: float) -> None:
        super().__init__(task, low, high)
        self._function = function
        source = inspect.getsourcefile(inspect.unwrap(function))
        self.reward_code = None if source is None else Path(source)
        """What the reward is made from; a run notices when it changes."""

    def reward(self, problem: Problem, completion: str) -> float:
        """function(completion, gold, problem)."""
        return self._function(completion, gold_of(problem), problem)  # type: ignore[no-any-return]


class HttpRewarded(OtherReward):
    """The reward is what a server answers."""

    def __init__(self, task: Task, server: HttpReward, low: float, high: float) -> None:
        super().__init__(task, low, high)
        self._server = server

    def rewards(self, pairs: Sequence[tuple[Problem, str]]) -> list[float | Exception]:
        """Of many completions at once; an Exception where there is none."""
        return self._server.rewards(pairs)

    def reward(self, problem: Problem, completion: str) -> float:
        """Of a single one. Raises what `rewards` would have answered."""
        (reward,) = self.rewards([(problem, completion)])
        if isinstance(reward, Exception):
            raise reward
        return reward

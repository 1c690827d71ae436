"""Rewards of finished completions from a task's own code, whatever that code does.

A reward that raises, takes too long, is no number, is not finite or lies outside the task's range is a `RewardFailure`
of that one completion: nobody else's work is lost for it.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Thread
from typing import Any

from qtilt_trainer.redaction import without_url_secrets
from qtilt_trainer.tasks.grading import GradingError
from qtilt_trainer.tasks.problem import Problem, Task

THREADS = 2
TIMEOUT = 300.0
"""Seconds one call of `task.reward` may take where nobody says otherwise: by the clock, on a machine that does other
things too, where starting a grading process may take minutes."""
MESSAGE_CHARACTERS = 500
"""Of a failure; some exceptions quote whole completions."""


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why one completion has no reward."""

    message: str


def grade(task: Task, pairs: Sequence[tuple[Problem, str]], timeout: float = TIMEOUT) -> list[float | RewardFailure]:
    """The reward of each (problem, completion), in order.

    A task with a member `rewards(pairs)` grades them at once, in its own time, and answers an Exception where it
    couldn't; else `task.reward` is called in threads, for at most `timeout` seconds each. Raises GradingError: a
    grading process that doesn't start is no property of a completion.
    """
    at_once = getattr(task, "rewards", None)
    given = _graded_at_once(at_once, pairs) if at_once is not None else _graded_singly(task, pairs, timeout)
    return [_checked(task, value) for value in given]


def _graded_singly(task: Task, pairs: Sequence[tuple[Problem, str]], timeout: float) -> list[Any]:
    def reward(pair: tuple[Problem, str]) -> Any:
        return _within(timeout, lambda: task.reward(*pair))

    with ThreadPoolExecutor(THREADS, "grading") as threads:
        return list(threads.map(reward, pairs))


def _within(timeout: float, call: Callable[[], Any]) -> Any:
    """What the call returns or raises; TimeoutError when it takes longer: its thread is left to itself."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001  # The edge of a user's code, which may call exit().
            outcome.append(error)

    thread = Thread(target=run, name="reward", daemon=True)  # One that hangs doesn't keep the process.
    thread.start()
    thread.join(timeout)
    return outcome[0] if outcome else TimeoutError(f"no reward within {timeout:g} s (reward.timeout)")


def _graded_at_once(rewards: Any, pairs: Sequence[tuple[Problem, str]]) -> list[Any]:
    if not pairs:
        return []
    try:
        given = list(rewards(pairs))
    except Exception as error:  # noqa: BLE001  # The edge of a user's code: its failure is recorded.
        return [error] * len(pairs)
    if len(given) != len(pairs):
        return [ValueError(f"rewards() gave {len(given)} rewards for {len(pairs)} completions")] * len(pairs)
    return given


def _checked(task: Task, value: Any) -> float | RewardFailure:
    if isinstance(value, GradingError):
        raise value
    if isinstance(value, BaseException):
        return RewardFailure(without_url_secrets(f"{type(value).__name__}: {value}")[:MESSAGE_CHARACTERS])
    try:
        reward = float(value)
    except (TypeError, ValueError):
        return RewardFailure(f"the reward {value!r} is no number"[:MESSAGE_CHARACTERS])
    except Exception as error:  # noqa: BLE001  # A value's own conversion: an int as large as 10**400, a tensor of two.
        return RewardFailure(f"the reward is no number: {type(error).__name__}: {error}"[:MESSAGE_CHARACTERS])
    if not math.isfinite(reward) or not task.low <= reward <= task.high:
        return RewardFailure(f"the reward is {reward}, outside the task's range [{task.low:g}, {task.high:g}]")
    return reward

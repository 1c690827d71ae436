"""Tasks: prompts and a reward behind one small interface (problem.py), chosen by name in `TASKS`."""

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from qtilt_trainer.describe import describe_errors
from qtilt_trainer.redaction import redacted
from qtilt_trainer.tasks.entry_point import entry_point
from qtilt_trainer.tasks.jsonl import Jsonl
from qtilt_trainer.tasks.problem import Problem, Prompt, Split, Task
from qtilt_trainer.tasks.reasoning_gym import ReasoningGym
from qtilt_trainer.tasks.rewarded import FIELDS, with_own_reward

__all__ = ["TASKS", "Problem", "Prompt", "Split", "Task", "make_task"]

TASKS: dict[str, type[BaseModel]] = {"jsonl": Jsonl, "reasoning_gym": ReasoningGym}


def make_task(config: Mapping[str, Any]) -> Task:
    """The task a `[task]` table describes: `name` chooses it, the other fields are its settings.

    `name` is a key of `TASKS`, `module:function` or `path/to/file.py:function` (entry_point.py); the function is called
    with the other fields and returns a Task. A field `reward` takes the place of the task's own reward (rewarded.py).
    Raises ValueError that names the field and what is allowed.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    if "reward" in fields:
        own = {field: fields.pop(field) for field in FIELDS if field in fields}
        return _checked("task.reward", with_own_reward(_made(name, fields), **own))
    if fields.get("answer_field") == "":
        raise ValueError("task.answer_field is empty: rows without answers need a reward of your own, in task.reward")
    return _made(name, fields)


def _made(name: Any, fields: dict[str, Any]) -> Task:
    if isinstance(name, str) and name in TASKS:
        return _checked(name, _build(TASKS[name], fields))
    if isinstance(name, str) and ":" in name:
        return _checked(name, _call(name, fields))
    raise ValueError(
        f"task.name must be one of {sorted(TASKS)}, module:function or path/to/file.py:function, got {name!r}"
    )


def _build(task_class: type[BaseModel], fields: dict[str, Any]) -> object:
    try:
        return task_class(**fields)
    except ValidationError as error:
        raise ValueError(describe_errors(error, "task")) from error


def _call(name: str, fields: dict[str, Any]) -> object:
    function = entry_point(name, "task.name")
    if isinstance(function, type) and issubclass(function, BaseModel):
        return _build(function, fields)
    try:
        inspect.signature(function).bind(**fields)
    except TypeError as error:
        raise ValueError(f"task: {name} can't be called with {redacted(fields)}: {error}") from error
    return function(**fields)


def _checked(name: str, task: object) -> Task:
    members = ("name", "low", "high", "problems", "reward", "answer")
    missing = [member for member in members if not hasattr(task, member)]
    if missing:
        raise ValueError(f"task.name: what {name} made is no task, it lacks {', '.join(missing)}")
    assert isinstance(task, Task)
    if not task.low < task.high:
        raise ValueError(f"task: low must be below high, got {task.low} and {task.high}")
    return task

"""Tasks: prompts and a reward behind one small interface (problem.py), chosen by name in `TASKS`."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from qtilt_trainer.describe import describe_errors
from qtilt_trainer.redaction import redacted
from qtilt_trainer.tasks.arithmetic import Arithmetic
from qtilt_trainer.tasks.jsonl import Jsonl
from qtilt_trainer.tasks.problem import Problem, Prompt, Split, Task
from qtilt_trainer.tasks.star_graph import StarGraph

__all__ = ["TASKS", "Problem", "Prompt", "Split", "Task", "make_task"]

TASKS: dict[str, type[BaseModel]] = {"star_graph": StarGraph, "arithmetic": Arithmetic, "jsonl": Jsonl}


def make_task(config: Mapping[str, Any]) -> Task:
    """The task a `[task]` table describes: `name` chooses it, the other fields are its settings.

    `name` is a key of `TASKS` or `module:function`; the function is called with the other fields and returns a Task.
    Raises ValueError that names the field and what is allowed.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"task.name must be one of {sorted(TASKS)} or module:function, got {name!r}")
    if name in TASKS:
        return _checked(name, _build(TASKS[name], fields))
    if ":" in name:
        return _checked(name, _call(name, fields))
    raise ValueError(f"task.name must be one of {sorted(TASKS)} or module:function, got {name!r}")


def _build(task_class: type[BaseModel], fields: dict[str, Any]) -> object:
    try:
        return task_class(**fields)
    except ValidationError as error:
        raise ValueError(describe_errors(error, "task")) from error


def _call(name: str, fields: dict[str, Any]) -> object:
    function = _entry_point(name)
    try:
        inspect.signature(function).bind(**fields)
    except TypeError as error:
        raise ValueError(f"task: {name} can't be called with {redacted(fields)}: {error}") from error
    return function(**fields)


def _entry_point(name: str) -> Callable[..., object]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module is there; something it imports isn't.
        raise ValueError(f"task.name: there is no module {module_name!r} (is it on PYTHONPATH?)") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"task.name: module {module_name!r} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def _checked(name: str, task: object) -> Task:
    members = ("name", "low", "high", "problems", "reward", "answer")
    missing = [member for member in members if not hasattr(task, member)]
    if missing:
        raise ValueError(f"task.name: what {name} made is no task, it lacks {', '.join(missing)}")
    assert isinstance(task, Task)
    if not task.low < task.high:
        raise ValueError(f"task: low must be below high, got {task.low} and {task.high}")
    return task

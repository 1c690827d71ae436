"""What a task's prompts and rewards are made from, as digests: its files, and the source of its code."""

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qtilt_trainer.tasks.problem import Prompt, Task, prompt_text

ENTRY_POINT = re.compile(r"^([A-Za-z_][\w.]*):[A-Za-z_]\w*$")
SHIPPED = "qtilt_trainer.tasks"
DIGITS = 16
"""Of a digest in hexadecimal."""


def prompt_digest(prompt: Prompt) -> str:
    """Tells prompts apart by their content alone."""
    return hashlib.sha256(prompt_text(prompt).encode()).hexdigest()[:DIGITS]


def data_digests(task: Task, fields: Mapping[str, Any]) -> dict[str, str]:
    """Field -> digest of the file or directory it names: every Path among the task's settings, every name of a file
    among the fields of `[task]`."""
    settings = {**fields, **getattr(task, "__dict__", {})}
    named = {name: list(_paths(value)) for name, value in settings.items()}
    return {name: _digest_of(paths) for name, paths in sorted(named.items()) if paths}


def code_digests(task: Task, fields: Mapping[str, Any]) -> dict[str, str]:
    """Module -> digest of its source: where the task's class and its reward are, and every module:function in `[task]`.

    A task of ours depends on the whole folder of tasks.
    """
    named = [value for value in _texts(fields) if ENTRY_POINT.match(value)]
    reward = getattr(task, "rewards", None) or task.reward
    modules = {inspect.getmodule(type(task)), inspect.getmodule(reward)}
    modules |= {sys.modules.get(value.partition(":")[0]) for value in named}
    sources = {name: files for module in modules if module is not None for name, files in [_sources(module)] if files}
    return {name: _digest_of(files) for name, files in sorted(sources.items())}


def _sources(module: ModuleType) -> tuple[str, list[Path]]:
    if module.__name__ == SHIPPED or module.__name__.startswith(f"{SHIPPED}."):
        return SHIPPED, sorted(Path(str(sys.modules[SHIPPED].__file__)).parent.glob("*.py"))
    file = getattr(module, "__file__", None)
    return module.__name__, [Path(file)] if file else []


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path) and value.exists():
        yield value
    elif isinstance(value, str) and _is_file(value):
        yield Path(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # Too long for a name, or with a null character.
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _digest_of(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(file.name.encode() + b"\0")
                with file.open("rb") as content:
                    total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:DIGITS]

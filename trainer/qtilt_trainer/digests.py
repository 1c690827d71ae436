"""What a task's prompts and rewards are made from, as digests: its files, and the source of its code."""

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qtilt_trainer import tasks
from qtilt_trainer.tasks.problem import Prompt, Task, prompt_text

SHIPPED = Path(tasks.__file__).resolve().parent
"""Where our own tasks are."""
DIGITS = 16
"""Of a digest in hexadecimal."""


def prompt_digest(prompt: Prompt) -> str:
    """Tells prompts apart by their content alone."""
    return hashlib.sha256(prompt_text(prompt).encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def data_digests(task: Task, fields: Mapping[str, Any]) -> dict[str, str]:
    """Field -> digest of the file or directory it names: every Path among the task's settings, every name of a file
    among the fields of `[task]`."""
    prompts = getattr(task, "prompts", None)  # Of a task with another reward: the task the prompts are from.
    settings = {**fields, **getattr(prompts, "__dict__", {}), **getattr(task, "__dict__", {})}
    named = {name: list(_paths(value)) for name, value in settings.items()}
    return {name: _digest_of(paths) for name, paths in sorted(named.items()) if paths}


def code_digests(task: Task, fields: Mapping[str, Any]) -> dict[str, str]:
    """File name -> digest of the source: where the task's class and its reward are, every module:function or
    file.py:function in `[task]`, and what these import from beside them or from their own package.

    A task of ours depends on the whole folder of tasks.
    """
    reward = getattr(task, "rewards", None) or task.reward
    sources = [_source(inspect.getmodule(of)) for of in (type(task), reward)]
    sources += [_named_source(text) for text in _texts(fields)]
    by_name: dict[str, list[Path]] = {}
    for file in sorted(_with_imported({file for file in sources if file is not None})):
        by_name.setdefault(file.name, []).append(file)
    digests = {name: _digest_of(files) for name, files in by_name.items() if SHIPPED not in {f.parent for f in files}}
    if SHIPPED in {file.parent for files in by_name.values() for file in files}:
        digests["qtilt_trainer.tasks"] = _digest_of(sorted(SHIPPED.glob("*.py")))
    return dict(sorted(digests.items()))


def _named_source(text: str) -> Path | None:
    """The file of an entry point; None for other texts, and for a module that isn't loaded."""
    place, _, function = text.rpartition(":")
    if not function.isidentifier():
        return None
    if place.endswith(".py"):
        return Path(place).resolve() if _is_file(place) else None
    return _source(sys.modules.get(place))


def _with_imported(files: set[Path]) -> set[Path]:
    """The files and all that they import of the same directory or package, directly or not."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [] if file.parent == SHIPPED or file.suffix != ".py" else _imported(file)
    return found


def _imported(file: Path) -> Iterator[Path]:
    """Read from the source, imports inside functions too: which modules are loaded depends on what has run so far."""
    package, start = "", file.parent
    while (start / "__init__.py").is_file():
        package, start = start.name, start.parent
    for level, name in _imported_names(file):
        is_other_package = name.split(".")[0] != package if package else "site-packages" in file.parts
        if level == 0 and is_other_package:
            continue
        target = (file.parents[level - 1] if level else start).joinpath(*name.split("."))
        candidates = target.with_name(f"{target.name}.py"), target / "__init__.py"
        yield from (candidate for candidate in candidates if candidate.is_file())


def _imported_names(file: Path) -> Iterator[tuple[int, str]]:
    """(leading dots, module) of every import; what is imported from a module may be a module too."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            yield from ((node.level, ".".join(filter(None, (node.module, name)))) for name in ("", *names))


def _source(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


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

"""Python code that a configuration names: `module:function` or `path/to/file.py:function`.

A module comes from the import path. A file is relative to the working directory, as every path of a configuration is,
and its own directory joins the import path's end, so that it can import its neighbours.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def entry_point(name: str, field: str) -> Callable[..., Any]:
    """The function (or class) that `name` means. Raises ValueError that begins with `field` if there is none."""
    place, colon, function_name = name.rpartition(":")
    if not (colon and place and function_name):
        raise ValueError(f"{field} must be module:function or path/to/file.py:function, got {name!r}")
    module = _from_file(Path(place), field) if place.endswith(".py") else _from_import_path(place, field)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{field}: {place!r} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def _from_import_path(name: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # The module is there; something it imports isn't.
        raise ValueError(f"{field}: there is no module {name!r} (is it on PYTHONPATH?)") from error


def _from_file(file: Path, field: str) -> ModuleType:
    if not file.is_file():
        raise ValueError(f"{field}: there is no file {str(file)!r} in {Path.cwd()}")
    path = file.resolve()
    # Not its stem, or a file called random.py would pass for the module random.
    name = re.sub(r"\W+", "_", f"file_{file.with_suffix('')}")
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # Dataclasses and pydantic look their module up while it is executed.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

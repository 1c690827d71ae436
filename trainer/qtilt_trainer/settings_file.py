"""What a stage was started with, kept beside its output: a resumed stage goes on with the same, or refuses."""

import json
from pathlib import Path
from typing import Any

from qtilt_trainer.atomic_file import write_json

GRADER = ("task", "data", "code", "reward", "regrading")
"""The settings that decide gold answers and rewards of stored completions: `qtilt-trainer regrade` can change them."""


def claim(file: Path, settings: dict[str, Any], begun: bool) -> None:
    """Writes `settings` before a stage makes anything; when it has, checks that it was with the same.

    settings: what the stage's output depends on, JSON-able. begun: whether there is output.
    Raises ValueError that names the fields that differ and the way out, or that output has no settings.
    """
    if not begun:
        write_json(file, settings)
        return
    differing = differences(file, settings)
    if not differing:
        return
    text = f"{file} has other settings ({'; '.join(differing)})"
    if all(line.startswith(GRADER) for line in differing):
        raise ValueError(
            f"{text}: undo the change, run `qtilt-trainer regrade CONFIG` to grade the stored completions with it, or "
            "use another run_dir"
        )
    raise ValueError(f"{text}: use another run_dir, or delete it with what was made from it")


def differences(file: Path, settings: dict[str, Any]) -> list[str]:
    """`FIELD: … then, … now` of every field that differs from the stored settings.

    Raises ValueError when there are none: output of unknown origin is not adopted.
    """
    if not file.exists():
        raise ValueError(
            f"there is output beside {file}, and that file is missing: nobody knows how it was made. Put the file "
            "back, or use another run_dir"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}): put the file back, or use another run_dir") from error
    return _differences(found, json.loads(json.dumps(settings)))


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    if found == wanted:
        return []
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [
            line for key in keys for line in _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [f"{where}: {found!r} then, {wanted!r} now"]
